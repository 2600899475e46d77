"""Monotone rational-quadratic spline (Durkan et al. 2019, Neural spline flows; Gregory & Delbourgo 1982)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.spline import Spline


@dataclass(frozen=True)
class RationalQuadraticSpline(Spline):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` rational-quadratic pieces, and goes on linearly outside.

    Params: ``num_bins`` bin widths, ``num_bins`` heights and ``num_bins - 1`` interior slopes, all raw; with
    ``tails="learnable"`` the two outer slopes as well. Both directions are closed forms, of one cost.
    """

    def _forward(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x0, y0, width, height, d0, d1 = piece
        return _rational_quadratic((u - x0) / width, y0, width, height, d0, d1)

    def _inverse(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x0, y0, width, height, d0, d1 = piece
        v, s = u - y0, height / width
        c = d0 + d1 - 2 * s
        a, b = height * (s - d0) + v * c, height * d0 - v * c
        # the root of a t^2 + b t = s v in [0, 1], in the form that does not cancel; the discriminant is positive up
        # to rounding
        t = 2 * s * v / (b + (b * b + 4 * a * s * v).clamp_min(1e-30).sqrt())
        log_det = _rational_quadratic(t, y0, width, height, d0, d1)[1]
        return x0 + t * width, -log_det


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
