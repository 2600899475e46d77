"""The verdict on fits that are known to be good or bad: no false trust, hardly a false alarm."""

import copy
import functools
import importlib
import math
import types
import warnings

import numpy as np
import pytest

from tests.inference.fitting import slow_in_jax

DATA = np.random.default_rng(0).normal(1.0, 1.0, 20)
COVARIANCE = np.cov(np.random.default_rng(1).normal(size=(4, 9)))
PRECISION = 1 / 4 + len(DATA)
TRUTH = {  # mean and standard deviation of what is held against it
    "conjugate": {"theta": (DATA.sum() / PRECISION, PRECISION**-0.5)},
    "gaussian": {"z": (1.0, np.sqrt(np.diagonal(COVARIANCE)))},
    "gumbel": {"z": (np.euler_gamma, math.pi / 6**0.5)},
    "funnel": {"v": (0.0, 3.0)},
    "eight_schools": {"mu": (4.40, 3.32), "log_tau": (0.802, 1.171)},  # by quadrature
    "bimodal": {"z": (1.2, np.sqrt(0.21 * 36 + 0.3 * 0.25 + 0.7 * np.square([0.3, 0.8])))},
}
MEAN_ERROR, SD_RATIO = 0.1, 1.1  # that draws may have which are trusted, beyond chance


def arguments(fitter, model):
    data = {"conjugate": DATA, "gaussian": COVARIANCE}
    return (fitter.array(data[model]),) if model in data else ()


def error(model, draws):
    """The largest error of a mean and ratio of standard deviations, each in units of what is allowed."""
    worst = 0.0
    for name, (mean, sd) in TRUTH[model].items():
        x = draws[name]
        worst = max(worst, np.max(np.abs(x.mean(0) - mean) / sd) / MEAN_ERROR)
        worst = max(worst, np.max(np.abs(np.log(x.std(0) / sd))) / math.log(SD_RATIO))
    return worst


def affine(fitter):
    return lambda dim, key=None: fitter.pkg.transforms.ElementwiseAffine(dim)


def small(fitter):
    return functools.partial(fitter.pkg.flows.realnvp, num_layers=2, hidden_dims=(8, 8))


def bounded(fitter):
    xp = importlib.import_module("jax.numpy" if fitter.name == "jax" else "torch")

    class Bounded(fitter.pkg.transforms.ElementwiseAffine):
        def forward_and_log_det(self, x, context=None):
            y = 1.5 * xp.tanh(x / 1.5)
            return y, xp.log(1 - (y / 1.5) ** 2).sum(-1)

        def inverse_and_log_det(self, y, context=None):
            return 1.5 * xp.arctanh(y / 1.5), -xp.log(1 - (y / 1.5) ** 2).sum(-1)

    return lambda dim, key=None: Bounded(dim)


def bad(fitter):
    """Models and options of fits which are wrong, for all that their ELBO and often their Pareto k say."""
    centred = {"base": None, "noncentered": False}
    few = {"num_particles": 64}
    return {
        "one Gaussian for the funnel": ("funnel", {**centred, **few, "flow": affine(fitter), "num_steps": 500}),
        "one Gaussian for eight schools": ("eight_schools", {**centred, "flow": affine(fitter), "num_steps": 300}),
        "one of two modes": ("bimodal", {**few, "flow": small(fitter), "base_df": 30.0, "num_steps": 60}),
        "a box": ("gaussian", {**few, "flow": bounded(fitter), "base": None, "num_steps": 100}),
        "under-trained": ("eight_schools", {**few, "flow": small(fitter), "noncentered": False, "num_steps": 60}),
        "a flow too small": ("funnel", {**few, "flow": small(fitter), "noncentered": False, "num_steps": 400}),
    }


def good(fitter):
    return {
        "conjugate": ("conjugate", {"flow": affine(fitter), "num_steps": 200}),
        "correlated": ("gaussian", {"flow": small(fitter), "num_steps": 300}),
        "skewed": ("gumbel", {"flow": affine(fitter), "num_steps": 400, "learning_rate": 1e-2}),
        "two modes": ("bimodal", {"flow": small(fitter), "num_steps": 300}),
    }


def judged(fitter, case, seed):
    """The verdict's first word, and the errors of draws as they are and resampled, in units of those allowed."""
    model, options = case
    posterior = fitter.run(model, *arguments(fitter, model), seed=seed, **options)
    verdict = posterior.verdict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pareto k
        errors = error(model, fitter.sample(posterior, 20_000)), error(model, fitter.resample(posterior, 20_000))
    return verdict.split(":")[0], *errors, posterior


@pytest.mark.parametrize("name", ["one Gaussian for the funnel", "one of two modes", "a box"])
def test_a_bad_fit_is_not_trusted(fitter, name):
    word, direct, resampled, posterior = judged(fitter, bad(fitter)[name], 0)
    assert word == "Do not trust" and max(direct, resampled) > 1.3
    # chains cannot cross the gap between two modes; paths uphill find the other one
    assert posterior.misses_modes if name == "one of two modes" else posterior.departure.suspicious


@pytest.mark.parametrize("name", ["conjugate", "skewed"])
def test_a_good_fit_is_trusted(fitter, name):
    word, direct, _, posterior = judged(fitter, good(fitter)[name], 0)
    assert word == "Good" and direct < 1
    assert abs(posterior.departure.nats) < 5 * posterior.departure.standard_error < 0.1
    gradients = posterior.history.gradients  # those of the chains are counted, once
    posterior.verdict()
    assert posterior.history.gradients == gradients
    before = gradients - posterior.departure.gradients
    assert 0 < before < gradients and posterior.departure.gradients < 30_000
    posterior.departure = posterior.departure._replace(nats=0.2)
    assert posterior.verdict().startswith("Do not trust: chains")
    posterior.departure = posterior.departure._replace(nats=0.0, standard_error=0.3)
    assert posterior.verdict().startswith("Do not trust: chains")


def test_the_worst_linear_combination_of_the_latents_counts(fitter):
    """Small errors of many latents add up to a large one of their sum; sampling noise of their number does not."""
    rng, dim, n = np.random.default_rng(0), 50, 40_000
    z = rng.standard_normal((n, dim))
    moment_error = fitter.module("diagnosis").moment_error

    def found(log_weights, mixing):
        weights = np.exp(log_weights)
        return moment_error(1.0 + z @ mixing, weights / weights.sum())

    for mixing in (np.eye(dim), rng.standard_normal((dim, dim))):
        mean_error, _ = found(0.03 * z.sum(1), mixing)  # a shift of every independent part by 0.03
        assert mean_error == pytest.approx(0.03 * dim**0.5, abs=0.02)
        assert found(rng.standard_normal(n), mixing)[0] < 0.5 * (dim * (math.e - 1) / n) ** 0.5  # nothing but chance
    mixing = np.eye(dim)
    assert found(-0.5 * (0.8**-2 - 1) * z[:, 7] ** 2, mixing) == pytest.approx((0.0, -math.log(0.8)), abs=0.02)
    z[:, 3] = 0.0
    assert found(np.zeros(n), mixing) == (np.inf, np.inf)


@slow_in_jax
@pytest.mark.parametrize("variances, word", [(np.full(60, 0.91), "Good"), (np.r_[0.5, np.ones(59)], "Usable")])
def test_many_latents_may_be_further_from_the_posterior_in_all(fitter, variances, word):
    """0.15 nats: in sixty latents, each of which is hardly wrong, or in one of them."""
    posterior = copy.copy(fitter.run("gaussian", fitter.array(np.eye(60)), flow=affine(fitter), base=None, num_steps=1))
    divergence = 0.5 * (1 / variances - 1 + np.log(variances)).sum()
    posterior.log_density = posterior.guide.log_density(fitter.array(np.diag(variances)))
    for known in ("draws", "_log_ratios", "_psis", "departure", "moment_error", "flow_error"):
        vars(posterior).pop(known, None)
    assert posterior._gap == pytest.approx(divergence, abs=0.02) and 0.12 < divergence < 0.17
    assert posterior.verdict().startswith(word)


@pytest.mark.parametrize(
    "dim, gap, moments_are_good, poor, near",
    [
        (10, 0.015, False, False, True),
        (10, 0.03, True, True, True),
        (10, 0.11, True, True, False),
        (60, 0.11, True, False, True),
        (60, 0.11, False, True, True),
        (60, 0.13, True, True, True),
        (60, 0.14, True, True, False),
        (1000, 0.19, True, False, True),
        (1000, 0.21, True, True, True),
    ],
)
def test_what_is_poor(fitter, dim, gap, moments_are_good, poor, near):
    inference = fitter.module("inference")
    posterior = types.SimpleNamespace(
        weights_are_reliable=True,
        misses_modes=False,
        _gap=gap,
        _elbo_inside=types.SimpleNamespace(standard_error=0.001),
        _moments_are_good=moments_are_good,
        log_density=types.SimpleNamespace(dim=dim),
        departure=types.SimpleNamespace(suspicious=False),
        history=fitter.pkg.posterior.History(np.zeros(1)),
    )
    assert inference.is_poor(posterior, inference.Budget()) == poor
    assert inference.is_near(posterior) == near


@pytest.mark.slow
def test_no_false_trust_in_a_hundred_bad_fits(fitter):
    """Nothing is trusted whose draws, as the verdict would use them, are wrong."""
    for name, case in bad(fitter).items():
        direct = []
        for seed in range(17):
            word, as_they_are, resampled, _ = judged(fitter, case, seed)
            claimed = {"Good": as_they_are, "Usable": resampled}.get(word, 0.0)
            assert claimed < 1.3, f"{name}, seed {seed}: {word}, {claimed}"
            direct.append(max(as_they_are, resampled))
        assert np.median(direct) > 1.3, name  # it is a bad fit


@pytest.mark.slow
def test_hardly_a_false_alarm_on_good_fits(fitter):
    words = []
    for name, case in good(fitter).items():
        for seed in range(12):
            word, direct, *_ = judged(fitter, case, seed)
            words.append((name, seed, word))
            assert direct < 1, words[-1]
    alarms = [row for row in words if row[-1] == "Do not trust"]
    assert len(alarms) <= 0.05 * len(words), alarms
