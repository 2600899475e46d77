"""Networks ``theta(x, context)`` that compute the parameters of the univariate maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.transform_module import check_context

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu_,
    "tanh": torch.tanh,
    "elu": F.elu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
}


class Linear(nn.Module):
    """``weight x + bias`` over the last axis; ``weight`` ``(out, in)``, uniform in ``+-1/sqrt(in)`` at the start."""

    def __init__(self, in_dim: int, out_dim: int, zero: bool = False):
        super().__init__()
        limit = 0.0 if zero else max(in_dim, 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(out_dim).uniform_(-limit, limit))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``weight x + bias``, of a bias that may have batch axes."""
    return F.linear(x, weight, bias) if bias.ndim == 1 else F.linear(x, weight) + bias


class MLP(nn.Module):
    """Perceptron of ``x`` ``(..., in_dim)`` and an optional context; its last layer starts at zero unless told not to.

    The context enters the first layer. Its batch axes broadcast against those of ``x`` without being copied.

    :param in_dim: size of the input, may be 0 (then only the context counts).
    :param hidden_dims: widths of the hidden layers.
    :param out_dim: size of the output ``(..., out_dim)``.
    :param context_dim: size of the context ``(..., context_dim)``, 0 for none.
    :param activation: one of ``conditioners.ACTIVATIONS``. The smooth ones suit guides which NUTS runs through.
    :param zero: whether the last layer starts at zero.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        context_dim: int = 0,
        activation: str = "silu",
        zero: bool = True,
    ):
        super().__init__()
        check_network(hidden_dims, context_dim, activation)
        dims = (in_dim + context_dim, *hidden_dims, out_dim)
        last = len(dims) - 2
        self.layers = nn.ModuleList(
            Linear(i, o, zero=zero and n == last) for n, (i, o) in enumerate(zip(dims, dims[1:], strict=False))
        )
        self.in_dim, self.context_dim, self.activation = in_dim, context_dim, activation

    def _weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(context, self.context_dim, type(self).__name__)
        weights, activation = self._weights(), ACTIVATIONS[self.activation]
        biases: list[Tensor] = [layer.bias for layer in self.layers]  # type: ignore[misc]
        if context is None:
            h = F.linear(x, weights[0], biases[0])
        else:
            h = F.linear(x, weights[0][:, : self.in_dim], biases[0])
            h = h + F.linear(context, weights[0][:, self.in_dim :])
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            h = F.linear(activation(h), weight, bias)
        return h


class MaskedMLP(MLP):
    """Perceptron whose output ``i`` depends on ``x[..., :i]`` (and the context) only (Germain et al. 2015, MADE).

    Its output ``(..., num_params * dim)`` is laid out as ``(num_params, dim)``.

    :param dim: size of the input.
    :param num_params: outputs per input.
    :param num_features: numbers by which an input is given, laid out as ``(num_features, dim)``.
    :param ordering: the elements from the first to the last in the chain; the natural order unless given.
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int],
        num_params: int,
        context_dim: int = 0,
        activation: str = "silu",
        num_features: int = 1,
        ordering: Sequence[int] | None = None,
    ):
        ordering = None if ordering is None else check_ordering(dim, ordering)
        super().__init__(num_features * dim, hidden_dims, num_params * dim, context_dim, activation)
        masks = autoregressive_masks(dim, hidden_dims, num_params, context_dim, num_features, ordering)
        for n, mask in enumerate(masks):
            self.register_buffer(f"mask_{n}", torch.tensor(mask, dtype=torch.get_default_dtype()), persistent=False)

    def _weights(self) -> list[Tensor]:
        return [layer.weight * getattr(self, f"mask_{n}") for n, layer in enumerate(self.layers)]  # type: ignore


class Convolution(nn.Module):
    """A convolution that keeps height and width; ``weight`` ``(out, in, size, size)`` as :class:`Linear`'s."""

    def __init__(self, in_channels: int, out_channels: int, size: int, zero: bool = False):
        super().__init__()
        limit = 0.0 if zero else max(in_channels * size * size, 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, size, size).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-limit, limit))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in, height, width)`` to ``(..., out, height, width)``."""
        if not x.shape[-3]:
            return self.bias[:, None, None].expand(*x.shape[:-3], len(self.bias), *x.shape[-2:])
        images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        y = F.conv2d(images, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return y.reshape(*x.shape[:-3], *y.shape[1:])


class CNN(nn.Module):
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

    def __init__(
        self,
        shape: Sequence[int],
        hidden_dims: Sequence[int],
        out_channels: int,
        context_dim: int = 0,
        activation: str = "silu",
    ):
        super().__init__()
        check_network(hidden_dims, context_dim, activation)
        self.shape, self.context_dim, self.activation = check_image(shape), context_dim, activation
        dims, sizes = (shape[0], *hidden_dims, out_channels), kernel_sizes(self.shape, len(hidden_dims) + 1)
        last = len(dims) - 2
        self.layers = nn.ModuleList(
            Convolution(i, o, size, zero=n == last)
            for n, (i, o, size) in enumerate(zip(dims, dims[1:], sizes, strict=False))
        )
        self.context = Linear(context_dim, dims[1], zero=last == 0) if context_dim else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(context, self.context_dim, type(self).__name__)
        h = self.layers[0](x.unflatten(-1, self.shape))
        if self.context is not None:
            h = h + F.linear(context, self.context.weight, self.context.bias)[..., None, None]  # type: ignore[arg-type]
        for layer in self.layers[1:]:
            h = layer(ACTIVATIONS[self.activation](h))
        return h.flatten(-3)


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
