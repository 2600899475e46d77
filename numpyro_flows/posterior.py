"""``FlowPosterior``: what a fit returns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax

from numpyro_flows import _arviz, diagnosis, evidence, refinement, serialization
from numpyro_flows.centering import Centering
from numpyro_flows.checks import check_counts
from numpyro_flows.diagnosis import Departure
from numpyro_flows.distributions import BASES, FlowDistribution
from numpyro_flows.evidence import Estimate
from numpyro_flows.guides import AutoFlow
from numpyro_flows.guides.auto_flow import FACTORIES
from numpyro_flows.initialization import Start, missed_mass
from numpyro_flows.log_density import LogDensity
from numpyro_flows.noncentering import forward, log_densities, with_density
from numpyro_flows.programs import checked_key, key_of, quick_key, words_of
from numpyro_flows.refinement import RefinedPosterior
from numpyro_flows.transform_module import TransformModule, parameters
from numpyro_flows.transforms import TriangularAffine

_MAX_JACOBIAN_DIM = 300  # of a flow, which automatic differentiation is worth
_BATCH = 256  # draws per pass over the model: bounds the memory
_MANY = 10_000  # and over the flow
_AT_ONCE = 512  # points whose density is found at once, so that one program serves few and many
PARETO_K_GOOD = 0.7  # below it Pareto-smoothed importance sampling is reliable (Vehtari et al. 2024)
SHARE_OF_EVEN = 0.99  # of draws, which weights of a variance of one percent are worth
GAP_GOOD = 0.05  # nats of KL divergence, as far as ten latents go, below which draws can be used as they are
MEAN_ERROR_GOOD, SD_ERROR_GOOD = 0.1, 0.1  # in standard deviations, and in logarithms of their ratio
MISSED_BAD = 0.01  # share of the posterior that a guide must not miss
FLOW_ERROR_BAD = 0.02  # nats of log-determinant, or standard deviations of a round trip
_GIVE_ITS_MODEL = "Give the model that the posterior was fitted to."


def tolerated(nats: float, dim: int) -> float:
    """Nats of KL divergence that so many latents may have, if ten may have ``nats``.

    Those of independent parts add up, so that the same quality of each makes a total in proportion to their number; up
    to a hundred, lest importance weights become too uneven to tell.
    """
    return nats * min(max(dim, 10), 100) / 10


class History(NamedTuple):
    """How a fit went."""

    elbo: np.ndarray  # of every step, (steps,); NaN where it was not finite
    skipped: int = 0  # steps with a gradient that was not finite
    stationary: bool = False  # whether the ELBO had stopped rising before the step size fell
    interrupted: bool = False
    gradients: int = 0  # gradient evaluations of the model, the search for a start included
    seconds: float = 0.0
    missed: float = 0.0  # share of the posterior found where the guide has nearly no mass
    tried: tuple[str, ...] = ()  # a line on every fit that was made
    stopped: str = ""  # ``"max_time"`` or ``"max_gradients"``, where it kept the run from what it would have done


class Draws(NamedTuple):
    """Draws of the guide, scored under guide and model on the unconstrained space."""

    unconstrained: Array  # (n, dim)
    log_guide: np.ndarray  # (n,)
    log_model: np.ndarray  # (n,)


class FlowPosterior:
    """A fitted flow as a posterior: draws, exact density, diagnostics.

    :param guide: the fitted guide, set up.
    :param params: its parameters, as ``SVI`` returns them.
    :param log_density: the model's log-density over the guide's latents.
    :param history: how the fit went.
    :param num_draws: draws which the diagnostics use.
    :param rng_key: key of these draws.
    """

    def __init__(
        self,
        guide: AutoFlow,
        params: dict[str, Any],
        log_density: LogDensity,
        history: History,
        *,
        num_draws: int = 40_000,
        rng_key: Array | None = None,
    ):
        self.guide, self.params, self.log_density, self.history = guide, params, log_density, history
        self.num_draws, self._key = num_draws, quick_key(jax.random.key(0) if rng_key is None else rng_key)
        self._modes: tuple[Start, ...] = ()  # which a search found, to hold the guide against
        self._num_modes = 0
        self._distribution = guide.get_posterior(params)
        self._transform: Any = self._distribution.transform
        self._base = guide.get_base(params)
        self._programs = guide._programs

    # -- programs, one for the posteriors of all data sets of a shape ----------------------------------------------
    @property
    def _flow(self) -> tuple[TransformModule, Any]:
        """The transform without the model's arguments, and the base."""
        return with_density(self._transform, None), self._distribution.base_dist

    def _constrain(self, u: Array, deterministic: bool = True) -> dict[str, Array]:
        """Latent and deterministic sites at points ``(n, dim)``."""
        sites = self._programs(_constrained, self.log_density, u)
        return sites if deterministic else {name: sites[name] for name in self.log_density.site_names}

    def _score(self, u: Array) -> Array:
        """The model's log-density at points ``(n, dim)``."""
        return self._programs(_log_model, self.log_density, u)

    # -- draws and density -----------------------------------------------------------------------------------------
    def sample(
        self, rng_key: Array, sample_shape: int | tuple[int, ...] = (), *, deterministic: bool = True
    ) -> dict[str, Array]:
        """Draws of the latent and deterministic sites, each ``(*sample_shape, *site_shape)``.

        :param rng_key: random key.
        :param sample_shape: of the draws; a number ``n`` is ``(n,)``.
        :param deterministic: whether to give the deterministic sites. (``Predictive`` computes them anew.)
        :raises TypeError: if ``rng_key`` is no key.
        :raises ValueError: if ``sample_shape`` is neither a size nor a tuple of sizes.
        """
        rng_key, shape = checked_key(rng_key, "sample"), _sizes(sample_shape)
        sites = self._constrain(self._distribution.sample(rng_key, (math.prod(shape),)), deterministic)
        return {name: x.reshape(*shape, *x.shape[1:]) for name, x in sites.items()}

    def log_prob(self, samples: dict[str, Array]) -> Array:
        """Exact log-density of draws of all latent sites, each ``(*batch, *site_shape)``; returns ``batch``.

        Densities are with respect to the constrained values (for a simplex and its like: to the coordinates of
        ``biject_to``), and minus infinity outside the support.

        :raises ValueError: if a latent site is missing, or of another shape.
        """
        like = self.guide.init_loc
        flat: dict[str, Array] = {}
        batches: dict[str, tuple[int, ...]] = {}
        for name in self.log_density.site_names:
            shape = self.guide.prototype_trace[name]["value"].shape  # type: ignore[index]
            if name not in samples:
                continue
            x = jnp.asarray(samples[name], like.dtype)
            batches[name] = x.shape[: x.ndim - len(shape)]
            if x.shape != batches[name] + shape:
                raise ValueError(f"log_prob: site {name!r} must be of shape (*batch, *{shape}), but got {x.shape}.")
            flat[name] = x.reshape(math.prod(batches[name]), *shape)
        batch = next(iter(batches.values()), ())
        if len(set(batches.values())) > 1:
            raise ValueError(f"log_prob: the sites' batch shapes differ: {batches}. Give every site the same draws.")
        if not math.prod(batch):
            return jnp.zeros(batch, like.dtype)
        u, log_det, inside = self._programs(_unconstrained, self.log_density, like, flat)
        return jnp.where(inside, self._log_guide(u) - log_det, -jnp.inf).reshape(batch)

    def _log_guide(self, u: Array) -> Array:
        """Log-density of points ``(n, dim)`` of the unconstrained space: minus infinity outside the flow's image."""
        n = -(-len(u) // _AT_ONCE) * _AT_ONCE
        padded = jnp.pad(u, ((0, n - len(u)), (0, 0)), mode="edge") if len(u) else jnp.zeros((n, u.shape[-1]), u.dtype)
        return self._programs(_log_guide, *self._flow, self.log_density, padded)[: len(u)]

    def importance_resample(
        self, rng_key: Array, num_samples: int = 4000, *, deterministic: bool = True
    ) -> dict[str, Array]:
        """Draws with the guide's error mended: resampled by Pareto-smoothed importance weights.

        Each ``(num_samples, *site_shape)``. Warns where Pareto k says that the weights cannot be trusted.

        :param rng_key: random key.
        :param num_samples: draws.
        :param deterministic: as of :meth:`sample`.
        :raises TypeError: if ``rng_key`` is no key.
        :raises ValueError: if ``num_samples`` is no positive integer.
        """
        rng_key = checked_key(rng_key, "importance_resample")
        check_counts("importance_resample", num_samples=num_samples)
        self._warn_if_unreliable("importance_resample")
        return self._constrain(self.draws.unconstrained[self._resampled(rng_key, (num_samples,))], deterministic)

    def _resampled(self, rng_key: Array, shape: tuple[int, ...]) -> np.ndarray:
        """Indices of ``draws``, drawn by their smoothed importance weights."""
        weights = np.exp(self._psis[0])
        rng_key = quick_key(rng_key)
        return np.asarray(jax.random.choice(rng_key, self.num_draws, shape, p=jnp.asarray(weights / weights.sum())))

    def refine(
        self,
        rng_key: Array,
        method: str = "flow_mh",
        *,
        num_samples: int = 1000,
        num_warmup: int = 500,
        num_chains: int = 4,
        target_accept_prob: float = 0.9,
        max_tree_depth: int = 10,
        adapt: bool = False,
        progress_bar: bool = True,
    ) -> RefinedPosterior:
        """Draws of the posterior from those of the guide, from quick to exact.

        - ``"resample"``: Pareto-smoothed importance resampling. No more evaluations of the model; as good as the
          weights are.
        - ``"flow_mh"``: independence Metropolis-Hastings with the guide as proposal, each followed by a local step
          (MALA) in the base space of the flow. Exact for many draws; two gradients a draw. The best where the guide is
          good, so that most of its proposals are accepted.
        - ``"nuts"``: NUTS in the base space (neural transport, Hoffman et al. 2019). Exact for many draws, from poor
          guides too; some seven gradients a draw where the guide is good.

        Chains start at draws of the guide, resampled by their weights. Ctrl-C ends it with the draws made until then.

        :param rng_key: random key.
        :param method: one of the above.
        :param num_samples: draws of each chain.
        :param num_warmup: iterations before them, in which the step size (and the mass of NUTS) is adapted.
        :param num_chains: chains, side by side.
        :param target_accept_prob: of NUTS.
        :param max_tree_depth: of NUTS: at most ``2**max_tree_depth`` gradients a draw.
        :param adapt: trains the flow on the draws of a first run, of ``num_warmup`` draws a chain, before the run
            proper (:meth:`RefinedPosterior.adapt`): for guides of a short fit, or that miss a tail.
        :param progress_bar: whether to show one.
        :returns: a :class:`RefinedPosterior`: draws, R-hat, ESS, acceptance rates, evidence by bridge sampling.
        :raises TypeError: if ``rng_key`` is no key.
        :raises ValueError: for an unknown method, and numbers with which nothing can be drawn.
        :raises KeyboardInterrupt: if interrupted before the first draw.
        """
        if method == "resample":
            self._warn_if_unreliable("refine")
        return refinement.refine(
            self,
            rng_key,
            method,
            num_samples=num_samples,
            num_warmup=num_warmup,
            num_chains=num_chains,
            target_accept_prob=target_accept_prob,
            max_tree_depth=max_tree_depth,
            adapt=adapt,
            progress_bar=progress_bar,
        )

    # -- diagnostics -----------------------------------------------------------------------------------------------
    @cached_property
    def draws(self) -> Draws:
        """``num_draws`` draws of the guide, scored; made once."""
        sizes = [min(_MANY, self.num_draws - done) for done in range(0, self.num_draws, _MANY)]
        keys = jax.random.split(self._key, len(sizes))
        flow = *self._flow, self.log_density
        parts = [self._programs(_draw, *flow, k, n) for k, n in zip(keys, sizes, strict=True)]
        u, log_guide = (jnp.concatenate(column) for column in zip(*parts, strict=True))
        return Draws(u, np.asarray(log_guide, float), np.asarray(self._score(u), float))

    @cached_property
    def _log_ratios(self) -> np.ndarray:
        ratios = self.draws.log_model - self.draws.log_guide
        return np.where(np.isnan(ratios), -np.inf, ratios)  # outside the model's support

    @cached_property
    def _psis(self) -> tuple[np.ndarray, float]:
        return _arviz.psis(self._log_ratios)

    @property
    def pareto_k(self) -> float:
        """Pareto shape of the importance ratios (Vehtari et al. 2024; Yao et al. 2018): below 0.7 they can be used."""
        return self._psis[1]

    @property
    def elbo(self) -> Estimate:
        """Evidence lower bound: the mean of ``log p - log q``."""
        with np.errstate(invalid="ignore"):  # a draw outside the model's support makes it minus infinity
            return Estimate(float(self._log_ratios.mean()), float(self._log_ratios.std() / self.num_draws**0.5))

    @property
    def _elbo_inside(self) -> Estimate:
        """The ELBO of the guide cut off at the edge of the model's support; :attr:`elbo` where no draw is outside.

        One draw outside makes the ELBO minus infinity, though it only loses its weight.
        """
        inside = self._log_ratios[np.isfinite(self._log_ratios)]
        if not len(inside):
            return self.elbo
        share = len(inside) / self.num_draws
        return Estimate(float(inside.mean()) + math.log(share), float(inside.std() / len(inside) ** 0.5))

    @property
    def _gap(self) -> float:
        """Nats of that ELBO below the log evidence: the KL divergence of the guide (cut off there) from the model."""
        return self._log_evidence().value - self._elbo_inside.value

    def log_evidence(self) -> Estimate:
        """Log of the model's evidence by Pareto-smoothed importance sampling.

        Warns where Pareto k says that the estimate cannot be trusted.
        """
        self._warn_if_unreliable("log_evidence")
        return self._log_evidence()

    def _log_evidence(self) -> Estimate:
        # smoothing leaves the sum of the weights nearly untouched; the plain sum is unbiased
        return evidence.importance(self._log_ratios)

    @property
    def effective_sample_size(self) -> float:
        """Importance draws are worth as many independent ones: ``1 / sum(w^2)`` of the smoothed weights."""
        return float(1 / np.square(np.exp(self._psis[0])).sum())

    @property
    def weights_are_reliable(self) -> bool:
        """Whether importance weights can be trusted: a Pareto k below 0.7, or weights that are nearly equal.

        Weights of a variance of one percent move no mean by more than a tenth of a standard deviation
        (Cauchy-Schwarz), whatever the shape of their tail.
        """
        return self.pareto_k < PARETO_K_GOOD or self.effective_sample_size > SHARE_OF_EVEN * self.num_draws

    def _warn_if_unreliable(
        self, what: str, fix: str = "Try a richer flow=, more num_steps= or refine(method='nuts')."
    ) -> None:
        if not self.weights_are_reliable:
            warnings.warn(
                f"{what}: Pareto k is {self.pareto_k:.2f}, above {PARETO_K_GOOD}: the guide misses mass of the "
                f"posterior, and importance weights cannot mend it. {fix}",
                stacklevel=3,
            )

    def _look_at(self, modes: tuple[Start, ...], rng: np.random.Generator, log_density: Callable | None = None) -> None:
        """Notes in the history what share of the posterior around ``modes`` the guide misses.

        :param modes: Gaussians in the guide's coordinates, there and elsewhere.
        :param rng: draws from them.
        :param log_density: of the model in these coordinates, ``(n, dim) -> (n,)``, if at hand.
        """
        coordinates: Any = with_density(self.guide.coordinates, None)
        dtype = self.guide.init_loc.dtype
        if log_density is None:

            def log_density(x: np.ndarray) -> np.ndarray:
                batch = jnp.asarray(x, dtype)
                return np.asarray(self._programs(log_densities, self.log_density, coordinates, batch), float)

        def log_guide(x: np.ndarray) -> np.ndarray:
            u, log_det = self._programs(forward, coordinates, self.log_density, jnp.asarray(x, dtype))
            return np.asarray(self._log_guide(u) + log_det, float)

        missed = missed_mass(modes, log_density, log_guide, self._log_evidence().value, rng)
        self._modes, self._num_modes, self.history = modes, len(modes), self.history._replace(missed=missed)

    def _with(self, params: dict[str, Any], rng_key: Array, gradients: int, seconds: float) -> FlowPosterior:
        """The posterior with other parameters of its guide, which took so many gradients and seconds more."""
        history = self.history._replace(gradients=gradients, seconds=self.history.seconds + seconds)
        new = type(self)(self.guide, params, self.log_density, history, num_draws=self.num_draws, rng_key=rng_key)
        if self._modes:
            new._look_at(self._modes, np.random.default_rng(0))
        return new

    @property
    def misses_modes(self) -> bool:
        """Whether a part of the posterior was found where the guide has nearly no mass."""
        return self.history.missed >= MISSED_BAD

    @cached_property
    def flow_error(self) -> float:
        """How wrong the flow is at sixteen draws, for every other number stands on it.

        The largest of the errors of the way there and back, in standard deviations, of the log-determinants of the two
        directions against each other, and of one against that of its Jacobian by automatic differentiation, in nats.
        The Jacobian is left out beyond 300 dimensions, and both of the last two where the log-determinant is an
        estimate. Infinite where the inverse is not found.
        """
        u, scale = self.draws.unconstrained[:16], self.draws.unconstrained.std(0)
        with_jacobian = self._transform.log_det_is_exact and u.shape[-1] <= _MAX_JACOBIAN_DIM

        try:
            found = float(self._programs(_flow_error, self._flow[0], self.log_density, u, scale, with_jacobian))
        except RuntimeError:  # a root that was not found
            found = float("nan")
        return found if np.isfinite(found) else float("inf")

    @cached_property
    def departure(self) -> Departure:
        """How far short Hamiltonian chains from the guide's draws get, beyond what the importance weights know of.

        Made once, when first asked for; their gradients are added to the history's.
        """
        found = diagnosis.departure(self, jax.random.fold_in(self._key, 1))
        self.history = self.history._replace(gradients=self.history.gradients + found.gradients)
        return found

    @cached_property
    def element_pareto_k(self) -> np.ndarray:
        """Pareto k of every unconstrained latent ``(dim,)``: of the importance ratios times its squared deviation.

        The tail that decides whether importance weights can tell the latent's variance (Vehtari et al. 2024, section
        2.2); the worst of them is where the guide is to be mended.
        """
        u = np.asarray(self.draws.unconstrained, float)
        with np.errstate(divide="ignore"):
            log_squares = 2 * np.log(np.abs(u - np.median(u, 0)))
        return np.array([_arviz.psis(self._log_ratios + column)[1] for column in log_squares.T])

    @cached_property
    def moment_error(self) -> tuple[float, float]:
        """What importance weights say of the guide's mean and standard deviations on the unconstrained space.

        The error of the mean of the worst linear combination of latents, in its standard deviations and beyond what
        chance explains (beyond 1,000 latents, of the worst of them), and the largest error of a latent's standard
        deviation, as the absolute value of the logarithm of its ratio.
        """
        weights = np.exp(self._psis[0])
        return diagnosis.moment_error(np.asarray(self.draws.unconstrained, float), weights / weights.sum())

    @property
    def _moments_are_good(self) -> bool:
        return self.moment_error[0] < MEAN_ERROR_GOOD and self.moment_error[1] < SD_ERROR_GOOD

    def verdict(self) -> str:
        """One line: whether to use the draws as they are, importance-resampled, or not."""
        outside = int((~np.isfinite(self._log_ratios)).sum())
        elbo = f"ELBO {self._elbo_inside}"
        if outside:
            elbo = f"{outside} of {self.num_draws} draws outside the model's support, {elbo} by the others"
        numbers = f"Pareto k {self.pareto_k:.2f}, {elbo}, {self._gap:.3f} below the log evidence {self._log_evidence()}"
        if self.history.interrupted:
            return f"Interrupted after {len(self.history.elbo)} steps: run again to the end ({numbers})."
        if self.flow_error > FLOW_ERROR_BAD:
            return (
                f"Do not trust: the flow's log-determinant or inverse is wrong by {self.flow_error:.3g} at its own "
                f"draws, and so is every number here. Use another flow=, or float64 ({numbers})."
            )
        if self.misses_modes:
            if self._num_modes == 1:
                where, remedy = "in tails that are not its own", "more num_steps="
            else:
                where = "in another mode"
                remedy = "base=partial(distributions.MixtureBase, num_components=4) and num_starts=16"
            return (
                f"Do not trust: about {self.history.missed:.0%} of the posterior lies where the guide has nearly no "
                f"mass: {where}, or outside its flow's image. Fit it with {remedy}, another flow=, or reparametrise "
                f"({numbers})."
            )
        if not self.weights_are_reliable:
            return (
                "Do not trust: the guide misses mass. Try refine(method='nuts', adapt=True), a richer flow= or "
                f"reparametrise ({numbers})."
            )
        if self.departure.suspicious:
            return (
                f"Do not trust: chains that start from the guide's draws go where it has too little mass: log weights "
                f"rise by {self.departure.nats:.2f} +- {self.departure.standard_error:.2f} above those expected. "
                f"Try refine(method='nuts', adapt=True), a richer flow= or reparametrise ({numbers})."
            )
        limit = tolerated(GAP_GOOD, self.log_density.dim)
        if self._gap < limit and self._moments_are_good and not outside:
            return f"Good: use the draws as they are ({numbers})."
        return f"Usable: prefer importance_resample() ({numbers})."

    # -- output ----------------------------------------------------------------------------------------------------
    def print_summary(self, num_samples: int = 4000) -> None:
        """Prints ArviZ's table of the latent and deterministic sites, and the verdict."""
        print(_arviz.summary(self.to_arviz(num_samples)).to_string())
        if self.history.skipped:
            print(f"{self.history.skipped} of {len(self.history.elbo)} steps were skipped: gradient not finite.")
        if len(self.history.tried) > 1:
            print("Tried, the best kept:", *self.history.tried, sep="\n- ")
        if self.history.stopped:
            print(f"The run was ended by {self.history.stopped}=.")
        print(self.verdict())

    def _weighted(self) -> RefinedPosterior:
        """What stands for the posterior in ArviZ's cross-validation."""
        return refinement.refine(self, self._key, "resample", num_samples=4000, num_chains=1)

    def _log_likelihood(self, unconstrained: Array) -> dict[str, np.ndarray]:
        """Log-density of each observation at points ``(*batch, dim)``: ``(*batch, *site_batch_shape)`` by site."""
        batch = unconstrained.shape[:-1]
        flat = unconstrained.reshape(-1, unconstrained.shape[-1])
        found = self._programs(_log_likelihoods, self.log_density, flat)
        return {name: np.asarray(x).reshape(*batch, *x.shape[1:]) for name, x in found.items()}

    def to_arviz(
        self,
        num_samples: int = 4000,
        *,
        log_likelihood: bool = False,
        coords: dict[str, Any] | None = None,
        dims: dict[str, list[str]] | None = None,
    ) -> Any:
        """ArviZ data (``InferenceData``, in ArviZ 1.x a ``DataTree``).

        Groups: ``posterior`` (draws of the guide, latent and deterministic sites), ``sample_stats`` (``lp``, the
        log-density under the model, and ``log_guide``, both on the unconstrained space, and ``log_weight``, the
        smoothed importance weight) and ``observed_data``.

        :param num_samples: draws, at most ``num_draws``.
        :param log_likelihood: adds the group of that name: of each observation. ``arviz.loo`` takes draws for the
            posterior's, so give it ``refine(...).to_arviz(log_likelihood=True)`` where the guide is not good.
        :param coords: labels of dimensions, as ArviZ takes them: ``{"school": names}``.
        :param dims: of the sites, likewise: ``{"theta": ["school"], "y": ["school"]}``.
        :raises ValueError: if ``num_samples`` is no positive integer, or ``dims`` names no site.
        """
        check_counts("to_arviz", num_samples=num_samples)
        n = min(num_samples, self.num_draws)
        sites = {name: np.asarray(x)[None] for name, x in self._constrain(self.draws.unconstrained[:n]).items()}
        stats = {
            "lp": self.draws.log_model[None, :n],
            "log_guide": self.draws.log_guide[None, :n],
            "log_weight": self._psis[0][None, :n],
        }
        groups = {"posterior": sites, "sample_stats": stats, "observed_data": self.log_density.observed()}
        if log_likelihood:
            groups["log_likelihood"] = self._log_likelihood(self.draws.unconstrained[None, :n])
        attrs = {
            "inference_library": "numpyro_flows",
            "pareto_k": self.pareto_k,
            "elbo": self.elbo.value,
            "log_evidence": self._log_evidence().value,
        }
        return _arviz.from_groups(groups, attrs, coords, dims)

    def plot(self, var_names: str | list[str] | None = None, num_samples: int = 2000, *, kind: str = "summary") -> Any:
        """Draws the posterior.

        - ``kind="summary"``: the ELBO of every step, the importance ratios with Pareto k, and each variable's marginal,
          by the guide and importance-weighted.
        - ``kind="pair"``: every element of the variables against every other, by ArviZ, of importance-resampled draws.
          Without ``var_names``, of the unconstrained latents (``u[0]``, ...) that the guide fits worst, four at most:
          those whose Pareto k is the largest, of the ratios as they bear on the element's variance.

        :param var_names: latent or deterministic sites, all unless given.
        :param num_samples: draws shown.
        :param kind: one of the above.
        :returns: the matplotlib figure.
        :raises ValueError: for another kind, names that are no sites, and if ``num_samples`` is no positive integer.
        """
        check_counts("plot", num_samples=num_samples)
        if kind == "summary":
            return _arviz.plot(self, var_names, num_samples)
        if kind != "pair":
            raise ValueError(f"plot: kind must be 'summary' or 'pair', but got {kind!r}.")
        u = self.draws.unconstrained[self._resampled(jax.random.fold_in(self._key, 2), (num_samples,))]
        if var_names is None:
            worst = np.argsort(-self.element_pareto_k, kind="stable")[:4]
            sites = {f"u[{i}]": np.asarray(u[None, :, i]) for i in sorted(worst)}
        else:
            sites = {name: np.asarray(x)[None] for name, x in self._constrain(u).items()}
        return _arviz.plot_pair(_arviz.from_groups({"posterior": sites}, {}), var_names)

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Writes weights, the model's arguments and the history to one safetensors file. No pickle.

        :raises ValueError: if the model's arguments are not made of arrays, numbers, strings and containers of them.
        """
        tensors: dict[str, Any] = {"history.elbo": self.history.elbo}
        arguments = {"args": list(self.log_density.args), "kwargs": self.log_density.kwargs}
        metadata = {
            "arguments": serialization.pack(arguments, tensors, "model"),
            "flow": serialization.describe(self.guide.flow, FACTORIES),
            "base": serialization.describe(self.guide.base, BASES) if self.guide.base else None,
            "guide": {
                "base_df": self.guide.base_df,
                "full_rank": self.guide.full_rank,
                "noncentered": self.guide.noncentering is not None,
            },
            "scale_is_matrix": isinstance(self.guide.outer_layers[0], TriangularAffine),
            "centered": self.guide.centering is not None,
            "num_draws": self.num_draws,
            "key": words_of(self._key),
            "num_modes": self._num_modes,
            "history": self.history._replace(elbo=None)._asdict(),  # type: ignore[arg-type]
            "departure": vars(self).get("departure"),  # whose gradients are among the history's
            "latents": _landmarks(self.log_density),
        }
        for prefix, module in (("transform", self._transform), ("base", self._base)):
            weights = {} if module is None else serialization.state_dict(module)
            tensors.update({f"{prefix}.{name}": value for name, value in weights.items()})
        serialization.save(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | Path, model: Callable, flow: Callable | None = None, base: Callable | None = None
    ) -> FlowPosterior:
        """Reads a posterior back.

        :param path: what :meth:`save` wrote.
        :param model: the model it was fitted to.
        :param flow: the guide's flow factory, needed if it was not one of ``flows`` or a ``partial`` of one.
        :param base: the factory of its learned base, needed if it was not one of ``distributions`` or a ``partial`` of
            one.
        :raises TypeError: if ``flow`` or ``base`` is no factory; the model's arguments are in the file.
        :raises ValueError: if the file is not a posterior's, or its latents are not the model's, or the weights do not
            fit the flow.
        """
        for name, given in (("flow", flow), ("base", base)):
            if not (given is None or callable(given)):
                raise TypeError(
                    f"load: {name}= takes a factory, not {type(given).__name__}. (The model's arguments are in the "
                    "file, and are not given again.)"
                )
        tensors, metadata = serialization.load(path)
        if "arguments" not in metadata:
            raise ValueError(f"load: {str(path)!r} holds no posterior.")
        if flow is None and metadata["flow"] is None:
            raise ValueError("load: the posterior's flow was not one of flows.*: pass its factory as flow=.")
        factory = flow or serialization.build(metadata["flow"], FACTORIES)
        if base is None and metadata.get("base") is not None:
            base = serialization.build(metadata["base"], BASES)
        if base is None and any(name.startswith("base.") for name in tensors):
            raise ValueError("load: the posterior's base was not one of distributions.*: pass its factory as base=.")
        arguments = serialization.unpack(metadata["arguments"], tensors)
        args, kwargs = tuple(arguments["args"]), arguments["kwargs"]
        guide = AutoFlow(model, factory, base=base, **metadata["guide"])
        log_density = guide.log_density(*args, **kwargs)
        if "latents" in metadata:
            _check_latents(log_density, metadata["latents"])
        if metadata["scale_is_matrix"]:
            guide.start_at(guide.init_loc, jnp.eye(guide.latent_dim))
        if metadata.get("centered"):
            guide.set_centering(Centering(guide.latent_dim))
        weights = {
            part: {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
            for part in ("transform", "base")
        }
        assert guide.transform is not None
        transform = serialization.load_state_dict(guide.transform, weights["transform"])
        params = {f"{guide.prefix}_flow$params": parameters(transform)}
        if guide.learned_base is not None:
            learned_base = serialization.load_state_dict(guide.learned_base, weights["base"])
            params[f"{guide.prefix}_base$params"] = parameters(learned_base)
        noted = {**metadata["history"], "tried": tuple(metadata["history"].get("tried", ()))}
        history = History(**{**noted, "elbo": np.asarray(tensors["history.elbo"])})
        found = cls(guide, params, log_density, history, num_draws=metadata["num_draws"])
        if "key" in metadata:
            found._key = key_of(*metadata["key"])  # for the same draws, and the same verdict
        found._num_modes = metadata.get("num_modes", 0)
        if metadata.get("departure"):
            found.departure = Departure(*metadata["departure"])
        return found


def _sizes(sample_shape: int | tuple[int, ...]) -> tuple[int, ...]:
    shape = (sample_shape,) if isinstance(sample_shape, int | np.integer) else sample_shape
    if not (isinstance(shape, tuple | list) and all(isinstance(n, int | np.integer) and n >= 0 for n in shape)):
        raise ValueError(f"sample: sample_shape must be a size or a tuple of sizes, but got {sample_shape!r}.")
    return tuple(map(int, shape))


def _landmarks(log_density: LogDensity) -> dict[str, Any]:
    """Where the latents are if all unconstrained ones are 1: it tells their order, shapes and supports."""
    with numpyro.validation_enabled(False):
        sites = log_density.constrain(jnp.ones(log_density.dim))
    return {name: sites[name].tolist() for name in log_density.site_names}


def _check_latents(log_density: LogDensity, saved: dict[str, Any]) -> None:
    """Raises a ``ValueError`` unless the model's latents are those of a file."""
    found = _landmarks(log_density)
    here, there = ([(name, np.shape(x)) for name, x in sites.items()] for sites in (found, saved))
    if here != there:
        raise ValueError(f"load: the model's latents are {here}, but those in the file are {there}. {_GIVE_ITS_MODEL}")
    moved = [name for name, x in found.items() if not np.allclose(x, saved[name], 1e-3, 1e-6, equal_nan=True)]
    if moved:
        raise ValueError(f"load: the support of {moved} in the model is not that in the file. {_GIVE_ITS_MODEL}")


# -- what is compiled, of transforms without the model's arguments -----------------------------------------------------
def _constrained(log_density: LogDensity, u: Array) -> dict[str, Array]:
    return lax.map(log_density.constrain, u, batch_size=_BATCH)


def _unconstrained(log_density: LogDensity, like: Array, samples: dict[str, Array]) -> tuple[Array, Array, Array]:
    slack = jnp.finfo(like.dtype).eps ** 0.5

    def one(draw: dict[str, Array]) -> tuple[Array, Array, Array]:
        u, log_det = log_density.unconstrain(draw)
        u = jnp.where(jnp.isfinite(u), u, like)
        back = log_density.constrain(u)  # not where it came from, if that is outside the support
        inside = jnp.stack([jnp.isclose(back[name], x, slack, slack).all() for name, x in draw.items()]).all()
        return u, log_det, inside

    return lax.map(one, samples, batch_size=_BATCH)


def _log_model(log_density: LogDensity, u: Array) -> Array:
    return lax.map(log_density, u, batch_size=_BATCH)


def _log_likelihoods(log_density: LogDensity, u: Array) -> dict[str, Array]:
    return lax.map(log_density.log_likelihood, u, batch_size=_BATCH)


def _draw(transform: TransformModule, base: Any, log_density: LogDensity, key: Array, n: int) -> tuple[Array, Array]:
    return FlowDistribution(base, with_density(transform, log_density)).sample_and_log_prob(key, (n,))


def _log_guide(transform: TransformModule, base: Any, log_density: LogDensity, u: Array) -> Array:
    x, log_det = with_density(transform, log_density).inverse_and_log_det(u)
    inside = jnp.isfinite(x).all(-1)
    return jnp.where(inside, base.log_prob(jnp.where(inside[:, None], x, 0.0)) + log_det, -jnp.inf)


def _flow_error(
    transform: TransformModule, log_density: LogDensity, u: Array, scale: Array, with_jacobian: bool
) -> Array:
    transform = with_density(transform, log_density)

    def twice(x: Array) -> tuple[Array, tuple[Array, Array]]:
        y, log_det = transform.forward_and_log_det(x)
        return y, (y, log_det)

    x, back_log_det = transform.inverse_and_log_det(u)
    if not with_jacobian:
        y, log_det = transform.forward_and_log_det(x)
    else:
        jacobian, (y, log_det) = jax.vmap(jax.jacfwd(twice, has_aux=True))(x)
    errors = [jnp.abs(y - u) / scale]
    if transform.log_det_is_exact:
        errors.append(jnp.abs(log_det + back_log_det))
    if with_jacobian:
        errors.append(jnp.abs(jnp.linalg.slogdet(jacobian)[1] - log_det))
    return jnp.stack([part.max() for part in errors]).max()
