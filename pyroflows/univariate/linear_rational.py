"""Monotone linear-rational spline (Dolatabadi et al. 2020, Invertible generative modeling with such splines)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.spline import Spline


@dataclass(frozen=True)
class LinearRationalSpline(Spline):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` pairs of linear-rational pieces, linear outside.

    Params: ``num_bins`` bin widths, ``num_bins`` heights, ``num_bins - 1`` interior slopes (with
    ``tails="learnable"`` the two outer ones as well) and ``num_bins`` places within the bins where the pieces of a pair
    meet, all raw. Both directions are closed forms without a root, of one cost.
    """

    extras = 1

    def _halves(self, piece: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the two pieces: where they meet (in shares of width and height), and their ratios of weights."""
        _, _, width, height, d0, d1, raw = piece
        cut = 0.05 + 0.9 * raw.sigmoid()
        # the weights at left knot, meeting point and right knot are 1, middle and last; this middle one makes the
        # slopes agree (Dolatabadi et al. 2020, algorithm 1)
        last = (d0 / d1).sqrt()
        total = 1 - cut + cut * last
        middle = (d0 * d1).sqrt() * total * width / height
        return cut, cut * last / total, middle, last / middle

    def _forward(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x0, y0, width, height = piece[:4]
        cut, rise, first, second = self._halves(piece)
        t = (u - x0) / width
        left = t < cut
        run, gain = torch.where(left, cut, 1 - cut), torch.where(left, rise, 1 - rise)
        ratio = torch.where(left, first, second)
        r = torch.where(left, t, t - cut) / run
        denominator = 1 - r + ratio * r
        share = torch.addcmul(torch.where(left, 0.0, rise), gain, ratio * r / denominator)
        slope = height * gain * ratio / (width * run * denominator.square())
        return torch.addcmul(y0, height, share), slope.log()

    def _inverse(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x0, y0, width, height = piece[:4]
        cut, rise, first, second = self._halves(piece)
        v = (u - y0) / height
        left = v < rise
        run, gain = torch.where(left, cut, 1 - cut), torch.where(left, rise, 1 - rise)
        ratio = torch.where(left, first, second)
        s = torch.where(left, v, v - rise) / gain
        denominator = torch.addcmul(s, ratio, 1 - s)
        share = torch.addcmul(torch.where(left, 0.0, cut), run, s / denominator)
        slope = width * run * ratio / (height * gain * denominator.square())
        return torch.addcmul(x0, width, share), slope.log()
