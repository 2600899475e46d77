"""What the monotone splines share: knots in a box, the choice of a piece, and linear tails."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.base import Univariate, soft_clip

TAILS = ("linear", "learnable", "equal")


class Spline(Univariate):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` pieces, and goes on linearly outside.

    Params, all raw: ``num_bins`` bin widths, ``num_bins`` heights, the slopes at the knots (see ``tails``), and what
    the pieces of a subclass take besides. Bins have sizes in proportion to ``sigmoid(raw)`` plus a constant that gives
    them their least size; log-slopes are softly limited to ``+-max_log_slope``. So the inverse stays accurate in
    float32 whatever the parameters.

    :param num_bins: number of pieces, at least 2.
    :param bound: half the width of the spline's box.
    :param min_size: least width and height of a bin, as a share of the box; less than ``1 / num_bins``.
    :param max_log_slope: limit of the log-slopes at the knots.
    :param tails: ``"linear"``: the identity outside the box (``num_bins - 1`` slopes); ``"learnable"``: the two outer
        slopes are parameters as well, and the map goes on with them (``num_bins + 1``); ``"equal"``: they are one
        parameter (``num_bins``).
    """

    num_bins: int = eqx.field(static=True, default=8)
    bound: float = eqx.field(static=True, default=5.0)
    min_size: float = eqx.field(static=True, default=1e-2)
    max_log_slope: float = eqx.field(static=True, default=2.0)
    tails: str = eqx.field(static=True, default="linear")

    extras = 0  # further raw parameters of a piece

    def __check_init__(self) -> None:
        check_spline(type(self).__name__, self.num_bins, self.bound, self.min_size, self.tails)

    @property
    def num_params(self) -> int:
        return (3 + self.extras) * self.num_bins + num_outer(self.tails)

    def _piece(self, u: Array, params: Array, inverse: bool) -> tuple[Array, ...]:
        """The piece that holds ``u``: left knot (x0, y0), width, height, the slopes at both ends, the extras."""
        k = self.num_bins
        slopes = k + num_outer(self.tails)

        def sizes(raw):  # positive, of sum 2 * bound
            weights = jax.nn.sigmoid(raw) + least_weight(k, self.min_size)
            return weights * (2 * self.bound / weights.sum(-2, keepdims=True))

        widths, heights = sizes(params[..., :k, :]), sizes(params[..., k : 2 * k, :])
        log_slopes, extras = params[..., 2 * k : 2 * k + slopes, :], params[..., 2 * k + slopes :, :]
        edges = jnp.cumsum((heights if inverse else widths)[..., :-1, :], -2) - self.bound
        right = u[..., None, :] >= edges  # (..., num_bins - 1, n): which interior knots lie left of u
        pad = [(0, 0)] * (right.ndim - 2)
        left_of = jnp.pad(right, [*pad, (0, 1), (0, 0)])  # bins that end left of u
        within = jnp.pad(right, [*pad, (1, 0), (0, 0)], constant_values=True) ^ left_of  # one-hot

        def pick(table, mask):
            return jnp.where(mask, table, 0).sum(-2)

        x0, y0 = (pick(size, left_of) - self.bound for size in (widths, heights))
        width, height = pick(widths, within), pick(heights, within)
        # a raw slope of zero is slope one, which is also that of the two outer knots of linear tails
        if self.tails == "linear":
            ends = pick(log_slopes, within[..., 1:, :]), pick(log_slopes, within[..., :-1, :])
        elif self.tails == "learnable":
            ends = pick(log_slopes[..., :-1, :], within), pick(log_slopes[..., 1:, :], within)
        else:
            ends = pick(log_slopes, within), pick(jnp.roll(log_slopes, -1, -2), within)
        more = [pick(extras[..., i * k : (i + 1) * k, :], within) for i in range(self.extras)]
        return x0, y0, width, height, *(jnp.exp(soft_clip(raw, self.max_log_slope)) for raw in ends), *more

    def _forward(self, u: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        """Value and log-slope within the piece."""
        raise NotImplementedError

    def _inverse(self, u: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        """Value and log-slope of the inverse within the piece."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        u = jnp.clip(x, -self.bound, self.bound)  # the slope beyond the edge is that on the edge
        piece = self._piece(u, params, inverse=False)
        y, log_det = self._forward(u, piece)
        # beyond the edge as it is by definition: a small piece's rounding would be felt there
        if self.tails == "linear":
            return y + (x - u), jnp.where(x == u, log_det, 0)
        edge = jnp.where(u > 0, piece[5], piece[4])
        return y + (x - u) * edge, jnp.where(x == u, log_det, jnp.log(edge))

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        u = jnp.clip(y, -self.bound, self.bound)
        piece = self._piece(u, params, inverse=True)
        x, log_det = self._inverse(u, piece)
        if self.tails == "linear":
            return x + (y - u), jnp.where(y == u, log_det, 0)
        edge = jnp.where(u > 0, piece[5], piece[4])
        return x + (y - u) / edge, jnp.where(y == u, log_det, -jnp.log(edge))


def num_outer(tails: str) -> int:
    """Slopes that are parameters, less the number of bins."""
    return {"linear": -1, "learnable": 1, "equal": 0}[tails]


def check_spline(owner: str, num_bins: int, bound: float, min_size: float, tails: str) -> None:
    """Raises a ``ValueError`` that names the argument which no spline can have."""
    if num_bins < 2:
        raise ValueError(f"{owner}: num_bins must be at least 2, but got {num_bins}.")
    if not bound > 0:
        raise ValueError(f"{owner}: bound must be positive, but got {bound}.")
    if not 0 < min_size * num_bins < 1:
        raise ValueError(
            f"{owner}: min_size must lie between 0 and 1 / num_bins = {1 / num_bins:.3g}, but got {min_size}."
        )
    if tails not in TAILS:
        raise ValueError(f"{owner}: tails must be one of {list(TAILS)}, but got {tails!r}.")


def least_weight(num_bins: int, min_size: float) -> float:
    """What to add to weights in ``(0, 1)`` so that none is less than ``min_size`` of their sum."""
    return min_size * (num_bins - 1) / (1 - num_bins * min_size)
