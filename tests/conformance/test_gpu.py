"""The contract on an accelerator: ``pytest -m gpu``. Skips, saying so, where there is none."""

import importlib
from contextlib import contextmanager

import numpy as np
import pytest

from tests import backends
from tests.conformance.test_contract import *  # noqa: F403  (the same tests, with the fixture below)
from tests.conformance.test_univariate import *  # noqa: F403
from tests.inference.fitting import within_steps
from tests.registry import CASES

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.on_accelerator(request.param)


@pytest.fixture
def torch_backend():
    return backends.on_accelerator("torch")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_transfers_in_a_pass(backend, case):
    """Neither direction waits for the device, save for a search that ends by what it finds (in torch)."""
    flow, x = backend.build(case, case.dim), backend.array(case.points(case.dim)[:6])
    if backend.name == "jax":
        run = backend.eqx.filter_jit(lambda flow, x: flow.inverse_and_log_det(flow.forward_and_log_det(x)[0]))
        run(flow, x)
        with backend.jax.transfer_guard("disallow"):
            back, log_det = run(flow, x)
    else:
        searches = case.numerical or len(set(case.passes(case.dim))) > 1  # autoregressive sweeps end when nothing moves
        backend.torch.cuda.set_sync_debug_mode("default" if searches else "error")
        try:
            back, log_det = flow.inverse_and_log_det(flow.forward_and_log_det(x)[0])
        finally:
            backend.torch.cuda.set_sync_debug_mode("default")
        assert back.device == log_det.device == x.device
    np.testing.assert_allclose(backend.numpy(back), backend.numpy(x), rtol=1e-6, atol=1e-6)


def test_steps_of_flow_vi_stay_on_the_device(backend):
    """Between two looks at the progress bar no step of a fit waits for the device; the posterior lives there."""
    if backend.name == "jax":  # a chunk of steps is one program, which holds no transfer
        models = importlib.import_module("tests.inference.models_numpyro")
        posterior = backend.pkg.FlowVI(models.eight_schools, num_steps=100, progress_bar=False).run(
            backend.jax.random.key(0)
        )
        assert {d.platform for d in posterior.draws.unconstrained.devices()} != {"cpu"}
    else:
        torch, models = backend.torch, importlib.import_module("tests.inference.models_pyro")
        y, sigma = (torch.as_tensor(a, device="cuda") for a in (models.Y, models.SIGMA))

        @contextmanager
        def no_waiting():
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

        with within_steps(no_waiting) as counts, torch.device("cuda"):
            posterior = backend.pkg.FlowVI(models.eight_schools, num_steps=200, progress_bar=False).run(y, sigma)
            assert posterior.draws.unconstrained.is_cuda
            assert all(value.is_cuda for value in posterior.sample((3,)).values())
        assert sum(counts) >= 50
    assert -32.5 < posterior.elbo.value < -31.2
