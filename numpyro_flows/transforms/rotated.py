"""A map in rotated coordinates."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from numpyro_flows.transform_module import TransformModule, full_precision
from numpyro_flows.transforms.orthogonal import reflections


class Rotated(TransformModule):
    """``y = Q^T f(Q x)``: ``f`` in the coordinates of a trained rotation ``Q``, a product of ``dim`` reflections.

    Layers of it rotate between their elementwise maps (Meng et al. 2020, Gaussianization flows, section 3.2), and are
    the identity where ``f`` is, whatever ``Q``. The log-determinant is that of ``f``. Costs ``O(dim^2)`` an element of
    the batch more than ``f``, both ways, and ``O(dim^3)`` a call. ``Q`` starts at random.

    :param transform: ``f``.
    :param dim: size of ``x``.
    """

    transform: TransformModule
    vectors: Array
    dim: int = eqx.field(static=True)

    def __init__(self, transform: TransformModule, dim: int, *, key: Array):
        self.transform, self.dim = transform, dim
        self.vectors = jax.random.normal(key, (dim, dim))

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    @full_precision
    def rotation(self) -> Array:
        """``Q = H_1 .. H_dim``."""
        u, w = reflections(self.vectors)
        return jnp.eye(u.shape[-1], dtype=u.dtype) - u.mT @ w

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        q = self.rotation()
        y, log_det = self.transform.forward_and_log_det(_product(x, q.T), context)
        return _product(y, q), log_det

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        q = self.rotation()
        x, log_det = self.transform.inverse_and_log_det(_product(y, q.T), context)
        return _product(x, q), log_det

    def forward_and_score(self, x: Array, score: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        q = self.rotation()
        fixed = jax.lax.stop_gradient(q)
        turned = _product(x, q.T), _product(score, fixed.T)
        y, log_det, score = self.transform.forward_and_score(*turned, context)
        return _product(y, q), log_det, _product(score, fixed)


@full_precision
def _product(x: Array, matrix: Array) -> Array:
    return x @ matrix
