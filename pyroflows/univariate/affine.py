"""Shift, and shift with scale (Dinh et al. 2015, NICE; Dinh et al. 2017, Density estimation using Real NVP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate, soft_clip, takes_custom_gradients


@dataclass(frozen=True)
class Additive(Univariate):
    """``y = x + shift``: volume preserving (Dinh et al. 2015, eq. 4). Params: shift."""

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

    @property
    def num_params(self) -> int:
        return 2

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(x, params, inverse=False)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(y, params, inverse=True)

    def _apply(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if takes_custom_gradients() and x.shape == params.shape[:-2] + params.shape[-1:]:
            return _Affine.apply(x, params, self.max_log_scale, inverse)
        return _affine(x, params, self.max_log_scale, inverse)


def _affine(x: Tensor, params: Tensor, limit: float, inverse: bool) -> tuple[Tensor, Tensor]:
    shift, raw = params.unbind(-2)
    log_scale = soft_clip(raw, limit)
    if inverse:
        return (x - shift) * torch.exp(-log_scale), -log_scale
    return torch.addcmul(shift, x, log_scale.exp()), log_scale


class _Affine(torch.autograd.Function):
    """``_affine`` with its gradient in half as many passes over memory as autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, limit: float, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-2)
        log_det = soft_clip(raw, limit)
        log_det = log_det.neg_() if inverse else log_det
        slope = log_det.exp()
        ctx.save_for_backward(x, params, slope)
        ctx.limit, ctx.inverse = limit, inverse
        return (x - shift).mul_(slope) if inverse else torch.addcmul(shift, x, slope), log_det

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        x, params, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            x, params = x.view_as(x), params.view_as(params)  # params may be a function of x: that part is not ours
            outputs = _affine(x, params, ctx.limit, ctx.inverse)
            return *torch.autograd.grad(outputs, (x, params), (dy, dlog_det), create_graph=True), None, None
        shift, raw = params.unbind(-2)
        dx = dy * slope
        clip = torch.addcmul(raw.new_ones(()), raw, raw, value=ctx.limit**-2).rsqrt_()
        draw = torch.addcmul(dlog_det, dx, x - shift if ctx.inverse else x)
        draw.mul_(clip.pow(3))  # the slope of the soft limit
        both = [dx.neg(), draw.neg_()] if ctx.inverse else [dy, draw]
        return dx, torch.stack(both, -2), None, None
