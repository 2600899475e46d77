"""What trainings share: Adam that passes by wild gradients, and the loop that keeps the best held-out score."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

MEMORY, LONGEST = 25, 10.0  # gradients are at most so many times as long as the median of so many before
CHUNK = 50  # steps between two looks at the held-out data, the keyboard and the progress bar

_DECAY, _DECAY_OF_SQUARE, _TINY = 0.9, 0.999, 1e-8  # Adam's
_LARGE = 4096  # elements from which an array is updated by itself


class FitHistory(NamedTuple):
    """The course of a fit, in nats a data point, or a data set."""

    losses: np.ndarray  # of each step
    validation: np.ndarray  # (checks, 2): steps done, loss of what is held out
    best_step: int  # whose parameters were kept
    skipped: int  # steps whose gradient was not finite
    interrupted: bool
    seconds: float


class _Moments(NamedTuple):
    """What Adam knows of the gradients before, of the parameters in :func:`_parts`."""

    taken: Array  # number of steps that were not skipped
    mean: list[Array]
    square: list[Array]
    norms: Array  # (25,): of the last gradients


def first_state(params: Any) -> tuple[Any, _Moments, Array]:
    """Parameters, Adam's moments with the norms of the last gradients, and the number of steps that were skipped."""
    parts = _parts(params)[0]
    norms = jnp.full(MEMORY, jnp.nan, jnp.result_type(*parts))
    mean, square = ([jnp.zeros_like(part) for part in parts] for _ in range(2))
    none = jnp.zeros((), int)
    return params, _Moments(none, mean, square, norms), none


def update(state: tuple[Any, _Moments, Array], gradient: Any, step_size: Array) -> tuple[Any, _Moments, Array]:
    """The state after a step of Adam (Kingma & Ba 2015), or with one more skipped where the gradient is not finite.

    One that is far longer than the last ones were is shortened: a single draw far out would end the training, for Adam
    divides by the root of the mean square of thousands of steps. Of the first gradient, the length alone is noted.
    """
    tree, (taken, mean, square, norms), skipped = state
    (params, whole), (slopes, _) = _parts(tree), _parts(gradient)
    norm = jnp.sqrt(sum(jnp.square(slope).sum() for slope in slopes))
    finite, known = jnp.isfinite(norm), jnp.isfinite(norms).sum()
    typical = jnp.sort(norms)[jnp.maximum(known - 1, 0) // 2]  # their lower median: sorting puts what is unknown last
    moves = finite & ~jnp.isnan(typical)
    taken = taken + moves
    of_mean, of_square = (1 - decay ** jnp.maximum(taken, 1) for decay in (_DECAY, _DECAY_OF_SQUARE))
    factors = (
        jnp.minimum(1, LONGEST * typical / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)),
        jnp.where(moves, _DECAY, 1.0),
        jnp.where(moves, _DECAY_OF_SQUARE, 1.0),
        jnp.where(moves, step_size / of_mean, 0.0),
        1 / jnp.sqrt(of_square),
    )
    # the barriers keep XLA from computing the factors for every element, and the moments again for the parameters
    moves, factors = lax.optimization_barrier((moves, factors))
    steps = [_step(moves, factors, *part) for part in zip(params, slopes, mean, square, strict=True)]
    params, mean, square = map(list, zip(*steps, strict=True))
    norms = jnp.where(finite, jnp.append(norms[1:], norm), norms)
    return whole(params), _Moments(taken, mean, square, norms), skipped + ~finite


def _padded(step_sizes: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The step sizes of a chunk in an array of one length, so that one program serves the last chunk too; how many."""
    sizes = np.zeros(CHUNK, dtype)
    sizes[: len(step_sizes)] = step_sizes
    return sizes, np.asarray(len(step_sizes))


def _run_steps(
    step: Callable, state: tuple, step_sizes: Array, num_steps: Array, key: Array, done: Array, num_values: int
) -> tuple[tuple, tuple[Array, ...]]:
    """The first ``num_steps`` of these: the state after ``step(state, step_size, key)``, and the values it gives."""

    def one(number: Array, carry: tuple) -> tuple:
        state, columns = carry
        state, values = step(state, step_sizes[number], jax.random.fold_in(key, done + number))
        return state, tuple(column.at[number].set(value) for column, value in zip(columns, values, strict=True))

    return lax.fori_loop(0, num_steps, one, (state, (jnp.zeros_like(step_sizes),) * num_values))


def _step(
    moves: Array, factors: tuple[Array, ...], param: Array, slope: Array, mean: Array, square: Array
) -> tuple[Array, Array, Array]:
    """The parameters after a step, and the moments of their gradient."""
    limit, keep, keep_square, rate, scale = (factor.astype(param.dtype) for factor in factors)
    slope = jnp.where(moves, limit * slope, 0)
    moments = keep * mean + (1 - keep) * slope, keep_square * square + (1 - keep_square) * jnp.square(slope)
    mean, square = lax.optimization_barrier(moments)
    return param - rate * mean / (scale * jnp.sqrt(square) + _TINY), mean, square


def _parts(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """Large arrays each by itself, which are not copied so, and the small ones as one vector; and the way back."""
    leaves, structure = jax.tree.flatten(tree)
    large = [leaf for leaf in leaves if leaf.size >= _LARGE]
    vector, apart = ravel_pytree([leaf for leaf in leaves if leaf.size < _LARGE])

    def whole(parts: list[Array]) -> Any:
        first, rest = iter(parts), iter(apart(parts[-1]) if len(large) < len(leaves) else ())
        return jax.tree.unflatten(structure, [next(first if leaf.size >= _LARGE else rest) for leaf in leaves])

    return large + [vector] * (len(large) < len(leaves)), whole


def train(
    params: Any,
    loss: Callable[..., Array],
    score: Callable[[Any], float] | None,
    *inputs: Any,
    num_steps: int,
    learning_rate: float,
    patience: int,
    key: Array,
    dtype: Any,
    owner: str,
    hint: str,
    progress_bar: bool,
    begin: float,
) -> tuple[Any, FitHistory]:
    """Trains by Adam, whose step size falls to zero along a cosine, and keeps the parameters of the best score.

    Ctrl-C ends the training and keeps what it has reached.

    :param loss: ``loss(params, key, *inputs)`` of one step.
    :param score: of what is held out; ``None`` if nothing is: then the last parameters are kept.
    :param inputs: arrays which the loss takes, handed to the compiled program rather than made a part of it.
    :param patience: steps without a better score after which the training ends.
    :param dtype: of the step sizes.
    :param hint: what to ask oneself where no gradient is finite.
    :param begin: when the fit began, by ``time.perf_counter``.
    :raises RuntimeError: if no step had a finite gradient.
    """

    @jax.jit
    def chunk(state: tuple, sizes: Array, num: Array, key: Array, done: Array, inputs: tuple) -> tuple[tuple, tuple]:
        def step(state: tuple, step_size: Array, key: Array) -> tuple[tuple, tuple[Array]]:
            value, gradient = jax.value_and_grad(loss)(state[0], key, *inputs)
            return update(state, gradient, step_size), (value,)

        state, (values,) = _run_steps(step, state, sizes, num, key, done, 1)
        return state, (values, state[2])

    losses: list[float] = []
    checks: list[tuple[int, float]] = []
    interrupted = False
    state = first_state(params)
    best = np.inf, 0, params
    step_sizes = 0.5 * learning_rate * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))
    with tqdm(total=num_steps, desc=owner, disable=not progress_bar) as bar:
        try:
            while len(losses) < num_steps and (score is None or len(losses) - best[1] < patience):
                sizes, num = _padded(step_sizes[len(losses) : len(losses) + CHUNK], dtype)
                state, outputs = chunk(state, sizes, num, key, len(losses), inputs)
                values, skipped = jax.device_get(outputs)
                losses += values[:num].tolist()
                if skipped == len(losses):
                    raise RuntimeError(f"{owner}: no step had a finite gradient. {hint}")
                if score is not None:
                    checks.append((len(losses), score(state[0])))
                    if checks[-1][1] < best[0]:
                        best = checks[-1][1], len(losses), state[0]
                shown = {"held_out": f"{checks[-1][1]:.3f}"} if checks else {}
                bar.set_postfix(loss=f"{np.nanmean(losses[-CHUNK:]):.3f}", **shown, refresh=False)
                bar.update(int(num))
        except KeyboardInterrupt:
            interrupted = True
    found = bool(np.isfinite(best[0]))
    history = FitHistory(
        np.asarray(losses),
        np.asarray(checks, float).reshape(-1, 2),
        best[1] if found else len(losses),
        int(state[2]),
        interrupted,
        time.perf_counter() - begin,
    )
    return best[2] if found else state[0], history
