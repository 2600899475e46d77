"""The numerical inverse: one mechanism for every map whose inverse has no closed form."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import Array, lax

MAX_STEPS = 200  # halvings of any bracket and Newton's steps need far fewer
MAX_DISTANCE = 1e15  # of a root from y: a map whose tails are linear or steeper than logarithmic has it nearer


def monotone_root(
    function: Callable[[Array], tuple[Array, Array]],
    y: Array,
    lower: Array | None = None,
    upper: Array | None = None,
    *,
    tolerance: float | None = None,
    owner: str = "inverse",
) -> Array:
    """Solves ``f(x) = y`` elementwise for an increasing ``f``, by Newton's steps kept within a shrinking bracket.

    The result carries gradients of any order by the implicit function theorem (``lax.custom_root``).

    :param function: ``x -> (f(x), log f'(x))``, elementwise.
    :param y: values ``(...)``, of the shape that ``function`` gives.
    :param lower: where ``f(lower) <= y``; found by doubling from ``y`` unless given.
    :param upper: where ``f(upper) >= y``; found likewise.
    :param tolerance: largest error of ``x``, relative to ``max(1, |x|)``; 4 eps of the dtype unless given.
    :param owner: the name that an error mentions.
    :raises RuntimeError: if elements do not converge (Equinox's, at run time); not a number goes through as such.
    """
    tolerance = 4 * float(jnp.finfo(y.dtype).eps) if tolerance is None else tolerance

    def solve(_: object, y: Array) -> Array:
        x, converged = _search(function, y, lower, upper, tolerance)
        return eqx.error_if(
            x, ~converged, f"{owner}: the numerical inverse did not converge. Are the parameters finite?"
        )

    return lax.custom_root(
        lambda x: function(x)[0] - y,
        lax.stop_gradient(y),
        solve,
        lambda linear, right: right / linear(jnp.ones_like(right)),
    )


def _search(
    function: Callable, y: Array, lower: Array | None, upper: Array | None, tolerance: float
) -> tuple[Array, Array]:
    """The roots, and whether each converged; not a number counts as such."""
    lower = _bracket(function, y, -1) if lower is None else jnp.broadcast_to(lower, y.shape)
    upper = _bracket(function, y, 1) if upper is None else jnp.broadcast_to(upper, y.shape)

    def going(state):
        return (state[0] < MAX_STEPS) & ~state[-1].all()

    def step(state):
        count, x, last, lower, upper, converged = state
        value, log_slope = function(x)
        above = value > y
        upper, lower = jnp.where(above, x, upper), jnp.where(above, lower, x)
        newton_step = (value - y) * jnp.exp(-log_slope)
        newton, middle = x - newton_step, 0.5 * (lower + upper)
        inside = (newton >= lower) & (newton <= upper)
        # a step of Newton's that does not halve the last one is no progress: it may run in a cycle
        following = jnp.where(inside & (2 * jnp.abs(newton_step) <= last), newton, middle)
        following = jnp.where(converged, x, following)
        close = tolerance * jnp.maximum(jnp.abs(following), 1)
        converged |= jnp.isnan(value) | (inside & (jnp.abs(newton_step) <= close)) | (upper - lower <= close)
        return count + 1, following, jnp.abs(following - x), lower, upper, converged

    start = 0, jnp.clip(y, lower, upper), jnp.abs(upper - lower), lower, upper, jnp.isnan(y)
    _, x, _, lower, upper, converged = lax.while_loop(going, step, start)
    return x, converged & (jnp.isnan(x) | jnp.isfinite(lower) & jnp.isfinite(upper))


def _bracket(function: Callable, y: Array, sign: int) -> Array:
    """Points beyond the roots on one side, by doubling the distance from ``y``; infinite where there is none."""

    def short(edge):
        return sign * (function(edge)[0] - y) < 0

    def step(state):
        distance, edge, beyond = state
        edge = jnp.where(beyond, y + sign * distance, edge)
        return 2 * distance, edge, short(edge)

    edge = y + sign
    start = jnp.asarray(2.0, y.dtype), edge, short(edge)
    _, edge, beyond = lax.while_loop(lambda s: s[-1].any() & (s[0] < 2 * MAX_DISTANCE), step, start)
    return jnp.where(beyond, sign * jnp.inf, edge)
