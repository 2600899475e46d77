"""What the monotone splines share: knots in a box, the choice of a piece, and linear tails."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.base import Univariate, soft_clip

TAILS = ("linear", "learnable", "equal")


@dataclass(frozen=True)
class Spline(Univariate):
    """Maps ``[-bound, bound]`` onto itself by ``num_bins`` pieces, and goes on linearly outside.

    Params, all raw: ``num_bins`` bin widths, ``num_bins`` heights, the slopes at the knots (see ``tails``), and what
    the pieces of a subclass take besides. Bins have sizes in proportion to ``sigmoid(raw)`` plus a constant that gives
    them their least size; log-slopes are softly limited to ``+-max_log_slope``. So the inverse stays accurate in
    float32 whatever the parameters.

    :param num_bins: number of pieces, at least 2.
    :param bound: half the width of the spline's box.
    :param min_size: least width and height of a bin, as a share of the box; less than ``1 / num_bins``.
    :param max_log_slope: limit of the log-slopes at the knots.
    :param tails: ``"linear"``: the identity outside the box (``num_bins - 1`` slopes); ``"learnable"``: the two outer
        slopes are parameters as well, and the map goes on with them (``num_bins + 1``); ``"equal"``: they are one
        parameter (``num_bins``).
    """

    num_bins: int = 8
    bound: float = 5.0
    min_size: float = 1e-2
    max_log_slope: float = 2.0
    tails: str = "linear"

    extras = 0  # further raw parameters of a piece

    def __post_init__(self) -> None:
        check_spline(type(self).__name__, self.num_bins, self.bound, self.min_size, self.tails)

    @property
    def num_params(self) -> int:
        return (3 + self.extras) * self.num_bins + num_outer(self.tails)

    def _piece(self, u: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """The piece that holds ``u``: left knot (x0, y0), width, height, the slopes at both ends, the extras."""
        k, batch, n = self.num_bins, u.shape[:-1], u.shape[-1]
        slopes = k + num_outer(self.tails)
        raw_sizes, raw_slopes, *extras = params.split([2 * k, slopes] + [k] * self.extras, -2)
        # widths and heights in one go; of the running sums of their weights only what the piece needs is normalised
        weights = (raw_sizes.sigmoid() + least_weight(k, self.min_size)).unflatten(-2, (2, k))
        sums = weights.cumsum(-2)
        share = 2 * self.bound / sums[..., -1, :]  # (..., 2, n)
        with torch.no_grad():  # which piece it is does not vary with the parameters
            side = sums[..., int(inverse), :, :]
            reached = (u + self.bound) / share[..., int(inverse), :]
            index = (reached.unsqueeze(-2) >= side[..., :-1, :]).sum(-2, keepdim=True)
            both = index.unsqueeze(-3).expand(*batch, 2, 1, n)
        weight, upto = (table.expand(*batch, 2, k, n).gather(-2, both).squeeze(-2) for table in (weights, sums))
        size, start = weight * share, (upto - weight) * share - self.bound
        ends = torch.cat([index - 1, index], -2)  # the knots at both ends: 0 .. k - 2 are the interior ones
        held = ends.clamp(0, k - 2) if self.tails == "linear" else (ends + 1) % slopes
        log_slopes = soft_clip(raw_slopes.expand(*batch, slopes, n).gather(-2, held), self.max_log_slope)
        if self.tails == "linear":  # the outer knots have slope one
            log_slopes = torch.where(ends == held, log_slopes, 0.0)
        more = [raw.expand(*batch, k, n).gather(-2, index).squeeze(-2) for raw in extras]
        return *start.unbind(-2), *size.unbind(-2), *log_slopes.exp().unbind(-2), *more

    def _forward(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Value and log-slope within the piece."""
        raise NotImplementedError

    def _inverse(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Value and log-slope of the inverse within the piece."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = _expand(x, params)
        u = x.clamp(-self.bound, self.bound)  # the slope beyond the edge is that on the edge
        piece = self._piece(u, params, inverse=False)
        y, log_det = self._forward(u, piece)
        # beyond the edge as it is by definition: a small piece's rounding would be felt there
        if self.tails == "linear":
            return y + (x - u), torch.where(x == u, log_det, 0.0)
        edge = torch.where(u > 0, piece[5], piece[4])
        return torch.addcmul(y, x - u, edge), torch.where(x == u, log_det, edge.log())

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = _expand(y, params)
        u = y.clamp(-self.bound, self.bound)
        piece = self._piece(u, params, inverse=True)
        x, log_det = self._inverse(u, piece)
        if self.tails == "linear":
            return x + (y - u), torch.where(y == u, log_det, 0.0)
        edge = torch.where(u > 0, piece[5], piece[4])
        return torch.addcdiv(x, y - u, edge), torch.where(y == u, log_det, -edge.log())


def _expand(x: Tensor, params: Tensor) -> Tensor:
    """``x`` with the batch axes of both."""
    shape = params.shape[:-2] + params.shape[-1:]
    return x if x.shape == shape else x.expand(torch.broadcast_shapes(x.shape, shape))


def num_outer(tails: str) -> int:
    """Slopes that are parameters, less the number of bins."""
    return {"linear": -1, "learnable": 1, "equal": 0}[tails]


def check_spline(owner: str, num_bins: int, bound: float, min_size: float, tails: str) -> None:
    """Raises a ``ValueError`` that names the argument which no spline can have."""
    if num_bins < 2:
        raise ValueError(f"{owner}: num_bins must be at least 2, but got {num_bins}.")
    if not bound > 0:
        raise ValueError(f"{owner}: bound must be positive, but got {bound}.")
    if not 0 < min_size * num_bins < 1:
        raise ValueError(
            f"{owner}: min_size must lie between 0 and 1 / num_bins = {1 / num_bins:.3g}, but got {min_size}."
        )
    if tails not in TAILS:
        raise ValueError(f"{owner}: tails must be one of {list(TAILS)}, but got {tails!r}.")


def least_weight(num_bins: int, min_size: float) -> float:
    """What to add to weights in ``(0, 1)`` so that none is less than ``min_size`` of their sum."""
    return min_size * (num_bins - 1) / (1 - num_bins * min_size)
