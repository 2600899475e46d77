"""Sylvester flows (van den Berg et al. 2018, Sylvester Normalizing Flows for Variational Inference)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.conditioners import MLP
from pyroflows.numerical import monotone_root
from pyroflows.transform_module import TransformModule
from pyroflows.transforms.planar import log_slope

KINDS = ("orthogonal", "householder", "triangular")


class Sylvester(TransformModule):
    """``y = x + Q R tanh(S Q^T x + b)``: ``rank`` planar maps at once (eq. 13).

    ``Q`` ``(dim, rank)`` has orthonormal columns, the same ones on both sides; ``R`` and ``S`` ``(rank, rank)`` are
    upper triangular. Then ``det dy/dx = prod_i (1 + tanh'(a_i) R_ii S_ii)`` (Sylvester's identity, eq. 14), and the
    map is a bijection because ``R_ii S_ii > -1`` (theorem 2), bounded as in :class:`~pyroflows.transforms.Planar`.

    Forward costs ``O(dim rank)`` beside making ``Q``. For the inverse, ``v = Q^T x`` solves a triangular system:
    ``rank`` scalar roots, one after the other, of some ten evaluations of ``tanh`` each. Starts at the identity.

    :param dim: size of ``x``.
    :param rank: columns of ``Q``, at most ``dim``; ``min(dim, 32)`` unless given.
    :param kind: what ``Q`` is: ``"orthogonal"``, by a QR factorisation (section 4.1, exact where the paper's iteration
        is approximate); ``"householder"``, the first columns of ``num_reflections`` reflections (section 4.2); or
        ``"triangular"``, of the identity (section 4.3: alternate the ordering by ``reverse``).
    :param num_reflections: reflections of ``kind="householder"``.
    :param reverse: returns ``y`` in reversed order, so that equal layers alternate the ordering.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none. It moves all of ``Q``, ``R``, ``S`` and ``b``.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        *,
        kind: str = "orthogonal",
        num_reflections: int = 4,
        reverse: bool = False,
        hidden_dims: Sequence[int] = (32, 32),
        context_dim: int = 0,
        activation: str = "silu",
    ):
        super().__init__()
        self.dim, self.rank, self.kind, self.reverse = dim, min(dim, 32) if rank is None else rank, kind, reverse
        if kind not in KINDS:
            raise ValueError(f"Sylvester: kind must be one of {KINDS}, but got {kind!r}.")
        if not 1 <= self.rank <= dim:
            raise ValueError(f"Sylvester: rank must lie in [1, dim] = [1, {dim}], but got {rank}.")
        rows = {"orthogonal": self.rank, "householder": num_reflections, "triangular": 0}[kind]
        limit = self.rank**-0.5
        self.basis = nn.Parameter(torch.randn(rows, dim))
        self.outer = nn.Parameter(torch.zeros(self.rank, self.rank))
        self.inner = nn.Parameter(torch.empty(self.rank, self.rank).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(self.rank).uniform_(-limit, limit))
        self.conditioner = None
        if context_dim:
            self._sizes = [rows * dim, self.rank**2, self.rank**2, self.rank]
            self.conditioner = MLP(0, hidden_dims, sum(self._sizes), context_dim, activation)

    def _params(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``Q``, ``R``, ``S``, ``b``, and the products ``R_ii S_ii`` before their bound."""
        params: list[Tensor] = [self.basis, self.outer, self.inner, self.bias]
        if self.conditioner is not None:
            moved = self.conditioner(x[..., :0], context).split(self._sizes, -1)
            params = [p + m.unflatten(-1, tuple(p.shape)) for p, m in zip(params, moved, strict=True)]
        basis, outer, inner, bias = params
        r, s = outer.diagonal(dim1=-2, dim2=-1), inner.diagonal(dim1=-2, dim2=-1)
        product = r * s
        bounded = r + s * r.square() / (1 + (1 + product.square()).sqrt())
        outer = outer.triu(1) + torch.diag_embed(bounded)
        return self._orthonormal(basis), outer, inner.triu(), bias, product

    def _orthonormal(self, basis: Tensor) -> Tensor:
        if self.kind == "orthogonal":
            q, r = torch.linalg.qr(basis.mT)
            return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q).unsqueeze(-2)
        q = torch.eye(self.dim, self.rank, dtype=basis.dtype, device=basis.device)
        q = q.expand(*basis.shape[:-2], self.dim, self.rank)  # the context's batch axes
        for v in basis.unbind(-2):
            v = v.unsqueeze(-1)
            q = q - (2 / v.square().sum(-2, keepdim=True)) * v * (v.mT @ q)
        return q

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        basis, outer, inner, bias, product = self._params(x, context)
        a = _times(inner, _times(basis.mT, x)) + bias
        y = x + _times(basis, _times(outer, torch.tanh(a)))
        return y.flip(-1) if self.reverse else y, log_slope(a, product).sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = y.flip(-1) if self.reverse else y
        basis, outer, inner, bias, product = self._params(y, context)
        start = z = _times(basis.mT, y)  # = v + R tanh(S v + b), solved from the last element to the first
        solved: list[Tensor] = []
        log_det = torch.zeros_like(z[..., 0])
        for i in reversed(range(self.rank)):
            r, s, b, p = outer[..., i, i], inner[..., i, i], bias[..., i], product[..., i]
            v = monotone_root(
                lambda v, r=r, s=s, b=b, p=p: (v + r * torch.tanh(s * v + b), log_slope(s * v + b, p)),  # type: ignore
                z[..., i],
                z[..., i] - r.abs(),
                z[..., i] + r.abs(),
                owner="Sylvester",
            )
            a = s * v + b
            bias = bias + inner[..., :, i] * v.unsqueeze(-1)
            z = z - outer[..., :, i] * torch.tanh(a).unsqueeze(-1)
            solved, log_det = [v, *solved], log_det - log_slope(a, p)
        return y + _times(basis, torch.stack(solved, -1) - start), log_det


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix x`` for every vector of the batch ``x``; the matrix may have batch axes too."""
    return (x.unsqueeze(-2) @ matrix.mT).squeeze(-2)
