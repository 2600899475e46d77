"""Splines of the circle (Rezende et al. 2020, Normalizing flows on tori and spheres, section 2.1)."""

from __future__ import annotations

import math

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.base import Univariate
from numpyro_flows.univariate.rational_quadratic import RationalQuadraticSpline


class CircularSpline(Univariate):
    """Maps the circle of angles onto itself: a rational-quadratic spline of equal slopes at both ends, and a rotation.

    Takes any real angle, gives angles in ``[-pi, pi)``. The density of what it maps is continuous across the seam, in
    every element: a conditioner sees angles by their cosine and sine (:meth:`features`). The flow's base is a density
    of the circle too, as the uniform one. Params: ``num_bins`` bin widths, heights and slopes each, the rotation.
    Both directions are closed forms, of one cost.

    :param num_bins: number of pieces, at least 2.
    :param min_size: least width and height of a bin, as a share of the circle; less than ``1 / num_bins``.
    :param max_log_slope: limit of the log-slopes at the knots.
    """

    num_bins: int = eqx.field(static=True, default=8)
    min_size: float = eqx.field(static=True, default=1e-2)
    max_log_slope: float = eqx.field(static=True, default=2.0)

    num_features = 2

    def __check_init__(self) -> None:
        self._spline  # noqa: B018  (checks the arguments)

    @property
    def _spline(self) -> RationalQuadraticSpline:
        return RationalQuadraticSpline(self.num_bins, math.pi, self.min_size, self.max_log_slope, "equal")

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins + 1

    def features(self, x: Array) -> Array:
        return jnp.concatenate([jnp.cos(x), jnp.sin(x)], -1)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        y, log_det = self._spline.forward_and_log_det(wrap(x), params[..., :-1, :])
        return wrap(y + params[..., -1, :]), log_det

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        x, log_det = self._spline.inverse_and_log_det(wrap(y - params[..., -1, :]), params[..., :-1, :])
        return wrap(x), log_det


def wrap(x: Array) -> Array:
    """The angle ``x`` modulo ``2 pi``, in ``[-pi, pi)`` also after rounding."""
    turns = jnp.floor((x + math.pi) / (2 * math.pi))
    return jnp.clip(x - 2 * math.pi * turns, -math.pi, math.pi * (1 - float(jnp.finfo(x.dtype).eps)))
