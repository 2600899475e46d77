"""Monotone rational-quadratic spline (Durkan et al. 2019, Neural spline flows; Gregory & Delbourgo 1982)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate, soft_clip


@dataclass(frozen=True)
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

    num_bins: int = 8
    bound: float = 5.0
    min_size: float = 1e-2
    max_log_slope: float = 2.0

    def __post_init__(self) -> None:
        check_spline(self.num_bins, self.bound, self.min_size)

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def _pieces(self, u: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """The piece that holds ``u``: left knot (x0, y0), width, height and the slopes at both ends."""
        k, batch, n = self.num_bins, u.shape[:-1], u.shape[-1]
        raw_sizes, raw_slopes = params.split([2 * k, k - 1], -2)
        # widths and heights in one go; of the running sums of their weights only what the piece needs is normalised
        weights = (raw_sizes.sigmoid() + least_weight(k, self.min_size)).unflatten(-2, (2, k))
        sums = weights.cumsum(-2)
        share = 2 * self.bound / sums[..., -1, :]  # (..., 2, n)
        with torch.no_grad():  # which piece it is does not vary with the parameters
            side = sums[..., int(inverse), :, :]
            reached = (u + self.bound) / share[..., int(inverse), :]
            index = (reached.unsqueeze(-2) >= side[..., :-1, :]).sum(-2, keepdim=True)
            both = index.unsqueeze(-3).expand(*batch, 2, 1, n)
        weight, upto = (table.expand(*batch, 2, k, n).gather(-2, both).squeeze(-2) for table in (weights, sums))
        size, start = weight * share, (upto - weight) * share - self.bound
        ends = torch.cat([index - 1, index], -2)  # the interior knots at both ends; the two outer knots have slope one
        inner = ends.clamp(0, k - 2)
        raw = raw_slopes.expand(*batch, k - 1, n).gather(-2, inner)
        log_slopes = torch.where(ends == inner, soft_clip(raw, self.max_log_slope), 0.0)
        return *start.unbind(-2), *size.unbind(-2), *log_slopes.exp().unbind(-2)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = _expand(x, params)
        u = x.clamp(-self.bound, self.bound)  # on the edge of the box the spline is the identity, of slope one
        x0, y0, width, height, d0, d1 = self._pieces(u, params, inverse=False)
        y, log_det = _rational_quadratic((u - x0) / width, y0, width, height, d0, d1)
        return y + (x - u), log_det

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = _expand(y, params)
        u = y.clamp(-self.bound, self.bound)
        x0, y0, width, height, d0, d1 = self._pieces(u, params, inverse=True)
        v, s = u - y0, height / width
        c = d0 + d1 - 2 * s
        a, b = height * (s - d0) + v * c, height * d0 - v * c
        # the root of a t^2 + b t = s v in [0, 1], in the form that does not cancel; the discriminant is positive up
        # to rounding
        t = 2 * s * v / (b + (b * b + 4 * a * s * v).clamp_min(1e-30).sqrt())
        log_det = _rational_quadratic(t, y0, width, height, d0, d1)[1]
        return x0 + t * width + (y - u), -log_det


def _expand(x: Tensor, params: Tensor) -> Tensor:
    """``x`` with the batch axes of both."""
    shape = params.shape[:-2] + params.shape[-1:]
    return x if x.shape == shape else x.expand(torch.broadcast_shapes(x.shape, shape))


def _rational_quadratic(
    t: Tensor, y0: Tensor, width: Tensor, height: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and log-derivative at the share ``t`` of a piece (Durkan et al. 2019, eqs. 4 and 5)."""
    s, r = height / width, 1 - t
    tr = t * r
    denominator = torch.addcmul(s, torch.sub(d0 + d1, s, alpha=2), tr)
    y = torch.addcdiv(y0, height * t * torch.addcmul(s * t, d0, r), denominator)
    slope = torch.addcmul(d1 * t * t, d0 * r, r) + 2 * s * tr
    return y, torch.log(slope * (s / denominator).square())


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
