"""Splines of the circle (Rezende et al. 2020, Normalizing flows on tori and spheres, section 2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate
from pyroflows.univariate.rational_quadratic import RationalQuadraticSpline


@dataclass(frozen=True)
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

    num_bins: int = 8
    min_size: float = 1e-2
    max_log_slope: float = 2.0

    num_features = 2

    def __post_init__(self) -> None:
        self._spline  # noqa: B018  (checks the arguments)

    @cached_property
    def _spline(self) -> RationalQuadraticSpline:
        return RationalQuadraticSpline(self.num_bins, math.pi, self.min_size, self.max_log_slope, "equal")

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins + 1

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([x.cos(), x.sin()], -1)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self._spline.forward_and_log_det(wrap(x), params[..., :-1, :])
        return wrap(y + params[..., -1, :]), log_det

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self._spline.inverse_and_log_det(wrap(y - params[..., -1, :]), params[..., :-1, :])
        return wrap(x), log_det


def wrap(x: Tensor) -> Tensor:
    """The angle ``x`` modulo ``2 pi``, in ``[-pi, pi)`` also after rounding."""
    turns = torch.floor((x + math.pi) / (2 * math.pi))
    return (x - 2 * math.pi * turns).clamp(-math.pi, math.pi * (1 - torch.finfo(x.dtype).eps))
