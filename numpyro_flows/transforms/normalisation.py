"""Layers that take their location and scale from data: ActNorm and BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax

from numpyro_flows.conditioners import check_image
from numpyro_flows.transform_module import TransformModule


class ActNorm(TransformModule):
    """``y = loc + exp(log_scale) x``, an element or a channel each; :func:`initialised` sets both from a batch.

    Kingma & Dhariwal 2018 (Glow), section 3.1. Until it is set from data it is the identity. ``log |det|`` is the sum
    of ``log_scale``, times the pixels of a channel. Costs ``O(dim)`` both ways.

    :param shape: size of ``x``, or the shape ``(channels, height, width)`` of the image that ``x`` is: then ``loc`` and
        ``log_scale`` are those of the channels.
    """

    loc: Array
    log_scale: Array
    dim: int = eqx.field(static=True)
    pixels: int = eqx.field(static=True)

    def __init__(self, shape: int | Sequence[int]):
        channels, self.pixels = channels_of(shape)
        self.dim = channels * self.pixels
        self.loc, self.log_scale = jnp.zeros(channels), jnp.zeros(channels)

    def _log_det(self, x: Array) -> Array:
        return jnp.broadcast_to(self.log_scale.sum(-1) * self.pixels, x.shape[:-1])

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y = self.loc[:, None] + jnp.exp(self.log_scale)[:, None] * _channels(x, self.pixels)
        return y.reshape(x.shape), self._log_det(x)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x = (_channels(y, self.pixels) - self.loc[:, None]) * jnp.exp(-self.log_scale)[:, None]
        return x.reshape(y.shape), -self._log_det(y)

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[ActNorm, Array, Array]:
        layer = self
        if start:
            mean, log_std = _statistics(x, self.pixels, 1e-12)
            log_scale = log_std if inverse else -log_std
            loc = mean if inverse else -mean * jnp.exp(log_scale)
            layer = eqx.tree_at(lambda layer: (layer.loc, layer.log_scale), self, (loc, log_scale))
        return layer, *(layer.inverse_and_log_det if inverse else layer.forward_and_log_det)(x)


class BatchNorm(TransformModule):
    """The inverse, the direction of a density, is ``x = loc + exp(log_scale) (y - running_mean) / running_std``.

    Dinh et al. 2017, section 3.7; Papamakarios et al. 2017, section B.1. Both directions use the running statistics and
    are each other's inverse; nothing changes behind a call. To train with the statistics of the batch, take the density
    by :func:`with_batch_statistics`, which also moves the running ones. These are in the state as ``running_mean`` and
    ``running_log_var``, and are not trained by gradients (these are zero: keep weight decay off them). Costs ``O(dim)``
    both ways. Starts at the identity.

    :param shape: size of ``x``, or the shape ``(channels, height, width)`` of the image that ``x`` is: then a channel
        shares its statistics.
    :param momentum: weight of the batch in the running statistics, in ``(0, 1]``.
    :param eps: added to the variance of a batch.
    """

    loc: Array
    log_scale: Array
    running_mean: Array
    running_log_var: Array
    dim: int = eqx.field(static=True)
    pixels: int = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, shape: int | Sequence[int], momentum: float = 0.1, eps: float = 1e-5):
        check_batch_norm(momentum, eps)
        channels, self.pixels = channels_of(shape)
        self.dim = channels * self.pixels
        self.momentum, self.eps = momentum, eps
        self.loc, self.log_scale = jnp.zeros(channels), jnp.zeros(channels)
        self.running_mean, self.running_log_var = jnp.zeros(channels), jnp.zeros(channels)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        mean, log_var = lax.stop_gradient((self.running_mean, self.running_log_var))
        log_scale = 0.5 * log_var - self.log_scale
        y = (_channels(x, self.pixels) - self.loc[:, None]) * jnp.exp(log_scale)[:, None] + mean[:, None]
        return y.reshape(x.shape), jnp.broadcast_to(log_scale.sum(-1) * self.pixels, x.shape[:-1])

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._normalised(y, *lax.stop_gradient((self.running_mean, self.running_log_var)))

    def _normalised(self, y: Array, mean: Array, log_var: Array) -> tuple[Array, Array]:
        log_scale = self.log_scale - 0.5 * log_var
        x = (_channels(y, self.pixels) - mean[:, None]) * jnp.exp(log_scale)[:, None] + self.loc[:, None]
        return x.reshape(y.shape), jnp.broadcast_to(log_scale.sum(-1) * self.pixels, y.shape[:-1])

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[BatchNorm, Array, Array]:
        if not inverse:
            raise ValueError(TURNED_ROUND)
        mean, log_std = _statistics(x, self.pixels, self.eps)
        weight = 1.0 if start else self.momentum
        var = (1 - weight) * jnp.exp(self.running_log_var) + weight * jnp.exp(2 * log_std)
        running = lax.stop_gradient(((1 - weight) * self.running_mean + weight * mean, jnp.log(var)))
        layer = eqx.tree_at(lambda layer: (layer.running_mean, layer.running_log_var), self, running)
        return layer, *self._normalised(x, mean, 2 * log_std)


def initialised(flow: TransformModule, y: Array, context: Array | None = None) -> TransformModule:
    """Passes a batch ``y`` ``(..., dim)`` through ``flow`` in the density direction (its inverse) and sets every
    :class:`ActNorm` on the way to hand on zero mean and unit variance, and every :class:`BatchNorm`'s statistics to
    those of its batch. Returns the new flow.
    """
    check_batch(y, "initialised")
    return flow._fitted(y, context, inverse=True, start=True)[0]


def with_batch_statistics(
    flow: TransformModule, y: Array, context: Array | None = None
) -> tuple[TransformModule, Array, Array]:
    """The density direction in training: ``x`` and ``log |det dx/dy|`` with every :class:`BatchNorm` using the batch's
    own statistics (gradients flow through them). Its running statistics move towards them in the flow that is returned.

    :returns: ``(flow, x, log_det)``.
    """
    check_batch(y, "with_batch_statistics")
    return flow._fitted(y, context, inverse=True, start=False)


def _channels(x: Array, pixels: int) -> Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // pixels, pixels)


def _statistics(x: Array, pixels: int, eps: float) -> tuple[Array, Array]:
    """Mean and log standard deviation of each channel of ``x`` ``(..., channels * pixels)``."""
    channels = _channels(x, pixels)
    axes = (*range(channels.ndim - 2), -1)
    return channels.mean(axes), 0.5 * jnp.log(channels.var(axes) + eps)


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


def check_batch(y: Array, owner: str) -> None:
    """Raises a ``ValueError`` unless ``y`` is a batch that has a variance."""
    if math.prod(y.shape[:-1]) < 2:
        raise ValueError(f"{owner}: y must be a batch of at least two vectors, but got shape {tuple(y.shape)}.")


def check_batch_norm(momentum: float, eps: float) -> None:
    """Raises a ``ValueError`` that names the argument with which no :class:`BatchNorm` can be built."""
    if not 0 < momentum <= 1:
        raise ValueError(f"BatchNorm: momentum must lie in (0, 1], but got {momentum}.")
    if not eps > 0:
        raise ValueError(f"BatchNorm: eps must be positive, but got {eps}.")
