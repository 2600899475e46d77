"""Sigmoidal networks that are monotone (Huang et al. 2018, Neural autoregressive flows)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.univariate.base import Univariate, check_positive, log_sum_and_mean, numerical_inverse, soft_clip

SPREAD = 1.0  # of the units' shifts at the start: far enough apart for each to learn a part of its own
CONTRAST = 2.0  # of the mixing weights of hidden layers at the start, for the same reason


@dataclass(frozen=True)
class DeepDenseSigmoidal(Univariate):
    """``num_layers`` layers ``h -> logit(W sigmoid(a * (U h) + b))``; rows of ``W`` and ``U`` sum to one, ``a > 0``.

    Huang et al. 2018, eqs. 14 and 15 (DDSF). Two things differ from the paper, so that the map is a bijection of the
    whole line to |x| = 100 and beyond, in float32 too. The logit is taken as a difference of two log-sums, which
    neither overflows nor saturates; its tails are linear, with the slopes of the flattest units. And with ``T`` the
    network and ``T_0`` the network at params of zero, whose slope is at most one, the map is::

        y = x + (1 - min_slope) (T(x) - T_0(x)),

    which has slope ``min_slope`` at least (the paper's goes to zero between two units far apart), and is the identity
    at the start though the units are not alike there (equal ones would have equal gradients, and stay equal).

    Forward costs two passes through the network, of ``num_units^2`` sums a layer; the inverse is numerical.
    Params, a layer: mixing logits, log-slopes, shifts, weight logits, all raw.

    :param num_units: width of every layer.
    :param num_layers: number of layers, at least 1.
    :param max_log_slope: limit of the units' log-slopes.
    :param min_slope: least slope of the map, less than 1.
    """

    num_units: int = 6
    num_layers: int = 2
    max_log_slope: float = 2.0
    min_slope: float = 0.02

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, **vars(self))

    def _sizes(self) -> list[list[int]]:
        """Parameters of each layer: mixing (outputs, inputs), log-slopes, shifts, weights (outputs, units)."""
        k, last = self.num_units, self.num_layers - 1
        return [[k * k if n else 0, k, k, k if n == last else k * k] for n in range(self.num_layers)]

    @property
    def num_params(self) -> int:
        return sum(map(sum, self._sizes()))

    def _network(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope; the hidden values ``h`` and their slopes are ``(..., units, n)``."""
        k, h = self.num_units, x.unsqueeze(-2)
        slope: Any = None  # that of x, 1
        place = torch.linspace(-1, 1, k, dtype=x.dtype, device=x.device)
        near = (-CONTRAST * (place[:, None] - place).square()).unsqueeze(-1)  # (k, k, 1)
        parts = iter(params.split([size for layer in self._sizes() for size in layer], -2))
        for mixing, raw_slopes, raw_shifts, weights in zip(parts, parts, parts, parts, strict=True):
            if mixing.shape[-2]:
                u = (mixing.unflatten(-2, (k, k)) + near).softmax(-2)
                h, slope = ((u * part.unsqueeze(-3)).sum(-2) for part in (h, slope))
            a = soft_clip(raw_slopes, self.max_log_slope).exp()
            rate = a if slope is None else a * slope
            z = torch.addcmul(raw_shifts + SPREAD * place.unsqueeze(-1), a, h)
            log_on = F.logsigmoid(z)
            log_off = log_on - z
            weights = weights.unflatten(-2, (-1, k))
            weights = weights + near if weights.shape[-3] == k > 1 else weights
            sides = [(weights + log.unsqueeze(-3)) for log in (log_on, log_off)]
            # of p = sum_k w_k s_k: dp / (p (1 - p)) = dp / p + dp / (1 - p), two means of slopes
            slopes = [(log.exp() * rate).unsqueeze(-3) for log in (log_off, log_on)]
            (upper, d_upper), (lower, d_lower) = map(log_sum_and_mean, sides, slopes)
            h, slope = upper - lower, d_upper + d_lower
        return h.squeeze(-2), slope.squeeze(-2)

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at params of zero."""
        return self._network(x, x.new_zeros(self.num_params, 1))

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self._network(x, params)
        value_0, slope_0 = self._start(x)
        y = x + (1 - self.min_slope) * (value - value_0)
        return y, torch.log1p((1 - self.min_slope) * (slope - slope_0))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return numerical_inverse(
            lambda x: self.forward_and_log_det(x, params), y, self.min_slope, owner=type(self).__name__
        )


@dataclass(frozen=True)
class DeepSigmoidal(DeepDenseSigmoidal):
    """``logit(sum_k w_k sigmoid(a_k x + b_k))`` (Huang et al. 2018, eq. 8, DSF), relative to its start.

    The one-layer case of :class:`DeepDenseSigmoidal`; what is said there of the slopes, the tails and the start holds.
    Params: log-slopes, shifts, weight logits, each ``num_units``, raw.
    """

    num_units: int = 16
    num_layers: int = 1

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its units lie symmetrically and are alike: with ``t = exp(-|x|)`` they need no logarithms each."""
        if self.num_units == 1:
            return super()._start(x)
        weights = torch.linspace(-SPREAD, SPREAD, self.num_units, dtype=x.dtype, device=x.device).exp()
        size = torch.where(x < 0, -x, x)
        t = (-size).exp()
        off = torch.addcmul(torch.ones_like(weights), t.unsqueeze(-1), weights).reciprocal()
        upper, lower, square = off.sum(-1), off @ weights, off.square()
        value = size + upper.log() - lower.log()
        slope = 1 + t * ((square @ weights) / upper - (square @ weights.square()) / lower)
        return torch.where(x < 0, -value, value), slope
