"""Networks ``theta(x, context)`` that compute the parameters of the univariate maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

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
    """``weight x + bias`` over the last axis; ``weight`` ``(out, in)``."""

    weight: Array
    bias: Array


def first_weights(shapes: Sequence[tuple[int, ...]], key: Array, zero: bool = True) -> list[tuple[Array, Array]]:
    """Weights ``(out, in, ...)`` and biases of a network's layers, uniform in ``+-1/sqrt(fan-in)``.

    From one draw, since every draw in a program takes half a second to compile.

    :param shapes: of the weights.
    :param zero: whether those of the last layer are zero.
    """
    fans = [math.prod(shape[1:]) for shape in shapes]
    sizes = [shape[0] * (fan + 1) for shape, fan in zip(shapes, fans, strict=True)]
    drawn = sizes[:-1] if zero else sizes
    noise = jnp.split(jax.random.uniform(key, (sum(drawn),), minval=-1.0), np.cumsum(drawn)[:-1]) if drawn else []
    noise += [jnp.zeros(size) for size in sizes[len(drawn) :]]
    layers = []
    for shape, fan, values in zip(shapes, fans, noise, strict=True):
        weight, bias = jnp.split(values / np.sqrt(max(fan, 1)), [shape[0] * fan])
        layers.append((weight.reshape(shape), bias))
    return layers


class MLP(eqx.Module):
    """Perceptron of ``x`` ``(..., in_dim)`` and an optional context; its last layer starts at zero unless told not to.

    The context enters the first layer. Its batch axes broadcast against those of ``x`` without being copied.

    :param in_dim: size of the input, may be 0 (then only the context counts).
    :param hidden_dims: widths of the hidden layers.
    :param out_dim: size of the output ``(..., out_dim)``.
    :param context_dim: size of the context ``(..., context_dim)``, 0 for none.
    :param activation: one of ``conditioners.ACTIVATIONS``. The smooth ones suit guides which NUTS runs through.
    :param zero: whether the last layer starts at zero.
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
        zero: bool = True,
        *,
        key: Array,
    ):
        check_network(hidden_dims, context_dim, activation)
        dims = (in_dim + context_dim, *hidden_dims, out_dim)
        shapes = list(zip(dims[1:], dims, strict=False))
        self.layers = tuple(Linear(*weights) for weights in first_weights(shapes, key, zero))
        self.in_dim, self.context_dim, self.activation = in_dim, context_dim, activation

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        check_context(context, self.context_dim, type(self).__name__)
        layers = [(layer.weight, layer.bias) for layer in self.layers]
        return _perceptron(self.activation, x, context, layers, self._masks())

    def _masks(self) -> list[np.ndarray | None]:
        """Which weights of each layer count."""
        return [None] * len(self.layers)


# what the gradient needs of activations, masks and the first product, where it is the cheapest, is computed again from
# the other products: less to write and to read
@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("product"),
    prevent_cse=False,
    static_argnums=0,
)
def _perceptron(
    activation: str,
    x: Array,
    context: Array | None,
    layers: list[tuple[Array, Array]],
    masks: list[np.ndarray | None],
) -> Array:
    (first, bias), *others = [
        (weight if mask is None else jnp.where(mask, weight, 0), bias)
        for (weight, bias), mask in zip(layers, masks, strict=True)
    ]
    of_x = first[:, : x.shape[-1]].T
    if len(of_x) < of_x.shape[1]:  # the gradient as a product of few rows: that of few columns takes far longer
        of_x = lax.optimization_barrier(of_x)
    h = x @ of_x + bias
    if context is not None:
        h = h + context @ first[:, x.shape[-1] :].T
    if len(first) < first.shape[1]:
        h = checkpoint_name(h, "product")
    for weight, bias in others:
        h = checkpoint_name(ACTIVATIONS[activation](h) @ weight.T + bias, "product")
    return h


class MaskedMLP(MLP):
    """Perceptron whose output ``i`` depends on ``x[..., :i]`` (and the context) only (Germain et al. 2015, MADE).

    Its output ``(..., num_params * dim)`` is laid out as ``(num_params, dim)``.

    :param dim: size of the input.
    :param num_params: outputs per input.
    :param num_features: numbers by which an input is given, laid out as ``(num_features, dim)``.
    :param ordering: the elements from the first to the last in the chain; the natural order unless given.
    """

    num_features: int = eqx.field(static=True)
    ordering: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int],
        num_params: int,
        context_dim: int = 0,
        activation: str = "silu",
        num_features: int = 1,
        ordering: Sequence[int] | None = None,
        *,
        key: Array,
    ):
        super().__init__(num_features * dim, hidden_dims, num_params * dim, context_dim, activation, key=key)
        self.num_features = num_features
        self.ordering = None if ordering is None else check_ordering(dim, ordering)

    def _masks(self) -> list[np.ndarray | None]:
        sizes = [layer.bias.shape[-1] for layer in self.layers]
        dim = self.in_dim // self.num_features
        num_params = sizes[-1] // dim
        masks = autoregressive_masks(dim, sizes[:-1], num_params, self.context_dim, self.num_features, self.ordering)
        return list(masks)


class Convolution(eqx.Module):
    """A convolution that keeps height and width; ``weight`` ``(out, in, size, size)``."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """``(..., in, height, width)`` to ``(..., out, height, width)``."""
        bias = self.bias[:, None, None]
        if not x.shape[-3]:
            return jnp.broadcast_to(bias, (*x.shape[:-3], len(self.bias), *x.shape[-2:]))
        images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        y = lax.conv(images, self.weight, (1, 1), "SAME")
        return y.reshape(*x.shape[:-3], *y.shape[1:]) + bias


class CNN(eqx.Module):
    """Convolutional network of an image, which travels as a vector; its last layer starts at zero (Kingma & Dhariwal
    2018, section B): 3 x 3 convolutions at both ends, 1 x 1 between them (all 1 x 1 where the image is one pixel).

    The input is ``(..., channels * height * width)``, the output ``(..., out_channels * height * width)``, both channel
    by channel. A context enters the first layer, the same for every pixel.

    :param shape: of the input: ``(channels, height, width)``; channels may be 0 (then only the context counts).
    :param hidden_dims: channels of the hidden layers.
    :param out_channels: channels of the output.
    :param context_dim: size of the context ``(..., context_dim)``, 0 for none.
    :param activation: one of ``conditioners.ACTIVATIONS``.
    """

    layers: tuple[Convolution, ...]
    context: Linear | None
    shape: tuple[int, ...] = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        hidden_dims: Sequence[int],
        out_channels: int,
        context_dim: int = 0,
        activation: str = "silu",
        *,
        key: Array,
    ):
        check_network(hidden_dims, context_dim, activation)
        self.shape, self.context_dim, self.activation = check_image(shape), context_dim, activation
        dims, sizes = (shape[0], *hidden_dims, out_channels), kernel_sizes(self.shape, len(hidden_dims) + 1)
        shapes = [(o, i, size, size) for i, o, size in zip(dims, dims[1:], sizes, strict=False)]
        of_image, of_context = jax.random.split(key)
        self.layers = tuple(Convolution(*weights) for weights in first_weights(shapes, of_image))
        self.context = None
        if context_dim:
            self.context = Linear(*first_weights([(dims[1], context_dim)], of_context, zero=not hidden_dims)[0])

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        check_context(context, self.context_dim, type(self).__name__)
        h = self.layers[0](x.reshape(*x.shape[:-1], *self.shape))
        if context is not None and self.context is not None:
            h = h + (context @ self.context.weight.T + self.context.bias)[..., None, None]
        for layer in self.layers[1:]:
            h = layer(ACTIVATIONS[self.activation](h))
        return h.reshape(*h.shape[:-3], math.prod(h.shape[-3:]))


def autoregressive_masks(
    dim: int,
    hidden_dims: Sequence[int],
    num_params: int,
    context_dim: int,
    num_features: int = 1,
    ordering: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Masks ``(out, in)`` of the weights of a :class:`MaskedMLP` (Germain et al. 2015, section 4)."""
    rank = np.arange(dim) if ordering is None else np.argsort(ordering)
    degrees = [np.concatenate([np.tile(rank, num_features), np.full(context_dim, -1)])]
    degrees += [np.arange(width) % max(dim - 1, 1) for width in hidden_dims]
    masks = [after[:, None] >= before for before, after in zip(degrees, degrees[1:], strict=False)]
    return [*masks, np.tile(rank, num_params)[:, None] > degrees[-1]]


def kernel_sizes(shape: Sequence[int], num_layers: int) -> list[int]:
    """Sizes of the kernels of a :class:`CNN`: 3 at both ends and 1 between; 1 for an image of one pixel."""
    end = 3 if shape[1] * shape[2] > 1 else 1
    return [end if n in (0, num_layers - 1) else 1 for n in range(num_layers)]


def check_image(shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape as a tuple; a ``ValueError`` unless it is ``(channels, height, width)``."""
    if isinstance(shape, int) or len(shape) != 3 or shape[0] < 0 or min(shape[1:]) < 1:
        raise ValueError(f"shape must be (channels, height, width), but got {shape!r}.")
    return int(shape[0]), int(shape[1]), int(shape[2])


def check_ordering(dim: int, ordering: Sequence[int]) -> tuple[int, ...]:
    """The ordering as a tuple; a ``ValueError`` unless it holds each of ``0 .. dim - 1`` once."""
    if sorted(ordering) != list(range(dim)):
        raise ValueError(f"ordering must hold each of 0 .. {dim - 1} once, but got {list(ordering)}.")
    return tuple(int(i) for i in ordering)


def check_network(hidden_dims: Sequence[int], context_dim: int, activation: str) -> None:
    """Raises a ``ValueError`` that names the argument with which no conditioner can be built."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, but got {activation!r}.")
    if isinstance(hidden_dims, int) or any(width < 1 for width in hidden_dims):
        raise ValueError(f"hidden_dims must be a sequence of positive integers, but got {hidden_dims!r}.")
    if context_dim < 0:
        raise ValueError(f"context_dim must not be negative, but got {context_dim}.")
