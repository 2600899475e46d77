"""Block neural autoregressive flow (De Cao et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_flows.conditioners import MLP
from numpyro_flows.numerical import monotone_root
from numpyro_flows.transform_module import TransformModule
from numpyro_flows.transforms.planar import expm1_asinh, slope
from numpyro_flows.univariate.base import soft_clip

_MAX_LOG_GAIN = 3.0


class BlockAutoregressive(TransformModule):
    """``y = f(x)`` for one network ``f`` whose weights are block triangular, with positive blocks on the diagonal.

    Element ``i`` owns ``factor`` units of each hidden layer; they see those of the elements up to ``i`` and are
    increasing in ``x_i`` (section 3). The weights of a diagonal block are a softmax along each row times the row's
    gain, and the activation is ``h + m tanh(h + b)`` with a trainable ``m > -1`` a unit: increasing and *unbounded*,
    so that the image is the whole space (with the paper's ``tanh`` it is nearly a box, which truncates posteriors).
    Zero ``m`` and zero weights off the diagonal are the identity: the start.

    ``dy_i/dx_i`` is a product along the diagonal blocks (section 3.2), of which one logarithm is taken.
    Forward costs one masked network pass, ``O((dim factor)^2)``. The inverse finds ``dim`` scalar roots, one after the
    other; each evaluates one diagonal chain, ``O(factor^2)``, some ten times, so that all together cost a few passes of
    the network.

    :param dim: size of ``x``.
    :param hidden_factors: units an element in each hidden layer.
    :param hidden_dims: hidden widths of the conditioner of the gains, ``m`` and biases, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param reverse: returns ``y`` in reversed order, so that equal layers alternate the ordering.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    weights: tuple[Array, ...]
    units: tuple[Array, ...]
    conditioner: MLP | None
    dim: int = eqx.field(static=True)
    factors: tuple[int, ...] = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_factors: Sequence[int] = (8, 8),
        *,
        hidden_dims: Sequence[int] = (32, 32),
        context_dim: int = 0,
        reverse: bool = False,
        activation: str = "silu",
        key: Array,
    ):
        self.dim, self.reverse, self.factors = dim, reverse, check_factors(hidden_factors)
        weights, units, index = [], [], np.arange(dim)
        key, *keys = jax.random.split(key, len(self.factors) + 2)
        for i, o, k in zip((1, *self.factors), (*self.factors, 1), keys, strict=True):
            w_key, b_key = jax.random.split(k)
            weight = jax.random.uniform(w_key, (dim, o, i), minval=-1, maxval=1)
            weights.append(jnp.zeros((dim, o, dim, i)).at[index, :, index].set(weight).reshape(dim * o, dim * i))
            bias = jax.random.uniform(b_key, (1, dim, o), minval=-2, maxval=2)
            units.append(jnp.concatenate([jnp.zeros((2, dim, o)), bias]))  # gain, m, b
        units[-1] = jnp.zeros((2, dim, 1))  # gain and shift of the output
        self.weights, self.units = tuple(weights), tuple(units)
        self.conditioner = None
        if context_dim:
            out_dim = sum(unit.size for unit in units)
            self.conditioner = MLP(0, hidden_dims, out_dim, context_dim, activation, key=key)

    @property
    def passes(self) -> tuple[int, int]:
        return 1, self.dim

    def _layers(self, x: Array, context: Array | None) -> list[tuple[Array, Array, Array]]:
        """Of every layer: weights below the diagonal, as a matrix; its diagonal blocks ``(dim, o, i)``; its units."""
        units = list(self.units)
        if self.conditioner is not None:
            theta, start = self.conditioner(x[..., :0], context), 0
            for n, unit in enumerate(self.units):
                moved = theta[..., start : start + unit.size].reshape(*theta.shape[:-1], *unit.shape)
                units[n], start = unit + moved, start + unit.size
        layers, place = [], np.arange(self.dim)
        for weight, unit in zip(self.weights, units, strict=True):
            o, i = (size // self.dim for size in weight.shape)
            blocks = weight.reshape(self.dim, o, self.dim, i)
            diagonal = jax.nn.softmax(jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0), -1)
            below = place.repeat(o)[:, None] > place.repeat(i)
            layers.append((jnp.where(below, weight, 0), diagonal, unit))
        return layers

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        h, index = x[..., None], np.arange(self.dim)
        slopes = jnp.ones((self.dim, 1), x.dtype)  # of a unit by the element that owns it
        for below, diagonal, unit in self._layers(x, context):
            n, o, i = diagonal.shape
            whole = below.reshape(n, o, n, i).at[index, :, index].set(diagonal).reshape(below.shape)
            mixed = h.reshape(*h.shape[:-2], n * i) @ whole.T
            h, slopes = _unit(mixed.reshape(*mixed.shape[:-1], n, o), unit, _pass_on(slopes, diagonal))
        y = h[..., 0]
        return y[..., ::-1] if self.reverse else y, jnp.log(slopes).sum((-1, -2))

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        y = y[..., ::-1] if self.reverse else y
        if context is not None:
            y = jnp.broadcast_to(y, jnp.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])
        layers = self._layers(y, context)

        def solve(i, state):
            mixed, x, log_det = state
            own = [
                (m[..., i, None, :], d[i, None], u[..., i, None, :]) for m, (_, d, u) in zip(mixed, layers, strict=True)
            ]

            def chain(v):
                h, inputs, slopes = v[..., None, None], [], jnp.ones((1, 1), v.dtype)
                for part, diagonal, unit in own:
                    inputs.append(h[..., 0, :])
                    h, slopes = _unit(part + _pass_on(h, diagonal), unit, _pass_on(slopes, diagonal))
                return h[..., 0, 0], jnp.log(slopes[..., 0, 0]), inputs

            v = monotone_root(lambda v: chain(v)[:2], y[..., i], owner="BlockAutoregressive")
            _, log_slope, inputs = chain(v)
            columns = [
                below.reshape(below.shape[0], self.dim, below.shape[1] // self.dim)[:, i] for below, _, _ in layers
            ]
            mixed = [m + (h @ c.T).reshape(m.shape) for m, c, h in zip(mixed, columns, inputs, strict=True)]
            return mixed, x.at[..., i].set(v), log_det - log_slope

        mixed = [jnp.zeros((*y.shape[:-1], *diagonal.shape[:2]), y.dtype) for _, diagonal, _ in layers]
        start = mixed, jnp.zeros_like(y), jnp.zeros(y.shape[:-1], y.dtype)
        _, x, log_det = lax.fori_loop(0, self.dim, solve, start)
        return x, log_det


def _pass_on(h: Array, diagonal: Array) -> Array:
    """What the diagonal blocks ``(n, o, i)`` make of ``(..., n, i)``."""
    return jnp.einsum("noi,...ni->...no", diagonal, h)


def _unit(mixed: Array, unit: Array, slopes: Array) -> tuple[Array, Array]:
    """The units' values and slopes, by the element that owns them, from what the weights have made of the last ones."""
    gain = jnp.exp(soft_clip(unit[..., 0, :, :], _MAX_LOG_GAIN))
    h, slopes = mixed * gain, slopes * gain
    if unit.shape[-3] == 2:
        return h + unit[..., 1, :, :], slopes
    m, t = unit[..., 1, :, :], jnp.tanh(h + unit[..., 2, :, :])
    return h + expm1_asinh(m) * t, slopes * slope(t, m)


def check_factors(factors: Sequence[int]) -> tuple[int, ...]:
    """The widths as a tuple; a ``ValueError`` unless they are positive."""
    if isinstance(factors, int) or any(factor < 1 for factor in factors):
        raise ValueError(f"hidden_factors must be a sequence of positive integers, but got {factors!r}.")
    return tuple(factors)
