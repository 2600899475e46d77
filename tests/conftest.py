import warnings

import pytest

try:
    import torch

    torch.set_num_threads(1)
except ImportError:
    pass

try:
    import numpyro

    numpyro.enable_x64()
except ImportError:
    pass


@pytest.fixture
def clean_param_store():
    import pyro

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture
def no_warnings():
    """A normal run warns of nothing, neither from here nor from the libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
