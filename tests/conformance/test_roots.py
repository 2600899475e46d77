"""The numerical inverse: scalar roots of monotone maps, vector roots of contractions."""

import importlib

import numpy as np
import pytest

from tests import backends


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def rooms(backend):
    """The numerical room, and the array library."""
    numerical = importlib.import_module(f"{backend.pkg.__name__}.numerical")
    return numerical, backend.torch if backend.name == "torch" else backend.jnp


def test_newton_does_not_run_in_a_cycle(backend):
    """Steep in the middle, flat outside: Newton's steps jump from shoulder to shoulder within their bracket."""
    numerical, np_ = rooms(backend)
    rng = np.random.default_rng(0)
    raw, scale, shift, y = (backend.array(size * rng.normal(size=20_000)) for size in (5, 5, 3, 5))
    planar = importlib.import_module(f"{backend.pkg.__name__}.transforms.planar")
    size = planar.expm1_asinh(raw * scale) / scale

    def function(x):
        a = scale * x + shift
        return x + size * np_.tanh(a), planar.log_slope(a, raw * scale)

    x = numerical.monotone_root(function, y, y - abs(size), y + abs(size))
    value, log_slope = function(x)
    rounding = 1e-14 * np_.exp(log_slope) * (1 + abs(x)) + 1e-13
    assert bool((abs(value - y) <= rounding).all())


def test_scalar_roots_inside_a_scan_keep_their_second_derivatives():
    """``lax.custom_root`` loses them there, without a word."""
    backend = backends.get("jax")
    jax, jnp = backend.jax, backend.jnp
    root = rooms(backend)[0].monotone_root

    def step(s, x):
        return root(lambda v: (v**3 + v, jnp.log(3 * v**2 + 1)), s) + x

    x = jnp.array([0.3, -1.2])
    looped = jax.grad(lambda x: jnp.sin(jax.lax.fori_loop(0, 2, lambda _, s: step(s, x), x)).sum())
    unrolled = jax.grad(lambda x: jnp.sin(step(step(x, x), x)).sum())
    products = [jax.jvp(g, (x,), (jnp.ones(2),))[1] for g in (looped, unrolled)]
    np.testing.assert_allclose(*products, rtol=1e-10)
    numeric = (looped(x + 1e-6) - looped(x - 1e-6)) / 2e-6
    np.testing.assert_allclose(products[0], numeric, rtol=1e-6)


@pytest.mark.parametrize("way", ["dense", "given", "neumann"])
def test_vector_roots_and_their_gradients(backend, way, monkeypatch):
    numerical, np_ = rooms(backend)
    monkeypatch.setattr(numerical, "MAX_DENSE", 0 if way == "neumann" else 128)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 6))
    weight *= 0.8 / np.linalg.norm(weight, 2)
    y, u, v = rng.normal(size=(3, 4, 6))

    def solve(y, weight):
        known = (lambda x: (1 - np_.tanh(x @ weight.T) ** 2)[..., None] * weight) if way == "given" else None
        return numerical.fixed_point_root(lambda x: np_.tanh(x @ weight.T), y, jacobian=known)

    def g(y):  # gradient along u of sum(sin x), as a function of y
        if backend.name == "jax":
            return backend.jax.grad(lambda y: np_.sin(solve(y, backend.array(weight))).sum())(y)
        x = np_.sin(solve(y, backend.array(weight))).sum()
        return backend.torch.autograd.grad(x, y, create_graph=True)[0]

    x = backend.numpy(solve(backend.array(y), backend.array(weight)))
    np.testing.assert_allclose(x + np.tanh(x @ weight.T), y, atol=1e-14)
    if backend.name == "torch":  # by steps of another kind where gradients are off
        with backend.torch.no_grad():
            np.testing.assert_allclose(backend.numpy(solve(backend.array(y), backend.array(weight))), x, atol=1e-14)
    slope = 1 - np.tanh(x @ weight.T) ** 2
    jacobian = np.linalg.inv(np.eye(6) + slope[..., None] * weight)
    expected = (np.cos(x)[:, None] @ jacobian)[:, 0]
    eps = 1e-6
    if backend.name == "jax":
        gradient = g(backend.array(y))
        product = backend.jax.grad(lambda y: (g(y) * u).sum())(backend.array(y))
        above, below = g(y + eps * v), g(y - eps * v)
    else:
        at = backend.array(y).requires_grad_()
        gradient = g(at)
        product = backend.torch.autograd.grad((gradient * backend.array(u)).sum(), at)[0]
        above, below = (backend.numpy(g(backend.array(y + s * eps * v).requires_grad_())) for s in (1, -1))
    np.testing.assert_allclose(backend.numpy(gradient), expected, rtol=1e-11)
    numeric = (((above - below) / (2 * eps)) * u).sum()
    assert float((backend.numpy(product) * v).sum()) == pytest.approx(float(numeric), rel=1e-7)


def test_vector_roots_that_do_not_converge_are_an_error(backend):
    numerical, np_ = rooms(backend)
    y = backend.array(np.ones((3, 2)))
    with pytest.raises(Exception, match="mine: the numerical inverse did not converge"):
        np_.sin(numerical.fixed_point_root(lambda x: 2 * x, y, owner="mine"))
