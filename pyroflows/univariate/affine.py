"""Shift, and shift with scale (Dinh et al. 2015, NICE; Dinh et al. 2017, Density estimation using Real NVP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate, soft_clip


@dataclass(frozen=True)
class Additive(Univariate):
    """``y = x + shift``: volume preserving (Dinh et al. 2015, eq. 4). Params: shift."""

    straight = True

    @property
    def num_params(self) -> int:
        return 1

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = x + params[..., 0, :]
        return y, torch.zeros_like(y)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = y - params[..., 0, :]
        return x, torch.zeros_like(x)


@dataclass(frozen=True)
class Affine(Univariate):
    """``y = x * exp(log_scale) + shift`` (Dinh et al. 2017, eq. 7). Params: shift, raw log-scale.

    The log-scale is the raw one softly limited to ``+-max_log_scale``: smooth, and of slope one at zero, so that no
    sample and no gradient can explode.
    """

    max_log_scale: float = 3.0
    straight = True

    @property
    def num_params(self) -> int:
        return 2

    def _unpack(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-2)
        return shift, soft_clip(raw, self.max_log_scale)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._unpack(params)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._unpack(params)
        log_det = -log_scale
        return (y - shift) * log_det.exp(), log_det
