"""From a guide to draws of the posterior itself: ``FlowPosterior.refine`` and what it returns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.infer import NUTS
from tqdm import tqdm

from numpyro_flows import _arviz, evidence
from numpyro_flows.checks import check_counts
from numpyro_flows.density import _fit_modules
from numpyro_flows.evidence import Estimate
from numpyro_flows.log_density import LogDensity
from numpyro_flows.noncentering import forward_and_log_density, inverse, with_density
from numpyro_flows.programs import Programs, checked_key
from numpyro_flows.transform_module import Compose, TransformModule, parameters

METHODS = ("resample", "flow_mh", "nuts")
R_HAT_GOOD = 1.01  # Vehtari et al. (2021)
ESS_PER_CHAIN_GOOD = 100
_BATCH = 256  # draws per pass over the model: bounds the memory
_CHUNK = 50  # iterations between two looks at the keyboard and the progress bar
_NUM_STARTS = 1000  # draws of the guide from which the chains' starts are resampled
_MALA_ACCEPTANCE = 0.574  # optimal in many dimensions (Roberts & Rosenthal 1998)


class Scored(NamedTuple):
    """Points of the base space, mapped to the unconstrained space and scored there under model and guide."""

    unconstrained: Array  # (..., dim)
    log_model: Array  # (...)
    log_guide: Array  # (...)
    z: Array | None = None  # (..., dim), where they were found there
    log_base: Array | None = None  # (...)


class Run(NamedTuple):
    """What a sampler returns: points of the base space, and how it got them."""

    z: np.ndarray  # (chains, draws, dim)
    acceptance: dict[str, float]
    divergences: int
    gradients: dict[str, int]
    interrupted: bool


class BaseSpace(eqx.Module):
    """The posterior in the space of the guide's base, where it is close to that base: ``u = f(z)``."""

    base: Any
    _transform: TransformModule  # without the model's arguments
    _log_density: LogDensity
    dim: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, posterior: Any):
        transform, self.base = posterior.guide.get_base_space(posterior.params)
        self._transform, self._log_density = with_density(transform, None), posterior.log_density
        self.dim, self.dtype = posterior.log_density.dim, posterior.guide.init_loc.dtype

    def _forward(self, z: Array) -> tuple[Array, Array, Array]:
        """Latent vector of one ``z`` ``(dim,)``, the log-determinant, and the model's log-density."""
        u, log_det, value = (part[0] for part in forward_and_log_density(self._transform, self._log_density, z[None]))
        return u, log_det, jnp.where(jnp.isnan(value), -jnp.inf, value)

    def log_density(self, z: Array) -> Array:
        """Log-density of the posterior at one vector ``(dim,)``, up to a constant; minus infinity for ``NaN``."""
        _, log_det, log_model = self._forward(z)
        value = log_model + log_det
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def score(self, z: Array) -> Scored:
        """Points ``(n, dim)``, mapped and scored."""
        return lax.map(self._score, z, batch_size=_BATCH)

    def _score(self, z: Array) -> Scored:
        (u, log_det, log_model), log_base = self._forward(z), self.base.log_prob(z)
        return Scored(u, log_model, log_base - log_det, z, log_base)


def _starts(space: BaseSpace, programs: Programs, rng_key: Array, n: int) -> Array:
    """Starts of chains ``(n, dim)``: draws of the guide, resampled by Pareto-smoothed importance weights."""
    draw_key, choice_key = jax.random.split(rng_key)
    z = space.base.sample(draw_key, (_NUM_STARTS,))
    scored = programs(BaseSpace.score, space, z)
    weights = np.exp(_arviz.psis(np.asarray(scored.log_model - scored.log_guide, float))[0])
    return z[jax.random.choice(choice_key, _NUM_STARTS, (n,), p=jnp.asarray(weights / weights.sum()))]


class RefinedPosterior:
    """Draws of the posterior in several chains, with what tells whether to trust them: what ``refine`` returns.

    :ivar method: ``"resample"``, ``"flow_mh"`` or ``"nuts"``.
    :ivar unconstrained: draws ``(chains, draws, dim)`` on the unconstrained space.
    :ivar log_model: their log-densities under the model ``(chains, draws)``.
    :ivar log_guide: and under the guide.
    :ivar acceptance: rates of acceptance by kind of move: ``"flow"`` (independent proposals of the guide) and
        ``"local"``.
    :ivar divergences: of NUTS, after warm-up.
    :ivar gradients: evaluations of the model's gradient by what they served: ``"fit"``, ``"adaptation"`` (of the flow,
        if asked for), ``"warm-up"``, ``"sampling"``.
    :ivar seconds: of the refinement.
    :ivar interrupted: whether it was ended by Ctrl-C, with the draws made until then.
    """

    def __init__(self, posterior: Any, method: str, scored: Scored, run: Run, seconds: float):
        self.posterior, self.method, self.seconds = posterior, method, seconds
        self._z, self._log_base = scored.z, scored.log_base
        self.unconstrained = scored.unconstrained
        self.log_model, self.log_guide = np.asarray(scored.log_model, float), np.asarray(scored.log_guide, float)
        self.acceptance, self.divergences = run.acceptance, run.divergences
        self.gradients, self.interrupted = run.gradients, run.interrupted

    # -- draws -----------------------------------------------------------------------------------------------------
    @cached_property
    def _sites(self) -> dict[str, Array]:
        shape = self.unconstrained.shape[:2]
        sites = self.posterior._constrain(self.unconstrained.reshape(-1, self.unconstrained.shape[-1]))
        return {name: x.reshape(*shape, *x.shape[1:]) for name, x in sites.items()}

    def get_samples(self, group_by_chain: bool = False, *, deterministic: bool = True) -> dict[str, Array]:
        """Draws of the latent and deterministic sites, as NumPyro's ``MCMC`` gives them.

        :param group_by_chain: whether each is ``(chains, draws, *site_shape)``, not ``(chains * draws, *site_shape)``.
        :param deterministic: whether to give the deterministic sites, as of :meth:`FlowPosterior.sample`.
        """
        names = self._sites if deterministic else self.posterior.log_density.site_names
        sites = {name: self._sites[name] for name in names}
        return sites if group_by_chain else {name: x.reshape(-1, *x.shape[2:]) for name, x in sites.items()}

    def adapt(self, rng_key: Array, *, num_steps: int = 1000, progress_bar: bool = True) -> Any:
        """The guide with its flow trained further on these draws, by maximum likelihood: a new ``FlowPosterior``.

        That is the divergence from posterior to guide, which makes the guide cover what it missed, where the ELBO makes
        it avoid what it should not cover. A fifth of the draws is held out, and the best parameters on them are kept.
        The model is not evaluated; its gradients spent so far are counted as the new guide's.

        :param rng_key: random key.
        :param num_steps: gradient steps at most.
        :param progress_bar: whether to show one.
        :raises TypeError: if ``rng_key`` is no key.
        """
        rng_key = checked_key(rng_key, "adapt")
        guide, old = self.posterior.guide, self.posterior._transform
        outer = Compose(guide.outer_layers)
        inner = Compose(old.layers[: -len(guide.outer_layers)])
        base = guide.get_base_dist(self.posterior.params) if self.posterior._base is None else self.posterior._base
        flat = self.unconstrained.reshape(-1, self.unconstrained.shape[-1])
        x, _ = self.posterior._programs(inverse, with_density(outer, None), self.posterior.log_density, flat)
        fit_key, draw_key = jax.random.split(rng_key)
        trained, learned_base, _, fit = _fit_modules(
            inner,
            x,
            base=base,
            context=None,
            objective="likelihood",
            num_steps=num_steps,
            batch_size=256,
            learning_rate=1e-3,
            validation=0.2,
            patience=num_steps,
            standardize=False,
            progress_bar=progress_bar,
            key=fit_key,
        )
        params = {f"{guide.prefix}_flow$params": parameters(Compose([trained, outer]))}
        if self.posterior._base is not None:
            params[f"{guide.prefix}_base$params"] = parameters(learned_base)
        return self.posterior._with(params, draw_key, sum(self.gradients.values()), self.seconds + fit.seconds)

    # -- diagnostics -----------------------------------------------------------------------------------------------
    @cached_property
    def _diagnostics(self) -> dict[str, float]:
        return _arviz.diagnostics(np.asarray(self.unconstrained, float))

    @property
    def r_hat(self) -> float:
        """Largest rank-normalised split R-hat of the unconstrained latents (Vehtari et al. 2021).

        ``NaN`` for resampled draws, which are no chains.
        """
        return float("nan") if self.method == "resample" else self._diagnostics["r_hat"]

    @property
    def ess_bulk(self) -> float:
        """Least bulk effective sample size of the unconstrained latents; of resampled draws that of the weights."""
        return self._importance_ess if self.method == "resample" else self._diagnostics["ess_bulk"]

    @property
    def ess_tail(self) -> float:
        """Least tail effective sample size of the unconstrained latents; of resampled draws that of the weights."""
        return self._importance_ess if self.method == "resample" else self._diagnostics["ess_tail"]

    @property
    def _importance_ess(self) -> float:
        return min(self.posterior.effective_sample_size, float(self.log_model.size))

    @property
    def pareto_k(self) -> float:
        """That of the guide."""
        return self.posterior.pareto_k

    def log_evidence(self, method: str | None = None, *, temperature: float | None = None) -> Estimate:
        """Log of the model's evidence, with its standard error.

        :param method: ``"importance"``: from draws of the guide alone, the default for resampled draws; ``"bridge"``:
            from draws of guide and posterior (Meng & Wong 1996), the default for the others; or ``"harmonic"``: from
            draws of the posterior alone, with the guide, concentrated, as the target of the learned harmonic mean
            (McEwen et al. 2021; by a flow: Polanska et al. 2024). That the last two agree is a check of both.
        :param temperature: of ``"harmonic"``: variance of the base of the concentrated flow, below one;
            ``1 - 1 / (2 sqrt(dim))`` unless given, at which the variance of its weights depends little on ``dim``.
        :raises ValueError: for another method, for a bridge or harmonic mean of resampled draws, and for the harmonic
            mean with a guide whose base is a mixture.
        :raises RuntimeError: if the draws of guide and posterior hardly overlap.
        """
        if method is None:
            method = "importance" if self.method == "resample" else "bridge"
        if method == "importance":
            return self.posterior.log_evidence()
        if method not in ("bridge", "harmonic"):
            raise ValueError(f"log_evidence: method must be 'importance', 'bridge' or 'harmonic', but got {method!r}.")
        if self.method == "resample":
            raise ValueError(
                f"log_evidence: method={method!r} needs draws of the posterior that are independent of the importance "
                "weights: refine with method='nuts' or 'flow_mh'."
            )
        if method == "bridge":
            self.posterior._warn_if_unreliable("log_evidence", "Try a richer flow= or more num_steps=.")
            return evidence.bridge(self.posterior._log_ratios, self.log_model - self.log_guide)
        return evidence.harmonic(self._log_concentrated(temperature) - self.log_model)

    def _log_concentrated(self, temperature: float | None) -> np.ndarray:
        """Log-density of the draws under the flow of a base of smaller variance ``(chains, draws)``."""
        dim = self.unconstrained.shape[-1]
        temperature = 1 - 0.5 / math.sqrt(dim) if temperature is None else temperature
        if not 0 < temperature < 1:
            raise ValueError(f"log_evidence: temperature must lie between 0 and 1, but got {temperature}.")
        if getattr(self.posterior._base, "multimodal", False):
            raise ValueError(
                "log_evidence: method='harmonic' concentrates the flow of a base of one mode, but the guide's is a "
                "mixture. Use method='bridge'."
            )
        log_det = np.asarray(self._log_base, float) - self.log_guide
        square = np.square(np.asarray(self._z, float)).sum(-1)
        return -0.5 * square / temperature - 0.5 * dim * math.log(2 * math.pi * temperature) - log_det

    def verdict(self) -> str:
        """One line: whether the draws can be used."""
        chains, draws = self.log_model.shape
        if self.method == "resample":
            numbers = f"Pareto k {self.pareto_k:.2f}, {self.ess_bulk:.0f} effective draws"
        else:
            rates = ", ".join(f"{rate:.0%} of {kind} moves accepted" for kind, rate in self.acceptance.items())
            numbers = (
                f"R-hat {self.r_hat:.3f}, ESS {self.ess_bulk:.0f} in the bulk and {self.ess_tail:.0f} in the tails, "
                f"{rates}" + (f", {self.divergences} divergences of {chains * draws}" if self.method == "nuts" else "")
            )
        if self.posterior.misses_modes:
            return (
                f"Do not trust: about {self.posterior.history.missed:.0%} of the posterior lies where the guide has "
                f"nearly no mass, and chains that start from the guide hardly get there. Fit it anew: see the guide's "
                f"verdict ({numbers})."
            )
        if self.interrupted and draws < ESS_PER_CHAIN_GOOD:
            return f"Interrupted after {draws} draws a chain: run again to the end ({numbers})."
        if self.method == "resample":
            if not self.posterior.weights_are_reliable:
                return f"Do not trust: importance weights cannot mend this guide. Use refine('nuts') ({numbers})."
            return f"Good: the guide's error is mended as far as its weights tell ({numbers})."
        longer = "more num_samples=" + ("" if self.method == "nuts" else ", or refine(method='nuts')")
        if not self.r_hat < R_HAT_GOOD:
            return f"Do not trust: the chains do not agree. Use {longer} ({numbers})."
        if not min(self.ess_bulk, self.ess_tail) >= ESS_PER_CHAIN_GOOD * chains:
            return f"Use with care: too few effective draws. Use {longer} ({numbers})."
        if self.divergences:
            return (
                f"Use with care: divergences tell of a part of the posterior that is hardly reached. Use "
                f"target_accept_prob=0.99, or fit a richer flow= ({numbers})."
            )
        return f"Good: draws of the posterior, exact but for Monte-Carlo error ({numbers})."

    # -- output ----------------------------------------------------------------------------------------------------
    def print_summary(self) -> None:
        """Prints ArviZ's table of the latent and deterministic sites, with diagnostics, and the verdict."""
        kind = "stats" if self.method == "resample" else "all"
        print(_arviz.summary(self.to_arviz(), kind=kind).to_string())
        spent = ", ".join(f"{n} in {what}" for what, n in self.gradients.items())
        print(f"Gradients: {spent}; {self.seconds:.1f} s after the fit.")
        print(self.verdict())

    def to_arviz(
        self,
        log_likelihood: bool = False,
        *,
        coords: dict[str, Any] | None = None,
        dims: dict[str, list[str]] | None = None,
    ) -> Any:
        """ArviZ data (``InferenceData``, in ArviZ 1.x a ``DataTree``).

        Groups: ``posterior`` (latent and deterministic sites by chain and draw), ``sample_stats`` (``lp``, the
        log-density under the model, and ``log_guide``, on the unconstrained space) and ``observed_data``.

        :param log_likelihood: adds the group of that name: of each observation, for ``arviz.loo``.
        :param coords: labels of dimensions, as ArviZ takes them: ``{"school": names}``.
        :param dims: of the sites, likewise: ``{"theta": ["school"], "y": ["school"]}``.
        :raises ValueError: if ``dims`` names no site.
        """
        groups = {
            "posterior": {name: np.asarray(x) for name, x in self._sites.items()},
            "sample_stats": {"lp": self.log_model, "log_guide": self.log_guide},
            "observed_data": self.posterior.log_density.observed(),
        }
        if log_likelihood:
            groups["log_likelihood"] = self.posterior._log_likelihood(self.unconstrained)
        attrs = {"inference_library": "numpyro_flows", "refinement": self.method, "pareto_k": self.pareto_k}
        return _arviz.from_groups(groups, attrs, coords, dims)

    def _weighted(self) -> RefinedPosterior:
        return self

    def plot(self, var_names: str | list[str] | None = None) -> Any:
        """Draws each variable's marginal and its draws by chain.

        :param var_names: latent or deterministic sites, all unless given.
        :returns: the matplotlib figure.
        """
        return _arviz.plot_chains(self.to_arviz(), var_names)


def refine(
    posterior: Any,
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
    """See :meth:`FlowPosterior.refine`."""
    check_options(method, num_samples, num_warmup, num_chains, target_accept_prob, max_tree_depth)
    rng_key = checked_key(rng_key, "refine")
    begin = time.perf_counter()
    before = {"fit": posterior.history.gradients}
    if adapt and method != "resample":
        first_key, adapt_key, rng_key = jax.random.split(rng_key, 3)
        first = refine(
            posterior,
            first_key,
            method,
            num_samples=max(num_warmup, 4),
            num_warmup=num_warmup // 2,
            num_chains=num_chains,
            target_accept_prob=target_accept_prob,
            max_tree_depth=max_tree_depth,
            progress_bar=progress_bar,
        )
        if first.interrupted:
            return first
        posterior = first.adapt(adapt_key, progress_bar=progress_bar)
        before["adaptation"] = posterior.history.gradients - before["fit"]
    space = BaseSpace(posterior)
    start_key, run_key = jax.random.split(rng_key)
    if method == "resample":
        scored, run = _resample(posterior, run_key, (num_chains, num_samples))
    else:
        bar = tqdm(total=num_warmup + num_samples, desc=f"refine {method}", disable=not progress_bar)
        programs = posterior.guide._programs
        starts = _starts(space, programs, start_key, num_chains)
        with bar:
            if method == "flow_mh":
                run = _flow_mh(space, programs, run_key, starts, num_warmup, num_samples, bar)
            else:
                options = {"target_accept_prob": target_accept_prob, "max_tree_depth": max_tree_depth}
                run = _nuts(space, run_key, starts, num_warmup, num_samples, bar, options)
        if not run.z.shape[1]:
            raise KeyboardInterrupt("refine: interrupted during warm-up, before the first draw.")
        flat = programs(BaseSpace.score, space, jnp.asarray(run.z.reshape(-1, space.dim), space.dtype))
        scored = jax.tree.map(lambda x: x.reshape(*run.z.shape[:2], *x.shape[1:]), flat)
    run = run._replace(gradients={**before, **run.gradients})
    return RefinedPosterior(posterior, method, scored, run, time.perf_counter() - begin)


def _resample(posterior: Any, rng_key: Array, shape: tuple[int, int]) -> tuple[Scored, Run]:
    index, draws = posterior._resampled(rng_key, shape), posterior.draws
    scored = Scored(draws.unconstrained[index], draws.log_model[index], draws.log_guide[index])  # type: ignore[arg-type]
    return scored, Run(np.zeros((*shape, 0)), {}, 0, {}, False)


class _Chain(NamedTuple):
    """State of Metropolis-Hastings: points of the base space ``(chains, dim)``, scored."""

    z: Array
    target: Array  # (chains,)
    gradient: Array  # (chains, dim)
    log_weight: Array  # log of target over base (chains,)


def _flow_mh(
    space: BaseSpace, programs: Programs, rng_key: Array, z: Array, num_warmup: int, num_samples: int, bar: tqdm
) -> Run:
    """Independence Metropolis-Hastings with the guide as proposal, each followed by a step of MALA.

    Both leave the posterior invariant. The proposals do not depend on the chains, so a chunk's are scored in one
    batched pass (as in Gabrie et al. 2022; Metropolis-adjusted Langevin: Roberts & Tweedie 1996).
    """
    carry = programs(_chain, space, z), jnp.asarray(math.log(1.65 * space.dim ** (-1 / 6)), space.dtype)
    draws: list[np.ndarray] = []
    accepted: list[np.ndarray] = []
    rates = np.concatenate([1 / np.sqrt(1 + np.arange(num_warmup)), np.zeros(num_samples)])
    done, interrupted = 0, False
    try:
        while done < len(rates):
            end = min(done + _CHUNK, len(rates) if done >= num_warmup else num_warmup)
            key = jax.random.fold_in(rng_key, done)
            carry, (points, *kinds) = programs(_chunk, space, carry, key, np.asarray(rates[done:end], space.dtype))
            if done >= num_warmup:
                draws.append(np.asarray(points))
                accepted.append(np.stack([np.asarray(kind) for kind in kinds]))
            bar.update(end - done)
            done = end
    except KeyboardInterrupt:
        interrupted = True
    chains = len(z)
    both = 2 * chains  # a proposal of the guide and one of the local moves
    warm = min(done, num_warmup)
    rate = np.concatenate(accepted, 1).mean((1, 2)) if accepted else np.full(2, np.nan)
    return Run(
        _chains(draws, chains, space.dim),
        {"flow": float(rate[0]), "local": float(rate[1])},
        0,
        {"warm-up": chains + both * warm, "sampling": both * (done - warm)},
        interrupted,
    )


def _chain(space: BaseSpace, z: Array) -> _Chain:
    """Points of the base space ``(chains, dim)``, scored."""
    target, gradient = jax.vmap(jax.value_and_grad(space.log_density))(z)
    return _Chain(z, target, gradient, target - space.base.log_prob(z))


def _chunk(
    space: BaseSpace, carry: tuple[_Chain, Array], key: Array, rates: Array
) -> tuple[tuple[_Chain, Array], tuple]:
    """Several iterations of :func:`_flow_mh`; ``carry`` holds the chains and the logarithm of MALA's step size."""

    def step(carry: tuple[_Chain, Array], inputs: tuple[_Chain, Array, Array]) -> tuple[tuple[_Chain, Array], tuple]:
        (state, log_step), (proposal, key, rate) = carry, inputs
        uniform_key, noise_key, accept_key = jax.random.split(key, 3)
        uniform = jax.random.uniform(uniform_key, state.target.shape, space.dtype)
        flow_accepted = jnp.log(uniform) < proposal.log_weight - state.log_weight
        state = _choose(flow_accepted, proposal, state)
        size = jnp.exp(log_step)
        noise = jax.random.normal(noise_key, state.z.shape, space.dtype)
        moved = _chain(space, state.z + 0.5 * size**2 * state.gradient + size * noise)
        back = (state.z - moved.z - 0.5 * size**2 * moved.gradient) / size
        log_ratio = moved.target - state.target + 0.5 * (jnp.square(noise).sum(-1) - jnp.square(back).sum(-1))
        probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
        local_accepted = jax.random.uniform(accept_key, probability.shape, space.dtype) < probability
        state = _choose(local_accepted, moved, state)
        log_step = log_step + rate * (probability.mean() - _MALA_ACCEPTANCE)
        return (state, log_step), (state.z, flow_accepted, local_accepted)

    steps, chains = len(rates), len(carry[0].z)
    base_key, step_key = jax.random.split(key)
    flat = space.base.sample(base_key, (steps * chains,))
    target, gradient = lax.map(jax.value_and_grad(space.log_density), flat, batch_size=_BATCH)
    proposals = _Chain(flat, target, gradient, target - space.base.log_prob(flat))
    proposals = jax.tree.map(lambda x: x.reshape(steps, chains, *x.shape[1:]), proposals)
    return lax.scan(step, carry, (proposals, jax.random.split(step_key, steps), rates))


def _choose(accepted: Array, proposal: _Chain, state: _Chain) -> _Chain:
    def choose(new: Array, old: Array) -> Array:
        return jnp.where(accepted.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, proposal, state)


def _nuts(
    space: BaseSpace, rng_key: Array, z: Array, num_warmup: int, num_samples: int, bar: tqdm, options: dict
) -> Run:
    """NUTS in the base space, chains side by side (neural transport, Hoffman et al. 2019)."""
    kernel = NUTS(potential_fn=lambda z: -space.log_density(z), **options)
    chains = len(z)
    state = kernel.init(jax.random.split(rng_key, chains), num_warmup, z, (), {})

    def step(state: Any, _: None) -> tuple[Any, tuple]:
        state = kernel.sample(state, (), {})
        return state, (state.z, state.num_steps, state.accept_prob, state.diverging)

    chunks: dict[int, Callable] = {}
    outputs: list[tuple[np.ndarray, ...]] = []
    done, interrupted = 0, False
    warm_gradients = chains
    try:
        while done < num_warmup + num_samples:
            end = min(done + _CHUNK, num_warmup + num_samples if done >= num_warmup else num_warmup)
            size = end - done
            if size not in chunks:
                chunks[size] = jax.jit(lambda state, size=size: lax.scan(step, state, None, length=size))
            state, output = chunks[size](state)
            output = tuple(np.asarray(part) for part in output)
            if done >= num_warmup:
                outputs.append(output)
            else:
                warm_gradients += int(output[1].sum())
            bar.set_postfix(gradients_per_draw=f"{output[1].mean():.1f}", refresh=False)
            bar.update(size)
            done = end
    except KeyboardInterrupt:
        interrupted = True
    gradients = {"warm-up": warm_gradients, "sampling": int(sum(output[1].sum() for output in outputs))}
    rate = float(np.concatenate([output[2] for output in outputs]).mean()) if outputs else math.nan
    divergences = int(sum(output[3].sum() for output in outputs))
    draws = _chains([output[0] for output in outputs], chains, space.dim)
    return Run(draws, {"local": rate}, divergences, gradients, interrupted)


def _chains(draws: list[np.ndarray], chains: int, dim: int) -> np.ndarray:
    """Blocks of draws ``(steps, chains, dim)`` as ``(chains, draws, dim)``."""
    return np.concatenate(draws).swapaxes(0, 1) if draws else np.zeros((chains, 0, dim))


def check_options(
    method: str, num_samples: int, num_warmup: int, num_chains: int, target_accept_prob: float, max_tree_depth: int
) -> None:
    """Raises a ``ValueError`` that names the option with which nothing can be drawn."""
    if method not in METHODS:
        raise ValueError(f"refine: method must be one of {METHODS}, but got {method!r}.")
    check_counts("refine", 4, num_samples=num_samples)
    check_counts("refine", 0, num_warmup=num_warmup)
    check_counts("refine", num_chains=num_chains, max_tree_depth=max_tree_depth)
    if not 0 < target_accept_prob < 1:
        raise ValueError(f"refine: target_accept_prob must lie between 0 and 1, but got {target_accept_prob}.")
