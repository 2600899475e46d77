"""The generator of random numbers behind fits: Threefry (Salmon et al. 2011, Parallel random numbers), written out.

jax's own is a loop, whose draws take three times as long on a CPU, and up to five times as long to compile; those of
``rbg`` take eight times as long. Written out, one pass over the numbers makes them, and the normals from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import random

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_jit = partial(jax.jit, inline=True)  # models that are run, not traced, would dispatch every operation
_APART = np.uint32(0x80000000)  # between the counters of a key's children and those of its numbers


def _threefry(key: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Threefry-2x32 with 20 rounds: two random words for each pair of counters.

    :param key: two words ``(2,)``.
    """
    words = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    first, second = first + words[0], second + words[1]
    for n in range(1, 6):
        for rotation in _ROTATIONS[1 - n % 2]:
            first = first + second
            second = (second << np.uint32(rotation)) | (second >> np.uint32(32 - rotation))
            second = second ^ first
        first, second = first + words[n % 3], second + words[(n + 1) % 3] + np.uint32(n)
    return first, second


threefry = _jit(_threefry)


def _seed(seed: Array) -> Array:
    shift = lax.full_like(seed, 32)
    high = lax.shift_right_logical(seed, shift) if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
    return jnp.stack([high.astype(np.uint32), seed.astype(np.uint32)])


def _is_traced(*args: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in args)


def _split(key: Array, shape: Sequence[int]) -> Array:
    n = math.prod(shape)
    counter = lax.iota(np.uint32, n) if _is_traced(key) else np.arange(n, dtype=np.uint32)
    counter = counter.reshape(shape)
    return _keys(key, counter, counter ^ _APART)


def _fold_in(key: Array, data: Any) -> Array:
    return _keys(key, jnp.zeros_like(data), data)


def _keys(key: Array, first: Any, second: Any) -> Array:
    """Keys from counters, ``(..., 2)``: by NumPy where the numbers are known, for a program takes long to compile."""
    if _is_traced(key, first, second):
        return jnp.stack(threefry(key, first, second), -1)
    with np.errstate(over="ignore"):  # words wrap around
        return jnp.asarray(np.stack(_threefry(*(np.asarray(x) for x in (key, first, second))), -1))


@partial(_jit, static_argnums=1)
def _words(key: Array, n: int) -> Array:
    half = -(-n // 2)
    counter = lax.iota(np.uint32, half)
    return jnp.concatenate(threefry(key, counter, counter + np.uint32(half)))[:n]


def _random_bits(key: Array, bit_width: int, shape: Sequence[int]) -> Array:
    n = math.prod(shape)
    if bit_width == 64:
        high, low = (part.astype(np.uint64) for part in jnp.split(_words(key, 2 * n), 2))
        return ((high << np.uint64(32)) | low).reshape(shape)
    return _words(key, n).astype(f"uint{bit_width}").reshape(shape)


GENERATOR = random.define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name="pyroflows", tag="pfl"
)
