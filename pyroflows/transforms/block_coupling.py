"""Coupling of more than two blocks: each is transformed given all blocks before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows.conditioners import MLP
from pyroflows.transform_module import TransformModule
from pyroflows.univariate import Univariate


class BlockCoupling(TransformModule):
    """``y_j = g(x_j; theta_j(x_1 .. x_{j-1}, context))`` for the blocks ``j = 2 .. k``; the first block stays.

    Between coupling (two blocks) and an autoregressive map (``dim`` blocks): a block triangular Jacobian with diagonal
    blocks on its diagonal. Each direction takes ``k - 1`` network passes, one a block and each network its own; those
    of the forward direction do not wait for one another. Every element keeps its place.

    :param dim: size of ``x``. With ``dim=1`` the map is elementwise.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of each conditioner.
    :param context_dim: size of the context, 0 for none.
    :param blocks: their number (of near equal size, in the natural order, at most ``dim``), or the blocks themselves:
        sequences of indices which hold each of ``0 .. dim - 1`` once. The first may be empty.
    :param activation: the conditioners' activation.
    """

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        blocks: int | Sequence[Sequence[int]] = 3,
        activation: str = "silu",
    ):
        super().__init__()
        parts = check_blocks(dim, blocks)
        self.dim, self.univariate, self.sizes = dim, univariate, [len(part) for part in parts]
        order = torch.tensor([i for part in parts for i in part])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)
        self.conditioners = nn.ModuleList(
            MLP(sum(self.sizes[:j]), hidden_dims, univariate.num_params * size, context_dim, activation)
            for j, size in enumerate(self.sizes)
            if j
        )

    @property
    def passes(self) -> tuple[int, int]:
        return len(self.conditioners), len(self.conditioners)

    def _params(self, j: int, before: Tensor, context: Tensor | None) -> Tensor:
        return self.conditioners[j - 1](before, context).unflatten(-1, (self.univariate.num_params, self.sizes[j]))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transform(x, context, inverse=False)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._transform(y, context, inverse=True)

    def _transform(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        parts = list(x.index_select(-1, self.order).split(self.sizes, -1))  # type: ignore[arg-type]
        univariate = self.univariate.inverse_and_log_det if inverse else self.univariate.forward_and_log_det
        before, total = parts[0], torch.zeros(())
        for j, part in enumerate(parts[1:], 1):
            parts[j], log_det = univariate(part, self._params(j, before, context))
            total = log_det.sum(-1) if j == 1 else total + log_det.sum(-1)
            if j + 1 < len(parts):
                given = parts[j] if inverse else part
                before = torch.cat([t.expand(*total.shape, t.shape[-1]) for t in (before, given)], -1)
        parts[0] = parts[0].expand(*total.shape, self.sizes[0])  # the context may have more batch axes
        return torch.cat(parts, -1).index_select(-1, self.place), total  # type: ignore[arg-type]


def check_blocks(dim: int, blocks: int | Sequence[Sequence[int]]) -> list[list[int]]:
    """The blocks as lists of indices; a ``ValueError`` unless they are a partition of ``0 .. dim - 1``."""
    if isinstance(blocks, int):
        if blocks < 2:
            raise ValueError(f"BlockCoupling: blocks must be at least 2, but got {blocks}.")
        if dim == 1:
            return [[], [0]]
        return [part.tolist() for part in np.array_split(np.arange(dim), min(blocks, dim))]
    parts = [[int(i) for i in part] for part in blocks]
    if len(parts) < 2 or not all(parts[1:]) or sorted(i for part in parts for i in part) != list(range(dim)):
        raise ValueError(
            f"BlockCoupling: blocks must be two or more sequences that hold each of 0 .. {dim - 1} once, none but the "
            f"first of them empty, but got {blocks!r}."
        )
    return parts
