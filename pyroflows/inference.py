"""``FlowVI``: from a model to a posterior."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide.initialization import init_to_sample, init_to_uniform
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from pyroflows import flows
from pyroflows.centering import Centering, normal_priors
from pyroflows.checks import check_counts
from pyroflows.distributions import Base, FlexibleBase, MixtureBase, distribution_of
from pyroflows.elbo import elbo_terms, score_gradient, unfolded
from pyroflows.graphs import close, recorded_step
from pyroflows.guides import AutoFlow
from pyroflows.guides.auto_flow import check_base, check_flow
from pyroflows.initialization import (
    MAX_HESSIAN_DIM,
    Start,
    Target,
    conditional_likelihood,
    distinct,
    find_modes,
    find_start,
    gaussian_around,
    improve,
    marginal_start,
    pseudo_observations,
)
from pyroflows.log_density import LogDensity, check_plates, latent_sites, prototype_trace
from pyroflows.noncentering import points_around, pulled_back
from pyroflows.posterior import FlowPosterior, History, tolerated
from pyroflows.training import CHUNK, RECORD_FROM, Ascent, copies, settle
from pyroflows.transform_module import Compose, TransformModule

_WINDOW = 250  # steps whose mean ELBO says whether it still rises
_MOST_LEGS = 4  # of a quarter as many steps again
_MAX_ADAPTATIONS = 4  # of the non-centring, and of a centring, each from the start that the one before has found
_WORTHWHILE = 0.5  # nats of the start's ELBO by which it has to gain for another one to be tried
_WORTH_CENTERING = 0.1  # and for latents to be centred, which costs the flow nothing
_FEW_DRAWS = 2200  # of a model that runs for each: as many as a Pareto k of 0.7 needs at least (Vehtari et al. 2024)
_SEARCH_SHARE = 0.1  # of limited time or gradients, beyond which the search for a start does not go on to center
_START_SHARE = 0.3  # of limited time, beyond which the first start of a model that runs for one draw at a time is it
_NUM_PROBES = 6  # points of each kind from which a fit is searched for what it misses
_NEARER = (0.5, 0.25)  # of their distance from zero: from far out, most walks lead to the widest mode
_WIDE = 4.0  # standard deviations of the start over which half of them spread
_NEARLY_EXACT = 0.01  # nats of KL divergence of ten latents, below which a fit that no longer improves may end early
_NUM_STEPS = 5000
_GAP_POOR = 0.02  # nats of KL divergence of ten latents, above which a fit goes on
_GAP_NEAR = 0.1, 1.1  # nats, or in units of that, above which more steps will not do: the flow is not rich enough
_GAP_HOPELESS = 0.15, 1.4  # before annealing, which would spend half of the steps on what a richer flow is needed for
_RICHER_STEPS, _RICHER_RATE = 0.6, 2.0  # of a fit with a richer flow, in those of the first: as good, in less time
_HOPELESS_FROM = 1000  # steps, before which the ELBO's rise does not foretell where it ends
RICHER = (partial(flows.realnvp, rotated=True),)  # flows that a poor fit by the default one turns to


class FlowVI:
    """Fits a flow to a model's posterior, with nothing to tune.

    1. *Start*: a Gaussian found along optimisation paths from several points (``initialization.find_start``), and
       improved by natural-gradient steps on its ELBO (``initialization.improve``), in coordinates chosen by what that
       reaches. Latents whose prior depends on other latents, or has a kink (a Laplace), are non-centred first
       (:class:`Noncentering`), then with the pseudo-observations that the likelihood amounts to there, up to four
       times while that gains half a nat; and left as they are where this gains as much. Latents with a fixed normal
       prior, as in models that are non-centred by hand, are centred (:class:`Centering`) as far as the likelihood's
       curvature depends on the other latents: around the start, and if that leaves half a nat also around a mode of the
       marginal of these others, by Laplace approximations. This ends where a tenth of ``max_time`` or ``max_gradients``
       has been spent.
    2. *Ascent*: Adam on the ELBO at a constant step size for half of ``num_steps``, with the path gradient (Roeder et
       al. 2017, "sticking the landing"), whose variance vanishes as the fit becomes exact; less if the guide is nearly
       exact (half the variance of ``log p - log q``, which approximates the KL divergence, is below 0.01; in more than
       ten latents 0.001 for each, up to 0.1) and the ELBO of 250 steps is no longer above that of the 250 before by
       more than their Monte-Carlo error.
    3. *Annealing*: as many steps again, over which the step size falls to zero along a cosine. Left out where the KL
       divergence is above 0.15 still (or 1.4 times what phase 5 puts up with, if that is more), and phase 5 may take as
       long as it needs; and phase 2 ends, from 1,000 steps on, once the KL divergence would stay above it were the ELBO
       to rise on as it last did.
    4. *A look elsewhere*: paths uphill from other points, and the posterior's mass around their ends, show whether
       there are modes which the guide misses; its own draws cannot. If there are, and the base is the default, the
       fit is made once more with a ``MixtureBase`` that starts on all of them, and the better one kept.
    5. *Escalation*, where the fit is still poor: by Pareto k, by the chains of ``FlowPosterior.departure``, or by the
       gap between ELBO and importance-sampled evidence (above 0.02 nats; in more than ten latents 0.002 for each, up to
       0.2, unless ``moment_error`` is above a tenth). A quarter as many steps again from where it stands, with twice
       the draws, where that may do (the gap is below 0.1, or 1.1 times that), else a fit of the next flow of ``richer``
       (three fifths as many steps of twice the size), until one is good or none is left. Then the one of highest ELBO
       goes on where steps could make it good, as far as the ELBO's rise over as many before tells, and does so up to
       four times while each leaves little enough for the next ones. The one of highest ELBO is kept, but not for its
       Pareto k if another can be trusted, by that and by the chains; ``history.tried`` tells of all.

    The guide is ``base -> flow -> full-rank affine map -> location and scale of the start -> centring ->
    non-centring``. The last three are held fixed, so that the flow works on a posterior of about unit scale. Steps with
    a gradient that is not finite are skipped and counted; one of more than ten times the median length of the last 25
    is shortened to that.
    The first of 250 steps or more is recorded as a graph which the others run (``graphs.recorded_step``): what the
    model reads besides its arguments is taken as it was then.

    :param model: Pyro model with continuous latents.
    :param flow: factory ``flow(dim) -> TransformModule``.
    :param num_steps: most gradient steps of phases 2 and 3 together: 5,000 unless given.
    :param num_particles: draws per step, in one batched pass over the model.
    :param learning_rate: Adam's step size in phase 2.
    :param base: factory ``base(dim) -> Base`` of a base that is learned along with the flow; ``None`` for the
        standard normal. The default learns the shape of every element (:class:`FlexibleBase`): its skewness, and tails
        as heavy as the posterior asks for, which keep importance weights bounded. The price is that a positive latent,
        the exponential of one with such tails, has moments after importance resampling only. A ``MixtureBase`` serves
        posteriors of several modes: it starts on those which the search finds (give ``num_starts`` enough of them), and
        the location and scale around them all.
    :param base_df: degrees of freedom of a Student-t base, in place of ``base``.
    :param noncentered: whether latents whose prior depends on other latents (effects of unknown scale, walks,
        Gaussian processes) are taken relative to that prior, those with a Laplace prior without its kink, and those of
        models non-centred by hand relative to what the data say of them. It changes the guide alone: neither the model
        nor the sites of the posterior.
    :param path_gradient: whether phases 2 and 3 are as described, or by the plain ELBO. Unless given: where the flow's
        inverse, which families without a ``forward_and_score`` of their own need, takes no more network passes than
        its forward direction.
    :param escalate: whether to go on as in phase 5 where the fit is poor. Unless given: where ``num_steps`` and
        ``flow`` are not.
    :param richer: factories of the flows that phase 5 turns to, one after another.
    :param max_time: seconds after which the run ends with what it has reached. The phases are shortened to fit.
        This does not bound the first steps, the draws for the diagnosis, what :meth:`FlowPosterior.verdict` looks at,
        and the searches of start and modes; these two end early where the model runs for one draw at a time.
    :param max_gradients: evaluations of the model's gradient after which it ends, likewise, and repeatably.
    :param num_starts: points from which the search walks.
    :param init_loc_fn: Pyro's initialisation strategy, which gives these points.
    :param progress_bar: shows a bar with the running ELBO and the time left.
    :raises TypeError: for flows, bases or strategies that cannot be called.
    :raises ValueError: for options with which nothing can be fitted.
    """

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., TransformModule] = flows.realnvp,
        *,
        num_steps: int | None = None,
        num_particles: int = 256,
        learning_rate: float = 2e-3,
        base: Callable[..., Base] | None = FlexibleBase,
        base_df: float | None = None,
        noncentered: bool = True,
        path_gradient: bool | None = None,
        escalate: bool | None = None,
        richer: Sequence[Callable[..., TransformModule]] = RICHER,
        max_time: float | None = None,
        max_gradients: int | None = None,
        num_starts: int = 4,
        init_loc_fn: Callable = init_to_uniform,
        progress_bar: bool = True,
    ):
        if escalate is None:
            escalate = num_steps is None and flow is flows.realnvp
        num_steps = _NUM_STEPS if num_steps is None else num_steps
        check_functions(flow, richer, init_loc_fn)
        check_options(num_steps, num_particles, learning_rate, num_starts, max_time, max_gradients, base_df)
        if base_df is not None and base is FlexibleBase:
            base = None
        check_base(base, base_df, "FlowVI")
        self.model, self.flow = model, flow
        self.num_steps, self.num_particles, self.learning_rate = num_steps, num_particles, learning_rate
        self.base_df, self.base, self.path_gradient = base_df, base, path_gradient
        self.noncentered, self.escalate, self.richer = noncentered, escalate, tuple(richer)
        self.max_time, self.max_gradients = max_time, max_gradients
        self.num_starts, self.init_loc_fn, self.progress_bar = num_starts, init_loc_fn, progress_bar

    @torch.enable_grad()
    def run(self, *args: Any, **kwargs: Any) -> FlowPosterior:
        """Fits the model given its arguments. Ctrl-C ends the fit early and keeps what it has reached.

        Random numbers come from torch's generator: ``pyro.set_rng_seed`` makes a fit repeatable.

        :raises ValueError: for a model which a joint flow cannot serve (see :class:`AutoFlow`), with param sites or
            subsampled plates, that draws at random besides its latents, or has other latents from run to run; and for
            a flow of another size.
        :raises RuntimeError: if no start has a finite ELBO, every gradient is not finite, or every draw of the fitted
            guide is outside the model's support; and under ``torch.inference_mode``.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("FlowVI: a fit needs gradients: run it outside torch.inference_mode().")
        budget = Budget(self.max_time, self.max_gradients)
        guide = self._guide(self.base_df, self.base, args, kwargs)
        log_density = guide.log_density(*args, **kwargs)
        check_plates(log_density._prototype_trace(), "FlowVI")
        _check_repeatable(log_density)
        if log_density.mode == "loop":
            warnings.warn(
                f"FlowVI: the model runs for one draw at a time, which is slow ({log_density.obstacle}).", stacklevel=3
            )
        target, start = self._find_start(guide, log_density, budget)
        budget.gradients += start.gradients
        hopeless = gap_limit(_GAP_HOPELESS, len(start.loc)) if self.escalate and self.richer else np.inf
        posterior = self._fit(guide, log_density, start, budget, hopeless=hopeless)
        if posterior.history.interrupted:
            return posterior
        try:
            _check_support(posterior)
            modes = self._look_elsewhere(guide, log_density, target, start, budget)
            self._note_missed(posterior, modes, target, budget)
        except KeyboardInterrupt:
            posterior.history = posterior.history._replace(interrupted=True)
            return posterior
        base, tried = self.base, [_account(_name(self.flow), posterior)]

        def anew(flow: Callable, richer: bool = False) -> FlowPosterior:
            other = self._guide(None if base is not self.base else self.base_df, base, args, kwargs, flow)
            if other.noncentering is not None:
                other.set_noncentering(guide.noncentering)
            other.set_centering(guide.centering)
            found = self._fit(other, log_density, start._replace(modes=modes), budget, richer=richer)
            if not found.history.interrupted:
                self._note_missed(found, modes, target, budget)
            return found

        def attempt(what: str, fit: Callable[[], FlowPosterior]) -> FlowPosterior | None:
            try:
                found = fit()
            except RuntimeError as error:  # no finite gradient: what there is stands, with what it misses
                warnings.warn(f"FlowVI: a second fit, with {what}, failed: {error}", stacklevel=4)
                tried.append(f"{what}: failed")
                return None
            tried.append(_account(what, found))
            if found.history.interrupted:
                raise KeyboardInterrupt
            return found

        try:
            if posterior.misses_modes and len(modes) > 1 and base is FlexibleBase and budget.allows_more():
                base = partial(MixtureBase, num_components=len(modes))
                posterior = better(attempt("a mixture base", partial(anew, self.flow)), posterior, budget)
            going, richer, legs, gain = posterior, list(self.richer), 0, np.inf
            while self.escalate and is_poor(posterior, budget) and budget.allows_more():
                if is_near(going) and not legs if richer else may_mend(going, self.num_steps // 4, legs, gain):
                    more, legs = "more steps", legs + 1
                    fit = partial(self._go_on, going, budget)
                elif richer:
                    flow = richer.pop(0)
                    more, fit = _name(flow), partial(anew, flow, richer=True)
                else:
                    break
                before, found = going, attempt(more, fit)
                posterior, going = better(found, posterior, budget), better(found, going, budget, trusted=False)
                gain = going._elbo_inside.value - before._elbo_inside.value
                legs = legs if more == "more steps" or going is before else 0
        except KeyboardInterrupt:
            tried.append("interrupted")  # the first fit was complete
        return self._end(posterior, budget, tried)

    def _end(self, posterior: FlowPosterior, budget: Budget, tried: list[str]) -> FlowPosterior:
        """Notes in the history what the whole run took."""
        posterior.history = posterior.history._replace(
            gradients=budget.gradients, seconds=budget.seconds, tried=tuple(tried), stopped=budget.stopped
        )
        if budget.stopped:
            warnings.warn(
                f"FlowVI: {budget.stopped}={getattr(self, budget.stopped)} cut the run short, after {budget.gradients} "
                f"gradients and {budget.seconds:.0f} s. See verdict() ({tried[-1]}).",
                stacklevel=4,
            )
        return posterior

    def _guide(
        self,
        base_df: float | None,
        base: Callable[..., Base] | None,
        args: tuple,
        kwargs: dict,
        flow: Callable[..., TransformModule] | None = None,
    ) -> AutoFlow:
        guide = AutoFlow(
            self.model,
            flow or self.flow,
            init_loc_fn=self.init_loc_fn,
            base_df=base_df,
            base=base,
            full_rank=True,
            noncentered=self.noncentered,
        )
        guide._owner = "FlowVI"
        guide._setup_prototype(*args, **kwargs)
        if guide.model_params:
            raise ValueError(
                f"FlowVI: the model has param site(s) {guide.model_params}, which a posterior does not cover. Give "
                "them priors, or train them together with an AutoFlow guide by pyro.infer.SVI."
            )
        _check_size(guide)
        return guide

    def _fit(
        self,
        guide: AutoFlow,
        log_density: LogDensity,
        start: Start,
        budget: Budget,
        hopeless: float = np.inf,
        richer: bool = False,
    ) -> FlowPosterior:
        """Trains the guide from ``start``."""
        learned, loc, scale_tril = guide._modules.get("learned_base"), start.loc, start.scale_tril
        if learned is not None and learned.multimodal:
            loc, scale_tril, *modes = gaussian_around(start.modes)
            learned.at_modes(*(torch.as_tensor(a).to(log_density.prototype) for a in modes))  # type: ignore[operator]
        guide.start_at(*(torch.as_tensor(a).to(log_density.prototype) for a in (loc, scale_tril)))
        steps, rate = self.num_steps, self.learning_rate
        if richer:
            steps, rate = max(round(_RICHER_STEPS * steps), 1), _RICHER_RATE * rate
        nearly_exact = tolerated(_NEARLY_EXACT, len(loc))
        schedule = budget.schedule(steps, self.num_particles, rate, nearly_exact=nearly_exact, hopeless=hopeless)
        return self._trained(guide, log_density, schedule, budget, self.num_particles)

    def _go_on(self, posterior: FlowPosterior, budget: Budget) -> FlowPosterior:
        """Trains a copy of the guide from where it stands: half the step size, and falling from the first step."""
        num_particles, before = 2 * self.num_particles, posterior.history
        steps = max(self.num_steps // 4, 1)
        schedule = budget.schedule(steps, num_particles, 0.5 * self.learning_rate, annealing=True)
        guide = copy.deepcopy(posterior.guide)
        for module in (guide.transform, guide._modules.get("learned_base")):
            if module is not None:
                module.requires_grad_(True)
        found = self._trained(guide, posterior.log_density, schedule, budget, num_particles)
        found._look_at(posterior._modes, np.random.default_rng(0))
        history = found.history
        found.history = history._replace(
            elbo=np.concatenate([before.elbo, history.elbo]),
            skipped=before.skipped + history.skipped,
            stationary=before.stationary,
        )
        return found

    def _trained(
        self,
        guide: AutoFlow,
        log_density: LogDensity,
        schedule: Schedule,
        budget: Budget,
        num_particles: int,
    ) -> FlowPosterior:
        """What training the guide finds, with what the run has spent."""
        history = self._ascend(guide, log_density, schedule, num_particles)
        budget.gradients += num_particles * len(history.elbo)
        if schedule.late:
            budget.stopped = "max_time"
        if schedule.shortened and len(history.elbo) == schedule.num_steps:
            budget.stopped = "max_gradients"
        history = history._replace(gradients=budget.gradients, seconds=budget.seconds)
        return _posterior_of(guide, log_density, history)

    def _target(self, log_density: LogDensity) -> Target:
        """A density in numpy."""

        def in_numpy(function: Callable) -> Callable:
            def run(u: np.ndarray) -> Any:
                found = function(torch.as_tensor(u).to(log_density.prototype))
                return tree_map(lambda part: part.double().numpy(force=True), found)

            return run

        of = log_density.value_and_grad, log_density.hessian, log_density._values_and_grads
        value_and_grad, hessian, values_and_grads = map(in_numpy, of)
        return Target(
            in_numpy(torch.no_grad()(log_density)),
            value_and_grad,
            hessian,
            None if log_density.mode == "loop" else values_and_grads,
            in_numpy(log_density._gradients_and_hessians),
        )

    def _points(self, guide: AutoFlow, log_density: LogDensity, n: int, by: Callable) -> list[np.ndarray]:
        """As many points in the guide's coordinates by an initialisation strategy."""
        points = []
        for _ in range(n):
            trace = prototype_trace(self.model, log_density.args, log_density.kwargs, by)
            differ = latent_sites(trace).keys() ^ set(log_density.site_names)
            if differ:
                raise ValueError(
                    f"FlowVI: the model's latent sites differ between runs: {sorted(differ)} are not in all of them. "
                    "Draw them in every run, and choose between values, by torch.where, instead of sites."
                )
            values = {name: trace.nodes[name]["value"][None] for name in log_density.site_names}
            x = guide.coordinates.inverse_and_log_det(log_density.unconstrain(values)[0])[0]
            points.append(x[0].double().numpy(force=True))
        return points

    def _latents(self, guide: AutoFlow, log_density: LogDensity, x: np.ndarray) -> Tensor:
        """The latent vector of one in the guide's coordinates."""
        return guide.coordinates.forward_and_log_det(torch.as_tensor(x).to(log_density.prototype))[0]

    def _find_start(self, guide: AutoFlow, log_density: LogDensity, budget: Budget) -> tuple[Target, Start]:
        """The density in the guide's coordinates, and the start in them; settles these coordinates."""
        is_late = partial(budget.is_late, _START_SHARE if log_density.mode == "loop" else np.inf)

        def search(u: Tensor, since: int = 0, alone: bool = False) -> tuple[Target, Start]:
            target = self._target(pulled_back(log_density, guide.coordinates))._replace(is_late=is_late)
            first = [guide.coordinates.inverse_and_log_det(u)[0].double().numpy(force=True)]
            for point in self._points(guide, log_density, 0 if alone else self.num_starts - 1, self.init_loc_fn):
                if not np.allclose(point, first[0]) and np.isfinite(target.value_and_grad(point)[0]):
                    first.append(point)
            rng, is_spent = _numpy_rng(), partial(budget.is_spent, _SEARCH_SHARE, since=since)
            found = find_start(target, first, rng)
            if log_density.mode == "loop":  # a Hessian takes a run of the model for each of its rows
                return target, found
            return target, improve(target, found, rng, is_spent)

        target, start = search(log_density.prototype)
        if len(start.loc) > MAX_HESSIAN_DIM:
            return target, start
        if guide.noncentering is not None:
            target, start = self._noncentered(guide, log_density, target, start, search)
            if start.divergence > _WORTHWHILE and not budget.is_spent(_SEARCH_SHARE, start.gradients):
                target, start = self._as_it_is(guide, log_density, target, start, search)
        if self.noncentered and not budget.is_spent(_SEARCH_SHARE, start.gradients):
            target, start = self._centered(guide, log_density, target, start, search, budget)
        return target, start

    def _noncentered(
        self, guide: AutoFlow, log_density: LogDensity, target: Target, start: Start, search: Callable
    ) -> tuple[Target, Start]:
        """The same, after the non-centring has been adapted to the likelihood."""
        plain: Any = guide.noncentering
        plain_target, gradients = target, start.gradients
        for _ in range(_MAX_ADAPTATIONS):
            if target.is_late():
                break
            u = self._latents(guide, log_density, start.loc)
            x = plain.inverse_and_log_det(u)[0]
            at, factor, centred = (t.double().numpy(force=True) for t in (x, plain.factor(x), u))
            told = pseudo_observations(plain_target, at, centred, factor, plain.elements)
            kept: Any = guide.noncentering
            guide.set_noncentering(plain.with_pseudo_observations(*told))
            try:
                adapted, again = search(u, gradients, alone=True)
            except RuntimeError:  # no start there has a finite ELBO
                guide.set_noncentering(kept)
                break
            gradients += again.gradients + len(start.loc)
            gain = again.elbo - start.elbo
            if not gain > 0:
                guide.set_noncentering(kept)
                break
            target, start = adapted, again
            if gain < _WORTHWHILE:
                break
        return target, start._replace(gradients=gradients)

    def _as_it_is(
        self, guide: AutoFlow, log_density: LogDensity, target: Target, start: Start, search: Callable
    ) -> tuple[Target, Start]:
        """The same, after the non-centring has been taken away, if that gains anything to speak of."""
        kept: Any = guide.noncentering
        u = self._latents(guide, log_density, start.loc)
        guide.set_noncentering(None)
        with contextlib.suppress(RuntimeError):  # no start there has a finite ELBO
            other, found = search(u, start.gradients, alone=True)
            gradients = start.gradients + found.gradients
            if found.elbo > start.elbo + _WORTHWHILE:
                return other, found._replace(gradients=gradients)
            start = start._replace(gradients=gradients)
        guide.set_noncentering(kept)
        return target, start

    def _centered(
        self,
        guide: AutoFlow,
        log_density: LogDensity,
        target: Target,
        start: Start,
        search: Callable,
        budget: Budget,
    ) -> tuple[Target, Start]:
        """The same, after latents of fixed normal priors have been centred, if that gains anything to speak of.

        Around the start, and a mode of the marginal of the others if there is something left to gain, each time anew
        where that has led to, as long as it gains.
        """
        priors = normal_priors(log_density, guide.prototype_trace, points_around(log_density.prototype))
        if not (priors[2] >= 0).any():
            return target, start
        plain, best, kept, gradients = target, (target, start), None, start.gradients
        begin: Start | None = start
        while begin is not None:
            is_spent = partial(budget.is_spent, _SEARCH_SHARE, since=gradients)
            found, layer, evaluations = self._centered_from(guide, log_density, plain, begin, priors, is_spent, search)
            gradients += evaluations
            if found is not None and found[1].elbo > best[1].elbo + (_WORTH_CENTERING if kept is None else 0):
                best, kept = found, layer
            if begin is not start or best[1].divergence < _WORTHWHILE:
                break
            is_half_spent = partial(budget.is_spent, 0.5 * _SEARCH_SHARE, since=gradients)
            begin, evaluations = marginal_start(plain, start, *priors, is_half_spent, _numpy_rng())
            gradients += evaluations
        guide.set_centering(kept)
        return best[0], best[1]._replace(gradients=gradients)

    def _centered_from(
        self,
        guide: AutoFlow,
        log_density: LogDensity,
        plain: Target,
        begin: Start,
        priors: tuple[np.ndarray, np.ndarray, np.ndarray],
        is_spent: Callable[..., bool],
        search: Callable,
    ) -> tuple[tuple[Target, Start] | None, Centering | None, int]:
        """Density and start in coordinates centred around ``begin``, this layer, and the gradients that took."""
        found, kept, around, gradients = None, None, begin, 0
        for _ in range(_MAX_ADAPTATIONS):
            told, evaluations = conditional_likelihood(plain, around, *priors, lambda n: is_spent(gradients + n))  # noqa: B023
            gradients += evaluations
            if told is None:
                break
            guide.set_centering(None)
            u = self._latents(guide, log_density, around.loc)
            layer = Centering(len(u)).to(u).with_likelihood(told)
            guide.set_centering(layer)
            try:
                target, again = search(u, gradients, alone=True)
            except RuntimeError:  # no start there has a finite ELBO
                break
            gradients += again.gradients
            gain = again.elbo - around.elbo
            if not gain > 0:
                break
            found, kept = (target, again), layer
            moved = layer.forward_and_log_det(torch.as_tensor(again.loc).to(u))[0]
            around = again._replace(loc=moved.double().numpy(force=True))
            if gain < _WORTHWHILE:
                break
        return found, kept, gradients

    def _look_elsewhere(
        self, guide: AutoFlow, log_density: LogDensity, target: Target, start: Start, budget: Budget
    ) -> tuple[Start, ...]:
        """The modes known after walks uphill from more points.

        As many by ``init_loc_fn``, nearer to zero on the way to each, by the prior, and widely around the start. None
        where there is no time left for runs of the model for one draw at a time.
        """
        is_late = partial(budget.is_late, 1.0 if log_density.mode == "loop" else np.inf)
        if is_late():
            return start.modes
        rng = _numpy_rng()
        initial = self._points(guide, log_density, _NUM_PROBES, self.init_loc_fn)
        points = [scale * point for scale in (1.0, *_NEARER) for point in initial]
        for _ in range(_NUM_PROBES):
            with contextlib.suppress(Exception):  # a prior may have no draws, or a model refuse them
                points += self._points(guide, log_density, 1, init_to_sample)
        points += list(start.loc + _WIDE * rng.standard_normal((_NUM_PROBES, len(start.loc))) @ start.scale_tril.T)
        points = [point for point in points if np.isfinite(target.value_and_grad(point)[0])]
        target = target._replace(is_late=is_late)
        found, gradients = find_modes(target, points, rng, points_per_path=1) if points else ((), 0)
        budget.gradients += gradients
        return distinct([*start.modes, *found], target.log_density)

    def _note_missed(self, posterior: FlowPosterior, modes: tuple[Start, ...], target: Target, budget: Budget) -> None:
        """Notes in the history what share of the posterior around the modes the guide misses, if there is the time."""
        if posterior.log_density.mode == "loop" and budget.is_late():
            return
        posterior._look_at(modes, np.random.default_rng(0), target.log_density)
        posterior.history = posterior.history._replace(gradients=budget.gradients, seconds=budget.seconds)

    def _ascend(
        self,
        guide: AutoFlow,
        log_density: LogDensity,
        schedule: Schedule | None = None,
        num_particles: int | None = None,
    ) -> History:
        """Phases 2 and 3, in the coordinates of the start; trains the guide in place, from where it stands."""
        schedule = schedule or Schedule(self.num_steps, self.learning_rate)
        schedule.chunk = 1 if log_density.mode == "loop" else CHUNK
        outer = guide.outer_layers[0]
        inner = Compose(list(guide.transform.layers)[: -len(guide.outer_layers)])  # type: ignore[union-attr, arg-type]
        outer.requires_grad_(False)
        density = pulled_back(log_density, guide.coordinates)
        learned: Any = guide._modules.get("learned_base")
        base, n = guide.get_base_dist() if learned is None else learned, num_particles or self.num_particles
        scale_log_det = outer.forward_and_log_det(torch.zeros_like(log_density.prototype))[1]
        use_path = self.path_gradient
        if use_path is None:
            forward, inverse = inner.passes
            use_path = inverse <= forward

        def whitened(z: Tensor) -> Tensor:
            return density(outer.forward_and_log_det(z)[0]) + scale_log_det

        parameters = [*inner.parameters(), *(() if learned is None else learned.parameters())]
        flow, base = unfolded(inner, base)
        ascent = Ascent(parameters)

        def gradient() -> tuple[Tensor, Tensor]:
            """ELBO with approximate KL divergence, and the gradient of the loss."""
            x, log_density_of_base = base.draw(n) if isinstance(base, Base) else (base.sample((n,)), None)
            terms = elbo_terms(flow, base, whitened, x, path=use_path)
            loss = -terms.mean()
            if log_density_of_base is not None:
                loss = loss + score_gradient(terms, log_density_of_base)
            terms = terms.detach()
            return torch.stack([terms.mean(), 0.5 * terms.var(correction=0)]), ascent.gradient(loss)

        def step(run: Callable[[], tuple[Tensor, ...]], step_size: float) -> Tensor:
            """ELBO, approximate KL divergence, and whether the step was skipped."""
            values, slope = run()
            return torch.cat([values, ascent.update(slope, step_size).to(values)[None]])

        trace: list[float] = []
        divergence: list[float] = []
        skipped, interrupted = 0, False
        best = -np.inf, copies(parameters)
        with tqdm(total=schedule.expected_steps, desc="FlowVI", disable=not self.progress_bar) as bar:
            try:
                worth_it = density.mode != "loop" and schedule.expected_steps >= RECORD_FROM
                prepared = recorded_step(gradient, density.prototype.device) if worth_it else gradient
                while (step_sizes := schedule.next_chunk(trace, divergence)) is not None:
                    done = torch.stack([step(prepared, float(size)) for size in step_sizes])
                    elbos, divergences, skips = done.T.tolist()
                    trace += [value if np.isfinite(value) else np.nan for value in elbos]
                    divergence += divergences
                    skipped += int(sum(skips))
                    if skipped == len(trace):
                        raise RuntimeError(self._nothing_finite(log_density, Compose(guide.outer_layers), base))
                    recent = known(trace[-_WINDOW:])
                    if recent > best[0]:
                        best = recent, copies(parameters)
                    bar.total = schedule.expected_steps
                    bar.set_postfix(elbo=f"{recent:.3f}", refresh=False)
                    bar.update(len(step_sizes))
            except KeyboardInterrupt:
                interrupted = True
        settle(parameters, None if schedule.finished else best[1])
        outer.requires_grad_(True)
        return History(np.asarray(trace), skipped, schedule.stationary, interrupted)

    @torch.no_grad()
    def _nothing_finite(self, log_density: LogDensity, outer: TransformModule, base: Any) -> str:
        u = outer.forward_and_log_det(distribution_of(base).sample((64,)))[0]
        bad = _not_finite(log_density, u) or "none (the gradient is)"
        return (
            f"FlowVI: no step had a finite gradient. Sites whose log-density is not finite near the start: {bad}. "
            "Check the data and the priors of what these sites depend on."
        )


def _posterior_of(guide: AutoFlow, log_density: LogDensity, history: History) -> FlowPosterior:
    """The posterior of a guide, with fewer draws for its diagnostics where the model runs for each of them."""
    few = {"num_draws": _FEW_DRAWS} if log_density.mode == "loop" else {}
    return FlowPosterior(guide, log_density, history, **few)


@torch.no_grad()
def _check_repeatable(log_density: LogDensity) -> None:
    """Raises a ``ValueError`` where a model gives one vector several densities: what runs in batches draws nothing."""
    if log_density.mode in ("plates", "loop"):
        values = [log_density._evaluate(log_density.prototype[None], "loop") for _ in range(2)]
        if not close(*values):
            raise ValueError(
                "FlowVI: the model draws at random besides its latents: its log-density at one point is "
                f"{float(values[0]):.6g}, and then {float(values[1]):.6g}. Make what it draws latent sites, or draw it "
                "once and pass it as an argument."
            )


@torch.no_grad()
def _check_size(guide: AutoFlow) -> None:
    """Raises a ``ValueError`` where a factory has built a flow that does not take the model's latents."""
    flow, u = guide.transform.layers[0], guide.init_loc[None]  # type: ignore[union-attr]
    try:
        shape = flow.forward_and_log_det(u)[0].shape  # type: ignore[operator]
    except (RuntimeError, ValueError, IndexError):
        shape = None
    if shape != u.shape:
        raise ValueError(
            f"FlowVI: flow(dim) must build a flow of the model's {guide.latent_dim} latent(s), dim, but its flow does "
            "not take vectors of that size."
        )


def _check_support(posterior: FlowPosterior) -> None:
    """Raises a ``RuntimeError`` where every draw is outside the model's support."""
    if np.isfinite(posterior._log_ratios).any():
        return
    sites = _not_finite(posterior.log_density, posterior.draws.unconstrained[:64])
    raise RuntimeError(
        f"FlowVI: every draw of the fitted guide lies outside the model's support. Sites whose log-density is not "
        f"finite there: {sites}. An edge that such a site gives a latent, as dist.Uniform(0, top) gives top, belongs "
        "into the support of the latent's own prior."
    )


def _not_finite(log_density: LogDensity, u: Tensor) -> dict[str, str]:
    """Sites whose log-density is not finite, and at what share of the draws."""
    sites = log_density.site_log_probs(u)
    shares = {name: float((~torch.isfinite(value)).double().mean()) for name, value in sites.items()}
    return {name: f"{share:.0%} of draws" for name, share in shares.items() if share}


def _numpy_rng() -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31 - 1, ())))


class Budget:
    """What a run may take in all, and what it has taken."""

    def __init__(self, max_time: float | None = None, max_gradients: int | None = None):
        self.max_time, self.max_gradients = max_time, max_gradients
        self.begin, self.gradients = time.perf_counter(), 0
        self.stopped = ""  # the option that kept the run from what it would have done

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        return self.max_time is not None and self.seconds > share * self.max_time

    def is_spent(self, share: float, gradients: int, since: int = 0) -> bool:
        """Whether a search of so many gradients, after others that are not counted yet, has had this share of all."""
        gradients += self.gradients + since
        return self.is_late(share) or self.max_gradients is not None and gradients > share * self.max_gradients

    def allows_more(self) -> bool:
        """Whether another fit may begin; notes what forbids it."""
        if self.max_time is not None and self.seconds >= self.max_time:
            self.stopped = "max_time"
        if self.max_gradients is not None and self.gradients >= self.max_gradients:
            self.stopped = "max_gradients"
        return not self.stopped

    def schedule(
        self,
        num_steps: int,
        num_particles: int,
        learning_rate: float,
        *,
        annealing: bool = False,
        nearly_exact: float = _NEARLY_EXACT,
        hopeless: float = np.inf,
    ) -> Schedule:
        """The schedule of a fit, as far as there is something left. With limits, no fit is given up as hopeless."""
        left = np.inf if self.max_gradients is None else max(self.max_gradients - self.gradients, 0) // num_particles
        deadline = None if self.max_time is None else self.begin + self.max_time
        limited = deadline is not None or self.max_gradients is not None
        schedule = Schedule(
            int(min(num_steps, left)),
            learning_rate,
            annealing=annealing,
            nearly_exact=nearly_exact,
            deadline=deadline,
            hopeless=np.inf if limited else hopeless,
        )
        schedule.shortened = left < num_steps
        return schedule


class Schedule:
    """Step sizes: constant until the ELBO is stationary, then down to zero along a cosine over as many steps again.

    :param num_steps: steps at most.
    :param learning_rate: the first step size.
    :param annealing: whether to begin with the second part.
    :param nearly_exact: approximate KL divergence below which the first part ends once the ELBO is stationary.
    :param deadline: by ``time.perf_counter``. The second part begins when a third of the time until then is over.
    :param hopeless: approximate KL divergence above which there is no second part, and the first one ends as soon as
        the ELBO rises too slowly to bring it below.
    """

    def __init__(
        self,
        num_steps: int,
        learning_rate: float,
        *,
        annealing: bool = False,
        nearly_exact: float = _NEARLY_EXACT,
        deadline: float | None = None,
        hopeless: float = np.inf,
    ):
        self.num_steps, self.learning_rate, self.deadline = num_steps, learning_rate, deadline
        self.nearly_exact, self.hopeless, self.chunk = nearly_exact, hopeless, CHUNK
        self.stationary = self.finished = self.late = self.shortened = False
        self._begin = time.perf_counter()
        self._anneal_from: int | None = 0 if annealing else None
        self._anneal_steps = num_steps if annealing else 0

    @property
    def expected_steps(self) -> int:
        """Steps of the whole fit, as far as it is known."""
        return self.num_steps if self._anneal_from is None else self._anneal_from + self._anneal_steps

    def next_chunk(self, trace: list[float], divergence: list[float]) -> np.ndarray | None:
        """Step sizes of the next steps given ELBO and approximate KL divergence so far; ``None`` at the end."""
        done, elapsed = len(trace), time.perf_counter() - self._begin
        allowed = np.inf if self.deadline is None else self.deadline - self._begin
        if done and elapsed >= allowed:
            self.late = True
            return None
        if self._anneal_from is None:
            if done and done % _WINDOW == 0:
                self.stationary = is_stationary(trace)
            if done and self._is_hopeless(trace, divergence):
                self.finished = True
                return None
            nearly_exact = known(divergence[-_WINDOW:]) < self.nearly_exact if done else False
            hurried = done > 0 and elapsed >= allowed / 3
            if (self.stationary and nearly_exact) or 2 * done >= self.num_steps or hurried:
                self.late = hurried and 2 * done < self.num_steps and not (self.stationary and nearly_exact)
                self._anneal_from = done
                self._anneal_steps = min(max(done, 2 * _WINDOW), self.num_steps - done)
        if self._anneal_from is None:
            return np.full(min(self.chunk, (self.num_steps + 1) // 2 - done), self.learning_rate)
        steps = np.arange(done, min(done + self.chunk, self.expected_steps)) - self._anneal_from
        self.finished = len(steps) == 0
        if self.finished:
            return None
        return 0.5 * self.learning_rate * (1 + np.cos(np.pi * steps / self._anneal_steps))

    def _is_hopeless(self, trace: list[float], divergence: list[float]) -> bool:
        """Whether the KL divergence is too large where the first part ends, or will be by the ELBO's last rise.

        The ELBO rises ever slower, so that its last rise (and two standard errors) bounds those of the windows to come.
        """
        done, recent = len(trace), known(divergence[-_WINDOW:], np.median)
        windows_left = max(self.num_steps / 2 - done, 0) / _WINDOW
        if windows_left:
            if done < _HOPELESS_FROM:
                return False
            rise, error = last_rise(trace)
            recent -= windows_left * max(rise + 2 * error, 0.0)
        return recent > self.hopeless


def gap_limit(limits: tuple[float, float], dim: int) -> float:
    """The larger of so many nats of KL divergence, and of so many times those which a good fit may have."""
    return max(limits[0], limits[1] * tolerated(_GAP_POOR, dim))


def is_poor(posterior: FlowPosterior, budget: Budget) -> bool:
    """Whether a fit leaves something to be desired; by what is cheap first."""
    if not posterior.weights_are_reliable or posterior.misses_modes:
        return True
    gap = posterior._gap - 2 * posterior._elbo_inside.standard_error
    if gap > tolerated(_GAP_POOR, posterior.log_density.dim) or (gap > _GAP_POOR and not posterior._moments_are_good):
        return True
    return not budget.is_late() and is_suspicious(posterior, budget)


def is_suspicious(posterior: FlowPosterior, budget: Budget) -> bool:
    """Whether chains from the guide's draws go where its weights say nothing is."""
    before = posterior.history.gradients
    suspicious = posterior.departure.suspicious
    budget.gradients += posterior.history.gradients - before
    return suspicious


def is_near(posterior: FlowPosterior) -> bool:
    """Whether a poor fit is one that more steps could mend."""
    return posterior.weights_are_reliable and posterior._gap < gap_limit(_GAP_NEAR, posterior.log_density.dim)


def may_mend(posterior: FlowPosterior, num_steps: int, legs: int, gain: float) -> bool:
    """Whether so many steps more could make a poor fit good: they raise the ELBO by less than as many did last.

    After the first of such legs, whether the last one, which gained so much, leaves little enough for the others.
    """
    gap = posterior._gap
    if legs:
        return legs < _MOST_LEGS and gain > gap / (_MOST_LEGS - legs)
    trace, window = posterior.history.elbo, min(num_steps, _WINDOW)
    if not posterior.weights_are_reliable or len(trace) < num_steps + window or not window:
        return True  # nothing foretells it
    last, before = trace[-window:], trace[-num_steps - window :][:window]
    return gap - (known(last) - known(before)) < tolerated(_GAP_POOR, posterior.log_density.dim)


def better(found: FlowPosterior | None, than: FlowPosterior, budget: Budget, trusted: bool = True) -> FlowPosterior:
    """The fit that is closer to the posterior by its ELBO, if not at the price of its modes.

    :param trusted: whether nor at the price of a verdict that trusts it. A fit that is to go on may pay it.
    """
    if found is None or not found._elbo_inside.value > than._elbo_inside.value:
        return than
    if found.misses_modes != than.misses_modes:
        return than if found.misses_modes else found
    lost = trusted and than.weights_are_reliable and not found.weights_are_reliable
    return than if lost and not is_suspicious(than, budget) else found


def _account(what: str, posterior: FlowPosterior) -> str:
    """A line on a fit: what it was, and how it went."""
    steps = len(posterior.history.elbo)
    elbo = f"ELBO {posterior._elbo_inside}, gap {posterior._gap:.3f}"
    return f"{what}, {steps} steps: {elbo}, Pareto k {posterior.pareto_k:.2f}"


def _name(flow: Callable) -> str:
    """The name of a flow's factory, with its options."""
    if isinstance(flow, partial):
        return f"{_name(flow.func)}({', '.join(f'{name}={value!r}' for name, value in flow.keywords.items())})"
    return getattr(flow, "__name__", type(flow).__name__)


def is_stationary(trace: list[float]) -> bool:
    """Whether the mean ELBO of the last window exceeds that of the one before by no more than two standard errors."""
    if len(trace) < 2 * _WINDOW:
        return False
    rise, error = last_rise(trace)
    return rise < 2 * error


def last_rise(trace: list[float]) -> tuple[float, float]:
    """By how much the mean ELBO of the last window exceeds that of the one before, and its standard error."""
    windows = np.asarray(trace[-2 * _WINDOW :]).reshape(2, _WINDOW)
    before, after = map(known, windows)
    return after - before, float(np.sqrt(sum(known(window, np.var) for window in windows) / _WINDOW))


def known(values: Sequence[float] | np.ndarray, statistic: Callable[..., Any] = np.mean) -> float:
    """The mean, or another statistic, of the steps that were finite; NaN where none was."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(statistic(finite)) if len(finite) else np.nan


def check_options(
    num_steps: int,
    num_particles: int,
    learning_rate: float,
    num_starts: int,
    max_time: float | None = None,
    max_gradients: int | None = None,
    base_df: float | None = None,
) -> None:
    """Raises a ``ValueError`` that names the option with which nothing can be fitted."""
    check_counts("FlowVI", num_steps=num_steps, num_particles=num_particles, num_starts=num_starts)
    limits = {"max_time": max_time, "max_gradients": max_gradients, "base_df": base_df}
    given = {name: value for name, value in limits.items() if value is not None}
    for name, value in {"learning_rate": learning_rate, **given}.items():
        if not isinstance(value, Real) or not value > 0:
            none = ", or None" if name in given else ""
            raise ValueError(f"FlowVI: {name} must be a positive number{none}, but got {value!r}.")


def check_functions(flow: Any, richer: Any, init_loc_fn: Any) -> None:
    """Raises a ``TypeError`` that names the option which cannot be called as it has to be."""
    if not isinstance(richer, Sequence):
        raise TypeError(f"FlowVI: richer must be a list of flows' factories, but got {type(richer).__name__}.")
    for name, value in (("flow", flow), *(("each of richer", value) for value in richer)):
        check_flow(value, "FlowVI", name)
    if not callable(init_loc_fn):
        raise TypeError(f"FlowVI: init_loc_fn must be a strategy, as init_to_median, but got {init_loc_fn!r}.")
