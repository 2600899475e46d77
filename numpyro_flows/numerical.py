"""The numerical inverse: one mechanism for every map whose inverse has no closed form."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_STEPS = 200  # halvings of any bracket and Newton's steps need far fewer
MAX_DISTANCE = 1e15  # of a root from y: a map whose tails are linear or steeper than logarithmic has it nearer
MAX_DENSE = 128  # elements up to which the implicit gradient of a vector's root uses the dense Jacobian


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

    The result carries gradients by the implicit function theorem, up to second order: the search itself is not
    differentiated; two of Newton's steps from its end are.

    :param function: ``x -> (f(x), log f'(x))``, elementwise.
    :param y: values ``(...)``, of the shape that ``function`` gives.
    :param lower: where ``f(lower) <= y``; found by doubling from ``y`` unless given.
    :param upper: where ``f(upper) >= y``; found likewise.
    :param tolerance: largest error of ``x``, relative to ``max(1, |x|)``, up to the rounding of the function's
        values; 4 eps of the dtype unless given.
    :param owner: the name that an error mentions.
    :raises RuntimeError: if elements do not converge (Equinox's, at run time); not a number goes through as such.
    """
    tolerance = 4 * float(jnp.finfo(y.dtype).eps) if tolerance is None else tolerance
    fixed, fixed_y = _without_gradients(function, y), lax.stop_gradient(y)
    lower, upper = (edge if edge is None else lax.stop_gradient(edge) for edge in (lower, upper))
    x, converged = _search(fixed, fixed_y, lower, upper, tolerance)
    x = eqx.error_if(x, ~converged, f"{owner}: the numerical inverse did not converge. Are the parameters finite?")
    x = lax.stop_gradient(x)
    for _ in range(2):  # the first order of the gradient comes from the last step, the second from both
        value, log_slope = function(x)
        x = x - (value - y) * jnp.exp(-log_slope)
    return x


def _without_gradients(function: Callable, x: Array) -> Callable:
    """``function`` of arguments shaped like ``x``, with what it closes over held constant.

    (``lax.custom_root`` inside ``lax.scan`` gives wrong second derivatives in jax 0.10: the scan forgets its rule.)
    """
    pure, held = jax.closure_convert(function, x)
    held = [lax.stop_gradient(h) for h in held]
    return lambda x: pure(x, *held)


def _search(
    function: Callable, y: Array, lower: Array | None, upper: Array | None, tolerance: float
) -> tuple[Array, Array]:
    """The roots, and whether each converged; not a number counts as such."""
    lower = _bracket(function, y, -1) if lower is None else jnp.broadcast_to(lower, y.shape)
    upper = _bracket(function, y, 1) if upper is None else jnp.broadcast_to(upper, y.shape)

    rounding = 8 * float(jnp.finfo(y.dtype).eps)  # of the function's values: no search gets below it

    def going(state):
        return (state[0] < MAX_STEPS) & ~state[-1].all()

    def step(state):
        count, x, last, lower, upper, converged = state
        value, log_slope = function(x)
        above = value > y
        upper, lower = jnp.where(above, x, upper), jnp.where(above, lower, x)
        newton_step = (value - y) * jnp.exp(-log_slope)
        newton, middle = x - newton_step, 0.5 * (lower + upper)
        size = jnp.maximum(jnp.maximum(jnp.abs(x), jnp.abs(y)), 1)
        # a step that is not half the last one is left out, or it could go round in a circle
        good = (newton >= lower) & (newton <= upper) & (jnp.abs(newton_step) <= 0.5 * last)
        converged |= jnp.isnan(value) | (jnp.abs(value - y) <= rounding * size)
        following = jnp.where(converged, x, jnp.where(good, newton, middle))
        close = tolerance * jnp.maximum(jnp.abs(following), 1)
        converged |= (good & (jnp.abs(newton_step) <= close)) | (upper - lower <= close)
        return count + 1, following, jnp.abs(following - x), lower, upper, converged

    start = 0, jnp.clip(y, lower, upper), jnp.full_like(y, jnp.inf), lower, upper, jnp.isnan(y)
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


def triangular_fixed_point(function: Callable[[Array], Array], start: Array, max_steps: int) -> Array:
    """Solves ``x = f(x)`` where ``f_i`` depends on the elements before the ``i``-th only.

    Every sweep ``x <- f(x)`` makes one more element exact, so ``max_steps`` of them fix as many elements exactly; the
    sweeps end sooner where nothing moves by more than rounding, as in many dimensions (Song et al. 2021, Accelerating
    feedforward computation via parallel nonlinear equation solving). Gradients come from the implicit function
    theorem; the linear system with the Jacobian is triangular too and is solved by the same sweeps. Derivatives of any
    order work, but for reverse mode over reverse mode inside ``lax.scan``, which jax refuses (take ``jax.hessian``).

    :param function: of vectors ``(..., dim)``.
    :param start: first guess ``(..., dim)``.
    :param max_steps: most sweeps.
    """

    def solve(linear: Callable, right: Array) -> Array:
        scale = _size(right)
        return scale * _sweep(lambda v: right / scale + v - linear(v), right / scale, max_steps)

    return lax.custom_root(
        lambda x: x - function(x),
        lax.stop_gradient(start),
        lambda _, start: _sweep(function, start, max_steps),
        lambda linear, right: lax.custom_linear_solve(linear, right, solve, solve),
    )


def _size(right: Array) -> Array:
    """What to divide the right side of a linear system by before its solution is searched: gradients have any size."""
    size = jnp.abs(right).max(initial=0)
    return jnp.where((size > 0) & jnp.isfinite(size), size, 1)


def _sweep(function: Callable[[Array], Array], start: Array, max_steps: int) -> Array:
    tolerance = 4 * float(jnp.finfo(start.dtype).eps)

    def step(state):
        count, x, _ = state
        finite = jnp.isfinite(x)
        new = function(jnp.where(finite, x, 0))  # what is not exact yet must not spoil, as 0 * inf, what is
        still = (jnp.abs(new - x) <= tolerance * jnp.maximum(jnp.abs(x), 1)) | ~(finite | jnp.isfinite(new))
        return count + 1, new, ~still.all()

    start_state = 0, start, jnp.asarray(True)
    return lax.while_loop(lambda s: s[2] & (s[0] < max_steps), step, start_state)[1]


def fixed_point_root(
    function: Callable[[Array], Array],
    y: Array,
    *,
    tolerance: float | None = None,
    max_steps: int = 2000,
    jacobian: Callable[[Array], Array] | None = None,
    owner: str = "inverse",
) -> Array:
    """Solves ``x + g(x) = y`` for vectors and a contractive ``g``, by the iteration ``x <- y - g(x)`` (Banach).

    Takes about ``log(tolerance) / log(Lip g)`` evaluations of ``g``. The result carries gradients by the implicit
    function theorem, up to second order: two of Newton's steps from the end of the search are differentiated. Up to
    ``MAX_DENSE`` elements they use the Jacobian of ``g`` (``jacobian``, else as many forward derivatives), inverted;
    beyond it one Neumann iteration each, forward and backward.

    :param function: ``x -> g(x)``, both ``(..., dim)``; each vector by itself.
    :param y: values ``(..., dim)``, of the shape that ``function`` gives.
    :param tolerance: the iteration ends with a step of this size, relative to ``max(1, |x|, |y|)`` (largest elements);
        64 eps of the dtype unless given (the steps that follow gain the rest).
    :param max_steps: most evaluations of ``g``.
    :param jacobian: ``x -> dg/dx`` ``(..., dim, dim)``, for functions that know it.
    :param owner: the name that an error mentions.
    :raises RuntimeError: if vectors do not converge (Equinox's, at run time); not a number goes through as such.
    """
    tolerance = 64 * float(jnp.finfo(y.dtype).eps) if tolerance is None else tolerance
    fixed = _without_gradients(function, y)
    x, converged = _iterate(fixed, lax.stop_gradient(y), tolerance, max_steps)
    x = eqx.error_if(
        x,
        ~converged,
        f"{owner}: the numerical inverse did not converge in {max_steps} steps. Are the parameters finite, and is the "
        "map a contraction?",
    )
    base = x = lax.stop_gradient(x)
    dense = _inverse_jacobian(fixed, base, jacobian) if y.shape[-1] <= MAX_DENSE else None

    def neumann(matvec: Callable, r: Array) -> Array:
        scale = _size(r)
        return scale * _iterate(lambda v: matvec(v) - v, r / scale, tolerance, max_steps)[0]

    for _ in range(2):  # the first order of the gradient comes from the last step, the second from both
        residual = x + function(x) - y
        if dense is not None:
            x = x - (dense @ residual[..., None])[..., 0]
        else:
            x = x - lax.custom_linear_solve(
                lambda v: v + jax.jvp(fixed, (base,), (v,))[1], residual, neumann, transpose_solve=neumann
            )
    return x


def _iterate(function: Callable, y: Array, tolerance: float, max_steps: int) -> tuple[Array, Array]:
    """``x <- y - function(x)`` to its end, and which vectors converged; those not a number from the start count."""

    def move(x):
        following = y - function(x)
        step, size = jnp.abs(following - x).max(-1), jnp.abs(following).max(-1)
        return following, size, step < tolerance * jnp.maximum(size, scale)  # never where both are infinite

    scale = jnp.maximum(jnp.abs(y).max(-1), 1)  # the difference is rounded by it
    x, size, close = move(y)
    undefined = jnp.isnan(size)

    def step(state):
        x, _, close = move(state[1])
        return state[0] + 1, x, undefined | close

    return lax.while_loop(lambda s: (s[0] < max_steps) & ~s[-1].all(), step, (1, x, undefined | close))[1:]


def _inverse_jacobian(function: Callable, x: Array, jacobian: Callable | None) -> Array:
    """``(I + dg/dx)^{-1}``, constant."""
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    if jacobian is None:
        columns = jax.vmap(lambda unit: jax.jvp(function, (x,), (jnp.broadcast_to(unit, x.shape),))[1], out_axes=-1)
        return lax.stop_gradient(jnp.linalg.inv(eye + columns(eye)))
    return jnp.linalg.inv(eye + lax.stop_gradient(jacobian(x)))
