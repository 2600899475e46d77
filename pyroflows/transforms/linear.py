"""Linear maps whose determinant is a product of diagonals, and the dense one."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.dim = dim
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
        x = solve(self.scale_tril, y - self.loc, upper=False)
        return x, -self.log_diag.sum(-1).expand(y.shape[:-1])


class LULinear(TransformModule):
    """``y = P L U x + bias``; ``L`` unit lower, ``U`` upper triangular with diagonal ``exp(log_diag)``, ``P`` fixed.

    Kingma & Dhariwal 2018 (Glow), section 3.2. ``log |det|`` is the sum of ``log_diag``. Costs ``O(dim^2)`` an element
    of the batch, both ways. Starts at ``P``, which is the identity unless a permutation is given: the learned form of
    that permutation.

    :param dim: size of ``x``.
    :param permutation: ``P``: at the start ``y_i = x_{permutation[i]}``.
    """

    permutation: Tensor | None

    def __init__(self, dim: int, permutation: Sequence[int] | None = None):
        super().__init__()
        self.dim = dim
        if permutation is not None and sorted(permutation) != list(range(dim)):
            raise ValueError(
                f"LULinear: permutation must hold each of 0 .. {dim - 1} once, but got {list(permutation)}."
            )
        index = None if permutation is None else torch.tensor([int(i) for i in permutation])
        self.register_buffer("permutation", index, persistent=False)
        self.lower, self.upper = nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim, dim))
        self.log_diag, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + torch.diag(self.log_diag.exp())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        if self.permutation is not None:
            lower = lower.index_select(0, self.permutation)
        return F.linear(F.linear(x, upper), lower, self.bias), self.log_diag.sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        y = y - self.bias
        if self.permutation is not None:
            y = y.index_select(-1, self.permutation.argsort())
        x = solve(upper, solve(lower, y, upper=False), upper=True)
        return x, -self.log_diag.sum(-1).expand(y.shape[:-1])


class DenseLinear(TransformModule):
    """``y = weight x + bias``, the determinant by ``slogdet``: the reference which the structured maps are held to.

    Costs ``O(dim^3)`` a call and ``O(dim^2)`` an element of the batch, both ways. Starts at the identity; nothing keeps
    ``weight`` from becoming singular in training (``log_det`` is then ``-inf`` and the inverse not finite): take
    :class:`LULinear` or :class:`QRLinear`, which cannot.

    :param dim: size of ``x``.
    :param weight: first matrix ``(dim, dim)``, invertible; the identity unless given.
    """

    def __init__(self, dim: int, weight: Tensor | None = None):
        super().__init__()
        self.dim = dim
        weight = torch.eye(dim) if weight is None else weight.detach().clone()
        if weight.shape != (dim, dim):
            raise ValueError(f"DenseLinear: weight must be ({dim}, {dim}), but got {tuple(weight.shape)}.")
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(dim).to(weight))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(self.weight).logabsdet
        return F.linear(x, self.weight, self.bias), log_det.expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(self.weight).logabsdet
        columns = (y - self.bias).reshape(-1, y.shape[-1]).mT
        x = torch.linalg.solve_ex(self.weight, columns)[0].mT.reshape(y.shape)
        return x, -log_det.expand(y.shape[:-1])


def solve(matrix: Tensor, y: Tensor, upper: bool) -> Tensor:
    """``matrix^{-1} y`` for every vector of the batch ``y`` ``(..., dim)``, by one triangular solve."""
    columns = y.reshape(-1, y.shape[-1]).mT
    return torch.linalg.solve_triangular(matrix, columns, upper=upper).mT.reshape(y.shape)
