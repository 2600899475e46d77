"""The numerical inverse against closed forms: accuracy, gradients, errors."""

import numpy as np
import pytest

from tests import backends


class TorchSide:
    def __init__(self):
        import torch

        from pyroflows.numerical import monotone_root

        self.torch, self.root = torch, monotone_root
        self.sinh, self.log_cosh = torch.sinh, lambda x: torch.log(torch.cosh(x))
        self.tanh, self.log, self.where, self.ones = torch.tanh, torch.log, torch.where, torch.ones_like

    def array(self, x, dtype="float64"):
        return self.torch.tensor(np.asarray(x, dtype))

    def derivatives(self, f, a):
        """Value, first and second derivative of a scalar function of a scalar."""
        a = self.array(a).requires_grad_()
        y = f(a)
        (first,) = self.torch.autograd.grad(y, a, create_graph=True)
        (second,) = self.torch.autograd.grad(first, a)
        return tuple(float(part.detach()) for part in (y, first, second))

    def tangent(self, f, a):
        return float(self.torch.func.jvp(f, (self.array(a),), (self.array(1.0),))[1])

    def vmap(self, f, *xs):
        return self.torch.func.vmap(f)(*xs)


class JaxSide:
    def __init__(self):
        import jax
        import jax.numpy as jnp

        from numpyro_flows.numerical import monotone_root

        self.jax, self.jnp, self.root = jax, jnp, monotone_root
        self.sinh, self.log_cosh = jnp.sinh, lambda x: jnp.log(jnp.cosh(x))
        self.tanh, self.log, self.where, self.ones = jnp.tanh, jnp.log, jnp.where, jnp.ones_like

    def array(self, x, dtype="float64"):
        return self.jnp.asarray(np.asarray(x, dtype))

    def derivatives(self, f, a):
        first = self.jax.grad(f)
        return tuple(float(g(self.array(a))) for g in (f, first, self.jax.grad(first)))

    def tangent(self, f, a):
        return float(self.jax.jvp(f, (self.array(a),), (self.array(1.0),))[1])

    def vmap(self, f, *xs):
        return self.jax.vmap(f)(*xs)


@pytest.fixture(params=["torch", "jax"])
def side(request):
    backends.get(request.param)  # skips where it is missing
    return {"torch": TorchSide, "jax": JaxSide}[request.param]()


def cubic(side, a=1.0, b=1.0):
    """``a x + b x^3``."""
    return lambda x: (a * x + b * x**3, side.log(a + 3 * b * x**2))


def cubic_root(y):
    """The real root of ``x + x^3 = y`` (Cardano's formula in hyperbolic form, which does not cancel)."""
    return 2 / np.sqrt(3) * np.sinh(np.arcsinh(1.5 * np.sqrt(3) * y) / 3)


Y = np.concatenate([[0.0, 1e-9, -1e-9], np.geomspace(1e-3, 1e6, 20), -np.geomspace(1e-3, 1e6, 20)])


def test_accuracy_to_a_million(side):
    x = np.asarray(side.root(cubic(side), side.array(Y)))
    np.testing.assert_allclose(x, cubic_root(Y), rtol=1e-14, atol=1e-15)


def test_accuracy_in_float32(side):
    x = np.asarray(side.root(cubic(side), side.array(Y, "float32")))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, cubic_root(np.float32(Y).astype(float)), rtol=1e-6, atol=1e-6)


def test_linear_far_out_and_flat(side):
    """Slopes of 1e-3 and 1e3, which need brackets a thousand times as wide or as narrow as the first guess."""
    for slope in (1e-3, 1e3):
        function = lambda x, s=slope: (s * x, side.log(s * side.ones(x)))  # noqa: E731
        x = np.asarray(side.root(function, side.array(Y)))
        np.testing.assert_allclose(x, Y / slope, rtol=1e-13, atol=1e-13)


def test_brackets_and_tolerance_given(side):
    y = side.array([0.5, 3.0])
    x = side.root(cubic(side), y, side.array([0.0, 0.0]), side.array([1.0, 2.0]), tolerance=1e-3)
    np.testing.assert_allclose(np.asarray(x), cubic_root(np.array([0.5, 3.0])), atol=1e-3)


def test_steep_steps_where_newton_alone_goes_round(side):
    """A staircase: Newton's step from one flat overshoots to another, and back."""

    def staircase(x):
        steps = [side.tanh(20 * (x - k)) for k in (-4, -2, -1, 0, 1, 3)]
        slope = 0.02 + sum(20 * (1 - s**2) for s in steps)
        return 0.02 * x + sum(steps), side.log(slope)

    x = np.random.default_rng(0).uniform(-8, 8, 2000)
    y = staircase(side.array(x))[0]
    np.testing.assert_allclose(np.asarray(side.root(staircase, y)), x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("y", [-2.0, 0.3, 40.0])
def test_derivatives_by_the_value(side, y):
    """x = asinh(y): dx/dy = (1 + y^2)^(-1/2), d2x/dy2 = -y (1 + y^2)^(-3/2)."""

    def root(y):
        return side.root(lambda x: (side.sinh(x), side.log_cosh(x)), y)

    x, first, second = side.derivatives(root, y)
    assert x == pytest.approx(np.arcsinh(y), rel=1e-14)
    assert first == pytest.approx((1 + y**2) ** -0.5, rel=1e-12)
    assert second == pytest.approx(-y * (1 + y**2) ** -1.5, rel=1e-10)
    assert side.tangent(root, y) == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("y", [-2.0, 0.3, 40.0])
def test_derivatives_by_a_parameter(side, y):
    """a x + x^3 = y: dx/da = -x / (a + 3 x^2); the second by differentiating once more."""
    a = 0.7

    def root(a):
        return side.root(cubic(side, a), y + 0 * a)

    x, first, second = side.derivatives(root, a)
    assert a * x + x**3 == pytest.approx(y, rel=1e-13)
    slope = a + 3 * x**2
    assert first == pytest.approx(-x / slope, rel=1e-12)
    assert second == pytest.approx(-(first * slope - x * (1 + 6 * x * first)) / slope**2, rel=1e-10)
    assert side.tangent(root, a) == pytest.approx(first, rel=1e-12)


def test_what_a_bounded_image_does_not_reach_is_an_error(side):
    function = lambda x: (side.tanh(x), side.log(1 - side.tanh(x) ** 2))  # noqa: E731
    np.testing.assert_allclose(np.asarray(side.root(function, side.array([0.5]))), np.arctanh([0.5]), rtol=1e-12)
    with pytest.raises(Exception, match="the map: the numerical inverse did not converge"):
        np.asarray(side.root(function, side.array([0.5, 1.5]), owner="the map"))


def test_not_a_number_goes_through(side):
    x = np.asarray(side.root(cubic(side), side.array([1.0, np.nan, -2.0])))
    assert np.isnan(x[1])
    np.testing.assert_allclose(x[[0, 2]], cubic_root(np.array([1.0, -2.0])), rtol=1e-14)


def test_nothing_to_invert(side):
    assert np.asarray(side.root(cubic(side), side.array(np.zeros((0, 3))))).shape == (0, 3)


def test_vmap_over_values_and_parameters(side):
    a, y = np.array([0.2, 1.0, 5.0]), np.array([[-3.0, 0.1], [2.0, 1e3], [0.0, 7.0]])
    x = side.vmap(lambda a, y: side.root(cubic(side, a), y), side.array(a), side.array(y))
    for row, a_row, y_row in zip(np.asarray(x), a, y, strict=True):
        expected = np.asarray(side.root(cubic(side, a_row), side.array(y_row)))
        np.testing.assert_allclose(row, expected, rtol=1e-13, atol=1e-13)
