"""AutoFlow in Pyro's own machinery, and where Pyro's own flow guides fail."""

import copy
import functools
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import (  # noqa: E402
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide.initialization import init_to_mean, init_to_sample, init_to_value  # noqa: E402
from pyro.infer.reparam import NeuTraReparam  # noqa: E402
from pyro.nn import PyroModule, PyroSample  # noqa: E402

from pyroflows import AutoFlow, FlowVI, flows, initialization  # noqa: E402
from pyroflows.distributions import MixtureBase  # noqa: E402
from pyroflows.log_density import LogDensity  # noqa: E402
from pyroflows.noncentering import pulled_back  # noqa: E402
from tests.inference.models_pyro import SIGMA, Y, bimodal, constrained, dependent_support, eight_schools  # noqa: E402

pytestmark = [pytest.mark.xdist_group("torch-auto_flow"), pytest.mark.usefixtures("clean_param_store")]

small = functools.partial(flows.realnvp, num_layers=2, hidden_dims=(8, 8))
small_iaf = functools.partial(flows.iaf, num_layers=2, hidden_dims=(8, 8))
VECTORISED = {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 1}


def train(model, guide, steps=300, loss=None, rate=1e-2):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO(**VECTORISED) if loss is None else loss)
    return np.array([svi.step() for _ in range(steps)])


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(**VECTORISED),
        Trace_ELBO(num_particles=2),
        TraceMeanField_ELBO(**VECTORISED),
        RenyiELBO(alpha=0.0, **VECTORISED),
        TraceGraph_ELBO(**VECTORISED),
        JitTrace_ELBO(ignore_jit_warnings=True),
        JitTrace_ELBO(ignore_jit_warnings=True, **VECTORISED),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_every_elbo(loss):
    losses = train(eight_schools, AutoFlow(eight_schools, small), 60, loss)
    assert np.isfinite(losses).all() and losses[-20:].mean() < losses[:10].mean() + 1


def test_noncentered_in_svi():
    """The funnel between scale and effects costs a narrow flow 0.1 nats and more; non-centred it is gone."""
    guide = AutoFlow(eight_schools, small, init_scale=0.5, noncentered=True)
    assert train(eight_schools, guide, 800)[-200:].mean() < 31.9
    draws = Predictive(eight_schools, guide=guide, num_samples=5)()
    assert draws["theta"].shape[0] == 5
    reparam = NeuTraReparam(guide)
    mcmc = MCMC(NUTS(reparam.reparam(eight_schools)), 10, 10, disable_progbar=True)
    mcmc.run()
    latent = next(iter(mcmc.get_samples().values()))
    assert all(torch.isfinite(reparam.transform_sample(z)["theta"]).all() for z in latent)


def test_noncentered_where_vmap_fails():
    """A branch on a latent's value: after the latents it does not matter, before them nothing is non-centred."""

    def after():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.factor("step", torch.tensor(1.0) if x > 0 else torch.tensor(2.0))

    def before():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(0.0, scale if scale > 1 else 2 * scale))

    for model, expected in ((after, ("x",)), (before, None)):
        guide = AutoFlow(model, small, noncentered=True)
        density = guide.log_density()
        assert density.mode == "loop"
        assert getattr(guide.noncentering, "sites", None) == expected
        x = torch.tensor([[0.3, -1.0], [-0.2, 0.7]])
        u, log_det = guide.coordinates.forward_and_log_det(x)
        torch.testing.assert_close(pulled_back(density, guide.coordinates)(x), density(u) + log_det)


def test_predictive_quantiles_and_median():
    guide = AutoFlow(eight_schools, small)
    assert train(eight_schools, guide, 800)[-100:].mean() < 34
    draws = Predictive(eight_schools, guide=guide, num_samples=7)()
    assert draws["theta"].shape[0] == 7
    low, middle, high = (guide.quantiles(q) for q in (0.05, 0.5, 0.95))
    assert (low["theta"] < middle["theta"]).all() and (middle["theta"] < high["theta"]).all()
    assert guide.quantiles([0.05, 0.95])["theta"].shape == (2, 8)
    mu = guide.get_posterior().sample((20_000,))[:, 0]  # the first latent, unconstrained as it is
    assert abs(float(guide.median()["mu"] - mu.median())) < 0.1 * float(mu.std())


@pytest.mark.parametrize("jit", [False, True])
def test_neutra(jit):
    guide = AutoFlow(eight_schools, small)
    train(eight_schools, guide, 300)
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(eight_schools)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        mcmc = MCMC(
            NUTS(model, jit_compile=jit, ignore_jit_warnings=True, max_tree_depth=4),
            num_samples=10, warmup_steps=10, disable_progbar=True,
        )  # fmt: skip
        mcmc.run()
    (latent,) = mcmc.get_samples().values()
    draws = neutra.transform_sample(latent.unsqueeze(-2))
    assert draws["theta"].shape == (10, 8) and torch.isfinite(draws["tau"]).all()


def test_deepcopy_and_pickle_after_a_step():
    guide = AutoFlow(eight_schools, small)
    train(eight_schools, guide, 20)
    pyro.set_rng_seed(1)
    expected = guide.median()["theta"]
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        pyro.set_rng_seed(1)
        torch.testing.assert_close(other.median()["theta"], expected)
    assert np.isfinite(train(eight_schools, guide, 5)).all()  # and the original still trains


def test_a_second_guide_trains_on_its_own():
    first, second = (AutoFlow(eight_schools, small) for _ in range(2))
    train(eight_schools, first, 100)
    trained = {name: p.detach().clone() for name, p in first.transform.named_parameters()}
    losses = train(eight_schools, second, 300)
    assert losses[-50:].mean() < losses[:10].mean()
    for name, p in first.transform.named_parameters():
        torch.testing.assert_close(p.detach(), trained[name])
    assert any(
        not torch.equal(p, trained[name])
        for name, p in second.transform.named_parameters()
        if p.shape == trained[name].shape
    )
    assert np.isfinite(train(eight_schools, first, 20)).all()


SAVE = """
import functools, sys, pyro, torch
from pyroflows import AutoFlow, flows
from tests.inference.models_pyro import eight_schools
guide = AutoFlow(eight_schools, functools.partial(flows.realnvp, num_layers=2, hidden_dims=(8, 8)))
pyro.get_param_store().load(sys.argv[1])
guide()
pyro.set_rng_seed(5)
print(guide.median()["theta"].tolist())
before = {n: p.detach().clone() for n, p in guide.transform.named_parameters()}
from pyro.infer import SVI, Trace_ELBO
SVI(eight_schools, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step()
print(any(not torch.equal(p, before[n]) for n, p in guide.transform.named_parameters()))
"""


def test_saved_and_loaded_through_the_param_store(tmp_path):
    guide = AutoFlow(eight_schools, small)
    train(eight_schools, guide, 30)
    pyro.get_param_store().save(tmp_path / "params")
    pyro.set_rng_seed(5)
    expected = guide.median()["theta"].tolist()
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVE, str(tmp_path / "params")], capture_output=True, text=True
    )
    medians, trains = out.stdout.strip().splitlines()
    assert eval(medians) == expected and trains == "True"


def test_state_dict_round_trip():
    guide, other = AutoFlow(eight_schools, small), AutoFlow(eight_schools, small)
    train(eight_schools, guide, 20)
    other()
    other.load_state_dict(guide.state_dict())
    results = []
    for g in (guide, other):
        pyro.set_rng_seed(2)
        results.append(g.median()["theta"])
    torch.testing.assert_close(*results)
    assert len(guide.state_dict()) == len(dict(guide.named_parameters()))


def test_torch_style_loss_with_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlow(eight_schools, small)
        guide()
        loss = Trace_ELBO(num_particles=2)(eight_schools, guide)
        loss()
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert len(list(loss.parameters())) == len(list(guide.transform.parameters()))
    assert not list(pyro.get_param_store().keys())


def test_masked_guide():
    guide = AutoFlow(eight_schools, small)
    guide()
    for handler in (poutine.mask(mask=False), poutine.scale(scale=0.5)):
        with handler:
            assert np.isfinite(Trace_ELBO().loss(eight_schools, guide))


def test_init_loc_fn_is_honoured():
    def far():
        z = pyro.sample("z", dist.Normal(0.0, 1000.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=torch.full((3,), 100.0))

    losses = []
    for value in (100.0, 0.0):
        guide = AutoFlow(far, small, init_loc_fn=init_to_value(values={"z": torch.full((3,), value)}))
        losses.append(Trace_ELBO(num_particles=16).loss(far, guide))
    assert losses[0] < 60 < 1e5 < losses[1]
    assert np.isfinite(train(far, AutoFlow(far, small, init_loc_fn=init_to_mean), 5)).all()


@pytest.mark.parametrize(
    "scale", [0.3, torch.linspace(0.1, 1, 10), torch.full((10, 10), 0.1).tril() + 0.2 * torch.eye(10)]
)
def test_starts_as_the_normal_of_its_location_and_scale(scale):
    guide = AutoFlow(eight_schools, small, init_scale=scale)
    with torch.no_grad():
        draws = guide.get_posterior().sample((20_000,))
    matrix = scale if torch.is_tensor(scale) and scale.dim() == 2 else torch.diag(torch.as_tensor(scale).expand(10))
    torch.testing.assert_close(draws.mean(0), guide.init_loc, atol=0.03, rtol=0)
    torch.testing.assert_close(draws.T.cov(), matrix @ matrix.T, atol=0.03, rtol=0)
    guide.start_at(torch.ones(10), scale)
    torch.testing.assert_close(guide.get_transform()(torch.zeros(10)), torch.ones(10))


def test_one_latent_dimension():
    def model():
        pyro.sample("z", dist.Gamma(3.0, 2.0))

    for make in (flows.realnvp, flows.nsf, flows.iaf, flows.maf):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            losses = train(model, AutoFlow(model, functools.partial(make, num_layers=2, hidden_dims=(8,))), 200)
        assert losses[-20:].mean() < 0.5


def test_any_support():
    guide = AutoFlow(constrained, small)
    assert np.isfinite(train(constrained, guide, 50, Trace_ELBO())).all()
    low = guide.quantiles(0.01)
    assert low["positive"] > 0 and (low["simplex"] > 0).all()


def test_global_latents_with_a_subsampled_likelihood():
    data = torch.tensor(np.random.default_rng(0).normal(1.0, 1.0, 100), dtype=torch.float32)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 100, subsample_size=20) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])

    guide = AutoFlow(model, small)
    train(model, guide, 800)
    assert abs(float(guide.median()["mu"]) - float(data.mean())) < 0.15


# -- LogDensity
def test_log_density_agrees_in_every_mode(monkeypatch):
    u = 0.3 * torch.randn(6, 10)
    density = AutoFlow(eight_schools, small).log_density()
    assert density.mode == "traced"
    values = density.constrain(u)
    mu, tau, theta = values["mu"], values["tau"], values["theta"]
    joint = (
        dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(torch.tensor(5.0)).log_prob(tau) + tau.log()
        + dist.Normal(mu[:, None], tau[:, None]).log_prob(theta).sum(-1) + dist.Normal(theta, SIGMA).log_prob(Y).sum(-1)
    )  # fmt: skip
    for mode in ("traced", "vmap", "plates", "loop"):
        other = LogDensity(eight_schools, (), {}, density.shapes, density.prototype, mode=mode)
        torch.testing.assert_close(other(u), joint, msg=mode)
        hessian = torch.autograd.functional.hessian(other._single, u[0])
        for rows in (256, 4):  # all at once, and in parts of which the last one is filled up
            monkeypatch.setattr("pyroflows.log_density._ROWS", rows)
            torch.testing.assert_close(other.hessian(u[0]), hessian, atol=1e-4, rtol=1e-4, msg=mode)
            gradients, hessians = other._gradients_and_hessians(u)
            for row, gradient, matrix in zip(u, gradients, hessians, strict=True):
                torch.testing.assert_close(gradient, other.value_and_grad(row)[1], msg=mode)
                torch.testing.assert_close(matrix, other.hessian(row), atol=1e-4, rtol=1e-4, msg=mode)
    back, log_det = density.unconstrain(values)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(log_det, tau.log())
    assert set(density.site_log_probs(u)) >= {"mu", "tau", "theta", "obs"}


def test_walks_in_step_are_the_walks_alone():
    scale, sizes = np.geomspace(0.1, 10, 5), []

    def slopes(u):
        sizes.append(len(u))
        z = u / scale
        return (-0.5 * z**2 + 0.5 * np.cos(z)).sum(-1), -(z + 0.5 * np.sin(z)) / scale

    def value_and_grad(u):
        value, slope = slopes(u[None])
        return float(value[0]), slope[0]

    def hessian(u):
        return np.diag(-(1 + 0.5 * np.cos(u / scale)) / scale**2)

    alone = initialization.Target(None, value_and_grad, hessian)
    starts = list(np.random.default_rng(0).normal(size=(21, 5)) * 3 * scale)
    expected = list(initialization._walks(alone, starts))
    evaluations, count = sum(walk[2] for walk in expected), len(sizes)
    sizes.clear()
    found = initialization._walks(alone._replace(values_and_grads=slopes), starts)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(a[1], b[1]), np.testing.assert_equal(a[2], b[2])
    assert set(sizes) == {1, 4, 16} and len(sizes) < count / 5 and evaluations > 100
    for error in (KeyboardInterrupt, FloatingPointError):  # what ends one evaluation ends all walks

        def failing(u, error=error):
            raise error

        with pytest.raises(error):
            initialization._walks(alone._replace(values_and_grads=failing), starts)


def test_log_density_of_dependent_supports():
    density = AutoFlow(dependent_support, small).log_density()
    u = torch.tensor([0.3, -0.7])

    def vector(u):
        values = density.constrain(u[None])
        return torch.stack([values["a"][0], values["b"][0]])

    with torch.no_grad():
        columns = [(vector(u + 1e-3 * e) - vector(u - 1e-3 * e)) / 2e-3 for e in torch.eye(2)]
    log_det = torch.linalg.slogdet(torch.stack(columns, -1))[1]
    expected = -np.log(2.0) - vector(u)[0].log() + log_det
    torch.testing.assert_close(density(u[None])[0], expected, atol=1e-3, rtol=1e-3)


def test_log_density_falls_back_where_a_model_cannot_be_batched():
    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if z > 0 else -2 * z, 1.0), obs=torch.tensor(0.5))

    density = AutoFlow(branching, small).log_density()
    assert density.mode == "loop" and "control flow" in density.obstacle
    told = "one draw at a time, which is slow.*control flow"
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=told):  # at once, for the fit takes long
        warnings.simplefilter("error")
        FlowVI(branching, progress_bar=False).run()
    u = torch.tensor([[0.7], [-0.7]])
    expected = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + dist.Normal(torch.tensor([0.7, 1.4]), 1.0).log_prob(
        torch.tensor(0.5)
    )
    torch.testing.assert_close(density(u), expected)


def test_log_density_draws_minibatches_anew():
    data = torch.arange(10.0)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 10, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])

    density = AutoFlow(model, small).log_density()
    assert density.mode == "plates"
    assert len({float(density(torch.zeros(1, 1))) for _ in range(20)}) > 3


def test_log_density_respects_masks_and_scales():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=3.0):
            pyro.sample("a", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
        with poutine.mask(mask=torch.tensor(False)):
            pyro.sample("b", dist.Normal(z, 1.0), obs=torch.tensor(50.0))
        pyro.factor("c", -(z**2))

    u = torch.tensor([[0.3], [-1.0]])
    z = u[:, 0]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + 3 * dist.Normal(z, 1.0).log_prob(torch.tensor(0.5)) - z**2
    density = AutoFlow(model, small).log_density()
    torch.testing.assert_close(density(u), expected)
    torch.testing.assert_close(LogDensity(model, (), {}, density.shapes, density.prototype, mode="plates")(u), expected)


MODES = ("traced", "vmap", "plates", "loop")


@pytest.mark.parametrize("mode", MODES)
def test_a_matrix_without_a_factor_makes_its_draw_alone_not_finite(mode):
    def model():
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        one = torch.ones_like(r)
        matrix = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
        pyro.factor("a", torch.linalg.cholesky(matrix)[..., 1, 1])
        pyro.factor("b", torch.linalg.inv(torch.where((r > 2.5)[..., None, None], 0.0, matrix))[..., 0, 0])
        pyro.factor("c", torch.linalg.solve(matrix, matrix[..., 0])[..., 0])

    guide = AutoFlow(model, small)
    guide()
    density = LogDensity(model, (), {}, guide.log_density().shapes, guide.log_density().prototype, mode=mode)
    r = torch.tensor([0.5, 1.5, -0.2, 3.0])
    expected = dist.Normal(0.0, 1.0).log_prob(r) + (1 - r**2).sqrt() + 1 / (1 - r**2) + 1
    assert expected.isfinite().tolist() == [True, False, True, False]
    torch.testing.assert_close(density(r[:, None]), expected, equal_nan=True)


def test_a_prior_without_a_factor_makes_its_draw_alone_not_finite_in_a_noncentring():
    def model():
        r = pyro.sample("r", dist.Normal(0.0, 0.1))
        one = torch.ones_like(r)
        matrix = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
        pyro.sample("f", dist.MultivariateNormal(torch.zeros(2), matrix))

    guide = AutoFlow(model, small, noncentered=True)
    guide()
    y = guide.coordinates.forward_and_log_det(torch.tensor([[0.5, 1.0, 2.0], [1.5, 1.0, 2.0]]))[0]
    torch.testing.assert_close(y[0], torch.tensor([0.5, 1.0, 0.5 + 2 * 0.75**0.5]))
    assert not y[1, 1:].isfinite().any()


@pytest.mark.parametrize("mode", MODES)
def test_distributions_made_before_the_run_take_what_is_not_finite(mode):
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = PyroSample(dist.Normal(0.0, 1.0, validate_args=True).expand([2]).to_event(1))

        def forward(self):
            pyro.sample("y", dist.Normal(self.slope.sum(-1), 1.0), obs=torch.tensor(0.5))

    density = AutoFlow(Regression(), small).log_density()
    assert density.mode == "traced"
    density = LogDensity(density.model, (), {}, density.shapes, density.prototype, mode=mode)
    assert density(torch.tensor([[0.1, 0.2], [0.1, torch.nan]])).isfinite().tolist() == [True, False]


def test_a_model_that_writes_into_its_matrices_is_recorded():
    x = torch.linspace(0, 1, 5)

    def model():
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        matrix = 2.0 * (-0.5 * ((x[:, None] - x) / length) ** 2).exp()
        matrix.view(-1)[:: len(x) + 1] += 0.1  # as Pyro's Gaussian processes do
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), matrix), obs=x)

    density = AutoFlow(model, small).log_density()
    assert density.mode == "traced"
    plain = LogDensity(model, (), {}, density.shapes, density.prototype, mode="loop")
    u = torch.tensor([[0.3], [-0.5]])
    torch.testing.assert_close(density(u), plain(u))
    torch.testing.assert_close(density.value_and_grad(u[0]), plain.value_and_grad(u[0]))


def ordered_logistic():
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    cuts = pyro.sample("cuts", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    cuts = torch.stack([cuts[0], cuts[0] + cuts[1].exp()])
    with pyro.plate("data", 5):
        pyro.sample("y", dist.OrderedLogistic(slope * torch.arange(5.0), cuts), obs=torch.tensor([0, 1, 1, 2, 2]))


def multinomial():
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Multinomial(10, shares), obs=torch.tensor([0.0, 4.0, 6.0]))


def imputed():
    x = torch.tensor([1.0, torch.nan, 0.5, torch.nan])
    missing = pyro.sample("missing", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    full = x.clone()
    full[torch.isnan(x)] = missing
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(slope * full, 1.0), obs=torch.ones(4))


def written_step_by_step():
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    chances = torch.ones(4)
    for t in range(2, -1, -1):
        chances[t] = 0.5 * chances[t + 1] + rate
    chances[1:] *= 0.5
    pyro.factor("y", chances.log().sum())


@pytest.mark.parametrize(
    "model, modes",
    [
        (ordered_logistic, ("traced",)),
        (multinomial, ("traced",)),
        (imputed, ("traced", "vmap")),
        (written_step_by_step, ("traced", "vmap")),
    ],
)
def test_models_that_write_draws_into_tensors_of_their_own_take_many_at_once(model, modes):
    """Which torch's vmap refuses; one draw after the other takes a hundred times as long."""
    density = AutoFlow(model, small).log_density()
    assert density.mode in modes
    one_by_one = LogDensity(model, (), {}, density.shapes, density.prototype, mode="loop")
    u = 0.5 * torch.randn(5, density.dim)
    torch.testing.assert_close(density(u), one_by_one(u))
    for ours, plain in zip(density.value_and_grad(u[0]), one_by_one.value_and_grad(u[0]), strict=True):
        torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(density.hessian(u[0]), one_by_one.hessian(u[0]), atol=1e-4, rtol=1e-4)
    for name, values in density.constrain(u).items():
        torch.testing.assert_close(values, one_by_one.constrain(u)[name])
    assert density.site_log_probs(u).keys() == one_by_one.site_log_probs(u).keys()


def test_models_that_torch_has_no_gradient_of_are_told_what_to_do():
    def model():
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        chances = torch.ones(4)
        for t in range(2, -1, -1):
            chances[t] = rate * chances[t + 1]  # whose gradient needs what was there before
        pyro.factor("y", chances.log().sum())

    with pytest.raises(RuntimeError, match=r"writes into a tensor.*torch\.stack"):
        AutoFlow(model, small).log_density()


def test_noncentering_of_priors_that_a_model_writes():
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        scales = torch.ones(3)
        scales[1:] = scale
        effect = pyro.sample("effect", dist.Normal(0.0, scales).to_event(1))
        pyro.sample("y", dist.Normal(effect, 1.0).to_event(1), obs=torch.ones(3))

    guide = AutoFlow(model, small, noncentered=True)
    density = guide.log_density()
    assert density.mode == "traced" and guide.noncentering.sites == ("effect",)
    x = torch.tensor([[0.3, -1.0, 0.5, 2.0], [-0.2, 0.7, 0.1, 0.0]])
    u, log_det = guide.coordinates.forward_and_log_det(x)
    torch.testing.assert_close(u, torch.cat([x[:, :2], x[:, :1].exp() * x[:, 2:]], 1))
    torch.testing.assert_close(log_det, 2 * x[:, 0])
    torch.testing.assert_close(pulled_back(density, guide.coordinates)(x), density(u) + log_det)


def test_priors_of_integer_scale_are_noncentred():
    def model():
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0), torch.tensor(5)))
        pyro.sample("effect", dist.Normal(loc, torch.tensor(2)).expand([2]).to_event(1))

    guide = AutoFlow(model, small, noncentered=True)
    guide.log_density()
    u, log_det = guide.coordinates.forward_and_log_det(torch.tensor([0.5, 1.0, -1.0]))
    torch.testing.assert_close(u, torch.tensor([0.5, 2.5, -1.5]))
    torch.testing.assert_close(log_det, torch.tensor(2 * math.log(2)))


def test_another_start_is_tried_where_the_first_is_not_finite():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(z > 0.5, 0.0, -torch.inf))

    pyro.set_rng_seed(0)
    for _ in range(10):
        guide = AutoFlow(model, small, init_loc_fn=init_to_sample)
        guide()
        assert float(guide.log_density().prototype) > 0.5


@pytest.mark.parametrize("flow", [flows.realnvp(3), 3])
def test_flow_must_be_a_factory(flow):
    with pytest.raises(TypeError, match="flow must be a factory"):
        AutoFlow(eight_schools, flow)


@pytest.mark.parametrize("arguments", [{"init_scale": -1.0}, {"init_scale": torch.zeros(3)}, {"base_df": 0.0}])
def test_bad_scales_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AutoFlow(eight_schools, **arguments)


# -- a learned base
def test_svi_trains_a_learned_base():
    guide = AutoFlow(bimodal, small, base=functools.partial(MixtureBase, num_components=3), init_scale=1.0)
    guide()
    first = guide.get_base()
    losses = train(bimodal, guide, 300)
    assert losses[-50:].mean() < losses[:20].mean() - 1
    now = guide.get_base()
    stored = pyro.get_param_store()
    for name in ("logits", "loc", "log_scale"):
        assert (getattr(now, name) - getattr(first, name)).abs().max() > 1e-3, name
        torch.testing.assert_close(stored[f"AutoFlow.learned_base$$${name}"].detach(), getattr(now, name))
    assert len(stored) == len(list(guide.parameters())) and not now.loc.requires_grad
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        medians = []
        for g in (guide, other):
            pyro.set_rng_seed(1)
            medians.append(g.median()["z"])
        torch.testing.assert_close(*medians)


def test_neutra_with_a_learned_base():
    """The base's density is masked: chains target the posterior whatever the base's parameters."""
    guide = AutoFlow(bimodal, small, base=MixtureBase)
    train(bimodal, guide, 5)
    model = NeuTraReparam(guide).reparam(bimodal)
    z = torch.tensor([0.4, -1.2])
    conditioned = poutine.condition(model, {"z_shared_latent": z})
    with pyro.validation_enabled(False):
        total = poutine.trace(conditioned).get_trace().log_prob_sum()
    u, log_det = guide.get_transform().forward_and_log_det(z)
    torch.testing.assert_close(total, guide.log_density()(u[None])[0] + log_det, rtol=1e-4, atol=1e-4)
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert not next(iter(mcmc.get_samples().values())).requires_grad


def test_the_default_stands_the_plain_elbo():
    """A single draw a step: coupling flows of ten layers end in NaN within a dozen steps."""
    pyro.set_rng_seed(0)
    losses = train(eight_schools, AutoFlow(eight_schools), 600, Trace_ELBO())
    assert np.isfinite(losses).all() and losses[-200:].mean() < 45  # the evidence is -31.3
