"""AutoFlow in NumPyro's own machinery, and where NumPyro's own flow guides fail."""

import copy
import functools
import pickle

import numpy as np
import pytest

numpyro = pytest.importorskip("numpyro")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro import handlers, optim  # noqa: E402
from numpyro.contrib.control_flow import scan  # noqa: E402
from numpyro.infer import (  # noqa: E402
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    init_to_median,
    init_to_sample,
    init_to_value,
)
from numpyro.infer.reparam import NeuTraReparam  # noqa: E402

from numpyro_flows import AutoFlow, flows  # noqa: E402
from numpyro_flows.distributions import MixtureBase  # noqa: E402
from numpyro_flows.log_density import LogDensity  # noqa: E402
from numpyro_flows.noncentering import forward_and_log_density, pulled_back  # noqa: E402
from tests.inference.models_numpyro import bimodal, constrained, dependent_support, eight_schools  # noqa: E402

pytestmark = pytest.mark.xdist_group("jax-auto_flow")


def small(dim, **kwargs):
    return flows.realnvp(dim, 2, (8, 8), **kwargs)


def tiny(dim, **kwargs):
    return flows.realnvp(dim, 1, (4,), **kwargs)


def small_iaf(dim, **kwargs):
    return flows.iaf(dim, 2, (8, 8), **kwargs)


def train(model, guide, steps=300, loss=None, rate=1e-2, **kwargs):
    loss = Trace_ELBO(num_particles=8) if loss is None else loss
    return SVI(model, guide, optim.Adam(rate), loss).run(jax.random.key(0), steps, progress_bar=False, **kwargs)


@pytest.fixture(scope="module")
def trained():
    guide = AutoFlow(eight_schools, small)
    return guide, train(eight_schools, guide, 3000)


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=4, vectorize_particles=True),
        Trace_ELBO(num_particles=2, vectorize_particles=False),
        TraceMeanField_ELBO(num_particles=4),
        RenyiELBO(alpha=0.0, num_particles=4),
        pytest.param(
            TraceGraph_ELBO(num_particles=4),
            marks=pytest.mark.skipif(
                (jax.__version_info__ >= (0, 11)) and numpyro.__version__.startswith("0.21."),
                reason="NumPyro 0.21 takes constants for inputs there, under jax 0.11",
            ),
        ),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_every_elbo(loss, no_warnings):
    result = train(eight_schools, AutoFlow(eight_schools, small), 200, loss)
    assert np.isfinite(result.losses).all() and result.losses[-50:].mean() < result.losses[:20].mean()


def test_noncentered_in_svi():
    """The funnel between scale and effects costs a narrow flow 0.1 nats and more; non-centred it is gone."""
    guide = AutoFlow(eight_schools, small, init_scale=0.5, noncentered=True)
    result = train(eight_schools, guide, 800)
    assert result.losses[-200:].mean() < 31.9
    draws = Predictive(guide, params=result.params, num_samples=5)(jax.random.key(0))
    assert draws["theta"].shape == (5, 8)
    reparam = NeuTraReparam(guide, result.params)
    mcmc = MCMC(NUTS(reparam.reparam(eight_schools)), num_warmup=10, num_samples=10, progress_bar=False)
    mcmc.run(jax.random.key(1))
    assert np.isfinite(reparam.transform_sample(mcmc.get_samples()["auto_shared_latent"])["theta"]).all()


def walks(scanned):
    """Walks of one element, of a plate of three and of vectors of two, which jump, and a latent that depends on where
    one ends."""

    def step(last, name):
        alone = numpyro.sample(f"alone{name}", dist.Normal(0.5 * last[0], scale))
        with numpyro.plate("rows", 3):
            together = numpyro.sample(f"together{name}", dist.StudentT(4.0, last[1], 0.3 * scale))
        factor = scale * jnp.array([[1.0, 0.0], [0.5, 2.0]])
        joint = numpyro.sample(f"joint{name}", dist.MultivariateNormal(last[2], scale_tril=factor))
        rate = numpyro.sample(f"rate{name}", dist.Gamma(2.0, 1.0))
        jump = numpyro.sample(f"jump{name}", dist.Laplace(jnp.zeros(2), 0.5).to_event(1))
        return alone, together, joint * rate + jump

    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    last = jnp.zeros(()), jnp.zeros(3), jnp.ones(2)
    if scanned:
        last, _ = scan(lambda last, _: (step(last, ""), None), last, jnp.arange(3))
    else:
        for t in range(3):
            last = step(last, f"_{t}")
    numpyro.sample("end", dist.Normal(last[0] + last[1].sum() + last[2].sum(), 1.0))


def test_noncentering_of_what_a_scan_draws():
    """Every step's latents relative to their priors, as of the same model with a loop."""
    densities = []
    for scanned in (True, False):
        guide = AutoFlow(functools.partial(walks, scanned), small, noncentered=True)
        density = guide.log_density()
        assert len(guide.noncentering.sites) == (5 if scanned else 13)
        rng = np.random.default_rng(0)
        told = {}
        for name in ("scale", "alone", "together", "joint", "rate", "jump", "end"):  # the same numbers in either layout
            sites = [(n, shape) for n, shape in density.shapes if n == name or n.startswith(f"{name}_")]
            shape = (3, *sites[0][1]) if len(sites) == 3 else sites[0][1]
            values = rng.normal(size=(3, *shape))
            told.update({sites[0][0]: values} if len(sites) == 1 else {sites[t][0]: values[:, t] for t in range(3)})
        flat = [jnp.concatenate([told[n][i].ravel() for n, _ in density.shapes]) for i in range(3)]
        layer = guide.noncentering.with_pseudo_observations(jnp.exp(flat[0]), flat[1])

        @jax.jit
        def there_and_back(at, layer=layer, density=density):
            u, log_det = layer.forward_and_log_det(at)
            x, back = layer.inverse_and_log_det(u)
            return x, (log_det, -back, density(u)), jnp.linalg.slogdet(jax.jacfwd(layer)(at))[1], layer.factor(x)

        x, values, expected, factor = there_and_back(flat[2])
        np.testing.assert_allclose(values[0], expected, rtol=1e-5)
        np.testing.assert_allclose(x, flat[2], atol=1e-5)
        assert factor.shape == (density.dim, density.dim)
        densities.append([float(value) for value in values])
    np.testing.assert_allclose(*densities, rtol=1e-5)


JOINT_PRIORS = {
    "walk": lambda scale: dist.GaussianRandomWalk(scale, 5),
    "walks": lambda scale: dist.GaussianRandomWalk(scale * jnp.array([1.0, 3.0]), 5).to_event(1),
    "vector": lambda scale: dist.MultivariateNormal(jnp.ones(5), scale_tril=scale * jnp.tri(5)),
}


@pytest.mark.parametrize("prior", JOINT_PRIORS)
def test_noncentering_takes_joint_priors_and_data_out(prior):
    """With the data themselves as pseudo-observations, what is left of the effects is standard normal."""
    noise = np.linspace(0.5, 2.0, 5)

    def model():
        effect = numpyro.sample("effect", JOINT_PRIORS[prior](numpyro.sample("scale", dist.HalfNormal(1.0))))
        numpyro.sample("y", dist.Normal(effect, noise).to_event(effect.ndim), obs=jnp.ones_like(effect) * noise)

    guide = AutoFlow(model, small, noncentered=True)
    log_density = guide.log_density()
    assert guide.noncentering.sites == ("effect",)
    copies = (log_density.dim - 1) // 5
    told = np.r_[0.0, np.tile(noise**-2, copies)], np.r_[0.0, np.tile(noise, copies)]
    layer = guide.noncentering.with_pseudo_observations(*told)
    guide.set_noncentering(layer)
    density = jax.vmap(pulled_back(log_density, guide.coordinates))
    x = np.random.default_rng(0).normal(0.0, 2.0, size=(6, log_density.dim))
    there, centre = (density(jnp.asarray(z)) for z in (x, np.where(np.arange(x.shape[1]) < 1, x, 0.0)))
    np.testing.assert_allclose(there - centre, -0.5 * (x[:, 1:] ** 2).sum(-1), rtol=1e-6, atol=1e-6)
    u, log_det = layer.forward_and_log_det(jnp.asarray(x))
    back, inverse_log_det = layer.inverse_and_log_det(u)
    np.testing.assert_allclose(back, x, atol=1e-6)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-6)
    plain = layer.with_pseudo_observations(np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    jacobian = jax.jacfwd(plain)(jnp.asarray(x[0]))
    np.testing.assert_allclose(plain.factor(jnp.asarray(x[0]))[1:, 1:], jacobian[1:, 1:], atol=1e-6)


def test_noncentering_passes_what_a_reversed_scan_draws():
    """NumPyro gives such sites values in the order of its steps; the layer stays exact beside them."""

    def model():
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        step = lambda last, _: 2 * (numpyro.sample("walk", dist.Normal(last, scale)),)  # noqa: E731
        scan(step, 0.0, jnp.arange(3), reverse=True)
        numpyro.sample("effect", dist.Normal(0.0, scale))

    guide = AutoFlow(model, small, noncentered=True)
    log_density = guide.log_density()
    assert guide.noncentering.sites == ("effect",)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    u, log_det = guide.coordinates.forward_and_log_det(x)
    jacobians = jax.vmap(jax.jacfwd(guide.coordinates))(x)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobians)[1], atol=1e-6)
    np.testing.assert_allclose(guide.coordinates.inv(u), x, atol=1e-5)
    assert np.isfinite(jax.vmap(log_density)(u)).all()


def scaled_and_masked():
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 4), handlers.mask(mask=jnp.array([True, True, False, True])), handlers.scale(scale=2.0):
        effect = numpyro.sample("effect", dist.LogNormal(0.0, scale))
        numpyro.sample("y", dist.Normal(effect, 1.0), obs=jnp.ones(4))
    numpyro.factor("constraint", -(effect.sum() ** 2))


def after_a_reversed_scan():
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(last, _):
        return 2 * (numpyro.sample("walk", dist.Normal(last, scale)) + numpyro.sample("rate", dist.Gamma(2.0, 1.0)),)

    last, _ = scan(step, 0.0, jnp.arange(3), reverse=True)
    numpyro.sample("effect", dist.Normal(last, scale))


@pytest.mark.parametrize(
    "model", [eight_schools, functools.partial(walks, True), scaled_and_masked, after_a_reversed_scan]
)
def test_one_run_of_the_model_serves_its_noncentering_and_its_density(model):
    runs = []

    def counted():
        runs.append(None)
        model()

    guide = AutoFlow(counted, small, noncentered=True)
    log_density = guide.log_density()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, log_density.dim)))
    layer = guide.noncentering.with_pseudo_observations(jnp.exp(x[0]), x[1])
    guide.set_noncentering(layer)
    runs.clear()
    found = forward_and_log_density(guide.coordinates, log_density, x)
    assert len(runs) == 1
    u, log_det = layer.forward_and_log_det(x)
    for one, two in zip(found, (u, log_det, jax.vmap(log_density)(u)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_a_matrix_that_is_no_covariance_is_no_density():
    """Compiled models are not validated; those at hand, against which they are checked, must not end a fit by it."""

    def model():
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), scale * jnp.ones((2, 2))), obs=jnp.ones(2))

    log_density = LogDensity(model, (), {}, (("scale", ()),))
    with numpyro.validation_enabled():
        values = [evaluate(log_density)(jnp.zeros(1)) for evaluate in (lambda f: f, jax.jit)]
    assert not np.isfinite(values).any()


def test_progress_bar_and_stable_update():
    svi = SVI(eight_schools, AutoFlow(eight_schools, small), optim.Adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, progress_bar=True, stable_update=True)
    assert np.isfinite(result.losses).all()


def test_predictive_quantiles_and_median(trained):
    guide, result = trained
    assert result.losses[-200:].mean() < 33
    draws = Predictive(eight_schools, guide=guide, params=result.params, num_samples=7)(jax.random.key(0), None)
    assert draws["obs"].shape == (7, 8)
    low, middle, high = (guide.quantiles(result.params, q) for q in (0.05, 0.5, 0.95))
    assert (low["theta"] < middle["theta"]).all() and (middle["theta"] < high["theta"]).all()
    assert guide.quantiles(result.params, [0.05, 0.95])["theta"].shape == (2, 8)
    np.testing.assert_array_equal(guide.median(result.params)["mu"], middle["mu"])
    assert abs(middle["mu"] - 4.4) < 1.5


@pytest.mark.parametrize("make", [small, small_iaf])
def test_posterior_scores_draws_that_are_not_its_own(make):
    guide = AutoFlow(eight_schools, make)
    result = train(eight_schools, guide, 20)
    posterior = guide.get_posterior(result.params)
    x, intermediates = posterior.sample_with_intermediates(jax.random.key(0), (5,))
    np.testing.assert_allclose(posterior.log_prob(x), posterior.log_prob(x, intermediates), atol=1e-6)


def test_neutra_with_vectorised_chains(trained):
    guide, result = trained
    neutra = NeuTraReparam(guide, result.params)
    mcmc = MCMC(
        NUTS(neutra.reparam(eight_schools)), num_warmup=150, num_samples=250, num_chains=2,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(0))
    draws = neutra.transform_sample(mcmc.get_samples()["auto_shared_latent"])
    assert draws["theta"].shape == (500, 8) and draws["log_tau"].shape == (500,)
    assert abs(draws["mu"].mean() - 4.4) < 1.2


def test_masked_and_scaled_guides(trained):
    guide, result = trained
    for handler in (handlers.mask(mask=False), handlers.scale(scale=0.5)):
        with handler:
            value = Trace_ELBO().loss(jax.random.key(0), result.params, eight_schools, guide)
        assert np.isfinite(value)


def test_init_loc_fn_is_honoured():
    def far(y=100.0):
        z = numpyro.sample("z", dist.Normal(0.0, 1000.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=jnp.full(3, y))

    starts = [init_to_value(values={"z": jnp.full(3, 100.0)}), init_to_value(values={"z": jnp.zeros(3)})]
    losses = []
    for start in starts:
        guide = AutoFlow(far, small, init_loc_fn=start)
        svi = SVI(far, guide, optim.Adam(1e-3), Trace_ELBO(num_particles=16))
        losses.append(svi.evaluate(svi.init(jax.random.key(0))))
        assert np.isfinite(train(far, AutoFlow(far, small, init_loc_fn=init_to_median), 5).losses).all()
    assert losses[0] < 40 < 1e5 < losses[1]


@pytest.mark.parametrize("scale", [0.3, np.linspace(0.1, 1, 10), np.tril(np.full((10, 10), 0.1)) + 0.2 * np.eye(10)])
def test_starts_as_the_normal_of_its_location_and_scale(scale):
    guide = AutoFlow(eight_schools, small, init_scale=scale)
    params = train(eight_schools, guide, 0 + 1, rate=1e-12).params
    draws = guide.get_posterior(params).sample(jax.random.key(0), (20_000,))
    matrix = scale if np.ndim(scale) == 2 else np.diag(np.broadcast_to(scale, 10))
    np.testing.assert_allclose(draws.mean(0), guide.init_loc, atol=0.03)
    np.testing.assert_allclose(jnp.cov(draws.T), matrix @ matrix.T, atol=0.03)
    guide = AutoFlow(eight_schools, small)
    guide.log_density()
    guide.start_at(jnp.ones(10), jnp.asarray(scale))
    np.testing.assert_allclose(guide.transform(jnp.zeros(10)), 1.0, rtol=1e-6)


def test_pickled_guide_gives_the_same(trained):
    guide, result = trained
    for other in (pickle.loads(pickle.dumps(guide)), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(guide))))):
        np.testing.assert_array_equal(other.median(result.params)["theta"], guide.median(result.params)["theta"])
    assert np.isfinite(train(eight_schools, pickle.loads(pickle.dumps(AutoFlow(eight_schools, small))), 5).losses).all()


def test_parameters_load_into_a_new_guide(trained, tmp_path):
    guide, result = trained
    leaves, tree = jax.tree.flatten(result.params)
    np.savez(tmp_path / "params.npz", *leaves)
    with np.load(tmp_path / "params.npz") as file:
        params = jax.tree.unflatten(tree, [jnp.asarray(file[name]) for name in file.files])
    other = AutoFlow(eight_schools, small)
    other.log_density()
    np.testing.assert_array_equal(
        other.sample_posterior(jax.random.key(3), params)["theta"],
        guide.sample_posterior(jax.random.key(3), result.params)["theta"],
    )


def test_posteriors_cross_jit_and_vmap(trained):
    guide, result = trained
    count = []

    @jax.jit
    def posterior(params):
        count.append(1)
        return guide.get_posterior(params)

    moved = jax.tree.map(lambda a: a + 0.01, result.params)
    x = jnp.zeros(10)
    values = [posterior(p).log_prob(x) for p in (result.params, moved)]
    assert len(count) == 1
    stacked = jax.tree.map(lambda *a: jnp.stack(a), result.params, moved)
    np.testing.assert_allclose(jax.vmap(lambda p: guide.get_posterior(p).log_prob(x))(stacked), values)


@pytest.mark.slow
def test_stein_vi_accepts_it():
    from numpyro.contrib.einstein import RBFKernel, SteinVI

    stein = SteinVI(eight_schools, AutoFlow(eight_schools, tiny), optim.Adam(1e-3), RBFKernel(), num_stein_particles=2)
    result = stein.run(jax.random.key(0), 5, progress_bar=False)
    assert np.isfinite(result.losses).all()


def test_one_latent_dimension(no_warnings):
    def model():
        numpyro.sample("z", dist.Gamma(3.0, 2.0))

    for make in (flows.realnvp, flows.nsf, flows.iaf, flows.maf):
        result = train(model, AutoFlow(model, lambda dim, make=make, **k: make(dim, 2, (8,), **k)), 200)
        assert result.losses[-20:].mean() < 0.5


@pytest.mark.parametrize("model", [constrained])
def test_any_support(model, no_warnings):
    guide = AutoFlow(model, small)
    draws = guide.sample_posterior(jax.random.key(0), train(model, guide, 100).params, sample_shape=(50,))
    np.testing.assert_allclose(draws["simplex"].sum(-1), 1, atol=1e-6)
    assert (draws["positive"] > 0).all() and (jnp.diff(draws["ordered"]) > 0).all()


def test_global_latents_with_a_subsampled_likelihood():
    data = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, 100))

    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        with numpyro.plate("data", 100, subsample_size=20) as index:
            numpyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])

    guide = AutoFlow(model, small)
    result = train(model, guide, 1500)
    assert abs(guide.median(result.params)["mu"] - data.mean()) < 0.1


def test_log_density_agrees_and_inverts():
    guide = AutoFlow(eight_schools, small)
    density = guide.log_density()
    u = 0.3 * jax.random.normal(jax.random.key(0), (10,))
    values = density.constrain(u)
    mu, tau, theta = values["mu"], values["tau"], values["theta"]
    from tests.inference.models_numpyro import SIGMA, Y

    joint = (
        dist.Normal(0, 5).log_prob(mu) + dist.HalfCauchy(5).log_prob(tau) + jnp.log(tau)
        + dist.Normal(mu, tau).log_prob(theta).sum() + dist.Normal(theta, SIGMA).log_prob(Y).sum()
    )  # fmt: skip
    assert float(density(u)) == pytest.approx(float(joint), abs=1e-9)
    back, log_det = density.unconstrain(values)
    np.testing.assert_allclose(back, u, atol=1e-9)
    assert float(log_det) == pytest.approx(float(jnp.log(tau)), abs=1e-9)
    assert set(density.site_log_probs(u)) == {"mu", "tau", "theta", "obs"}


def test_log_density_of_dependent_supports():
    density = AutoFlow(dependent_support, small).log_density()
    u = jnp.array([0.3, -0.7])

    def constrained_vector(u):
        values = density.constrain(u)
        return jnp.stack([values["a"], values["b"]])

    jacobian = jax.jacobian(constrained_vector)(u)
    a = constrained_vector(u)[0]
    expected = -jnp.log(2.0) - jnp.log(a) + jnp.linalg.slogdet(jacobian)[1]
    assert float(density(u)) == pytest.approx(float(expected), abs=1e-9)
    assert float(density.unconstrain(density.constrain(u))[1]) == pytest.approx(
        float(jnp.linalg.slogdet(jacobian)[1]), abs=1e-9
    )


@pytest.mark.parametrize(
    "arguments, message",
    [({"flow": flows.realnvp(3, key=jax.random.key(0))}, "flow must be a factory"), ({"flow": 3}, "factory")],
)
def test_flow_must_be_a_factory(arguments, message):
    with pytest.raises(TypeError, match=message):
        AutoFlow(eight_schools, **arguments)


@pytest.mark.parametrize("arguments", [{"init_scale": -1.0}, {"init_scale": np.zeros(3)}, {"base_df": 0.0}])
def test_bad_scales_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AutoFlow(eight_schools, **arguments)


# -- a learned base
def test_svi_trains_a_learned_base(no_warnings):
    base = functools.partial(MixtureBase, num_components=3)
    guide = AutoFlow(bimodal, tiny, base=base, init_scale=1.0)
    result = train(bimodal, guide, 300)
    assert result.losses[-50:].mean() < result.losses[:20].mean() - 1
    assert set(result.params) == {"auto_flow$params", "auto_base$params"}
    first, now = guide.get_base(), guide.get_base(result.params)
    assert all((abs(getattr(now, n) - getattr(first, n)) > 1e-3).any() for n in ("logits", "loc", "log_scale"))
    posterior = guide.get_posterior(result.params)
    np.testing.assert_array_equal(posterior.base_dist.loc, now.loc)
    np.testing.assert_array_equal(guide.get_base_dist(result.params).loc, now.loc)
    draws = guide.sample_posterior(jax.random.key(0), result.params, sample_shape=(500,))["z"]
    drawn = posterior.sample(jax.random.key(1), (500,))
    np.testing.assert_allclose(draws.mean(0), drawn.mean(0), atol=1.0)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        np.testing.assert_array_equal(other.get_base().loc, first.loc)
        np.testing.assert_array_equal(other.get_posterior(result.params).log_prob(drawn), posterior.log_prob(drawn))


def test_neutra_with_a_learned_base():
    """The base's density is masked: chains target the posterior whatever the base's parameters."""
    guide = AutoFlow(bimodal, tiny, base=MixtureBase)
    params = train(bimodal, guide, 5).params
    model = NeuTraReparam(guide, params).reparam(bimodal)
    transform = guide.get_transform(params)
    z = jnp.array([0.4, -1.2])
    trace = handlers.trace(handlers.substitute(handlers.seed(model, 0), {"auto_shared_latent": z})).get_trace()
    assert not [name for name, site in trace.items() if site["type"] == "param"]
    total = sum(site["fn"].log_prob(site["value"]) for site in trace.values() if site["type"] == "sample")
    u, log_det = transform.forward_and_log_det(z)
    np.testing.assert_allclose(total, guide.log_density()(u) + log_det, rtol=1e-5)


def test_a_factory_that_looks_at_values_serves_too():
    def flow(dim, *, key):
        return tiny(dim, key=jax.random.key(int(jax.random.randint(key, (), 0, 1000))))

    guide = AutoFlow(eight_schools, flow)
    guide.log_density()
    shapes = [leaf.shape for leaf in jax.tree.leaves(guide.transform.layers[0])]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(tiny(10, key=jax.random.key(0)))]


def test_another_start_is_tried_where_the_first_is_not_finite():
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("half", jnp.where(z > 0.5, 0.0, -jnp.inf))

    for seed in range(5):
        guide = AutoFlow(model, small, init_loc_fn=init_to_sample)
        with handlers.seed(rng_seed=seed):
            guide()
        assert float(guide.init_loc[0]) > 0.5


def test_priors_of_integer_scale_are_noncentred():
    def model():
        loc = numpyro.sample("loc", dist.Normal(0, 5))
        numpyro.sample("effect", dist.Normal(loc, 2).expand([2]).to_event(1))

    guide = AutoFlow(model, tiny, noncentered=True)
    density = guide.log_density()
    layer = guide.noncentering.with_density(density)
    u, log_det = layer.forward_and_log_det(jnp.array([0.5, 1.0, -1.0]))
    np.testing.assert_allclose(u, [0.5, 2.5, -1.5], rtol=1e-6)
    assert float(log_det) == pytest.approx(2 * np.log(2))


def test_data_of_numpy_may_have_a_support_of_latents():
    def model():
        top = numpyro.sample("top", dist.HalfNormal(5.0))
        numpyro.sample("y", dist.Uniform(0, top), obs=np.array([1.0, 2.0]))

    log_density = AutoFlow(model, tiny).log_density()
    density = jax.jit(lambda u: log_density(u))
    expected = dist.HalfNormal(5.0).log_prob(3.0) - np.log(3)
    assert float(density(jnp.log(jnp.array([3.0])))) == pytest.approx(float(expected))
    assert float(density(jnp.log(jnp.array([1.5])))) == -np.inf


def test_the_default_stands_the_plain_elbo():
    """A single draw a step: coupling flows of ten layers end in NaN within a dozen steps."""
    losses = train(eight_schools, AutoFlow(eight_schools), 2000, Trace_ELBO()).losses
    assert np.isfinite(losses).all() and np.mean(losses[-500:]) < 36  # the evidence is -31.3
