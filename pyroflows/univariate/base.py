"""What every univariate map provides."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Univariate:
    """A monotone map of the real line whose parameters are given from outside; it holds none itself.

    Shapes: ``x`` ``(..., n)``, ``params`` ``(..., num_params, n)``, values and log-derivatives ``(..., n)``. The
    parameters' axis is the second to last, so that sums over it run over contiguous columns. Any real ``params`` are
    valid; all zeros give the identity.
    """

    num_features = 1  # of an element, for a conditioner

    @property
    def num_params(self) -> int:
        """Parameters per element."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``y = g(x; params)`` and ``log dy/dx``, elementwise."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` with ``g(x; params) = y`` and ``log dx/dy``, elementwise."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """What a conditioner sees of ``x``: ``(..., num_features * n)``, laid out as ``(num_features, n)``."""
        return x


def soft_clip(x: Tensor, limit: float) -> Tensor:
    """``x`` smoothly limited to ``(-limit, limit)``, with slope one at zero: ``x / sqrt(1 + (x / limit)^2)``."""
    return x * torch.addcmul(x.new_ones(()), x, x, value=limit**-2).rsqrt()


def takes_custom_gradients() -> bool:
    """Whether a gradient written by hand (a ``torch.autograd.Function``) can be used here: in eager reverse mode.

    ``torch.func``, forward mode, ``torch.compile`` and ``torch.jit`` need plain operations.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )
