"""Planar and radial flows (Rezende & Mohamed 2015, Variational Inference with Normalizing Flows)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.conditioners import MLP
from pyroflows.numerical import monotone_root
from pyroflows.transform_module import TransformModule


class Planar(TransformModule):
    """``y = x + u tanh(w x + b)``: moves everything along one direction (eq. 10).

    Forward costs ``O(dim)``. The inverse is one scalar root in ``w x``, some ten evaluations of ``tanh``. It is a
    bijection because ``u`` is moved along ``w`` until ``w u > -1`` (appendix A.1, with a bound that is reached slower
    than exponentially and leaves small ``u`` as they are). Starts at the identity.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
    ):
        super().__init__()
        self.dim = dim
        limit = dim**-0.5
        self.params = nn.Parameter(torch.cat([torch.zeros(dim), torch.empty(dim + 1).uniform_(-limit, limit)]))
        self.conditioner = MLP(0, hidden_dims, 2 * dim + 1, context_dim, activation) if context_dim else None

    def _params(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``u``, ``w``, ``b`` and the product ``w u`` before its bound."""
        theta = self.params if self.conditioner is None else self.params + self.conditioner(x[..., :0], context)
        u, w, b = theta.split([self.dim, self.dim, 1], -1)
        product, square = (w * u).sum(-1, keepdim=True), (w * w).sum(-1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny
        u = u + w * (product.square() / ((square + tiny) * (1 + (1 + product.square()).sqrt())))
        return u, w, b.squeeze(-1), product.squeeze(-1)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, product = self._params(x, context)
        a = (w * x).sum(-1) + b
        return x + u * torch.tanh(a).unsqueeze(-1), log_slope(a, product)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, product = self._params(y, context)
        s = (w * y).sum(-1) + b
        size = expm1_asinh(product)  # w u: s = a + w u tanh(a)
        a = monotone_root(
            lambda a: (a + size * torch.tanh(a), log_slope(a, product)),
            s,
            s - size.abs(),
            s + size.abs(),
            owner="Planar",
        )
        return y - u * torch.tanh(a).unsqueeze(-1), -log_slope(a, product)


class Radial(TransformModule):
    """``y = x + beta (x - x0) / (alpha + |x - x0|)``: expands or contracts around a point (eq. 14).

    Both directions cost ``O(dim)``; the inverse solves a quadratic for the radius. It is a bijection because
    ``beta > -alpha`` (appendix A.2). Starts at the identity.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param activation: the conditioner's activation.
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
    ):
        super().__init__()
        self.dim = dim
        self.params = nn.Parameter(torch.cat([torch.empty(dim).uniform_(-1, 1), torch.zeros(2)]))
        self.conditioner = MLP(0, hidden_dims, dim + 2, context_dim, activation) if context_dim else None

    def _polar(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The centre, what lies beyond it, the radius in units of ``alpha``, and ``raw``: ``beta = alpha m(raw)``."""
        theta = self.params if self.conditioner is None else self.params + self.conditioner(x[..., :0], context)
        centre, width, raw = theta.split([self.dim, 1, 1], -1)
        beyond = x - centre
        radius = (beyond.square().sum(-1) + torch.finfo(x.dtype).eps ** 2).sqrt()  # differentiable at the centre
        return centre, beyond, radius * torch.exp(-torch.asinh(width.squeeze(-1))), raw.squeeze(-1)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, beyond, r, raw = self._polar(x, context)
        return x + beyond * (expm1_asinh(raw) / (1 + r)).unsqueeze(-1), self._log_det(r, raw)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, beyond, s, raw = self._polar(y, context)
        inner = torch.exp(torch.asinh(raw))  # 1 + beta / alpha: s = r (r + inner) / (1 + r)
        half = 0.5 * (s - inner)
        root = (half.square() + s).sqrt()
        positive = half > 0  # of the two forms of the root, the one without cancellation
        r = torch.where(positive, half + root, s / (root - torch.where(positive, -half, half)))
        return centre + beyond * ((1 + r) / (r + inner)).unsqueeze(-1), -self._log_det(r, raw)

    def _log_det(self, r: Tensor, raw: Tensor) -> Tensor:
        inner = torch.exp(torch.asinh(raw))
        across = torch.log((r + inner) / (1 + r))  # the slope of the dim - 1 directions around the centre
        along = torch.log((r * (2 + r) + inner) / (1 + r).square())
        return (self.dim - 1) * across + along


def expm1_asinh(x: Tensor) -> Tensor:
    """``x + sqrt(1 + x^2) - 1``: increasing, above -1, zero with slope one at zero."""
    return torch.expm1(torch.asinh(x))


def slope(t: Tensor, raw: Tensor) -> Tensor:
    """``1 + m (1 - t^2)`` with ``m = expm1_asinh(raw) > -1``, the slope of ``a + m tanh(a)`` by its ``t = tanh(a)``.

    A sum of positive terms.
    """
    square = t.square()
    return torch.addcmul(square, 1 - square, torch.exp(torch.asinh(raw)))


def log_slope(a: Tensor, raw: Tensor) -> Tensor:
    """The logarithm of :func:`slope`, by ``a``."""
    return torch.log(slope(torch.tanh(a), raw))
