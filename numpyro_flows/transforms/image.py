"""Layers for images (Kingma & Dhariwal 2018, Glow). An image travels as a vector, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.conditioners import CNN, check_image
from numpyro_flows.transform_module import TransformModule
from numpyro_flows.transforms.coupling import Coupling
from numpyro_flows.transforms.linear import LULinear
from numpyro_flows.transforms.permutation import Permutation
from numpyro_flows.univariate import Univariate


class Squeeze(Permutation):
    """Each 2 x 2 pixels of a channel become one pixel of four channels (Dinh et al. 2017, section 3.6).

    ``(channels, height, width) -> (4 channels, height / 2, width / 2)``; log-determinant zero.

    :param shape: of the image that ``x`` is: ``(channels, height, width)``, the last two even.
    """

    out_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(self, shape: Sequence[int]):
        super().__init__(squeezed(shape))
        channels, height, width = check_image(shape)
        self.out_shape = (4 * channels, height // 2, width // 2)


class InvertibleConv1x1(TransformModule):
    """A linear map of the channels, the same at every pixel, as ``P L U`` (Kingma & Dhariwal 2018, section 3.2).

    ``log |det|`` is the number of pixels times the sum of ``linear.log_diag``. Costs ``O(channels^2)`` a pixel, both
    ways. Starts at ``P``, the identity unless a permutation is given.

    :param shape: of the image that ``x`` is: ``(channels, height, width)``.
    :param permutation: ``P``, of the channels.
    """

    linear: LULinear
    dim: int = eqx.field(static=True)
    pixels: int = eqx.field(static=True)

    def __init__(self, shape: Sequence[int], permutation: Sequence[int] | None = None):
        channels, height, width = check_image(shape)
        self.dim, self.pixels = channels * height * width, height * width
        self.linear = LULinear(channels, permutation)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_det = self.linear.forward_and_log_det(self._pixels(x))
        return y.mT.reshape(x.shape), log_det[..., 0] * self.pixels

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x, log_det = self.linear.inverse_and_log_det(self._pixels(y))
        return x.mT.reshape(y.shape), log_det[..., 0] * self.pixels

    def _pixels(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.pixels, self.pixels).mT


class ImageCoupling(Coupling):
    """Coupling of the first half of an image's channels with the second, by a convolutional conditioner.

    An image of one channel has nothing to condition on (:class:`Squeeze` it first). One network pass both ways.

    :param shape: of the image that ``x`` is: ``(channels, height, width)``.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: channels of the conditioner's hidden layers.
    :param context_dim: size of the context, 0 for none.
    :param swap: returns the halves exchanged, so that equal layers alternate which half they transform.
    :param activation: the conditioner's activation.
    """

    conditioner: CNN  # type: ignore[assignment]

    def __init__(
        self,
        shape: Sequence[int],
        univariate: Univariate,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        swap: bool = True,
        activation: str = "silu",
        key: Array,
    ):
        channels, *size = check_image(shape)
        kept, pixels = channels // 2, math.prod(size)
        self.dim, self.split, self.univariate, self.swap = channels * pixels, kept * pixels, univariate, swap
        self.order = None
        out_channels = univariate.num_params * (channels - kept)
        self.conditioner = CNN((kept, *size), hidden_dims, out_channels, context_dim, activation, key=key)


class Leading(TransformModule):
    """Applies ``transform`` to the first ``size`` elements and hands on the others: what is factored out at a scale.

    Dinh et al. 2017, section 3.6. Costs those of ``transform``.

    :param transform: a map of vectors of ``size`` elements.
    :param size: their number.
    """

    transform: TransformModule
    size: int = eqx.field(static=True)

    def __init__(self, transform: TransformModule, size: int):
        if size < 1:
            raise ValueError(f"Leading: size must be at least 1, but got {size}.")
        self.transform, self.size = transform, size

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_det = self.transform.forward_and_log_det(x[..., : self.size], context)
        return _joined(y, x[..., self.size :]), log_det

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x, log_det = self.transform.inverse_and_log_det(y[..., : self.size], context)
        return _joined(x, y[..., self.size :]), log_det

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Leading, Array, Array]:
        inner, y, log_det = self.transform._fitted(x[..., : self.size], context, inverse, start)
        return Leading(inner, self.size), _joined(y, x[..., self.size :]), log_det


def _joined(first: Array, rest: Array) -> Array:
    return jnp.concatenate([first, jnp.broadcast_to(rest, (*first.shape[:-1], rest.shape[-1]))], -1)


def squeezed(shape: Sequence[int]) -> list[int]:
    """The permutation of a :class:`Squeeze`."""
    channels, height, width = check_image(shape)
    if height % 2 or width % 2:
        raise ValueError(f"Squeeze: shape must have an even height and width, but got {tuple(shape)}.")
    index = np.arange(channels * height * width).reshape(channels, height // 2, 2, width // 2, 2)
    return index.transpose(0, 2, 4, 1, 3).ravel().tolist()
