"""``posterior.refine`` against known posteriors, from guides good and poor, in both packages."""

import functools
import io
from contextlib import redirect_stdout

import numpy as np
import pytest

QUICK = {"num_steps": 100, "num_particles": 64}


def numpy_draws(refined, **options):
    return {name: np.asarray(x) for name, x in refined.get_samples(**options).items()}


def test_chains_mend_a_poor_guide(fitter):
    """Gumbel's density from a normal guide: exact after refinement."""
    flow = fitter.pkg.transforms.ElementwiseAffine
    options = {"flow": lambda dim, key=None: flow(dim), "base": None, "num_steps": 100, "num_particles": 64}
    posterior = fitter.fit("gumbel", **options)
    assert abs(fitter.sample(posterior, 20_000)["z"].std() - np.pi / 6**0.5) > 0.1  # else this test shows nothing
    refined = fitter.refine(posterior, "flow_mh", num_samples=2000, num_warmup=200)
    assert refined.r_hat < 1.02 and refined.method == "flow_mh" and not refined.interrupted
    assert 0.5 < refined.acceptance["flow"] < 0.99 and 0.4 < refined.acceptance["local"] < 0.75
    z, sd, error = numpy_draws(refined)["z"], np.pi / 6**0.5, 4 / refined.ess_bulk**0.5
    assert z.mean() == pytest.approx(np.euler_gamma, abs=sd * error)
    assert z.std() == pytest.approx(sd, rel=1.5 * error)  # of kurtosis 5.4
    assert (z > 3).mean() == pytest.approx(1 - np.exp(-np.exp(-3)), abs=0.22 * error)
    for method in ("bridge", "harmonic"):
        estimate = refined.log_evidence(method)
        assert estimate.value == pytest.approx(0, abs=4 * estimate.standard_error)
        assert 0 < estimate.standard_error < 0.05
    assert refined.gradients["fit"] == posterior.history.gradients
    assert refined.gradients["warm-up"] == 4 + 8 * 200 and refined.gradients["sampling"] == 8 * 2000


def test_nuts_in_the_base_space(fitter):
    """Student's t of three degrees of freedom from a guide of normal tails."""
    flow = functools.partial(fitter.pkg.flows.realnvp, num_layers=2, hidden_dims=(8,))
    options = {"flow": flow, "base": None, "num_steps": 200, "num_particles": 64}
    posterior = fitter.fit("student", **options)
    refined = fitter.refine(posterior, "nuts", num_samples=400, num_warmup=200, num_chains=2)
    z = numpy_draws(refined, group_by_chain=True)["z"]
    assert z.shape == (2, 400, 2) and refined.unconstrained.shape == (2, 400, 2)
    quartile = 0.7649  # of Student's t of three degrees of freedom
    assert (np.abs(z) < quartile).mean() == pytest.approx(0.5, abs=2.5 / refined.ess_bulk**0.5)
    assert (np.abs(z) > 3.182).mean() == pytest.approx(0.05, abs=0.03)
    assert refined.r_hat < 1.03 and 0.75 < refined.acceptance["local"] < 1
    assert refined.gradients["sampling"] >= 800 and refined.gradients["warm-up"] >= 400
    # NUTS takes at least a gradient a draw, and here a few
    assert refined.gradients["sampling"] < 800 * 30


def test_a_flow_adapted_to_the_draws(fitter):
    """Of a guide of few steps the skewness is learned from the draws of a first run; the model pays for those alone."""
    flow = fitter.pkg.transforms.ElementwiseAffine
    posterior = fitter.fit("gumbel", flow=lambda dim, key=None: flow(dim), num_steps=5, num_particles=64)
    options = {"num_samples": 500, "num_warmup": 1000}
    plain, refined = (fitter.refine(posterior, "flow_mh", adapt=adapt, **options) for adapt in (False, True))
    assert plain.posterior is posterior and refined.posterior is not posterior
    before, after = posterior.elbo.value, refined.posterior.elbo.value
    assert before < -0.03 and before / 3 < after < 0.001
    assert refined.acceptance["flow"] > plain.acceptance["flow"] + 0.02
    assert numpy_draws(refined)["z"].mean() == pytest.approx(np.euler_gamma, abs=6 / refined.ess_bulk**0.5)
    # a first run of half the warm-up and as many draws, with two gradients each in four chains, then the run proper
    assert refined.gradients["adaptation"] == 4 + 8 * 1500
    assert {k: v for k, v in refined.gradients.items() if k != "adaptation"} == plain.gradients
    assert refined.posterior.history.gradients == posterior.history.gradients + refined.gradients["adaptation"]
    assert refined.posterior.history.missed < 0.01


def test_resampled_draws(fitter, monkeypatch):
    posterior = fitter.fit("eight_schools", **QUICK)
    monkeypatch.setattr(posterior, "history", posterior.history._replace(missed=0.0))
    weights, _ = posterior._psis
    monkeypatch.setitem(posterior.__dict__, "_psis", (weights, 0.9))
    with pytest.warns(UserWarning, match="refine: Pareto k is 0.90"):
        refined = fitter.refine(posterior, "resample")
    assert refined.verdict().startswith("Do not trust: importance weights")
    monkeypatch.setitem(posterior.__dict__, "_psis", (weights, 0.3))
    assert fitter.refine(posterior, "resample").verdict().startswith("Good")
    draws = numpy_draws(refined)
    assert draws["theta"].shape == (4000, 8) and np.isnan(refined.r_hat)
    assert refined.ess_bulk == min(4000, posterior.effective_sample_size)
    # resampled draws are the guide's, with their scores
    index = np.argmin(np.abs(np.asarray(posterior.draws.log_model) - refined.log_model[1, 7]))
    np.testing.assert_array_equal(refined.unconstrained[1, 7], posterior.draws.unconstrained[index])
    assert refined.log_guide[1, 7] == posterior.draws.log_guide[index]
    with pytest.raises(ValueError, match="refine with method='nuts'"):
        refined.log_evidence("bridge")


def test_scores_are_those_of_model_and_guide(fitter):
    posterior = fitter.fit("eight_schools", **QUICK)
    refined = fitter.refine(posterior, "flow_mh", num_samples=100, num_warmup=50)
    u = refined.unconstrained[0]
    log_guide = np.asarray(posterior._log_guide(u))
    np.testing.assert_allclose(refined.log_guide[0], log_guide, rtol=1e-8)
    log_model = posterior._score(u) if fitter.name == "jax" else posterior.log_density(u)
    np.testing.assert_allclose(refined.log_model[0], np.asarray(log_model), rtol=1e-8)
    draws = numpy_draws(refined, deterministic=True)
    np.testing.assert_allclose(np.exp(draws["log_tau"]), draws["tau"], rtol=1e-8)
    assert draws["theta"].shape == (400, 8)


@pytest.mark.parametrize("method", ["flow_mh", "nuts"])
def test_what_was_drawn_before_an_interruption_is_kept(fitter, monkeypatch, method):
    module = fitter.module("refinement")
    posterior = fitter.fit("gamma", **QUICK)

    class Interrupted(module.tqdm):
        limit = done = 0

        def update(self, n=1):
            Interrupted.done += n
            if Interrupted.done >= self.limit:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "tqdm", Interrupted)
    options = {"num_samples": 500, "num_warmup": 50, "num_chains": 2}
    Interrupted.limit = 100
    refined = fitter.refine(posterior, method, **options)
    drawn = refined.log_model.shape[1]
    assert refined.interrupted and 10 < drawn <= 60
    assert refined.verdict().startswith("Interrupted")
    assert numpy_draws(refined)["g"].shape == (2 * drawn,)
    Interrupted.limit, Interrupted.done = 10, 0
    with pytest.raises(KeyboardInterrupt, match="before the first draw"):
        fitter.refine(posterior, method, **options)


def test_verdicts(fitter, monkeypatch):
    posterior = fitter.fit("gamma", **QUICK)
    refined = fitter.refine(posterior, "flow_mh", num_samples=300, num_warmup=100)
    assert refined.verdict().startswith("Good: draws of the posterior")
    few = fitter.refine(posterior, "flow_mh", num_samples=20, num_warmup=100)
    few.__dict__["_diagnostics"] = {**few._diagnostics, "r_hat": 1.0}
    assert few.verdict().startswith("Use with care: too few effective draws")
    refined.method, refined.divergences = "nuts", 3
    assert refined.verdict().startswith("Use with care: divergences")
    # chains that have not met
    shift = np.array([0.0, 0.0, 0.0, 5.0])[:, None, None]
    refined.unconstrained = fitter.array(np.asarray(refined.unconstrained) + shift)
    del refined.__dict__["_diagnostics"]
    assert refined.r_hat > 1.1 and refined.verdict().startswith("Do not trust: the chains do not agree")
    monkeypatch.setattr(posterior, "history", posterior.history._replace(missed=0.3))
    assert refined.verdict().startswith("Do not trust: about 30% of the posterior")


def test_a_mixture_guide_is_refined_across_its_modes(fitter):
    flow = functools.partial(fitter.pkg.flows.realnvp, num_layers=2, hidden_dims=(8, 8))
    base = functools.partial(fitter.pkg.distributions.MixtureBase, num_components=2)
    posterior = fitter.fit("bimodal", flow=flow, base=base, **QUICK, num_starts=12)
    refined = fitter.refine(posterior, "flow_mh", num_samples=500, num_warmup=100)
    right = numpy_draws(refined, group_by_chain=True)["z"][..., 0] > 0
    assert right.mean() == pytest.approx(0.7, abs=0.05)
    assert np.abs(np.diff(right.astype(int), axis=1)).sum(1).min() > 20  # every chain crosses again and again
    assert refined.log_evidence().value == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="method='bridge'"):
        refined.log_evidence("harmonic")


def test_output(fitter, tmp_path):
    posterior = fitter.fit("eight_schools", **QUICK)
    refined = fitter.refine(posterior, "flow_mh", num_samples=100, num_warmup=50)
    data = refined.to_arviz(log_likelihood=True)
    assert data["posterior"]["theta"].shape == (4, 100, 8)
    assert data["log_likelihood"]["obs"].shape == (4, 100, 8)
    assert data["sample_stats"]["lp"].shape == (4, 100)
    theta, sigma = np.asarray(data["posterior"]["theta"]), np.asarray(fitter.models.SIGMA)
    expected = -0.5 * ((np.asarray(fitter.models.Y) - theta) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(np.asarray(data["log_likelihood"]["obs"]), expected, rtol=1e-6)
    of_guide = posterior.to_arviz(50, log_likelihood=True)
    assert of_guide["log_likelihood"]["obs"].shape == (1, 50, 8)
    with redirect_stdout(io.StringIO()) as out:
        refined.print_summary()
    assert "ess_bulk" in out.getvalue() and "R-hat" in out.getvalue() and "in warm-up" in out.getvalue()
    figure = refined.plot(["mu", "tau"])
    assert len(figure.axes) == 4
    figure.savefig(tmp_path / "chains.png")
    with pytest.raises(ValueError, match="nothing"):
        refined.plot(["nothing"])


def test_errors(fitter):
    posterior = fitter.fit("gamma", **QUICK)
    for options, message in (
        ({"method": "gibbs"}, "method must be one of"),
        ({"method": "nuts", "num_samples": 1}, "num_samples must be an integer of at least 4"),
        ({"method": "nuts", "num_samples": 40.5}, "num_samples must be an integer of at least 4"),
        ({"method": "nuts", "num_chains": 0}, "num_chains must be an integer of at least 1"),
        ({"method": "nuts", "num_chains": "2"}, "num_chains must be an integer of at least 1"),
        ({"method": "nuts", "num_warmup": -1}, "num_warmup must be an integer of at least 0"),
        ({"method": "nuts", "max_tree_depth": 0}, "max_tree_depth must be an integer of at least 1"),
        ({"method": "nuts", "target_accept_prob": 1.5}, "target_accept_prob must lie between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fitter.refine(posterior, **options)
    refined = fitter.refine(posterior, "flow_mh", num_samples=20, num_warmup=20)
    with pytest.raises(ValueError, match="method must be 'importance', 'bridge' or 'harmonic'"):
        refined.log_evidence("thermodynamic")
    with pytest.raises(ValueError, match="temperature must lie between 0 and 1"):
        refined.log_evidence("harmonic", temperature=1.5)
