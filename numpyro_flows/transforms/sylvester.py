"""Sylvester flows (van den Berg et al. 2018, Sylvester Normalizing Flows for Variational Inference)."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_flows.conditioners import MLP
from numpyro_flows.numerical import monotone_root
from numpyro_flows.transform_module import TransformModule, full_precision
from numpyro_flows.transforms.planar import log_slope

KINDS = ("orthogonal", "householder", "triangular")


class Sylvester(TransformModule):
    """``y = x + Q R tanh(S Q^T x + b)``: ``rank`` planar maps at once (eq. 13).

    ``Q`` ``(dim, rank)`` has orthonormal columns, the same ones on both sides; ``R`` and ``S`` ``(rank, rank)`` are
    upper triangular. Then ``det dy/dx = prod_i (1 + tanh'(a_i) R_ii S_ii)`` (Sylvester's identity, eq. 14), and the
    map is a bijection because ``R_ii S_ii > -1`` (theorem 2), bounded as in :class:`~numpyro_flows.transforms.Planar`.

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

    basis: Array
    outer: Array
    inner: Array
    bias: Array
    conditioner: MLP | None
    dim: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)

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
        key: Array,
    ):
        self.dim, self.rank, self.kind, self.reverse = dim, min(dim, 32) if rank is None else rank, kind, reverse
        if kind not in KINDS:
            raise ValueError(f"Sylvester: kind must be one of {KINDS}, but got {kind!r}.")
        if not 1 <= self.rank <= dim:
            raise ValueError(f"Sylvester: rank must lie in [1, dim] = [1, {dim}], but got {rank}.")
        rows = {"orthogonal": self.rank, "householder": num_reflections, "triangular": 0}[kind]
        limit = self.rank**-0.5
        keys = jax.random.split(key, 4)
        self.basis = jax.random.normal(keys[0], (rows, dim))
        self.outer = jnp.zeros((self.rank, self.rank))
        self.inner = jax.random.uniform(keys[1], (self.rank, self.rank), minval=-limit, maxval=limit)
        self.bias = jax.random.uniform(keys[2], (self.rank,), minval=-limit, maxval=limit)
        self.conditioner = None
        if context_dim:
            out_dim = rows * dim + 2 * self.rank**2 + self.rank
            self.conditioner = MLP(0, hidden_dims, out_dim, context_dim, activation, key=keys[3])

    def _params(self, x: Array, context: Array | None) -> tuple[Array, Array, Array, Array, Array]:
        """``Q``, ``R``, ``S``, ``b``, and the products ``R_ii S_ii`` before their bound."""
        params = [self.basis, self.outer, self.inner, self.bias]
        if self.conditioner is not None:
            theta, start = self.conditioner(x[..., :0], context), 0
            for n, p in enumerate(params):
                moved = theta[..., start : start + p.size].reshape(*theta.shape[:-1], *p.shape)
                params[n], start = p + moved, start + p.size
        basis, outer, inner, bias = params
        r, s = jnp.diagonal(outer, axis1=-2, axis2=-1), jnp.diagonal(inner, axis1=-2, axis2=-1)
        product = r * s
        bounded = r + s * r**2 / (1 + jnp.sqrt(1 + product**2))
        outer = jnp.triu(outer, 1) + jnp.eye(self.rank, dtype=outer.dtype) * bounded[..., None]
        return self._orthonormal(basis), outer, jnp.triu(inner), bias, product

    @full_precision
    def _orthonormal(self, basis: Array) -> Array:
        if self.kind == "orthogonal":
            q, r = jnp.linalg.qr(basis.mT)
            return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)[..., None, :]

        def reflect(q, v):
            v = v[..., None]
            return q - (2 / (v**2).sum(-2, keepdims=True)) * v * (v.mT @ q), None

        start = jnp.broadcast_to(
            jnp.eye(self.dim, self.rank, dtype=basis.dtype), (*basis.shape[:-2], self.dim, self.rank)
        )
        return lax.scan(reflect, start, jnp.moveaxis(basis, -2, 0))[0]

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        basis, outer, inner, bias, product = self._params(x, context)
        a = _times(inner, _times(basis.mT, x)) + bias
        y = x + _times(basis, _times(outer, jnp.tanh(a)))
        return y[..., ::-1] if self.reverse else y, log_slope(a, product).sum(-1)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        y = y[..., ::-1] if self.reverse else y
        basis, outer, inner, bias, product = self._params(y, context)
        z = _times(basis.mT, y)  # = v + R tanh(S v + b), solved from the last element to the first

        def solve(n, state):
            z, bias, solved, log_det = state
            i = self.rank - 1 - n
            r, s = outer[..., i], inner[..., i]  # columns
            b, p = bias[..., i], product[..., i]
            r_i, s_i = r[..., i], s[..., i]
            v = monotone_root(
                lambda v: (v + r_i * jnp.tanh(s_i * v + b), log_slope(s_i * v + b, p)),
                z[..., i],
                z[..., i] - jnp.abs(r_i),
                z[..., i] + jnp.abs(r_i),
                owner="Sylvester",
            )
            a = s_i * v + b
            z, bias = z - r * jnp.tanh(a)[..., None], bias + s * v[..., None]
            return z, bias, solved.at[..., i].set(v), log_det - log_slope(a, p)

        start = z, bias + jnp.zeros_like(z), jnp.zeros_like(z), jnp.zeros_like(z[..., 0])
        _, _, solved, log_det = lax.fori_loop(0, self.rank, solve, start)
        return y + _times(basis, solved - z), log_det


@full_precision
def _times(matrix: Array, x: Array) -> Array:
    """``matrix x`` for every vector of the batch ``x``; the matrix may have batch axes too."""
    return (x[..., None, :] @ matrix.mT)[..., 0, :]
