"""Gradients of deep chains without stored activations."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_flows.transform_module import Compose, Repeat, TransformModule


class Reversible(TransformModule):
    """``transform`` with a gradient that stores none of its activations: memory does not grow with depth.

    The gradient goes back through the layers one by one, each layer's input computed again from its output by the
    other direction (Gomez et al. 2017, The reversible residual network, algorithm 1), exact up to the rounding of that
    inverse. It takes 1.4 to 1.6 times as long for affine couplings, about five times for splines, whose gradient XLA
    compiles badly outside of a scan (``tests.benchmarks.growth``): for what would not fit into memory. Reverse mode of
    any order; jax has no forward mode through a gradient written by hand, and says so.

    :param transform: a :class:`Compose`, a :class:`Repeat`, or a single layer.
    :raises ValueError: if a layer's log-determinant is estimated: noise cannot be run again.
    :raises RuntimeError: in the gradient, where the inverse does not find the input again (Equinox's, at run time).
    """

    transform: TransformModule

    def __init__(self, transform: TransformModule):
        if not transform.log_det_is_exact:
            raise ValueError(
                "Reversible: the transform's log-determinant is estimated, and noise cannot be run again. Use its "
                "exact mode, or leave Reversible out."
            )
        self.transform = transform

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _reversible((self.transform, x, context), False)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return _reversible((self.transform, y, context), True)

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Any, Array, Array]:
        transform, y, log_det = self.transform._fitted(x, context, inverse, start)
        return Reversible(transform), y, log_det


def _pass(transform: TransformModule, x: Array, context: Array | None, inverse: bool) -> tuple[Array, Array]:
    return (transform.inverse_and_log_det if inverse else transform.forward_and_log_det)(x, context)


@eqx.filter_custom_vjp
def _reversible(arguments: tuple[TransformModule, Array, Array | None], inverse: bool) -> tuple[Array, Array]:
    transform, x, context = arguments
    return _pass(transform, x, context, inverse)


@_reversible.def_fwd
def _reversible_forward(perturbed: Any, arguments: tuple, inverse: bool) -> tuple[Any, Array]:
    transform, x, context = arguments
    y, log_det = _pass(transform, x, context, inverse)
    return (y, log_det), y


@_reversible.def_bwd
def _reversible_backward(y: Array, grads: Any, perturbed: Any, arguments: tuple, inverse: bool) -> Any:
    transform, x, context = arguments
    dy = jnp.zeros_like(y) if grads[0] is None else grads[0]
    dlog_det = jnp.zeros(y.shape[:-1], y.dtype) if grads[1] is None else grads[1]
    again, dx, of_transform, of_context = _back_through(transform, y, dy, dlog_det, context, inverse)
    lost = jnp.abs(again - x) > 10 * float(jnp.finfo(x.dtype).eps) ** 0.5 * jnp.maximum(jnp.abs(x), 1)
    dx = eqx.error_if(
        dx,
        lost,
        "Reversible: the inverse loses the layers' inputs to rounding, and the gradient with them. Use float64, fewer "
        "layers or smaller scales, or leave Reversible out.",
    )
    extra = tuple(range(dx.ndim - x.ndim))  # the context's batch axes, to which x was broadcast
    ones = tuple(n for n, size in enumerate(x.shape, len(extra)) if size == 1 and dx.shape[n] != 1)
    return of_transform, dx.sum(extra + ones).reshape(x.shape), of_context


def _back_through(
    transform: TransformModule, y: Array, dy: Array, dlog_det: Array, context: Array | None, inverse: bool
) -> tuple[Array, Array, Any, Any]:
    """Input and its gradient, those of the parameters and of the context, from the output and its gradient."""
    if isinstance(transform, Compose):
        total, of_layers = None if context is None else jnp.zeros_like(context), []
        for layer in transform.layers if inverse else reversed(transform.layers):
            y, dy, of_layer, of_context = _back_through(layer, y, dy, dlog_det, context, inverse)
            of_layers.append(of_layer)
            total = total if of_context is None else total + of_context
        layers = tuple(of_layers if inverse else of_layers[::-1])
        return y, dy, eqx.tree_at(lambda c: c.layers, transform, layers), total
    if isinstance(transform, Repeat):
        arrays, static = eqx.partition(transform.layers, eqx.is_array)

        def step(carry, arrays):
            y, dy, total = carry
            y, dy, of_layer, of_context = _back_through(eqx.combine(arrays, static), y, dy, dlog_det, context, inverse)
            return (y, dy, total if of_context is None else total + of_context), of_layer

        start = y, dy, None if context is None else jnp.zeros_like(context)
        (y, dy, total), of_layers = lax.scan(step, start, arrays, reverse=not inverse)
        return y, dy, eqx.tree_at(lambda r: r.layers, transform, of_layers), total
    x = lax.optimization_barrier(_pass(transform, y, context, not inverse)[0])
    trained, static = eqx.partition(transform, eqx.is_inexact_array)
    _, back = jax.vjp(lambda a, x, c: _pass(eqx.combine(a, static), x, c, inverse), trained, x, context)
    # barriers, or XLA would compute what the gradient needs again for every element of every use of it
    of_transform, dx, of_context = lax.optimization_barrier(back)((dy, dlog_det))
    return x, dx, of_transform, of_context
