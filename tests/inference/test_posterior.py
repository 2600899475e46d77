"""What a posterior takes and gives: draws for the ecosystem's tools, densities, files, and clear errors."""

import importlib

import numpy as np
import pytest

QUICK = {"num_steps": 1, "num_particles": 16, "num_starts": 1, "base": None, "max_gradients": 300}
X = np.linspace(-1, 1, 6)
Y = 2 * X + np.array([0.1, -0.3, 0.2, 0.0, 0.3, -0.2])


def line(fitter, order=("slope", "tau"), tau=None):
    """A model with a deterministic site, and latents on the line, the half-line, an interval and a simplex."""
    ppl = importlib.import_module("numpyro" if fitter.name == "jax" else "pyro")
    dist, ones = ppl.distributions, fitter.array(np.ones(3))
    priors = {"slope": dist.Normal(0 * ones[0], 2.0), "tau": tau or dist.HalfNormal(ones[0])}

    def model(x, y=None):
        latent = {name: ppl.sample(name, priors[name]) for name in order}
        ppl.sample("share", dist.Uniform(0 * ones[0], 2.0))
        ppl.sample("weights", dist.Dirichlet(ones))
        mean = ppl.deterministic("mean", latent["slope"] * x)
        with ppl.plate("data", len(x)):
            ppl.sample("y", dist.Normal(mean, latent["tau"]), obs=y)

    return model


@pytest.fixture
def posterior(fitter):
    """One of the model above, made once."""
    if "line" not in fitter.fits:
        flow = fitter.pkg.transforms.ElementwiseAffine
        vi = fitter.pkg.FlowVI(line(fitter), lambda dim, key=None: flow(dim), progress_bar=False, **QUICK)
        fitter.fits["line"] = vi.run(*fitter.key(), fitter.array(X), fitter.array(Y))
    return fitter.fits["line"]


def predictive(fitter, draws, x):
    """Means at other covariates, by the ecosystem's own tool."""
    infer = importlib.import_module("numpyro.infer" if fitter.name == "jax" else "pyro.infer")
    predict = infer.Predictive(line(fitter), draws, return_sites=["mean"])
    return np.asarray(predict(*fitter.key(), fitter.array(x))["mean"])


@pytest.mark.parametrize("kind", ["sample", "importance_resample", "get_samples"])
def test_predictive_at_new_covariates(fitter, posterior, kind):
    owner, *args = (posterior, *fitter.key(1), 8)
    if kind == "get_samples":
        owner, args = fitter.refine(posterior, "resample", num_samples=4, num_chains=2), []
    draw = getattr(owner, kind)
    everything, latents = (draw(*args, deterministic=deterministic) for deterministic in (True, False))
    assert list(latents) == ["slope", "tau", "share", "weights"] and everything.keys() - latents.keys() == {"mean"}
    assert ("mean" in draw(*args)) == (fitter.name == "jax")  # as in the ecosystem's MCMC
    for x in (X + 1, X[:4]):  # of the length of the data, and another
        draws = draw(*args)
        means = predictive(fitter, draws, x)
        np.testing.assert_allclose(means.reshape(8, -1), np.asarray(draws["slope"]).reshape(8, 1) * x, rtol=1e-6)


def test_log_prob_outside_the_support(fitter, posterior):
    draws = posterior.sample(*fitter.key(), 3)
    draws = {name: np.asarray(draws[name]) for name in posterior.log_density.site_names}
    inside = np.asarray(posterior.log_prob(draws))  # NumPy's arrays are taken too
    assert np.isfinite(inside).all()
    np.testing.assert_array_equal(posterior.log_prob({name: x.tolist() for name, x in draws.items()}), inside)
    for name, values in {
        "tau": [-1.0, 0.0, np.nan],
        "share": [-0.1, 2.1, np.inf],
        "weights": [[0.5, 0.6, -0.1], [0.5, 0.4, 0.2], [0.0, 0.0, 0.0]],
    }.items():
        assert (np.asarray(posterior.log_prob({**draws, name: values})) == -np.inf).all(), name
    mixed = np.asarray(posterior.log_prob({**draws, "tau": draws["tau"] * [1, -1, 1]}))
    np.testing.assert_array_equal(mixed, [inside[0], -np.inf, inside[2]])
    with pytest.raises(ValueError, match=r"site 'weights' must be of shape \(\*batch, \*\(3,\)\), but got \(3, 2\)"):
        posterior.log_prob({**draws, "weights": draws["weights"][:, :2]})


def test_no_draws(fitter, posterior):
    draws = posterior.sample(*fitter.key(), (0, 2))
    assert draws["weights"].shape == (0, 2, 3) and posterior.log_prob(draws).shape == (0, 2)


def test_sample_shapes(fitter, posterior):
    for shape, expected in ((5, (5,)), (np.int64(5), (5,)), ((), ()), ([2, 3], (2, 3))):
        assert posterior.sample(*fitter.key(), shape)["weights"].shape == (*expected, 3)
    for shape in ("a", -1, (2, -1), 1.5, (1.5,), None):
        with pytest.raises(ValueError, match="sample: sample_shape must be a size or a tuple of sizes"):
            posterior.sample(*fitter.key(), shape)


def test_numbers_of_draws(fitter, posterior):
    for call, args in (
        (posterior.importance_resample, fitter.key()), (posterior.to_arviz, ()), (posterior.plot, (None,)),
    ):  # fmt: skip
        for n in (0, -5, 2.5):
            with pytest.raises(ValueError, match=f"{call.__name__}: num_samples must be an integer of at least 1"):
                call(*args, n)


def test_keys(fitter, posterior):
    if fitter.name == "torch":
        pytest.skip("torch has a generator")
    for call, args in ((posterior.sample, (4,)), (posterior.importance_resample, (4,)), (posterior.refine, ("nuts",))):
        for key in (0, (4,), "nuts", None):
            with pytest.raises(
                TypeError, match=f"{call.__name__}: rng_key must be a key of jax.random and comes first"
            ):
                call(key, *args)


def test_one_variable_is_plotted(fitter, posterior):
    import matplotlib

    matplotlib.use("Agg")
    refined = fitter.refine(posterior, "resample", num_samples=20, num_chains=2)
    assert len(refined.plot("tau").axes) == 2
    titles = [axis.get_title() for axis in posterior.plot("tau", 100).axes]
    assert "tau" in titles and "slope" not in titles
    assert posterior.plot("weights", 100, kind="pair").axes


def test_labels_of_arviz(fitter, posterior):
    labels = {"coords": {"place": list("abcdef"), "share": [1, 2, 3]}, "dims": {"y": ["place"], "mean": ["place"]}}
    refined = fitter.refine(posterior, "resample", num_samples=4, num_chains=2)
    for data in (posterior.to_arviz(5, log_likelihood=True, **labels), refined.to_arviz(True, **labels)):
        assert data["posterior"]["mean"].dims == ("chain", "draw", "place")
        assert list(data["log_likelihood"]["y"].coords["place"].values) == list("abcdef")
        assert data["observed_data"]["y"].dims == ("place",)
    for to_arviz in (posterior.to_arviz, refined.to_arviz):
        with pytest.raises(ValueError, match=r"dims names \['theta'\], but the sites are"):
            to_arviz(dims={"theta": ["place"]})


def test_without_gradients(fitter, posterior):
    if fitter.name == "jax":
        pytest.skip("jax has no such mode")
    torch = importlib.import_module("torch")
    vars(posterior).pop("flow_error", None)
    with torch.no_grad():
        assert posterior.flow_error < 1e-9 and posterior.departure.gradients
        refined = fitter.refine(posterior, "nuts", num_samples=4, num_warmup=0, num_chains=1)
        assert refined.adapt(num_steps=2, progress_bar=False).elbo.value > -10


def test_gradients_of_a_loaded_posterior(fitter, posterior, tmp_path):
    """Those of the chains that its verdict ran are counted once, and they are not run again."""
    verdict, path = posterior.verdict(), tmp_path / "posterior.safetensors"
    assert posterior.departure.gradients > 0
    posterior.save(path)
    loaded = type(posterior).load(path, line(fitter), posterior.guide.flow)
    assert loaded.departure == posterior.departure and loaded.verdict() == verdict
    assert loaded.history.gradients == posterior.history.gradients


def test_files_know_their_latents(fitter, posterior, tmp_path):
    path, load = tmp_path / "posterior.safetensors", type(posterior).load
    posterior.save(path)
    ppl = importlib.import_module("numpyro" if fitter.name == "jax" else "pyro")
    one = fitter.array(np.ones(()))
    log_prob = np.asarray(posterior.log_prob(posterior.sample(*fitter.key(), 3)))
    swapped = line(fitter, ("tau", "slope"))
    with pytest.raises(ValueError, match=r"latents are \[\('tau', \(\)\), \('slope'.*file are \[\('slope'"):
        load(path, swapped, posterior.guide.flow)
    for prior in (ppl.distributions.Normal(one, 1.0), ppl.distributions.Uniform(0 * one, 5.0)):
        with pytest.raises(ValueError, match=r"support of \['tau'\] in the model is not that in the file"):
            load(path, line(fitter, tau=prior), posterior.guide.flow)
    other = load(path, line(fitter, tau=ppl.distributions.LogNormal(one, 1.0)), posterior.guide.flow)
    np.testing.assert_allclose(other.log_prob(other.sample(*fitter.key(), 3)), log_prob)
    # files of before have no such entry
    serialization = fitter.module("serialization")
    tensors, metadata = serialization.load(path)
    serialization.save(path, tensors, {name: value for name, value in metadata.items() if name != "latents"})
    assert load(path, swapped, posterior.guide.flow)
