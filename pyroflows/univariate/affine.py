"""Shift, and shift with scale (Dinh et al. 2015, NICE; Dinh et al. 2017, Density estimation using Real NVP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.numerical import is_eager, takes_custom_gradients
from pyroflows.univariate.base import Univariate, soft_clip

_LARGE = 2**14  # numbers from which an array costs more to allocate than a call to write into one


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

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return _apply(_Forward, x, params, self.max_log_scale)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return _apply(_Inverse, y, params, self.max_log_scale)


def _alike(x: Tensor, params: Tensor) -> bool:
    return x.shape == params.shape[:-2] + params.shape[-1:] and x.dtype == params.dtype


def _in_place(x: Tensor) -> bool:
    """Whether results of the size of ``x`` should take the place of what they are computed from."""
    return x.numel() >= _LARGE and not torch.is_grad_enabled() and is_eager()


def _apply(kind: Any, x: Tensor, params: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    if _alike(x, params) and takes_custom_gradients():
        return kind.apply(x, params, limit)  # type: ignore[no-any-return]
    return kind.plain(x, params, limit)  # type: ignore[no-any-return]


class _Forward(torch.autograd.Function):
    """``y = x * exp(log_scale) + shift``, which keeps x and the log-scale for the gradient; autograd keeps one more."""

    @staticmethod
    def plain(x: Tensor, params: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-2)
        log_scale = soft_clip(raw, limit)
        y = log_scale.exp()
        if _alike(x, params) and _in_place(x):
            return torch.addcmul(shift, x, y, out=y), log_scale
        return torch.addcmul(shift, x, y), log_scale

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        y, log_scale = _Forward.plain(x, params, limit)
        ctx.save_for_backward(x, log_scale)  # of an input and a result, second derivatives are autograd's
        ctx.limit = limit
        return y, log_scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlog: Tensor) -> tuple[Tensor | None, ...]:
        x, log_scale = ctx.saved_tensors
        dx = dy * log_scale.exp()
        return dx, _of_params(dy, torch.addcmul(dlog, dx, x), log_scale, ctx.limit), None


class _Inverse(torch.autograd.Function):
    """``x = (y - shift) * exp(-log_scale)``, likewise, of its results alone."""

    @staticmethod
    def plain(y: Tensor, params: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-2)
        log_det, x = soft_clip(raw, limit), y - shift
        if _alike(y, params) and _in_place(y):
            return x.mul_(log_det.neg_().exp()), log_det
        log_det = -log_det
        return x * log_det.exp(), log_det

    @staticmethod
    def forward(ctx: Any, y: Tensor, params: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        x, log_det = _Inverse.plain(y, params, limit)
        ctx.save_for_backward(x, log_det)
        ctx.limit = limit
        return x, log_det

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dlog: Tensor) -> tuple[Tensor | None, ...]:
        x, log_det = ctx.saved_tensors
        dy = dx * log_det.exp()
        return dy, -_of_params(dy, torch.addcmul(dlog, dx, x), log_det, ctx.limit), None


def _of_params(shift: Tensor, log_scale: Tensor, value: Tensor, limit: float) -> Tensor:
    """The gradient of the parameters by those of the shift and of the log-scale, which is ``value``."""
    slope = -(limit**-2)
    if not _in_place(shift):
        return torch.stack([shift, torch.addcmul(log_scale, log_scale * value, value, value=slope)], -2)
    both = torch.empty(*shift.shape[:-1], 2, shift.shape[-1], dtype=shift.dtype, device=shift.device)
    both[..., 0, :], raw = shift, both[..., 1, :]
    torch.addcmul(log_scale, torch.mul(log_scale, value, out=raw), value, value=slope, out=raw)
    return both
