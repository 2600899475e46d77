"""What the numerical univariate maps state of themselves: quadrature error, far tails in float32, slopes."""

import numpy as np
import pytest

from tests import backends

SPLINES = ["RationalQuadraticSpline", "LinearRationalSpline", "CircularSpline"]
NAMES = ["DeepSigmoidal", "DeepDenseSigmoidal", "MonotoneNetwork", "SumOfSquares", "Bernstein", "GaussianMixtureCDF"]


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def params_for(univariate, sd, n, dtype="float64"):
    return (sd * np.random.default_rng(0).normal(size=(n, univariate.num_params, 2))).astype(dtype)


def compiled(backend, method):
    """In jax as one program: operation by operation it takes seconds."""
    return backend.jax.jit(method) if backend.name == "jax" else method


def test_quadrature_error_is_that_stated(backend):
    network = backend.pkg.univariate.MonotoneNetwork
    coarse, fine = network(), network(num_nodes=200)
    params = backend.array(params_for(coarse, 3.0, 300))
    x = backend.array(np.random.default_rng(1).uniform(-6, 6, (300, 2)))
    (y, _), (exact, log_slope) = (g.forward_and_log_det(x, params) for g in (coarse, fine))
    y, exact, log_slope = map(backend.numpy, (y, exact, log_slope))
    # relative to the map's own scale, the greater of value and slope
    assert (np.abs(y - exact) <= 5e-11 * np.maximum(np.abs(exact), np.exp(log_slope)).clip(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_far_tails_in_float32(backend, name):
    """To |x| = 100 at params of sd 3: the round trip to what rounding the value costs."""
    univariate = getattr(backend.pkg.univariate, name)()
    params = backend.array(params_for(univariate, 3.0, 200, "float32"))
    x = np.random.default_rng(1).uniform(-100, 100, (200, 2)).astype("float32")
    y, log_det = compiled(backend, univariate.forward_and_log_det)(backend.array(x), params)
    back, opposite = map(backend.numpy, compiled(backend, univariate.inverse_and_log_det)(y, params))
    y, log_det = backend.numpy(y), backend.numpy(log_det)
    assert y.dtype == log_det.dtype == back.dtype == opposite.dtype == np.float32
    assert np.isfinite(y).all() and np.isfinite(log_det).all()
    allowed = 2e-6 * (np.abs(x) + np.abs(y) + 100) * np.maximum(1, np.exp(-log_det))
    assert (np.abs(back - x) <= allowed).all(), (np.abs(back - x) / allowed).max()
    assert np.quantile(np.abs(log_det + opposite), 0.99) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_zero_params_are_the_identity_and_any_are_increasing(backend, name):
    univariate = getattr(backend.pkg.univariate, name)()
    x = np.linspace(-100, 100, 2001)[:, None]
    forward = compiled(backend, univariate.forward_and_log_det)
    y, log_det = forward(backend.array(x), backend.array(np.zeros((univariate.num_params, 1))))
    np.testing.assert_allclose(backend.numpy(y), x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(backend.numpy(log_det), 0, atol=1e-13)
    for sd in (3.0, 30.0):
        params = backend.array(params_for(univariate, sd, 1)[0])
        assert (np.diff(backend.numpy(forward(backend.array(x), params)[0]), axis=0) > 0).all()


@pytest.mark.parametrize("name, argument", [("Bernstein", "degree"), ("MonotoneNetwork", "bound")])
def test_an_argument_that_is_not_positive_is_named(backend, name, argument):
    with pytest.raises(ValueError, match=f"{name}: {argument} must be positive"):
        getattr(backend.pkg.univariate, name)(**{argument: 0})


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["Affine", "SinhArcsinh", "TailTransform", *SPLINES, *NAMES])
def test_gradients_where_input_and_params_broadcast(backend, name, inverse):
    """Params of more vectors than the input, and an input of more than the params: as if both were expanded."""
    univariate = getattr(backend.pkg.univariate, name)()
    rng = np.random.default_rng(0)
    x, params = rng.normal(size=(4, 2)), rng.normal(size=(3, 1, univariate.num_params, 2))
    w = rng.normal(size=(2, 3, 4, 2))

    def loss(x, params):
        method = univariate.inverse_and_log_det if inverse else univariate.forward_and_log_det
        y, log_det = method(x, params)
        return (backend.array(w[0]) * y + backend.array(w[1]) * log_det).sum()

    def gradients(x, params):
        x, params = backend.array(x), backend.array(params)
        if backend.name == "jax":
            return [np.asarray(g) for g in backend.jax.jit(backend.jax.grad(loss, argnums=(0, 1)))(x, params)]
        x, params = x.requires_grad_(), params.requires_grad_()
        return [backend.numpy(g) for g in backend.torch.autograd.grad(loss(x, params), [x, params])]

    of_x, of_params = gradients(x, params)
    expanded = np.broadcast_to(x, (3, 4, 2)), np.broadcast_to(params, (3, 4, *params.shape[-2:]))
    of_every_x, of_all_params = gradients(*expanded)
    np.testing.assert_allclose(of_x, of_every_x.sum(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(of_params, of_all_params.sum(1, keepdims=True), rtol=1e-9, atol=1e-9)
