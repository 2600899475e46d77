"""What every univariate map provides."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_flows.numerical import monotone_root


class Univariate(eqx.Module):
    """A monotone map of the real line whose parameters are given from outside; it holds none itself.

    Shapes: ``x`` ``(..., n)``, ``params`` ``(..., num_params, n)``, values and log-derivatives ``(..., n)``. The
    parameters' axis is the second to last, so that sums over it run over contiguous columns. Any real ``params`` are
    valid; all zeros give the identity.
    """

    num_features = 1  # of an element, for a conditioner
    straight = False  # whether the slope is the same at every x

    @property
    def num_params(self) -> int:
        """Parameters per element."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        """Returns ``y = g(x; params)`` and ``log dy/dx``, elementwise."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        """Returns ``x`` with ``g(x; params) = y`` and ``log dx/dy``, elementwise."""
        raise NotImplementedError

    def features(self, x: Array) -> Array:
        """What a conditioner sees of ``x``: ``(..., num_features * n)``, laid out as ``(num_features, n)``."""
        return x


def pushed_score(univariate: Univariate, x: Array, params: Array, score: Array) -> Array:
    """What a score at ``x`` becomes at ``y``, elementwise: ``(score - d log_slope / dx) / slope``."""
    x, params = lax.stop_gradient((x, params))
    log_slope, pull = jax.vjp(lambda x: univariate.forward_and_log_det(x, params)[1], x)
    if not univariate.straight:
        score = score - pull(jnp.ones_like(log_slope))[0]
    return score * jnp.exp(-log_slope)


def soft_clip(x: Array, limit: float) -> Array:
    """``x`` smoothly limited to ``(-limit, limit)``, with slope one at zero: ``limit * tanh(x / limit)``."""
    return (2 * jax.nn.sigmoid(x * (2 / limit)) - 1) * limit  # compiles to less than tanh


def numerical_inverse(
    function: Callable[[Array], tuple[Array, Array]], y: Array, min_slope: float, owner: str
) -> tuple[Array, Array]:
    """Inverts ``x -> (g(x), log g'(x))`` where ``g' >= min_slope > 0``; returns ``x`` and ``log dx/dy``.

    The bound of the slope gives the root's bracket.
    """
    reach = lax.stop_gradient(y - function(jnp.zeros_like(y))[0]) * (1.01 / min_slope)
    y = jnp.broadcast_to(y, reach.shape)
    x = monotone_root(function, y, jnp.minimum(reach, 0), jnp.maximum(reach, 0), owner=owner)
    return x, -function(x)[1]


def log_sum_and_mean(log_weights: Array, values: Array) -> tuple[Array, Array]:
    """``log sum_k exp(log_weights_k)`` and the mean of ``values`` by those weights, over the second-to-last axis."""
    top = lax.stop_gradient(log_weights.max(-2, keepdims=True))
    weights = jnp.exp(log_weights - top)
    total = weights.sum(-2)
    return top.squeeze(-2) + jnp.log(total), (weights * values).sum(-2) / total


def constant(values: np.ndarray, like: Array) -> Array:
    """``values`` in the dtype of ``like``."""
    return jnp.asarray(values, like.dtype)


def unit_quadrature(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss-Legendre rule on ``[0, 1]``: exact for polynomials of degree 2 num_nodes - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (nodes + 1) / 2, weights / 2


def check_positive(owner: str, **arguments: float) -> None:
    """Raises a ``ValueError`` that names the argument which is not positive."""
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{owner}: {name} must be positive, but got {value}.")
