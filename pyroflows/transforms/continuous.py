"""Continuous flow: an ordinary differential equation (Chen et al. 2018; FFJORD, Grathwohl et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.integrate import DOP853
from torch import Tensor
from torch.nn import functional as F

from pyroflows.conditioners import MLP, linear
from pyroflows.numerical import takes_custom_gradients
from pyroflows.transform_module import TransformModule, check_context

FIXED = {  # schemes of fixed steps: nodes c, weights a of the stages, weights b of the step
    "rk4": (np.array([0, 0.5, 0.5, 1]), np.diag([0.5, 0.5, 1], -1), np.array([1, 2, 2, 1]) / 6),
    "dop853": (DOP853.C, DOP853.A, DOP853.B),
}
ADAPTIVE = ("bosh3", "dopri5", "dopri8")


class Continuous(TransformModule):
    """``y = x(1)`` with ``dx/dt = v(x, t, context)`` from ``x(0) = x``.

    The log-determinant is the integral of ``tr dv/dx`` on the way (Chen et al. 2018, eq. 8). Both directions take the
    same ``num_steps`` steps, forward or backward in time. The ``velocity`` is a perceptron with bounded slopes, so that
    every solution exists and is unique: a bijection of the whole space. With at most two hidden layers the exact trace
    is one bilinear form of the activations' slopes, and costs no more than a second network pass whatever ``dim`` is;
    with more layers, ``dim`` tangents. The solution is as exact as the solver: check a trained flow by
    :meth:`solver_error`.

    The schemes of fixed steps, ``"dop853"`` (order 8, 12 passes a step) and ``"rk4"`` (order 4, 4 passes), are
    differentiated step by step, in every mode, and read nothing on the host. Of each pass the gradient keeps the point
    alone and computes the activations again (in torch with two hidden layers and the exact trace, in reverse mode). The
    adaptive ones (``"dopri5"``, ``"dopri8"``, ``"bosh3"``, by torchdiffeq in torch and diffrax in jax) keep the local
    error of the batch below ``rtol`` and ``atol``.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of the velocity.
    :param context_dim: size of the context, 0 for none.
    :param activation: ``"tanh"`` (a bounded velocity: far away the map is a shift), ``"softplus"`` or ``"silu"`` (a
        velocity that grows linearly: often the better fit, but points at 100 need several times the steps).
    :param trace: ``"exact"``, or ``"hutchinson"``: unbiased, by one draw of noise held fixed through a solution
        (Grathwohl et al. 2019, eq. 7).
    :param solver: one of ``"dop853"``, ``"rk4"``, ``"dopri5"``, ``"dopri8"``, ``"bosh3"``.
    :param num_steps: number of the fixed steps.
    :param rtol: relative tolerance of the adaptive solvers.
    :param atol: absolute tolerance of the adaptive solvers.
    :param adjoint: gradients by an equation solved backward, in constant memory but with the solver's error; for
        adaptive solvers, and first derivatives in reverse mode only. If not, the steps are differentiated.
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        activation: str = "tanh",
        trace: str = "exact",
        solver: str = "dop853",
        num_steps: int = 4,
        rtol: float = 1e-6,
        atol: float = 1e-6,
        adjoint: bool = False,
    ):
        super().__init__()
        check_solver(dim, trace, solver, num_steps, rtol, atol, adjoint)
        self.velocity = Velocity(dim, hidden_dims, context_dim, activation)
        self.dim, self.trace, self.solver, self.num_steps = dim, trace, solver, num_steps
        self.rtol, self.atol, self.adjoint = rtol, atol, adjoint

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.trace == "exact"

    @property
    def passes(self) -> tuple[int, int]:
        """As stated for fixed steps; adaptive ones count as one step."""
        count = self.num_steps * len(FIXED[self.solver][0]) if self.solver in FIXED else 1
        return count, count

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context, 0.0, 1.0)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(y, context, 1.0, 0.0)

    @torch.no_grad()
    def solver_error(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Size of the error ``(...)`` of ``y`` and of the log-determinant: the round trip back to ``x``."""
        y, log_det = self.forward_and_log_det(x, context)
        back, opposite = self.inverse_and_log_det(y, context)
        return (back - x).abs().amax(-1), (log_det + opposite).abs()

    def _solve(self, x: Tensor, context: Tensor | None, start: float, end: float) -> tuple[Tensor, Tensor]:
        check_context(context, self.velocity.context_dim, type(self).__name__)
        if context is not None:
            x = x.expand(torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]) + x.shape[-1:])
        noise = None if self.trace == "exact" else 2.0 * torch.randint_like(x, 2) - 1
        log_det = x.new_zeros(x.shape[:-1])
        if self.solver in FIXED:
            return self._fixed_steps(x, log_det, context, noise, start, end)
        return self._adaptive_steps(x, log_det, context, noise, start, end) if x.numel() else (x, log_det)

    def _fixed_steps(self, x, log_det, context, noise, start, end) -> tuple[Tensor, Tensor]:
        nodes, weights, last = (part.tolist() for part in FIXED[self.solver])
        constants, size = self.velocity.constants(context), (end - start) / self.num_steps
        for step in range(self.num_steps):
            rates: list[Tensor] = []
            for node, row, share in zip(nodes, weights, last, strict=True):
                time = start + (step + node) * size
                point = _along(x, rates, row, size)
                rate, trace = self.velocity(time, point, constants, noise, with_trace=share != 0, recompute=True)
                rates.append(rate)
                log_det = log_det if trace is None else log_det + (size * share) * trace
            x = _along(x, rates, last, size)
        return x, log_det

    def _adaptive_steps(self, x, log_det, context, noise, start, end) -> tuple[Tensor, Tensor]:
        odeint, odeint_adjoint = _torchdiffeq()

        def rates(time: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.velocity(time, state[0], self.velocity.constants(context), noise)

        times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
        options: dict[str, Any] = {"method": self.solver, "rtol": self.rtol, "atol": self.atol}
        options["options"] = {
            "step_t": times
        }  # steps end at the ends; else the value there is interpolated, to order 4
        if self.adjoint:
            wanted = [t for t in (*self.parameters(), context) if t is not None and t.requires_grad]
            xs, log_dets = odeint_adjoint(rates, (x, log_det), times, adjoint_params=tuple(wanted), **options)
        else:
            xs, log_dets = odeint(rates, (x, log_det), times, **options)
        return xs[-1], log_dets[-1]


class Velocity(MLP):
    """``v(x, t, context)`` and ``tr dv/dx``; the first layer takes ``(x, t, context)``, the last starts at zero."""

    def __init__(self, dim: int, hidden_dims: Sequence[int], context_dim: int, activation: str):
        super().__init__(dim + 1, hidden_dims, dim, context_dim, activation)
        if activation not in SMOOTH:
            raise ValueError(f"Continuous: activation must be smooth, one of {sorted(SMOOTH)}, but got {activation!r}.")

    def constants(self, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What is the same at all times: the first layer's offset, and the trace's weights of the slopes."""
        weights, dim = self._weights(), self.in_dim - 1
        offset: Tensor = self.layers[0].bias  # type: ignore[assignment]
        if context is not None:
            offset = offset + F.linear(context, weights[0][:, self.in_dim :])
        inner = weights[0][:, :dim]
        if len(weights) == 2:
            return offset, (inner * weights[1].mT).sum(-1)
        return offset, weights[1] * (inner @ weights[2]).mT if len(weights) == 3 else None

    def forward(  # type: ignore[override]
        self,
        time: Any,
        x: Tensor,
        constants: tuple[Tensor, Tensor | None],
        noise: Tensor | None = None,
        with_trace: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``v`` ``(..., dim)``, and its trace ``(...)`` or the estimate of it by ``noise``.

        To ``recompute``, the gradient keeps no activations, where it is known by hand: two hidden layers, exact trace.
        """
        weights, dim, activation = self._weights(), self.in_dim - 1, SMOOTH[self.activation]
        biases: list[Tensor] = [layer.bias for layer in self.layers]  # type: ignore[misc]
        if recompute and len(weights) == 3 and noise is None and takes_custom_gradients():
            first = weights[0][:, :dim], constants[0], weights[0][:, dim]
            rest = weights[1], biases[1], weights[2], biases[2], constants[1]
            return _TwoLayers.apply(self.activation, with_trace, time, x, *first, *rest)  # type: ignore[no-any-return]
        h = linear(x, weights[0][:, :dim], constants[0] + time * weights[0][:, dim])
        slopes = []
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            h, slope = activation(h)
            slopes.append(slope)
            h = F.linear(h, weight, bias)
        if not with_trace:
            return h, None
        return h, _trace(weights[0][:, :dim], weights[1:], slopes, constants[1], noise).expand(h.shape[:-1])


class _TwoLayers(torch.autograd.Function):
    """A velocity of two hidden layers with its exact trace. The gradient computes the layers again from ``x``: autograd
    would keep five arrays of hidden units for each of a solution's passes."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        name: str,
        with_trace: bool,
        time: float,
        x: Tensor,
        inner: Tensor,
        offset: Tensor,
        turn: Tensor,
        weight: Tensor,
        bias: Tensor,
        last: Tensor,
        last_bias: Tensor,
        coupling: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, inner, offset, turn, weight, bias, last, coupling)
        ctx.rest = name, with_trace, time
        activation = SMOOTH[name]
        y, slope = activation(linear(x, inner, offset + time * turn))
        y2, slope2 = activation(F.linear(y, weight, bias))
        trace = (slope2 * F.linear(slope, coupling)).sum(-1) if with_trace else None
        return F.linear(y2, last, last_bias), trace

    @staticmethod
    def backward(ctx: Any, by: Tensor, by_trace: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inner, offset, turn, weight, bias, last, coupling = ctx.saved_tensors
        name, with_trace, time = ctx.rest
        activation, bend = SMOOTH[name], BENDS[name]
        h = linear(x, inner, offset + time * turn)
        y, slope = activation(h)
        h2 = F.linear(y, weight, bias)
        y2, slope2 = activation(h2)
        by_h2, by_coupling = (by @ last) * slope2, None
        if with_trace:
            by_trace = by_trace.unsqueeze(-1)  # type: ignore[union-attr]
            by_h2 = torch.addcmul(by_h2, by_trace * F.linear(slope, coupling), bend(h2, y2, slope2))
            by_product = by_trace * slope2
            by_coupling = _outer(by_product, slope)
        by_h = (by_h2 @ weight) * slope
        if with_trace:
            by_h = torch.addcmul(by_h, by_product @ coupling, bend(h, y, slope))
        by_x = by_h @ inner
        if not any(ctx.needs_input_grad[4:]):
            return None, None, None, by_x, *[None] * 8
        of_layer = _outer(by_h, x), by_h.sum_to_size(offset.shape), (time * by_h).sum_to_size(turn.shape)
        of_rest = _outer(by_h2, y), by_h2.sum_to_size(bias.shape), _outer(by, y2), by.sum_to_size(by.shape[-1:])
        return None, None, None, by_x, *of_layer, *of_rest, by_coupling


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum of outer products over all batch axes."""
    return a.reshape(-1, a.shape[-1]).mT @ b.reshape(-1, b.shape[-1])


def _trace(first: Tensor, rest: list[Tensor], slopes: list[Tensor], coupling: Tensor | None, noise: Tensor | None):
    """``tr(W_n D_{n-1} ... D_1 W_1)`` with the diagonal matrices ``D`` of the activations' slopes."""
    if noise is not None:
        tangent = F.linear(noise, first)
        for weight, slope in zip(rest, slopes, strict=True):
            tangent = F.linear(slope * tangent, weight)
        return (noise * tangent).sum(-1)
    if not slopes:
        return first.trace()
    if coupling is not None:
        return slopes[0] @ coupling if len(slopes) == 1 else (slopes[1] * F.linear(slopes[0], coupling)).sum(-1)
    tangents = slopes[0].unsqueeze(-1) * first
    for weight, slope in zip(rest[:-1], slopes[1:], strict=True):
        tangents = slope.unsqueeze(-1) * (weight @ tangents)
    return (tangents * rest[-1].mT).sum((-2, -1))


def _along(x: Tensor, rates: list[Tensor], weights: list[float], size: float) -> Tensor:
    for rate, weight in zip(rates, weights, strict=False):
        x = x if weight == 0 else torch.add(x, rate, alpha=size * weight)
    return x


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    # torch's sigmoid takes a third of the time of its tanh
    y = torch.tanh(x) if torch.is_grad_enabled() else torch.sigmoid(2 * x).mul_(2).sub_(1)
    return y, 1 - y * y


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    y = x * gate
    return y, gate + y * (1 - gate)


SMOOTH: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {  # value and slope
    "tanh": _tanh,
    "silu": _silu,
    "softplus": lambda x: (F.softplus(x), torch.sigmoid(x)),
}


def _bend_of_silu(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 - gate) * (2 + x - 2 * y)


BENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # second derivative, of x, value and slope
    "tanh": lambda x, y, slope: (y * slope).mul_(-2),
    "silu": _bend_of_silu,
    "softplus": lambda x, y, slope: slope * (1 - slope),
}


def check_solver(dim: int, trace: str, solver: str, num_steps: int, rtol: float, atol: float, adjoint: bool) -> None:
    """Raises a ``ValueError`` that names the argument with which nothing can be solved."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, but got {dim}.")
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f'Continuous: trace must be "exact" or "hutchinson", but got {trace!r}.')
    if solver not in FIXED and solver not in ADAPTIVE:
        raise ValueError(f"Continuous: solver must be one of {[*FIXED, *ADAPTIVE]}, but got {solver!r}.")
    if num_steps < 1:
        raise ValueError(f"Continuous: num_steps must be at least 1, but got {num_steps}.")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"Continuous: rtol and atol must be positive, but got {rtol} and {atol}.")
    if adjoint and solver in FIXED:
        raise ValueError(
            f"Continuous: adjoint=True needs an adaptive solver, one of {list(ADAPTIVE)}, but solver is {solver!r}."
        )


def _torchdiffeq() -> tuple[Callable, Callable]:
    try:
        from torchdiffeq import odeint, odeint_adjoint
    except ImportError as error:
        raise ImportError("The adaptive solvers of Continuous need torchdiffeq: pip install torchdiffeq.") from error
    return odeint, odeint_adjoint
