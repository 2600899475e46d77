"""What a guide's own draws cannot tell: whether chains that start from them go where its weights say nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyroflows.noncentering import pulled_back
from pyroflows.refinement import BaseSpace, value_and_grad

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


@torch.no_grad()
def departure(posterior: Any) -> Departure:
    """Runs short chains of Hamiltonian Monte Carlo from the guide's draws, and weighs where they get.

    If the importance weights ``w = p / q`` tell the truth, the mean of ``log w`` over the posterior is that over the
    guide's draws weighted by ``w``. Chains start at draws of the guide, where the mean is less, and climb towards the
    posterior, whatever they find on their way: a mean above the predicted one, beyond chance, is mass that the guide's
    draws know nothing of. Half of the chains run in the space of the guide's base, which is round where the guide is
    good; the other half in the coordinates of its location and scale, where they can leave the flow's image.
    Log weights count up to ten, in relation to their mean weight.

    :param posterior: a ``FlowPosterior`` whose weights are worth the question (Pareto k below 0.7).
    """
    log_evidence = posterior._log_evidence().value
    weights = np.exp(posterior._psis[0])
    expected, error = _weighted_mean(_clipped(posterior._log_ratios - log_evidence), weights / weights.sum())
    found = []
    for run in (_in_base_space, _in_whitened_space):
        ends = run(posterior)
        values = _clipped(ends - log_evidence)
        found.append((values.mean() - expected, math.hypot(error, values.std() / len(values) ** 0.5)))
    nats, standard_error = max(found, key=lambda pair: pair[0] - 3 * pair[1])
    return Departure(float(nats), float(standard_error), 2 * _NUM_CHAINS * (1 + _NUM_ITERATIONS * _NUM_LEAPFROGS))


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


def _in_base_space(posterior: Any) -> np.ndarray:
    """Log weights ``(chains,)`` at the ends of chains in the space of the guide's base."""
    space = BaseSpace(posterior)
    z, value = _hamiltonian(space.log_density, space.base.sample((_NUM_CHAINS,)))
    return (value - space.base.log_prob(z)).double().numpy(force=True)


def _in_whitened_space(posterior: Any) -> np.ndarray:
    """The same, of chains in the coordinates where the guide has mean zero and covariance one."""
    guide, density = posterior.guide, pulled_back(posterior.log_density, posterior.guide.coordinates)
    x = guide.coordinates.inverse_and_log_det(posterior.draws.unconstrained[: 8 * _NUM_CHAINS])[0]
    loc, scale_tril = (torch.as_tensor(a).to(x) for a in _location_and_scale(x.double().numpy(force=True)))

    def log_density(z: Tensor) -> Tensor:
        value = density(loc + z @ scale_tril.T)
        return torch.where(value.isnan(), -torch.inf, value)

    starts = torch.linalg.solve_triangular(scale_tril, (x[:_NUM_CHAINS] - loc).T, upper=False).T
    z, value = _hamiltonian(log_density, starts)
    u, log_det = guide.coordinates.forward_and_log_det(loc + z @ scale_tril.T)
    return (value - log_det - posterior._log_guide(u)).double().numpy(force=True)


def _location_and_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the covariance of draws ``(n, dim)``; the scales alone where that fails."""
    loc, scale = x.mean(0), np.maximum(x.std(0), 1e-300)
    correlation = np.atleast_2d(np.cov(((x - loc) / scale).T))
    try:
        return loc, scale[:, None] * np.linalg.cholesky(correlation + 1e-6 * np.eye(len(loc)))
    except np.linalg.LinAlgError:
        return loc, np.diag(scale)


def _hamiltonian(log_density: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Ends ``(chains, dim)`` of chains from ``z``, and their log-densities ``(chains,)``.

    The step size is adapted to all chains, and each has a share of it.
    """
    share = torch.logspace(math.log10(_SHORTEST), 0.0, len(z), dtype=z.dtype, device=z.device)[:, None]
    log_step = -0.25 * math.log(z.shape[-1])
    value, gradient = value_and_grad(log_density, z)
    for i in range(_NUM_ITERATIONS):
        size = share * math.exp(log_step)
        start = momentum = torch.randn_like(z)
        new, new_value, new_gradient = z, value, gradient
        for _ in range(_NUM_LEAPFROGS):
            momentum = momentum + 0.5 * size * new_gradient
            new = new + size * momentum
            new_value, new_gradient = value_and_grad(log_density, new)
            momentum = momentum + 0.5 * size * new_gradient
        log_ratio = new_value - value + 0.5 * (start.square().sum(-1) - momentum.square().sum(-1))
        probability = torch.where(log_ratio.isnan(), 0.0, log_ratio.clamp(max=0.0).exp())
        accepted = torch.rand_like(probability) < probability
        z, gradient = (torch.where(accepted[:, None], a, b) for a, b in ((new, z), (new_gradient, gradient)))
        value = torch.where(accepted, new_value, value)
        log_step += 2.0 / math.sqrt(1 + i) * (float(probability.mean()) - _ACCEPTANCE)
    return z, value
