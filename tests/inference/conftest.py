import importlib

import pytest

from tests.inference.fitting import Fitter

_fitters = {}


@pytest.fixture(params=["torch", "jax"])
def in_float64(request):
    """The name of a backend, which works in float64 by default."""
    if request.param == "torch":
        torch = importlib.import_module("torch")
        torch.set_default_dtype(torch.float64)
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    return request.param


@pytest.fixture
def fitter(in_float64):
    if in_float64 not in _fitters:
        _fitters[in_float64] = Fitter(in_float64)
    return _fitters[in_float64]
