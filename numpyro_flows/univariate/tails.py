"""Tail maps, from Gaussian tails to heavier and lighter ones (after Hickling & Prangle 2024, Flexible tails for
normalizing flows; Bailey 1994, Polar generation of random variates with the t-distribution)."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.base import Univariate, soft_clip

LIMIT = 50.0  # of weight * x^2


class TailTransform(Univariate):
    """``y = sign(x) sqrt((exp(h x^2) - 1) / h)``, with a tail weight ``h`` for each side. Params: raw weights left and
    right.

    Of a normal ``x`` it makes a ``y`` whose tails are those of Student's t of ``1 / h`` degrees of freedom (but for a
    factor ``log(y)^(-1/2)``), as ``exp(-x^2 / 2) = (1 + h y^2)^(-1 / (2 h))``: its tail index is ``1 / h``. The limit
    ``h = 0`` is the identity; a negative weight gives the inverse map of ``|h|``, to tails lighter than the normal's.
    Hickling & Prangle's map has the same tail index, but makes exponential tails at ``h = 0`` and so cannot start at
    the identity. Weights are the raw ones softly limited to ``+-max_weight``.

    Both directions are closed forms, of one cost. A power law takes exponential growth: beyond ``h x^2 = 50``, which
    a normal draw exceeds with probability 2e-12 at ``h = 1`` and less below, the map goes on linearly, its slope at
    most 6e11. So no ``|x|`` up to 1e18 overflows, in float32 neither.

    :param max_weight: limit of the weights: the least tail index is its inverse.
    """

    max_weight: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        check_weight(self.max_weight)

    @property
    def num_params(self) -> int:
        return 2

    def _weight(self, raw: Array) -> Array:
        return soft_clip(raw, self.max_weight)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        return stretch(x, *_sign_and_size(self._weight(side(x, params))))

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        return stretch(y, *_sign_and_size(-self._weight(side(y, params))))


def side(x: Array, params: Array) -> Array:
    """The parameter of the side of zero on which ``x`` lies."""
    return jnp.where(x < 0, params[..., 0, :], params[..., 1, :])


def _sign_and_size(weight: Array) -> tuple[Array, Array]:
    heavy = weight >= 0
    return heavy, jnp.where(heavy, weight, -weight)


def stretch(x: Array, heavy: Array | bool, size: Array) -> tuple[Array, Array]:
    """The map of a weight of that size and a sign, and its log-slope. The opposite sign gives the inverse.

    :param heavy: whether the weight is positive; where that is known for all, only half of the work is done.
    """
    # with w = size x^2 the heavy map is x exp(f(w)), of slope exp(w - f(w)); the light one has w = log(1 + size x^2)
    # and the opposite exponents
    square = size * x * x
    most = _either(heavy, LIMIT, math.expm1(LIMIT))
    u = x * jnp.sqrt(most / jnp.maximum(square, most))  # where x lies beyond the limit, the point at the limit
    square = jnp.minimum(square, most)
    w = _either(heavy, square, jnp.log1p(square))
    f = _half_log_mean_exp(w)
    f, log_slope = _either(heavy, f, -f), _either(heavy, w - f, f - w)
    return u * jnp.exp(f) + (x - u) * jnp.exp(log_slope), log_slope


def _either(heavy: Array | bool, one: Any, other: Any) -> Any:
    if isinstance(heavy, bool):
        return one if heavy else other
    return jnp.where(heavy, one, other)


def _half_log_mean_exp(w: Array) -> Array:
    """``log((exp(w) - 1) / w) / 2`` for ``w >= 0``, by its series near zero."""
    large = jnp.maximum(w, 0.1)
    square = w * w
    series = w / 4 + square / 48 * (1 - square / 120 * (1 - square / 63))
    return jnp.where(w < 0.1, series, 0.5 * (large + jnp.log(-jnp.expm1(-large) / large)))


def check_weight(max_weight: float) -> None:
    """Raises a ``ValueError`` unless the tail weights' limit is positive."""
    if not max_weight > 0:
        raise ValueError(f"TailTransform: max_weight must be positive, but got {max_weight}.")
