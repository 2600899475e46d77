"""Planar and radial flows (Rezende & Mohamed 2015, Variational Inference with Normalizing Flows)."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.conditioners import MLP
from numpyro_flows.numerical import monotone_root
from numpyro_flows.transform_module import TransformModule


class Planar(TransformModule):
    """``y = x + u tanh(w x + b)``: moves everything along one direction (eq. 10).

    Forward costs ``O(dim)``. The inverse is one scalar root in ``w x``, some ten evaluations of ``tanh``. It is a
    bijection because ``u`` is moved along ``w`` until ``w u > -1`` (appendix A.1, with a bound that is reached slower
    than exponentially and leaves small ``u`` as they are). Starts at the identity.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    params: Array
    conditioner: MLP | None
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
        key: Array,
    ):
        self.dim = dim
        limit = dim**-0.5
        start, key = jax.random.split(key)
        self.params = jnp.concatenate(
            [jnp.zeros(dim), jax.random.uniform(start, (dim + 1,), minval=-limit, maxval=limit)]
        )
        self.conditioner = MLP(0, hidden_dims, 2 * dim + 1, context_dim, activation, key=key) if context_dim else None

    def _params(self, x: Array, context: Array | None) -> tuple[Array, Array, Array, Array]:
        """``u``, ``w``, ``b`` and the product ``w u`` before its bound."""
        theta = self.params if self.conditioner is None else self.params + self.conditioner(x[..., :0], context)
        u, w, b = theta[..., : self.dim], theta[..., self.dim : -1], theta[..., -1]
        product, square = (w * u).sum(-1, keepdims=True), (w * w).sum(-1, keepdims=True)
        tiny = jnp.finfo(x.dtype).tiny
        u = u + w * (product**2 / ((square + tiny) * (1 + jnp.sqrt(1 + product**2))))
        return u, w, b, product[..., 0]

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, w, b, product = self._params(x, context)
        a = (w * x).sum(-1) + b
        return x + u * jnp.tanh(a)[..., None], log_slope(a, product)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, w, b, product = self._params(y, context)
        s = (w * y).sum(-1) + b
        size = expm1_asinh(product)  # w u: s = a + w u tanh(a)
        a = monotone_root(
            lambda a: (a + size * jnp.tanh(a), log_slope(a, product)),
            s,
            s - jnp.abs(size),
            s + jnp.abs(size),
            owner="Planar",
        )
        return y - u * jnp.tanh(a)[..., None], -log_slope(a, product)


class Radial(TransformModule):
    """``y = x + beta (x - x0) / (alpha + |x - x0|)``: expands or contracts around a point (eq. 14).

    Both directions cost ``O(dim)``; the inverse solves a quadratic for the radius. It is a bijection because
    ``beta > -alpha`` (appendix A.2). Starts at the identity.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param activation: the conditioner's activation.
    """

    params: Array
    conditioner: MLP | None
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
        key: Array,
    ):
        self.dim = dim
        start, key = jax.random.split(key)
        self.params = jnp.concatenate([jax.random.uniform(start, (dim,), minval=-1, maxval=1), jnp.zeros(2)])
        self.conditioner = MLP(0, hidden_dims, dim + 2, context_dim, activation, key=key) if context_dim else None

    def _polar(self, x: Array, context: Array | None) -> tuple[Array, Array, Array, Array]:
        """The centre, what lies beyond it, the radius in units of ``alpha``, and ``raw``: ``beta = alpha m(raw)``."""
        theta = self.params if self.conditioner is None else self.params + self.conditioner(x[..., :0], context)
        centre, width, raw = theta[..., : self.dim], theta[..., -2], theta[..., -1]
        beyond = x - centre
        radius = jnp.sqrt((beyond**2).sum(-1) + jnp.finfo(x.dtype).eps ** 2)  # differentiable at the centre
        return centre, beyond, radius * jnp.exp(-jnp.arcsinh(width)), raw

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        _, beyond, r, raw = self._polar(x, context)
        return x + beyond * (expm1_asinh(raw) / (1 + r))[..., None], self._log_det(r, raw)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        centre, beyond, s, raw = self._polar(y, context)
        inner = jnp.exp(jnp.arcsinh(raw))  # 1 + beta / alpha: s = r (r + inner) / (1 + r)
        half = 0.5 * (s - inner)
        root = jnp.sqrt(half**2 + s)
        positive = half > 0  # of the two forms of the root, the one without cancellation
        r = jnp.where(positive, half + root, s / (root - jnp.where(positive, -half, half)))
        return centre + beyond * ((1 + r) / (r + inner))[..., None], -self._log_det(r, raw)

    def _log_det(self, r: Array, raw: Array) -> Array:
        inner = jnp.exp(jnp.arcsinh(raw))
        across = jnp.log((r + inner) / (1 + r))  # the slope of the dim - 1 directions around the centre
        along = jnp.log((r * (2 + r) + inner) / (1 + r) ** 2)
        return (self.dim - 1) * across + along


def expm1_asinh(x: Array) -> Array:
    """``x + sqrt(1 + x^2) - 1``: increasing, above -1, zero with slope one at zero."""
    return jnp.expm1(jnp.arcsinh(x))


def slope(t: Array, raw: Array) -> Array:
    """``1 + m (1 - t^2)`` with ``m = expm1_asinh(raw) > -1``, the slope of ``a + m tanh(a)`` by its ``t = tanh(a)``.

    A sum of positive terms.
    """
    square = t**2
    return square + (1 - square) * jnp.exp(jnp.arcsinh(raw))


def log_slope(a: Array, raw: Array) -> Array:
    """The logarithm of :func:`slope`, by ``a``."""
    return jnp.log(slope(jnp.tanh(a), raw))
