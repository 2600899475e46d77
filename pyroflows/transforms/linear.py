"""Linear maps whose determinant is a product of diagonals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.transform_module import TransformModule


class TriangularAffine(TransformModule):
    """``y = loc + L x`` with ``L`` lower triangular of positive diagonal: a Gaussian of full rank.

    ``log |det L|`` is the sum of ``log_diag``. Costs ``O(dim^2)`` an element of the batch, both ways.

    :param dim: size of ``x``.
    :param loc: first location ``(dim,)``; zeros unless given.
    :param scale_tril: first ``L`` ``(dim, dim)``; the identity unless given.
    """

    def __init__(self, dim: int, loc: Tensor | None = None, scale_tril: Tensor | None = None):
        super().__init__()
        loc = torch.zeros(dim) if loc is None else loc.detach().clone()
        scale_tril = torch.eye(dim).to(loc) if scale_tril is None else scale_tril.detach()
        if scale_tril.shape != (dim, dim):
            raise ValueError(f"TriangularAffine: scale_tril must be ({dim}, {dim}), but got {tuple(scale_tril.shape)}.")
        self.loc = nn.Parameter(loc)
        self.log_diag = nn.Parameter(scale_tril.diagonal().log())
        self.lower = nn.Parameter(scale_tril.tril(-1))

    @property
    def scale_tril(self) -> Tensor:
        return self.lower.tril(-1) + torch.diag(self.log_diag.exp())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.scale_tril, self.loc), self.log_diag.sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = _solve(self.scale_tril, y - self.loc, upper=False)
        return x, -self.log_diag.sum(-1).expand(y.shape[:-1])


class LULinear(TransformModule):
    """``y = L U x + bias``; ``L`` unit lower, ``U`` upper triangular with diagonal ``exp(log_diag)``.

    Kingma & Dhariwal 2018 (Glow), section 3.2. ``log |det|`` is the sum of ``log_diag``. Costs ``O(dim^2)`` an element
    of the batch, both ways. Starts at the identity.

    :param dim: size of ``x``.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.lower, self.upper = nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim, dim))
        self.log_diag, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + torch.diag(self.log_diag.exp())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        return F.linear(x, lower @ upper, self.bias), self.log_diag.sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        x = _solve(upper, _solve(lower, y - self.bias, upper=False), upper=True)
        return x, -self.log_diag.sum(-1).expand(y.shape[:-1])


def _solve(matrix: Tensor, y: Tensor, upper: bool) -> Tensor:
    """``matrix^{-1} y`` for every vector of the batch ``y`` ``(..., dim)``, by one triangular solve."""
    columns = y.reshape(-1, y.shape[-1]).mT
    return torch.linalg.solve_triangular(matrix, columns, upper=upper).mT.reshape(y.shape)
