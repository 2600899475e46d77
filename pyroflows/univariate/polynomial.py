"""Monotone polynomials within a box, linear outside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyroflows.univariate.base import (
    Univariate,
    check_positive,
    constant,
    numerical_inverse,
    soft_clip,
    unit_quadrature,
)


@dataclass(frozen=True)
class SumOfSquares(Univariate):
    """``y = shift + integral of min_slope + sum_k p_k(t)^2 from 0 to x``: ``p_k`` polynomials of the given degree.

    Jaini et al. 2019 (Sum-of-squares polynomial flow), eq. 9: a polynomial of degree ``2 degree + 1``. Unlike the
    paper's it is one within ``[-bound, bound]`` only and goes on with the slope of the edge, as powers of a |x| far out
    leave nothing to invert; the slope's floor keeps the inverse of common zeros of the ``p_k``. The integral is by
    Gauss-Legendre quadrature with ``degree + 1`` nodes, which is exact.

    Forward costs ``num_squares * degree * (degree + 2)`` products; the inverse is numerical.
    Params: ``degree + 1`` coefficients (of powers of ``x / bound``) a polynomial, raw, and the shift.

    :param num_squares: number of squares; two suffice for any non-negative polynomial.
    :param degree: degree of each ``p_k``.
    :param bound: half the width of the box.
    :param max_coefficient: limit of what the params add to the coefficients.
    :param min_slope: least slope, less than 1.
    """

    num_squares: int = 2
    degree: int = 4
    bound: float = 5.0
    max_coefficient: float = 4.0
    min_slope: float = 0.01

    def __post_init__(self) -> None:
        check_positive("SumOfSquares", **vars(self))

    @property
    def num_params(self) -> int:
        return self.num_squares * (self.degree + 1) + 1

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = params.split([self.num_params - 1, 1], -2)
        # at the start constants of unequal size, whose squares sum to the rest of slope one
        start = np.zeros((self.num_squares, self.degree + 1, 1))
        start[:, 0, 0] = np.arange(1.0, self.num_squares + 1)
        start *= math.sqrt((1 - self.min_slope) / (start**2).sum())
        raw = raw.unflatten(-2, (self.num_squares, self.degree + 1))
        return constant(start, params) + soft_clip(raw, self.max_coefficient), shift.squeeze(-2)

    def _evaluate(self, x: Tensor, coefficients: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        nodes, node_weights = (constant(part[:, None], x) for part in unit_quadrature(self.degree + 1))
        u = x.clamp(-self.bound, self.bound)
        scaled = u.unsqueeze(-2) / self.bound
        t = torch.cat([scaled * nodes, scaled], -2).unsqueeze(-3)  # (..., 1, degree + 2, n)
        powers = coefficients.unsqueeze(-2).unbind(-3)  # each (..., num_squares, 1, n)
        p = powers[-1]
        for coefficient in powers[-2::-1]:
            p = torch.addcmul(coefficient, p, t)
        slopes = self.min_slope + p.square().sum(-3)
        slope = slopes[..., -1, :]
        return shift + u * (slopes[..., :-1, :] * node_weights).sum(-2) + slope * (x - u), slope.log()

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluate(x, *self._unpack(params))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._unpack(params)
        return numerical_inverse(lambda x: self._evaluate(x, *parts), y, self.min_slope, owner="SumOfSquares")


@dataclass(frozen=True)
class Bernstein(Univariate):
    """``y = sum_m beta_m B_m(u)``, ``u = (x + bound) / (2 bound)``, increasing ``beta``: a polynomial of that degree.

    Ramasinghe et al. 2022 (Robust normalizing flows using Bernstein-type polynomials); Sick et al. 2021 (Deep
    transformation models). The slope at any point is a mean of the increments, which are softly limited to
    ``exp(+-max_log_slope)`` times those of the identity; outside ``[-bound, bound]`` it is that of the edge (Ramasinghe
    et al. map the box onto itself and nothing outside it).

    Forward costs ``2 degree`` products; the inverse is numerical. Params: ``degree`` increments, raw, and the shift.

    :param degree: degree of the polynomial.
    :param bound: half the width of the box.
    :param max_log_slope: limit of the log-slopes.
    """

    degree: int = 16
    bound: float = 5.0
    max_log_slope: float = 3.0

    def __post_init__(self) -> None:
        check_positive("Bernstein", **vars(self))

    @property
    def num_params(self) -> int:
        return self.degree + 1

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = params.split([self.degree, 1], -2)
        slopes = soft_clip(raw, self.max_log_slope).exp()
        ends = slopes.cumsum(-2) - slopes.sum(-2, keepdim=True) / 2
        return slopes, shift + (2 * self.bound / self.degree) * ends

    def _evaluate(self, x: Tensor, slopes: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        k = self.degree - 1
        u = x.clamp(-self.bound, self.bound)
        share = (u + self.bound) / (2 * self.bound)
        # of the derivative, (..., degree, n)
        basis = torch.stack([math.comb(k, m) * share**m * (1 - share) ** (k - m) for m in range(k + 1)], -2)
        slope = (basis * slopes).sum(-2)
        # de Casteljau's last step: between beta_m and beta_{m+1}, which lie one increment apart
        y = (basis * (ends - (2 * self.bound / self.degree) * (1 - share).unsqueeze(-2) * slopes)).sum(-2)
        return torch.addcmul(y, slope, x - u), slope.log()

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluate(x, *self._unpack(params))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        parts, least = self._unpack(params), math.exp(-self.max_log_slope)
        return numerical_inverse(lambda x: self._evaluate(x, *parts), y, least, owner="Bernstein")
