"""Programs compiled once for all arguments alike, kept as long as what they belong to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_flows.generator import GENERATOR
from numpyro_flows.transform_module import _typed_key


class Held:
    """Anything as a static part of a program, equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Programs:
    """Runs functions compiled, each once for all arguments of one structure: ``programs(function, *args)``.

    Arrays anywhere in the arguments are inputs of the program; everything else is a part of it, and must be hashable.
    ``equinox.filter_jit`` does the same, but its programs, and all that they are made of, stay until the process ends.
    A copy, or what comes out of a pickle, begins with none.
    """

    def __init__(self) -> None:
        self._compiled: dict[Callable, Callable] = {}

    def __call__(self, function: Callable, *args: Any) -> Any:
        return self.bound(function, *args)()

    def bound(self, function: Callable, *args: Any) -> Callable:
        """The same with the first arguments looked through once, for many calls; those to come have arrays alone."""
        if function not in self._compiled:
            self._compiled[function] = jax.jit(_of_parts(function), static_argnums=0)
        inputs, rest = eqx.partition(args, is_array)
        arrays, of_arrays = jax.tree.flatten(inputs)
        leaves, of_rest = jax.tree.flatten(rest)
        typed = tuple((type(leaf), leaf) for leaf in leaves)  # 1, 1.0 and True are equal
        return partial(self._compiled[function], (of_arrays, typed, of_rest), arrays)

    def __reduce__(self) -> tuple[type, tuple]:
        return Programs, ()


def quick_key(key: Array) -> Array:
    """The key as one of the generator of fits, whose draws take a third of the time of the default one's."""
    typed = _typed_key(key)
    if str(jax.random.key_impl(typed)) != "threefry2x32":
        return typed
    return jax.random.wrap_key_data(jax.random.key_data(typed), impl=GENERATOR)


def checked_key(rng_key: Any, owner: str) -> Array:
    """:func:`quick_key` of a key; a ``TypeError`` for anything else."""
    try:
        return quick_key(rng_key)
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            f"{owner}: rng_key must be a key of jax.random and comes first, but got {type(rng_key).__name__}."
        ) from None


def words_of(key: Array) -> tuple[str, list[int]]:
    """A key's generator and words, for a file."""
    return str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()


def key_of(generator: str, words: list[int]) -> Array:
    """The key that these are of."""
    impl = GENERATOR if generator == str(GENERATOR) else generator
    return jax.random.wrap_key_data(jnp.asarray(words, np.uint32), impl=impl)


def numpy_rng(key: Array) -> np.random.Generator:
    """NumPy's generator, seeded by a key, without a program to compile."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())


def default_key(key: Array) -> Array:
    """A key of that generator as one of jax's default one, for what takes no other: its Poisson draws."""
    typed = _typed_key(key)
    if jax.random.key_impl(typed) != GENERATOR:
        return typed
    return jax.random.wrap_key_data(jax.random.key_data(typed), impl="threefry2x32")


def _of_parts(function: Callable) -> Callable:
    def run(static: tuple, arrays: list[Any], *more: Any) -> Any:
        of_arrays, typed, of_rest = static
        rest = jax.tree.unflatten(of_rest, [leaf for _, leaf in typed])
        return function(*eqx.combine(jax.tree.unflatten(of_arrays, arrays), rest), *more)

    run.__name__ = getattr(function, "__name__", "program")  # shown by profilers
    return run


def is_array(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an input."""
    return isinstance(leaf, (Array, np.ndarray))
