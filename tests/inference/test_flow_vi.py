"""FlowVI and FlowPosterior against closed forms and known answers, with default settings, in both packages."""

import copy
import functools
import importlib
import io
import math
import pickle
import re
import warnings
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from tests.inference.fitting import Fitter, slow_in_jax, within_steps

EVIDENCE_EIGHT_SCHOOLS = -31.311  # by two-dimensional quadrature, and by long NUTS runs


DATA = np.random.default_rng(0).normal(1.0, 1.0, 20)


@pytest.mark.optimised
def test_conjugate_normal(fitter, no_warnings):
    posterior = fitter.fit("conjugate", fitter.array(DATA), num_particles=64)
    precision = 1 / 4 + len(DATA)
    mean, sd = DATA.sum() / precision, precision**-0.5
    draws = fitter.sample(posterior, 20_000)["theta"]
    assert draws.mean() == pytest.approx(mean, abs=4 * sd / 20_000**0.5)
    assert draws.std() == pytest.approx(sd, rel=0.02)
    evidence = stats.multivariate_normal.logpdf(DATA, cov=np.eye(20) + 4.0)
    assert posterior.log_evidence().value == pytest.approx(evidence, abs=0.005)
    assert evidence - 0.005 < posterior.elbo.value < evidence + 4 * posterior.elbo.standard_error + 1e-3
    assert posterior.pareto_k < 0.7 and posterior.history.stationary and posterior.history.skipped == 0
    grid, step = np.linspace(mean - 40 * sd, mean + 40 * sd, 8001, retstep=True)
    log_prob = np.asarray(posterior.log_prob({"theta": fitter.array(grid)}))
    assert np.exp(log_prob).sum() * step == pytest.approx(1, abs=1e-6)
    bulk = np.abs(grid - mean) < 2 * sd
    np.testing.assert_allclose(log_prob[bulk], stats.norm.logpdf(grid[bulk], mean, sd), atol=0.1)


@slow_in_jax
def test_correlated_gaussian_of_ten_dimensions(fitter):
    rng = np.random.default_rng(1)
    root = rng.normal(size=(10, 10)) * np.geomspace(0.01, 10, 10)[:, None]
    covariance = root @ root.T + 1e-6 * np.eye(10)
    posterior = fitter.run("gaussian", fitter.array(covariance), flow=_tiny(fitter), num_steps=200, num_particles=64)
    draws = fitter.sample(posterior, 20_000)["z"]
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), (draws - 1.0).T)
    np.testing.assert_allclose(whitened.mean(1), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(whitened), np.eye(10), atol=0.08)
    assert -0.03 < posterior.elbo.value < 4 * posterior.elbo.standard_error
    assert posterior.log_evidence().value == pytest.approx(0, abs=0.02)


@pytest.mark.slow
@pytest.mark.optimised
def test_neals_funnel(fitter):
    posterior = fitter.fit("funnel")
    v = fitter.sample(posterior, 20_000)["v"]
    assert v.mean() == pytest.approx(0, abs=0.3) and v.std() == pytest.approx(3, rel=0.1)
    assert -0.15 < posterior.elbo.value < 4 * posterior.elbo.standard_error
    assert posterior._log_evidence().value == pytest.approx(0, abs=0.1)


QUICK = {"num_steps": 1000}  # a fifth of the default


@pytest.mark.optimised
@pytest.mark.parametrize("options", [QUICK, pytest.param({}, marks=pytest.mark.slow)], ids=["quick", "default"])
def test_eight_schools_centred(fitter, no_warnings, options):
    posterior = fitter.fit("eight_schools", **options)
    assert -31.45 <= posterior.elbo.value <= EVIDENCE_EIGHT_SCHOOLS + 4 * posterior.elbo.standard_error
    assert posterior.log_evidence().value == pytest.approx(EVIDENCE_EIGHT_SCHOOLS, abs=0.03)
    assert posterior.pareto_k < 0.7
    for draws in (fitter.sample(posterior, 20_000), fitter.resample(posterior, 20_000)):
        for name, mean, sd in (("mu", 4.40, 3.32), ("tau", 3.60, 3.22)):
            assert draws[name].mean() == pytest.approx(mean, abs=0.1 * sd), name
            assert draws[name].std() == pytest.approx(sd, rel=0.1), name
        assert draws["log_tau"].mean() == pytest.approx(0.802, abs=0.12)
        assert (draws["tau"] > 8).mean() == pytest.approx(0.093, abs=0.02)
        assert (draws["tau"] < 0.5).mean() == pytest.approx(0.101, abs=0.02)


@slow_in_jax
def test_supports(fitter):
    """Draws from priors of every kind of support; the evidence of a model without data is one."""
    posterior = fitter.run("constrained", num_steps=500, num_particles=64)
    draws = fitter.sample(posterior, 20_000)
    np.testing.assert_allclose(draws["simplex"].mean(0), np.array([2, 3, 4]) / 9, atol=0.01)
    np.testing.assert_allclose(draws["simplex"].sum(-1), 1, atol=1e-9)
    resampled = fitter.resample(posterior, 20_000)
    assert resampled["positive"].mean() == pytest.approx(1.5, rel=0.03)
    assert resampled["positive"].std() == pytest.approx(3**0.5 / 2, rel=0.04)
    assert draws["interval"].mean() == pytest.approx(0.4, abs=0.01)
    assert (np.diff(draws["ordered"]) > 0).all()
    correlation = draws["corr"] @ draws["corr"].swapaxes(-1, -2)
    np.testing.assert_allclose(np.diagonal(correlation, axis1=1, axis2=2), 1, atol=1e-9)
    # LKJ(2) in three dimensions: an off-diagonal entry is Beta(2.5, 2.5) on [-1, 1], of variance 1/6
    assert correlation[:, 0, 1].std() == pytest.approx(6**-0.5, rel=0.04)
    assert posterior.elbo.value > -0.1
    assert posterior.log_evidence().value == pytest.approx(0, abs=0.03)


def test_log_prob_is_the_density_of_the_constrained_values(fitter):
    flow = functools.partial(fitter.pkg.flows.nsf, num_layers=2, hidden_dims=(16,))
    posterior = fitter.run("gamma", flow=flow, num_steps=400)
    grid, step = np.linspace(0, 20, 20_001, retstep=True)
    log_prob = np.asarray(posterior.log_prob({"g": fitter.array(grid[1:])}))
    assert np.exp(log_prob).sum() * step == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(np.exp(log_prob), stats.gamma.pdf(grid[1:], 3, scale=0.5), atol=0.1)
    posterior = fitter.fit("eight_schools", **QUICK)
    native = posterior.sample(*fitter.key(3), (2, 5))
    assert posterior.log_prob(native).shape == (2, 5)
    with pytest.raises(ValueError, match="tau.*missing"):
        posterior.log_prob({k: v for k, v in native.items() if k != "tau"})


def test_dependent_supports(fitter):
    posterior = fitter.run("dependent_support", num_steps=400, num_particles=64)
    draws = fitter.sample(posterior, 20_000)
    assert (draws["b"] < draws["a"]).all()
    assert draws["a"].mean() == pytest.approx(1, abs=0.03) and draws["b"].mean() == pytest.approx(0.5, abs=0.03)


def test_few_draws_outside_the_support(fitter):
    """They lose their weights, and that is all: the fit is not poor by an ELBO of minus infinity, nor said to be."""
    posterior = fitter.run("cut_off", flow=_tiny(fitter), num_steps=500, escalate=True)
    outside = int(np.isneginf(np.asarray(posterior.draws.log_model)).sum())
    assert 0 < outside < 0.01 * posterior.num_draws and posterior.elbo.value == -math.inf
    assert posterior.log_evidence().value == pytest.approx(stats.norm.logcdf(3), abs=1e-3)
    assert len(posterior.history.tried) == 1 and re.search(r"gap 0\.00\d", posterior.history.tried[0])
    verdict = posterior.verdict()
    assert verdict.startswith("Usable") and f"{outside} of {posterior.num_draws} draws outside" in verdict
    trace = posterior.history.elbo
    assert np.isnan(trace).any() and np.nanmean(trace[-100:]) == pytest.approx(0, abs=0.01)


def test_the_same_seed_gives_the_same_result(fitter):
    a, b = (fitter.run("conjugate", fitter.array(DATA), num_steps=100) for _ in range(2))
    np.testing.assert_array_equal(a.history.elbo, b.history.elbo)
    assert a.pareto_k == b.pareto_k


def test_arviz_summary_and_plot(fitter, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    posterior = fitter.fit("eight_schools", **QUICK)
    data = posterior.to_arviz(1000)
    assert data["posterior"]["theta"].shape == (1, 1000, 8) and "log_tau" in data["posterior"]
    assert data["posterior"].attrs["pareto_k"] == posterior.pareto_k
    np.testing.assert_array_equal(
        np.asarray(data["sample_stats"]["lp"] - data["sample_stats"]["log_guide"])[0], posterior._log_ratios[:1000]
    )
    np.testing.assert_allclose(np.asarray(data["observed_data"]["obs"])[:2], [28, 8])
    with redirect_stdout(io.StringIO()) as out:
        posterior.print_summary(1000)
    assert "theta[7]" in out.getvalue() and re.search(r"Pareto k -?0\.\d\d, ELBO -31\.\d+ \+- 0\.0", out.getvalue())
    figure = posterior.plot(["mu", "tau"])
    figure.savefig(tmp_path / "plot.png")
    assert [axis.get_title() for axis in figure.axes[2:4]] == ["mu", "tau"]
    with pytest.raises(ValueError, match="var_names"):
        posterior.plot(["nu"])
    with pytest.raises(ValueError, match="kind must be"):
        posterior.plot(kind="trace")


def test_pair_plots(fitter):
    import matplotlib

    matplotlib.use("Agg")
    posterior = fitter.run("student", base=None, num_steps=20, num_particles=16)
    ks = posterior.element_pareto_k
    assert ks.shape == (2,) and (ks > posterior.pareto_k).all()  # squared draws have a heavier tail than the weights
    for names, labels in ((None, {"u[0]", "u[1]"}), (["z"], {"z[0]", "z[1]"})):
        figure = posterior.plot(names, 500, kind="pair")
        texts = [axis.get_xlabel() for axis in figure.axes] + [axis.get_ylabel() for axis in figure.axes]
        assert labels <= {text.replace("\n", "") for text in texts}
        drawn = [scatter.get_offsets() for axis in figure.axes for scatter in axis.collections]
        assert max((len(points) for points in drawn), default=0) == 500
    with pytest.raises(ValueError, match="var_names"):
        posterior.plot(["nu"], kind="pair")
    with pytest.raises(ValueError, match="two elements at least"):
        fitter.fit("conjugate", fitter.array(DATA), num_particles=64).plot(kind="pair")


@pytest.mark.parametrize("k", [-0.5, 0.2, 0.9])
def test_pareto_k(fitter, k):
    """Importance ratios of a known tail: generalised Pareto, of either sign of its shape."""
    psis = importlib.import_module(f"{fitter.pkg.__name__}._arviz").psis
    ratios = stats.genpareto(k).rvs(20_000, random_state=0)
    log_weights, found = psis(np.log1p(ratios))
    assert found == pytest.approx(k, abs=0.12)
    weights = np.exp(log_weights)
    assert weights.sum() == pytest.approx(1) and (np.diff(weights[np.argsort(ratios)]) >= 0).all()


@pytest.mark.parametrize("scale, reliable", [(1.0, False), (3e-4, True)])
def test_a_tail_of_weights_close_to_one_is_no_alarm(fitter, scale, reliable):
    """A guide that is nearly the posterior may have weights of any Pareto k: none of them counts."""
    posterior = copy.copy(fitter.fit("conjugate", fitter.array(DATA), num_particles=64))
    for known in ("_psis", "departure", "moment_error"):
        vars(posterior).pop(known, None)
    tail = stats.genpareto(0.9).rvs(posterior.num_draws, random_state=0)
    posterior._log_ratios = np.log1p(scale * tail)
    assert posterior.pareto_k > 0.75 and posterior.weights_are_reliable == reliable
    assert posterior.verdict().startswith("Good" if reliable else "Do not trust: the guide misses mass")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        posterior.log_evidence()
    assert [str(w.message).split(",")[0] for w in raised] == (
        [] if reliable else [f"log_evidence: Pareto k is {posterior.pareto_k:.2f}"]
    )


def test_saved_and_loaded(fitter, tmp_path):
    posterior = fitter.fit("conjugate", fitter.array(DATA), num_particles=64)
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = type(posterior).load(tmp_path / "posterior.safetensors", fitter.models.conjugate)
    a, b = (fitter.sample(p, 10)["theta"] for p in (posterior, loaded))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_array_equal(posterior.history.elbo, loaded.history.elbo)
    assert loaded.history[1:] == posterior.history[1:]
    assert loaded.verdict() == posterior.verdict()  # the same draws
    assert loaded.sample(*fitter.key())["theta"].shape == ()
    with pytest.raises(ValueError, match="do not fit|missing"):
        type(posterior).load(tmp_path / "posterior.safetensors", fitter.models.conjugate, fitter.pkg.flows.iaf)
    with pytest.raises(TypeError, match="flow= takes a factory"):  # the model's arguments, given again
        type(posterior).load(tmp_path / "posterior.safetensors", fitter.models.conjugate, fitter.array(DATA))


def test_what_is_missing_keeps_its_prior(fitter):
    """A site with ``obs_mask=`` and values in closed form; what the ecosystem masks of it would be improper."""
    import matplotlib

    matplotlib.use("Agg")
    mask = np.arange(20) % 4 > 0
    arguments = fitter.array(DATA), fitter.array(mask)
    if fitter.name == "torch":
        arguments = arguments[0], arguments[1].bool()
    posterior = fitter.run("partly_observed", *arguments, num_steps=400, num_particles=64)
    seen = DATA[mask]
    evidence = stats.multivariate_normal.logpdf(seen, cov=np.eye(len(seen)) + 4.0)
    assert posterior.log_evidence().value == pytest.approx(evidence, abs=0.02)
    assert posterior.elbo.value == pytest.approx(evidence, abs=0.1)
    draws = fitter.sample(posterior, 20_000)["x"]
    np.testing.assert_allclose(draws[:, mask], np.broadcast_to(seen, (20_000, len(seen))), rtol=1e-6)
    variance = 1 / (1 / 4 + len(seen))
    np.testing.assert_allclose(draws[:, ~mask].mean(0), variance * seen.sum(), atol=0.1)
    np.testing.assert_allclose(draws[:, ~mask].std(0), (1 + variance) ** 0.5, rtol=0.05)
    assert len(posterior.plot(["is_high"]).axes) >= 2 + 20  # values that are true or false


def test_an_edge_that_the_data_give_is_told(fitter):
    """There is no density beyond it, where NumPyro computes one."""
    with pytest.raises(RuntimeError, match=r"outside the model's support.*'y': '100% of draws'.*prior"):
        fitter.run("edge", fitter.array(np.linspace(0.1, 2.0, 20)), num_steps=200, num_particles=32)


@pytest.mark.optimised
def test_keyboard_interrupt_keeps_what_was_reached(fitter, monkeypatch):
    inference = importlib.import_module(f"{fitter.pkg.__name__}.inference")
    original, calls = inference.Schedule.next_chunk, []

    def interrupted(self, *progress):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return original(self, *progress)

    monkeypatch.setattr(inference.Schedule, "next_chunk", interrupted)
    posterior = fitter.run("conjugate", fitter.array(DATA))
    assert posterior.history.interrupted and len(posterior.history.elbo) == 300
    assert posterior.verdict().startswith("Interrupted")
    assert math.isfinite(posterior.elbo.value)


def test_steps_with_gradients_that_are_not_finite_are_skipped(fitter):
    posterior = fitter.run("sometimes_nan", num_steps=600, num_particles=64)
    assert 0 < posterior.history.skipped < 600
    assert math.isfinite(posterior.log_evidence().value)
    with redirect_stdout(io.StringIO()) as out:
        posterior.print_summary(200)
    assert "steps were skipped" in out.getvalue()


def test_improper_priors(fitter, no_warnings, monkeypatch):
    """Posterior and evidence of a normal's mean and scale under flat priors are in closed form.

    Priors that cannot be drawn from raise what they like: NumPyro's truncated Student-t an ``ImportError``.
    """

    def refuse(*args, **kwargs):
        raise ImportError("drawing needs another package")

    if fitter.name == "jax":  # Pyro's own initialisation draws
        monkeypatch.setattr(fitter.models.dist.ImproperUniform, "sample", refuse)
    posterior = fitter.run("improper", fitter.array(DATA), num_steps=600, num_particles=64)
    n, squares = len(DATA), DATA.var() * len(DATA)
    draws = fitter.resample(posterior, 20_000)
    df = n - 2  # of the mean; sum of squares / scale^2 is chi-square of as many
    assert draws["mean"].mean() == pytest.approx(DATA.mean(), abs=0.02)
    assert draws["mean"].std() == pytest.approx((squares / n / (df - 2)) ** 0.5, rel=0.04)
    assert (squares / draws["scale"] ** 2).mean() == pytest.approx(df, rel=0.02)
    evidence = -0.5 * math.log(n) - (n - 1) / 2 * math.log(2 * math.pi) - math.log(2)
    evidence += math.lgamma(df / 2) - df / 2 * math.log(squares / 2)
    assert posterior.log_evidence().value == pytest.approx(evidence, abs=0.01)


def test_draws_whose_matrix_has_no_cholesky_factor_are_not_finite(fitter):
    data = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 20)
    posterior = fitter.run("sometimes_singular", fitter.array(data), num_steps=600, num_particles=64)
    assert posterior.history.skipped < 600
    grid, step = np.linspace(-0.999, 0.999, 4001, retstep=True)
    covariances = np.array([[[1, r], [r, 1]] for r in grid])
    log_likelihood = [stats.multivariate_normal.logpdf(data, cov=c).sum() for c in covariances]
    log_joint = np.array(log_likelihood) + stats.norm.logpdf(grid)
    weights = np.exp(log_joint - log_joint.max())
    mean = (weights * grid).sum() / weights.sum()
    assert fitter.resample(posterior, 20_000)["r"].mean() == pytest.approx(mean, abs=0.01)
    evidence = np.log(weights.sum() * step) + log_joint.max()
    assert posterior.log_evidence().value == pytest.approx(evidence, abs=0.02)


def test_a_bad_fit_is_not_trusted(fitter):
    posterior = fitter.run("funnel", noncentered=False, num_steps=1, base=None)
    assert posterior.guide.noncentering is None
    if posterior.pareto_k >= 0.7:
        assert posterior.verdict().startswith("Do not trust")
        with pytest.warns(UserWarning, match="Pareto k"):
            posterior.log_evidence()
    else:
        assert not posterior.verdict().startswith("Good")


@pytest.mark.parametrize(
    "model, message",
    [
        ("subsampled_local", "plate 'data', which is subsampled \\(4 of 10\\)"),
        ("subsampled_data", "plate.*'data': '4 of 10'.* are subsampled.*subsample_size out.*SVI"),
        ("discrete", "'k'.* discrete"),
        ("no_latents", "FlowVI: .*no latent sites"),
        ("nan_at_the_start", "FlowVI: .*not finite at the start.*'bad'"),
        ("with_param", "param site.*'scale'"),
    ],
)
def test_models_that_cannot_be_served_are_refused(fitter, model, message):
    with pytest.raises(ValueError, match=message):
        fitter.run(model)


@pytest.mark.parametrize("model", ["random_data", "random_sites"])
def test_models_that_are_not_the_same_in_every_run_are_refused(model):
    """In Pyro, where a model may draw what it likes, and look at its latents."""
    message = {"random_data": "draws at random besides its latents", "random_sites": r"differ between runs: \['z'\]"}
    fitter = Fitter("torch")
    with pytest.raises(ValueError, match=f"FlowVI: .*{message[model]}"):
        fitter.run(model, num_starts=16)


@pytest.mark.parametrize(
    "option",
    [
        {"num_steps": 0}, {"num_particles": 0}, {"learning_rate": 0.0}, {"num_starts": 0},
        {"max_time": 0.0}, {"max_gradients": -1}, {"base_df": -1},
        {"num_steps": "100"}, {"num_particles": 2.5}, {"num_starts": 4.0}, {"learning_rate": "0.1"}, {"max_time": "5"},
    ],
)  # fmt: skip
def test_bad_options_are_named(fitter, option):
    with pytest.raises(ValueError, match=f"FlowVI: {next(iter(option))} must be"):
        fitter.pkg.FlowVI(fitter.models.funnel, **option)


def test_functions_that_are_none_are_named(fitter):
    flow = fitter.pkg.flows.nsf
    for option in ({"flow": "nsf"}, {"richer": flow}, {"richer": ["nsf"]}, {"init_loc_fn": 3}):
        with pytest.raises(TypeError, match=f"FlowVI: .*{next(iter(option))} must be"):
            fitter.pkg.FlowVI(fitter.models.funnel, **option)
    with pytest.raises(ValueError, match=r"FlowVI: flow\(dim\) must build a flow of the model's 1 latent"):
        fitter.run("gamma", flow=lambda _, **key: flow(3, **key))
    if fitter.name == "jax":
        with pytest.raises(TypeError, match="FlowVI: rng_key must be a key of jax.random and comes first"):
            fitter.pkg.FlowVI(fitter.models.conjugate).run(fitter.array(DATA))


def test_without_gradients():
    fitter, torch = Fitter("torch"), importlib.import_module("torch")
    with torch.no_grad():
        assert len(fitter.run("conjugate", fitter.array(DATA), flow=_tiny(fitter), num_steps=5).history.elbo) == 5
    with torch.inference_mode(), pytest.raises(RuntimeError, match="FlowVI: .*outside torch.inference_mode"):
        fitter.run("conjugate", fitter.array(DATA))


@pytest.mark.parametrize("flow", ["nsf", *(pytest.param(flow, marks=pytest.mark.slow) for flow in ("iaf", "maf"))])
def test_other_flows_serve_as_well(fitter, flow):
    posterior = fitter.run(
        "conjugate", fitter.array(DATA), flow=getattr(fitter.pkg.flows, flow), num_steps=300, num_particles=64
    )
    evidence = stats.multivariate_normal.logpdf(DATA, cov=np.eye(20) + 4.0)
    assert posterior._log_evidence().value == pytest.approx(evidence, abs=0.02)


# -- escalation and budgets
def poor(fitter, **options):
    """A normal for two heavy-tailed latents: 0.04 nats are lost, whatever the steps, at a Pareto k below 0.7."""
    affine, flow = fitter.pkg.transforms.ElementwiseAffine, fitter.pkg.flows.nsf
    options = {"flow": lambda dim, key=None: affine(dim), "base": None, "num_particles": 32, **options}
    richer = (functools.partial(flow, num_layers=1, hidden_dims=(8,), num_bins=4),)
    return fitter.run("student", 4.0, **{"num_steps": 100, "escalate": True, "richer": richer, **options})


def test_a_poor_fit_goes_on(fitter):
    posterior = poor(fitter)  # of a Pareto k below 0.7, so that steps may do
    tried = posterior.history.tried
    assert [re.split(r", |\(", line)[0] for line in tried[:3]] == ["<lambda>", "more steps", "nsf"]
    assert [int(re.search(r"(\d+) steps", line)[1]) for line in tried[:3]] == [100, 125, 60]
    assert tried[3:] == () or tried[3].startswith("more steps") and len(tried) == 4  # of what has been kept
    elbos, ks = ([float(re.search(rf"{x} (-?[\d.]+)", line)[1]) for line in tried] for x in ("ELBO", "Pareto k"))
    assert min(elbos) > -0.15
    best = 0
    for i, (elbo, k) in enumerate(zip(elbos, ks, strict=True)):
        best = i if elbo > elbos[best] and not (k >= 0.7 and ks[best] < 0.7) else best
    kept = posterior.elbo.value, posterior.pareto_k  # two fits may have the same rounded ELBO
    assert kept[0] == pytest.approx(elbos[best], abs=1e-3)
    assert any(kept == (pytest.approx(e, abs=1e-3), pytest.approx(k, abs=0.01)) for e, k in zip(elbos, ks, strict=True))
    assert posterior.history.gradients >= 32 * (100 + 2 * 25 + 60) and posterior.history.stopped == ""
    with redirect_stdout(io.StringIO()) as out:
        posterior.print_summary(200)
    assert all(line in out.getvalue() for line in tried)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_escalation(fitter):
    a, b = poor(fitter), poor(fitter)
    assert a.history.tried == b.history.tried and a.elbo == b.elbo


def test_a_hopeless_fit_is_not_annealed(fitter, monkeypatch):
    module = fitter.module("inference")
    for divergence, steps in ((0.2, None), (0.1, 50)):
        schedule = module.Schedule(100, 1e-3, hopeless=0.15)
        chunk = schedule.next_chunk([0.0] * 50, [divergence] * 50)
        assert (None if chunk is None else len(chunk)) == steps and schedule.finished == (steps is None)
    for divergence, rise, done, ends in (  # by 250 steps, of which ten make the first part
        (0.3, 0.01, 1000, True),
        (0.3, 0.03, 1000, False),
        (0.3, -0.01, 1000, True),
        (0.3, 0.01, 750, False),
        (0.1, 0.0, 1000, False),
    ):
        schedule = module.Schedule(5000, 1e-3, hopeless=0.15)
        chunk = schedule.next_chunk([rise * (n // 250) for n in range(done)], [divergence] * done)
        assert (chunk is None) == schedule.finished == ends
    assert module.Budget().schedule(100, 1, 1e-3, hopeless=0.15).hopeless == 0.15
    assert module.Budget(max_time=1e3).schedule(100, 1, 1e-3, hopeless=0.15).hopeless == np.inf
    limited = module.Budget(max_gradients=1000)
    assert limited.is_spent(0.05, 51) and limited.is_spent(0.05, 41, since=10) and not limited.is_spent(0.05, 50)
    assert module.Budget(max_time=1e-9).is_spent(0.05, 0) and not module.Budget().is_spent(0.05, 10**9)
    monkeypatch.setattr(module, "_GAP_HOPELESS", (0.01, 0.0))
    steps = [int(re.search(r"(\d+) steps:", line)[1]) for line in poor(fitter).history.tried]
    assert steps[0] == 50 and len(steps) > 1 and min(steps[1:]) >= 60  # what comes after is annealed


def test_when_a_fit_is_nearly_exact_or_hopeless_depends_on_the_number_of_latents(fitter, monkeypatch):
    module, flat = fitter.module("inference"), np.random.default_rng(0).normal(size=500).tolist()
    for nearly_exact, falls in ((0.01, False), (0.06, True)):
        schedule = module.Schedule(5000, 1e-3, nearly_exact=nearly_exact)
        step_sizes = schedule.next_chunk(flat, [0.05] * 500)
        assert schedule.stationary and (step_sizes[-1] < 1e-3) == falls
    schedules = []

    class Noted(Exception):
        """Ends the fit, whose limits are known."""

    def noted(schedule, *args):
        schedules.append(schedule)
        raise Noted

    monkeypatch.setattr(module.Schedule, "next_chunk", noted)
    flow = functools.partial(fitter.pkg.flows.realnvp, num_layers=1, hidden_dims=(4,))
    for dim, nearly_exact, hopeless in ((2, 0.01, 0.15), (60, 0.06, 1.4 * 0.12)):
        with pytest.raises(Noted):
            fitter.run("gaussian", fitter.array(np.eye(dim)), flow=flow, num_steps=2, num_particles=8, escalate=True)
        assert schedules[0].nearly_exact == pytest.approx(nearly_exact)
        assert schedules[0].hopeless == pytest.approx(hopeless)
        schedules.clear()


def test_a_good_fit_does_not_go_on(fitter):
    flow = functools.partial(fitter.pkg.flows.realnvp, num_layers=1, hidden_dims=(4,))
    posterior = fitter.run("conjugate", fitter.array(DATA), flow=flow, num_steps=200, escalate=True)
    assert len(posterior.history.tried) == 1 and len(posterior.history.elbo) == 200
    vi = fitter.pkg.FlowVI(fitter.models.funnel)
    assert vi.escalate and vi.num_steps == 5000
    assert not fitter.pkg.FlowVI(fitter.models.funnel, num_steps=5000).escalate
    assert not fitter.pkg.FlowVI(fitter.models.funnel, fitter.pkg.flows.iaf).escalate


def test_gradients_are_bounded(fitter):
    with pytest.warns(UserWarning, match="max_gradients=5000 cut the run short"):
        posterior = poor(fitter, max_gradients=5000, num_steps=10_000)
    history = posterior.history
    assert history.stopped == "max_gradients" and len(history.tried) == 1
    assert 50 < len(history.elbo) <= 5000 // 32
    assert posterior.history.gradients < 8000  # the look elsewhere comes after the last step
    with redirect_stdout(io.StringIO()) as out:
        posterior.print_summary(200)
    assert "ended by max_gradients=" in out.getvalue()


def test_time_is_bounded(fitter):
    with pytest.warns(UserWarning, match="max_time=4.0 cut the run short"):
        posterior = poor(fitter, max_time=4.0, num_steps=10**7)
    assert posterior.history.stopped == "max_time" and 0 < len(posterior.history.elbo) < 10**6
    assert not posterior.history.interrupted and math.isfinite(posterior.elbo.value)


def test_time_is_bounded_where_the_model_runs_for_one_draw_at_a_time(monkeypatch):
    """Some steps are left of it: searches end early, and fewer draws are scored."""
    fitter = Fitter("torch")
    inference, runs = fitter.module("inference"), []
    monkeypatch.setattr(inference.time, "perf_counter", lambda: 0.01 * len(runs))  # a hundred runs a second
    with pytest.warns(UserWarning, match="max_time=10 cut the run short"):
        posterior = fitter.run("one_at_a_time", runs, max_time=10, num_particles=16)
    assert 10 < len(posterior.history.elbo) < 60 and posterior.weights_are_reliable
    assert len(runs) < 1000 + posterior.num_draws + 100 < 5000


def test_annealing_fits_into_the_time(fitter, monkeypatch):
    inference, clock = fitter.module("inference"), iter(np.arange(0.0, 1000.0, 0.5))
    monkeypatch.setattr(inference.time, "perf_counter", lambda: float(next(clock)))
    schedule, trace = inference.Schedule(100_000, 1.0, deadline=30.0), []
    sizes = []
    while (chunk := schedule.next_chunk(trace, trace)) is not None:
        sizes += chunk.tolist()
        trace += [1.0] * len(chunk)
    first = sizes.index(next(size for size in sizes if size < 1.0)) - 1
    assert 0.25 < first / (30 / 0.5 * 50) < 0.4 and sizes[-1] < 0.01 and schedule.late


# -- a learned base
def _tiny(fitter):
    return functools.partial(fitter.pkg.flows.realnvp, num_layers=2, hidden_dims=(8, 8))


def bimodal(fitter):
    if "bimodal" not in fitter.fits:
        flow = _tiny(fitter)
        base = functools.partial(fitter.pkg.distributions.MixtureBase, num_components=4)
        fitter.fits["bimodal"] = fitter.run("bimodal", flow=flow, base=base, num_steps=400, num_starts=12)
    return fitter.fits["bimodal"]


def test_a_mixture_base_finds_both_modes_and_their_masses(fitter):
    posterior = bimodal(fitter)
    draws = fitter.sample(posterior, 20_000)["z"]
    assert (draws[:, 0] > 0).mean() == pytest.approx(0.7, abs=0.02)
    assert (np.sign(draws[:, 0]) == np.sign(draws[:, 1])).mean() > 0.99
    assert -0.03 < posterior.elbo.value < 4 * posterior.elbo.standard_error
    assert posterior._log_evidence().value == pytest.approx(0, abs=0.02)
    assert posterior.history.skipped == 0


@slow_in_jax
def test_the_smaller_mode_in_many_dimensions(fitter):
    """Closer to the larger one than most of that one's draws are, and the end of one walk in six."""
    rng, dim = np.random.default_rng(50), 50
    loc = np.array([[-0.5], [0.5]]) + 0.1 * rng.standard_normal((2, dim))
    scale = rng.uniform(0.4, 0.8, (2, dim))
    posterior = fitter.run("bimodal", fitter.array(loc), fitter.array(scale), flow=_tiny(fitter), num_steps=20)
    assert len(posterior._modes) == 2
    assert posterior.history.missed == pytest.approx(0.3, abs=0.03)  # so short a fit does not cover it
    assert "Do not trust: about 30%" in posterior.verdict()


def test_modes_are_parted_by_a_barrier_or_by_distance(fitter):
    module = importlib.import_module(f"{fitter.pkg.__name__}.initialization")
    dim, apart = 50, 8.0
    locs = np.zeros((2, dim))
    locs[1, 0] = apart
    modes = [module.Start(loc, np.eye(dim), elbo, 0) for loc, elbo in zip(locs, (0.0, -1.0), strict=True)]

    def two(u):
        return np.logaddexp(*(-0.5 * np.square(u - loc).sum(-1) for loc in locs))

    def ridge(u):  # one mode, long in the direction of the two
        return -0.5 * np.square(u[:, 1:]).sum(-1)

    assert len(module.distinct(modes, two)) == 2
    assert len(module.distinct(modes, ridge)) == 1
    assert len(module.distinct(modes, lambda u: np.where(np.abs(u[:, 0] - 3) < 0.1, np.nan, 0.0))) == 2
    far = [modes[0], modes[1]._replace(loc=4 * locs[1])]
    assert len(module.distinct(far, ridge)) == 2


def test_a_fit_goes_on_from_the_closest_but_keeps_what_can_be_trusted(fitter):
    inference = fitter.module("inference")
    better = functools.partial(inference.better, budget=inference.Budget())

    def fit(elbo, reliable=True, misses=False, suspicious=False):
        return SimpleNamespace(
            _elbo_inside=SimpleNamespace(value=elbo),
            weights_are_reliable=reliable,
            misses_modes=misses,
            departure=SimpleNamespace(suspicious=suspicious),
            history=SimpleNamespace(gradients=0),
        )

    first, closer, departs = fit(-2.0), fit(-1.0), fit(-2.0, suspicious=True)
    wild, lost = fit(0.0, reliable=False), fit(1.0, misses=True)
    assert better(closer, first) is closer and better(first, closer) is closer
    assert better(wild, first) is first and better(wild, first, trusted=False) is wild
    assert better(wild, departs) is wild  # neither can be trusted
    assert better(lost, first) is first and better(lost, departs, trusted=False) is departs
    assert better(wild, fit(-1.0, reliable=False)) is wild
    assert better(fit(-3.0), fit(-2.0, misses=True)).misses_modes  # by its ELBO
    assert better(wild, fit(-2.0, misses=True)) is wild
    assert better(None, first) is first and better(fit(np.nan), first) is first


def test_more_steps_are_repeated_while_they_pay(fitter):
    may_mend = fitter.module("inference").may_mend
    trace = np.concatenate([np.full(500, -2.0), np.full(500, -1.5)])
    posterior = SimpleNamespace(
        history=SimpleNamespace(elbo=trace),
        weights_are_reliable=True,
        log_density=SimpleNamespace(dim=100),
        _gap=0.6,
    )
    assert may_mend(posterior, 500, 0, np.inf)  # rose by 0.5, and 0.2 may be left
    posterior.log_density.dim = 10
    assert not may_mend(posterior, 500, 0, np.inf)  # rose by 0.5 where 0.6 are missing
    assert may_mend(posterior, 500, 1, 0.21) and not may_mend(posterior, 500, 1, 0.19)  # three more such legs
    assert may_mend(posterior, 500, 3, 0.61) and not may_mend(posterior, 500, 3, 0.59)
    assert not may_mend(posterior, 500, 4, 10.0)
    posterior.weights_are_reliable = False
    assert may_mend(posterior, 500, 0, np.inf) and not may_mend(posterior, 500, 1, 0.0)


def test_a_walk_arrives_where_scales_differ_by_orders_of_magnitude(fitter):
    module = importlib.import_module(f"{fitter.pkg.__name__}.initialization")
    scale, loc = np.geomspace(1e-3, 1e3, 40), np.linspace(-5, 5, 40)

    def log_density(u):  # not quadratic: the local Gaussian is another one everywhere
        z = (u - loc) / scale
        return (-0.5 * z**2 + 0.5 * np.cos(z)).sum(-1)

    def value_and_grad(u):
        z = (u - loc) / scale
        return log_density(u), -(z + 0.5 * np.sin(z)) / scale

    def hessian(u):
        return np.diag(-(1 + 0.5 * np.cos((u - loc) / scale)) / scale**2)

    target = module.Target(log_density, value_and_grad, hessian)
    modes, gradients = module.find_modes(target, [np.zeros(40)], np.random.default_rng(0))
    assert np.abs((modes[0].loc - loc) / scale).max() < 0.1
    np.testing.assert_allclose(np.diagonal(modes[0].scale_tril), scale / 1.5**0.5, rtol=0.1)
    assert gradients < 3000


def test_a_density_that_overflows_is_none(fitter):
    """NumPyro's and torch's log-density of an inverse gamma is plus infinity where its values underflow."""
    guide = fitter.pkg.AutoFlow(fitter.models.inverse_gamma, noncentered=True)
    density = guide.log_density()
    noncentering = importlib.import_module(f"{fitter.pkg.__name__}.noncentering")
    u = fitter.array(np.array([[-500.0, 0.5], [0.3, 0.5]]))
    if fitter.name == "jax":
        import jax

        values = jax.vmap(density)(u), noncentering.forward_and_log_density(guide.coordinates, density, u)[2]
    else:
        values = density(u), noncentering.pulled_back(density, guide.coordinates)(u)
    for of in values:
        assert float(of[0]) == -np.inf and np.isfinite(float(of[1]))


def test_the_gaussian_around_modes(fitter):
    module = importlib.import_module(f"{fitter.pkg.__name__}.initialization")
    rng = np.random.default_rng(0)
    roots = [np.linalg.cholesky(np.cov(rng.normal(size=(3, 9)))) for _ in range(3)]
    locs = [np.zeros(3), np.full(3, 20.0), np.full(3, -20.0)]
    modes = [module.Start(loc, root, elbo, 0) for loc, root, elbo in zip(locs, roots, (-5.0, -6.0, -13.0), strict=True)]
    again = modes[1]._replace(loc=modes[1].loc + roots[1][:, 0], elbo=-6.1)
    kept = module.distinct([modes[1], again, modes[2], modes[0]], lambda u: np.zeros(len(u)))
    assert [mode.elbo for mode in kept] == [-5.0, -6.0]  # the third has too little mass, the other is a repetition
    loc, scale_tril, log_mass, inner, scales = module.gaussian_around(kept)
    mass = np.exp(log_mass) / np.exp(log_mass).sum()
    np.testing.assert_allclose(mass[1] / mass[0], np.exp(-1))
    np.testing.assert_allclose(inner @ scale_tril.T + loc, locs[:2], atol=1e-9)
    np.testing.assert_allclose(mass @ inner, 0, atol=1e-9)
    np.testing.assert_allclose(mass @ (inner**2 + scales**2), 1, rtol=1e-9)
    loc, scale_tril, _, inner, scales = module.gaussian_around(modes[:1])  # a single mode is the start itself
    np.testing.assert_allclose(scale_tril, roots[0], atol=1e-12)
    np.testing.assert_allclose(scales, 1), np.testing.assert_allclose(inner, 0)


def test_the_mass_that_a_guide_misses(fitter):
    module = importlib.import_module(f"{fitter.pkg.__name__}.initialization")
    normal, far = stats.multivariate_normal([0, 0]), stats.multivariate_normal([9, 0])
    modes = [module.Start(np.array(loc, float), np.eye(2), 0.0, 0) for loc in ([0, 0], [9, 0])]

    def log_density(u):
        return 3.0 + np.logaddexp(np.log(0.8) + normal.logpdf(u), np.log(0.2) + far.logpdf(u))

    def missed(log_guide, evidence):
        return module.missed_mass(modes, log_density, log_guide, 3.0 + evidence, np.random.default_rng(0))

    assert missed(normal.logpdf, np.log(0.8)) == pytest.approx(0.2, abs=0.005)
    assert missed(far.logpdf, np.log(0.2)) == pytest.approx(0.8, abs=0.005)
    assert missed(lambda u: log_density(u) - 3.0, 0.0) == 0


def test_a_missed_mode_is_seen_and_fitted(fitter):
    """One normal keeps one mode, with a perfect Pareto k: only a look elsewhere tells."""
    flow = _tiny(fitter)
    forced = fitter.run("bimodal", flow=flow, num_steps=200, base_df=30.0)
    kept = (fitter.sample(forced, 2000)["z"][:, 0] > 0).mean()
    assert kept in (0, 1) and forced.pareto_k < 0.7
    assert forced.history.missed == pytest.approx(0.3 if kept else 0.7, abs=0.03)
    assert forced.verdict().startswith("Do not trust: about")
    posterior = fitter.run("bimodal", flow=flow, num_steps=400)  # the base is left to FlowVI
    assert (fitter.sample(posterior, 20_000)["z"][:, 0] > 0).mean() == pytest.approx(0.7, abs=0.02)
    assert posterior.history.missed < 0.01 and not posterior.verdict().startswith("Do not trust: about")
    assert -0.05 < posterior.elbo.value < 4 * posterior.elbo.standard_error


def test_a_second_fit_that_fails_leaves_the_first(fitter, monkeypatch):
    kind, calls = fitter.pkg.FlowVI, []
    fit = kind._fit

    def failing(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no step had a finite gradient")
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(kind, "_fit", failing)
    flow = _tiny(fitter)
    with pytest.warns(UserWarning, match="a second fit, with a mixture base, failed: no step had"):
        posterior = fitter.run("bimodal", flow=flow, num_steps=50, num_particles=64)
    assert len(calls) == 2 and len(posterior.history.elbo) == 50
    assert posterior.verdict().startswith("Do not trust: about")


def test_a_wrong_log_determinant_is_not_trusted(fitter):
    """It lifts the ELBO above the evidence, with the best of Pareto k's: only the Jacobian tells."""

    class Wrong(fitter.pkg.transforms.ElementwiseAffine):
        def forward_and_log_det(self, x, context=None):
            y, log_det = super().forward_and_log_det(x, context)
            return y, log_det + 1

        def inverse_and_log_det(self, y, context=None):
            x, log_det = super().inverse_and_log_det(y, context)
            return x, log_det - 1

    flows = (lambda dim, key=None: Wrong(dim)), (lambda dim, key=None: fitter.pkg.transforms.ElementwiseAffine(dim))
    wrong, right = (fitter.run("conjugate", fitter.array(DATA), flow=flow, num_steps=100) for flow in flows)
    assert wrong.elbo.value > right.elbo.value + 0.9 and wrong.pareto_k < 0.7
    assert wrong.flow_error == pytest.approx(1, abs=1e-6) and right.flow_error < 1e-9
    assert wrong.verdict().startswith("Do not trust: the flow's log-determinant")
    assert not right.verdict().startswith("Do not trust")


def test_a_bounded_image_is_seen(fitter):
    """A flow that cannot leave a box is blind to what lies outside; its draws are fine where they are."""
    xp = importlib.import_module("jax.numpy" if fitter.name == "jax" else "torch")

    class Bounded(fitter.pkg.transforms.ElementwiseAffine):
        def forward_and_log_det(self, x, context=None):
            y = xp.tanh(x)
            return y, xp.log(1 - y * y).sum(-1)

        def inverse_and_log_det(self, y, context=None):
            return xp.arctanh(y), -xp.log(1 - y * y).sum(-1)

    options = {"flow": lambda dim, key=None: Bounded(dim), "num_steps": 100, "base": None}
    posterior = fitter.run("conjugate", fitter.array(DATA), **options)
    assert posterior.history.missed > 0.1 and posterior.verdict().startswith("Do not trust: about")
    assert posterior.log_prob({"theta": fitter.array(np.array([100.0]))})[0] == -math.inf


def test_nothing_is_lost_in_the_look_elsewhere(fitter, monkeypatch):
    inference = importlib.import_module(f"{fitter.pkg.__name__}.inference")
    options = {"num_steps": 20, "num_particles": 16}
    with monkeypatch.context() as patch:
        patch.setattr(inference, "find_modes", lambda *args, **kwargs: ((), 3))  # no candidate of finite ELBO
        assert fitter.run("conjugate", fitter.array(DATA), **options).history.missed == 0

    def interrupt(*args):
        raise KeyboardInterrupt

    for module, name in (("posterior", "missed_mass"), ("inference", "_check_support")):  # the latter makes the draws
        with monkeypatch.context() as patch:
            patch.setattr(fitter.module(module), name, interrupt)
            posterior = fitter.run("conjugate", fitter.array(DATA), **options)
        assert len(posterior.history.elbo) == 20 and posterior.verdict().startswith("Interrupted")


def test_a_mixture_base_learns_the_masses(fitter):
    """From a start at equal ones: no draw lies in the gap, where an implicit gradient would have to find them."""

    class Equal(fitter.pkg.distributions.MixtureBase):
        def at_modes(self, log_mass, loc, scale):
            return super().at_modes(0 * log_mass, loc, scale)

    flow = _tiny(fitter)
    base = functools.partial(Equal, num_components=2)
    options = {"num_steps": 250, "num_particles": 64, "learning_rate": 1e-2, "path_gradient": False}
    posterior = fitter.run("bimodal", flow=flow, base=base, num_starts=12, **options)
    logits = np.asarray(posterior._base.logits)
    assert np.exp(logits.max()) / np.exp(logits).sum() == pytest.approx(0.7, abs=0.03)


def test_a_learned_base_saved_and_loaded(fitter, tmp_path):
    posterior, path = bimodal(fitter), tmp_path / "posterior.safetensors"
    posterior.save(path)
    for base in (None, functools.partial(fitter.pkg.distributions.MixtureBase, num_components=4)):
        loaded = type(posterior).load(path, fitter.models.bimodal, base=base)
        a, b = (fitter.sample(p, 10)["z"] for p in (posterior, loaded))
        np.testing.assert_allclose(a, b, rtol=1e-12)
    with pytest.raises(ValueError, match="logits of shape"):
        type(posterior).load(path, fitter.models.bimodal, base=fitter.pkg.distributions.MixtureBase)
    posterior.guide.base, factory = lambda *args, **kwargs: None, posterior.guide.base
    posterior.save(path)
    posterior.guide.base = factory
    with pytest.raises(ValueError, match="pass its factory as base="):
        type(posterior).load(path, fitter.models.bimodal)
    loaded = type(posterior).load(path, fitter.models.bimodal, base=factory)
    np.testing.assert_allclose(fitter.sample(loaded, 10)["z"], a, rtol=1e-12)


def test_other_bases_and_their_gradients_without_an_inverse(fitter):
    """A base that does not know modes, and the plain ELBO throughout."""
    base = fitter.pkg.distributions.LocScaleBase
    flow = functools.partial(fitter.pkg.flows.realnvp, num_layers=1, hidden_dims=(4,))
    options = {"flow": flow, "base": base, "num_steps": 200, "num_particles": 64, "path_gradient": False}
    posterior = fitter.run("conjugate", fitter.array(DATA), **options)
    assert posterior.guide.get_base_dist().event_shape == (1,)
    evidence = stats.multivariate_normal.logpdf(DATA, cov=np.eye(20) + 4.0)
    assert posterior._log_evidence().value == pytest.approx(evidence, abs=0.02)


@slow_in_jax
def test_heavy_tails_are_learned_by_the_base(fitter, tmp_path):
    """``FlexibleBase`` finds the tail of Student's t of three degrees of freedom, and that of a normal."""
    options = {"num_steps": 800, "num_particles": 128, "learning_rate": 1e-2}
    options["flow"] = lambda dim, key=None: fitter.pkg.transforms.ElementwiseAffine(dim)

    def weights(posterior):
        return expit(np.asarray(posterior._base.tails.params.tolist()))

    normal = fitter.run("student", base=None, **options)
    heavy, light = fitter.run("student", **options), fitter.run("conjugate", fitter.array(DATA), **options)
    assert (0.15 < weights(heavy)).all() and (weights(heavy) < 0.5).all()  # 1/3 far out; the bulk has its say
    assert (weights(light) < 0.03).all() and light.pareto_k < 0.5
    assert -0.005 < heavy.elbo.value < 0.005 and normal.elbo.value < -0.05
    assert heavy.pareto_k < 0.5 and heavy.pareto_k + 0.3 < normal.pareto_k
    heavy.save(tmp_path / "heavy.safetensors")
    loaded = type(heavy).load(tmp_path / "heavy.safetensors", fitter.models.student, options["flow"])
    np.testing.assert_allclose(*(fitter.sample(posterior, 10)["z"] for posterior in (heavy, loaded)), rtol=1e-12)


def test_skewness_is_learned_by_the_base(fitter):
    """Gumbel's density, whose evidence is one, takes no flow."""
    options = {"num_steps": 800, "learning_rate": 1e-2}
    options["flow"] = lambda dim, key=None: fitter.pkg.transforms.ElementwiseAffine(dim)
    posterior, normal = (fitter.run("gumbel", **options, **base) for base in ({}, {"base": None}))
    assert -0.005 < posterior.elbo.value < 3 * posterior.elbo.standard_error and normal.elbo.value < -0.03
    assert posterior.pareto_k < 0.5


def test_bases_that_cannot_serve_are_named(fitter):
    mixture = fitter.pkg.distributions.MixtureBase
    with pytest.raises(ValueError, match="base and base_df=20.0"):
        fitter.pkg.FlowVI(fitter.models.funnel, base=mixture, base_df=20.0)
    with pytest.raises(ValueError, match="base and base_df=3.0"):
        fitter.pkg.AutoFlow(fitter.models.funnel, base=mixture, base_df=3.0)
    for base in (3, fitter.pkg.distributions.LocScaleBase(2)):
        with pytest.raises(TypeError, match="base must be a factory"):
            fitter.pkg.AutoFlow(fitter.models.funnel, base=base)
    with pytest.raises(TypeError, match="factory of a distributions.Base"):
        fitter.run("bimodal", base=lambda dim, key=None: 3)


def noncentered(fitter, model):
    """A guide with the layer, set up, and the model's density."""
    guide = fitter.pkg.AutoFlow(getattr(fitter.models, model), noncentered=True)
    fitter.key()
    return guide, guide.log_density()


def test_draws_go_back_to_the_vector_they_came_from(fitter):
    guide, log_density = noncentered(fitter, "out_of_order")
    u = np.random.default_rng(0).normal(size=(5, 4))
    if fitter.name == "jax":
        jax = importlib.import_module("jax")
        back, log_det = jax.vmap(lambda u: log_density.unconstrain(log_density.constrain(u)))(u)
    else:
        back, log_det = log_density.unconstrain(log_density.constrain(fitter.array(u)))
    np.testing.assert_allclose(np.asarray(back), u, atol=1e-12)
    np.testing.assert_allclose(np.asarray(log_det), u[:, 0] + u[:, 1], atol=1e-12)  # zeta and level are exponentials


def test_noncentering_is_the_conjugate_conditional(fitter):
    guide, _ = noncentered(fitter, "out_of_order")
    assert guide.noncentering.sites == ("level", "effect")
    assert guide.noncentering.elements.tolist() == [False, True, True, True]
    precision, data = np.array([0.0, 0.0, 1 / 9, 0.2]), np.array([0.0, 0.0, 0.5, -1.0])
    layer = guide.noncentering.with_pseudo_observations(fitter.array(precision), fitter.array(data))
    x = np.random.default_rng(1).normal(size=(3, 2, 4))
    u, log_det = (np.asarray(part) for part in layer.forward_and_log_det(fitter.array(x)))
    zeta = np.exp(x[..., 0])
    level = 0.5 + zeta * x[..., 1]
    s = ((2 * zeta[..., None]) ** -2 + precision[2:]) ** -0.5
    loc = np.exp(level)[..., None]
    effect = loc + precision[2:] * s**2 * (data[2:] - loc) + s * x[..., 2:]
    np.testing.assert_allclose(u, np.concatenate([x[..., :1], level[..., None], effect], -1), rtol=1e-10)
    np.testing.assert_allclose(log_det, np.log(zeta) + np.log(s).sum(-1), atol=1e-10)
    back, inverse_log_det = (np.asarray(part) for part in layer.inverse_and_log_det(fitter.array(u)))
    np.testing.assert_allclose(back, x, atol=1e-9)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-10)


def test_noncentering_of_correlated_elements_is_their_conjugate_conditional(fitter):
    guide, _ = noncentered(fitter, "process")
    assert guide.noncentering.sites == ("curve",)
    precision, data = np.zeros(8), np.arange(8.0)
    precision[2:] = [0.5, 0.0, 2.0, 0.0, 0.0, 0.0]
    layer = guide.noncentering.with_pseudo_observations(fitter.array(precision), fitter.array(data))
    x = np.random.default_rng(1).normal(size=(4, 8))
    u, log_det = (np.asarray(part) for part in layer.forward_and_log_det(fitter.array(x)))
    np.testing.assert_array_equal(u[:, :2], x[:, :2])
    for row, moved, total in zip(x, u, log_det, strict=True):
        factor = np.exp(row[1]) * np.array(fitter.models.CURVE_TRIL)
        expected = 0.0
        for start in (2, 5):
            part = slice(start, start + 3)
            inverse = np.linalg.inv(factor @ factor.T)
            covariance = np.linalg.inv(inverse + np.diag(precision[part]))
            mean = covariance @ (inverse @ np.full(3, row[0]) + precision[part] * data[part])
            # of standard normals, the squared length
            distance = (moved[part] - mean) @ np.linalg.solve(covariance, moved[part] - mean)
            np.testing.assert_allclose(distance, (row[part] ** 2).sum(), rtol=1e-9)
            expected += 0.5 * np.linalg.slogdet(covariance)[1]
        np.testing.assert_allclose(total, expected, atol=1e-10)
    back, inverse_log_det = (np.asarray(part) for part in layer.inverse_and_log_det(fitter.array(u)))
    np.testing.assert_allclose(back, x, atol=1e-9)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-10)


def test_noncentering_of_a_vector_with_heavy_tails(fitter):
    guide, _ = noncentered(fitter, "heavy_vector")
    assert guide.noncentering.sites == ("vector",)
    x = np.random.default_rng(1).normal(size=(4, 3))
    u, log_det = (np.asarray(part) for part in guide.noncentering.forward_and_log_det(fitter.array(x)))
    tril = np.array(fitter.models.VECTOR_TRIL)
    np.testing.assert_allclose(u[:, 1:], 1 + np.exp(x[:, :1]) * (x[:, 1:] @ tril.T), rtol=1e-9)
    np.testing.assert_allclose(log_det, 2 * x[:, 0] + np.log(np.diagonal(tril)).sum(), atol=1e-9)


def jacobians(fitter, layer, x):
    function = lambda x: layer.forward_and_log_det(x)[0]  # noqa: E731
    if fitter.name == "jax":
        jax = importlib.import_module("jax")
        return np.asarray(jax.jit(jax.vmap(jax.jacrev(function)))(fitter.array(x)))
    func = importlib.import_module("torch.func")
    return np.asarray(func.vmap(func.jacrev(function))(fitter.array(x)))


@pytest.mark.parametrize("precision", [0.0, 1.5, 1e4])
def test_noncentering_of_laplace_priors(fitter, precision):
    guide, _ = noncentered(fitter, "laplaces")
    assert guide.noncentering.sites == ("mean", "effect")
    told = precision * np.array([0.0, 1.0, 2.0, 0.5]), np.array([0.0, -0.5, 0.5, -1.0])
    layer = guide.noncentering.with_pseudo_observations(*map(fitter.array, told))
    u = np.random.default_rng(1).normal(size=(4, 4))
    u[0, 1], u[1, 2:] = 0.5, u[1, 1]  # where the kinks are
    u[2:, 1] = 0.5 - 3 * 0.7, 0.5 + 3 * 0.7
    x, inverse_log_det = (np.asarray(part) for part in layer.inverse_and_log_det(fitter.array(u)))
    back, log_det = (np.asarray(part) for part in layer.forward_and_log_det(fitter.array(x)))
    np.testing.assert_allclose(back, u, atol=1e-10)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-10)
    for row, total, slopes in zip(x, log_det, jacobians(fitter, layer, x), strict=True):
        np.testing.assert_allclose(np.linalg.slogdet(slopes), (1, total), atol=1e-9)
        factor = np.asarray(layer.factor(fitter.array(row)))
        np.testing.assert_allclose(np.diagonal(factor), np.diagonal(slopes), rtol=1e-9)
    if precision == 0.0:  # nearly standard normals
        z = stats.norm.ppf(stats.laplace.cdf(u[:, 1], 0.5, 0.7))
        np.testing.assert_allclose(x[:, 1], z, atol=0.12)


@pytest.mark.parametrize("precision", [0.0, 1.5, 1e4])
def test_the_kinks_of_laplace_priors_are_gone(fitter, precision):
    """The second difference of a log-density at a kink is the step times the jump of the derivative."""
    guide, log_density = noncentered(fitter, "laplaces")
    told = np.array([0.0, *[precision] * 3]), np.array([0.0, -0.5, 0.5, -1.0])
    guide.set_noncentering(guide.noncentering.with_pseudo_observations(*map(fitter.array, told)))
    before = importlib.import_module(f"{fitter.pkg.__name__}.noncentering").pulled_back(log_density, guide.coordinates)
    u = np.array([0.3, 0.5, 0.5, 0.2])  # of the mean and an effect
    x = np.asarray(guide.coordinates.inverse_and_log_det(fitter.array(u))[0])

    def around(density, at, axis, step=1e-5):
        """Mean and difference of the derivatives to both sides."""
        if fitter.name == "jax":
            density = jax.jit(jax.vmap(density))
        rows = at + step * np.array([[-1.0], [0.0], [1.0]]) * np.eye(4)[axis]
        slopes = np.diff(np.asarray(density(fitter.array(rows)))) / step
        return slopes.mean(), slopes[1] - slopes[0]

    if fitter.name == "jax":
        jax = importlib.import_module("jax")
        gradient, hessian = jax.jit(lambda x: (jax.grad(before)(x), jax.hessian(before)(x)))(x)
    else:
        gradient, hessian = before.value_and_grad(fitter.array(x))[1], before.hessian(fitter.array(x))
    assert np.isfinite(np.asarray(hessian)).all()
    for axis, scale in ((1, 0.7), (2, np.exp(0.3))):
        if axis == 2:
            assert around(log_density, u, axis)[1] == pytest.approx(-2 / scale, rel=1e-2)
        else:  # what hangs on the mean has a kink there too
            assert around(log_density, u, axis)[1] < -2
        slope, jump = around(before, x, axis)
        assert abs(jump) < 1e-3 and slope == pytest.approx(float(gradient[axis]), abs=1e-4)


@slow_in_jax
@pytest.mark.optimised
def test_a_lasso_of_collinear_columns(fitter):
    """A guide turns its coordinates, and a small flow cannot follow kinks that lie across them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(15, 1)) + 0.2 * rng.normal(size=(15, 6))
    y = x @ np.array([1.0, 0.0, 0.0, -0.5, 0.0, 0.0]) + rng.normal(size=15)
    options = {"flow": _tiny(fitter), "num_steps": 600, "num_particles": 64, "num_starts": 2}
    smooth, kinked = (fitter.run("lasso", *map(fitter.array, (x, y)), **options, noncentered=n) for n in (True, False))
    assert smooth._gap < 0.06 < 0.1 < kinked._gap


def observations(models, name):
    """Precisions and values of the data, for every element of the latent vector."""
    if name == "process":
        noise, y = np.tile(models.CURVE_NOISE, 2), np.ravel(models.CURVES)
    else:
        noise, y = np.asarray(models.SIGMA), np.asarray(models.Y)
    return np.concatenate([[0, 0], noise**-2.0]), np.concatenate([[0, 0], y])


@pytest.mark.parametrize("model", ["eight_schools", "process"])
def test_noncentering_takes_prior_and_data_out(fitter, model):
    """With the data themselves as pseudo-observations, what is left of a model's effects is standard normal."""
    guide, log_density = noncentered(fitter, model)
    precision, y = observations(fitter.models, model)
    layer = guide.noncentering.with_pseudo_observations(fitter.array(precision), fitter.array(y))
    guide.set_noncentering(layer)
    density = importlib.import_module(f"{fitter.pkg.__name__}.noncentering").pulled_back(log_density, guide.coordinates)
    if fitter.name == "jax":
        density = importlib.import_module("jax").vmap(density)
    x = np.random.default_rng(0).normal(0.0, 2.0, size=(6, len(y)))
    there, centre = (np.asarray(density(fitter.array(z))) for z in (x, np.where(np.arange(len(y)) < 2, x, 0.0)))
    np.testing.assert_allclose(there - centre, -0.5 * (x[:, 2:] ** 2).sum(-1), atol=1e-9)


def fit_that_finds_the_observations(fitter, model, num_steps=20, num_starts=2):
    """Of a normal likelihood, at the start already."""
    posterior = fitter.run(model, num_steps=num_steps, num_starts=num_starts)
    layer = posterior.guide.noncentering
    precision, y = observations(fitter.models, model)
    np.testing.assert_allclose(np.asarray(layer.precision), precision, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(layer.pseudo_data), y, atol=1e-3)
    assert posterior.flow_error < 1e-6
    return posterior, layer


def test_a_prior_scale_of_zero_tells_no_observations(fitter):
    initialization = importlib.import_module(f"{fitter.pkg.__name__}.initialization")
    target = initialization.Target(None, lambda x: (0.0, -x), lambda x: -3 * np.eye(2))
    x, told = np.ones(2), np.array([False, True])
    precision, _ = initialization.pseudo_observations(target, x, x, np.diag([1.0, 0.5]), told)
    np.testing.assert_allclose(precision, [0.0, 8.0])
    precision, data = initialization.pseudo_observations(target, x, x, np.diag([1.0, 0.0]), told)
    assert not precision.any() and not data.any()


@slow_in_jax
def test_noncentering_finds_the_observations_of_correlated_elements(fitter):
    fit_that_finds_the_observations(fitter, "process", num_steps=1, num_starts=1)


def test_noncentering_finds_the_observations_of_a_normal_likelihood(fitter, tmp_path):
    posterior, layer = fit_that_finds_the_observations(fitter, "eight_schools")
    assert posterior.elbo.value > -31.8  # of a Gaussian, all but untrained: -36.9 without the pseudo-observations
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = type(posterior).load(tmp_path / "posterior.safetensors", fitter.models.eight_schools)
    draws = posterior.sample(*fitter.key(), (5,))
    np.testing.assert_allclose(np.asarray(loaded.log_prob(draws)), np.asarray(posterior.log_prob(draws)), rtol=1e-9)
    again = pickle.loads(pickle.dumps(posterior.guide))
    np.testing.assert_array_equal(np.asarray(again.noncentering.precision), np.asarray(layer.precision))


def test_noncentering_where_there_is_nothing_to_take_out(fitter):
    guide, _ = noncentered(fitter, "gamma")
    assert guide.noncentering is None
    with pytest.raises(RuntimeError, match="noncentered"):
        fitter.pkg.AutoFlow(fitter.models.gamma).set_noncentering(None)


def centering(fitter):
    """The layer, of five elements of which the first two pass."""
    module, initialization = (
        importlib.import_module(f"{fitter.pkg.__name__}.{n}") for n in ("centering", "initialization")
    )
    rng = np.random.default_rng(2)
    given = {name: np.zeros(5) for name in initialization.Likelihood._fields} | {"scale": np.ones(5)}
    given |= {name: np.zeros((5, 5)) for name in ("slopes", "shifts")} | {"rotation": np.eye(5)}
    given["rotation"][2:, 2:] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    given["loc"][2:], given["scale"][2:] = rng.normal(size=3), np.exp(rng.normal(size=3))
    given["precision"][2:], given["pseudo_data"][2:] = [0.5, 0.0, 3.0], rng.normal(size=3)
    given["origin"][:2] = rng.normal(size=2)
    given["slopes"][2:, :2], given["shifts"][2:, :2] = rng.normal(size=(2, 3, 2))
    layer = module.Centering(5).with_likelihood(initialization.Likelihood(**given))
    return layer, given


def test_centering_is_the_conjugate_conditional(fitter):
    layer, given = centering(fitter)
    x = np.random.default_rng(1).normal(size=(3, 2, 5))
    u, log_det = (np.asarray(part) for part in layer.forward_and_log_det(fitter.array(x)))
    np.testing.assert_array_equal(u[..., :2], x[..., :2])
    for row, moved, total in zip(x.reshape(-1, 5), u.reshape(-1, 5), log_det.ravel(), strict=True):
        away = row - given["origin"]
        precision = given["precision"] * np.exp(given["slopes"] @ away)
        data = given["pseudo_data"] * np.exp(-given["shifts"] @ away)
        standardised = given["rotation"].T @ ((moved - given["loc"]) / given["scale"])
        s, told = (1 + precision) ** -0.5, precision > 0
        expected = np.where(told, (standardised - precision * data / (1 + precision)) / s, standardised)
        np.testing.assert_allclose(expected, row, atol=1e-10)
        assert total == pytest.approx(np.log(s[told]).sum() + np.log(given["scale"]).sum(), abs=1e-10)
    back, inverse_log_det = (np.asarray(part) for part in layer.inverse_and_log_det(fitter.array(u)))
    np.testing.assert_allclose(back, x, atol=1e-10)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-10)
    far = np.zeros((2, 5))
    far[:, 0] = -300.0, 300.0  # where a walk may try its luck
    assert all(np.isfinite(np.asarray(part)).all() for part in layer.forward_and_log_det(fitter.array(far)))


def test_models_non_centred_by_hand_are_centred(fitter, tmp_path):
    """The likelihood is normal in ``tau z``, so that nothing but standard normals is left of ``z``."""
    options = {"flow": _tiny(fitter), "num_steps": 20, "num_starts": 2}
    posterior = fitter.run("by_hand", **options)
    guide, elbo = posterior.guide, posterior.elbo.value
    slopes, shifts = (np.asarray(part) for part in (guide.centering.slopes, guide.centering.shifts))
    np.testing.assert_allclose(slopes[1:, 0], 2.0, atol=1e-3)
    np.testing.assert_allclose(shifts[1:, 0], 1.0, atol=1e-2)
    assert not slopes[:, 1:].any() and not slopes[0].any() and not shifts[:, 1:].any()
    density = importlib.import_module(f"{fitter.pkg.__name__}.noncentering").pulled_back(
        posterior.log_density, guide.coordinates
    )
    if fitter.name == "jax":
        density = importlib.import_module("jax").vmap(density)
    x = np.random.default_rng(0).normal(size=(6, 9))
    x[:, 0] += np.asarray(guide.centering.origin)[0]
    there, centre = (np.asarray(density(fitter.array(z))) for z in (x, np.where(np.arange(9) < 1, x, 0.0)))
    np.testing.assert_allclose(there - centre, -0.5 * (x[:, 1:] ** 2).sum(-1), atol=0.05)
    log_tau, variance = np.linspace(-15, 15, 20_001), (0.1 * np.asarray(fitter.models.SIGMA)) ** 2
    each = stats.norm.logpdf(fitter.models.Y, 0, np.sqrt(np.exp(2 * log_tau)[:, None] + variance)).sum(-1)
    evidence = np.log(np.trapezoid(np.exp(each) * stats.norm.pdf(log_tau, 0, 3), log_tau))
    plain = fitter.run("by_hand", **options, noncentered=False)
    assert plain.guide.centering is None and plain.elbo.value < evidence - 0.3
    assert evidence - 0.1 < elbo < evidence + 0.01  # all but untrained
    hurried = fitter.run("by_hand", **options, num_particles=64, max_gradients=2500)
    assert hurried.guide.centering is None  # the plain search has taken a tenth of them
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = type(posterior).load(tmp_path / "posterior.safetensors", fitter.models.by_hand)
    draws = posterior.sample(*fitter.key(), (5,))
    np.testing.assert_allclose(np.asarray(loaded.log_prob(draws)), np.asarray(posterior.log_prob(draws)), rtol=1e-9)
    again = pickle.loads(pickle.dumps(guide))
    np.testing.assert_array_equal(np.asarray(again.centering.slopes), slopes)


def differentiated(density, step=1e-3):
    """A target of a function of one vector, by finite differences."""

    def gradient(x):
        return np.array([(density(x + e) - density(x - e)) / (2 * step) for e in step * np.eye(len(x))])

    def hessian(x):
        return np.array([(gradient(x + e) - gradient(x - e)) / (2 * step) for e in step * np.eye(len(x))])

    return None, lambda x: (density(x), gradient(x)), hessian


def test_a_start_is_the_gaussian_of_the_highest_elbo(fitter):
    """Of exponential elements: E[H] = -exp(m + v / 2) = -1 / v and E[g] = 1 - exp(m + v / 2) = 0, so that m = -1/2."""
    initialization = importlib.import_module(f"{fitter.pkg.__name__}.initialization")
    root = np.array([[2.0, 0.0, 0.0], [0.7, 0.1, 0.0], [-3.0, 0.2, 5.0]])
    back = np.linalg.inv(root)

    def log_density(x):
        z = x @ back.T
        return (z - np.exp(z)).sum(-1)

    def value_and_grad(x):
        return log_density(x), back.T @ (1 - np.exp(back @ x))

    def hessian(x):
        return -back.T @ np.diag(np.exp(back @ x)) @ back

    target, rng = initialization.Target(log_density, value_and_grad, hessian), np.random.default_rng(0)
    begin = initialization.Start(root @ [1.0, -2.0, 0.0], np.linalg.cholesky(0.3 * root @ root.T), -np.inf, 7)
    found = initialization.improve(target, begin, rng)
    mean, covariance = back @ found.loc, back @ found.scale_tril @ found.scale_tril.T @ back.T
    np.testing.assert_allclose(mean, -0.5, atol=0.4)
    elbo, best = (  # by the moments of normal variables; det(root) is one
        (m - np.exp(m + 0.5 * np.diagonal(v))).sum() + 0.5 * np.linalg.slogdet(2 * np.pi * np.e * v)[1]
        for m, v in ((mean, covariance), (np.full(3, -0.5), np.eye(3)))
    )
    assert best - 0.15 < elbo <= best and found.elbo == pytest.approx(elbo, abs=0.15)
    assert found.divergence == pytest.approx(0.5 * 3 * (np.e - 2.5), rel=0.5)  # of z - exp(z) + (z + 1/2)^2 / 2
    assert 7 < found.gradients < 1500
    few = initialization.improve(target, begin, rng, lambda n: n > 100)
    assert few.gradients <= 100 and few.elbo < found.elbo
    outside = initialization.Target(
        lambda x: np.full(len(x), np.nan), lambda x: (np.nan, x), lambda x: hessian(x) * np.nan
    )
    kept = initialization.improve(outside, begin._replace(elbo=-1.0), rng)  # by draws that were all inside
    assert kept.elbo == -1.0 and kept.loc is begin.loc


def test_a_fit_of_many_latents_keeps_what_its_start_has_found(fitter):
    """A start beyond the latents of which a Hessian is taken at once, and annealing, which must not undo it."""
    rng, dim, n = np.random.default_rng(0), 264, 330
    x = rng.normal(size=(n, dim)) / dim**0.5
    y = x @ rng.normal(size=dim) + rng.normal(size=n)
    evidence = stats.multivariate_normal.logpdf(y, np.zeros(n), np.eye(n) + x @ x.T)
    options = {"flow": _tiny(fitter), "num_steps": 100, "num_particles": 64, "num_starts": 1}
    posterior = fitter.run("regression", *map(fitter.array, (x, y)), **options)
    assert evidence - 0.25 < posterior.elbo.value < evidence + 0.01


@slow_in_jax
def test_latents_of_which_the_data_say_enough_are_left_as_they_are(fitter):
    """The start is better without the non-centring in crossed effects, and with it in the eight schools."""
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 5, 40), rng.integers(0, 8, 40)
    y = 0.3 * rng.normal(size=5)[a] + 0.4 * rng.normal(size=8)[b] + 0.2 * rng.normal(size=40)
    options = {"flow": _tiny(fitter), "num_steps": 20, "num_particles": 64, "num_starts": 1}
    posterior = fitter.run("crossed", *map(fitter.array, (a, b, y)), **options)
    assert posterior.guide.noncentered and posterior.guide.noncentering is None
    assert fitter.fit("eight_schools", **QUICK).guide.noncentering is not None


@pytest.mark.parametrize("kind", ["fixed", "turning", "scale", "noise"])
def test_what_a_likelihood_amounts_to_given_the_other_latents(fitter, kind):
    """Left alone where it depends on them not at all, or otherwise than by scales."""
    initialization = importlib.import_module(f"{fitter.pkg.__name__}.initialization")

    def density(x):
        h, z = x[0], x[1:]
        turn = 3 * h if kind == "turning" else 0.3
        axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        observed = axes.T @ z * np.exp(h * (kind == "scale")) - [1.0, -2.0]
        noise = np.array([0.5, 0.1]) * np.exp(h * (kind == "noise"))
        return -0.5 * (h**2 + z @ z + ((observed / noise) ** 2).sum()) - 2 * h * (kind == "noise")

    target = initialization.Target(*differentiated(density))
    start, latents = initialization.Start(np.zeros(3), 0.7 * np.eye(3), 0.0, 0), np.array([-1, 0, 0])
    prior = np.zeros(3), np.ones(3)
    told, gradients = initialization.conditional_likelihood(target, start, *prior, latents, lambda n: False)
    assert gradients > 0
    if kind in ("fixed", "turning"):
        assert told is None
    else:
        sign = 1 if kind == "scale" else -1
        np.testing.assert_allclose(told.slopes, sign * np.array([[0, 0, 0], [2, 0, 0], [2, 0, 0]]), atol=1e-3)
        shifts = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0]]) * (kind == "scale")
        np.testing.assert_allclose(told.shifts, shifts, atol=1e-3)
        np.testing.assert_allclose(np.sort(told.precision), [0, 4, 100], rtol=1e-4)
    for others, is_spent in ((np.full(3, -1), False), (latents, True)):
        assert initialization.conditional_likelihood(target, start, *prior, others, lambda n: is_spent) == (None, 0)  # noqa: B023


def test_the_marginal_of_the_other_latents_is_climbed_on(fitter):
    """From the lower of two modes to the higher one; what it knows of its width is the marginal's."""
    initialization = importlib.import_module(f"{fitter.pkg.__name__}.initialization")

    def density(x):
        h, z = x[:2], x[2:]
        modes = -0.5 * ((h[0] - np.array([0.0, 1.5])) / 0.3) ** 2
        marginal = np.log(np.exp(modes) @ [0.01, 1.0]) - 0.5 * h[1] ** 2
        return marginal - 0.5 * (((z - 10 * h[0]) / (0.05 * np.exp(h[1]))) ** 2).sum() - 2 * h[1]

    target = initialization.Target(*differentiated(density))
    start, rng = initialization.Start(np.zeros(4), 0.1 * np.eye(4), 0.0, 0), np.random.default_rng(0)
    prior = np.zeros(4), np.ones(4)
    latents = np.array([-1, -1, 0, 0])
    found, gradients = initialization.marginal_start(target, start, *prior, latents, lambda n: False, rng)
    np.testing.assert_allclose(found.loc, [1.5, 0, 15, 15], atol=0.1)
    np.testing.assert_allclose(found.scale_tril[:2, :2], np.diag([0.3, 1.0]), rtol=0.3)
    assert 1000 < gradients < 400_000 and found.elbo == -np.inf
    short, few = initialization.marginal_start(target, start, *prior, latents, lambda n: n > 200, rng)
    assert few < gradients / 4 and short is not None
    for others in (np.array([-1, 0, 0, 0]), np.full(4, -1)):
        assert initialization.marginal_start(target, start, *prior, others, lambda n: False, rng) == (None, 0)
    assert initialization.marginal_start(target, start, *prior, latents, lambda n: True, rng) == (None, 0)


def test_no_step_in_torch_reads_a_number_on_the_host():
    """On a GPU every such read waits for all that was asked of it. Validation of distributions does it, for one."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("pyro")
    from torch.utils._python_dispatch import TorchDispatchMode

    models = importlib.import_module("tests.inference.models_pyro")
    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            by_mask = name in ("index", "index_put", "index_put_") and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            )
            if by_mask or name in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh"):  # the last: of a number
                reads.append(name)
            return func(*args, **(kwargs or {}))

    y, sigma = torch.as_tensor(models.Y), torch.as_tensor(models.SIGMA)
    kind = importlib.import_module("pyroflows").FlowVI
    with within_steps(Watch) as counts:
        kind(models.eight_schools, num_steps=100, num_starts=1, progress_bar=False).run(y, sigma)
    assert sum(counts) >= 50 and not reads
