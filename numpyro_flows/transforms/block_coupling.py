"""Coupling of more than two blocks: each is transformed given all blocks before it."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.conditioners import MLP
from numpyro_flows.transform_module import TransformModule
from numpyro_flows.univariate import Univariate


class BlockCoupling(TransformModule):
    """``y_j = g(x_j; theta_j(x_1 .. x_{j-1}, context))`` for the blocks ``j = 2 .. k``; the first block stays.

    Between coupling (two blocks) and an autoregressive map (``dim`` blocks): a block triangular Jacobian with diagonal
    blocks on its diagonal. Each direction takes ``k - 1`` network passes, one a block and each network its own; those
    of the forward direction do not wait for one another. Every element keeps its place.

    :param dim: size of ``x``. With ``dim=1`` the map is elementwise.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of each conditioner.
    :param context_dim: size of the context, 0 for none.
    :param blocks: their number (of near equal size, in the natural order, at most ``dim``), or the blocks themselves:
        sequences of indices which hold each of ``0 .. dim - 1`` once. The first may be empty.
    :param activation: the conditioners' activation.
    """

    conditioners: tuple[MLP, ...]
    univariate: Univariate
    dim: int = eqx.field(static=True)
    blocks: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        blocks: int | Sequence[Sequence[int]] = 3,
        activation: str = "silu",
        key: Array,
    ):
        self.dim, self.univariate = dim, univariate
        self.blocks = tuple(tuple(part) for part in check_blocks(dim, blocks))
        sizes = [len(part) for part in self.blocks]
        keys = jax.random.split(key, len(sizes))
        self.conditioners = tuple(
            MLP(sum(sizes[:j]), hidden_dims, univariate.num_params * size, context_dim, activation, key=keys[j])
            for j, size in enumerate(sizes)
            if j
        )

    @property
    def passes(self) -> tuple[int, int]:
        return len(self.conditioners), len(self.conditioners)

    def _params(self, j: int, before: Array, context: Array | None) -> Array:
        theta = self.conditioners[j - 1](before, context)
        return theta.reshape(*theta.shape[:-1], self.univariate.num_params, len(self.blocks[j]))

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._transform(x, context, inverse=False)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._transform(y, context, inverse=True)

    def _transform(self, x: Array, context: Array | None, inverse: bool) -> tuple[Array, Array]:
        if context is not None:
            x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape[:-1], context.shape[:-1]) + x.shape[-1:])
        univariate = self.univariate.inverse_and_log_det if inverse else self.univariate.forward_and_log_det
        parts = [x[..., np.array(part, int)] for part in self.blocks]
        before, total = parts[0], jnp.zeros(x.shape[:-1], x.dtype)
        for j, part in enumerate(parts[1:], 1):
            parts[j], log_det = univariate(part, self._params(j, before, context))
            total = total + log_det.sum(-1)
            before = jnp.concatenate([before, parts[j] if inverse else part], -1)
        return jnp.concatenate(parts, -1)[..., np.argsort(sum(self.blocks, ()))], total


def check_blocks(dim: int, blocks: int | Sequence[Sequence[int]]) -> list[list[int]]:
    """The blocks as lists of indices; a ``ValueError`` unless they are a partition of ``0 .. dim - 1``."""
    if isinstance(blocks, int):
        if blocks < 2:
            raise ValueError(f"BlockCoupling: blocks must be at least 2, but got {blocks}.")
        if dim == 1:
            return [[], [0]]
        return [part.tolist() for part in np.array_split(np.arange(dim), min(blocks, dim))]
    parts = [[int(i) for i in part] for part in blocks]
    if len(parts) < 2 or not all(parts[1:]) or sorted(i for part in parts for i in part) != list(range(dim)):
        raise ValueError(
            f"BlockCoupling: blocks must be two or more sequences that hold each of 0 .. {dim - 1} once, none but the "
            f"first of them empty, but got {blocks!r}."
        )
    return parts
