"""Continuous flows: solvers agree, their orders are as stated, traces are unbiased, adjoints are gradients."""

import numpy as np
import pytest

from tests import backends
from tests.registry import Case


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def continuous(backend, dim=3, hidden=(8, 8), sd=1.0, context=False, dtype="float64", **options):
    case = Case("continuous", lambda p, dim, **k: p.transforms.Continuous(dim, hidden, **options, **k), deep=True)
    flow = backend.build(case, dim, context, dtype=dtype)
    return backend.with_state(flow, backends.perturbed(backend.state(flow), sd, True))


POINTS = np.random.default_rng(0).normal(size=(6, 3))


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6), (8, 6, 7), (6, 5, 4, 6)])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
def test_the_trace_is_that_of_the_jacobian(backend, hidden, activation):
    flow = continuous(backend, hidden=hidden, activation=activation)
    velocity, x = flow.velocity, backend.array(POINTS)
    trace = backend.numpy(velocity(0.3, x, velocity.constants())[1])
    eps = 1e-6
    numeric = sum(
        (
            backend.numpy(velocity(0.3, x + eps * unit, velocity.constants())[0])
            - backend.numpy(velocity(0.3, x - eps * unit, velocity.constants())[0])
        )[:, i]
        / (2 * eps)
        for i, unit in enumerate(backend.array(np.eye(3)))
    )
    np.testing.assert_allclose(trace, numeric, atol=1e-8)


@pytest.mark.parametrize("solver, order, steps", [("rk4", 4, 16), ("dop853", 8, 4)])
def test_the_error_falls_by_the_stated_order(backend, solver, order, steps):
    exact = backend.run(continuous(backend, num_steps=30), POINTS)
    errors = []
    for num_steps in (steps, 2 * steps):
        got = backend.run(continuous(backend, solver=solver, num_steps=num_steps), POINTS)
        errors.append([np.abs(a - b).max() for a, b in zip(got, exact, strict=True)])
    for coarse, fine in np.transpose(errors):
        assert coarse / fine > 2 ** (order - 1)


@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "bosh3"])
def test_adaptive_solvers_keep_to_their_tolerance(backend, solver):
    tolerance = 1e-5 if solver == "bosh3" else 1e-8
    expected = backend.run(continuous(backend, sd=0.7, num_steps=12), POINTS)
    flow = continuous(backend, sd=0.7, solver=solver, rtol=tolerance, atol=tolerance)
    for a, b in zip(backend.run(flow, POINTS), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=30 * tolerance)
    assert backend.run(flow, POINTS[:0])[0].shape == (0, 3)


def test_direct_and_adjoint_gradients_are_those_of_the_fixed_steps(backend):
    context = np.random.default_rng(2).normal(size=(6, 3))
    by_params, by_x = backend.gradients(continuous(backend, num_steps=12, context=True), POINTS, context, True)
    for adjoint in (False, True):
        flow = continuous(backend, context=True, solver="dopri5", rtol=1e-9, atol=1e-9, adjoint=adjoint)
        params, x = backend.gradients(flow, POINTS, context, True)
        np.testing.assert_allclose(x, by_x, atol=1e-6)
        for name, value in by_params.items():
            np.testing.assert_allclose(params[name], value, atol=1e-6, err_msg=name)


def test_hutchinsons_log_det_is_unbiased_and_the_value_is_the_same(backend):
    n = 4000
    x = POINTS[:1] + 1e-9 * np.arange(n)[:, None]  # as good as one point, and noise of its own for each
    flow = continuous(backend, trace="hutchinson", num_steps=3, hidden=(8,))
    y, log_det = backend.run(flow, x)
    expected_y, expected = backend.run(continuous(backend, num_steps=3, hidden=(8,)), x)
    np.testing.assert_allclose(y, expected_y, atol=1e-12)
    assert not flow.log_det_is_exact and continuous(backend).log_det_is_exact
    assert 0 < abs(log_det.mean() - expected.mean()) < 4 * log_det.std() / n**0.5


def test_solver_error_is_that_of_the_round_trip(backend):
    coarse, fine = (continuous(backend, num_steps=n) for n in (1, 8))
    for a, b in zip(*(f.solver_error(backend.array(POINTS)) for f in (coarse, fine)), strict=True):
        assert float(a.max()) > 1e-6 > 1e-8 > float(b.max())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trace": "none"}, "trace must be"),
        ({"solver": "euler"}, "solver must be one of"),
        ({"num_steps": 0}, "num_steps"),
        ({"rtol": 0.0}, "rtol"),
        ({"adjoint": True}, "adjoint=True needs an adaptive solver"),
        ({"activation": "relu"}, "activation must be smooth"),
    ],
)
def test_bad_arguments_are_named(backend, options, message):
    with pytest.raises(ValueError, match=message):
        continuous(backend, **options)


def test_the_gradient_keeps_no_activations(backend):
    width, x = 64, np.random.default_rng(0).normal(size=(500, 3))
    flow = continuous(backend, hidden=(width, width))
    one_layer = x.itemsize * len(x) * width  # of one pass, of which a solution has 48
    assert backend.held_for_gradient(flow, x) < 0.5 * flow.passes[0] * one_layer
