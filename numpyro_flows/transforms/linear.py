"""Linear maps whose determinant is a product of diagonals."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular

from numpyro_flows.transform_module import TransformModule


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

    def __init__(self, dim: int, loc: Array | None = None, scale_tril: Array | None = None):
        self.loc = jnp.zeros(dim) if loc is None else jnp.asarray(loc)
        scale_tril = jnp.eye(dim, dtype=self.loc.dtype) if scale_tril is None else jnp.asarray(scale_tril)
        if scale_tril.shape != (dim, dim):
            raise ValueError(f"TriangularAffine: scale_tril must be ({dim}, {dim}), but got {scale_tril.shape}.")
        self.log_diag = jnp.log(jnp.diagonal(scale_tril))
        self.lower = jnp.tril(scale_tril, -1)

    @property
    def scale_tril(self) -> Array:
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diag))

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.loc + x @ self.scale_tril.T, jnp.broadcast_to(self.log_diag.sum(-1), x.shape[:-1])

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x = _solve(self.scale_tril, y - self.loc, lower=True)
        return x, jnp.broadcast_to(-self.log_diag.sum(-1), y.shape[:-1])


class LULinear(TransformModule):
    """``y = L U x + bias``; ``L`` unit lower, ``U`` upper triangular with diagonal ``exp(log_diag)``.

    Kingma & Dhariwal 2018 (Glow), section 3.2. ``log |det|`` is the sum of ``log_diag``. Costs ``O(dim^2)`` an element
    of the batch, both ways. Starts at the identity.

    :param dim: size of ``x``.
    """

    lower: Array
    upper: Array
    log_diag: Array
    bias: Array

    def __init__(self, dim: int):
        self.lower, self.upper = jnp.zeros((dim, dim)), jnp.zeros((dim, dim))
        self.log_diag, self.bias = jnp.zeros(dim), jnp.zeros(dim)

    def _factors(self) -> tuple[Array, Array]:
        lower = jnp.tril(self.lower, -1) + jnp.eye(self.lower.shape[-1], dtype=self.lower.dtype)
        return lower, jnp.triu(self.upper, 1) + jnp.diag(jnp.exp(self.log_diag))

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        lower, upper = self._factors()
        return x @ (lower @ upper).T + self.bias, jnp.broadcast_to(self.log_diag.sum(-1), x.shape[:-1])

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        lower, upper = self._factors()
        x = _solve(upper, _solve(lower, y - self.bias, lower=True), lower=False)
        return x, jnp.broadcast_to(-self.log_diag.sum(-1), y.shape[:-1])


def _solve(matrix: Array, y: Array, lower: bool) -> Array:
    """``matrix^{-1} y`` for every vector of the batch ``y`` ``(..., dim)``, by one triangular solve."""
    columns = y.reshape(-1, y.shape[-1]).T
    return solve_triangular(matrix, columns, lower=lower).T.reshape(y.shape)
