"""Monotone rational-quadratic spline (Durkan et al. 2019, Neural spline flows; Gregory & Delbourgo 1982)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.base import Univariate, soft_clip


class RationalQuadraticSpline(Univariate):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` rational-quadratic pieces, the identity outside.

    Params: ``num_bins`` bin widths, ``num_bins`` heights and ``num_bins - 1`` interior slopes, all raw. Bins have sizes
    in proportion to ``sigmoid(raw)`` plus a constant that gives them their least size; log-slopes are softly limited to
    ``+-max_log_slope``. So the inverse stays accurate in float32 whatever the parameters.

    :param num_bins: number of pieces, at least 2.
    :param bound: half the width of the spline's box.
    :param min_size: least width and height of a bin, as a share of the box; less than ``1 / num_bins``.
    :param max_log_slope: limit of the log-slopes at the interior knots.
    """

    num_bins: int = eqx.field(static=True, default=8)
    bound: float = eqx.field(static=True, default=5.0)
    min_size: float = eqx.field(static=True, default=1e-2)
    max_log_slope: float = eqx.field(static=True, default=2.0)

    def __check_init__(self) -> None:
        check_spline(self.num_bins, self.bound, self.min_size)

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def _pieces(self, u: Array, params: Array, inverse: bool) -> tuple[Array, ...]:
        """The piece that holds ``u``: left knot (x0, y0), width, height and the slopes at both ends."""
        k = self.num_bins

        def sizes(raw):  # positive, of sum 2 * bound
            weights = jax.nn.sigmoid(raw) + least_weight(k, self.min_size)
            return weights * (2 * self.bound / weights.sum(-2, keepdims=True))

        widths, heights = sizes(params[..., :k, :]), sizes(params[..., k : 2 * k, :])
        log_slopes = params[..., 2 * k :, :]
        edges = jnp.cumsum((heights if inverse else widths)[..., :-1, :], -2) - self.bound
        right = u[..., None, :] >= edges  # (..., num_bins - 1, n): which interior knots lie left of u
        pad = [(0, 0)] * (right.ndim - 2)
        left_of = jnp.pad(right, [*pad, (0, 1), (0, 0)])  # bins that end left of u
        within = jnp.pad(right, [*pad, (1, 0), (0, 0)], constant_values=True) ^ left_of  # one-hot

        def pick(table, mask):
            return jnp.where(mask, table, 0).sum(-2)

        x0, y0 = (pick(size, left_of) - self.bound for size in (widths, heights))
        width, height = pick(widths, within), pick(heights, within)
        # a raw slope of zero is slope one, which is also that of the two outer knots
        slopes = (
            jnp.exp(soft_clip(pick(log_slopes, mask), self.max_log_slope))
            for mask in (within[..., 1:, :], within[..., :-1, :])
        )
        return x0, y0, width, height, *slopes

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        u = jnp.clip(x, -self.bound, self.bound)  # on the edge of the box the spline is the identity, of slope one
        x0, y0, width, height, d0, d1 = self._pieces(u, params, inverse=False)
        y, log_det = _rational_quadratic((u - x0) / width, y0, width, height, d0, d1)
        return y + (x - u), log_det

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        u = jnp.clip(y, -self.bound, self.bound)
        x0, y0, width, height, d0, d1 = self._pieces(u, params, inverse=True)
        v, s = u - y0, height / width
        c = d0 + d1 - 2 * s
        a, b = height * (s - d0) + v * c, height * d0 - v * c
        # the root of a t^2 + b t = s v in [0, 1], in the form that does not cancel; the discriminant is positive up
        # to rounding
        t = 2 * s * v / (b + jnp.sqrt(jnp.maximum(b * b + 4 * a * s * v, 1e-30)))
        log_det = _rational_quadratic(t, y0, width, height, d0, d1)[1]
        return x0 + t * width + (y - u), -log_det


def _rational_quadratic(t, y0, width, height, d0, d1):
    """Value and log-derivative at the share ``t`` of a piece (Durkan et al. 2019, eqs. 4 and 5)."""
    s, r = height / width, 1 - t
    denominator = s + (d0 + d1 - 2 * s) * t * r
    y = y0 + height * t * (s * t + d0 * r) / denominator
    slope = d1 * t * t + 2 * s * t * r + d0 * r * r
    return y, jnp.log(slope * jnp.square(s / denominator))


def check_spline(num_bins: int, bound: float, min_size: float) -> None:
    """Raises a ``ValueError`` that names the argument which no spline can have."""
    if num_bins < 2:
        raise ValueError(f"RationalQuadraticSpline: num_bins must be at least 2, but got {num_bins}.")
    if not bound > 0:
        raise ValueError(f"RationalQuadraticSpline: bound must be positive, but got {bound}.")
    if not 0 < min_size * num_bins < 1:
        raise ValueError(
            f"RationalQuadraticSpline: min_size must lie between 0 and 1 / num_bins = {1 / num_bins:.3g}, "
            f"but got {min_size}."
        )


def least_weight(num_bins: int, min_size: float) -> float:
    """What to add to weights in ``(0, 1)`` so that none is less than ``min_size`` of their sum."""
    return min_size * (num_bins - 1) / (1 - num_bins * min_size)
