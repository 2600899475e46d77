"""FlowReparam against the model's own density and closed forms, in both packages."""

import importlib
import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from tests import backends
from tests.registry import BY_NAME, FLOWS, param

DATA = np.random.default_rng(0).normal(1.0, 1.0, 20)
# the unconstrained shapes of the models' latents, in the models' order
SHAPES = {
    "eight_schools": {"mu": (), "tau": (), "theta": (8,)},
    "constrained": {"simplex": (2,), "corr": (3,), "positive": (), "interval": (), "ordered": (3,)},
    "weighted": {"scale": (3,), "x": (2, 3)},
    "out_of_order": {"zeta": (), "level": (), "effect": (2,)},
}


class Pyro:
    def __init__(self):
        self.flows = backends.get("torch")
        self.torch, self.pyro = importlib.import_module("torch"), importlib.import_module("pyro")
        self.infer = importlib.import_module("pyro.infer")
        self.pkg, self.models = self.flows.pkg, importlib.import_module("tests.inference.models_pyro")
        self.reparams, self.handlers = importlib.import_module("pyro.infer.reparam"), self.pyro.poutine
        self.language, self.array = (self.pyro, self.pyro.distributions), self.torch.as_tensor
        self.posteriors = {}

    def log_density(self, model, values, *args):
        """Log-density by the ecosystem's own potential, at unconstrained values."""
        util = importlib.import_module("pyro.infer.mcmc.util")
        _, potential, _, _ = util.initialize_model(model, model_args=args)
        with self.torch.no_grad():
            return -float(potential({name: self.torch.as_tensor(value) for name, value in values.items()}))

    def nuts(self, model, *args, warmup, draws, chains=1):
        self.pyro.set_rng_seed(0)
        kernel = self.infer.NUTS(model)
        mcmc = self.infer.MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(*args)
        return mcmc.get_samples()

    def fit(self, model, *args, **options):
        if model not in self.posteriors:
            self.pyro.set_rng_seed(0)
            vi = self.pkg.FlowVI(getattr(self.models, model), progress_bar=False, **options)
            self.posteriors[model] = vi.run(*args)
        return self.posteriors[model]

    def trained_guide(self, model, *args):
        self.pyro.set_rng_seed(0)
        guide = self.pkg.AutoFlow(model, small)
        svi = self.infer.SVI(model, guide, self.pyro.optim.Adam({"lr": 0.02}), self.infer.Trace_ELBO())
        for _ in range(300):
            svi.step(*args)
        return (guide,)

    def transform(self, posterior):
        """From normals, through the learned base, to the latents; and without the base."""
        transform = posterior.guide.get_transform()
        return self.pkg.Compose([posterior.guide.get_base_dist().transform, transform]), transform

    def params(self, posterior):
        """What a guide needs besides itself."""
        return ()

    def trace(self, model):
        return dict(self.handlers.trace(model).get_trace().nodes)


class NumPyro:
    def __init__(self):
        self.flows = backends.get("jax")
        self.jax, self.numpyro = importlib.import_module("jax"), importlib.import_module("numpyro")
        self.infer = importlib.import_module("numpyro.infer")
        self.pkg, self.models = self.flows.pkg, importlib.import_module("tests.inference.models_numpyro")
        self.reparams, self.handlers = importlib.import_module("numpyro.infer.reparam"), self.numpyro.handlers
        self.language, self.array = (self.numpyro, self.numpyro.distributions), self.jax.numpy.asarray
        self.posteriors = {}

    def log_density(self, model, values, *args):
        values = {name: self.array(value) for name, value in values.items()}
        seeded = self.handlers.seed(model, 0)
        return -float(self.jax.jit(lambda u: self.infer.util.potential_energy(seeded, args, {}, u))(values))

    def nuts(self, model, *args, warmup, draws, chains=1):
        options = {"num_chains": chains, "chain_method": "vectorized", "progress_bar": False}
        mcmc = self.infer.MCMC(self.infer.NUTS(model), num_warmup=warmup, num_samples=draws, **options)
        mcmc.run(self.jax.random.key(0), *args)
        return mcmc.get_samples(group_by_chain=chains > 1)

    def fit(self, model, *args, **options):
        if model not in self.posteriors:
            vi = self.pkg.FlowVI(getattr(self.models, model), progress_bar=False, **options)
            self.posteriors[model] = vi.run(self.jax.random.key(0), *args)
        return self.posteriors[model]

    def trained_guide(self, model, *args):
        guide = self.pkg.AutoFlow(model, small)
        svi = self.infer.SVI(model, guide, self.numpyro.optim.Adam(0.02), self.infer.Trace_ELBO())
        return guide, svi.run(self.jax.random.key(0), 300, *args, progress_bar=False).params

    def transform(self, posterior):
        transform = posterior.guide.get_transform(posterior.params)
        return self.pkg.Compose([posterior.guide.get_base_dist(posterior.params).transform, transform]), transform

    def params(self, posterior):
        return (posterior.params,)

    def trace(self, model):
        return self.handlers.trace(self.handlers.seed(model, 0)).get_trace()


_ecosystems = {}


def ecosystem(name):
    if name not in _ecosystems:
        _ecosystems[name] = {"torch": Pyro, "jax": NumPyro}[name]()
    return _ecosystems[name]


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"{name}-reparam")) for name in ("torch", "jax")]
)
def eco(request):
    """One ecosystem with its package, in float64."""
    found = ecosystem(request.param)
    if request.param == "torch":
        found.torch.set_default_dtype(found.torch.float64)
        request.addfinalizer(lambda: found.torch.set_default_dtype(found.torch.float32))
    return found


def flow(eco, dim, name="realnvp", sd=0.5, seed=0):
    """A flow at random parameters, far from the identity."""
    built = eco.flows.build(BY_NAME[name], dim)
    return eco.flows.with_state(built, backends.perturbed(eco.flows.state(built), sd, deep=True, seed=seed))


def small(dim, **kwargs):
    return importlib.import_module("numpyro_flows" if kwargs else "pyroflows").flows.realnvp(dim, 2, (8, 8), **kwargs)


def fitted_eight_schools(eco):
    return eco.fit("eight_schools", flow=small, num_steps=300, num_starts=1)


def size(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def unpack(u, shapes):
    parts = np.split(u, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
    return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


# -- the density -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", SHAPES)
def test_density_is_that_of_the_model_times_the_jacobian(eco, model, no_warnings):
    shapes, fn = SHAPES[model], getattr(eco.models, model)
    f, site = flow(eco, size(shapes)), f"{next(iter(shapes))}_base"
    neutra = eco.pkg.FlowReparam(f)
    for z in np.random.default_rng(1).normal(size=(3, size(shapes))):
        u, log_det = eco.flows.run(f, z)
        expected = eco.log_density(fn, unpack(u, shapes)) + log_det
        assert eco.log_density(neutra.reparam(fn), {site: z}) == pytest.approx(expected, rel=1e-10)
    assert neutra.base_names == (site,)


def test_density_where_a_support_depends_on_another_site(eco):
    f = flow(eco, 2, sd=0.3)
    neutra, z = eco.pkg.FlowReparam(f), np.array([0.4, -1.2])
    u, log_det = eco.flows.run(f, z)
    expected = np.log(expit(u) * expit(-u)).sum() + log_det  # a = 2 expit(u), b = a expit(u): both uniform
    actual = eco.log_density(neutra.reparam(eco.models.dependent_support), {"a_base": z})
    assert actual == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("source", ["posterior", "guide"])
def test_density_of_a_trained_source(eco, source):
    """Whose transform begins with a learned base and ends with the location and scale of a fit and non-centring."""
    fn, shapes = eco.models.eight_schools, SHAPES["eight_schools"]
    posterior = fitted_eight_schools(eco)
    f, z = eco.transform(posterior)[0], np.random.default_rng(2).normal(size=10)
    sources = (posterior,) if source == "posterior" else (posterior.guide, *eco.params(posterior))
    neutra = eco.pkg.FlowReparam(*sources)
    u, log_det = eco.flows.run(f, z)
    expected = eco.log_density(fn, unpack(u, shapes)) + log_det
    assert eco.log_density(neutra.reparam(fn), {"mu_base": z}) == pytest.approx(expected, rel=1e-10)


def test_flows_of_sites_and_of_groups_of_sites(eco):
    fn, shapes = eco.models.eight_schools, SHAPES["eight_schools"]
    one, nine, rng = flow(eco, 1, seed=1), flow(eco, 9), np.random.default_rng(3)
    z_one, z_nine, mu, theta = rng.normal(size=1), rng.normal(size=9), rng.normal(), rng.normal(size=8)
    (u_one, log_det_one), (u_nine, log_det_nine) = eco.flows.run(one, z_one), eco.flows.run(nine, z_nine)

    neutra = eco.pkg.FlowReparam({"tau": one, ("theta", "mu"): nine})  # a group's order is the model's
    values = {"mu": u_nine[0], "tau": u_one[0], "theta": u_nine[1:]}
    expected = eco.log_density(fn, values) + log_det_one + log_det_nine
    actual = eco.log_density(neutra.reparam(fn), {"tau_base": z_one, "mu_base": z_nine})
    assert actual == pytest.approx(expected, rel=1e-10)
    assert sorted(neutra.base_names) == ["mu_base", "tau_base"]
    draws = neutra.transform_sample({"tau_base": eco.array(z_one), "mu_base": eco.array(z_nine)})
    np.testing.assert_allclose(draws["theta"], u_nine[1:], rtol=1e-10)

    neutra = eco.pkg.FlowReparam({"tau": one})  # the others stay
    expected = eco.log_density(fn, {"mu": mu, "tau": u_one[0], "theta": theta}) + log_det_one
    actual = eco.log_density(neutra.reparam(fn), {"tau_base": z_one, "mu": mu, "theta": theta})
    assert actual == pytest.approx(expected, rel=1e-10)
    latent = {"tau_base": eco.array(z_one), "mu": eco.array(mu), "theta": eco.array(theta)}
    assert set(neutra.transform_sample(latent, deterministic=False)) == set(shapes)
    assert ("log_tau" in neutra.transform_sample(latent)) == (eco.flows.name == "jax")  # as of the ecosystem's MCMC
    draws = neutra.transform_sample(latent, deterministic=True)
    assert set(draws) == {*shapes, "log_tau"} and np.asarray(draws["mu"]) == mu
    np.testing.assert_allclose(draws["log_tau"], u_one[0], rtol=1e-10)
    with pytest.raises(ValueError, match=r"draws of \['mu', 'theta'\]"):
        neutra.transform_sample(eco.array(z_one))


def test_a_site_that_stays_may_be_discrete(eco):
    neutra = eco.pkg.FlowReparam({"loc": flow(eco, 1)})
    trace = eco.trace(neutra.reparam(eco.models.mixed))
    assert "loc_base" in trace and not trace["k"]["is_observed"]


def test_one_site_in_the_ecosystem_s_reparam(eco):
    """The flow moves all elements of a site in a plate jointly, from one vector outside of the plate."""
    fn, f = eco.models.eight_schools, flow(eco, 8, sd=0.3)  # of tame tails
    config = {"theta": eco.pkg.FlowReparam(f)}
    model, z = eco.handlers.reparam(fn, config=config), np.random.default_rng(4).normal(size=8)
    u, log_det = eco.flows.run(f, z)
    expected = eco.log_density(fn, {"mu": 1.0, "tau": -0.3, "theta": u}) + log_det
    actual = eco.log_density(model, {"mu": 1.0, "tau": -0.3, "theta_base": z})
    assert actual == pytest.approx(expected, rel=1e-10)
    config["mu"] = config["theta"]
    with pytest.raises(ValueError, match="'mu' came to the flow.*a FlowReparam of its own"):
        eco.trace(eco.handlers.reparam(fn, config=config))
    other = {"theta": eco.pkg.FlowReparam({("mu", "theta"): flow(eco, 9, sd=0.3)})}
    with pytest.raises(ValueError, match="'theta' came to the flow.*neutra.reparam"):
        eco.trace(eco.handlers.reparam(fn, config=other))


# -- MCMC --------------------------------------------------------------------------------------------------------------
def test_nuts_in_the_base_space_of_a_guide(eco):
    data, draws = eco.array(DATA), 1000
    neutra = eco.pkg.FlowReparam(*eco.trained_guide(eco.models.conjugate, data))
    samples = eco.nuts(neutra.reparam(eco.models.conjugate), data, warmup=200, draws=draws)
    theta = np.asarray(neutra.transform_sample(samples)["theta"])
    precision = 1 / 4 + len(DATA)
    assert theta.mean() == pytest.approx(DATA.sum() / precision, abs=5 * (precision * draws / 2) ** -0.5)
    assert theta.std() == pytest.approx(precision**-0.5, rel=0.15)


def test_nuts_is_exact_whatever_the_flow(eco):
    """A gamma variate through a flow at random parameters."""
    neutra, draws = eco.pkg.FlowReparam(flow(eco, 1, "elementwise-spline", sd=1.0)), 1000
    samples = eco.nuts(neutra.reparam(eco.models.gamma), warmup=200, draws=draws)
    g = np.asarray(neutra.transform_sample(samples)["g"])
    assert g.mean() == pytest.approx(1.5, abs=5 * (0.75 * 3 / draws) ** 0.5)
    assert g.std() == pytest.approx(0.75**0.5, rel=0.15)


@pytest.mark.xdist_group("jax-reparam")
def test_vectorised_chains(no_warnings):
    """Centred eight schools, with plates, a positive latent and a deterministic site; the truth is by quadrature."""
    eco, draws = ecosystem("jax"), 600
    posterior = fitted_eight_schools(eco)
    neutra = eco.pkg.FlowReparam(posterior)
    samples = eco.nuts(neutra.reparam(eco.models.eight_schools), warmup=300, draws=draws, chains=4)
    assert samples["theta"].shape == (4, draws, 8)
    for name, mean, sd in (("mu", 4.40, 3.32), ("tau", 3.60, 3.22), ("log_tau", 0.80, 1.17)):
        x = np.asarray(samples[name])
        assert x.mean() == pytest.approx(mean, abs=0.12 * sd), name
        assert x.std() == pytest.approx(sd, rel=0.1), name
    again = neutra.transform_sample(samples)
    assert set(again) == {"mu", "tau", "theta", "log_tau"}
    for name, value in again.items():
        np.testing.assert_allclose(value, samples[name], rtol=1e-10)


# -- draws -------------------------------------------------------------------------------------------------------------
def test_transform_sample(eco):
    posterior = fitted_eight_schools(eco)
    neutra, z = eco.pkg.FlowReparam(posterior), np.random.default_rng(5).normal(size=(2, 300, 10))
    # before any run: with the posterior's own model and arguments
    draws = neutra.transform_sample(eco.array(z), deterministic=True)
    u = eco.flows.run(eco.transform(posterior)[0], z)[0]
    np.testing.assert_allclose(draws["mu"], u[..., 0], rtol=1e-10)
    np.testing.assert_allclose(draws["tau"], np.exp(u[..., 1]), rtol=1e-10)
    np.testing.assert_allclose(draws["log_tau"], u[..., 1], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(draws["theta"], u[..., 2:], rtol=1e-10)
    assert set(draws) == {"mu", "tau", "theta", "log_tau"}


@pytest.mark.parametrize("eco", ["torch"], indirect=True)
def test_transform_sample_of_a_model_that_asks_for_values(eco):
    def branches():
        loc = eco.pyro.sample("loc", eco.pyro.distributions.Normal(0.0, 1.0))
        eco.pyro.deterministic("size", loc if loc > 0 else -loc)  # not under vmap

    f, z = flow(eco, 1), np.array([[-2.0], [2.0]])
    neutra = eco.pkg.FlowReparam(f)
    neutra.reparam(branches)()
    draws = neutra.transform_sample(eco.array(z), deterministic=True)
    np.testing.assert_allclose(draws["loc"], eco.flows.run(f, z)[0][:, 0])
    np.testing.assert_array_equal(draws["size"], draws["loc"].abs())


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_errors(eco):
    FlowReparam, models = eco.pkg.FlowReparam, eco.models
    with pytest.raises(TypeError, match="must be a FlowPosterior.*but got function. A factory must be called"):
        FlowReparam(eco.pkg.flows.realnvp)
    with pytest.raises(TypeError, match="dict of sites to TransformModules"):
        FlowReparam({"mu": eco.pkg.flows.realnvp})
    for wrong in ({}, {(): flow(eco, 2)}, {"mu": flow(eco, 1), ("mu", "tau"): flow(eco, 2)}):
        with pytest.raises(ValueError, match="a site one flow, but got"):
            FlowReparam(wrong)
    guide = eco.pkg.AutoFlow(models.eight_schools)
    with pytest.raises(ValueError, match="the guide has not been called"):
        FlowReparam(guide, *([{}] if eco.flows.name == "jax" else []))
    with pytest.raises(ValueError, match=r"names \['nu'\], but the model's latent sites are \['mu', 'tau', 'theta'\]"):
        eco.trace(FlowReparam({"nu": flow(eco, 1)}).reparam(models.eight_schools))
    with pytest.raises(ValueError, match=r"names \['obs'\]"):
        eco.trace(FlowReparam({"obs": flow(eco, 8)}).reparam(models.eight_schools))
    with pytest.raises(ValueError, match=r"vectors of size 8, .*\['theta'\]. Build it with dim=8"):
        eco.trace(FlowReparam({"theta": flow(eco, 7)}).reparam(models.eight_schools))
    with pytest.raises(ValueError, match="vectors of size 2.*bind its context"):
        eco.trace(FlowReparam(eco.flows.build(BY_NAME["realnvp"], 2, context=True)).reparam(models.student))
    with pytest.raises(ValueError, match="'k'.*discrete"):
        eco.trace(FlowReparam({("k", "loc"): flow(eco, 2)}).reparam(models.mixed))
    with pytest.raises(ValueError, match="subsampled"):
        eco.trace(FlowReparam(flow(eco, 4)).reparam(models.subsampled_local))
    with pytest.raises(ValueError, match="transform_sample needs the model"):
        FlowReparam(flow(eco, 1)).transform_sample(eco.array(np.zeros(1)))

    neutra = FlowReparam(flow(eco, 10))
    eco.trace(neutra.reparam(models.eight_schools))
    conditioned = eco.handlers.condition(models.eight_schools, {"mu": eco.array(1.0)})
    with pytest.raises(ValueError, match="'mu' is observed.*Condition the model before"):
        eco.trace(neutra.reparam(conditioned))
    with pytest.raises(
        ValueError, match=r"moves site\(s\) \['theta'\], but this run of the model did not come to them"
    ):
        eco.trace(neutra.reparam(models.without_theta))
    with pytest.raises(ValueError, match=r"moves site\(s\) \['mu', 'tau', 'theta'\], but this run"):
        eco.trace(neutra.reparam(models.student))


@pytest.mark.xdist_group("jax-reparam")
def test_a_guide_needs_its_params():
    eco = ecosystem("jax")
    with pytest.raises(ValueError, match=r"params is missing: pass FlowReparam\(guide, svi_result.params\)"):
        eco.pkg.FlowReparam(eco.pkg.AutoFlow(eco.models.gamma))


@pytest.mark.xdist_group("jax-reparam")
def test_latents_within_a_scan_are_refused():
    eco = ecosystem("jax")
    scan, dist = importlib.import_module("numpyro.contrib.control_flow").scan, eco.numpyro.distributions

    def walk():
        def step(x, _):
            x = eco.numpyro.sample("x", dist.Normal(x, 1.0))
            return x, x

        scan(step, 0.0, None, length=3)

    with pytest.raises(ValueError, match="'x' is observed.*within NumPyro's scan"):
        eco.trace(eco.pkg.FlowReparam(flow(eco, 3)).reparam(walk))


@pytest.mark.xdist_group("jax-reparam")
def test_the_first_run_may_be_under_jit():
    eco = ecosystem("jax")
    neutra = eco.pkg.FlowReparam(flow(eco, 1))

    @eco.jax.jit
    def run(z):
        model = eco.handlers.substitute(neutra.reparam(eco.models.gamma), {"g_base": z})
        return eco.handlers.trace(model).get_trace()["g"]["value"]

    assert float(run(eco.array([0.3]))) == pytest.approx(np.exp(eco.flows.run(flow(eco, 1), np.array([0.3]))[0][0]))


def flow_class(eco, forward):
    """A transform of one element, by its value and log-slope."""

    class Elementwise(eco.pkg.TransformModule):
        def forward_and_log_det(self, x, context=None):
            y, log_slope = forward(eco.torch if eco.flows.name == "torch" else eco.jax.numpy, x)
            return y, log_slope.sum(-1)

    return Elementwise()


TAILS = {
    "tanh": lambda np, x: (3 * np.tanh(x / 3), -2 * np.log(np.cosh(x / 3))),
    "leaky tanh": lambda np, x: (0.01 * x + 3 * np.tanh(x / 3), np.log(0.01 + np.cosh(x / 3) ** -2)),
    "one side": lambda np, x: (np.where(x < 0, np.tanh(x), x), np.where(x < 0, -2 * np.log(np.cosh(x)), 0 * x)),
    "logarithm": lambda np, x: (np.arcsinh(x), -0.5 * np.log1p(x * x)),
    "not finite": lambda np, x: (np.exp(8 * x * x) * x, 8 * x * x),
}


@pytest.mark.parametrize("tails", TAILS)
def test_tails_that_do_not_reach_are_refused(eco, tails):
    f = flow_class(eco, TAILS[tails])
    with pytest.raises(ValueError, match="the flow Elementwise .*(bounded|slope dies|not finite).*check_tails=False"):
        eco.trace(eco.pkg.FlowReparam(f).reparam(eco.models.student))
    assert "z_base" in eco.trace(eco.pkg.FlowReparam(f, check_tails=False).reparam(eco.models.student))


def test_tails_that_bend_far_out_are_taken(eco):
    """As those of a coupling flow do where it has seen no draws."""

    def bent(np, x):
        middle = np.clip(x, -8, 8)
        return middle + 0.01 * (x - middle), np.where(abs(x) < 8, 0.0, math.log(0.01)) + 0 * x

    assert "z_base" in eco.trace(eco.pkg.FlowReparam(flow_class(eco, bent)).reparam(eco.models.student))


OF_EVERY_KIND = ("realnvp", "nsf_ar", "ttf", "ncsf", "bnaf", "planar", "residual")


@pytest.mark.parametrize("case", [param(case, slow=case.name not in OF_EVERY_KIND) for case in FLOWS])
def test_tails_of_the_flows(eco, case):
    """All but the flow of angles and, where its tails are lighter than the normal's, the tail map's."""
    dim, check = case.dim, importlib.import_module(f"{eco.pkg.__name__}.reparam").check_tails
    like = eco.array(np.zeros(dim))
    check(flow(eco, dim, case.name, sd=0.0), dim, case.name, like) if case.name != "ncsf" else None
    if case.name in ("ncsf", "ttf"):
        with pytest.raises(ValueError, match=f"the flow {case.name} .*realnvp"):
            check(flow(eco, dim, case.name, sd=0.3), dim, case.name, like)
    else:
        check(flow(eco, dim, case.name, sd=0.3), dim, case.name, like)


def test_estimated_log_determinants_are_refused(eco):
    options = {"key": eco.jax.random.key(0)} if eco.flows.name == "jax" else {}
    f = eco.pkg.flows.residual(2, 2, (8,), log_det="unbiased", **options)
    with pytest.raises(ValueError, match="log-determinant of the flow.*is an estimate.*log_det='exact'"):
        eco.trace(eco.pkg.FlowReparam(f).reparam(eco.models.student))


# -- the ecosystems' own reparametrisers -------------------------------------------------------------------------------
def test_their_neutra_takes_our_guides(eco):
    fn, posterior = eco.models.eight_schools, fitted_eight_schools(eco)
    theirs = eco.reparams.NeuTraReparam(posterior.guide, *eco.params(posterior))
    z = np.random.default_rng(6).normal(size=10)
    u, log_det = eco.flows.run(eco.transform(posterior)[1], z)
    expected = eco.log_density(fn, unpack(u, SHAPES["eight_schools"])) + log_det
    site = "mu_shared_latent" if eco.flows.name == "torch" else "auto_shared_latent"
    assert eco.log_density(theirs.reparam(fn), {site: z}) == pytest.approx(expected, rel=1e-10)


def test_their_transform_reparam_takes_our_flows(eco):
    """A site of a flow's distribution, then from its base."""
    f, (primitives, dist) = flow(eco, 3), eco.language
    base = dist.Normal(eco.array(np.zeros(3)), 1.0).to_event(1)

    def model():
        x = primitives.sample("x", dist.TransformedDistribution(base, [f]))
        primitives.sample("obs", dist.Normal(x.sum(), 1.0), obs=eco.array(0.5))

    z = np.array([0.3, -1.0, 2.0])
    expected = stats.norm.logpdf(z).sum() + stats.norm.logpdf(0.5, eco.flows.run(f, z)[0].sum())
    reparametrised = eco.handlers.reparam(model, config={"x": eco.reparams.TransformReparam()})
    assert eco.log_density(reparametrised, {"x_base": z}) == pytest.approx(expected, rel=1e-10)


# -- the funnel's neck -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_funnel_is_explored_to_its_neck(eco):
    """Neal's funnel in ten dimensions: the log-scale is normal with sd 3, and NUTS reaches all of it."""
    posterior = eco.fit("funnel", num_steps=500)
    neutra, chains, draws = eco.pkg.FlowReparam(posterior), *((4, 1000) if eco.flows.name == "jax" else (1, 1000))
    samples = eco.nuts(neutra.reparam(eco.models.funnel), warmup=500, draws=draws, chains=chains)
    v = np.asarray(neutra.transform_sample(samples)["v"]).reshape(-1)
    assert v.std() == pytest.approx(3, rel=0.1) and v.mean() == pytest.approx(0, abs=0.5)
    assert np.quantile(v, [0.01, 0.99]) == pytest.approx(stats.norm.ppf([0.01, 0.99], scale=3), rel=0.2)
