"""Masked autoregressive maps (Kingma et al. 2016, IAF; Papamakarios et al. 2017, MAF)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from pyroflows.conditioners import MaskedMLP
from pyroflows.numerical import readable, settled, takes_custom_gradients
from pyroflows.transform_module import TransformModule
from pyroflows.univariate import Univariate


class Autoregressive(TransformModule):
    """``y_i = g(x_i; theta_i(x_1 .. x_{i-1}, context))``: a triangular Jacobian.

    Forward takes one network pass. The inverse takes sweeps of one pass each, of which every one makes one more element
    exact: ``dim`` at most, in many dimensions far fewer, since they end where nothing moves any more; its gradient is
    that of the implicit function. As written it is an IAF layer; :class:`~pyroflows.Inverse` turns it into a MAF
    layer.

    :param dim: size of ``x``.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the masked conditioner.
    :param context_dim: size of the context, 0 for none.
    :param reverse: returns ``y`` in reversed order, so that equal layers alternate the ordering.
    :param ordering: the elements ``0 .. dim - 1`` from the first to the last in the chain: ``y_i`` depends on ``x_i``
        and on the elements named before ``i``. The natural order unless given.
    :param activation: the conditioner's activation.
    """

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        reverse: bool = True,
        activation: str = "silu",
        ordering: Sequence[int] | None = None,
    ):
        super().__init__()
        self.dim, self.univariate, self.reverse = dim, univariate, reverse
        num_params, num_features = univariate.num_params, univariate.num_features
        self.conditioner = MaskedMLP(dim, hidden_dims, num_params, context_dim, activation, num_features, ordering)

    @property
    def passes(self) -> tuple[int, int]:
        return 1, self.dim

    def _params(self, x: Tensor, context: Tensor | None, weights: dict[str, Tensor] | None = None) -> Tensor:
        x = self.univariate.features(x)
        theta = functional_call(self.conditioner, weights, (x, context)) if weights else self.conditioner(x, context)
        return theta.unflatten(-1, (self.univariate.num_params, self.dim))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.univariate.forward_and_log_det(x, self._params(x, context))
        return y.flip(-1) if self.reverse else y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reverse:
            y = y.flip(-1)
        if context is not None:
            y = y.expand(torch.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])
        if takes_custom_gradients() and readable(y):
            weights = dict(self.conditioner.named_parameters())
            x, log_det = _Inverse.apply(self, tuple(weights), y, context, *weights.values())
        else:
            x, log_det = self._sweeps(y, context)
        return x, log_det.sum(-1)

    def _sweeps(
        self, y: Tensor, context: Tensor | None, weights: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inverse and log-derivatives by sweeps ``x <- g^{-1}(y; theta(x))``, each of which fixes one more element."""
        x = log_det = y
        stops_early = not torch.is_grad_enabled() and readable(y)
        for i in range(self.dim):
            # what is not exact yet must not spoil, as 0 * inf, what is
            known = x if i == 0 else torch.where(torch.isfinite(x), x, 0.0)
            before = x
            x, log_det = self.univariate.inverse_and_log_det(y, self._params(known, context, weights))
            if stops_early and 0 < i and settled(before, x):
                break
        return x, log_det


class _Inverse(torch.autograd.Function):
    """The inverse with its gradient by the implicit function theorem: memory does not grow with ``dim``."""

    @staticmethod
    def forward(
        ctx: Any, layer: Autoregressive, names: tuple[str, ...], y: Tensor, context: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, log_det = layer._sweeps(y, context)
        ctx.layer, ctx.names = layer, names
        ctx.save_for_backward(x, y, context, *weights)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        layer, again = ctx.layer, torch.is_grad_enabled()  # again: to be differentiated once more
        x, *inputs = ctx.saved_tensors
        with torch.enable_grad():
            if again:  # aliases: one input may be a function of another, and that part is not ours
                inputs = [t if t is None else t.view_as(t) for t in inputs]
                outputs = layer._sweeps(*inputs[:2], dict(zip(ctx.names, inputs[2:], strict=True)))
            else:
                needed = ctx.needs_input_grad[2:]
                inputs = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
                y, context, *weights = inputs
                x = x.detach().requires_grad_()
                params = layer._params(x, context, dict(zip(ctx.names, weights, strict=True)))
                outputs = layer.univariate.inverse_and_log_det(y, params)
        if not again:
            total, scale = dx, dx.abs().max() if dx.numel() else 1.0  # gradients may be of any size
            for _ in range(layer.dim):  # the transposed system is triangular, and solved by the same sweeps
                (through,) = torch.autograd.grad(
                    outputs, x, (total, dlog_det), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                before, total = total, dx + through
                if settled(before, total, scale):
                    break
            dx = total
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(outputs, wanted, (dx, dlog_det), create_graph=again, allow_unused=True)
            if wanted
            else ()
        )
        return None, None, *(next(found) if t is not None and t.requires_grad else None for t in inputs)
