"""Linear maps whose determinant is a product of diagonals, and the dense one."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from numpyro_flows.transform_module import TransformModule, full_precision


class TriangularAffine(TransformModule):
    """``y = loc + L x`` with ``L`` lower triangular of positive diagonal: a Gaussian of full rank.

    ``log |det L|`` is the sum of ``log_diag``. Costs ``O(dim^2)`` an element of the batch, both ways.

    :param dim: size of ``x``.
    :param loc: first location ``(dim,)``; zeros unless given.
    :param scale_tril: first ``L`` ``(dim, dim)``; the identity unless given.
    """

    loc: Array
    log_diag: Array
    lower: Array
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, loc: Array | None = None, scale_tril: Array | None = None):
        self.dim = dim
        self.loc = jnp.zeros(dim) if loc is None else jnp.asarray(loc)
        scale_tril = jnp.eye(dim, dtype=self.loc.dtype) if scale_tril is None else jnp.asarray(scale_tril)
        if scale_tril.shape != (dim, dim):
            raise ValueError(f"TriangularAffine: scale_tril must be ({dim}, {dim}), but got {scale_tril.shape}.")
        self.log_diag = jnp.log(jnp.diagonal(scale_tril))
        self.lower = jnp.tril(scale_tril, -1)

    @property
    def scale_tril(self) -> Array:
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diag))

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.loc + x @ self.scale_tril.T, jnp.broadcast_to(self.log_diag.sum(-1), x.shape[:-1])

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x = solve(self.scale_tril, y - self.loc, lower=True)
        return x, jnp.broadcast_to(-self.log_diag.sum(-1), y.shape[:-1])


class LULinear(TransformModule):
    """``y = P L U x + bias``; ``L`` unit lower, ``U`` upper triangular with diagonal ``exp(log_diag)``, ``P`` fixed.

    Kingma & Dhariwal 2018 (Glow), section 3.2. ``log |det|`` is the sum of ``log_diag``. Costs ``O(dim^2)`` an element
    of the batch, both ways. Starts at ``P``, which is the identity unless a permutation is given: the learned form of
    that permutation.

    :param dim: size of ``x``.
    :param permutation: ``P``: at the start ``y_i = x_{permutation[i]}``.
    """

    lower: Array
    upper: Array
    log_diag: Array
    bias: Array
    permutation: tuple[int, ...] | None = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, permutation: Sequence[int] | None = None):
        if permutation is not None and sorted(permutation) != list(range(dim)):
            raise ValueError(
                f"LULinear: permutation must hold each of 0 .. {dim - 1} once, but got {list(permutation)}."
            )
        self.permutation = None if permutation is None else tuple(int(i) for i in permutation)
        self.dim = dim
        self.lower, self.upper = jnp.zeros((dim, dim)), jnp.zeros((dim, dim))
        self.log_diag, self.bias = jnp.zeros(dim), jnp.zeros(dim)

    def _factors(self) -> tuple[Array, Array]:
        lower = jnp.tril(self.lower, -1) + jnp.eye(self.lower.shape[-1], dtype=self.lower.dtype)
        return lower, jnp.triu(self.upper, 1) + jnp.diag(jnp.exp(self.log_diag))

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        lower, upper = self._factors()
        if self.permutation is not None:
            lower = lower[np.array(self.permutation)]
        return x @ upper.T @ lower.T + self.bias, jnp.broadcast_to(self.log_diag.sum(-1), x.shape[:-1])

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        lower, upper = self._factors()
        y = y - self.bias
        if self.permutation is not None:
            y = y[..., np.argsort(self.permutation)]
        x = solve(upper, solve(lower, y, lower=True), lower=False)
        return x, jnp.broadcast_to(-self.log_diag.sum(-1), y.shape[:-1])


class DenseLinear(TransformModule):
    """``y = weight x + bias``, the determinant by ``slogdet``: the reference which the structured maps are held to.

    Costs ``O(dim^3)`` a call and ``O(dim^2)`` an element of the batch, both ways. Starts at the identity; nothing keeps
    ``weight`` from becoming singular in training (``log_det`` is then ``-inf`` and the inverse not finite): take
    :class:`LULinear` or :class:`QRLinear`, which cannot.

    :param dim: size of ``x``.
    :param weight: first matrix ``(dim, dim)``, invertible; the identity unless given.
    """

    weight: Array
    bias: Array
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, weight: Array | None = None):
        self.dim = dim
        self.weight = jnp.eye(dim) if weight is None else jnp.asarray(weight)
        if self.weight.shape != (dim, dim):
            raise ValueError(f"DenseLinear: weight must be ({dim}, {dim}), but got {self.weight.shape}.")
        self.bias = jnp.zeros(dim, self.weight.dtype)

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        log_det = jnp.linalg.slogdet(self.weight)[1]
        return x @ self.weight.T + self.bias, jnp.broadcast_to(log_det, x.shape[:-1])

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        log_det = jnp.linalg.slogdet(self.weight)[1]
        columns = (y - self.bias).reshape(-1, y.shape[-1]).T
        x = jnp.linalg.solve(self.weight, columns).T.reshape(y.shape)
        return x, jnp.broadcast_to(-log_det, y.shape[:-1])


def solve(matrix: Array, y: Array, lower: bool) -> Array:
    """``matrix^{-1} y`` for every vector of the batch ``y`` ``(..., dim)``, by one triangular solve."""
    columns = y.reshape(-1, y.shape[-1]).T
    return solve_triangular(matrix, columns, lower=lower).T.reshape(y.shape)
