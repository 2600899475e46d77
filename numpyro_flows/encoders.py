"""Encoders: networks from a data set to the context of an amortised guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_flows.conditioners import MLP

_LINEAR = 3.0  # standard deviations up to which standardised data stay as they are


class MLPEncoder(eqx.Module):
    """Perceptron of data ``(..., in_dim)``, one vector for each data set; the encoding is ``(..., out_dim)``.

    :param in_dim: size of a data set.
    :param out_dim: size of the encoding.
    :param hidden_dims: widths of the hidden layers.
    :param activation: one of ``conditioners.ACTIVATIONS``.
    """

    network: MLP

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        activation: str = "silu",
        key: Array,
    ):
        check_encoder(in_dim, out_dim)
        self.network = MLP(in_dim, hidden_dims, out_dim, activation=activation, zero=False, key=key)

    def __call__(self, x: Array) -> Array:
        check_features(jnp.shape(x), self.network.in_dim, 1, type(self).__name__)
        return self.network(x)


class SetEncoder(eqx.Module):
    """A permutation-invariant encoder of sets ``(..., n, in_dim)`` (Zaheer et al. 2017, deep sets, theorem 2).

    One network for every element, the mean over the elements, and a second network of that mean. Sets may differ in
    size: in different calls, or padded to one size with a mask that says which elements are there.

    :param in_dim: numbers of an element.
    :param out_dim: size of the encoding ``(..., out_dim)``.
    :param hidden_dims: widths of the hidden layers, in both networks.
    :param pooled_dim: numbers of which the mean is taken; ``out_dim`` unless given.
    :param size_feature: gives the second network the logarithm of one plus the set's size, which the mean is blind to,
        and a posterior's width is not.
    :param activation: one of ``conditioners.ACTIVATIONS``.
    """

    element: MLP
    pooled: MLP
    size_feature: bool = eqx.field(static=True)

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        pooled_dim: int | None = None,
        size_feature: bool = True,
        activation: str = "silu",
        key: Array,
    ):
        pooled_dim = out_dim if pooled_dim is None else pooled_dim
        check_encoder(in_dim, out_dim, pooled_dim)
        first, second = jax.random.split(key)
        self.element = MLP(in_dim, hidden_dims, pooled_dim, activation=activation, zero=False, key=first)
        width = pooled_dim + size_feature
        self.pooled = MLP(width, hidden_dims, out_dim, activation=activation, zero=False, key=second)
        self.size_feature = size_feature

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """The encoding ``(..., out_dim)``.

        :param x: sets ``(..., n, in_dim)``.
        :param mask: which elements count ``(..., n)``, all unless given. What stands in the others does not matter.
        """
        check_features(jnp.shape(x), self.element.in_dim, 2, type(self).__name__)
        x = jnp.asarray(x)
        present = jnp.ones(x.shape[:-1], bool) if mask is None else jnp.asarray(mask, bool)
        check_mask(present.shape, x.shape)
        there = present[..., None]
        h = self.element(jnp.where(there, x, 0))  # a NaN in the padding would get into the gradient
        size = there.sum(-2).astype(h.dtype)
        mean = jnp.where(there, h, 0).sum(-2) / jnp.maximum(size, 1)
        return self.pooled(jnp.concatenate([mean, jnp.log1p(size)], -1) if self.size_feature else mean)


class StandardizedEncoder(eqx.Module):
    """An encoder of standardised data: ``encoder(*data)``, each number with a location and scale that are not trained.

    Within three scales of the location, data enter as they are, up to that shift and factor; beyond, the distance grows
    as its logarithm, so that a single wild number of a heavy-tailed model cannot rule the network. Location and scale
    are one pair for each entry of the last axis: of a vector's elements, or of the features of a set's elements.

    :param encoder: takes arrays of one leading axis of data sets to encodings ``(batch, c)``.
    :param data: data sets ``(n, *shape)``, an array for each argument of the encoder, from which the location (the
        median) and the scale (half the distance of the 16 % and 84 % quantiles) are taken. Logical arrays, such as
        masks, pass.
    """

    encoder: Any
    loc: tuple[Array | None, ...]
    scale: tuple[Array | None, ...]

    def __init__(self, encoder: Callable[..., Array], data: Sequence[Array], dtype: Any = float):
        self.encoder = encoder
        pairs = [(None, None) if a.dtype == bool else location_and_scale(a.astype(dtype)) for a in data]
        self.loc, self.scale = (tuple(column) for column in zip(*pairs, strict=True))

    def __call__(self, *data: Array) -> Array:
        loc, scale = lax.stop_gradient((self.loc, self.scale))
        return self.encoder(*(_standardized(*each) for each in zip(data, loc, scale, strict=True)))


def location_and_scale(data: Array) -> tuple[Array, Array]:
    """Median and half the distance of the 16 % and 84 % quantiles, over all axes but the last ``(features,)``.

    Where that distance is zero the standard deviation stands for it, and one for that. What is not finite is left out.
    """
    rows = data.reshape(-1, data.shape[-1]) if data.ndim > 1 else data.reshape(-1, 1)
    rows = jnp.where(jnp.isfinite(rows), rows, jnp.nan)
    low, loc, high = jnp.nanquantile(rows, jnp.asarray([0.16, 0.5, 0.84], rows.dtype), axis=0)
    spread, deviation = 0.5 * (high - low), jnp.nanstd(rows, 0)
    scale = jnp.where(spread > 0, spread, jnp.where(deviation > 0, deviation, 1))
    return jnp.where(jnp.isfinite(loc), loc, 0), jnp.where(jnp.isfinite(scale), scale, 1)


def _standardized(x: Array, loc: Array | None, scale: Array | None) -> Array:
    if loc is None or scale is None:
        return x
    x = (x.astype(loc.dtype) - loc) / scale
    beyond = jnp.maximum(jnp.abs(x) - _LINEAR, 0)
    return jnp.clip(x, -_LINEAR, _LINEAR) + jnp.sign(x) * jnp.log1p(beyond)


def check_encoder(in_dim: int, out_dim: int, pooled_dim: int = 1) -> None:
    """Raises a ``ValueError`` that names the size with which no encoder can be built."""
    for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("pooled_dim", pooled_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}.")


def check_features(shape: tuple[int, ...], in_dim: int, least: int, owner: str) -> None:
    """Raises a ``ValueError`` unless data of ``shape`` are what an encoder takes."""
    if len(shape) < least or shape[-1] != in_dim:
        expected = "(..., n, in_dim)" if least == 2 else "(..., in_dim)"
        raise ValueError(
            f"{owner}: data have shape {tuple(shape)}, but expected {expected} with in_dim={in_dim}. Change in_dim=, "
            "or the guide's data=, a function of the model's arguments that gives what the encoder sees (such as "
            "lambda x: x.reshape(-1), or lambda x: x[:, None] for a set of numbers)."
        )


def check_mask(mask: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises a ``ValueError`` unless a mask has the shape of the sets' elements."""
    if mask != tuple(shape[:-1]):
        raise ValueError(f"SetEncoder: mask has shape {tuple(mask)}, but expected {tuple(shape[:-1])}.")
