"""Where a fit starts, the best Gaussian along the optimisation paths from several points, and what it may have missed.

The idea of Pathfinder (Zhang et al. 2022) with exact Hessians: L-BFGS walks uphill from each start; at points along the
way the local Gaussian (the inverse Hessian's) is scored by its ELBO, and the best is kept. The mode itself is only
one of the candidates, since at the mode of a funnel a Gaussian is useless. Natural gradients then raise its ELBO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from pyroflows.in_step import InStep

MAX_HESSIAN_DIM = 1000  # beyond it a Hessian takes more gradients than four steps
_NUM_DRAWS = 300
_LEAST_CURVATURE = 1e-3  # of the likelihood, in units of the prior's precision, below which it tells nothing
_MISSED = np.log(20.0)  # a guide misses what it gives less than a twentieth of the posterior's density
_BARRIER = np.log(20.0)  # modes are parted where the density between them falls to less than a twentieth
_SAME_END = 0.1  # standard deviations between the ends of two walks to the same mode
_ARRIVED = 1.0  # standard deviations that Newton's step from the end of a walk may have
_FRACTION = 0.5  # of a standard deviation, by which latents are moved to see what changes; of one, where it is unknown
_LEAST_GAIN = 0.05  # nats, below which nothing is to be gained by all of them
_MOST_GRADIENTS = 100_000  # evaluations that seeing it may take: a thirteenth of a fit's
_NEWTON_STEPS = 4  # to a conditional mode, as a rule
_MOST_NEWTON_STEPS = 8  # and halvings of one
_LEAST_PRECISION = 0.1  # of the prior's, that the posterior is taken to have
_NUM_MARGINALS = 8  # random points to climb from
_FIRST_CLIMB, _LAST_CLIMB = 6, 30  # steps of each climb, and of those that have come highest
_MOST_CLIMBS = 3
_MOST_CLIMBING = 400_000  # gradient evaluations of all climbs
_MOST_OUTER = 10  # latents without fixed normal priors, for their marginal to be climbed on by finite differences
_RADIUS = 2.0  # in which the points lie around the start, and around zero: that of the ecosystem's own starts
_SAME_VALUE = 0.01  # nats, below which a step has arrived
_NUM_CURVATURES = 8  # draws at which a step towards a better Gaussian takes Hessians: pairs of opposite ones
_MOST_IMPROVEMENTS = 60  # such steps, as long as they are of this share of the whole and one of so many gains something
_LEAST_RATE, _PATIENCE = 0.03, 3
_RANGE = 0.1, 10.0  # of a precision in relation to the one before
_MAX_LEGS = 4  # of a walk: each goes on in the coordinates of the local Gaussian where the one before ended


class Target(NamedTuple):
    """A model's log-density over the unconstrained space, in numpy."""

    log_density: Callable[[np.ndarray], np.ndarray]  # of a batch, (n, dim) -> (n,)
    value_and_grad: Callable[[np.ndarray], tuple[float, np.ndarray]]  # at one point (dim,)
    hessian: Callable[[np.ndarray], np.ndarray]  # (dim, dim) at one point
    # of a batch, which takes about as long as a point where the model's operations are small
    values_and_grads: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    gradients_and_hessians: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    # whether time is over: then walks end, and the first candidate of finite ELBO is the last
    is_late: Callable[[], bool] = lambda: False


class Start(NamedTuple):
    """A Gaussian on the unconstrained space from which a guide starts."""

    loc: np.ndarray  # (dim,)
    scale_tril: np.ndarray  # (dim, dim)
    elbo: float
    gradients: int  # gradient evaluations that the search took, a Hessian counted as dim of them
    modes: tuple[Start, ...] = ()  # the best of each path, without repetitions, from the best down
    divergence: float = np.inf  # about that of the density from it, in nats: half the variance of the log ratio


class Likelihood(NamedTuple):
    """What a likelihood amounts to in latents with a fixed normal prior, given the others: see ``Centering``."""

    rotation: np.ndarray  # (dim, dim), orthogonal
    loc: np.ndarray  # (dim,)
    scale: np.ndarray  # (dim,)
    precision: np.ndarray  # (dim,)
    pseudo_data: np.ndarray  # (dim,)
    origin: np.ndarray  # (dim,)
    slopes: np.ndarray  # (dim, dim)
    shifts: np.ndarray  # (dim, dim)


def find_start(target: Target, starts: Sequence[np.ndarray], rng: np.random.Generator) -> Start:
    """Returns the candidate of :func:`find_modes` with the highest ELBO.

    :raises RuntimeError: if no candidate has a finite ELBO.
    """
    modes, gradients = find_modes(target, starts, rng)
    if not modes:
        raise RuntimeError(
            "FlowVI: no start with a finite ELBO was found. Standardise the data, use tighter priors, or pass "
            "init_loc_fn= with a point of high density."
        )
    return modes[0]._replace(gradients=gradients, modes=modes)


def find_modes(
    target: Target, starts: Sequence[np.ndarray], rng: np.random.Generator, points_per_path: int = 12
) -> tuple[tuple[Start, ...], int]:
    """Returns the Gaussians of highest ELBO, one a path and without repetitions, and the gradient evaluations.

    :param target: the log-density to walk on.
    :param starts: points ``(dim,)`` with a finite log-density to walk from, at least one.
    :param rng: source of the draws that score the candidates, the same for all of them.
    :param points_per_path: points of a path whose Gaussians are candidates; 1 for its end alone, once for all paths
        that end there.
    """
    dim = len(starts[0])
    noise = rng.standard_normal((_NUM_DRAWS, dim))
    best_of_paths: list[Start] = []
    gradients = 0

    def consider(loc: np.ndarray, scale_tril: np.ndarray) -> None:
        found = _scored(target, loc, scale_tril, noise)
        if np.isfinite(found.elbo) and found.elbo > best_of_paths[-1].elbo:
            best_of_paths[-1] = found

    def is_enough() -> bool:
        return target.is_late() and any(np.isfinite(best.elbo) for best in best_of_paths)

    for start, (path, scale_at_end, evaluations) in zip(starts, _walks(target, starts), strict=True):
        if is_enough():
            break
        gradients += evaluations
        if points_per_path == 1 and any(_distance(other, path[-1]) < _SAME_END for other in best_of_paths):
            continue
        best_of_paths.append(Start(start, np.eye(dim), -np.inf, 0))
        # early points are the interesting ones of a funnel, late ones, which come first, of everything else
        chosen = np.unique(np.geomspace(len(path), 1, points_per_path).round().astype(int) - 1)
        for index in chosen[::-1]:
            if is_enough():
                break
            point = path[index]
            if dim > MAX_HESSIAN_DIM:
                for scale in (0.1, 1.0):
                    consider(point, scale * np.eye(dim))
                continue
            gradient, scale_tril = target.value_and_grad(point)[1], scale_at_end
            if scale_tril is None or index < len(path) - 1:
                scale_tril, gradients = _gaussian_scale(target.hessian(point)), gradients + dim
            if scale_tril is not None:
                consider(point, scale_tril)
                consider(point + scale_tril @ (scale_tril.T @ gradient), scale_tril)
        for scale in (0.1, 1.0):
            if not is_enough():
                consider(start, scale * np.eye(dim))
    return distinct(best_of_paths, target.log_density), gradients


def improve(
    target: Target, start: Start, rng: np.random.Generator, is_spent: Callable[[int], bool] = lambda n: False
) -> Start:
    """Gaussians of higher ELBO: a local one knows the curvature at a point, these that of the places they cover.

    Steps of natural gradient, ``P <- P - rate (E[H] + P)`` for the precision and ``m <- m + rate E[-H]^-1 E[g]`` for
    the mean (Opper & Archambeau 2009; Khan & Nielsen 2018), with gradients ``g`` and Hessians ``H`` at a few draws. A
    step is taken back, and the rate halved, where the ELBO by always the same draws does not rise.

    :param target: the log-density.
    :param start: the Gaussian to begin with, and its modes; returned where nothing is gained, and beyond
        ``MAX_HESSIAN_DIM``.
    :param rng: source of the draws.
    :param is_spent: whether so many gradient evaluations are too many.
    :returns: the best, with the gradient evaluations of the start and its own.
    """
    if len(start.loc) > MAX_HESSIAN_DIM:
        return start
    found, gradients = [], start.gradients
    for mode in start.modes or (start,):
        found.append(_improved(target, mode._replace(gradients=gradients), rng, is_spent))
        gradients = found[-1].gradients
    modes = distinct([mode._replace(gradients=0) for mode in found], target.log_density) or (start,)
    return modes[0]._replace(gradients=gradients, modes=modes)


def _improved(target: Target, start: Start, rng: np.random.Generator, is_spent: Callable[[int], bool]) -> Start:
    dim, gradients = len(start.loc), start.gradients
    noise = rng.standard_normal((_NUM_DRAWS, dim))
    found = _scored(target, start.loc, start.scale_tril, noise)
    rate, idle = 1.0, 0
    for _ in range(_MOST_IMPROVEMENTS):
        if rate < _LEAST_RATE or idle >= _PATIENCE or is_spent(gradients + _NUM_CURVATURES * dim):
            break
        half = rng.standard_normal((_NUM_CURVATURES // 2, dim))
        gradients += _NUM_CURVATURES * dim
        trial = _step(target, found, np.concatenate([half, -half]), rate)
        if trial is None:
            break
        better = _scored(target, *trial, noise)
        if better.elbo > found.elbo:
            idle = idle + 1 if better.elbo - found.elbo < _SAME_VALUE else 0
            found, rate = better, min(1.0, 1.5 * rate)
        else:
            rate *= 0.5
    if not np.isfinite(found.elbo):  # one of these draws is outside the model's support, and stays there
        found = start
    return found._replace(gradients=gradients)


@np.errstate(all="ignore")
def _step(target: Target, at: Start, draws: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Location and scale after a step, in the coordinates of the Gaussian, where no precision changes by more than ten
    times and the mean by no more than a draw is away from it; ``None`` where nothing is finite."""
    points = at.loc + draws @ at.scale_tril.T
    if target.gradients_and_hessians is not None:
        slopes, bends = target.gradients_and_hessians(points)
    else:
        slopes = np.stack([target.value_and_grad(point)[1] for point in points])
        bends = np.stack([target.hessian(point) for point in points])
    known = np.isfinite(slopes).all(-1) & np.isfinite(bends).all((-2, -1))
    if not known.any():
        return None
    precision = -at.scale_tril.T @ bends[known].mean(0) @ at.scale_tril
    values, axes = np.linalg.eigh(0.5 * (precision + precision.T))
    values = np.clip(values, *_RANGE)
    move = rate * (axes.T @ (at.scale_tril.T @ slopes[known].mean(0))) / values
    move *= min(1.0, len(move) ** 0.5 / max(float(np.linalg.norm(move)), 1e-300))
    root = at.scale_tril @ (axes / np.sqrt(1 + rate * (values - 1)))
    try:
        return at.loc + at.scale_tril @ (axes @ move), np.linalg.cholesky(root @ root.T)
    except np.linalg.LinAlgError:
        return None


def _scored(target: Target, loc: np.ndarray, scale_tril: np.ndarray, noise: np.ndarray) -> Start:
    """A Gaussian with its ELBO by the draws that a standard normal's ``noise`` becomes; minus infinity for NaN."""
    with np.errstate(all="ignore"):
        log_ratio = target.log_density(loc + noise @ scale_tril.T) + 0.5 * np.square(noise).sum(-1)
        elbo = log_ratio.mean() + 0.5 * len(loc) * np.log(2 * np.pi) + np.log(np.diagonal(scale_tril)).sum()
        divergence = 0.5 * float(log_ratio.var()) if np.isfinite(elbo) else np.inf
    return Start(loc, scale_tril, float(np.nan_to_num(elbo, nan=-np.inf)), 0, divergence=divergence)


def distinct(starts: Sequence[Start], log_density: Callable[[np.ndarray], np.ndarray]) -> tuple[Start, ...]:
    """Those of more than a thousandth of the best one's mass, each outside the bulk of every better one or parted from
    it by a barrier: in many dimensions a mode lies closer to another one than most of that one's draws do."""
    kept: list[Start] = []
    for start in sorted(starts, key=lambda start: -start.elbo):
        radius = 1 + 2 * len(start.loc) ** 0.5
        if start.elbo > (kept[0].elbo if kept else -np.inf) - np.log(1000) and all(
            _distance(other, start.loc) > radius or _are_parted(start.loc, other.loc, log_density) for other in kept
        ):
            kept.append(start)
    return tuple(kept)


def _distance(mode: Start, point: np.ndarray) -> float:
    """From a mode, in its standard deviations."""
    return float(np.linalg.norm(np.linalg.solve(mode.scale_tril, point - mode.loc)))


def _are_parted(a: np.ndarray, b: np.ndarray, log_density: Callable[[np.ndarray], np.ndarray]) -> bool:
    with np.errstate(all="ignore"):
        way = np.nan_to_num(log_density(a + np.linspace(0, 1, _NUM_DRAWS)[:, None] * (b - a)), nan=-np.inf)
        return bool(way.min() < min(way[0], way[-1]) - _BARRIER)


def missed_mass(
    modes: Sequence[Start],
    log_density: Callable[[np.ndarray], np.ndarray],
    log_guide: Callable[[np.ndarray], np.ndarray],
    log_evidence: float,
    rng: np.random.Generator,
    num_batches: int = 7,
) -> float:
    """Share of the posterior's mass which lies where a guide has nearly none, as far as Gaussians at the modes show it.

    The mass, by importance sampling from the Gaussians, of the points where ``log q < log p - log Z - log 20``. The
    guide's own draws can tell nothing of such places: its ELBO and Pareto k are those of a good fit.

    :param modes: Gaussians to draw from, also far from the guide.
    :param log_density: of the model, ``(n, dim) -> (n,)``, not normalised.
    :param log_guide: of the guide, normalised.
    :param log_evidence: of the model, by the guide's draws: that of the part which the guide covers.
    :param num_batches: batches of draws from each Gaussian, of the size which the search for a start uses.
    """
    dim = len(modes[0].loc)
    batches = [
        mode.loc + rng.standard_normal((_NUM_DRAWS, dim)) @ mode.scale_tril.T
        for mode in modes
        for _ in range(num_batches)
    ]
    draws = np.concatenate(batches)
    with np.errstate(all="ignore"):
        each = []
        for mode in modes:
            z = np.linalg.solve(mode.scale_tril, (draws - mode.loc).T)
            log_scale = np.log(np.diagonal(mode.scale_tril)).sum()
            each.append(-0.5 * (z**2).sum(0) - 0.5 * dim * np.log(2 * np.pi) - log_scale)
        log_proposal = np.logaddexp.reduce(each) - np.log(len(modes))
        relative = np.concatenate([log_density(batch) for batch in batches]) - log_evidence
        missed = relative - np.concatenate([log_guide(batch) for batch in batches]) > _MISSED
        weights = np.exp(relative - log_proposal)
    mass = float(np.where(missed & np.isfinite(weights), weights, 0.0).mean())
    return mass / (1 + mass)


def gaussian_around(modes: Sequence[Start]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The Gaussian of the mean and covariance of a mixture of modes, and these in its coordinates.

    :param modes: Gaussians, of masses proportional to the exponentials of their ELBOs.
    :returns: location ``(dim,)`` and Cholesky factor ``(dim, dim)`` of the Gaussian; the modes' log-masses
        ``(num_modes,)``, and locations and scales ``(num_modes, dim)`` in coordinates where the Gaussian is standard.
    """
    log_mass = np.array([mode.elbo for mode in modes]) - modes[0].elbo
    mass = np.exp(log_mass) / np.exp(log_mass).sum()
    locs, scales = np.stack([mode.loc for mode in modes]), np.stack([mode.scale_tril for mode in modes])
    loc = mass @ locs
    apart = locs - loc
    covariance = np.einsum("k,kij,klj->il", mass, scales, scales) + np.einsum("k,ki,kl->il", mass, apart, apart)
    scale_tril = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(scale_tril, scales)
    return loc, scale_tril, log_mass, np.linalg.solve(scale_tril, apart.T).T, np.linalg.norm(whitened, axis=-1)


def pseudo_observations(
    target: Target, x: np.ndarray, u: np.ndarray, factor: np.ndarray, elements: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precisions and values ``(dim,)`` of the normal observations that the likelihood amounts to at one point.

    By Newton's rule: where ``u = loc + factor x`` with a standard normal ``x``, the likelihood's gradient is that of
    the density by ``x`` without the prior's, ``-x``, and its curvature that without the prior's, 1.

    :param target: the density of non-centred vectors.
    :param x: a non-centred vector ``(dim,)``.
    :param u: the centred one.
    :param factor: the matrix ``(dim, dim)`` of the conditional priors there (``Noncentering.factor``).
    :param elements: which elements are non-centred; the precision of the others is 0.
    """
    try:
        back, hessian = np.linalg.inv(factor), target.hessian(x)
    except np.linalg.LinAlgError:  # a scale of zero: the likelihood cannot be told from the prior
        return np.zeros(len(x)), np.zeros(len(x))
    curvature = np.einsum("ji,jk,ki->i", back, -np.nan_to_num(hessian) - np.eye(len(x)), back, optimize=True)
    gradient = back.T @ (target.value_and_grad(x)[1] + x)
    told = elements & np.isfinite(np.diagonal(hessian)) & np.isfinite(gradient)
    told &= curvature * np.square(factor).sum(1) > _LEAST_CURVATURE
    curvature = np.where(told, curvature, 1.0)
    return np.where(told, curvature, 0.0), np.where(told, u + gradient / curvature, 0.0)


@np.errstate(all="ignore")
def conditional_likelihood(
    target: Target,
    start: Start,
    loc: np.ndarray,
    scale: np.ndarray,
    latents: np.ndarray,
    is_spent: Callable[[int], bool],
) -> tuple[Likelihood | None, int]:
    """The normal observations that the likelihood amounts to, and how their precisions depend on the other latents.

    By conditional Laplace approximations of the elements with fixed normal priors: given the others at the start, and
    where each of the others is half a standard deviation away, to either side. A dependence is taken over where it
    leaves at most half of the KL divergence which there is without it, if the covariance stays as it is and the
    location is linear in the other latent.

    :param target: the density.
    :param start: a Gaussian that approximates it.
    :param loc: locations ``(dim,)`` of the priors.
    :param scale: their scales ``(dim,)``.
    :param latents: the number ``(dim,)`` of each element's latent, negative for elements without such a prior.
    :param is_spent: whether so many gradient evaluations are too many.
    :returns: the observations, ``None`` where these dependences promise too little, or it would take too long to see;
        and the gradient evaluations that it took.
    """
    dim, inner, outer = len(latents), np.flatnonzero(latents >= 0), np.flatnonzero(latents < 0)
    cost = (2 * len(outer) + 1) * _NEWTON_STEPS * dim
    if not len(inner) or cost > _MOST_GRADIENTS or is_spent(cost):
        return None, 0
    given = _Conditional(target, loc, scale, latents)
    point = given.mode(start.loc)
    here = given.turn(*given.gaussian(point))
    precision, data = _observations(*here)
    slopes, shifts, gain = np.zeros((dim, dim)), np.zeros((dim, dim)), 0.0
    for k, spread in zip(outer, np.linalg.norm(start.scale_tril, axis=1)[outer], strict=True):
        away = np.zeros(dim)
        away[k] = step = _FRACTION * spread
        below, above = (given.gaussian(given.mode(beside)) for beside in (point - away, point + away))
        slope, shift = _slope_and_shift(_observations(*below), (precision, data), _observations(*above), latents, step)
        changed = [(precision * np.exp(sign * slope * step), data * np.exp(-sign * shift * step)) for sign in (-1, 1)]
        without, left = (
            _divergence(below, here, above, *observations) / _FRACTION**2
            for observations in (((precision, data),) * 3, (changed[0], (precision, data), changed[1]))
        )
        if left <= 0.5 * without:
            slopes[inner, k], shifts[inner, k], gain = slope, shift, gain + without - left
    if not gain > _LEAST_GAIN:
        return None, given.evaluations
    rotation, precisions, values, fixed = np.eye(dim), np.zeros(dim), np.zeros(dim), latents >= 0
    rotation[np.ix_(inner, inner)], precisions[inner], values[inner] = given.rotation, precision, data
    loc, scale, origin = np.where(fixed, loc, 0.0), np.where(fixed, scale, 1.0), np.where(fixed, 0.0, point)
    return Likelihood(rotation, loc, scale, precisions, values, origin, slopes, shifts), given.evaluations


@np.errstate(all="ignore")
def marginal_start(
    target: Target,
    start: Start,
    loc: np.ndarray,
    scale: np.ndarray,
    latents: np.ndarray,
    is_spent: Callable[[int], bool],
    rng: np.random.Generator,
) -> tuple[Start | None, int]:
    """Another point from which to center: a mode of the marginal of the latents without fixed normal priors.

    A walk uphill on the joint density leads to where the scales suit what the other latents were in the beginning; one
    on the marginal, as a Laplace approximation gives it (Rue et al. 2009, eq. 3), does not. A few steps from the start
    and from random values of these latents, then more from where they have come highest.

    :param target: the density.
    :param start: a Gaussian that approximates it.
    :param loc: as are ``scale``, ``latents`` and ``is_spent``, see :func:`conditional_likelihood`.
    :param rng: source of the random values.
    :returns: the highest point, as a Gaussian of no ELBO, with the marginal's scales of these latents; ``None`` where
        there are fewer than two of them or more than ten, or it would take too long; and the gradient evaluations that
        finding it took.
    """
    outer, given = np.flatnonzero(latents < 0), _Conditional(target, loc, scale, latents)
    cost = (_NUM_MARGINALS + 1) * _NEWTON_STEPS * len(latents)
    if not len(given.inner) or not 2 <= len(outer) <= _MOST_OUTER or is_spent(cost):
        return None, 0

    def marginal(point: np.ndarray) -> tuple[float, np.ndarray]:
        if not np.isfinite(target.value_and_grad(point)[0]):
            return -np.inf, point
        point = given.mode(point)
        value = target.value_and_grad(point)[0] - 0.5 * np.linalg.slogdet(given.gaussian(point)[1])[1]
        return (float(value) if np.isfinite(value) else -np.inf), point

    def height(pair: tuple[float, np.ndarray]) -> float:
        return pair[0]

    found = [marginal(start.loc)]
    for number in range(_NUM_MARGINALS):
        point = np.where(latents >= 0, loc, 0.0 if number % 2 else start.loc)
        point[outer] += rng.uniform(-_RADIUS, _RADIUS, len(outer))
        found.append(marginal(point))

    def climb(best: tuple[float, np.ndarray], num_steps: int) -> tuple[float, np.ndarray]:
        def descent(values: np.ndarray) -> float:
            nonlocal best
            if given.evaluations > _MOST_CLIMBING or is_spent(given.evaluations):
                return 1e300  # the walk ends here
            point = best[1].copy()  # its others are near the conditional mode
            point[outer] = values
            trial = marginal(point)
            best = max(best, trial, key=height)
            return -trial[0] if np.isfinite(trial[0]) else 1e300

        options = {"maxiter": num_steps, "maxfun": num_steps * (len(outer) + 2), "eps": 0.01}
        minimize(descent, best[1][outer], method="L-BFGS-B", options=options)
        return best

    climbed = [climb(pair, _FIRST_CLIMB) for pair in found if np.isfinite(pair[0])]
    climbed = [climb(pair, _LAST_CLIMB) for pair in sorted(climbed, key=height)[-_MOST_CLIMBS:]]
    if not climbed:
        return None, given.evaluations
    value, point = max(climbed, key=height)
    scale_tril = start.scale_tril.copy()
    for k in outer:
        away = np.zeros(len(latents))
        away[k] = _FRACTION
        bend = (2 * value - marginal(point + away)[0] - marginal(point - away)[0]) / _FRACTION**2
        scale_tril[k] = 0.0
        scale_tril[k, k] = 1.0 if not np.isfinite(bend) else max(bend, _RADIUS**-2) ** -0.5
    return Start(point, scale_tril, -np.inf, 0), given.evaluations


class _Conditional:
    """A density of the elements with fixed normal priors, in units of these, given the others: what Newton sees of it.

    Its parameters are those of :func:`conditional_likelihood`.
    """

    def __init__(self, target: Target, loc: np.ndarray, scale: np.ndarray, latents: np.ndarray):
        self.target, self.inner = target, np.flatnonzero(latents >= 0)
        self.loc, self.scale, self.latents = loc[self.inner], scale[self.inner], latents[self.inner]
        self.rotation, self.evaluations = np.eye(len(self.inner)), 0

    def look(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The precision, made positive definite, and Newton's step to the mode."""
        self.evaluations += len(point) + 1
        hessian = _finite(self.target.hessian(point)[np.ix_(self.inner, self.inner)])
        precision = -self.scale[:, None] * hessian * self.scale
        values, vectors = np.linalg.eigh(0.5 * (precision + precision.T))
        values = np.maximum(np.abs(values), _LEAST_PRECISION)
        gradient = self.scale * _finite(self.target.value_and_grad(point)[1][self.inner])
        return (vectors * values) @ vectors.T, vectors @ ((vectors.T @ gradient) / values)

    def mode(self, point: np.ndarray) -> np.ndarray:
        """Where Newton's steps lead, as long as they gain something."""
        point = np.array(point, float)
        value = self.target.value_and_grad(point)[0]
        for _ in range(_MOST_NEWTON_STEPS):
            step, gain = self.look(point)[1], -np.inf
            for share in 0.5 ** np.arange(_MOST_NEWTON_STEPS):
                trial = point.copy()
                trial[self.inner] += share * self.scale * step
                self.evaluations += 1
                gain = self.target.value_and_grad(trial)[0] - value
                if gain >= 0:
                    point, value = trial, value + gain
                    break
            if not gain > _SAME_VALUE:
                break
        return point

    def turn(self, loc: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Makes the axes of a precision, latent by latent, the coordinates; returns the Gaussian in them."""
        together = self.latents[:, None] == self.latents
        self.rotation = np.linalg.eigh(np.where(together, precision, 0.0))[1]
        return self.rotation.T @ loc, self.rotation.T @ precision @ self.rotation

    def gaussian(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Location and precision in these coordinates."""
        precision, step = self.look(point)
        return (
            self.rotation.T @ ((point[self.inner] - self.loc) / self.scale + step),
            self.rotation.T @ precision @ self.rotation,
        )


def _finite(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), a, 0.0)


def _observations(loc: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precisions and values of independent observations of standard normals that give a Gaussian's location and the
    diagonal of its precision; 0 where nothing is told."""
    each = np.diagonal(precision) - 1
    told = each > _LEAST_CURVATURE
    return np.where(told, each, 0.0), np.where(told, loc * (1 + each) / np.where(told, each, 1.0), 0.0)


def _slope_and_shift(
    below: tuple, here: tuple, above: tuple, latents: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the logarithms of precisions, and those of data with the opposite sign."""
    told = (below[0] > 0) & (here[0] > 0) & (above[0] > 0)
    sides = np.diff(np.log(np.where(told, [below[0], here[0], above[0]], 1.0)), axis=0) / step
    # the lesser one, where they agree in sign: what is far from a line is not to be extrapolated
    slope = np.where(sides[0] * sides[1] > 0, np.sign(sides[0]) * np.abs(sides).min(0), 0.0)
    shift, moved = np.zeros_like(slope), np.where(told, above[1] - below[1], 0.0) / (2 * step)
    weight, latent = here[0] / (1 + here[0]), latents[latents >= 0]
    for number in np.unique(latent):  # a scale takes a latent's data along, by half the slope; a noise does not
        of_it = latent == number
        lever = np.where(of_it, 0.5 * slope * here[1], 0.0)
        share = -(weight * moved * lever).sum() / max((weight * lever**2).sum(), 1e-300)
        shift += np.where(of_it, 0.5 * slope * np.clip(share, 0.0, 1.0), 0.0)
    return slope, shift


def _divergence(below: tuple, here: tuple, above: tuple, *observations: tuple) -> float:
    """Mean KL divergence of Gaussians at the two sides from what observations there make of the one between, whose
    location is free to move along a line."""
    whitened = []
    for (loc, precision), (told, data) in zip((below, here, above), observations, strict=True):
        s = (1 + told) ** -0.5
        whitened.append(((loc - told * s**2 * data) / s, s[:, None] * precision * s))
    away = 0.5 * (whitened[0][0] + whitened[2][0]) - whitened[1][0]
    divergences = []
    for _, precision in whitened[::2]:
        ratio = np.linalg.solve(whitened[1][1], precision)
        log_det = np.linalg.slogdet(ratio)[1]
        divergences.append(0.5 * (np.trace(ratio) - len(away) - log_det + away @ precision @ away))
    return float(np.mean(divergences))


def _walks(target: Target, starts: Sequence[np.ndarray]) -> Iterable[tuple[list[np.ndarray], np.ndarray | None, int]]:
    """:func:`_walk` from every start."""
    if target.values_and_grads is None:
        return (_walk(target, start) for start in starts)
    return InStep(target).run(_walk, starts)


def _walk(target: Target, start: np.ndarray) -> tuple[list[np.ndarray], np.ndarray | None, int]:
    """The points on the way from a start to a mode, the local Gaussian's scale at the last, where it is known, and the
    gradient evaluations.

    L-BFGS knows the scales of the last steps alone, and may end far from the mode where they differ by orders of
    magnitude between parameters. It goes on from there in coordinates that the Hessian makes alike.
    """
    path, gradients = _ascend(target.value_and_grad, start, target.is_late)
    for _ in range(_MAX_LEGS - 1 if len(start) <= MAX_HESSIAN_DIM else 0):
        if target.is_late():
            break
        end = path[-1]
        scale_tril, gradients = _gaussian_scale(target.hessian(end)), gradients + len(start)
        if scale_tril is None or not np.linalg.norm(scale_tril.T @ target.value_and_grad(end)[1]) > _ARRIVED:
            return path, scale_tril, gradients

        def whitened(z: np.ndarray, end: Any = end, scale_tril: Any = scale_tril) -> tuple[float, np.ndarray]:
            with np.errstate(all="ignore"):  # the line search turns back from what is not finite
                value, gradient = target.value_and_grad(end + scale_tril @ z)
                return value, scale_tril.T @ gradient

        leg, evaluations = _ascend(whitened, np.zeros(len(start)), target.is_late)
        path += [end + scale_tril @ z for z in leg[1:]]
        gradients += evaluations
    return path, None, gradients


def _ascend(
    value_and_grad: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, is_late: Callable[[], bool]
) -> tuple[list[np.ndarray], int]:
    """The points which L-BFGS visits on its way to a mode, and the gradient evaluations."""
    path = [np.asarray(start, float)]

    def descent(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = (np.nan, u) if is_late() else value_and_grad(u)
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            return 1e300, np.zeros_like(u)  # the line search turns back
        return -float(value), -np.asarray(gradient, float)

    def visit(u: np.ndarray) -> None:
        path.append(u.copy())

    result = minimize(descent, path[0], jac=True, method="L-BFGS-B", callback=visit, options={"maxiter": 200})
    return path, result.nfev


def _gaussian_scale(hessian: np.ndarray) -> np.ndarray | None:
    """Cholesky factor of the inverse of ``-hessian``, made positive definite; ``None`` where that fails.

    Directions of the wrong curvature get the scale of their curvature's size. The matrix is scaled to a unit diagonal
    first, so that parameters of very different units do no harm.
    """
    precision = -np.asarray(hessian, float)
    if not np.isfinite(precision).all():
        return None
    scale = 1 / np.sqrt(np.maximum(np.abs(np.diagonal(precision)), 1e-12))
    scaled = precision * scale[:, None] * scale
    values, vectors = np.linalg.eigh(0.5 * (scaled + scaled.T))
    values = np.maximum(np.abs(values), 1e-10 * np.abs(values).max())
    covariance = (vectors / values) @ vectors.T * scale[:, None] * scale
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return None
