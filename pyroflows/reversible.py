"""Gradients of deep chains without stored activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from pyroflows.numerical import readable, takes_custom_gradients
from pyroflows.transform_module import Compose, TransformModule


class Reversible(TransformModule):
    """``transform`` with a gradient that stores none of its activations: memory does not grow with depth.

    The gradient goes back through the layers one by one, each layer's input computed again from its output by the
    other direction (Gomez et al. 2017, The reversible residual network, algorithm 1), exact up to the rounding of that
    inverse. It takes about twice as long (``tests.benchmarks.growth``): for what would not fit into memory. Reverse
    mode of any order (the second stores activations again); under ``torch.func``, in forward mode and when compiled the
    plain gradient is taken.

    :param transform: a :class:`Compose`, a :class:`Repeat`, or a single layer.
    :raises ValueError: if a layer's log-determinant is estimated: noise cannot be run again.
    :raises RuntimeError: in the gradient, where the inverse does not find the input again.
    """

    def __init__(self, transform: TransformModule):
        super().__init__()
        if not transform.log_det_is_exact:
            raise ValueError(
                "Reversible: the transform's log-determinant is estimated, and noise cannot be run again. Use its "
                "exact mode, or leave Reversible out."
            )
        self.transform = transform

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run_chain(x, context, False)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run_chain(y, context, True)

    def _run_chain(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if not takes_custom_gradients():
            return _pass(self.transform, x, context, inverse)
        weights = dict(self.transform.named_parameters(remove_duplicate=False))
        return _Chain.apply(self.transform, tuple(weights), inverse, x, context, *weights.values())


def _pass(
    transform: torch.nn.Module,
    x: Tensor,
    context: Tensor | None,
    inverse: bool,
    weights: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of a transform, also with other ``weights``, by their dotted names."""
    if weights:
        names = {f"transform.{name}": weight for name, weight in weights.items()}
        return functional_call(_Direction(transform, inverse), names, (x, context), tie_weights=False)
    return (transform.inverse_and_log_det if inverse else transform.forward_and_log_det)(x, context)  # type: ignore


class _Direction(torch.nn.Module):
    def __init__(self, transform: torch.nn.Module, inverse: bool):
        super().__init__()
        self.transform, self.inverse = transform, inverse

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return _pass(self.transform, x, context, self.inverse)


def _chain(transform: torch.nn.Module, prefix: str = "") -> list[tuple[str, torch.nn.Module]]:
    """The layers in their order, and the prefix of the names of their parameters."""
    if not isinstance(transform, Compose):
        return [(prefix, transform)]
    return [part for n, layer in enumerate(transform.layers) for part in _chain(layer, f"{prefix}layers.{n}.")]


class _Chain(torch.autograd.Function):
    """The chain with a gradient that finds every layer's input again."""

    @staticmethod
    def forward(
        ctx: Any,
        transform: TransformModule,
        names: tuple[str, ...],
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, log_det = _pass(transform, x, context, inverse)
        y = y.view_as(y) if y is x else y
        ctx.transform, ctx.names, ctx.inverse = transform, names, inverse
        ctx.save_for_backward(x, y, context, *weights)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        x, y, context, *values = ctx.saved_tensors
        inverse, needed = ctx.inverse, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # to be differentiated once more: through the plain chain
            # aliases: one input may be a function of another, and that part is not ours
            point, held = x.view_as(x), None if context is None else context.view_as(context)
            aliases = {name: value.view_as(value) for name, value in zip(ctx.names, values, strict=True)}
            with torch.enable_grad():
                outputs = _pass(ctx.transform, point, held, inverse, aliases)
            inputs = [point, held, *aliases.values()]
            return None, None, None, *_gradients(outputs, inputs, needed, (dy, dlog_det), create_graph=True)
        weights = dict(zip(ctx.names, values, strict=True))
        of_weights = {name: torch.zeros_like(value) for name, value in weights.items()}
        of_context = None if context is None else torch.zeros_like(context)
        chain = _chain(ctx.transform)
        for prefix, layer in chain if inverse else reversed(chain):
            own = {n: weights[f"{prefix}{n}"] for n, _ in layer.named_parameters(remove_duplicate=False)}
            y = _pass(layer, y, context, not inverse, own)[0].requires_grad_()
            held = None if context is None else context.detach().requires_grad_(needed[1])
            own = {name: weight.detach().requires_grad_() for name, weight in own.items()}
            with torch.enable_grad():
                outputs = _pass(layer, y, held, inverse, own)
            inputs = [y, held, *own.values()]
            found = _gradients(outputs, inputs, [True, needed[1], *(True for _ in own)], (dy, dlog_det))
            y, dy = y.detach(), found[0]
            if found[1] is not None:
                of_context += found[1]
            for name, gradient in zip(own, found[2:], strict=True):
                if gradient is not None:
                    of_weights[f"{prefix}{name}"] += gradient
        lost = (y - x).abs() > 10 * torch.finfo(x.dtype).eps ** 0.5 * x.abs().clamp(min=1)
        if readable(lost) and lost.any():
            raise RuntimeError(
                "Reversible: the inverse loses the layers' inputs to rounding, and the gradient with them. Use "
                "float64, fewer layers or smaller scales, or leave Reversible out."
            )
        return None, None, None, dy.sum_to_size(x.shape), of_context, *of_weights.values()


def _gradients(
    outputs: tuple[Tensor, Tensor],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Any],
    create_graph: bool = False,
) -> list[Any]:
    """Of each input that is wanted, its gradient; ``None`` of the others, and where there is none."""
    chosen = [t for t, w in zip(inputs, wanted, strict=True) if t is not None and w]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not chosen or not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], chosen, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if t is not None and w else None for t, w in zip(inputs, wanted, strict=True)]
