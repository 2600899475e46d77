"""What a guide's own draws cannot tell: whether chains that start from them go where its weights say nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from numpyro_flows.log_density import LogDensity
from numpyro_flows.noncentering import forward, inverse, pulled_back, with_density
from numpyro_flows.programs import numpy_rng
from numpyro_flows.refinement import BaseSpace

_NUM_CHAINS = 128
_NUM_ITERATIONS = 12
_NUM_LEAPFROGS = 8
_ACCEPTANCE = 0.8  # of Hamiltonian Monte Carlo, on average over the chains
_SHORTEST = 0.25  # step of the most careful chain, in those of the boldest
_LARGEST_LOG_WEIGHT = 10.0  # beyond which it does not matter how much is missed
_NEGLIGIBLE = 0.1  # nats
_UNCERTAIN = 0.5  # nats that may be missed, where importance weights are so uneven that they cannot tell
_MAX_DIRECTIONS = 1000  # latents, beyond which each is looked at alone


class Departure(NamedTuple):
    """How far short chains get away from a guide, beyond what its importance weights know of."""

    nats: float  # mean log weight of the chains' ends above that of the posterior by importance sampling
    standard_error: float
    gradients: int  # gradient evaluations of the model

    @property
    def suspicious(self) -> bool:
        """Whether the rise is more than chance and of consequence, or may be large for all that the weights tell."""
        found = self.nats > max(_NEGLIGIBLE, 3 * self.standard_error)
        return found or self.nats + 2 * self.standard_error > _UNCERTAIN


def departure(posterior: Any, rng_key: Array) -> Departure:
    """Runs short chains of Hamiltonian Monte Carlo from the guide's draws, and weighs where they get.

    If the importance weights ``w = p / q`` tell the truth, the mean of ``log w`` over the posterior is that over the
    guide's draws weighted by ``w``. Chains start at draws of the guide, where the mean is less, and climb towards the
    posterior, whatever they find on their way: a mean above the predicted one, beyond chance, is mass that the guide's
    draws know nothing of. Half of the chains run in the space of the guide's base, which is round where the guide is
    good; the other half in the coordinates of its location and scale, where they can leave the flow's image.
    Log weights count up to ten, in relation to their mean weight.

    :param posterior: a ``FlowPosterior`` whose weights are worth the question (Pareto k below 0.7).
    :param rng_key: random key.
    """
    base_key, whitened_key = jax.random.split(rng_key)
    log_evidence = posterior._log_evidence().value
    weights = np.exp(posterior._psis[0])
    expected, error = _weighted_mean(_clipped(posterior._log_ratios - log_evidence), weights / weights.sum())
    found = []
    for run, key in ((_in_base_space, base_key), (_in_whitened_space, whitened_key)):
        ends = run(posterior, key)
        values = _clipped(ends - log_evidence)
        found.append((values.mean() - expected, math.hypot(error, values.std() / len(values) ** 0.5)))
    nats, standard_error = max(found, key=lambda pair: pair[0] - 3 * pair[1])
    return Departure(float(nats), float(standard_error), 2 * _NUM_CHAINS * _NUM_ITERATIONS * (1 + _NUM_LEAPFROGS))


def moment_error(u: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """What normalised importance weights ``(n,)`` say of the moments of a guide's draws ``(n, dim)``.

    The error of the mean in the direction where it is largest, that of the worst linear combination, in its standard
    deviations and beyond what chance explains; beyond 1,000 latents, of the worst of them. And the largest error of a
    latent's standard deviation, as the absolute value of the logarithm of its ratio.
    """
    (n, dim), scale = u.shape, u.std(0)
    with np.errstate(all="ignore"):
        z = (u - u.mean(0)) / scale
        mean = weights @ z
        sd = np.sqrt(weights @ np.square(z) - mean**2)
        if not (np.isfinite(sd).all() and (sd > 0).all()):
            return np.inf, np.inf
        sd_error = float(np.abs(np.log(sd)).max())
        if dim > _MAX_DIRECTIONS:
            return float(np.abs(mean).max()), sd_error
        square = mean @ np.linalg.pinv(z.T @ z / n, rcond=1e-9, hermitian=True) @ mean
    chance = dim * (weights @ weights - 1 / n)
    return math.sqrt(max(float(square - chance), 0.0)), sd_error


def _clipped(log_weights: np.ndarray) -> np.ndarray:
    """Log weights within bounds: the largest outside the guide's image, the least outside the model's support."""
    return np.clip(np.nan_to_num(log_weights, nan=-np.inf), -_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    mean = float(weights @ values)
    return mean, float(np.sqrt(np.square(weights * (values - mean)).sum()))


def _in_base_space(posterior: Any, rng_key: Array) -> np.ndarray:
    """Log weights ``(chains,)`` at the ends of chains in the space of the guide's base."""
    space, noise = BaseSpace(posterior), _noise(rng_key, posterior.draws.unconstrained)
    return np.asarray(posterior._programs(_base_space_chains, space, noise, rng_key), float)


def _base_space_chains(space: BaseSpace, noise: tuple[Array, Array], rng_key: Array) -> Array:
    z, value = _hamiltonian(space.log_density, space.base.sample(rng_key, (_NUM_CHAINS,)), *noise)
    return value - space.base.log_prob(z)


def _in_whitened_space(posterior: Any, rng_key: Array) -> np.ndarray:
    """The same, of chains in the coordinates where the guide has mean zero and covariance one."""
    coordinates, density = with_density(posterior.guide.coordinates, None), posterior.log_density
    x, _ = posterior._programs(inverse, coordinates, density, posterior.draws.unconstrained[: 8 * _NUM_CHAINS])
    points = np.asarray(x, float)
    loc, scale_tril = _location_and_scale(points)
    z = np.linalg.solve(scale_tril, (points[:_NUM_CHAINS] - loc).T).T
    inputs = (np.asarray(a, x.dtype) for a in (loc, scale_tril, z))
    u, log_model = posterior._programs(_whitened_chains, coordinates, density, *inputs, _noise(rng_key, x))
    return np.asarray(log_model - posterior._log_guide(u), float)


def _whitened_chains(
    coordinates: Any, log_density: LogDensity, loc: Array, scale_tril: Array, z: Array, noise: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Ends of chains from ``loc + scale_tril z``, as latent vectors, and the model's log-densities there."""
    density = pulled_back(log_density, coordinates)

    def whitened(z: Array) -> Array:
        value = density(loc + scale_tril @ z)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    z, value = _hamiltonian(whitened, z, *noise)
    u, log_det = forward(coordinates, log_density, loc + z @ scale_tril.T)
    return u, value - log_det


def _location_and_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the covariance of draws ``(n, dim)``; the scales alone where that fails."""
    loc, scale = x.mean(0), np.maximum(x.std(0), 1e-300)
    correlation = np.atleast_2d(np.cov(((x - loc) / scale).T))
    try:
        return loc, scale[:, None] * np.linalg.cholesky(correlation + 1e-6 * np.eye(len(loc)))
    except np.linalg.LinAlgError:
        return loc, np.diag(scale)


def _noise(rng_key: Array, like: Array) -> tuple[np.ndarray, np.ndarray]:
    """Momenta ``(iterations, chains, dim)``, and levels that acceptance is held against, drawn outside the programs.

    (Each generator in a program takes a third of a second to compile.)
    """
    rng = numpy_rng(rng_key)
    shape = _NUM_ITERATIONS, _NUM_CHAINS
    return rng.standard_normal((*shape, like.shape[-1])).astype(like.dtype), rng.uniform(size=shape).astype(like.dtype)


def _hamiltonian(log_density: Callable[[Array], Array], z: Array, momenta: Array, levels: Array) -> tuple[Array, Array]:
    """Ends ``(chains, dim)`` of chains from ``z``, and their log-densities ``(chains,)``.

    The step size is adapted to all chains, and each has a share of it.

    :param momenta: standard normals ``(iterations, chains, dim)``.
    :param levels: uniform numbers ``(iterations, chains)``.
    """
    value_and_grad = jax.vmap(jax.value_and_grad(log_density))
    share = np.geomspace(_SHORTEST, 1.0, len(z)).astype(z.dtype)[:, None]

    def step(carry: tuple[Array, Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        (z, _, log_step), (start, level, rate) = carry, inputs
        size = share * jnp.exp(log_step)

        def leapfrog(i: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            z, momentum, first, _ = state  # one place where the model is called, for it is compiled once then
            z = z + jnp.where(i == 0, 0.0, size) * momentum
            value, gradient = value_and_grad(z)
            half = jnp.where((i == 0) | (i == _NUM_LEAPFROGS), 0.5, 1.0)
            return z, momentum + half * size * gradient, jnp.where(i == 0, value, first), value

        zeros = jnp.zeros(len(z), z.dtype)
        new, end, first, last = lax.fori_loop(0, _NUM_LEAPFROGS + 1, leapfrog, (z, start, zeros, zeros))
        log_ratio = last - first + 0.5 * (jnp.square(start).sum(-1) - jnp.square(end).sum(-1))
        probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
        accepted = level < probability
        log_step = log_step + rate * (probability.mean() - _ACCEPTANCE)
        return (jnp.where(accepted[:, None], new, z), jnp.where(accepted, last, first), log_step), None

    log_step = jnp.asarray(-0.25 * math.log(z.shape[-1]), z.dtype)
    rates = (2.0 / np.sqrt(1.0 + np.arange(_NUM_ITERATIONS))).astype(z.dtype)
    return lax.scan(step, (z, jnp.zeros(len(z), z.dtype), log_step), (momenta, levels, rates))[0][:2]
