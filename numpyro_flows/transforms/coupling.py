"""Coupling (Dinh et al. 2015, 2017): one block stays and parametrises a univariate map of the other."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_flows.conditioners import MLP
from numpyro_flows.transform_module import TransformModule, with_axes_of
from numpyro_flows.univariate import Univariate
from numpyro_flows.univariate.base import pushed_score


class Coupling(TransformModule):
    """``x = (x1, x2) -> (x1, g(x2; theta(x1, context)))``.

    Both directions take one network pass. The Jacobian is triangular, the log-determinant the sum over ``g``'s.

    :param dim: size of ``x``. With ``dim=1`` the map is elementwise (nothing is left to condition on).
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the conditioner.
    :param context_dim: size of the context, 0 for none.
    :param split: size of ``x1``; ``dim // 2`` unless given.
    :param swap: returns the blocks exchanged, so that equal layers alternate which block they transform. True unless
        a mask is given: there every element keeps its place.
    :param mask: ``dim`` booleans, true for the elements of ``x1``, in place of ``split``: checkerboards and the like.
    :param activation: the conditioner's activation.
    """

    conditioner: MLP
    univariate: Univariate
    dim: int = eqx.field(static=True)
    split: int = eqx.field(static=True)
    swap: bool = eqx.field(static=True)
    order: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        split: int | None = None,
        swap: bool | None = None,
        mask: Sequence[bool] | None = None,
        activation: str = "silu",
        key: Array,
    ):
        self.order = None if mask is None else tuple(split_by_mask(dim, mask, split, swap))
        split = split if mask is None else sum(map(bool, mask))
        self.split = dim // 2 if split is None else split
        if not 0 <= self.split < dim:
            raise ValueError(f"Coupling: split must lie in [0, dim) = [0, {dim}), but got {split}.")
        self.dim, self.univariate, self.swap = dim, univariate, mask is None if swap is None else swap
        out_dim = univariate.num_params * (dim - self.split)
        self.conditioner = MLP(
            univariate.num_features * self.split, hidden_dims, out_dim, context_dim, activation, key=key
        )

    def _params(self, x1: Array, context: Array | None) -> Array:
        theta = self.conditioner(self.univariate.features(x1), context)
        return theta.reshape(*theta.shape[:-1], self.univariate.num_params, self.dim - self.split)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        x = x if self.order is None else x[..., np.array(self.order)]
        x1, x2 = x[..., : self.split], x[..., self.split :]
        y2, log_det = self.univariate.forward_and_log_det(x2, self._params(x1, context))
        x1 = jnp.broadcast_to(x1, y2.shape[:-1] + x1.shape[-1:])
        y = jnp.concatenate([y2, x1] if self.swap else [x1, y2], -1)
        return y if self.order is None else y[..., np.argsort(self.order)], log_det.sum(-1)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        y = y if self.order is None else y[..., np.array(self.order)]
        cut = self.dim - self.split if self.swap else self.split
        y1, y2 = (y[..., cut:], y[..., :cut]) if self.swap else (y[..., :cut], y[..., cut:])
        x2, log_det = self.univariate.inverse_and_log_det(y2, self._params(y1, context))
        y1 = jnp.broadcast_to(y1, x2.shape[:-1] + y1.shape[-1:])
        x = jnp.concatenate([y1, x2], -1)
        return x if self.order is None else x[..., np.argsort(self.order)], log_det.sum(-1)

    def forward_and_score(self, x: Array, score: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        """By one gradient through the conditioner, as the Jacobian is triangular in blocks."""
        x, score = with_axes_of(context, x, score)
        y, log_det = self.forward_and_log_det(x, context)
        if self.order is not None:
            x, score = (a[..., np.array(self.order)] for a in (x, score))
        # the same pass once more, parameters held fixed: what both have in common is compiled to one
        fixed, x, context = lax.stop_gradient((self, x, context))
        x1, x2 = x[..., : self.split], x[..., self.split :]
        score1, score2 = score[..., : self.split], score[..., self.split :]
        theta, pull_theta = jax.vjp(lambda x1: fixed._params(x1, context), x1)
        (y2, log_slope), pull = jax.vjp(lambda theta: fixed.univariate.forward_and_log_det(x2, theta), theta)
        score2 = pushed_score(fixed.univariate, x2, theta, score2)
        score1 = score1 - pull_theta(pull((score2, jnp.ones_like(log_slope)))[0])[0]
        score = jnp.concatenate([score2, score1] if self.swap else [score1, score2], -1)
        return y, log_det, score if self.order is None else score[..., np.argsort(self.order)]


def split_by_mask(dim: int, mask: Sequence[bool], split: int | None, swap: bool | None) -> list[int]:
    """The elements that ``mask`` keeps, then the others; a ``ValueError`` where the arguments do not go together."""
    kept = np.asarray(mask, bool)
    if kept.shape != (dim,) or kept.all():
        raise ValueError(
            f"Coupling: mask must hold dim = {dim} booleans, at least one of them false (an element to transform), "
            f"but got {list(mask)}."
        )
    if split is not None or swap:
        raise ValueError(f"Coupling: a mask takes the place of split and swap, but got {split=}, {swap=}.")
    return [*np.flatnonzero(kept).tolist(), *np.flatnonzero(~kept).tolist()]
