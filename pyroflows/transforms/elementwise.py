"""Maps that act on each element alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.conditioners import MLP
from pyroflows.transform_module import TransformModule, differentiable, with_axes_of
from pyroflows.univariate import Univariate
from pyroflows.univariate.base import pushed_score


class Elementwise(TransformModule):
    """``y_i = g(x_i; theta_i(context))``; without a context, ``theta`` is a free parameter.

    :param dim: size of ``x``.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param activation: the conditioner's activation.
    """

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
    ):
        super().__init__()
        self.dim, self.univariate = dim, univariate
        self.params = nn.Parameter(torch.zeros(univariate.num_params, dim))
        self.conditioner = None
        if context_dim:
            self.conditioner = MLP(0, hidden_dims, univariate.num_params * dim, context_dim, activation)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.conditioner is None:
            return self.params
        return self.params + self.conditioner(x[..., :0], context).unflatten(-1, tuple(self.params.shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.univariate.forward_and_log_det(x, self._params(x, context))
        return y, log_det.expand(y.shape).sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.univariate.inverse_and_log_det(y, self._params(y, context))
        return x, log_det.expand(x.shape).sum(-1)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, score = with_axes_of(context, x, score)
        with torch.enable_grad():
            x = differentiable(x).view_as(x)
            y, log_slope = self.univariate.forward_and_log_det(x, self._params(x, context))
            score = pushed_score(self.univariate, x, log_slope, score)
        return y, log_slope.expand(y.shape).sum(-1), score


class ElementwiseAffine(TransformModule):
    """``y = loc + scale * x`` with free location and positive scale (stored as ``log_scale``).

    :param dim: size of ``x``.
    :param loc: first location ``(dim,)``; zeros unless given.
    :param scale: first scale, positive, ``(dim,)`` or a scalar; ones unless given.
    """

    def __init__(self, dim: int, loc: Tensor | None = None, scale: Tensor | float | None = None):
        super().__init__()
        self.dim = dim
        loc = torch.zeros(dim) if loc is None else loc.detach().clone()
        scale = torch.as_tensor(1.0 if scale is None else scale, dtype=loc.dtype, device=loc.device)
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(scale.detach().log().expand(dim).clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.loc, x, self.log_scale.exp()), self.log_scale.sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - self.loc) * (-self.log_scale).exp(), -self.log_scale.sum(-1).expand(y.shape[:-1])
