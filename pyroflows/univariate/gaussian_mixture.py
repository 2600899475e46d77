"""The inverse normal CDF of a mixture's CDF (Meng et al. 2020, Gaussianization flows)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate, check_positive, log_sum_and_mean, numerical_inverse, soft_clip

SPREAD = 0.75  # of the means at the start: far enough apart for each component to learn a part of its own


@dataclass(frozen=True)
class GaussianMixtureCDF(Univariate):
    """``T(x) = Phi^{-1}(sum_k w_k Phi((x - m_k) / s_k))``, relative to its start: it makes a mixture a normal.

    Meng et al. 2020, eq. 6, with normal instead of logistic kernels: the tails are linear then, of slope ``1 / s`` of
    the widest component. All is in terms of the logarithm of the smaller tail, so nothing saturates: float32 holds to
    |x| = 100 and beyond. With ``T_0`` that of params of zero, whose slope is at most one, the map is::

        y = x + (1 - min_slope) (T(x) - T_0(x)),

    which has slope ``min_slope`` at least (``T`` alone is flat between components far apart), and is the identity at
    the start though the components are not alike there (equal ones would have equal gradients, and stay equal).

    Forward costs two mixtures; the inverse is numerical. Params: ``num_components`` weight logits, means, log-scales.

    :param num_components: number of components.
    :param max_log_scale: limit of the components' log-scales.
    :param min_slope: least slope of the map, less than 1.
    """

    num_components: int = 8
    max_log_scale: float = 2.0
    min_slope: float = 0.02

    def __post_init__(self) -> None:
        check_positive("GaussianMixtureCDF", **vars(self))

    @property
    def num_params(self) -> int:
        return 3 * self.num_components

    def _gaussianize(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``T(x)`` and its slope."""
        logits, raw_means, raw_scales = params.unflatten(-2, (3, -1)).unbind(-3)
        start = torch.linspace(-SPREAD, SPREAD, self.num_components, dtype=x.dtype, device=x.device).unsqueeze(-1)
        log_weights = logits.log_softmax(-2)
        precision = soft_clip(raw_scales, self.max_log_scale).neg().exp()
        z = (x.unsqueeze(-2) - raw_means - start) * precision
        left = z < 0
        distance = torch.where(left, -z, z)
        scaled = _scaled_tail(distance)
        log_tail = scaled.log() - distance.square() / 2
        tail = log_tail.exp()  # Phi(-|z|)
        with torch.no_grad():  # on which side of the median, so which tail of the mixture is the smaller one
            right = (log_weights.exp() * torch.where(left, tail, 1 - tail)).sum(-2) > 0.5
        outer = left ^ right.unsqueeze(-2)  # components whose own tail on that side is the smaller one
        log_part = torch.where(outer, log_tail, torch.log1p(-tail))
        # density over tail, without the exponentials that cancel
        hazard = torch.where(outer, 1.0, tail / (1 - tail)) * precision / scaled
        log_total, mean_hazard = log_sum_and_mean(log_weights + log_part, hazard)
        t = _tail_quantile(log_total)
        return torch.where(right, t, -t), mean_hazard * _scaled_tail(t)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self._gaussianize(x, params)
        value_0, slope_0 = self._gaussianize(x, params.new_zeros(self.num_params, 1))
        y = x + (1 - self.min_slope) * (value - value_0)
        return y, torch.log1p((1 - self.min_slope) * (slope - slope_0))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return numerical_inverse(
            lambda x: self.forward_and_log_det(x, params), y, self.min_slope, owner="GaussianMixtureCDF"
        )


def _scaled_tail(t: Tensor) -> Tensor:
    """``Phi(-t) exp(t^2 / 2)``."""
    return 0.5 * torch.special.erfcx(t * math.sqrt(0.5))


def _tail_quantile(log_tail: Tensor) -> Tensor:
    """``t >= 0`` with ``log Phi(-t) = log_tail``, by Newton's steps: as the left side is concave, they converge."""

    def step(t: Tensor, log_tail: Tensor) -> Tensor:
        scaled = _scaled_tail(t)
        return t + (scaled.log() - t.square() / 2 - log_tail) * scaled * math.sqrt(2 * math.pi)

    with torch.no_grad():
        t = (-2 * (log_tail.detach() + math.log(2))).clamp_min(1e-6).sqrt()
        for _ in range(4):
            t = step(t, log_tail.detach())
    for _ in range(2):  # these give the gradients, up to second order
        t = step(t, log_tail)
    return t
