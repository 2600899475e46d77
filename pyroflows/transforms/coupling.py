"""Coupling (Dinh et al. 2015, 2017): one block stays and parametrises a univariate map of the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.conditioners import MLP
from pyroflows.transform_module import TransformModule
from pyroflows.univariate import Univariate


class Coupling(TransformModule):
    """``x = (x1, x2) -> (x1, g(x2; theta(x1, context)))``.

    Both directions take one network pass. The Jacobian is triangular, the log-determinant the sum over ``g``'s.

    :param dim: size of ``x``. With ``dim=1`` the map is elementwise (nothing is left to condition on).
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the conditioner.
    :param context_dim: size of the context, 0 for none.
    :param split: size of ``x1``; ``dim // 2`` unless given.
    :param swap: returns the blocks exchanged, so that equal layers alternate which block they transform.
    :param activation: the conditioner's activation.
    """

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        split: int | None = None,
        swap: bool = True,
        activation: str = "silu",
    ):
        super().__init__()
        self.split = dim // 2 if split is None else split
        if not 0 <= self.split < dim:
            raise ValueError(f"Coupling: split must lie in [0, dim) = [0, {dim}), but got {split}.")
        self.dim, self.univariate, self.swap = dim, univariate, swap
        out_dim = univariate.num_params * (dim - self.split)
        self.conditioner = MLP(univariate.num_features * self.split, hidden_dims, out_dim, context_dim, activation)

    def _params(self, x1: Tensor, context: Tensor | None) -> Tensor:
        theta = self.conditioner(self.univariate.features(x1), context)
        return theta.view(*theta.shape[:-1], self.univariate.num_params, self.dim - self.split)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = x.split([self.split, self.dim - self.split], -1)
        y2, log_det = self.univariate.forward_and_log_det(x2, self._params(x1, context))
        if y2.shape[:-1] != x1.shape[:-1]:  # the context has more batch axes
            x1 = x1.expand(y2.shape[:-1] + x1.shape[-1:])
        return torch.cat([y2, x1] if self.swap else [x1, y2], -1), log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self.split, self.dim - self.split
        parts = y.split([moved, kept] if self.swap else [kept, moved], -1)
        y1, y2 = parts[::-1] if self.swap else parts
        x2, log_det = self.univariate.inverse_and_log_det(y2, self._params(y1, context))
        if x2.shape[:-1] != y1.shape[:-1]:
            y1 = y1.expand(x2.shape[:-1] + y1.shape[-1:])
        return torch.cat([y1, x2], -1), log_det.sum(-1)
