"""Simulation-based calibration: exact inference passes, broken inference is named, in both packages."""

import importlib
import importlib.util
import io
import types
from contextlib import redirect_stdout
from functools import partial

import numpy as np
import pytest
from scipy import stats

from tests import backends


class Lab:
    """Calibration in one package."""

    def __init__(self, name):
        self.name = name
        backends.get(name)
        jax = name == "jax"
        self.module = importlib.import_module(f"{'numpyro_flows' if jax else 'pyroflows'}.calibration")
        self.ppl = importlib.import_module("numpyro" if jax else "pyro")
        self.dist = importlib.import_module(f"{self.ppl.__name__}.distributions")
        self.handlers = importlib.import_module("numpyro.handlers" if jax else "pyro.poutine")
        self.models = importlib.import_module(f"tests.inference.models_{self.ppl.__name__}")
        self.array = importlib.import_module("jax.numpy").asarray if jax else importlib.import_module("torch").tensor

    def key(self, seed=0):
        """The leading argument, or the seed set."""
        if self.name == "jax":
            return (importlib.import_module("jax").random.key(seed),)
        self.ppl.set_rng_seed(seed)
        return ()

    def run(self, model, args=(), kwargs=None, *, seed=0, **options):
        model = getattr(self.models, model) if isinstance(model, str) else model
        run = self.module.simulation_based_calibration
        return run(*self.key(seed), model, args, kwargs, progress_bar=False, **options)

    def conjugate(self, infer, **options):
        return self.run("conjugate", (self.array(np.zeros(20)),), infer=infer, **options)


_labs = {}


@pytest.fixture
def lab(in_float64):
    if in_float64 not in _labs:
        _labs[in_float64] = Lab(in_float64)
    return _labs[in_float64]


def generator(rest):
    """Numpy's generator from the key of jax, or from the seed that Pyro has set."""
    if len(rest) == 1:
        return np.random.default_rng(np.random.randint(2**31))
    return np.random.default_rng(np.asarray(importlib.import_module("jax").random.key_data(rest[0])))


def posterior_of_conjugate(conditioned):
    x = np.asarray(conditioned.data["x"])
    return x.sum() / (len(x) + 0.25), (len(x) + 0.25) ** -0.5


def exact(conditioned, args, kwargs, *rest, scale=1.0, shift=0.0):
    """Draws of the conjugate model's posterior, or of one wider by ``scale`` and ``shift`` deviations off."""
    mean, sd = posterior_of_conjugate(conditioned)
    return {"theta": mean + sd * (shift + scale * generator(rest).standard_normal(rest[-1]))}


def prior(conditioned, args, kwargs, *rest):
    return {"theta": 2.0 * generator(rest).standard_normal(rest[-1])}


def failing(conditioned, args, kwargs, *rest):
    if np.asarray(conditioned.data["x"]).mean() > 1:
        raise ArithmeticError("too large")
    return exact(conditioned, args, kwargs, *rest)


# -- exact inference ---------------------------------------------------------------------------------------------------
def test_exact_draws_are_calibrated(lab, no_warnings):
    runs = [lab.conjugate(exact, num_simulations=60, num_draws=19, seed=seed) for seed in range(10)]
    rejected = sum(run.verdict().startswith("Miscalibrated") for run in runs)
    assert rejected <= 3  # of 10 at 5 %: more has a probability of 0.001
    p_values = np.array([list(run.p_values().values()) for run in runs])
    assert stats.kstest(p_values[:, 0], "uniform").pvalue > 0.001
    for name in ("theta", "log_likelihood"):
        ranks = np.concatenate([run.ranks[name] for run in runs])
        assert ranks.min() == 0 and ranks.max() == 19 and ranks.dtype.kind == "i"
        assert stats.chisquare(np.bincount(ranks, minlength=20)).pvalue > 0.001
    for level in (0.5, 0.8, 0.95):
        covered = np.mean([run.coverage()["theta"][level].value for run in runs])
        assert covered == pytest.approx(level, abs=4 * (level * (1 - level) / 600) ** 0.5)
    true = np.concatenate([run.true["theta"] for run in runs])
    assert stats.kstest(true / 2.0, "norm").pvalue > 0.001


@pytest.mark.slow
def test_eight_schools_by_nuts(lab):
    """Non-centred, with enough warm-up and thinning for nearly independent draws."""
    benchmark = importlib.import_module("tests.benchmarks.calibration")
    host = benchmark.NumPyro() if lab.name == "jax" else benchmark.Pyro()
    model, num_draws = partial(benchmark.schools, host.lang, host.array), 19
    run = lab.run(
        model,
        (host.array(np.zeros(8)),),
        infer=host.nuts(model, num_draws),
        num_simulations=400 if lab.name == "jax" else 25,
        num_draws=num_draws,
    )
    assert not run.failures and run.verdict().startswith("Calibrated"), run.verdict()
    for level in (0.5, 0.8, 0.95):
        values = [estimates[level].value for name, estimates in run.coverage().items() if name.startswith("z")]
        # of eight nearly independent effects
        assert np.mean(values) == pytest.approx(level, abs=4 * (level * (1 - level) / 8 / run.num_simulations) ** 0.5)


def test_the_same_seed_gives_the_same_result(lab):
    a, b, c = (lab.conjugate(exact, num_simulations=5, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.true["theta"], b.true["theta"])
    for name in ("theta", "log_likelihood"):
        np.testing.assert_array_equal(a.ranks[name], b.ranks[name])
    assert not np.array_equal(a.true["theta"], c.true["theta"]) and len(set(a.true["theta"])) == 5


def test_workers_give_the_same_result(lab):
    """In processes, which have this one's precision."""
    one, two = (lab.conjugate(failing, num_simulations=8, num_workers=n) for n in (1, 2))
    assert two.true["theta"].dtype == np.float64 and 0 < len(one.failures) < 8
    assert one.failures == two.failures
    for name in ("theta", "log_likelihood"):
        np.testing.assert_allclose(one.true[name], two.true[name], rtol=1e-12)  # compiled in another way
        np.testing.assert_array_equal(one.ranks[name], two.ranks[name])


def test_sites_and_quantities(lab):
    """Counts in a keyword argument; a deterministic site has the rank of the latent with which it grows."""

    def model(scale, y):
        rate = lab.ppl.sample("rate", lab.dist.Gamma(lab.array([3.0, 4.0]), scale).to_event(1))
        lab.ppl.deterministic("twice", 2.0 * rate[0])
        with lab.ppl.plate("data", 5):
            lab.ppl.sample("y", lab.dist.Poisson(rate[0] + 0.0 * lab.array(np.zeros(5))), obs=y)

    def infer(conditioned, args, kwargs, *rest):
        assert args[0] == 2.0 and (np.asarray(kwargs["y"]) == 7).all()  # which are overridden
        y, rng, n = np.asarray(conditioned.data["y"]), generator(rest), rest[-1]
        shapes = np.stack([np.full(n, 3 + y.sum()), np.full(n, 4.0)], 1)
        return {"rate": rng.gamma(shapes, 1 / np.array([2.0 + 5, 2.0]))}

    run = partial(lab.run, model, (2.0,), {"y": lab.array(np.full(5, 7.0))}, infer=infer, num_simulations=200)
    calibration = run(var_names=["rate", "twice"])
    assert calibration.ranks["rate"].shape == (200, 2) and list(calibration.ranks) == ["rate", "twice"]
    np.testing.assert_array_equal(calibration.ranks["rate"][:, 0], calibration.ranks["twice"])
    np.testing.assert_array_equal(2 * calibration.true["rate"][:, 0], calibration.true["twice"])
    assert list(calibration.p_values()) == ["rate[0]", "rate[1]", "twice"]
    assert min(calibration.p_values().values()) > 0.001
    assert list(run(num_simulations=2).ranks) == ["rate", "log_likelihood"]
    assert list(run(num_simulations=2, var_names="rate").ranks) == ["rate"]
    with pytest.raises(ValueError, match=r"var_names must be some of \['rate', 'twice', 'log_likelihood'\].*'rat'"):
        run(var_names=["rat"])


def test_log_likelihood_is_that_of_the_data(lab):
    seen = []

    def infer(conditioned, args, kwargs, *rest):
        seen.append(np.asarray(conditioned.data["x"]))
        return exact(conditioned, args, kwargs, *rest)

    run = lab.conjugate(infer, num_simulations=3)
    expected = [stats.norm.logpdf(x, theta).sum() for x, theta in zip(seen, run.true["theta"], strict=True)]
    np.testing.assert_allclose(run.true["log_likelihood"], expected)


def test_ties_are_broken_at_random(lab):
    def model(x):
        k = lab.ppl.sample("k", lab.dist.Bernoulli(0.3))
        lab.ppl.sample("x", lab.dist.Normal(1.0 * k, 1.0), obs=x)

    def infer(conditioned, args, kwargs, *rest):
        x = float(conditioned.data["x"])
        odds = 0.3 * np.exp(-0.5 * (x - 1) ** 2), 0.7 * np.exp(-0.5 * x**2)
        return {"k": 1.0 * (generator(rest).random(rest[-1]) < odds[0] / sum(odds))}

    run = lab.run(model, (lab.array(0.0),), infer=infer, num_simulations=400, num_draws=19)
    assert min(run.p_values().values()) > 0.001
    ranks = lab.module._ranks(np.ones(5000), np.ones((3, 5000)), np.random.default_rng(0))
    assert stats.chisquare(np.bincount(ranks)).pvalue > 0.001 and ranks.max() == 3
    assert lab.module._ranks(np.array([0.5, 3.0]), np.arange(6.0).reshape(3, 2), np.random.default_rng(0))[0] == 1


# -- broken inference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("infer", "words"),
    [
        (partial(exact, scale=0.5), "draws of theta are too narrow (overconfident) or autocorrelated, its ranks are ∪"),
        (partial(exact, scale=2.0), "draws of theta are too wide (underconfident), its ranks are ∩-shaped"),
        (partial(exact, shift=0.7), "draws of theta are biased to the right (too high), its ranks slope"),
        (partial(exact, shift=-0.7), "draws of theta are biased to the left (too low), its ranks slope"),
        (prior, "draws fit the data worse than the truth does: they take too little from the data"),
    ],
)
def test_broken_inference_is_named(lab, infer, words):
    run = lab.conjugate(infer, num_simulations=150, num_draws=49)
    assert run.verdict().startswith("Miscalibrated: the ") and words in run.verdict(), run.verdict()
    if infer is prior:  # of which the latent's own ranks show nothing
        assert run.p_values()["theta"] > 0.01 and "Rejected: 1 of 2" in run.verdict()
    else:
        assert run.p_values()["theta"] < 1e-4


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_coverage_of_a_wrong_width(lab, scale):
    run = lab.conjugate(partial(exact, scale=scale), num_simulations=400, num_draws=199, var_names=["theta"])
    for level, estimate in run.coverage((0.3, 0.5, 0.8, 0.95))["theta"].items():
        truth = 2 * stats.norm.cdf(scale * stats.norm.ppf((1 + level) / 2)) - 1
        assert estimate.value == pytest.approx(truth, abs=4 * estimate.standard_error + 0.01)
        assert estimate.standard_error == pytest.approx((truth * (1 - truth) / 400) ** 0.5, abs=0.004)


# -- the result's numbers ----------------------------------------------------------------------------------------------
def made(lab, ranks, num_draws=99, **fields):
    ranks = np.asarray(ranks)
    true = np.random.default_rng(0).normal(size=ranks.shape)
    return lab.module.Calibration({"a": ranks}, {"a": true}, num_draws, **fields)


@pytest.mark.parametrize("num_draws", [1, 6, 99, 100, 250])
def test_even_ranks(lab, num_draws):
    """Coverage is exact for every level and number of draws, and chi-square has its least value."""
    run = made(lab, np.repeat(np.arange(num_draws + 1), 20), num_draws)
    for level, estimate in run.coverage((0.01, 0.5, 0.77, 0.95, 0.999))["a"].items():
        assert estimate.value == pytest.approx(level, abs=1e-12)
    assert run.p_values()["a"] == pytest.approx(1) and run.verdict().startswith("Calibrated as far as")


def test_bins(lab):
    for num_simulations, num_ranks, expected in (
        (200, 100, 20),
        (100, 100, 10),
        (50, 100, 5),
        (5, 100, 2),
        (9999, 7, 7),
    ):
        edges = lab.module._bin_edges(num_simulations, num_ranks)
        np.testing.assert_allclose(edges, np.linspace(0, num_ranks, expected + 1))
    edges = lab.module._bin_edges(200, 101)  # a prime
    assert len(edges) == 21 and edges[0] == 0 and edges[-1] == 101 and set(np.diff(edges)) == {5, 6}
    uneven = made(lab, np.random.default_rng(0).integers(0, 101, 20_000), 100)
    assert uneven.p_values()["a"] > 0.01
    one_bin = np.r_[np.random.default_rng(0).integers(0, 101, 1000), np.full(50, 40)]
    assert made(lab, one_bin, 100).p_values()["a"] < 1e-3


def test_chi_square_against_scipy(lab):
    ranks = np.random.default_rng(3).integers(0, 100, 200)
    counts = np.histogram(ranks, 20, (0, 100))[0]
    assert made(lab, ranks).p_values()["a"] == pytest.approx(stats.chisquare(counts).pvalue)


def test_holm(lab):
    """The least p-value decides, times the number of quantities; further ones are rejected step by step."""
    rng = np.random.default_rng(0)
    verdicts = [made(lab, rng.integers(0, 100, (400, 30))).verdict() for _ in range(40)]
    assert sum(verdict.startswith("Miscalibrated") for verdict in verdicts) <= 6  # 5 % of all 40
    ranks = rng.integers(0, 100, (400, 30))
    ranks[:, 7] = 100 * rng.beta(0.4, 0.4, 400)
    ranks[:, 9] = 100 * rng.beta(3.0, 3.0, 400)
    verdict = made(lab, ranks).verdict()
    assert "a[7]" in verdict or "a[9]" in verdict
    assert "Rejected: 2 of 30 quantities, by 400 simulations." in verdict


def test_constant_elements_are_left_out(lab):
    rng = np.random.default_rng(0)
    ranks, true = rng.integers(0, 100, (50, 2, 2)), rng.normal(size=(50, 2, 2))
    true[:, 0, 1] = 0.0
    run = lab.module.Calibration({"corr": ranks}, {"corr": true}, 99)
    assert list(run.p_values()) == ["corr[0,0]", "corr[1,0]", "corr[1,1]"]
    assert list(run.coverage()) == list(run.p_values())
    run = lab.module.Calibration({"corr": ranks}, {"corr": np.zeros((50, 2, 2))}, 99)
    assert run.verdict().startswith("Nothing to judge")


def test_simultaneous_band(lab):
    """The band holds the whole of a uniform sample's distribution function with 95 %."""
    at, (low, high) = lab.module._simultaneous_band(100, 100)
    rng = np.random.default_rng(1)
    ranks = np.sort(rng.integers(0, 100, (1000, 100)), 1)
    below = np.stack([np.searchsorted(row, at) for row in ranks]) / 100
    inside = ((below >= low) & (below <= high)).all(1).mean()
    assert 0.93 < inside < 0.985


def test_summary_arviz_and_plot(lab, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    run = lab.conjugate(failing, num_simulations=60)
    with redirect_stdout(io.StringIO()) as out:
        run.print_summary()
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["p-value", *"cover 50 % cover 80 % cover 95 %".split()]
    assert lines[1].startswith("theta ") and lines[2].startswith("log_likelihood ") and lines[1].count("+-") == 3
    assert f"{len(run.failures)} failures, in simulation {run.failures[0][0]}: ArithmeticError: too large" in lines[3]
    assert lines[4] == run.verdict() and f"{len(run.failures)} of 60 simulations failed" in lines[4]
    data = run.to_arviz()
    np.testing.assert_array_equal(np.asarray(data["ranks"]["theta"])[0], run.ranks["theta"])
    np.testing.assert_array_equal(np.asarray(data["prior"]["theta"])[0], run.true["theta"])
    pit = np.asarray(data["prior_sbc"]["theta"])[0]
    assert ((pit > 0) & (pit < 1)).all() and np.array_equal(np.floor(pit * 100), run.ranks["theta"])
    figure = run.plot("theta")
    figure.savefig(tmp_path / "plot.png")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["theta: ranks", "theta: ECDF - uniform"]
    assert len(run.plot().axes) == 4
    with pytest.raises(ValueError, match="var_names"):
        run.plot(["nu"])
    with pytest.raises(ValueError, match=r"between 0 and 1.*\[95\].*0\.95"):
        run.coverage((0.5, 95))


# -- failures and interruption -----------------------------------------------------------------------------------------
def test_failures_are_counted(lab):
    run = lab.conjugate(failing, num_simulations=40)
    indices = [index for index, _ in run.failures]
    assert len(indices) + run.num_simulations == 40 and 5 < len(indices) < 25
    assert sorted(indices) == indices and run.failures[0][1] == "ArithmeticError: too large"

    def not_finite(conditioned, args, kwargs, *rest):
        draws = exact(conditioned, args, kwargs, *rest)["theta"]
        return {"theta": np.where(draws > 2, np.inf, draws)}

    run = lab.conjugate(not_finite, num_simulations=40)
    assert run.failures and all("draws of ['theta'" in error for _, error in run.failures)

    def always(conditioned, args, kwargs, *rest):
        raise ArithmeticError("never works")

    with pytest.raises(RuntimeError, match="(?s)all 4 simulations failed.*ArithmeticError: never works"):
        lab.conjugate(always, num_simulations=4)


def test_interruption_keeps_what_is_done(lab):
    count = 0

    def infer(conditioned, args, kwargs, *rest):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return exact(conditioned, args, kwargs, *rest)

    run = lab.conjugate(infer, num_simulations=10)
    assert run.interrupted and run.num_simulations == 5 and run.verdict().endswith("The run was interrupted.")
    assert not lab.conjugate(exact, num_simulations=3).interrupted
    count = 5
    with pytest.raises(KeyboardInterrupt):
        lab.conjugate(infer, num_simulations=3)


class FakeVI:
    """Stands for FlowVI: its options, and what it does with Ctrl-C."""

    interrupted_at, runs, compiles_anew = None, 0, True

    def __init__(self, model, **options):
        self.model, self.options = model, options

    def run(self, *args, **kwargs):
        assert self.options == {"progress_bar": False, "num_steps": 7}
        FakeVI.runs += 1
        history = types.SimpleNamespace(interrupted=FakeVI.runs == FakeVI.interrupted_at)
        # in jax one FlowVI serves all data sets, which are an argument of its model
        given = [types.SimpleNamespace(data=argument) for argument in args if isinstance(argument, dict)]
        mean, sd = posterior_of_conjugate(*given or [self.model])

        def sample(*key_and_shape):
            return {"theta": mean + sd * np.random.default_rng(0).standard_normal(key_and_shape[-1])}

        def importance_resample(*key_and_n):
            return {"theta": np.full(key_and_n[-1], 100.0)}

        return types.SimpleNamespace(history=history, sample=sample, importance_resample=importance_resample)


def test_options_of_flow_vi(lab, monkeypatch):
    check = lab.module.FlowVI
    with pytest.raises(TypeError, match="num_stepz"):
        lab.conjugate({"num_stepz": 7}, num_simulations=1)
    with pytest.raises(ValueError, match="num_steps"):
        lab.conjugate({"num_steps": 0}, num_simulations=1)
    monkeypatch.setattr(lab.module, "FlowVI", FakeVI)
    monkeypatch.setattr(FakeVI, "runs", 0)
    assert 0 < lab.conjugate({"num_steps": 7}, num_simulations=30).ranks["theta"].mean() < 99
    assert (lab.conjugate({"num_steps": 7, "resample": True}, num_simulations=3).ranks["theta"] == 0).all()
    monkeypatch.setattr(FakeVI, "interrupted_at", FakeVI.runs + 3)
    run = lab.conjugate({"num_steps": 7}, num_simulations=5)
    assert run.interrupted and run.num_simulations == 2
    assert check is not lab.module.FlowVI


@pytest.fixture(autouse=True)
def quick_compilation():
    """In place of that of conftest: jax compiles for far longer here than it runs."""
    config = getattr(importlib.import_module("jax"), "config", None) if importlib.util.find_spec("jax") else None
    if config is not None:
        config.update("jax_disable_most_optimizations", True)
    yield
    if config is not None:
        config.update("jax_disable_most_optimizations", False)


def test_flow_vi(lab):
    options = {"num_steps": 50, "num_particles": 32, "num_starts": 1, "base": None, "noncentered": False}
    run = lab.conjugate(options, num_simulations=1)
    assert not run.failures and 0 <= run.ranks["theta"][0] <= 99 and np.isfinite(run.true["log_likelihood"][0])


# -- errors ------------------------------------------------------------------------------------------------------------
def test_models_that_cannot_be_simulated(lab):
    sample, plate, dist, zeros = lab.ppl.sample, lab.ppl.plate, lab.dist, lab.array(np.zeros(20))

    def factor(x):
        theta = sample("theta", dist.Normal(0.0, 2.0))
        lab.ppl.factor("extra", -(theta**2))
        sample("x", dist.Normal(theta, 1.0).expand([20]).to_event(1), obs=x)

    def without_data(x):
        sample("x", dist.Normal(sample("theta", dist.Normal(0.0, 2.0)), 1.0).expand([20]).to_event(1))

    def without_plate(x):
        sample("x", dist.Normal(sample("theta", dist.Normal(0.0, 2.0)), 1.0), obs=x)

    def subsampled(x):
        theta = sample("theta", dist.Normal(0.0, 2.0))
        with plate("rows", 20, subsample_size=4):
            sample("x", dist.Normal(theta, 1.0), obs=x[:4])

    def scaled(x):
        theta = sample("theta", dist.Normal(0.0, 2.0))
        with lab.handlers.scale(scale=0.5), plate("rows", 20):
            sample("x", dist.Normal(theta, 1.0), obs=x)

    def masked(x):
        with lab.handlers.mask(mask=lab.array(False)):
            theta = sample("theta", dist.Normal(0.0, 2.0))
        with plate("rows", 20):
            sample("x", dist.Normal(theta, 1.0), obs=x)

    def clash(x):
        theta = sample("log_likelihood", dist.Normal(0.0, 2.0))
        with plate("rows", 20):
            sample("x", dist.Normal(theta, 1.0), obs=x)

    def improper(x):
        support = importlib.import_module(f"{lab.dist.__name__}.constraints").real
        theta = sample("theta", dist.ImproperUniform(support, (), ()))
        with plate("rows", 20):
            sample("x", dist.Normal(theta, 1.0), obs=x)

    def no_latents(x):
        with plate("rows", 20):
            sample("x", dist.Normal(0.0, 1.0), obs=x)

    for model, words in (
        (factor, r"factor site\(s\) \['extra'\].*Write them"),
        (without_data, "no observed sites.*Give the data in args"),
        (without_plate, r"'x' is observed with shape \(20,\), but the model draws \(\).*plate"),
        (subsampled, r"plate\(s\) \['rows'\] are subsampled.*subsample_size"),
        (scaled, r"site\(s\) \['x'\] are scaled.*scale"),
        (masked, r"site\(s\) \['theta'\] are masked.*mask"),
        (clash, "named 'log_likelihood'.*Rename"),
        (improper, "cannot be drawn from.*proper prior"),
        (no_latents, "no latent sites"),
    ):
        with pytest.raises(ValueError, match=f"simulation_based_calibration: .*{words}"):
            lab.run(model, (zeros,), infer=exact)
    with pytest.raises(ValueError, match=r"'k'.*discrete"):  # FlowVI's own, before any simulation
        lab.run("mixed", num_simulations=1)


def test_a_seeded_model_is_refused(lab):
    model = lab.models.conjugate
    model = lab.handlers.seed(model, 0)
    with pytest.raises(ValueError, match="draws the same each time"):
        lab.run(model, (lab.array(np.zeros(20)),), infer=exact)


def test_data_in_the_state_of_a_scan(lab):
    """NumPyro's uncondition draws such data again, outside the scan, of which the state then knows nothing."""
    if lab.name == "torch":
        pytest.skip("Pyro has no scan")
    from numpyro.contrib.control_flow import scan

    def model(x, state_is_data):
        theta = lab.ppl.sample("theta", lab.dist.Normal(0.0, 2.0))

        def step(state, x):
            x = lab.ppl.sample("x", lab.dist.Normal(theta + 0.9 * state, 1.0), obs=x)
            return x if state_is_data else state, None

        scan(step, 0.0, x)

    def infer(conditioned, args, kwargs, key, n):
        return {"theta": np.zeros(n)}

    run = partial(lab.run, model, infer=infer, num_simulations=2)
    assert run((lab.array(np.zeros(5)), False)).num_simulations == 2
    with pytest.raises(ValueError, match="were drawn with.*scan"):
        run((lab.array(np.full(5, 30.0)), True))


def test_errors_of_arguments(lab):
    for name in ("num_simulations", "num_draws", "num_workers"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
            lab.conjugate(exact, **{name: 0})
    with pytest.raises(ValueError, match="infer must be a function"):
        lab.conjugate(7)
    with pytest.raises(ValueError, match="num_workers > 1.*importe?d.*num_workers=1"):
        lab.conjugate(lambda *_: None, num_workers=2)
    if lab.name == "jax":
        with pytest.raises(TypeError, match="rng_key must be a key"):
            lab.module.simulation_based_calibration(lab.models.conjugate, (np.zeros(20),))


def test_errors_of_draws(lab):
    for draws, words in (
        (None, "must return a dict"),
        ({"mu": np.zeros(99)}, r"no draws of \['theta'\].*var_names"),
        ({"theta": np.zeros((99, 1))}, r"shape \(99, 1\).*must be \(99,\)"),
        ({"theta": np.zeros(98)}, "Thin"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.conjugate(lambda *_, draws=draws: draws, num_simulations=1)


def test_each_simulation_has_its_own_random_state_and_parameters():
    """In Pyro, where both are global: a guide left over would be the next simulation's start."""
    lab, seen = Lab("torch"), []
    run = partial(lab.run, "conjugate", num_simulations=3)
    torch = importlib.import_module("torch")

    def infer(conditioned, args, kwargs, n):
        seen.append(lab.ppl.param("p", torch.tensor(0.0)).item())
        lab.ppl.get_param_store()["p"] = torch.tensor(5.0)
        return {"theta": torch.randn(n)}

    lab.ppl.clear_param_store()
    lab.ppl.param("kept", torch.tensor(3.0))
    run((torch.zeros(20),), infer=infer)
    first = torch.rand(3)
    assert seen == [0.0, 0.0, 0.0] and set(lab.ppl.get_param_store().keys()) == {"kept"}
    run((torch.zeros(20),), infer=infer, num_draws=7)
    torch.testing.assert_close(torch.rand(3), first)
    lab.ppl.clear_param_store()
