"""A diagonal plus a matrix of low rank, by Woodbury's identity and the matrix determinant lemma."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.transform_module import TransformModule
from pyroflows.transforms.orthogonal import reflections


class LowRankLinear(TransformModule):
    """``y = D (I + U V^T) x + bias``, ``D`` diagonal and positive, ``U`` and ``V`` ``(dim, rank)``.

    Always invertible: ``V`` has orthonormal columns (by reflections), and ``U`` is given that part along ``V`` with
    which ``I + V^T U = T`` is upper triangular of positive diagonal (as Rezende & Mohamed 2015, appendix A.1, for rank
    one). So ``log |det|`` is the sum of ``log_diag`` and ``log_core`` (determinant lemma), and
    ``(I + U V^T)^{-1} = I - U T^{-1} V^T`` (Woodbury's identity).

    Costs ``O(rank dim)`` an element of the batch and ``O(rank^2 dim)`` a call, both ways. Starts at the identity.

    :param dim: size of ``x``.
    :param rank: between 1 and ``dim``.
    :param seed: of the first directions of ``V``.
    """

    def __init__(self, dim: int, rank: int = 1, seed: int = 0):
        super().__init__()
        self.dim = dim
        self.vectors = nn.Parameter(torch.tensor(directions(dim, rank, seed), dtype=torch.get_default_dtype()))
        self.left, self.core = nn.Parameter(torch.zeros(dim, rank)), nn.Parameter(torch.zeros(rank, rank))
        self.log_core, self.log_diag = nn.Parameter(torch.zeros(rank)), nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        u, w = reflections(self.vectors)
        rank = len(self.vectors)
        eye = torch.eye(u.shape[-1], rank, dtype=u.dtype, device=u.device)
        v = eye - u.mT @ w[:, :rank]
        core = self.core.triu(1) + torch.diag(self.log_core.exp())
        return self.left + v @ (core - eye[:rank] - v.mT @ self.left), v, core

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, v, _ = self._factors()
        y = torch.addcmul(self.bias, x + F.linear(x @ v, u), self.log_diag.exp())
        return y, (self.log_diag.sum(-1) + self.log_core.sum(-1)).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, v, core = self._factors()
        z = (y - self.bias) * (-self.log_diag).exp()
        x = z - F.linear(F.linear(z, torch.linalg.solve_triangular(core, v.mT, upper=True)), u)
        return x, -(self.log_diag.sum(-1) + self.log_core.sum(-1)).expand(y.shape[:-1])


def directions(dim: int, rank: int, seed: int) -> np.ndarray:
    """Random unit vectors ``(rank, dim)``, the same in both packages."""
    if not 1 <= rank <= dim:
        raise ValueError(f"LowRankLinear: rank must lie in [1, dim] = [1, {dim}], but got {rank}.")
    vectors = np.random.default_rng(seed).normal(size=(rank, dim))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
