"""Fixed reorderings of the elements: volume preserving."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.transform_module import TransformModule


class Permutation(TransformModule):
    """``y_i = x_{permutation[i]}``; log-determinant zero. Holds no trainable parameters.

    :param permutation: the integers ``0 .. dim - 1`` in any order.
    """

    permutation: tuple[int, ...] = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    def __init__(self, permutation: Sequence[int]):
        self.permutation = tuple(int(i) for i in permutation)
        if sorted(self.permutation) != list(range(len(self.permutation))):
            raise ValueError(
                f"Permutation: permutation must hold each of 0 .. {len(self.permutation) - 1} once, "
                f"but got {list(self.permutation)}."
            )
        self.dim = len(self.permutation)

    @classmethod
    def reverse(cls, dim: int) -> Permutation:
        """The order reversed."""
        return cls(range(dim)[::-1])

    @classmethod
    def roll(cls, dim: int, shift: int) -> Permutation:
        """Elements moved ``shift`` places to the right, cyclically (as ``numpy.roll``)."""
        return cls(np.roll(np.arange(dim), shift).tolist())

    @classmethod
    def random(cls, dim: int, seed: int = 0) -> Permutation:
        """A random order which depends on ``dim`` and ``seed`` alone, the same in both packages."""
        return cls(np.random.default_rng(seed).permutation(dim).tolist())

    @property
    def passes(self) -> tuple[int, int]:
        return 0, 0

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return x[..., np.array(self.permutation)], jnp.zeros(x.shape[:-1], x.dtype)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return y[..., np.argsort(self.permutation)], jnp.zeros(y.shape[:-1], y.dtype)
