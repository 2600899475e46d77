"""Orthogonal maps (log-determinant zero), and the QR factorisation of a matrix that rests on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.conditioners import MLP
from pyroflows.transform_module import TransformModule
from pyroflows.transforms.linear import solve


class Householder(TransformModule):
    """``y = H_1 H_2 .. H_k x`` with reflections ``H_i = I - 2 v_i v_i^T / |v_i|^2``: a rotation, log-determinant zero.

    Tomczak & Welling 2016, eq. 8. The product is taken at once, as ``I - U^T S^{-1} U`` (compact WY form). Costs
    ``O(k dim)`` an element of the batch and ``O(k^2 dim)`` a call, both ways; with a context, ``O(k^2 dim)`` an
    element. The vectors start as pairs of equal ones, whose reflections cancel: at the identity.

    :param dim: size of ``x``.
    :param num_reflections: ``k``, even; ``dim`` of them reach every rotation.
    :param hidden_dims: hidden widths of the network that gives the vectors, used with a context only.
    :param context_dim: size of the context, 0 for none (then the vectors are free parameters).
    :param activation: the network's activation.
    :param seed: of the pairs' first directions.
    """

    def __init__(
        self,
        dim: int,
        num_reflections: int = 2,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
        seed: int = 0,
    ):
        super().__init__()
        self.dim = dim
        self.vectors = nn.Parameter(torch.tensor(pairs(dim, num_reflections, seed), dtype=torch.get_default_dtype()))
        self.conditioner = None
        if context_dim:
            self.conditioner = MLP(0, hidden_dims, num_reflections * dim, context_dim, activation)

    def _factors(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conditioner is None:
            return reflections(self.vectors)
        theta = self.conditioner(x[..., :0], context)
        return reflections(self.vectors + theta.unflatten(-1, tuple(self.vectors.shape)))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w = self._factors(x, context)
        y = subtract(x, w, u)
        return y, y.new_zeros(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w = self._factors(y, context)
        x = subtract(y, u, w)
        return x, x.new_zeros(x.shape[:-1])


class QRLinear(TransformModule):
    """``y = Q R x + bias``; ``Q`` a product of reflections, ``R`` upper triangular with diagonal ``exp(log_diag)``.

    Hoogeboom et al. 2019 (Emerging convolutions), section 3.2. ``log |det|`` is the sum of ``log_diag``. Costs
    ``O(dim^2)`` an element of the batch, both ways, and ``O(k^2 dim)`` a call. Every matrix of positive determinant is
    one of these (with the default of ``k``). Starts at the identity.

    :param dim: size of ``x``.
    :param num_reflections: ``k``, even; ``dim`` rounded down to an even number (at least 2) unless given.
    :param seed: of the reflections' first directions, which come in pairs that cancel.
    """

    def __init__(self, dim: int, num_reflections: int | None = None, seed: int = 0):
        super().__init__()
        self.dim = dim
        num_reflections = max(2, dim - dim % 2) if num_reflections is None else num_reflections
        self.vectors = nn.Parameter(torch.tensor(pairs(dim, num_reflections, seed), dtype=torch.get_default_dtype()))
        self.upper = nn.Parameter(torch.zeros(dim, dim))
        self.log_diag, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def _upper(self) -> Tensor:
        return self.upper.triu(1) + torch.diag(self.log_diag.exp())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w = reflections(self.vectors)
        y = subtract(F.linear(x, self._upper()), w, u) + self.bias
        return y, self.log_diag.sum(-1).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w = reflections(self.vectors)
        x = solve(self._upper(), subtract(y - self.bias, u, w), upper=True)
        return x, -self.log_diag.sum(-1).expand(y.shape[:-1])


class Orthogonal(TransformModule):
    """``y = Q x``, a rotation from a skew-symmetric ``A``: ``Q = exp(A)``, or ``(I + A)^{-1} (I - A)``; log-det zero.

    Costs ``O(dim^2)`` an element of the batch and ``O(dim^3)`` a call, both ways. ``exp`` reaches every rotation,
    ``cayley`` (cheaper) all but those by half a turn. ``Q`` is orthogonal to rounding for any ``A``. Starts at the
    identity. Only the lower triangle of ``skew`` counts.

    Golinski et al. 2019 (Improving normalizing flows via better orthogonal parameterizations).

    :param dim: size of ``x``.
    :param method: ``"exp"`` or ``"cayley"``.
    """

    def __init__(self, dim: int, method: str = "exp"):
        super().__init__()
        self.dim = dim
        check_method(method)
        self.method = method
        self.skew = nn.Parameter(torch.zeros(dim, dim))

    @property
    def matrix(self) -> Tensor:
        """``Q`` ``(dim, dim)``."""
        lower = self.skew.tril(-1)
        skew = lower - lower.mT
        if self.method == "exp":
            return _exp_of_skew(skew)
        eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve_ex(eye + skew, eye - skew)[0]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.matrix), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y @ self.matrix, y.new_zeros(y.shape[:-1])


# Pade approximant [7/7] of exp (Higham 2005, table 2.3): exact to float64 for norms up to 0.95
PADE = [1.0, 1 / 2, 3 / 26, 5 / 312, 5 / 3432, 1 / 11440, 1 / 308880, 1 / 17297280]


def _exp_of_skew(a: Tensor) -> Tensor:
    """``exp(A)`` by scaling and squaring, with nothing read on the host. It is accurate for norms up to 243; beyond
    them it is orthogonal all the same, as the approximant of any skew ``A`` is."""
    halvings = (a.detach().abs().sum(-1).max() / 0.95).log2().ceil().clamp(0, 8)
    a = a * torch.exp2(-halvings)
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    a2 = a @ a
    a4 = a2 @ a2
    a6 = a4 @ a2
    odd = a @ (PADE[7] * a6 + PADE[5] * a4 + PADE[3] * a2 + PADE[1] * eye)
    even = PADE[6] * a6 + PADE[4] * a4 + PADE[2] * a2 + eye
    q = torch.linalg.solve_ex(even - odd, even + odd)[0]
    for step in range(8):
        q = torch.where(halvings > step, q @ q, q)
    return q


def reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """``U`` and ``W`` ``(..., k, dim)`` with ``H_1 .. H_k = I - U^T W`` for the reflections at ``vectors``."""
    square = vectors.square().sum(-1, keepdim=True)
    u = vectors * torch.where(square > torch.finfo(square.dtype).tiny, square, 1.0).rsqrt()  # none at a zero vector
    eye = torch.eye(u.shape[-2], dtype=u.dtype, device=u.device)
    return u, torch.linalg.solve_triangular((u @ u.mT).triu(1) + 0.5 * eye, u, upper=True)


def subtract(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``x - second^T first x`` for matrices ``(..., k, dim)``."""
    if first.dim() == 2:
        return x - F.linear(x, first) @ second
    return x - (x.unsqueeze(-2) @ first.mT @ second).squeeze(-2)


def pairs(dim: int, num_reflections: int, seed: int) -> np.ndarray:
    """Random unit vectors ``(num_reflections, dim)``, each twice in a row: the same in both packages."""
    if num_reflections < 2 or num_reflections % 2:
        raise ValueError(f"num_reflections must be even and at least 2, but got {num_reflections}.")
    vectors = np.random.default_rng(seed).normal(size=(num_reflections // 2, dim))
    return np.repeat(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), 2, axis=0)


def check_method(method: str) -> None:
    """Raises a ``ValueError`` unless ``method`` names a parametrisation of :class:`Orthogonal`."""
    if method not in ("exp", "cayley"):
        raise ValueError(f'Orthogonal: method must be "exp" or "cayley", but got {method!r}.')
