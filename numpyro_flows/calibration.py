"""Simulation-based calibration: whether the posteriors of a model and its inference mean what they say."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer.util import compute_log_probs
from scipy import stats
from tqdm import tqdm

from numpyro_flows import _arviz
from numpyro_flows.checks import check_counts
from numpyro_flows.inference import FlowVI
from numpyro_flows.log_density import check_latents
from numpyro_flows.posterior import Estimate
from numpyro_flows.programs import checked_key, numpy_rng
from numpyro_flows.transform_module import _typed_key

LOG_LIKELIHOOD = "log_likelihood"
_OWNER = "simulation_based_calibration"
_SIGNIFICANCE = 0.05
_REDRAWS = 20  # after which a model that still draws the same (discrete values may) is seeded
_MAX_ROWS = 50  # scalars that the summary prints
_BATCH = 256  # draws per pass over the model: bounds the memory
_AT_ONCE = 250  # simulations, where the inference takes many
_KEPT_FITS = 20  # fits after which their compiled functions, some 80 MB each, are thrown away


def simulation_based_calibration(
    rng_key: Array,
    model: Callable,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    infer: Callable[..., dict[str, Any]] | dict[str, Any] | None = None,
    num_simulations: int = 200,
    num_draws: int = 99,
    var_names: str | Sequence[str] | None = None,
    num_workers: int = 1,
    progress_bar: bool = True,
) -> Calibration:
    """Ranks the truth among posterior draws, in data sets simulated from the model (Talts et al. 2018).

    Each simulation draws latents and data from the prior predictive, infers the latents from the data, and counts how
    many posterior draws lie below the true value. Over simulations these ranks are uniform if the inference is exact.
    The log-likelihood is ranked too: it shows an inference that takes too little from the data, which the latents' own
    ranks do not (Modrák et al. 2023).

    The model's observed sites are what is simulated: their values here only give shapes, and are overridden. Data that
    a model uses elsewhere (covariates) stay as they are.

    A fit of ``FlowVI`` with its defaults takes 5 to 60 s, here times ``num_simulations``; it is compiled once for all,
    unless the model looks at the values of its data. With a smaller budget, ``infer={"num_steps": 1000,
    "num_particles": 64}``, what is calibrated is the inference with that budget. Another inference is a function::

        mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=990, thinning=10, progress_bar=False)

        @jax.jit  # compiled once, as y is an argument of the model
        def draws(rng_key, y):
            mcmc.run(rng_key, y=y)
            return mcmc.get_samples()

        def nuts(conditioned, args, kwargs, rng_key, num_draws):
            return draws(rng_key, conditioned.data["y"])

        simulation_based_calibration(random.key(0), model, kwargs={"y": y}, infer=nuts).print_summary()

    or, compiled each time, ``MCMC(NUTS(conditioned), ...).run(rng_key, *args, **kwargs)``. Draws of MCMC must be
    thinned until they are nearly independent, for the ranks of autocorrelated draws are not uniform; that is left to
    ``infer``.

    A trained :class:`AmortisedFlowVI` is an ``infer`` too. It infers from many data sets at once, which takes seconds.

    :param rng_key: jax's key.
    :param model: NumPyro model with observed sites and proper priors.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param infer: ``FlowVI``'s options, ``resample=True`` for ``importance_resample`` in place of ``sample``; or a
        function ``infer(model, args, kwargs, rng_key, num_draws)`` that returns draws ``(num_draws, *shape)`` of each
        latent. The model that it gets is conditioned on the simulated data (:class:`ConditionedModel`).
    :param num_simulations: data sets. The error of a coverage is about ``0.5 / num_simulations**0.5`` at most.
    :param num_draws: posterior draws in each.
    :param var_names: site(s) to be ranked, latent or deterministic, and ``"log_likelihood"``; if not given, all the
        latents and the log-likelihood.
    :param num_workers: processes that share the simulations. They are started anew ("spawn"), so that ``model``,
        ``args``, ``kwargs`` and ``infer`` must be picklable: functions of an importable module. Threads would not do,
        as effect handlers are global.
    :param progress_bar: shows a bar with the number of failures and the time left.
    :returns: :class:`Calibration`. A simulation that raises, or has draws that are not finite, is counted among its
        ``failures``. Ctrl-C returns what is done.
    :raises TypeError: unless a key comes first.
    :raises ValueError: for a model whose data cannot be simulated (no observed sites, factors, improper priors,
        subsampled plates, scaled or masked latents, data of another shape than the model draws), draws of the wrong
        names or shapes, and arguments out of range.
    :raises RuntimeError: if every simulation fails.
    """
    _check_arguments(num_simulations, num_draws, num_workers, infer)
    checked_key(rng_key, _OWNER)
    rng_key = _typed_key(rng_key)
    simulator = _Simulator(model, args, kwargs or {}, infer, num_draws, var_names, str(jax.random.key_impl(rng_key)))
    check_key, key = jax.random.split(rng_key)
    simulator.check(check_key)
    seeds = list(np.asarray(jax.random.key_data(jax.random.split(key, num_simulations))))
    return _collect(simulator, seeds, num_workers, progress_bar)


class ConditionedModel:
    """A model whose sites named in ``data`` are observed there, whatever it observes by itself.

    :ivar model: the model.
    :ivar data: values of sites.
    """

    def __init__(self, model: Callable, data: dict[str, Array]):
        self.model, self.data = model, data

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with handlers.condition(data=self.data):
            return self.model(*args, **kwargs)


@dataclass
class Calibration:
    """Ranks of the true values among posterior draws: uniform if, and only if, the draws are calibrated on average.

    :ivar ranks: of each quantity, ``(num_simulations, *shape)`` integers from 0 to ``num_draws``: how many of the
        posterior draws lie below the true value.
    :ivar true: the true values, ``(num_simulations, *shape)``.
    :ivar num_draws: posterior draws in each simulation.
    :ivar failures: index and error of each simulation that failed; these have no row in ``ranks``.
    :ivar interrupted: whether Ctrl-C ended the run before its last simulation.
    """

    ranks: dict[str, np.ndarray]
    true: dict[str, np.ndarray]
    num_draws: int
    failures: list[tuple[int, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def num_simulations(self) -> int:
        """Simulations that have ranks."""
        return len(next(iter(self.ranks.values())))

    def p_values(self) -> dict[str, float]:
        """Of each scalar, such as ``"theta[3]"``: p-value of a chi-square test that its ranks are uniform.

        The ranks are counted in at most 20 bins, of 10 expected simulations each or more. Scalars whose true value
        never changes (the zeros of a triangular matrix) are left out, here and in what follows.
        """
        return {name: p for name, (_, p) in self._chi_square().items()}

    def coverage(self, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> dict[str, dict[float, Estimate]]:
        """Of each scalar and level: how often the central interval of the posterior holds the true value.

        For calibrated draws this is the level. An interval that ends between two ranks counts the rank there in
        proportion, so that the expectation is exact for any ``num_draws``. The standard errors are binomial, of an
        estimate drawn towards one half by two simulations (Agresti & Coull 1998), which keeps them above zero.

        :raises ValueError: for a level that is not between 0 and 1.
        """
        bad = [level for level in levels if not 0 < level < 1]
        if bad:
            raise ValueError(f"coverage: levels must lie between 0 and 1, but got {bad}. For 95 % give 0.95.")
        n, num_ranks = self.num_simulations, self.num_draws + 1

        def estimate(ranks: np.ndarray, level: float) -> Estimate:
            low, high = 0.5 * (1 - level) * num_ranks, 0.5 * (1 + level) * num_ranks
            inside = np.clip(np.minimum(ranks + 1, high) - np.maximum(ranks, low), 0, 1).mean()
            shrunk = (n * inside + 1) / (n + 2)
            return Estimate(float(inside), float((shrunk * (1 - shrunk) / n) ** 0.5))

        return {name: {level: estimate(ranks, level) for level in levels} for name, ranks in self._scalars().items()}

    def verdict(self) -> str:
        """One line: whether the ranks are uniform at 5 % over all scalars together (Holm 1979), else what is wrong."""
        tests, n = self._chi_square(), self.num_simulations
        if not tests:
            return "Nothing to judge: no quantity varies between simulations."
        rejected: list[str] = []
        for name in sorted(tests, key=lambda name: (tests[name][1], -tests[name][0])):
            if tests[name][1] > _SIGNIFICANCE / (len(tests) - len(rejected)):
                break
            rejected.append(name)
        # of a latent's ranks there is more to say
        worst = min(
            rejected or tests,
            key=lambda name: (name == LOG_LIKELIHOOD and bool(rejected), tests[name][1], -tests[name][0]),
        )
        levels, covered = zip(*((level, est.value) for level, est in self.coverage()[worst].items()), strict=True)
        percent = ["/".join(f"{100 * value:.0f}" for value in values) for values in (levels, covered)]
        p, intervals = tests[worst][1], f"{percent[0]} % intervals cover {percent[1]} %"
        if rejected:
            line = (
                f"Miscalibrated: {_diagnosis(worst, self._scalars()[worst], self.num_draws)} (p {p:.2g}; {intervals}). "
                f"Rejected: {len(rejected)} of {len(tests)} quantities, by {n} simulations."
            )
        else:
            line = (
                f"Calibrated as far as {n} simulations tell: the least p-value is {p:.2g} of {len(tests)}, that of "
                f"{worst}, whose {intervals}."
            )
        if self.failures:
            total = n + len(self.failures)
            line += f" {len(self.failures)} of {total} simulations failed, and this says nothing of data like theirs."
        return line + (" The run was interrupted." if self.interrupted else "")

    def print_summary(self, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> None:
        """Prints p-value and coverage of each scalar (the 50 of least p-value), the failures and the verdict."""
        p_values, coverage = self.p_values(), self.coverage(levels)
        shown = set(sorted(p_values, key=p_values.__getitem__)[:_MAX_ROWS])
        width = max([len(name) for name in shown], default=0)
        print(f"{'':{width}}  p-value  " + "  ".join(f"{f'cover {100 * level:g} %':>15}" for level in levels))
        for name in (name for name in p_values if name in shown):
            cells = (f"{f'{est.value:.3f} +- {est.standard_error:.3f}':>15}" for est in coverage[name].values())
            print(f"{name:{width}}  {p_values[name]:7.2g}  " + "  ".join(cells))
        if self.failures:
            index, error = self.failures[0]
            print(f"The first of {len(self.failures)} failures, in simulation {index}: {error}")
        print(self.verdict())

    def to_arviz(self) -> Any:
        """ArviZ data (``InferenceData``, in ArviZ 1.x a ``DataTree``) with axes ``(chain, draw, ...)``.

        A simulation is a draw. Groups: ``prior_sbc``, the shares of draws below the true value, in the middle of their
        rank, which ArviZ 1.x draws by ``plot_ecdf_pit``; ``prior``, the true values; and ``ranks``.
        """
        groups = {
            "prior_sbc": {name: (r[None] + 0.5) / (self.num_draws + 1) for name, r in self.ranks.items()},
            "prior": {name: value[None] for name, value in self.true.items()},
            "ranks": {name: r[None] for name, r in self.ranks.items()},
        }
        return _arviz.from_datasets(groups)

    def plot(self, var_names: str | Sequence[str] | None = None) -> Any:
        """Draws of each scalar (at most 16) the histogram of ranks, and their distribution function less the uniform.

        Bars of calibrated draws lie in the grey band with a probability of 99 % each; the whole of the line lies in its
        band with one of 95 % (Säilynoja et al. 2022).

        :returns: the matplotlib figure.
        :raises ValueError: for a name in ``var_names`` that is not among the quantities.
        """
        import matplotlib.pyplot as plt

        var_names = [var_names] if isinstance(var_names, str) else var_names
        unknown = [name for name in var_names or () if name not in self.ranks]
        if unknown:
            raise ValueError(f"plot: var_names {unknown} are not among {list(self.ranks)}.")
        panels = list(self._scalars(var_names).items())[:16]
        n, num_ranks = self.num_simulations, self.num_draws + 1
        edges = _bin_edges(n, num_ranks)
        share, width = np.diff(edges) / num_ranks, np.diff(edges)
        low, high = (stats.binom.ppf(q, n, share) / width for q in (0.005, 0.995))
        at, band = _simultaneous_band(n, num_ranks)
        rows = max(-(-len(panels) // 2), 1)
        figure, axes = plt.subplots(rows, 4, figsize=(12.8, 2.4 * rows), squeeze=False, layout="constrained")
        pairs = axes.reshape(-1, 2)
        for (histogram, difference), (label, ranks) in zip(pairs, panels, strict=False):
            histogram.fill_between(edges, np.r_[low, low[-1]], np.r_[high, high[-1]], step="post", color="0.85")
            histogram.stairs(np.histogram(ranks, edges)[0] / width, edges, fill=True, alpha=0.5)
            histogram.set(title=f"{label}: ranks", yticks=[], xlim=(0, num_ranks))
            histogram.set_ylim(bottom=0)
            difference.fill_between(at / num_ranks, *(band - at / num_ranks), color="0.85")
            below = np.searchsorted(np.sort(ranks), at) / n
            difference.plot(at / num_ranks, below - at / num_ranks, lw=1)
            difference.set(title=f"{label}: ECDF - uniform", xlim=(0, 1))
        for axis in pairs[len(panels) :].ravel():
            axis.set_axis_off()
        return figure

    def _scalars(self, var_names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Ranks ``(num_simulations,)`` of each scalar that varies."""
        return {
            f"{name}[{','.join(map(str, index))}]" if index else name: ranks[(slice(None), *index)]
            for name, ranks in self.ranks.items()
            if var_names is None or name in var_names
            for index in np.ndindex(*ranks.shape[1:])
            if self.num_simulations == 1 or np.ptp(self.true[name][(slice(None), *index)]) > 0
        }

    def _chi_square(self) -> dict[str, tuple[float, float]]:
        """Statistic and p-value of each scalar."""
        n, num_ranks = self.num_simulations, self.num_draws + 1
        edges = _bin_edges(n, num_ranks)
        expected = n * np.diff(edges) / num_ranks

        def test(ranks: np.ndarray) -> tuple[float, float]:
            statistic = float((np.square(np.histogram(ranks, edges)[0] - expected) / expected).sum())
            return statistic, float(stats.chi2.sf(statistic, len(expected) - 1))

        return {name: test(ranks) for name, ranks in self._scalars().items()}


def _bin_edges(num_simulations: int, num_ranks: int) -> np.ndarray:
    """Edges of bins of about equal numbers of ranks; of exactly equal ones where that does not halve the bins."""
    most = min(max(num_simulations // 10, 2), 20, num_ranks)
    divisor = max(d for d in range(1, most + 1) if num_ranks % d == 0)
    return np.linspace(0, num_ranks, (divisor if 2 * divisor >= max(most, 3) else most) + 1).round()


def _simultaneous_band(num_simulations: int, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks ``(k,)``, and bounds ``(2, k)`` of the share of ranks below them, which hold together with 95 %.

    Säilynoja et al. 2022: binomial intervals at every point, of the level at which, in simulations, they hold together.
    """
    at = np.unique(np.linspace(0, num_ranks, 101).round())[1:-1]
    share = np.diff(np.r_[0, at, num_ranks]) / num_ranks
    below = np.random.default_rng(0).multinomial(num_simulations, share, 2000)[:, :-1].cumsum(1)
    law = stats.binom(num_simulations, at / num_ranks)
    tails = 2 * np.minimum(law.cdf(below), law.sf(below - 1))
    level = np.quantile(tails.min(1), _SIGNIFICANCE)
    return at, np.stack([law.ppf(level / 2), law.ppf(1 - level / 2)]) / num_simulations


def _diagnosis(name: str, ranks: np.ndarray, num_draws: int) -> str:
    """What the shape of ranks says: their mean of a bias, their spread of the width of the draws."""
    n, u = len(ranks), (ranks + 0.5) / (num_draws + 1) - 0.5
    slope = u.mean() * (12 * n) ** 0.5  # standard normal for uniform ranks, as is the next
    bend = (u.var() - (1 - (num_draws + 1) ** -2.0) / 12) * (180 * n) ** 0.5
    if max(abs(slope), abs(bend)) < 2.5:
        return f"the ranks of {name} are uneven, without bias or a wrong width"
    if abs(slope) > abs(bend):
        if name == LOG_LIKELIHOOD:
            fit = "worse" if slope > 0 else "better"
            why = "take too little from the data, or are biased or too wide" if slope > 0 else "are too narrow"
            return f"the draws fit the data {fit} than the truth does: they {why}"
        side = "left (too low)" if slope > 0 else "right (too high)"
        return f"the draws of {name} are biased to the {side}, its ranks slope"
    if bend > 0:
        return f"the draws of {name} are too narrow (overconfident) or autocorrelated, its ranks are ∪-shaped"
    return f"the draws of {name} are too wide (underconfident), its ranks are ∩-shaped"


def _ranks(true: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of draws ``(n, *shape)`` below the true value; among equal ones its place is drawn at random."""
    return (draws < true).sum(0) + rng.integers((draws == true).sum(0) + 1)


class _Outcome(NamedTuple):
    true: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    error: str = ""
    details: str = ""  # the traceback


def _failure(error: Exception) -> _Outcome:
    return _Outcome({}, {}, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


class _Simulator:
    """One simulation after another; what each needs, and what travels to other processes."""

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        infer: Callable | dict[str, Any] | None,
        num_draws: int,
        var_names: str | Sequence[str] | None,
        impl: str,
    ):
        self.model, self.args, self.kwargs, self.num_draws, self.impl = model, args, kwargs, num_draws, impl
        self.var_names = [var_names] if isinstance(var_names, str) else None if var_names is None else list(var_names)
        self.infer: Any = infer if callable(infer) else _ByFlowVI(model, infer or {})
        self.uses_flow_vi = not callable(infer)
        self.infers_many = callable(getattr(infer, "infer_many", None))
        self.runs = 0
        self.latents: list[str] = []
        self.deterministic: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_evaluate", "_simulate_many")}

    def check(self, key: Array) -> None:
        """Raises a ``ValueError`` where the data cannot be simulated; settles what is ranked."""
        keys = jax.random.split(key)
        try:
            trace = self._trace(keys[0])
        except NotImplementedError as error:
            raise ValueError(
                f"{_OWNER}: the model cannot be drawn from ({error}). Every latent needs a proper prior, and every "
                "observed site a distribution that can be sampled."
            ) from error
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        factors = [name for name, s in sites.items() if isinstance(s["fn"], dist.Unit) or _is_factor(s)]
        if factors:
            raise ValueError(
                f"{_OWNER}: factor site(s) {factors} change the density without a way to draw from it. Write them as "
                "priors, or as observed sites of a distribution."
            )
        plates = [n for n, s in trace.items() if s["type"] == "plate" and s["args"][1] not in (None, s["args"][0])]
        if plates:
            raise ValueError(
                f"{_OWNER}: plate(s) {plates} are subsampled, but data are simulated and inferred from as a "
                "whole. Leave subsample_size out."
            )
        data = {name: site for name, site in sites.items() if _is_data(site)}
        if not data:
            raise ValueError(
                f"{_OWNER}: the model has no observed sites: there is nothing to simulate. Give the data in args or "
                "kwargs; only their shapes matter."
            )
        for name, site in data.items():
            given, drawn = np.shape(site["infer"]["obs"]), np.shape(site["value"])
            if given != drawn:
                raise ValueError(
                    f"{_OWNER}: site {name!r} is observed with shape {given}, but the model draws {drawn}. Give its "
                    "distribution the shape of the data, by a plate or expand()."
                )
        latent = {name: site for name, site in sites.items() if name not in data}
        self._check_weights(sites, latent)
        if all(_equal(trace, self._trace(k), sites) for k in jax.random.split(keys[1], _REDRAWS)):
            raise ValueError(f"{_OWNER}: the model draws the same each time. Leave out its own handlers.seed.")
        with handlers.block(), handlers.seed(rng_seed=keys[0]):
            plain = handlers.trace(self.model).get_trace(*self.args, **self.kwargs)
        if self.uses_flow_vi:
            check_latents(plain, _OWNER)
            self.infer.vi  # noqa: B018  # raises where its options are bad
        elif not latent:
            raise ValueError(f"{_OWNER}: the model has no latent sites: there is nothing to infer.")
        self._choose(list(latent), [name for name, site in trace.items() if site["type"] == "deterministic"])
        self._check_consistent(trace, list(data))

    def _check_weights(self, sites: dict[str, Any], latent: dict[str, Any]) -> None:
        scaled = [n for n, s in sites.items() if s["scale"] is not None and np.any(np.asarray(s["scale"]) != 1)]
        masked = [n for n, s in latent.items() if not np.all(getattr(s["fn"], "_mask", True))]
        for names, what, handler in ((scaled, "scaled", "scale"), (masked, "masked", "mask")):
            if names:
                raise ValueError(
                    f"{_OWNER}: site(s) {names} are {what}, so that the model's density is not that of its draws. "
                    f"Leave out handlers.{handler}."
                )

    def _choose(self, latents: list[str], deterministic: list[str]) -> None:
        self.latents = latents
        if LOG_LIKELIHOOD in (*latents, *deterministic):
            raise ValueError(f"{_OWNER}: a site is named {LOG_LIKELIHOOD!r}, as the extra quantity is. Rename it.")
        if self.var_names is None:
            self.var_names = [*latents, LOG_LIKELIHOOD]
        known = [*latents, *deterministic, LOG_LIKELIHOOD]
        unknown = [name for name in self.var_names if name not in known]
        if unknown or not self.var_names:
            raise ValueError(f"{_OWNER}: var_names must be some of {known}, but got {unknown or self.var_names}.")
        self.deterministic = [name for name in self.var_names if name in deterministic]

    def _check_consistent(self, trace: dict[str, Any], names: list[str]) -> None:
        """Whether the model, given the data, has the density from which they were drawn."""
        drawn = float(sum(jnp.sum(trace[name]["fn"].log_prob(trace[name]["value"])) for name in names))
        latents, data = ({n: trace[n]["value"] for n in part} for part in (self.latents, names))
        given = float(self._evaluate(data, {n: value[None] for n, value in latents.items()})[LOG_LIKELIHOOD][0])
        if np.isfinite([drawn, given]).all() and abs(drawn - given) > 1e-3 * (1 + abs(drawn)):
            raise ValueError(
                f"{_OWNER}: simulated data have the log-likelihood {given:.6g} under the model, but were drawn with "
                f"{drawn:.6g}. The model uses its data other than by observed sites, or draws them in a scan whose "
                "state they enter: use the value that sample() returns, in a Python loop."
            )

    def _trace(self, key: Array) -> dict[str, Any]:
        """Draws of all sites, the observed ones too."""
        with handlers.block(), handlers.seed(rng_seed=key), handlers.uncondition():
            return handlers.trace(self.model).get_trace(*self.args, **self.kwargs)

    @cached_property
    def _evaluate(self) -> Callable[[dict[str, Array], dict[str, Array]], dict[str, Array]]:
        """The log-likelihood, and deterministic sites, of data and of draws ``(n, *shape)``; compiled once."""

        def one(data: dict[str, Array], latents: dict[str, Array]) -> dict[str, Array]:
            model = handlers.seed(ConditionedModel(self.model, data), rng_seed=0)
            log_probs, trace = compute_log_probs(model, self.args, self.kwargs, latents)
            likelihood = jnp.asarray(sum(log_probs[name] for name in data))
            return {LOG_LIKELIHOOD: likelihood, **{name: trace[name]["value"] for name in self.deterministic}}

        return jax.jit(lambda data, latents: lax.map(partial(one, data), latents, batch_size=_BATCH))

    def run(self, seed: np.ndarray) -> _Outcome:
        """A simulation. Whatever its model and its inference raise is its outcome."""
        self.runs += 1
        if self.uses_flow_vi and self.infer.vi.compiles_anew and self.runs % _KEPT_FITS == 0:
            jax.clear_caches()
            gc.collect()
        simulate_key, infer_key, tie_key = jax.random.split(
            jax.random.wrap_key_data(jnp.asarray(seed), impl=self.impl), 3
        )
        try:
            with handlers.block():
                trace = self._trace(simulate_key)
                data = {name: site["value"] for name, site in trace.items() if _is_data(site)}
                bad = [name for name, value in data.items() if not np.isfinite(np.asarray(value)).all()]
                if bad:
                    raise FloatingPointError(f"simulated data of site(s) {bad} are not finite")
                model = ConditionedModel(self.model, data)
                draws = self.infer(model, self.args, self.kwargs, infer_key, self.num_draws)
        except Exception as error:
            return _failure(error)
        truth = {name: trace[name]["value"] for name in self.latents}
        self._check_draws(draws, truth)
        try:
            if self._derives:
                joined = {n: jnp.concatenate([jnp.asarray(x)[None], jnp.asarray(draws[n])]) for n, x in truth.items()}
                values = self._evaluate(data, joined)
                draws = {**draws, **{name: value[1:] for name, value in values.items()}}
                truth = {**truth, **{name: value[0] for name, value in values.items()}}
            return _ranked(truth, draws, self.var_names or [], numpy_rng(tie_key))
        except Exception as error:
            return _failure(error)

    @cached_property
    def _simulate_many(self) -> Callable[[Array], tuple[dict[str, Array], dict[str, Array]]]:
        """Latents and data for keys ``(n,)``; compiled once."""

        def one(key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
            trace = self._trace(key)
            data = {name: site["value"] for name, site in trace.items() if _is_data(site)}
            return {name: trace[name]["value"] for name in self.latents}, data

        return jax.jit(jax.vmap(one))

    def run_many(self, seeds: Sequence[np.ndarray]) -> list[_Outcome]:
        """As many simulations, for an inference that takes many data sets at once (``infer.infer_many``).

        The data are those of :meth:`run` with the same seeds.
        """
        keys = jax.random.wrap_key_data(jnp.asarray(np.stack(seeds)), impl=self.impl)
        split = jax.vmap(partial(jax.random.split, num=3))(keys)
        simulate_keys, infer_keys, tie_keys = split[:, 0], split[:, 1], split[:, 2]
        truth, data = self._simulate_many(simulate_keys)
        draws = self.infer.infer_many(infer_keys, data, self.args, self.kwargs, self.num_draws)  # type: ignore[attr-defined]
        self._check_draws(jax.tree.map(lambda x: x[0], draws), {name: x[0] for name, x in truth.items()})
        if self._derives:
            joined = {n: jnp.concatenate([x[:, None], draws[n]], 1) for n, x in truth.items()}
            values = jax.vmap(self._evaluate)(data, joined)
            draws = {**draws, **{name: value[:, 1:] for name, value in values.items()}}
            truth = {**truth, **{name: value[:, 0] for name, value in values.items()}}
        arrays = [{name: np.asarray(x) for name, x in part.items()} for part in (data, truth, draws)]
        outcomes = []
        for i, tie_key in enumerate(tie_keys):
            try:
                one_data, one_truth, one_draws = ({name: x[i] for name, x in part.items()} for part in arrays)
                bad = [name for name, value in one_data.items() if not np.isfinite(value).all()]
                if bad:
                    raise FloatingPointError(f"simulated data of site(s) {bad} are not finite")
                outcomes.append(_ranked(one_truth, one_draws, self.var_names or [], numpy_rng(tie_key)))
            except FloatingPointError as error:
                outcomes.append(_failure(error))
        return outcomes

    @property
    def _derives(self) -> bool:
        return any(name not in self.latents for name in self.var_names or ())

    def _check_draws(self, draws: Any, truth: dict[str, Any]) -> None:
        if not isinstance(draws, dict):
            raise ValueError(f"{_OWNER}: infer must return a dict of draws by site, but returned {type(draws)}.")
        needed = [name for name in self.latents if self._derives or name in (self.var_names or ())]
        missing = [name for name in needed if name not in draws]
        if missing:
            raise ValueError(
                f"{_OWNER}: infer returned no draws of {missing}. Return them, or name in var_names the latents to be "
                f"ranked, without {LOG_LIKELIHOOD!r} and deterministic sites, which need all of them."
            )
        for name in needed:
            expected = (self.num_draws, *np.shape(truth[name]))
            if np.shape(draws[name]) != expected:
                raise ValueError(
                    f"{_OWNER}: infer returned draws of {name!r} of shape {np.shape(draws[name])}, but they must be "
                    f"{expected}: num_draws and the site's shape. Thin or reshape them."
                )


def _ranked(truth: dict[str, Any], draws: dict[str, Any], names: Sequence[str], rng: np.random.Generator) -> _Outcome:
    true = {name: np.asarray(truth[name]) for name in names}
    posterior = {name: np.asarray(draws[name]) for name in names}
    bad = [name for name in names if not np.isfinite(posterior[name]).all()]
    if bad:
        raise FloatingPointError(f"draws of {bad} are not finite")
    return _Outcome(true, {name: _ranks(true[name], posterior[name], rng) for name in names})


def _equal(one: dict[str, Any], other: dict[str, Any], names: Iterable[str]) -> bool:
    return all(np.array_equal(one[name]["value"], other[name]["value"]) for name in names)


def _is_data(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and bool(site["infer"].get("was_observed"))


def _is_factor(site: dict[str, Any]) -> bool:
    return _is_data(site) and bool(site["infer"].get("is_auxiliary"))


class _ByFlowVI:
    """Draws by one ``FlowVI`` for all data sets, so that it is compiled once, if the model takes its data as they come.

    :param model: the model.
    :param options: of ``FlowVI``, and whether to ``resample``.
    """

    def __init__(self, model: Callable, options: dict[str, Any]):
        self.model, self.options = model, options

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "vi"}

    @cached_property
    def vi(self) -> FlowVI:
        options = {name: value for name, value in self.options.items() if name != "resample"}
        return FlowVI(self._given, **{"progress_bar": False, **options})

    def _given(self, data: dict[str, Array], *args: Any, **kwargs: Any) -> Any:
        return ConditionedModel(self.model, data)(*args, **kwargs)

    def __call__(
        self, model: ConditionedModel, args: tuple, kwargs: dict[str, Any], rng_key: Array, num_draws: int
    ) -> dict[str, Array]:
        fit_key, draw_key = jax.random.split(rng_key)
        posterior = self.vi.run(fit_key, model.data, *args, **kwargs)
        if posterior.history.interrupted:  # which it takes for the end of a single fit
            raise KeyboardInterrupt
        if self.options.get("resample", False):
            return posterior.importance_resample(draw_key, num_draws)
        return posterior.sample(draw_key, (num_draws,))


# -- many simulations --------------------------------------------------------------------------------------------------
def _check_arguments(num_simulations: int, num_draws: int, num_workers: int, infer: Any) -> None:
    check_counts(_OWNER, num_simulations=num_simulations, num_draws=num_draws, num_workers=num_workers)
    if not (infer is None or isinstance(infer, dict) or callable(infer)):
        raise ValueError(f"{_OWNER}: infer must be a function, a dict of FlowVI's options or None, but got {infer!r}.")


def _collect(simulator: _Simulator, seeds: list[Any], num_workers: int, progress_bar: bool) -> Calibration:
    outcomes: dict[int, _Outcome] = {}
    interrupted = False
    if num_workers > 1:
        stream = _in_parallel(simulator, seeds, num_workers)
    else:
        stream = _many_at_once(simulator, seeds) if simulator.infers_many else _in_turn(simulator, seeds)
    with closing(stream), tqdm(total=len(seeds), desc="calibration", disable=not progress_bar) as bar:
        try:
            for index, outcome in stream:
                outcomes[index] = outcome
                bar.set_postfix(failed=sum(bool(o.error) for o in outcomes.values()), refresh=False)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    done = [(index, outcomes[index]) for index in sorted(outcomes)]
    good = [outcome for _, outcome in done if not outcome.error]
    if not good and interrupted:
        raise KeyboardInterrupt
    if not good:
        raise RuntimeError(f"{_OWNER}: all {len(done)} simulations failed, the first by\n{done[0][1].details}")
    names = list(good[0].ranks)
    return Calibration(
        {name: np.stack([outcome.ranks[name] for outcome in good]) for name in names},
        {name: np.stack([outcome.true[name] for outcome in good]) for name in names},
        simulator.num_draws,
        [(index, outcome.error) for index, outcome in done if outcome.error],
        interrupted,
    )


def _in_turn(simulator: _Simulator, seeds: list[Any]) -> Generator[tuple[int, _Outcome], None, None]:
    for index, seed in enumerate(seeds):
        yield index, simulator.run(seed)


def _many_at_once(simulator: _Simulator, seeds: list[Any]) -> Generator[tuple[int, _Outcome], None, None]:
    for start in range(0, len(seeds), _AT_ONCE):
        yield from enumerate(simulator.run_many(seeds[start : start + _AT_ONCE]), start)


def _in_parallel(
    simulator: _Simulator, seeds: list[Any], num_workers: int
) -> Generator[tuple[int, _Outcome], None, None]:
    advice = "Define the model and infer as functions of a module that can be imported, or use num_workers=1."
    try:
        payload = pickle.dumps(simulator)
    except Exception as error:
        raise ValueError(
            f"{_OWNER}: num_workers > 1, but the model, its arguments or infer cannot be pickled ({error}). {advice}"
        ) from error
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        min(num_workers, len(seeds)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(payload, *_settings(num_workers)),
    )
    try:
        futures = {executor.submit(_work, seed): index for index, seed in enumerate(seeds)}
        for future in as_completed(futures):
            yield futures[future], future.result()
        executor.shutdown()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"{_OWNER}: a worker process ended early: out of memory, or started by a script whose code is not below "
            f"'if __name__ == \"__main__\":'. {advice}"
        ) from error
    except AttributeError as error:
        raise ValueError(f"{_OWNER}: a worker process did not find the model or infer ({error}). {advice}") from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


_payload = b""  # in a worker: the pickled simulator
_simulator: _Simulator | None = None  # and what came out of it


def _settings(num_workers: int) -> tuple[Any, ...]:
    """What a worker must have in common with this process."""
    del num_workers
    return (jax.config.jax_enable_x64,)  # type: ignore[attr-defined]


def _start_worker(payload: bytes, x64: bool) -> None:
    global _payload
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    jax.config.update("jax_enable_x64", x64)
    _payload = payload


def _work(seed: Any) -> _Outcome:
    global _simulator
    if _simulator is None:  # here rather than at the start, so that an error has its own message
        _simulator = pickle.loads(_payload)
    return _simulator.run(seed)
