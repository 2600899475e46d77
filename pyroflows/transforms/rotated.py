"""A map in rotated coordinates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.transform_module import TransformModule
from pyroflows.transforms.orthogonal import reflections


class Rotated(TransformModule):
    """``y = Q^T f(Q x)``: ``f`` in the coordinates of a trained rotation ``Q``, a product of ``dim`` reflections.

    Layers of it rotate between their elementwise maps (Meng et al. 2020, Gaussianization flows, section 3.2), and are
    the identity where ``f`` is, whatever ``Q``. The log-determinant is that of ``f``. Costs ``O(dim^2)`` an element of
    the batch more than ``f``, both ways, and ``O(dim^3)`` a call. ``Q`` starts at random.

    :param transform: ``f``.
    :param dim: size of ``x``.
    """

    def __init__(self, transform: TransformModule, dim: int):
        super().__init__()
        self.transform, self.dim = transform, dim
        self.vectors = nn.Parameter(torch.randn(dim, dim))

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def rotation(self) -> Tensor:
        """``Q = H_1 .. H_dim``."""
        u, w = reflections(self.vectors)
        return torch.eye(u.shape[-1], dtype=u.dtype, device=u.device) - u.mT @ w

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = self.rotation()
        y, log_det = self.transform.forward_and_log_det(F.linear(x, q), context)
        return F.linear(y, q.mT), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = self.rotation()
        x, log_det = self.transform.inverse_and_log_det(F.linear(y, q), context)
        return F.linear(x, q.mT), log_det

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self.rotation()
        fixed = q.detach()
        y, log_det, score = self.transform.forward_and_score(F.linear(x, q), F.linear(score, fixed), context)
        return F.linear(y, q.mT), log_det, F.linear(score, fixed.mT)
