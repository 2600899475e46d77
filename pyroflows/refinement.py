"""From a guide to draws of the posterior itself: ``FlowPosterior.refine`` and what it returns."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import NUTS
from torch import Tensor
from tqdm import tqdm

from pyroflows import _arviz, evidence
from pyroflows.checks import check_counts
from pyroflows.density import fit_density
from pyroflows.evidence import Estimate
from pyroflows.transform_module import Compose

METHODS = ("resample", "flow_mh", "nuts")
R_HAT_GOOD = 1.01  # Vehtari et al. (2021)
ESS_PER_CHAIN_GOOD = 100
_BATCH = 256  # draws per pass over the model: bounds the memory
_CHUNK = 50  # iterations between two looks at the keyboard and the progress bar
_NUM_STARTS = 1000  # draws of the guide from which the chains' starts are resampled
_MALA_ACCEPTANCE = 0.574  # optimal in many dimensions (Roberts & Rosenthal 1998)


class Scored(NamedTuple):
    """Points of the base space, mapped to the unconstrained space and scored there under model and guide."""

    unconstrained: Tensor  # (..., dim)
    log_model: Tensor  # (...)
    log_guide: Tensor  # (...)
    z: Tensor | None = None  # (..., dim), where they were found there
    log_base: Tensor | None = None  # (...)


class Run(NamedTuple):
    """What a sampler returns: points of the base space, and how it got them."""

    z: Tensor  # (chains, draws, dim)
    acceptance: dict[str, float]
    divergences: int
    gradients: dict[str, int]
    interrupted: bool


class BaseSpace:
    """The posterior in the space of the guide's base, where it is close to that base: ``u = f(z)``."""

    def __init__(self, posterior: Any):
        self.transform, self.base = posterior.guide.get_base_space()
        self._density = posterior.log_density
        self.dim = posterior.log_density.dim

    def log_density(self, z: Tensor) -> Tensor:
        """Log-densities of the posterior at vectors ``(n, dim)``, up to a constant; minus infinity for ``NaN``."""
        u, log_det = self.transform.forward_and_log_det(z)
        value = self._density(u) + log_det
        return torch.where(value.isnan(), -torch.inf, value)

    @torch.no_grad()
    def score(self, z: Tensor) -> Scored:
        """Points ``(n, dim)``, mapped and scored."""
        parts = []
        for part in z.split(_BATCH):
            u, log_det = self.transform.forward_and_log_det(part)
            log_model = self._density(u)
            log_model = torch.where(log_model.isnan(), -torch.inf, log_model)
            log_base = self.base.log_prob(part)
            parts.append(Scored(u, log_model, log_base - log_det, part, log_base))
        return Scored(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def starts(self, n: int) -> Tensor:
        """Starts of chains ``(n, dim)``: draws of the guide, resampled by Pareto-smoothed importance weights."""
        z = self.base.sample((_NUM_STARTS,))
        scored = self.score(z)
        weights = np.exp(_arviz.psis((scored.log_model - scored.log_guide).double().numpy(force=True))[0])
        return z[torch.multinomial(torch.as_tensor(weights), n, replacement=True).to(z.device)]


def value_and_grad(log_density: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-densities ``(n,)`` and their gradients at vectors ``(n, dim)``."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_density(z)
        gradient = torch.autograd.grad(value.sum(), z)[0]
    return value.detach(), gradient


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
        self.log_model, self.log_guide = (
            torch.as_tensor(x).double().numpy(force=True) for x in (scored.log_model, scored.log_guide)
        )
        self.acceptance, self.divergences = run.acceptance, run.divergences
        self.gradients, self.interrupted = run.gradients, run.interrupted

    # -- draws -----------------------------------------------------------------------------------------------------
    @cached_property
    def _sites(self) -> dict[str, Tensor]:
        shape = self.unconstrained.shape[:2]
        sites = self.posterior._constrain(self.unconstrained.reshape(-1, self.unconstrained.shape[-1]))
        return {name: x.reshape(*shape, *x.shape[1:]) for name, x in sites.items()}

    def get_samples(self, group_by_chain: bool = False, *, deterministic: bool = False) -> dict[str, Tensor]:
        """Draws of the latent sites, as Pyro's ``MCMC`` gives them.

        :param group_by_chain: whether each is ``(chains, draws, *site_shape)``, not ``(chains * draws, *site_shape)``.
        :param deterministic: whether to give the deterministic sites too, as of :meth:`FlowPosterior.sample`.
        """
        names = self._sites if deterministic else self.posterior.log_density.site_names
        sites = {name: self._sites[name] for name in names}
        return sites if group_by_chain else {name: x.flatten(0, 1) for name, x in sites.items()}

    @torch.enable_grad()
    def adapt(self, *, num_steps: int = 1000, progress_bar: bool = True) -> Any:
        """The guide with its flow trained further on these draws, by maximum likelihood: a new ``FlowPosterior``.

        That is the divergence from posterior to guide, which makes the guide cover what it missed, where the ELBO makes
        it avoid what it should not cover. A fifth of the draws is held out, and the best parameters on them are kept.
        The model is not evaluated; its gradients spent so far are counted as the new guide's.

        :param num_steps: gradient steps at most.
        :param progress_bar: whether to show one.
        """
        posterior = self.posterior
        guide = copy.deepcopy(posterior.guide)
        layers = list(guide.transform.layers)  # type: ignore[union-attr, arg-type]
        count = len(guide.outer_layers)
        inner, outer = Compose(layers[:-count]).requires_grad_(True), Compose(layers[-count:])
        base = guide._modules.get("learned_base")
        with torch.no_grad():
            x = outer.inverse_and_log_det(self.unconstrained.flatten(0, 1))[0]
        _, fit = fit_density(  # in place
            inner,
            x,
            base=guide.get_base_dist() if base is None else base,  # type: ignore[arg-type]
            num_steps=num_steps,
            learning_rate=1e-3,
            validation=0.2,
            patience=num_steps,
            standardize=False,
            progress_bar=progress_bar,
        )
        return posterior._with(guide, sum(self.gradients.values()), self.seconds + fit.seconds)

    # -- diagnostics -----------------------------------------------------------------------------------------------
    @cached_property
    def _diagnostics(self) -> dict[str, float]:
        return _arviz.diagnostics(self.unconstrained.double().numpy(force=True))

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
        assert self._z is not None and self._log_base is not None
        log_det = self._log_base.double().numpy(force=True) - self.log_guide
        square = self._z.double().square().sum(-1).numpy(force=True)
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
            "posterior": {name: x.numpy(force=True) for name, x in self._sites.items()},
            "sample_stats": {"lp": self.log_model, "log_guide": self.log_guide},
            "observed_data": self.posterior.log_density.observed(),
        }
        if log_likelihood:
            groups["log_likelihood"] = self.posterior._log_likelihood(self.unconstrained)
        attrs = {"inference_library": "pyroflows", "refinement": self.method, "pareto_k": self.pareto_k}
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
    begin = time.perf_counter()
    before = {"fit": posterior.history.gradients}
    if adapt and method != "resample":
        first = refine(
            posterior,
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
        posterior = first.adapt(progress_bar=progress_bar)
        before["adaptation"] = posterior.history.gradients - before["fit"]
    space = BaseSpace(posterior)
    if method == "resample":
        scored, run = _resample(posterior, (num_chains, num_samples))
    else:
        bar = tqdm(total=num_warmup + num_samples, desc=f"refine {method}", disable=not progress_bar)
        starts = space.starts(num_chains)
        with bar:
            if method == "flow_mh":
                run = _flow_mh(space, starts, num_warmup, num_samples, bar)
            else:
                options = {"target_accept_prob": target_accept_prob, "max_tree_depth": max_tree_depth}
                run = _nuts(space, starts, num_warmup, num_samples, bar, options)
        if not run.z.shape[1]:
            raise KeyboardInterrupt("refine: interrupted during warm-up, before the first draw.")
        flat = space.score(run.z.reshape(-1, space.dim))
        scored = Scored(*(x.reshape(*run.z.shape[:2], *x.shape[1:]) for x in flat if x is not None))
    run = run._replace(gradients={**before, **run.gradients})
    return RefinedPosterior(posterior, method, scored, run, time.perf_counter() - begin)


def _resample(posterior: Any, shape: tuple[int, int]) -> tuple[Scored, Run]:
    index, draws = posterior._resampled(shape), posterior.draws
    scored = Scored(draws.unconstrained[index], draws.log_model[index], draws.log_guide[index])  # type: ignore[arg-type]
    return scored, Run(scored.unconstrained[..., :0], {}, 0, {}, False)


class _Chain(NamedTuple):
    """State of Metropolis-Hastings: points of the base space ``(chains, dim)``, scored."""

    z: Tensor
    target: Tensor  # (chains,)
    gradient: Tensor  # (chains, dim)
    log_weight: Tensor  # log of target over base (chains,)


def _flow_mh(space: BaseSpace, z: Tensor, num_warmup: int, num_samples: int, bar: tqdm) -> Run:
    """Independence Metropolis-Hastings with the guide as proposal, each followed by a step of MALA.

    Both leave the posterior invariant. The proposals do not depend on the chains, so those of many iterations are
    scored in one batched pass (as in Gabrie et al. 2022; Metropolis-adjusted Langevin: Roberts & Tweedie 1996).
    """
    chains = len(z)

    def score(z: Tensor) -> _Chain:
        target, gradient = value_and_grad(space.log_density, z)
        return _Chain(z, target, gradient, target - space.base.log_prob(z))

    def proposals(n: int) -> list[_Chain]:
        parts = [score(part) for part in space.base.sample((n * chains,)).split(_BATCH)]
        whole = (torch.cat(column).reshape(n, chains, *column[0].shape[1:]) for column in zip(*parts, strict=True))
        return [_Chain(*row) for row in zip(*whole, strict=True)]

    def step(state: _Chain, proposal: _Chain, size: float) -> tuple[_Chain, Tensor, Tensor, Tensor]:
        flow_accepted = torch.rand_like(state.target).log() < proposal.log_weight - state.log_weight
        state = _choose(flow_accepted, proposal, state)
        noise = torch.randn_like(state.z)
        moved = score(state.z + 0.5 * size**2 * state.gradient + size * noise)
        back = (state.z - moved.z - 0.5 * size**2 * moved.gradient) / size
        log_ratio = moved.target - state.target + 0.5 * (noise.square().sum(-1) - back.square().sum(-1))
        probability = torch.where(log_ratio.isnan(), 0.0, log_ratio.clamp(max=0.0).exp())
        local_accepted = torch.rand_like(probability) < probability
        return _choose(local_accepted, moved, state), flow_accepted, local_accepted, probability

    state, log_step = score(z), math.log(1.65 * space.dim ** (-1 / 6))
    draws: list[Tensor] = []
    accepted: list[Tensor] = []
    queue: list[_Chain] = []
    done, interrupted = 0, False
    try:
        while done < num_warmup + num_samples:
            queue = queue or proposals(min(_CHUNK, num_warmup + num_samples - done))
            state, *kinds, probability = step(state, queue.pop(), math.exp(log_step))
            if done < num_warmup:
                log_step += (float(probability.mean()) - _MALA_ACCEPTANCE) / math.sqrt(1 + done)
            else:
                draws.append(state.z)
                accepted.append(torch.stack(kinds).double().mean(1))
            bar.update()
            done += 1
    except KeyboardInterrupt:
        interrupted = True
    both = 2 * chains  # a proposal of the guide and one of the local moves
    warm = min(done, num_warmup)
    rate = torch.stack(accepted).mean(0).tolist() if accepted else [math.nan] * 2
    gradients = {"warm-up": chains + both * warm, "sampling": both * (done - warm)}
    return Run(_chains(draws, z), {"flow": rate[0], "local": rate[1]}, 0, gradients, interrupted)


def _choose(accepted: Tensor, proposal: _Chain, state: _Chain) -> _Chain:
    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accepted.reshape(-1, *[1] * (new.dim() - 1)), new, old)

    return _Chain(*(choose(new, old) for new, old in zip(proposal, state, strict=True)))


@torch.enable_grad()
def _nuts(space: BaseSpace, z: Tensor, num_warmup: int, num_samples: int, bar: tqdm, options: dict) -> Run:
    """NUTS in the base space, the chains in turns (neural transport, Hoffman et al. 2019)."""
    gradients = {"warm-up": 0, "sampling": 0}
    done = 0

    def potential(latent: dict[str, Tensor]) -> Tensor:
        gradients["sampling" if done >= num_warmup else "warm-up"] += 1
        return -space.log_density(latent["z"][None])[0]

    kernels, points = [], [{"z": start.clone()} for start in z]
    for point in points:
        kernel = NUTS(potential_fn=potential, **options)
        kernel.initial_params = point
        kernel.setup(num_warmup)
        kernels.append(kernel)
    draws: list[Tensor] = []
    interrupted = False
    try:
        while done < num_warmup + num_samples:
            points = [kernel.sample(point) for kernel, point in zip(kernels, points, strict=True)]
            if done >= num_warmup:
                draws.append(torch.stack([point["z"].detach() for point in points]))
            done += 1
            bar.set_postfix(gradients=sum(gradients.values()), refresh=False)
            bar.update()
    except KeyboardInterrupt:
        interrupted = True
    rate = float(np.mean([float(kernel._mean_accept_prob) for kernel in kernels])) if draws else math.nan
    divergences = sum(len(kernel._divergences) for kernel in kernels)
    return Run(_chains(draws, z), {"local": rate}, divergences, gradients, interrupted)


def _chains(draws: list[Tensor], starts: Tensor) -> Tensor:
    """Draws ``(chains, dim)``, one after another, as ``(chains, draws, dim)``."""
    return torch.stack(draws, 1) if draws else starts[:, None][:, :0]


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
