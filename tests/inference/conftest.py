import importlib

import pytest

from tests.inference.fitting import Fitter

_fitters = {}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("torch", "jax")])
def fitter(request):
    if request.param not in _fitters:
        _fitters[request.param] = Fitter(request.param)
    if request.param == "torch":
        torch = importlib.import_module("torch")
        torch.set_default_dtype(torch.float64)
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    return _fitters[request.param]
