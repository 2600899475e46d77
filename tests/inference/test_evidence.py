"""Estimators of the evidence and the comparison of models against closed forms, in both packages."""

import functools
import warnings

import numpy as np
import pytest
from scipy import stats


def normal_ratios(rng, n, scale, log_c, chains=4, wide=1.3):
    """Log-ratios of ``c N(0, scale^2)`` in three dimensions over ``N(0, wide^2)``, at draws of either."""

    def ratios(x):
        return log_c + stats.norm.logpdf(x, 0, scale).sum(-1) - stats.norm.logpdf(x, 0, wide).sum(-1)

    return ratios(wide * rng.standard_normal((n, 3))), ratios(scale * rng.standard_normal((chains, n // chains, 3)))


def test_estimators_and_their_errors_on_known_densities(fitter):
    """Over 100 seeds, every estimator is unbiased and scatters as its standard error says."""
    evidence, log_c = fitter.module("evidence"), -123.4
    estimates = {"importance": [], "bridge": [], "harmonic": []}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        of_guide, of_posterior = normal_ratios(rng, 1000, 1.0, log_c)
        estimates["importance"].append(evidence.importance(of_guide))
        estimates["bridge"].append(evidence.bridge(of_guide, of_posterior))
        narrow = normal_ratios(rng, 1000, 1.0, log_c, wide=0.8)[1]
        estimates["harmonic"].append(evidence.harmonic(-narrow))
    for name, pairs in estimates.items():
        value, error = np.array(pairs).T
        z = (value - log_c) / error
        assert abs(z.mean()) < 0.35, name  # of a mean of 100 standard normals, more than three deviations
        assert 0.75 < z.std() < 1.3, name
        assert (np.abs(z) < 3).mean() > 0.95, name
    errors = {name: np.mean([e.standard_error for e in pairs]) for name, pairs in estimates.items()}
    assert errors["bridge"] < errors["importance"]


def test_the_error_of_a_bridge_knows_of_autocorrelation(fitter):
    evidence, log_c = fitter.module("evidence"), 5.0
    z = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        of_guide, of_posterior = normal_ratios(rng, 2000, 1.0, log_c)
        z.append(evidence.bridge(of_guide, np.repeat(of_posterior[:, :100], 5, 1)))  # every draw five times
    value, error = np.array(z).T
    assert 0.7 < ((value - log_c) / error).std() < 1.4


def test_no_overlap(fitter):
    evidence = fitter.module("evidence")
    with pytest.raises(RuntimeError, match="hardly overlap"):
        evidence.bridge(np.full(100, -np.inf), np.zeros((4, 100)))


def regression_data(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim))
    y = x[:, : dim // 2].sum(-1) + rng.standard_normal(n)
    return x, y, float(stats.multivariate_normal.logpdf(y, cov=np.eye(n) + x @ x.T))


def fitted(fitter, x, y):
    flow = functools.partial(fitter.pkg.flows.realnvp, num_layers=2, hidden_dims=(16,))
    options = {"flow": flow, "num_steps": 200, "num_particles": 64, "num_starts": 1}
    return fitter.run("regression", fitter.array(x), fitter.array(y), **options)


def test_linear_regression(fitter):
    x, y, truth = regression_data(40, 10)
    posterior = fitted(fitter, x, y)
    refined = fitter.refine(posterior, "flow_mh", num_samples=1000, num_warmup=200)
    assert refined.acceptance["flow"] > 0.8
    for estimate in (posterior.log_evidence(), refined.log_evidence(), refined.log_evidence("harmonic")):
        assert estimate.value == pytest.approx(truth, abs=3.5 * estimate.standard_error)
        assert 0 < estimate.standard_error < 0.02
    assert refined.log_evidence("importance") == posterior.log_evidence()


def test_compare(fitter):
    """A variable too many, none too many and the wrong one: Bayes factors in closed form."""
    x, y, full_truth = regression_data(30, 4)
    right, wrong = x[:, :2], x[:, 2:]
    truths = {
        name: float(stats.multivariate_normal.logpdf(y, cov=np.eye(30) + part @ part.T))
        for name, part in (("right", right), ("wrong", wrong))
    } | {"full": full_truth}
    posteriors = {"full": fitted(fitter, x, y), "wrong": fitted(fitter, wrong, y)}
    posteriors["right"] = fitter.refine(fitted(fitter, right, y), "flow_mh", num_samples=500, num_warmup=100)
    table = fitter.pkg.compare(posteriors)
    assert list(table.index) == ["right", "full", "wrong"]
    for name, truth in truths.items():
        row = table.loc[name]
        assert row["log_evidence"] == pytest.approx(truth, abs=4 * row["log_evidence_se"] + 1e-3)
        factor = truth - truths["right"]
        assert row["log_bayes_factor"] == pytest.approx(factor, abs=4 * row["log_bayes_factor_se"] + 1e-3)
    probability = np.exp(np.array([truths[name] for name in table.index]))
    probability /= probability.sum()
    np.testing.assert_allclose(table["probability"], probability, atol=0.01)
    assert table["probability"].sum() == pytest.approx(1) and table["log_bayes_factor_se"].iloc[0] == 0
    # d p_right = p_right p_full (d log z_right - d log z_full), and "wrong" has no mass
    spread = np.hypot(*table["log_evidence_se"].iloc[:2]) * probability[0] * probability[1]
    assert table["probability_se"].iloc[0] == pytest.approx(spread, rel=0.1)
    # leave one out in closed form: y_i given the others is normal
    for name, part in (("right", right), ("full", x)):
        cov = np.eye(30) + part @ part.T
        precision = np.linalg.inv(cov)
        residual, variance = (precision @ y) / np.diag(precision), 1 / np.diag(precision)
        exact = stats.norm.logpdf(residual, 0, variance**0.5).sum()
        assert table.loc[name, "elpd_loo"] == pytest.approx(exact, abs=0.15)
    assert not table.loc["right", "loo_warning"]
    odd = fitter.pkg.compare(posteriors, prior={"right": 1, "full": 1, "wrong": 1e9}, loo=False)
    assert "elpd_loo" not in odd
    assert odd.loc["right", "log_evidence"] == table.loc["right", "log_evidence"]
    assert odd.loc["wrong", "probability"] / table.loc["wrong", "probability"] > 1e3
    for prior, message in (({"a": 1}, "must name the models"), ([1.0, 0.0, 1.0], "positive probability")):
        with pytest.raises(ValueError, match=message):
            fitter.pkg.compare(posteriors, prior=prior)
    with pytest.raises(ValueError, match="posteriors is empty"):
        fitter.pkg.compare({})


@pytest.mark.parametrize("given, message", [([3], "must be a dict .* got list"), ({"a": 3}, "{'a': 'int'} are not")])
def test_what_cannot_be_compared_is_named(fitter, given, message):
    with pytest.raises(TypeError, match=message):
        fitter.pkg.compare(given)


def test_models_without_observed_sites_have_no_cross_validation(fitter):
    posterior = fitter.run("gamma", flow=fitter.pkg.flows.nice, num_steps=20, num_particles=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = fitter.pkg.compare({"gamma": posterior})
    assert np.isnan(table.loc["gamma", "elpd_loo"]) and table.loc["gamma", "probability"] == 1
