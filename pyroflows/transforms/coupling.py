"""Coupling (Dinh et al. 2015, 2017): one block stays and parametrises a univariate map of the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyroflows.conditioners import MLP
from pyroflows.transform_module import TransformModule, differentiable, with_axes_of
from pyroflows.univariate import Univariate
from pyroflows.univariate.base import pushed_score


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

    order: Tensor | None
    place: Tensor | None

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
    ):
        super().__init__()
        order = None if mask is None else torch.tensor(split_by_mask(dim, mask, split, swap))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", None if order is None else order.argsort(), persistent=False)
        split = split if mask is None else sum(map(bool, mask))
        self.split = dim // 2 if split is None else split
        if not 0 <= self.split < dim:
            raise ValueError(f"Coupling: split must lie in [0, dim) = [0, {dim}), but got {split}.")
        self.dim, self.univariate, self.swap = dim, univariate, mask is None if swap is None else swap
        out_dim = univariate.num_params * (dim - self.split)
        self.conditioner = MLP(univariate.num_features * self.split, hidden_dims, out_dim, context_dim, activation)

    def _params(self, x1: Tensor, context: Tensor | None) -> Tensor:
        theta = self.conditioner(self.univariate.features(x1), context)
        return theta.view(*theta.shape[:-1], self.univariate.num_params, self.dim - self.split)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        x1, x2 = x.split([self.split, self.dim - self.split], -1)
        y2, log_det = self.univariate.forward_and_log_det(x2, self._params(x1, context))
        if y2.shape[:-1] != x1.shape[:-1]:  # the context has more batch axes
            x1 = x1.expand(y2.shape[:-1] + x1.shape[-1:])
        y = torch.cat([y2, x1] if self.swap else [x1, y2], -1)
        return y if self.place is None else y.index_select(-1, self.place), log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.order is not None:
            y = y.index_select(-1, self.order)
        kept, moved = self.split, self.dim - self.split
        parts = y.split([moved, kept] if self.swap else [kept, moved], -1)
        y1, y2 = parts[::-1] if self.swap else parts
        x2, log_det = self.univariate.inverse_and_log_det(y2, self._params(y1, context))
        if x2.shape[:-1] != y1.shape[:-1]:
            y1 = y1.expand(x2.shape[:-1] + y1.shape[-1:])
        x = torch.cat([y1, x2], -1)
        return x if self.place is None else x.index_select(-1, self.place), log_det.sum(-1)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By one gradient through the conditioner, as the Jacobian is triangular in blocks."""
        x, score = with_axes_of(context, x, score)
        if self.order is not None:
            x, score = x.index_select(-1, self.order), score.index_select(-1, self.order)
        sizes = [self.split, self.dim - self.split]
        with torch.enable_grad():
            # views of their own, at which gradients end
            x1, x2 = (part.view_as(part) for part in differentiable(x).split(sizes, -1))
            y2, log_slope = self.univariate.forward_and_log_det(x2, self._params(x1, context))
            score1, score2 = score.split(sizes, -1)
            score2 = pushed_score(self.univariate, x2, log_slope, score2)
            if self.split:
                score1 = score1 - _pulled(x1, y2, log_slope, score2)
            y = torch.cat([y2, x1] if self.swap else [x1, y2], -1)
        score = torch.cat([score2, score1] if self.swap else [score1, score2], -1)
        if self.place is not None:
            y, score = y.index_select(-1, self.place), score.index_select(-1, self.place)
        return y, log_slope.sum(-1), score


def _pulled(x: Tensor, y: Tensor, log_slope: Tensor, score: Tensor) -> Tensor:
    """The gradient of ``score * y + log_slope`` by ``x``, on which the map's parameters depend."""
    outputs, weights = [y], [score]
    if log_slope.requires_grad:
        outputs, weights = [y, log_slope], [score, torch.ones_like(log_slope)]
    return torch.autograd.grad(outputs, x, weights, retain_graph=True)[0]


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
