"""Priors whose distributions claim all numbers, but have mass on a part of them, in both packages."""

import copy
import importlib
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import integrate, stats

from tests import backends

DATA = np.array([0.9, 1.2])


def log_integral(prior, error, edge):
    return math.log(integrate.quad(lambda x: prior(x) * error(DATA - x).prod(), -edge, edge)[0])


@pytest.fixture
def lab(in_float64):
    jax = in_float64 == "jax"
    ppl = importlib.import_module("numpyro" if jax else "pyro")
    infer = importlib.import_module(f"{ppl.__name__}.infer")
    lab = SimpleNamespace(jax=jax, backend=backends.get(in_float64), ppl=ppl, infer=infer)
    lab.dist = importlib.import_module(f"{ppl.__name__}.distributions")
    lab.pkg = importlib.import_module("numpyro_flows" if jax else "pyroflows")
    lab.supported = importlib.import_module(f"{lab.pkg.__name__}.supports").supported
    lab.biject_to = lab.dist.biject_to if jax else importlib.import_module("torch.distributions").biject_to
    lab.array = importlib.import_module("jax.numpy").asarray if jax else importlib.import_module("torch").as_tensor
    lab.handlers = importlib.import_module("numpyro.handlers" if jax else "pyro.poutine")
    return lab


def scaled_beta(lab, a=4.0, b=1.5, loc=-1.0, scale=2.0):
    to_scale = lab.dist.transforms.AffineTransform(lab.array(loc), lab.array(scale))
    return lab.dist.TransformedDistribution(lab.dist.Beta(lab.array(a), lab.array(b)), [to_scale])


def sample(lab, fn, n):
    return fn.sample(importlib.import_module("jax").random.key(0), (n,)) if lab.jax else fn.sample((n,))


def beta_model(lab):
    def model(y):
        phi = lab.ppl.sample("x", scaled_beta(lab))
        with lab.ppl.plate("data", len(y)):
            lab.ppl.sample("y", lab.dist.Normal(phi, 0.5), obs=y)

    return model


def angle_model(lab):
    def model(y):
        angle = lab.ppl.sample("x", lab.dist.VonMises(lab.array(0.0), lab.array(0.5)))
        with lab.ppl.plate("data", len(y)):
            lab.ppl.sample("y", lab.dist.VonMises(angle, lab.array(3.0)), obs=y)

    return model


MODELS = {  # the model, the edge of its latent's support, and its log-evidence
    "scaled beta": (beta_model, 1.0, log_integral(stats.beta(4, 1.5, -1, 2).pdf, stats.norm(0, 0.5).pdf, 1.0)),
    "angle": (angle_model, math.pi, log_integral(stats.vonmises(0.5).pdf, stats.vonmises(3.0).pdf, math.pi)),
}
KINDS = {
    "scaled beta": lambda lab: scaled_beta(lab),
    "negative scale": lambda lab: scaled_beta(lab, scale=-2.0),
    "vector": lambda lab: scaled_beta(lab, a=[1.0, 2.0, 3.0]).to_event(1),
    "masked and expanded": lambda lab: scaled_beta(lab).expand((2,)).mask(True),
    "twice transformed": lambda lab: lab.dist.TransformedDistribution(
        scaled_beta(lab), [lab.dist.transforms.ExpTransform()]
    ),
    "scaled simplex": lambda lab: lab.dist.TransformedDistribution(
        lab.dist.Dirichlet(lab.array([1.0, 2.0, 3.0])),
        [lab.dist.transforms.AffineTransform(lab.array([0.0, 0.0, 0.0]), lab.array(2.0))],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_support_is_where_the_draws_are(lab, kind):
    fn = KINDS[kind](lab)
    mended = lab.supported(fn)
    x = sample(lab, fn, 100)
    assert mended.support.check(x).all() and not mended.support.check(x + 50).any()
    assert mended.support.event_dim == fn.event_dim
    np.testing.assert_array_equal(np.asarray(mended.log_prob(x)), np.asarray(fn.log_prob(x)))
    bijection = lab.biject_to(mended.support)
    u = bijection.inv(x)
    assert tuple(bijection.inverse_shape(tuple(x.shape))) == tuple(u.shape)
    np.testing.assert_allclose(np.asarray(bijection(u)), np.asarray(x), rtol=1e-6)
    assert bijection.log_abs_det_jacobian(u, x).shape == fn.log_prob(x).shape
    for twin in (copy.deepcopy(mended), pickle.loads(pickle.dumps(mended)), lab.supported(mended)):
        assert twin.support.check(x).all() and not twin.support.check(x + 50).any()


def test_angles_lie_on_a_circle():
    """In Pyro; NumPyro has a constraint for them."""
    torch, dist = importlib.import_module("torch"), importlib.import_module("pyro.distributions")
    zero, one = torch.zeros(()), torch.ones(())
    pair = dist.SineBivariateVonMises(zero, zero, one, one, 0.1 * one)
    skewed = dist.SineSkewed(dist.VonMises(torch.zeros(2), 1.0).to_event(1), torch.tensor([0.3, -0.2]))
    for fn in (dist.VonMises(zero, one), torch.distributions.VonMises(zero, one), pair, skewed):
        mended = importlib.import_module("pyroflows.supports").supported(fn)
        x = fn.sample((100,))
        assert fn.support.check(x + 2 * math.pi).all() and not mended.support.check(x + 2 * math.pi).any()
        assert mended.support.check(x).all()
        torch.testing.assert_close(mended.log_prob(x), fn.log_prob(x))


def test_a_support_that_is_right_is_left(lab):
    dist = lab.dist
    normal, one = dist.Normal(lab.array(0.0), lab.array(1.0)), lab.array(1.0)
    shifted = dist.TransformedDistribution(normal, [dist.transforms.AffineTransform(one, one)])
    for fn in (normal, dist.LogNormal(0.0, one), shifted, dist.Beta(one, one), dist.Uniform(-one, one)):
        assert lab.supported(fn) is fn
        assert lab.supported(fn.expand((2,)).to_event(1)).support.event_dim == 1


@pytest.mark.parametrize("name", MODELS)
def test_density_has_the_evidence_as_its_mass(lab, name):
    build, _, log_evidence = MODELS[name]
    density = lab.pkg.AutoFlow(build(lab)).log_density(lab.array(DATA))
    over = importlib.import_module("jax").vmap(density) if lab.jax else density
    u = np.linspace(-30, 30, 6001)
    mass = np.trapezoid(np.exp(np.asarray(over(lab.array(u[:, None])))), u)
    assert math.log(mass) == pytest.approx(log_evidence, abs=1e-6)


def test_fit_stays_within_the_support(lab):
    build, edge, log_evidence = MODELS["scaled beta"]
    vi = lab.pkg.FlowVI(build(lab), num_steps=200, num_particles=32, num_starts=1, progress_bar=False)
    if lab.jax:
        key = importlib.import_module("jax").random.key(0)
        posterior = vi.run(key, lab.array(DATA))
        draws = posterior.sample(key, (1000,))
    else:
        lab.ppl.set_rng_seed(0)
        posterior = vi.run(lab.array(DATA))
        draws = posterior.sample((1000,))
    assert abs(np.asarray(draws["x"])).max() < edge
    assert posterior.log_evidence().value == pytest.approx(log_evidence, abs=0.005)
    assert posterior.elbo.value > log_evidence - 0.02


@pytest.mark.parametrize("name", MODELS)
def test_reparametrised_density_has_the_evidence_as_its_mass(lab, name):
    build, _, log_evidence = MODELS[name]
    flow = lab.pkg.flows.planar(1, **({"key": importlib.import_module("jax").random.key(0)} if lab.jax else {}))
    model = lab.pkg.FlowReparam({"x": flow}).reparam(build(lab))
    density = lab.pkg.AutoFlow(model).log_density(lab.array(DATA))
    over = importlib.import_module("jax").vmap(density) if lab.jax else density
    z = np.linspace(-30, 30, 6001)
    mass = np.trapezoid(np.exp(np.asarray(over(lab.array(z[:, None])))), z)
    assert math.log(mass) == pytest.approx(log_evidence, abs=1e-6)
