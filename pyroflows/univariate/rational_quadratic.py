"""Monotone rational-quadratic spline (Durkan et al. 2019, Neural spline flows; Gregory & Delbourgo 1982)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate


def soft_clip(x: Tensor, limit: float) -> Tensor:
    """``x`` smoothly limited to ``(-limit, limit)``, with slope one at zero."""
    return x * torch.rsqrt(1 + (x / limit).square())


@dataclass(frozen=True)
class RationalQuadraticSpline(Univariate):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` rational-quadratic pieces, the identity outside.

    Params: ``num_bins`` bin widths, ``num_bins`` heights and ``num_bins - 1`` interior slopes, all raw. The raw values
    are softly limited (sizes to a ratio of ``exp(2 * max_log_size)``, slopes to ``exp(+-max_log_slope)``) and bins have
    a least size, so that the inverse stays accurate in float32 whatever the parameters.

    :param num_bins: number of pieces, at least 2.
    :param bound: half the width of the spline's box.
    :param min_size: least width and height of a bin, as a share of the box; less than ``1 / num_bins``.
    :param max_log_size: limit of the logits of the bin sizes.
    :param max_log_slope: limit of the log-slopes at the interior knots.
    """

    num_bins: int = 8
    bound: float = 5.0
    min_size: float = 1e-2
    max_log_size: float = 2.0
    max_log_slope: float = 2.0

    def __post_init__(self) -> None:
        check_spline(self.num_bins, self.bound, self.min_size)

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def _pieces(self, u: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """The piece that holds ``u``: left knot (x0, y0), width, height and the slopes at both ends."""
        k = self.num_bins
        # bounded logits need no shift by their maximum; widths and heights in one go
        sizes = soft_clip(params[..., : 2 * k, :], self.max_log_size).exp().unflatten(-2, (2, k))
        share = (1 - k * self.min_size) / sizes.sum(-2, keepdim=True)
        widths, heights = ((sizes * share + self.min_size) * (2 * self.bound)).unbind(-3)
        with torch.no_grad():  # which piece it is does not vary with the parameters
            edges = (heights if inverse else widths)[..., :-1, :].cumsum(-2) - self.bound
            index = (u.unsqueeze(-2) >= edges).sum(-2, keepdim=True)
            left_of = (torch.arange(k, device=u.device).unsqueeze(-1) < index).to(u.dtype)

        def slope(i: Tensor) -> Tensor:  # of interior knot i; the two outer knots have slope one
            raw = params[..., 2 * k :, :].gather(-2, i.clamp(0, k - 2))
            log_slope = soft_clip(raw, self.max_log_slope)
            return torch.where((i < 0) | (i > k - 2), 0.0, log_slope).squeeze(-2).exp()

        x0, y0 = ((size * left_of).sum(-2) - self.bound for size in (widths, heights))
        width, height = (size.gather(-2, index).squeeze(-2) for size in (widths, heights))
        return x0, y0, width, height, slope(index - 1), slope(index)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, params = _broadcast(x, params)
        inside = x.abs() < self.bound
        u = torch.where(inside, x, 0.0)
        x0, y0, width, height, d0, d1 = self._pieces(u, params, inverse=False)
        y, log_det = _rational_quadratic((u - x0) / width, y0, width, height, d0, d1)
        return torch.where(inside, y, x), torch.where(inside, log_det, 0.0)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, params = _broadcast(y, params)
        inside = y.abs() < self.bound
        u = torch.where(inside, y, 0.0)
        x0, y0, width, height, d0, d1 = self._pieces(u, params, inverse=True)
        v, s = u - y0, height / width
        c = d0 + d1 - 2 * s
        a, b = height * (s - d0) + v * c, height * d0 - v * c
        # the root of a t^2 + b t = s v in [0, 1], in the form that does not cancel; the discriminant is positive up
        # to rounding
        t = 2 * s * v / (b + (b * b + 4 * a * s * v).clamp_min(1e-30).sqrt())
        log_det = _rational_quadratic(t, y0, width, height, d0, d1)[1]
        return torch.where(inside, x0 + t * width, y), torch.where(inside, -log_det, 0.0)


def _broadcast(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Gives both the same batch axes, as ``gather`` needs."""
    shape = torch.broadcast_shapes(x.shape, params.shape[:-2] + params.shape[-1:])
    return x.expand(shape), params.expand(shape[:-1] + params.shape[-2:])


def _rational_quadratic(
    t: Tensor, y0: Tensor, width: Tensor, height: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and log-derivative at the share ``t`` of a piece (Durkan et al. 2019, eqs. 4 and 5)."""
    s, tt = height / width, t * (1 - t)
    denominator = s + (d0 + d1 - 2 * s) * tt
    y = y0 + height * t * (s * t + d0 * (1 - t)) / denominator
    slope = s * s * (d1 * t * t + 2 * s * tt + d0 * (1 - t) ** 2)
    return y, slope.log() - 2 * denominator.log()


def check_spline(num_bins: int, bound: float, min_size: float) -> None:
    """Raises a ``ValueError`` that names the argument which no spline can have."""
    if num_bins < 2:
        raise ValueError(f"RationalQuadraticSpline: num_bins must be at least 2, but got {num_bins}.")
    if not bound > 0:
        raise ValueError(f"RationalQuadraticSpline: bound must be positive, but got {bound}.")
    if not 0 < min_size * num_bins < 1:
        raise ValueError(
            f"RationalQuadraticSpline: min_size must lie between 0 and 1 / num_bins = {1 / num_bins:.3g}, "
            f"but got {min_size}."
        )
