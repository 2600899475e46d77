"""Masked autoregressive maps (Kingma et al. 2016, IAF; Papamakarios et al. 2017, MAF)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.conditioners import MaskedMLP
from pyroflows.transform_module import TransformModule
from pyroflows.univariate import Univariate


class Autoregressive(TransformModule):
    """``y_i = g(x_i; theta_i(x_1 .. x_{i-1}, context))``: a triangular Jacobian.

    Forward takes one network pass, the inverse ``dim`` (each fixes one more element, exactly). As written it is an
    IAF layer; :class:`~pyroflows.Inverse` turns it into a MAF layer.

    :param dim: size of ``x``.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the masked conditioner.
    :param context_dim: size of the context, 0 for none.
    :param reverse: returns ``y`` in reversed order, so that equal layers alternate the ordering.
    :param ordering: the elements ``0 .. dim - 1`` from the first to the last in the chain: ``y_i`` depends on ``x_i``
        and on the elements named before ``i``. The natural order unless given.
    :param activation: the conditioner's activation.
    """

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        reverse: bool = True,
        activation: str = "silu",
        ordering: Sequence[int] | None = None,
    ):
        super().__init__()
        self.dim, self.univariate, self.reverse = dim, univariate, reverse
        self.conditioner = MaskedMLP(dim, hidden_dims, univariate.num_params, context_dim, activation, ordering)
        rank = torch.arange(dim) if ordering is None else torch.tensor(tuple(ordering)).argsort()
        self.register_buffer("rank", rank, persistent=False)

    @property
    def passes(self) -> tuple[int, int]:
        return 1, self.dim

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.conditioner(x, context).unflatten(-1, (self.univariate.num_params, self.dim))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.univariate.forward_and_log_det(x, self._params(x, context))
        return y.flip(-1) if self.reverse else y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reverse:
            y = y.flip(-1)
        if context is not None:
            y = y.expand(torch.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])
        x, log_det = torch.zeros_like(y), torch.zeros_like(y)
        for i in range(self.dim):
            x, log_det = self.univariate.inverse_and_log_det(y, self._params(x, context))
            # elements beyond the i-th are not known yet; zeros keep what they feed finite
            x = torch.where(self.rank <= i, x, 0.0)  # type: ignore[operator]
        return x, log_det.sum(-1)
