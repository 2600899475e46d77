"""Fixed reorderings of the elements: volume preserving."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyroflows.transform_module import TransformModule


class Permutation(TransformModule):
    """``y_i = x_{permutation[i]}``; log-determinant zero. Holds no trainable parameters.

    :param permutation: the integers ``0 .. dim - 1`` in any order.
    """

    def __init__(self, permutation: Sequence[int]):
        super().__init__()
        self.permutation = tuple(int(i) for i in permutation)
        if sorted(self.permutation) != list(range(len(self.permutation))):
            raise ValueError(
                f"Permutation: permutation must hold each of 0 .. {len(self.permutation) - 1} once, "
                f"but got {list(self.permutation)}."
            )
        self.dim = len(self.permutation)
        index = torch.tensor(self.permutation)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inverse_index", index.argsort(), persistent=False)

    @classmethod
    def reverse(cls, dim: int) -> Permutation:
        """The order reversed."""
        return cls(range(dim)[::-1])

    @classmethod
    def roll(cls, dim: int, shift: int) -> Permutation:
        """Elements moved ``shift`` places to the right, cyclically (as ``numpy.roll``)."""
        return cls(np.roll(np.arange(dim), shift).tolist())

    @classmethod
    def random(cls, dim: int, seed: int = 0) -> Permutation:
        """A random order which depends on ``dim`` and ``seed`` alone, the same in both packages."""
        return cls(np.random.default_rng(seed).permutation(dim).tolist())

    @property
    def passes(self) -> tuple[int, int]:
        return 0, 0

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.index), x.new_zeros(x.shape[:-1])  # type: ignore[arg-type]

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.inverse_index), y.new_zeros(y.shape[:-1])  # type: ignore[arg-type]
