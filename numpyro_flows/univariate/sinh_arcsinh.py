"""Skewness (Jones & Pewsey 2009, Sinh-arcsinh distributions)."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.base import Univariate, check_positive, soft_clip


class SinhArcsinh(Univariate):
    """``y = sinh(arcsinh(x) + e)``, of skewness ``e`` (Jones & Pewsey 2009, eq. 2 with delta = 1). Params: raw ``e``.

    Smooth, with linear tails of slopes ``exp(-e)`` on the left and ``exp(e)`` on the right; the inverse is the map of
    ``-e``. ``TailTransform`` takes the part of Jones & Pewsey's other parameter. ``e`` is the raw one softly limited to
    ``+-max_skewness``.

    :param max_skewness: limit of the skewness. Accuracy falls with the square of its exponential.
    """

    max_skewness: float = eqx.field(static=True, default=2.0)

    def __check_init__(self) -> None:
        check_positive("SinhArcsinh", max_skewness=self.max_skewness)

    @property
    def num_params(self) -> int:
        return 1

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        return _skew(x, soft_clip(params[..., 0, :], self.max_skewness))

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        return _skew(y, -soft_clip(params[..., 0, :], self.max_skewness))


def _skew(x: Array, skewness: Array) -> tuple[Array, Array]:
    # sinh(a + e) = sinh(a) cosh(e) + cosh(a) sinh(e), where sinh(a) = x
    cosh_a, sinh_e, cosh_e = jnp.sqrt(x * x + 1), jnp.sinh(skewness), jnp.cosh(skewness)
    return x * cosh_e + cosh_a * sinh_e, jnp.log(cosh_e + x / cosh_a * sinh_e)
