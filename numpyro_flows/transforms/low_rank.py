"""A diagonal plus a matrix of low rank, by Woodbury's identity and the matrix determinant lemma."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular

from numpyro_flows.transform_module import TransformModule, full_precision
from numpyro_flows.transforms.orthogonal import reflections


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

    vectors: Array
    left: Array
    core: Array
    log_core: Array
    log_diag: Array
    bias: Array
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, rank: int = 1, seed: int = 0):
        self.dim = dim
        self.vectors = jnp.asarray(directions(dim, rank, seed), float)
        self.left, self.core = jnp.zeros((dim, rank)), jnp.zeros((rank, rank))
        self.log_core, self.log_diag, self.bias = jnp.zeros(rank), jnp.zeros(dim), jnp.zeros(dim)

    def _factors(self) -> tuple[Array, Array, Array]:
        u, w = reflections(self.vectors)
        rank = len(self.vectors)
        eye = jnp.eye(u.shape[-1], rank, dtype=u.dtype)
        v = eye - u.T @ w[:, :rank]
        core = jnp.triu(self.core, 1) + jnp.diag(jnp.exp(self.log_core))
        return self.left + v @ (core - eye[:rank] - v.T @ self.left), v, core

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, v, _ = self._factors()
        y = jnp.exp(self.log_diag) * (x + x @ v @ u.T) + self.bias
        return y, jnp.broadcast_to(self.log_diag.sum(-1) + self.log_core.sum(-1), x.shape[:-1])

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, v, core = self._factors()
        z = (y - self.bias) * jnp.exp(-self.log_diag)
        x = z - z @ solve_triangular(core, v.T).T @ u.T
        return x, jnp.broadcast_to(-(self.log_diag.sum(-1) + self.log_core.sum(-1)), y.shape[:-1])


def directions(dim: int, rank: int, seed: int) -> np.ndarray:
    """Random unit vectors ``(rank, dim)``, the same in both packages."""
    if not 1 <= rank <= dim:
        raise ValueError(f"LowRankLinear: rank must lie in [1, dim] = [1, {dim}], but got {rank}.")
    vectors = np.random.default_rng(seed).normal(size=(rank, dim))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
