"""The numerical inverse: one mechanism for every map whose inverse has no closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAX_STEPS = 200  # halvings of any bracket and Newton's steps need far fewer
MAX_DISTANCE = 1e15  # of a root from y: a map whose tails are linear or steeper than logarithmic has it nearer
MAX_DENSE = 128  # elements up to which the implicit gradient of a vector's root uses the dense Jacobian


def monotone_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    *,
    tolerance: float | None = None,
    owner: str = "inverse",
) -> Tensor:
    """Solves ``f(x) = y`` elementwise for an increasing ``f``, by Newton's steps kept within a shrinking bracket.

    The result carries gradients by the implicit function theorem, up to second order: the search itself is not
    differentiated; two of Newton's steps from its end are.

    :param function: ``x -> (f(x), log f'(x))``, elementwise.
    :param y: values ``(...)``, of the shape that ``function`` gives.
    :param lower: where ``f(lower) <= y``; found by doubling from ``y`` unless given.
    :param upper: where ``f(upper) >= y``; found likewise.
    :param tolerance: largest error of ``x``, relative to ``max(1, |x|)``, up to the rounding of the function's
        values; 4 eps of the dtype unless given.
    :param owner: the name that an error mentions.
    :raises RuntimeError: if elements do not converge, with their number. (Under ``torch.func.vmap`` nothing can be
        read, and no error is raised; not a number goes through as such.)
    """
    eps = torch.finfo(y.dtype).eps
    tolerance = 4 * eps if tolerance is None else tolerance
    with torch.no_grad():
        x, converged = _search(lambda x: _detached(function, x), y.detach(), lower, upper, tolerance)
        if readable(converged) and not bool(converged.all()):
            bad = ~converged
            raise RuntimeError(
                f"{owner}: the numerical inverse did not converge for {int(bad.sum())} of {bad.numel()} elements "
                f"(y between {float(y[bad].min()):.3g} and {float(y[bad].max()):.3g}). Are the parameters finite?"
            )
    # the first order of the gradient comes from the last step, the second from both
    for _ in range(2 if torch.is_grad_enabled() else 1):
        value, log_slope = function(x)
        x = x - (value - y) * torch.exp(-log_slope)
    return x


def _detached(function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    value, log_slope = function(x)
    return value.detach(), log_slope.detach()


def _search(
    function: Callable, y: Tensor, lower: Tensor | None, upper: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The roots, and which of them converged; not a number counts as such."""
    y = y.clone()
    undefined = torch.isnan(y)
    lower = _bracket(function, y, -1) if lower is None else lower.detach().expand_as(y)
    upper = _bracket(function, y, 1) if upper is None else upper.detach().expand_as(y)
    x = torch.minimum(torch.maximum(y, lower), upper)
    converged = undefined.clone()
    last = torch.full_like(y, torch.inf)
    rounding = 8 * torch.finfo(y.dtype).eps  # of the function's values: no search gets below it
    for _ in range(MAX_STEPS):
        value, log_slope = function(x)
        undefined = undefined | torch.isnan(value)
        above = value > y
        upper, lower = torch.where(above, x, upper), torch.where(above, lower, x)
        step = (value - y) * torch.exp(-log_slope)
        newton, middle = x - step, 0.5 * (lower + upper)
        size = torch.maximum(x.abs(), y.abs()).clamp_min(1)
        # a step that is not half the last one is left out, or it could go round in a circle
        good = (newton >= lower) & (newton <= upper) & (step.abs() <= 0.5 * last)
        converged = undefined | converged | ((value - y).abs() <= rounding * size)
        following = torch.where(converged, x, torch.where(good, newton, middle))
        close = tolerance * following.abs().clamp_min(1)
        converged = converged | (good & (step.abs() <= close)) | (upper - lower <= close)
        last = (following - x).abs()
        x = following
        if readable(converged) and bool(converged.all()):
            break
    return x, converged & (undefined | (torch.isfinite(lower) & torch.isfinite(upper)))


def _bracket(function: Callable, y: Tensor, sign: int) -> Tensor:
    """Points beyond the roots on one side, by doubling the distance from ``y``; infinite where there is none."""
    edge, distance = y + sign, 1.0
    short = sign * (function(edge)[0] - y) < 0
    while distance < MAX_DISTANCE and not (readable(short) and not bool(short.any())):
        distance *= 2
        edge = torch.where(short, y + sign * distance, edge)
        short = sign * (function(edge)[0] - y) < 0
    return torch.where(short, sign * torch.inf, edge)


def settled(before: Tensor, after: Tensor, scale: Tensor | float = 1.0) -> bool:
    """Whether a sweep has moved nothing by more than rounding; what is not finite both times counts as still.

    :param scale: the size below which a number's rounding is that of this size.
    """
    tolerance = 4 * torch.finfo(before.dtype).eps
    still = (after - before).abs() <= tolerance * torch.maximum(before.abs(), torch.as_tensor(scale).to(before))
    return bool((still | ~(before.isfinite() | after.isfinite())).all())


def readable(x: Tensor) -> bool:
    """Whether the host can look at the values (not under ``vmap``, fake tensors or a compiler's trace)."""
    return not (
        torch._C._functorch.is_batchedtensor(x)
        or torch.compiler.is_compiling()
        or torch._subclasses.fake_tensor.is_fake(x)
        or torch._C._functorch.is_gradtrackingtensor(x)
        and not readable(torch._C._functorch.get_unwrapped(x))
    )


def takes_custom_gradients() -> bool:
    """Whether a gradient written by hand (a ``torch.autograd.Function``) can be used here: in eager reverse mode."""
    return torch.is_grad_enabled() and is_eager()


def is_eager() -> bool:
    """Whether operations are run, not seen by ``torch.func``, forward mode, ``torch.compile`` or ``torch.jit``."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )


def fixed_point_root(
    function: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    tolerance: float | None = None,
    max_steps: int = 2000,
    jacobian: Callable[[Tensor], Tensor] | None = None,
    owner: str = "inverse",
) -> Tensor:
    """Solves ``x + g(x) = y`` for vectors and a contractive ``g``, by the iteration ``x <- y - g(x)`` (Banach).

    Takes about ``log(tolerance) / log(Lip g)`` evaluations of ``g``. The result carries gradients by the implicit
    function theorem, up to second order: two of Newton's steps from the end of the search are differentiated. Up to
    ``MAX_DENSE`` elements they use the Jacobian of ``g`` (``jacobian``, else as many forward derivatives), inverted;
    beyond it one Neumann iteration each, forward and backward (then in reverse mode only). Where gradients are off,
    half as many evaluations of ``g`` again take the place of these steps.

    :param function: ``x -> g(x)``, both ``(..., dim)``; each vector by itself.
    :param y: values ``(..., dim)``, of the shape that ``function`` gives.
    :param tolerance: the iteration ends with a step of this size, relative to ``max(1, |x|, |y|)`` (largest elements);
        64 eps of the dtype unless given (the steps that follow gain the rest).
    :param max_steps: most evaluations of ``g``.
    :param jacobian: ``x -> dg/dx`` ``(..., dim, dim)``, for functions that know it.
    :param owner: the name that an error mentions.
    :raises RuntimeError: if vectors do not converge, with their number; not a number goes through as such.
    """
    tolerance = 64 * torch.finfo(y.dtype).eps if tolerance is None else tolerance
    with torch.no_grad():
        x, converged, steps = _iterate(lambda x: function(x).detach(), y.detach(), tolerance, max_steps)
        if readable(converged) and not bool(converged.all()):
            raise RuntimeError(
                f"{owner}: the numerical inverse did not converge for {int((~converged).sum())} of {converged.numel()} "
                f"vectors in {max_steps} steps. Are the parameters finite, and is the map a contraction?"
            )
    if not torch.is_grad_enabled():  # each took off as much of the error as the steps before, on average
        for _ in range(steps // 2 + 1):
            x = y - function(x)
        return x
    with torch.no_grad():
        dense = _inverse_jacobian(function, x, jacobian) if y.shape[-1] <= MAX_DENSE else None
    base = x
    for _ in range(2):  # the first order of the gradient comes from the last step, the second from both
        residual = x + function(x) - y
        if dense is not None:
            x = x - (dense @ residual.unsqueeze(-1)).squeeze(-1)
        else:
            push = lambda v: torch.func.jvp(function, (base,), (v,))[1].detach()  # noqa: E731
            pull = lambda v: torch.func.vjp(function, base)[1](v)[0].detach()  # noqa: E731
            x = x - _NeumannSolve.apply(residual, push, pull, tolerance, max_steps)
    return x


def _iterate(function: Callable, y: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, int]:
    """``x <- y - function(x)`` to its end, which vectors converged (those not a number from the start count), and the
    steps taken."""
    x, converged, steps = y, torch.zeros_like(y[..., 0], dtype=torch.bool), 0
    if y.numel() == 0:
        return x, converged, steps
    scale = y.abs().amax(-1).clamp_min(1)  # the difference is rounded by it
    undefined = None
    while steps < max_steps:
        steps += 1
        following = y - function(x)
        step, size = (following - x).abs().amax(-1), following.abs().amax(-1)
        x = following
        if undefined is None:
            undefined = size.isnan()
        converged = undefined | (step < tolerance * size.maximum(scale))  # never where both are infinite
        if readable(converged) and bool(converged.all()):
            break
    return x, converged, steps


def _inverse_jacobian(function: Callable, x: Tensor, jacobian: Callable | None) -> Tensor:
    """``(I + dg/dx)^{-1}``, constant."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if jacobian is not None:
        return torch.linalg.inv(eye + jacobian(x).detach())
    columns = [torch.func.jvp(function, (x,), (unit.expand_as(x),))[1].detach() for unit in eye]
    return torch.linalg.inv(eye + torch.stack(columns, -1))


class _NeumannSolve(torch.autograd.Function):
    """``(I + J)^{-1} r`` by the iteration ``v <- r - J v``, for a constant ``J`` given with its transpose."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, push: Callable, pull: Callable, tolerance: float, max_steps: int) -> Tensor:
        ctx.rest = pull, push, tolerance, max_steps
        scale = r.abs().max() if r.numel() else r.new_ones(())  # gradients may be of any size
        scale = torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)
        return scale * _iterate(push, r / scale, tolerance, max_steps)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _NeumannSolve.apply(grad, *ctx.rest), None, None, None, None
