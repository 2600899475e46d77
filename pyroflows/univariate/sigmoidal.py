"""Sigmoidal networks that are monotone (Huang et al. 2018, Neural autoregressive flows)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.numerical import is_eager
from pyroflows.univariate.base import Univariate, check_positive, log_sum_and_mean, numerical_inverse, soft_clip

SPREAD = 1.0  # of the units' shifts at the start: far enough apart for each to learn a part of its own
_AT_ONCE = 2**16  # units of vectors that a pass takes on a CPU: what fits its cache
CONTRAST = 2.0  # of the mixing weights of hidden layers at the start, for the same reason


@dataclass(frozen=True)
class DeepDenseSigmoidal(Univariate):
    """``num_layers`` layers ``h -> logit(W sigmoid(a * (U h) + b))``; rows of ``W`` and ``U`` sum to one, ``a > 0``.

    Huang et al. 2018, eqs. 14 and 15 (DDSF). Two things differ from the paper, so that the map is a bijection of the
    whole line to |x| = 100 and beyond, in float32 too. The logit is taken as a difference of two log-sums, which
    neither overflows nor saturates; its tails are linear, with the slopes of the flattest units. And with ``T`` the
    network and ``T_0`` the network at params of zero, whose slope is at most one, the map is::

        y = x + (1 - min_slope) (T(x) - T_0(x)),

    which has slope ``min_slope`` at least (the paper's goes to zero between two units far apart), and is the identity
    at the start though the units are not alike there (equal ones would have equal gradients, and stay equal).

    Forward costs two passes through the network, of ``num_units^2`` sums a layer; the inverse is numerical.
    Params, a layer: mixing logits, log-slopes, shifts, weight logits, all raw.

    :param num_units: width of every layer.
    :param num_layers: number of layers, at least 1.
    :param max_log_slope: limit of the units' log-slopes.
    :param min_slope: least slope of the map, less than 1.
    """

    num_units: int = 6
    num_layers: int = 2
    max_log_slope: float = 2.0
    min_slope: float = 0.02

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, **vars(self))

    def _sizes(self) -> list[list[int]]:
        """Parameters of each layer: mixing (outputs, inputs), log-slopes, shifts, weights (outputs, units)."""
        k, last = self.num_units, self.num_layers - 1
        return [[k * k if n else 0, k, k, k if n == last else k * k] for n in range(self.num_layers)]

    @property
    def num_params(self) -> int:
        return sum(map(sum, self._sizes()))

    def _network(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope; the hidden values ``h`` and their slopes are ``(..., units, n)``."""
        k, h = self.num_units, x.unsqueeze(-2)
        slope: Any = None  # that of x, 1
        place = torch.linspace(-1, 1, k, dtype=x.dtype, device=x.device)
        near = (-CONTRAST * (place[:, None] - place).square()).unsqueeze(-1)  # (k, k, 1)
        parts = iter(params.split([size for layer in self._sizes() for size in layer], -2))
        for mixing, raw_slopes, raw_shifts, weights in zip(parts, parts, parts, parts, strict=True):
            if mixing.shape[-2]:
                u = (mixing.unflatten(-2, (k, k)) + near).softmax(-2)
                h, slope = ((u * part.unsqueeze(-3)).sum(-2) for part in (h, slope))
            a = soft_clip(raw_slopes, self.max_log_slope).exp()
            rate = a if slope is None else a * slope
            z = torch.addcmul(raw_shifts + SPREAD * place.unsqueeze(-1), a, h)
            log_on = F.logsigmoid(z)
            log_off = log_on - z
            weights = weights.unflatten(-2, (-1, k))
            weights = weights + near if weights.shape[-3] == k > 1 else weights
            sides = [(weights + log.unsqueeze(-3)) for log in (log_on, log_off)]
            # of p = sum_k w_k s_k: dp / (p (1 - p)) = dp / p + dp / (1 - p), two means of slopes
            slopes = [(log.exp() * rate).unsqueeze(-3) for log in (log_off, log_on)]
            (upper, d_upper), (lower, d_lower) = map(log_sum_and_mean, sides, slopes)
            h, slope = upper - lower, d_upper + d_lower
        return h.squeeze(-2), slope.squeeze(-2)

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at params of zero."""
        return self._network(x, x.new_zeros(self.num_params, 1))

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._plain(x, params)

    def _plain(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self._network(x, params)
        value_0, slope_0 = self._start(x)
        y = x + (1 - self.min_slope) * (value - value_0)
        return y, torch.log1p((1 - self.min_slope) * (slope - slope_0))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return numerical_inverse(
            lambda x: self.forward_and_log_det(x, params), y, self.min_slope, owner=type(self).__name__
        )


@dataclass(frozen=True)
class DeepSigmoidal(DeepDenseSigmoidal):
    """``logit(sum_k w_k sigmoid(a_k x + b_k))`` (Huang et al. 2018, eq. 8, DSF), relative to its start.

    The one-layer case of :class:`DeepDenseSigmoidal`; what is said there of the slopes, the tails and the start holds.
    Params: log-slopes, shifts, weight logits, each ``num_units``, raw.
    """

    num_units: int = 16
    num_layers: int = 1

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its units lie symmetrically and are alike: with ``t = exp(-|x|)`` they need no logarithms each."""
        if self.num_units == 1:
            return super()._start(x)
        value, slope, *_ = _alike(x, self.num_units)
        return torch.where(x < 0, -value, value), slope

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_units == 1 or not is_eager():
            return self._plain(x, params)
        batch = torch.broadcast_shapes(x.shape, params.shape[:-2] + params.shape[-1:])
        x, params = x.expand(batch), params.expand(*batch[:-1], self.num_params, batch[-1])
        rows = len(x) if x.dim() < 2 or not x.numel() else max(1, _AT_ONCE // (self.num_units * x[0].numel()))
        if rows >= len(x) or x.device.type != "cpu":
            return self._closed(x, params)
        parts = [self._closed(*part) for part in zip(x.split(rows), params.split(rows), strict=True)]
        y, log_det = (torch.cat(column) for column in zip(*parts, strict=True))
        return y, log_det

    def _closed(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return _Sigmoids.apply(x, params, self)  # type: ignore[no-any-return]
        y, log_det, *_ = _Sigmoids.terms(x, params, self)
        return y, log_det


class _Sigmoids(torch.autograd.Function):
    """The map of :class:`DeepSigmoidal` with its gradient in closed form, a third of the operations of autograd's.

    With ``s_k = sigmoid(z_k)``, ``z_k = a_k x + b_k``, and the units' shares ``P_k`` of ``sum_k w_k s_k`` and ``Q_k``
    of ``sum_k w_k (1 - s_k)``, the network has ``dT/dz_k = g_k = P_k (1 - s_k) + Q_k s_k``,
    ``dT/dlog w_k = P_k - Q_k`` and the slope ``U + L``, ``U = sum_k P_k (1 - s_k) a_k`` and ``L = sum_k Q_k s_k a_k``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, network: DeepSigmoidal) -> tuple[Tensor, Tensor]:
        y, log_det, *terms = _Sigmoids.terms(x, params, network)
        ctx.save_for_backward(x, params, *terms)
        ctx.network = network
        return y, log_det

    @staticmethod
    def terms(x: Tensor, params: Tensor, network: DeepSigmoidal) -> tuple[Tensor, ...]:
        """The value, the logarithm of the slope, and what the gradient is made of."""
        k, c = network.num_units, 1 - network.min_slope
        weights = params[..., -k:, :]
        _, a, z = _Sigmoids.units(x, params, network)
        on = z.sigmoid()
        off = 1 - on
        largest, size = z.clamp_max(0), torch.maximum(on, off)  # sigmoid(z) is exp(min(z, 0)) max(on, off)
        upper = largest.add_(weights)
        lower = upper - z
        sums = []
        for part in (upper, lower):
            top = part.amax(-2, keepdim=True)
            part.sub_(top).exp_().mul_(size)
            total = part.sum(-2, keepdim=True)
            part.div_(total)
            sums.append(total.log_().add_(top).squeeze(-2))
        u = off.mul_(upper).mul_(a).sum(-2)
        rest = torch.mul(lower, on, out=size).mul_(a).sum(-2)
        value_0, slope_0, *alike = _alike(x, k)
        difference = sums[0] - sums[1] - torch.where(x < 0, -value_0, value_0)
        slope = 1 + c * (u + rest - slope_0)
        y = torch.add(x, difference, alpha=c)
        return y, slope.log(), upper, lower, u, rest, slope, slope_0, *alike

    @staticmethod
    def units(x: Tensor, params: Tensor, network: DeepSigmoidal) -> tuple[Tensor, Tensor, Tensor]:
        """Log-slopes, slopes and ``z``: cheap, and computed again for the gradient rather than kept."""
        k = network.num_units
        place = torch.linspace(-SPREAD, SPREAD, k, dtype=x.dtype, device=x.device).unsqueeze(-1)
        log_a = soft_clip(params[..., :k, :], network.max_log_slope)
        a = log_a.exp()
        return log_a, a, (params[..., k : 2 * k, :] + place).addcmul_(a, x.unsqueeze(-2))

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlog: Tensor) -> tuple[Tensor | None, ...]:
        x, params, upper, lower, u, rest, slope, slope_0, *alike = ctx.saved_tensors
        network: DeepSigmoidal = ctx.network
        if torch.is_grad_enabled():  # to be differentiated once more
            inputs = [x.view_as(x), params.view_as(params)]  # one may be a function of the other: that is not ours
            outputs = network._plain(*inputs)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, (dy, dlog), create_graph=True))
            return *(next(found) if t.requires_grad else None for t in inputs), None
        k, c = network.num_units, 1 - network.min_slope
        by_value, by_slope = c * dy, c * dlog / slope  # of T - T_0
        by_upper, by_lower = (by_value - by_slope * u).unsqueeze(-2), (by_value + by_slope * rest).unsqueeze(-2)
        by, both = by_slope.unsqueeze(-2), (by_slope * (u + rest)).unsqueeze(-2)
        gradient = torch.empty_like(params)
        of_raw, of_shifts, of_weights = gradient.split(k, -2)
        log_a, a, z = _Sigmoids.units(x, params, network)
        on = z.sigmoid_()
        off = 1 - on
        on_share = lower * on
        g = torch.addcmul(on_share, upper, off)
        ga = g * a
        torch.mul(upper, by_upper, out=of_weights).addcmul_(lower, by_lower, value=-1).addcmul_(ga, by)
        # d(U + L)/dz = g a (1 - 2 s) - U P (1 - s) + L Q s, where P (1 - s) = g - Q s
        bent = ga.mul_(off.sub_(on))
        torch.mul(g, by_upper, out=of_shifts).addcmul_(on_share, both).addcmul_(bent, by)
        slope_of_a = log_a.mul_(1 / network.max_log_slope).square_().neg_().add_(1).mul_(a)
        torch.mul(of_shifts, x.unsqueeze(-2), out=of_raw).addcmul_(g, by).mul_(slope_of_a)
        dx = dy - by_value * slope_0 - by_slope * _bend_alike(x, k, *alike)
        return dx + torch.mul(of_shifts, a, out=bent).sum(-2), gradient, None


def _alike(x: Tensor, k: int) -> tuple[Tensor, ...]:
    """The network at params of zero: its value at ``|x|``, its slope, and what that's derivative is made of."""
    weights = torch.linspace(-SPREAD, SPREAD, k, dtype=x.dtype, device=x.device).exp()
    size = torch.where(x < 0, -x, x)
    t = (-size).exp()
    off = _off_alike(t, weights)
    upper, lower = (off @ torch.stack([torch.ones_like(weights), weights], -1)).unbind(-1)
    of_upper, of_lower = (off.square() @ torch.stack([weights, weights.square()], -1)).unbind(-1)
    value = size + upper.log() - lower.log()
    a, b = of_upper / upper, of_lower / lower
    return value, 1 + t * (a - b), t, upper, lower, a, b


def _off_alike(t: Tensor, weights: Tensor) -> Tensor:
    return torch.addcmul(torch.ones_like(weights), t.unsqueeze(-1), weights).reciprocal()


def _bend_alike(x: Tensor, k: int, t: Tensor, upper: Tensor, lower: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The derivative of that slope."""
    weights = torch.linspace(-SPREAD, SPREAD, k, dtype=x.dtype, device=x.device).exp()
    off = _off_alike(t, weights)
    cube = off.square() * off @ torch.stack([weights.square(), weights**3], -1)
    bend = t * (t * (2 * cube[..., 0] / upper - a * a - 2 * cube[..., 1] / lower + b * b) - (a - b))
    return torch.where(x < 0, -bend, bend)
