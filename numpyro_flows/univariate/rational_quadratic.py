"""Monotone rational-quadratic spline (Durkan et al. 2019, Neural spline flows; Gregory & Delbourgo 1982)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.spline import Spline


class RationalQuadraticSpline(Spline):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` rational-quadratic pieces, and goes on linearly outside.

    Params: ``num_bins`` bin widths, ``num_bins`` heights and ``num_bins - 1`` interior slopes, all raw; with
    ``tails="learnable"`` the two outer slopes as well. Both directions are closed forms, of one cost.
    """

    def _forward(self, u: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        x0, y0, width, height, d0, d1 = piece
        return _rational_quadratic((u - x0) / width, y0, width, height, d0, d1)

    def _inverse(self, u: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        x0, y0, width, height, d0, d1 = piece
        v, s = u - y0, height / width
        c = d0 + d1 - 2 * s
        a, b = height * (s - d0) + v * c, height * d0 - v * c
        # the root of a t^2 + b t = s v in [0, 1], in the form that does not cancel; the discriminant is positive up
        # to rounding
        t = 2 * s * v / (b + jnp.sqrt(jnp.maximum(b * b + 4 * a * s * v, 1e-30)))
        log_det = _rational_quadratic(t, y0, width, height, d0, d1)[1]
        return x0 + t * width, -log_det


def _rational_quadratic(t, y0, width, height, d0, d1):
    """Value and log-derivative at the share ``t`` of a piece (Durkan et al. 2019, eqs. 4 and 5)."""
    s, r = height / width, 1 - t
    denominator = s + (d0 + d1 - 2 * s) * t * r
    y = y0 + height * t * (s * t + d0 * r) / denominator
    slope = d1 * t * t + 2 * s * t * r + d0 * r * r
    return y, jnp.log(slope * jnp.square(s / denominator))
