"""Residual flows (Behrmann et al. 2019, i-ResNet; Chen et al. 2019, Residual Flows)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.conditioners import MLP, Linear, check_network, linear
from pyroflows.numerical import fixed_point_root, takes_custom_gradients
from pyroflows.transform_module import TransformModule

LOG_DETS = ("exact", "unbiased")
_LIP_SWISH = 1.1  # above the largest slope of x sigmoid(beta x), 1.0998, for any beta
_LEAST_RATE = 1e-3  # at which a series goes on, lest an estimate divide by zero


class Residual(TransformModule):
    """``y = x + g(x)`` with a network ``g`` of Lipschitz constant at most ``lipschitz < 1``.

    Each weight is scaled down to its share of the constant by an upper bound of its 2-norm (by a power of its
    Gram matrix: the same in every pass, at most 0.5% above the norm up to width 100); the activation is LipSwish,
    ``h sigmoid(beta h) / 1.1``. Starts at the identity.

    Forward takes one pass of ``g``, the inverse as many as the fixed point ``x = y - g(x)`` needs, about ``36 /
    -log(Lip g)`` in float64. The log-determinant costs, beside that:

    - ``log_det="exact"``: the Jacobian (``dim`` products with the weights) and ``O(dim^3)``.
    - ``log_det="unbiased"``: ``exact_terms`` of the power series of ``log det(I + J)`` and a random number more, each
      kept with probability ``p``, the bound of Lip g which the weights have at present (Russian roulette, for which the
      variance is finite), with one random vector for the trace (Hutchinson): about ``exact_terms + p / (1 - p)``
      vector products with ``J``, and ``p <= lipschitz``. Its gradient is the unbiased Neumann series (Chen et al. 2019,
      eq. 8), whose memory does not grow with the number of terms; second derivatives of this estimate are not. Noise
      comes from torch's default generators, and the number of terms is read on the host.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of ``g``, and of the conditioner of its biases, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param lipschitz: bound of the Lipschitz constant of ``g``.
    :param log_det: ``"exact"`` or ``"unbiased"``; :meth:`log_det_estimate` gives the latter's standard error.
    :param exact_terms: terms of the series which are always summed.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    layers: nn.ModuleList

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        lipschitz: float = 0.9,
        log_det: str = "exact",
        exact_terms: int = 4,
        activation: str = "silu",
    ):
        super().__init__()
        check_network(hidden_dims, context_dim, activation)
        check_residual(hidden_dims, lipschitz, log_det)
        self.dim, self.lipschitz, self.log_det, self.exact_terms = dim, lipschitz, log_det, exact_terms
        dims = (dim, *hidden_dims, dim)
        last = len(dims) - 2
        self.layers = nn.ModuleList(
            Linear(i, o, zero=n == last) for n, (i, o) in enumerate(zip(dims, dims[1:], strict=False))
        )
        self.slopes = nn.ParameterList(torch.zeros(width) for width in hidden_dims)
        self.conditioner = MLP(0, hidden_dims, sum(dims[1:]), context_dim, activation) if context_dim else None

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.log_det == "exact"

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, biases, rate = self._layers(x, context)
        g, slopes = self._g(weights, biases, x)
        return x + g, self._log_det(weights, slopes, rate)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if context is not None:
            y = y.expand(torch.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])
        weights, biases, rate = self._layers(y, context)
        of_search = self._as_silu(weights, biases)
        x = fixed_point_root(
            lambda x: self._g(weights, biases, x)[0] if torch.is_grad_enabled() else _network(*of_search, x),
            y,
            jacobian=lambda x: _jacobian(weights, self._g(weights, biases, x)[1]),
            owner="Residual",
        )
        _, slopes = self._g(weights, biases, x)
        return x, -self._log_det(weights, slopes, rate)

    def log_det_estimate(
        self, x: Tensor, num_samples: int = 100, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``log |det dy/dx|`` at ``x`` as the mean of unbiased estimates, and its standard error, both ``(...)``."""
        weights, biases, rate = self._layers(x, context)
        _, slopes = self._g(weights, biases, x)
        estimates = torch.stack([self._unbiased(weights, slopes, rate) for _ in range(num_samples)])
        return estimates.mean(0), estimates.std(0) / num_samples**0.5

    def _layers(self, x: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The weights, scaled to the share of the Lipschitz constant that each may have, the biases, and the constant
        that these weights have."""
        share = self.lipschitz ** (1 / len(self.layers))
        bounds = [spectral_bound(layer.weight) for layer in self.layers]  # type: ignore[arg-type]
        weights = [layer.weight * (share / b.clamp_min(share)) for layer, b in zip(self.layers, bounds, strict=True)]
        rate = torch.stack(bounds).detach().clamp_max(share).prod()
        biases: list[Tensor] = [layer.bias for layer in self.layers]  # type: ignore[misc]
        if self.conditioner is not None:
            moved = self.conditioner(x[..., :0], context).split([len(b) for b in biases], -1)
            biases = [b + m for b, m in zip(biases, moved, strict=True)]
        return weights, biases, rate

    def _g(self, weights: list[Tensor], biases: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``g(x)`` and the slopes of the activations in each hidden layer."""
        h, slopes = linear(x, weights[0], biases[0]), []
        for raw, weight, bias in zip(self.slopes, weights[1:], biases[1:], strict=True):
            active, slope = (_LipSwish.apply if takes_custom_gradients() else _LipSwish.plain)(h, F.softplus(raw))
            slopes.append(slope)
            h = linear(active, weight, bias)
        return h, slopes

    @torch.no_grad()
    def _as_silu(self, weights: list[Tensor], biases: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of ``g`` with SiLU between them, of which LipSwish is ``silu(beta h) / (1.1 beta)``."""
        weights, biases = list(weights), list(biases)
        for n, raw in enumerate(self.slopes):
            beta = F.softplus(raw).clamp_min(torch.finfo(raw.dtype).tiny ** 0.5)
            weights[n], biases[n] = beta[:, None] * weights[n], beta * biases[n]
            weights[n + 1] = weights[n + 1] / (_LIP_SWISH * beta)
        return weights, biases

    def _log_det(self, weights: list[Tensor], slopes: list[Tensor], rate: Tensor) -> Tensor:
        return _exact(weights, slopes) if self.log_det_is_exact else self._unbiased(weights, slopes, rate)

    def _unbiased(self, weights: list[Tensor], slopes: list[Tensor], rate: Tensor) -> Tensor:
        """One unbiased estimate of ``log det(I + J)``, with an unbiased gradient."""
        noise = _signs((*slopes[0].shape[:-1], self.dim), slopes[0])
        keep = max(float(rate), _LEAST_RATE)
        more = int(math.log(1 - float(torch.rand((), device="cpu"))) / math.log(keep))  # P(more >= j) = keep^j
        with torch.no_grad():
            fixed, fixed_slopes = [w.detach() for w in weights], [s.detach() for s in slopes]
            power, neumann, series = noise, noise, torch.zeros_like(noise)
            for k in range(1, self.exact_terms + more + 1):
                power = _pull(fixed, fixed_slopes, power)
                weight = (-1) ** k * keep ** -max(k - self.exact_terms, 0)
                series = torch.add(series, power, alpha=-weight / k)
                neumann = torch.add(neumann, power, alpha=weight)
            value = (series * noise).sum(-1)
        surrogate = (neumann * _push(weights, slopes, noise)).sum(-1)  # only its gradient counts
        return value + surrogate - surrogate.detach()


class _LipSwish(torch.autograd.Function):
    """``h sigmoid(beta h) / 1.1`` and its slope; for the gradient, autograd would keep four times as many numbers."""

    @staticmethod
    def plain(h: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        scaled = beta * h
        gate = scaled.sigmoid()
        share = gate / _LIP_SWISH
        return h * share, torch.addcmul(share, share, scaled - scaled * gate)

    @staticmethod
    def forward(ctx: Any, h: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        active, slope = _LipSwish.plain(h, beta)
        ctx.save_for_backward(h, beta, slope)
        return active, slope

    @staticmethod
    def backward(ctx: Any, by_active: Tensor, by_slope: Tensor) -> tuple[Tensor, Tensor]:
        h, beta, slope = ctx.saved_tensors
        scaled = beta * h
        gate = scaled.sigmoid()
        bend = torch.addcmul(gate, gate, gate, value=-1)
        by = by_slope * bend * (2 + scaled * (1 - 2 * gate))
        by_beta = h * torch.addcmul(by, by_active * h, bend)
        by_h = torch.addcmul(by_active * slope, by, beta / _LIP_SWISH)
        return by_h, by_beta.sum_to_size(beta.shape) / _LIP_SWISH


def _signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random signs. Eight of them cost one random number: the lowest bits of its bytes."""
    size = math.prod(shape)
    bits = torch.empty(-(-size // 8), dtype=torch.int64, device=like.device).random_().view(torch.uint8)[:size]
    return (bits & 1).view(shape).to(like.dtype).mul_(2).sub_(1)


def _network(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    """Of SiLU between its layers."""
    h = linear(x, weights[0], biases[0])
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        h = linear(F.silu(h), weight, bias)
    return h


def _jacobian(weights: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """The Jacobian of ``g`` ``(..., dim, dim)``."""
    jacobian = weights[0]
    for slope, weight in zip(slopes, weights[1:], strict=True):
        jacobian = weight @ (slope.unsqueeze(-1) * jacobian)
    return jacobian


def _exact(weights: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """``log det(I + J)``."""
    jacobian = _jacobian(weights, slopes)
    eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return torch.linalg.slogdet(eye + jacobian)[1]


def _push(weights: list[Tensor], slopes: list[Tensor], v: Tensor) -> Tensor:
    """``J v``."""
    v = F.linear(v, weights[0])
    for slope, weight in zip(slopes, weights[1:], strict=True):
        v = F.linear(slope * v, weight)
    return v


def _pull(weights: list[Tensor], slopes: list[Tensor], v: Tensor) -> Tensor:
    """``J^T v``."""
    for slope, weight in zip(slopes[::-1], weights[:0:-1], strict=True):
        v = slope * (v @ weight)
    return v @ weights[0]


def spectral_bound(weight: Tensor) -> Tensor:
    """An upper bound of the 2-norm, ``rank^(1 / 1024)`` times it at most (Delattre et al. 2023).

    By the Frobenius norm of the 256th power of the Gram matrix, which lies above its largest eigenvalue's.
    """
    own = takes_custom_gradients() and weight.requires_grad
    return _SpectralBound.apply(weight) if own else _bound(weight, False)[0]  # type: ignore[no-any-return]


def _bound(weight: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The bound ``b``, and its gradient if wanted.

    With the Gram matrix ``G`` and ``b = tr(G^512)^(1 / 1024)`` this is ``b W G^511 / tr(G^512)``, a product of
    ``P = G^k / |G^k|`` and ``R = G^(k - 1) / |G^k|`` at ``k = 256``.
    """
    wide = weight.shape[-1] > weight.shape[-2]
    power = weight @ weight.mT if wide else weight.mT @ weight
    log_norm = torch.zeros_like(power[..., 0, 0])
    rest = torch.eye(power.shape[-1]).to(power) if with_gradient else None
    for n in range(5):  # scaled each time before it is raised to the fourth power, lest it vanish
        norm = (power.square().sum((-1, -2)) + torch.finfo(power.dtype).tiny).sqrt()
        log_norm = log_norm + norm.log() / 4.0**n
        norm = norm[..., None, None]
        power, rest = power / norm, None if rest is None else rest / norm
        if n < 4:
            squared = power @ power
            rest = None if rest is None else squared @ (power @ rest)
            power = squared @ squared
    bound = torch.exp(0.5 * log_norm)
    if rest is None:
        return bound, None
    share = rest @ power
    return bound, bound * (share @ weight if wide else weight @ share)


class _SpectralBound(torch.autograd.Function):
    """:func:`spectral_bound` with the gradient that is found along with it, in place of all powers."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        bound, gradient = _bound(weight, True)
        ctx.save_for_backward(weight, gradient)
        return bound

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        weight, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            weight = weight.view_as(weight)
            return torch.autograd.grad(_bound(weight, False)[0], weight, by, create_graph=True)[0]
        return by * gradient


def check_residual(hidden_dims: Sequence[int], lipschitz: float, log_det: str) -> None:
    """Raises a ``ValueError`` that names the argument with which no residual map can be built."""
    if not hidden_dims:
        raise ValueError("Residual: hidden_dims must hold at least one width.")
    if not 0 < lipschitz < 1:
        raise ValueError(f"Residual: lipschitz must lie between 0 and 1, but got {lipschitz}.")
    if log_det not in LOG_DETS:
        raise ValueError(f"Residual: log_det must be one of {LOG_DETS}, but got {log_det!r}.")
