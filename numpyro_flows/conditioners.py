"""Networks ``theta(x, context)`` that compute the parameters of the univariate maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.transform_module import check_context

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
}


class Linear(eqx.Module):
    """``weight x + bias`` over the last axis; ``weight`` ``(out, in)``, uniform in ``+-1/sqrt(in)`` at the start."""

    weight: Array
    bias: Array

    def __init__(self, in_dim: int, out_dim: int, *, key: Array, zero: bool = False):
        limit = 0.0 if zero else 1.0 / np.sqrt(max(in_dim, 1))
        w_key, b_key = jax.random.split(key)
        self.weight = jax.random.uniform(w_key, (out_dim, in_dim), minval=-limit, maxval=limit)
        self.bias = jax.random.uniform(b_key, (out_dim,), minval=-limit, maxval=limit)


class MLP(eqx.Module):
    """Perceptron of ``x`` ``(..., in_dim)`` and an optional context; its last layer starts at zero.

    The context enters the first layer. Its batch axes broadcast against those of ``x`` without being copied.

    :param in_dim: size of the input, may be 0 (then only the context counts).
    :param hidden_dims: widths of the hidden layers.
    :param out_dim: size of the output ``(..., out_dim)``.
    :param context_dim: size of the context ``(..., context_dim)``, 0 for none.
    :param activation: one of ``conditioners.ACTIVATIONS``. The smooth ones suit guides which NUTS runs through.
    """

    layers: tuple[Linear, ...]
    in_dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        context_dim: int = 0,
        activation: str = "silu",
        *,
        key: Array,
    ):
        check_network(hidden_dims, context_dim, activation)
        dims = (in_dim + context_dim, *hidden_dims, out_dim)
        keys = jax.random.split(key, len(dims) - 1)
        last = len(dims) - 2
        self.layers = tuple(
            Linear(i, o, key=k, zero=n == last) for n, (i, o, k) in enumerate(zip(dims, dims[1:], keys, strict=False))
        )
        self.in_dim, self.context_dim, self.activation = in_dim, context_dim, activation

    def _weights(self) -> list[Array]:
        return [layer.weight for layer in self.layers]

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        check_context(context, self.context_dim, type(self).__name__)
        weights, activation = self._weights(), ACTIVATIONS[self.activation]
        h = x @ weights[0][:, : self.in_dim].T + self.layers[0].bias
        if context is not None:
            h = h + context @ weights[0][:, self.in_dim :].T
        for weight, layer in zip(weights[1:], self.layers[1:], strict=True):
            h = activation(h) @ weight.T + layer.bias
        return h


class MaskedMLP(MLP):
    """Perceptron whose output ``i`` depends on ``x[..., :i]`` (and the context) only (Germain et al. 2015, MADE).

    Its output ``(..., num_params * dim)`` is laid out as ``(num_params, dim)``.

    :param dim: size of the input.
    :param num_params: outputs per input.
    :param num_features: numbers by which an input is given, laid out as ``(num_features, dim)``.
    """

    num_features: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int],
        num_params: int,
        context_dim: int = 0,
        activation: str = "silu",
        num_features: int = 1,
        *,
        key: Array,
    ):
        super().__init__(num_features * dim, hidden_dims, num_params * dim, context_dim, activation, key=key)
        self.num_features = num_features

    def _weights(self) -> list[Array]:
        sizes = [layer.bias.shape[-1] for layer in self.layers]
        dim = self.in_dim // self.num_features
        masks = autoregressive_masks(dim, sizes[:-1], sizes[-1] // dim, self.context_dim, self.num_features)
        return [jnp.where(mask, layer.weight, 0) for mask, layer in zip(masks, self.layers, strict=True)]


def autoregressive_masks(
    dim: int, hidden_dims: Sequence[int], num_params: int, context_dim: int, num_features: int = 1
) -> list[np.ndarray]:
    """Masks ``(out, in)`` of the weights of a :class:`MaskedMLP` (Germain et al. 2015, section 4)."""
    degrees = [np.concatenate([np.tile(np.arange(dim), num_features), np.full(context_dim, -1)])]
    degrees += [np.arange(width) % max(dim - 1, 1) for width in hidden_dims]
    masks = [after[:, None] >= before for before, after in zip(degrees, degrees[1:], strict=False)]
    return [*masks, np.tile(np.arange(dim), num_params)[:, None] > degrees[-1]]


def check_network(hidden_dims: Sequence[int], context_dim: int, activation: str) -> None:
    """Raises a ``ValueError`` that names the argument with which no conditioner can be built."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, but got {activation!r}.")
    if isinstance(hidden_dims, int) or any(width < 1 for width in hidden_dims):
        raise ValueError(f"hidden_dims must be a sequence of positive integers, but got {hidden_dims!r}.")
    if context_dim < 0:
        raise ValueError(f"context_dim must not be negative, but got {context_dim}.")
