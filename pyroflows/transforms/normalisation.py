"""Layers that take their location and scale from data: ActNorm and BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyroflows.conditioners import check_image
from pyroflows.transform_module import TransformModule


class ActNorm(TransformModule):
    """``y = loc + exp(log_scale) x``, an element or a channel each; :func:`initialised` sets both from a batch.

    Kingma & Dhariwal 2018 (Glow), section 3.1. Until it is set from data it is the identity. ``log |det|`` is the sum
    of ``log_scale``, times the pixels of a channel. Costs ``O(dim)`` both ways.

    :param shape: size of ``x``, or the shape ``(channels, height, width)`` of the image that ``x`` is: then ``loc`` and
        ``log_scale`` are those of the channels.
    """

    def __init__(self, shape: int | Sequence[int]):
        super().__init__()
        channels, self.pixels = channels_of(shape)
        self.dim = channels * self.pixels
        self.loc, self.log_scale = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self._fit: str | None = None  # what a pass takes from the batch: see _fitting

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum(-1) * self.pixels).expand(x.shape[:-1])

    def _start(self, x: Tensor, inverse: bool) -> None:
        mean, log_std = _statistics(x, self.pixels, 1e-12)
        log_scale = log_std if inverse else -log_std
        self.log_scale.copy_(log_scale)
        self.loc.copy_(mean if inverse else -mean * log_scale.exp())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._fit == "start":
            self._start(x, inverse=False)
        y = torch.addcmul(self.loc[:, None], x.unflatten(-1, (-1, self.pixels)), self.log_scale.exp()[:, None])
        return y.flatten(-2), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._fit == "start":
            self._start(y, inverse=True)
        x = (y.unflatten(-1, (-1, self.pixels)) - self.loc[:, None]) * (-self.log_scale).exp()[:, None]
        return x.flatten(-2), -self._log_det(y)


class BatchNorm(TransformModule):
    """The inverse, the direction of a density, is ``x = loc + exp(log_scale) (y - running_mean) / running_std``.

    Dinh et al. 2017, section 3.7; Papamakarios et al. 2017, section B.1. Both directions use the running statistics and
    are each other's inverse; nothing changes behind a call. To train with the statistics of the batch, take the density
    by :func:`with_batch_statistics`, which also moves the running ones. These are in the state as ``running_mean`` and
    ``running_log_var``, and are not trained by gradients. Costs ``O(dim)`` both ways. Starts at the identity.

    :param shape: size of ``x``, or the shape ``(channels, height, width)`` of the image that ``x`` is: then a channel
        shares its statistics.
    :param momentum: weight of the batch in the running statistics, in ``(0, 1]``.
    :param eps: added to the variance of a batch.
    """

    running_mean: Tensor
    running_log_var: Tensor

    def __init__(self, shape: int | Sequence[int], momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        check_batch_norm(momentum, eps)
        channels, self.pixels = channels_of(shape)
        self.dim = channels * self.pixels
        self.momentum, self.eps = momentum, eps
        self.loc, self.log_scale = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_log_var", torch.zeros(channels))
        self._fit: str | None = None

    def _update(self, mean: Tensor, log_var: Tensor) -> None:
        weight = 1.0 if self._fit == "start" else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean, weight)
            self.running_log_var.copy_(self.running_log_var.exp().lerp(log_var.exp(), weight).log())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._fit:
            raise ValueError(TURNED_ROUND)
        log_scale = 0.5 * self.running_log_var - self.log_scale
        y = x.unflatten(-1, (-1, self.pixels)) - self.loc[:, None]
        y = torch.addcmul(self.running_mean[:, None], y, log_scale.exp()[:, None])
        return y.flatten(-2), (log_scale.sum(-1) * self.pixels).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_var = self.running_mean, self.running_log_var
        if self._fit:
            mean, log_std = _statistics(y, self.pixels, self.eps)
            log_var = 2 * log_std
            self._update(mean, log_var)
        log_scale = self.log_scale - 0.5 * log_var
        x = (y.unflatten(-1, (-1, self.pixels)) - mean[:, None]) * log_scale.exp()[:, None] + self.loc[:, None]
        return x.flatten(-2), (log_scale.sum(-1) * self.pixels).expand(y.shape[:-1])


def initialised(flow: TransformModule, y: Tensor, context: Tensor | None = None) -> TransformModule:
    """Passes a batch ``y`` ``(..., dim)`` through ``flow`` in the density direction (its inverse) and sets every
    :class:`ActNorm` on the way to hand on zero mean and unit variance, and every :class:`BatchNorm`'s statistics to
    those of its batch. In place; returns ``flow``.
    """
    check_batch(y, "initialised")
    with torch.no_grad(), _fitting(flow, "start"):
        flow.inverse_and_log_det(y, context)
    return flow


def with_batch_statistics(
    flow: TransformModule, y: Tensor, context: Tensor | None = None
) -> tuple[TransformModule, Tensor, Tensor]:
    """The density direction in training: ``x`` and ``log |det dx/dy|`` with every :class:`BatchNorm` using the batch's
    own statistics (gradients flow through them). Its running statistics move towards them, in place.

    :returns: ``(flow, x, log_det)``.
    """
    check_batch(y, "with_batch_statistics")
    with _fitting(flow, "update"):
        x, log_det = flow.inverse_and_log_det(y, context)
    return flow, x, log_det


@contextmanager
def _fitting(flow: TransformModule, how: str) -> Iterator[None]:
    layers = [layer for layer in flow.modules() if isinstance(layer, ActNorm | BatchNorm)]
    try:
        for layer in layers:
            layer._fit = how
        yield
    finally:
        for layer in layers:
            layer._fit = None


def _statistics(x: Tensor, pixels: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of each channel of ``x`` ``(..., channels * pixels)``."""
    channels = x.unflatten(-1, (-1, pixels)).movedim(-2, 0).flatten(1)
    var, mean = torch.var_mean(channels, 1, correction=0)
    return mean, 0.5 * (var + eps).log()


TURNED_ROUND = (
    "BatchNorm: it normalises in its inverse direction, but here the density direction of the flow runs it forward. "
    "Put it outside of Inverse(...), or use ActNorm, which can be set in either direction."
)


def channels_of(shape: int | Sequence[int]) -> tuple[int, int]:
    """Channels, and pixels of each, of a vector's size or an image's shape."""
    if isinstance(shape, int):
        return shape, 1
    channels, height, width = check_image(shape)
    return channels, height * width


def check_batch(y: Tensor, owner: str) -> None:
    """Raises a ``ValueError`` unless ``y`` is a batch that has a variance."""
    if math.prod(y.shape[:-1]) < 2:
        raise ValueError(f"{owner}: y must be a batch of at least two vectors, but got shape {tuple(y.shape)}.")


def check_batch_norm(momentum: float, eps: float) -> None:
    """Raises a ``ValueError`` that names the argument with which no :class:`BatchNorm` can be built."""
    if not 0 < momentum <= 1:
        raise ValueError(f"BatchNorm: momentum must lie in (0, 1], but got {momentum}.")
    if not eps > 0:
        raise ValueError(f"BatchNorm: eps must be positive, but got {eps}.")
