"""Layers for images (Kingma & Dhariwal 2018, Glow). An image travels as a vector, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyroflows.conditioners import CNN, check_image
from pyroflows.transform_module import TransformModule
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.linear import LULinear
from pyroflows.transforms.permutation import Permutation
from pyroflows.univariate import Univariate


class Squeeze(Permutation):
    """Each 2 x 2 pixels of a channel become one pixel of four channels (Dinh et al. 2017, section 3.6).

    ``(channels, height, width) -> (4 channels, height / 2, width / 2)``; log-determinant zero.

    :param shape: of the image that ``x`` is: ``(channels, height, width)``, the last two even.
    """

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

    def __init__(self, shape: Sequence[int], permutation: Sequence[int] | None = None):
        super().__init__()
        channels, height, width = check_image(shape)
        self.dim, self.pixels = channels * height * width, height * width
        self.linear = LULinear(channels, permutation)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.linear.forward_and_log_det(x.unflatten(-1, (-1, self.pixels)).mT)
        return y.mT.flatten(-2), log_det[..., 0] * self.pixels

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.linear.inverse_and_log_det(y.unflatten(-1, (-1, self.pixels)).mT)
        return x.mT.flatten(-2), log_det[..., 0] * self.pixels


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
    ):
        channels, *size = check_image(shape)
        kept, pixels = channels // 2, math.prod(size)
        TransformModule.__init__(self)
        self.dim, self.split, self.univariate, self.swap = channels * pixels, kept * pixels, univariate, swap
        self.order = self.place = None
        out_channels = univariate.num_params * (channels - kept)
        self.conditioner = CNN((kept, *size), hidden_dims, out_channels, context_dim, activation)


class Leading(TransformModule):
    """Applies ``transform`` to the first ``size`` elements and hands on the others: what is factored out at a scale.

    Dinh et al. 2017, section 3.6. Costs those of ``transform``.

    :param transform: a map of vectors of ``size`` elements.
    :param size: their number.
    """

    def __init__(self, transform: TransformModule, size: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"Leading: size must be at least 1, but got {size}.")
        self.transform, self.size = transform, size

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.transform.forward_and_log_det(x[..., : self.size], context)
        return _joined(y, x[..., self.size :]), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.transform.inverse_and_log_det(y[..., : self.size], context)
        return _joined(x, y[..., self.size :]), log_det


def _joined(first: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first, rest.expand(*first.shape[:-1], rest.shape[-1])], -1)


def squeezed(shape: Sequence[int]) -> list[int]:
    """The permutation of a :class:`Squeeze`."""
    channels, height, width = check_image(shape)
    if height % 2 or width % 2:
        raise ValueError(f"Squeeze: shape must have an even height and width, but got {tuple(shape)}.")
    index = np.arange(channels * height * width).reshape(channels, height // 2, 2, width // 2, 2)
    return index.transpose(0, 2, 4, 1, 3).ravel().tolist()
