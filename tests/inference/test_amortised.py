"""Amortised posteriors in both packages: encoders, AutoFlow(encoder=), AmortisedFlowVI, against closed forms."""

import copy
import importlib
import importlib.util
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests import backends
from tests.inference.fitting import slow_in_jax

N = 10  # data of the normal mean


class Lab:
    """What the tests ask of one package."""

    def __init__(self, name):
        self.name, self.backend = name, backends.get(name)
        self.jax = importlib.import_module("jax") if name == "jax" else None
        self.pkg = importlib.import_module("numpyro_flows" if self.jax else "pyroflows")
        self.ppl = importlib.import_module("numpyro" if self.jax else "pyro")
        self.dist = importlib.import_module(f"{self.ppl.__name__}.distributions")
        self.infer = importlib.import_module(f"{self.ppl.__name__}.infer")
        self.torch = None if self.jax else importlib.import_module("torch")
        self.realnvp = partial(self.pkg.flows.realnvp, num_layers=2, hidden_dims=(16,))
        self.nsf = partial(self.pkg.flows.nsf, num_layers=2, hidden_dims=(32,), num_bins=6)
        self.fits = {}

    def module(self, name):
        return importlib.import_module(f"{self.pkg.__name__}.{name}")

    def key(self, seed=0):
        """The leading argument, or the seed set."""
        if self.jax:
            return (self.jax.random.key(seed),)
        self.ppl.set_rng_seed(seed)
        return ()

    def array(self, x):
        return self.jax.numpy.asarray(x) if self.jax else self.torch.as_tensor(np.array(x))

    def encoder(self, kind, *args, seed=0, **kwargs):
        key = {"key": self.jax.random.key(seed)} if self.jax else {}
        self.key(seed)
        return getattr(self.pkg.encoders, kind)(*args, **kwargs, **key)

    def mask(self, mask):
        handlers = self.ppl.handlers if self.jax else self.ppl.poutine
        return handlers.mask(mask=mask)

    def amortised(self, model, encoder, flow=None, **options):
        options = {"progress_bar": False, "num_steps": 600, "learning_rate": 5e-3, **options}
        return self.pkg.AmortisedFlowVI(model, flow or self.realnvp, encoder=encoder, **options)

    def mean_vi(self, **options):
        """Of :meth:`mean`, not trained."""
        return self.amortised(self.mean, self.encoder("SetEncoder", 1, 8, (16,)), data=as_set, **options)

    def trained(self):
        if "mean" not in self.fits:
            self.fits["mean"] = self.mean_vi().fit(*self.key(), self.array(np.zeros(N)))
        return self.fits["mean"]

    def sample(self, posterior, n, seed=1):
        return {k: np.asarray(v) for k, v in posterior.sample(*self.key(seed), n, deterministic=True).items()}

    def calibrate(self, infer, n, seed=3, **options):
        run = self.pkg.simulation_based_calibration
        options = {"progress_bar": False, "num_simulations": n, **options}
        return run(*self.key(seed), self.mean, (self.array(np.zeros(N)),), infer=infer, **options)

    # -- models --------------------------------------------------------------------------------------------------------
    def mean(self, x):
        theta = self.ppl.sample("theta", self.dist.Normal(1.0, 2.0 + 0.0 * x[0]))
        self.ppl.deterministic("twice", 2.0 * theta)
        with self.ppl.plate("data", len(x)):
            self.ppl.sample("x", self.dist.Normal(theta, 1.0), obs=x)

    def masked_mean(self, x, present):
        theta = self.ppl.sample("theta", self.dist.Normal(0.0, 2.0 + 0.0 * x[0]))
        with self.ppl.plate("data", len(x)), self.mask(present):
            self.ppl.sample("x", self.dist.Normal(theta, 1.0), obs=x)

    def counts(self, *, y):
        rate = self.ppl.sample("rate", self.dist.Gamma(3.0 + 0.0 * y[0], 2.0))
        with self.ppl.plate("data", len(y)):
            self.ppl.sample("y", self.dist.Poisson(rate), obs=y)

    def present(self, *key):
        """Data and a mask of random size."""
        if self.jax:
            size = self.jax.random.randint(key[0], (), 1, N + 1)
            return self.jax.numpy.zeros(N), self.jax.numpy.arange(N) < size
        return self.torch.zeros(N), self.torch.arange(N) < 1 + (N * self.torch.rand(())).long()


def as_set(x, *rest):
    return x.reshape(-1, 1)


def posterior_of_mean(x, loc=1.0):
    """Mean, standard deviation and log evidence of a normal mean, of prior ``N(loc, 2)``."""
    n = len(x)
    precision = 0.25 + n
    evidence = stats.multivariate_normal(np.full(n, loc), np.eye(n) + 4.0).logpdf(x)
    return (0.25 * loc + x.sum()) / precision, precision**-0.5, evidence


def data_sets(n, seed=0, loc=1.0):
    rng = np.random.default_rng(seed)
    return loc + 2.0 * rng.standard_normal((n, 1)) + rng.standard_normal((n, N))


class TooNarrow:
    """An inference whose posteriors are three fifths as wide as they should be."""

    def __init__(self, infer):
        self.infer = infer

    def __call__(self, *args):
        raise AssertionError("one at a time, where many can be inferred from at once")

    def infer_many(self, *args):
        draws = self.infer.infer_many(*args)
        return {name: x.mean(1)[:, None] + 0.6 * (x - x.mean(1)[:, None]) for name, x in draws.items()}


_labs = {}


@pytest.fixture
def lab(in_float64):
    if in_float64 not in _labs:
        _labs[in_float64] = Lab(in_float64)
    return _labs[in_float64]


# -- encoders ----------------------------------------------------------------------------------------------------------
def test_encoders_agree_between_the_packages():
    torch, jax = backends.get("torch"), backends.get("jax")
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((4, 5, 2)), rng.random((4, 5)) < 0.6
    wild = np.where(rng.random(x.shape) < 0.1, 1e3, x) * [1.0, 100.0] + [0.0, 7.0]
    for kind, args, inputs in [
        ("MLPEncoder", (2, 3, (8,)), (x,)),
        ("SetEncoder", (2, 3, (8,)), (x, mask)),
        ("SetEncoder", (2, 3), (x,)),
    ]:
        theirs = getattr(torch.pkg.encoders, kind)(*args).double()
        ours = getattr(jax.pkg.encoders, kind)(*args, key=jax.jax.random.key(0))
        ours = jax.jax.tree.map(lambda a: a.astype("float64") if jax.eqx.is_inexact_array(a) else a, ours)
        standard = torch.pkg.encoders.StandardizedEncoder(
            theirs, [torch.array(a) for a in (wild, mask)[: len(inputs)]], torch.torch.float64
        )
        same = jax.pkg.encoders.StandardizedEncoder(
            ours, [jax.array(a) for a in (wild, mask)[: len(inputs)]], "float64"
        )
        for name, value in torch.state(standard).items():
            if name.startswith(("loc", "scale")):
                np.testing.assert_allclose(jax.state(same)[name], value, rtol=1e-10)
        same = jax.with_state(same, torch.state(standard))
        np.testing.assert_allclose(
            jax.numpy(same(*(jax.array(a) for a in inputs))),
            torch.numpy(standard(*(torch.array(a) for a in inputs))),
            atol=1e-10,
        )
    median, half = (
        np.asarray(a) for a in jax.pkg.encoders.location_and_scale(jax.array(rng.standard_normal((99999, 1))))
    )
    assert abs(median[0]) < 0.02 and half[0] == pytest.approx(0.9945, abs=0.02)  # of the normal's quantiles


def test_standardised_data_keep_their_order_and_are_bounded_by_a_logarithm(lab):
    column = np.r_[np.random.default_rng(0).standard_normal(999), 1e9][:, None]
    encoder = lab.pkg.encoders.StandardizedEncoder(lambda x: x, [lab.array(5.0 + 3.0 * column)])
    y = np.asarray(encoder(lab.array(5.0 + 3.0 * column)))[:, 0]
    assert (np.diff(y[np.argsort(column[:, 0])]) > 0).all() and 20 < y[-1] < 30
    assert np.quantile(y, [0.16, 0.84]) == pytest.approx([-1, 1], abs=0.1)
    constant = lab.pkg.encoders.StandardizedEncoder(lambda x: x, [lab.array(np.full((9, 1), 5.0))])
    assert np.asarray(constant(lab.array([[5.0], [6.0]]))) == pytest.approx(np.array([[0.0], [1.0]]))


def test_a_set_has_no_order_and_no_padding(lab):
    encoder = lab.encoder("SetEncoder", 2, 3, (8,))
    call = lambda *arrays: np.asarray(encoder(*map(lab.array, arrays)).__array__())  # noqa: E731
    if lab.torch:
        call = lambda *arrays: encoder(*map(lab.array, arrays)).numpy(force=True)  # noqa: E731
    x = np.random.default_rng(0).standard_normal((6, 2))
    whole = call(x)
    np.testing.assert_allclose(call(x[::-1]), whole, rtol=1e-12)
    padded = np.concatenate([x, np.full((3, 2), np.nan)])
    np.testing.assert_allclose(call(padded, np.arange(9) < 6), whole, rtol=1e-12)
    assert not np.allclose(call(np.concatenate([x, x])), whole)  # the size is a feature
    blind = lab.encoder("SetEncoder", 2, 3, (8,), size_feature=False)
    first, second = (blind(lab.array(np.concatenate([x] * k))) for k in (1, 2))
    np.testing.assert_allclose(*(np.asarray(a.detach() if lab.torch else a) for a in (first, second)), rtol=1e-12)
    assert np.isfinite(call(x, np.zeros(6, bool))).all()
    with pytest.raises(ValueError, match=r"SetEncoder: data have shape \(6, 3\), but expected \(\.\.\., n, in_dim\)"):
        encoder(lab.array(np.zeros((6, 3))))
    with pytest.raises(ValueError, match="mask has shape"):
        encoder(lab.array(x), lab.array(np.ones(5, bool)))
    with pytest.raises(ValueError, match="MLPEncoder: data have shape"):
        lab.encoder("MLPEncoder", 2, 3)(lab.array(np.zeros(3)))
    with pytest.raises(ValueError, match="out_dim must be at least 1"):
        lab.encoder("MLPEncoder", 2, 0)


# -- the guide ---------------------------------------------------------------------------------------------------------
def svi(lab, guide, sets, steps):
    """Trains a guide by the ecosystem's SVI, a data set a step; returns its parameters before and after, by name."""
    if lab.jax:
        run = lab.infer.SVI(lab.mean, guide, lab.ppl.optim.Adam(5e-3), lab.infer.Trace_ELBO(num_particles=16))
        state = run.init(*lab.key(), lab.array(sets[0]))
        before = run.get_params(state)
        x = lab.array(sets)
        state, _ = lab.jax.jit(lambda s: lab.jax.lax.scan(run.update, s, x[np.arange(steps) % len(sets)]))(state)
        flat = lambda params: {f"{a}.{b}": np.asarray(v) for a, p in params.items() for b, v in p.items()}  # noqa: E731
        return flat(before), flat(run.get_params(state)), run.get_params(state)
    lab.key()
    lab.ppl.clear_param_store()
    elbo = lab.infer.Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    run = lab.infer.SVI(lab.mean, guide, lab.ppl.optim.Adam({"lr": 5e-3}), elbo)
    guide(lab.array(sets[0]))
    read = lambda: {n: p.detach().numpy().copy() for n, p in guide.named_parameters()}  # noqa: E731
    before = read()
    for i in range(steps):
        run.step(lab.array(sets[i % len(sets)]))
    return before, read(), None


def test_svi_trains_the_encoder_and_the_guide_follows_the_data(lab):
    guide = lab.pkg.AutoFlow(lab.mean, lab.realnvp, encoder=lab.encoder("SetEncoder", 1, 8, (16,)), data=as_set)
    sets = data_sets(200)
    before, after, params = svi(lab, guide, sets, 400)
    moved = [name for name in before if "encoder" in name and not np.allclose(before[name], after[name], atol=1e-3)]
    fixed = [name for name in before if name.split(".")[-2:][0] in ("loc", "scale") and "encoder" in name]
    assert len(moved) == len([n for n in before if "encoder" in n]) - len(fixed) >= 8
    assert all(np.array_equal(before[name], after[name]) for name in fixed)
    assert len(fixed) == (2 if lab.jax else 0)  # the statistics: buffers in torch
    found, expected = [], []
    if lab.jax:
        sample = lab.jax.jit(lambda x: guide.sample_posterior(lab.key()[0], params, x, sample_shape=(400,)))
    for x in data_sets(20, seed=1):
        if lab.jax:
            draws = sample(lab.array(x))
            np.testing.assert_allclose(draws["twice"], 2 * draws["theta"], rtol=1e-6)
            draws = np.asarray(draws["theta"])
        else:
            draws = guide.get_posterior(lab.array(x)).sample((400,)).numpy()
        found.append([draws.mean(), draws.std()])
        expected.append(posterior_of_mean(x)[:2])
    (means, sds), (true_means, true_sds) = np.transpose(found), np.transpose(expected)
    assert np.median(np.abs(means - true_means)) < 0.5 * true_sds[0] and np.corrcoef(means, true_means)[0, 1] > 0.9
    assert np.median(sds) == pytest.approx(true_sds[0], rel=0.3)
    predictive = {"params": params} if lab.jax else {}
    run = lab.infer.Predictive(lab.mean, guide=guide, num_samples=3, return_sites=["theta"], **predictive)
    assert run(*lab.key(), lab.array(sets[0]))["theta"].reshape(-1).shape == (3,)


def test_the_guide_of_one_data_set_is_that_of_all_at_its_context(lab):
    """Its densities, with a full-rank map too; and the guide starts as a normal, whatever the data."""
    for full_rank in (False, True):
        encoder = lab.encoder("SetEncoder", 1, 8, (16,))
        guide = lab.pkg.AutoFlow(
            lab.mean, lab.realnvp, encoder=encoder, data=as_set, full_rank=full_rank, init_scale=0.3
        )
        x, other = (lab.array(x) for x in data_sets(2))
        u = lab.array(np.linspace(-1, 1, 5)[:, None])
        if lab.jax:
            guide.log_density(x)
            with lab.ppl.handlers.seed(rng_seed=0), lab.ppl.handlers.trace() as trace:
                guide(x)
            params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
            at, own = guide.at_data(params, other)
            of_all, of_one = guide.get_posterior(params, other), at.get_posterior(own)
            loc = guide.init_loc
        else:
            guide(x)
            at = guide.at_data(other)
            of_all, of_one, loc = guide.get_posterior(other), at.get_posterior(), guide.init_loc
        assert at.encoder is None
        values = [np.asarray(q.log_prob(u).detach() if lab.torch else q.log_prob(u)) for q in (of_all, of_one)]
        np.testing.assert_allclose(*values, rtol=1e-6)
        expected = stats.norm(np.asarray(loc)[0], 0.3).logpdf(np.asarray(u)[:, 0])
        np.testing.assert_allclose(values[0], expected, rtol=1e-5)


# -- neural posterior estimation ---------------------------------------------------------------------------------------
@pytest.mark.optimised
def test_posteriors_of_a_normal_mean(lab):
    vi, sets = lab.trained(), data_sets(300)
    draws = np.asarray(vi.sample_posteriors(*lab.key(2), 1000, lab.array(sets))["theta"])
    exact = np.array([posterior_of_mean(x) for x in sets])
    assert np.sqrt(np.mean(((draws.mean(1) - exact[:, 0]) / exact[:, 1]) ** 2)) < 0.1
    sd_errors = np.abs(draws.std(1) / exact[:, 1] - 1)
    assert np.sqrt(np.mean(sd_errors**2)) < 0.05
    assert np.quantile(sd_errors, 0.99) < 0.2  # the data sets farthest out are hardly ever simulated
    optimum = 0.5 * np.log(2 * np.pi * np.e) + np.log(exact[0, 1])  # the entropy of every posterior
    assert vi.history.validation[-1, 1] == pytest.approx(optimum, abs=0.07)
    for x, (mean, sd, evidence) in zip(sets[:1], exact, strict=False):
        posterior = vi.run(*lab.key(), lab.array(x))
        assert isinstance(posterior, lab.pkg.FlowPosterior)
        sites = lab.sample(posterior, 2000)
        assert sites["theta"].mean() == pytest.approx(mean, abs=0.25 * sd)
        np.testing.assert_allclose(sites["twice"], 2 * sites["theta"], rtol=1e-6)
        assert posterior.pareto_k < 0.7 and posterior.log_evidence().value == pytest.approx(evidence, abs=0.01)
        assert posterior.elbo.value == pytest.approx(evidence, abs=0.05)
        at = mean + sd * np.linspace(-2, 2, 5)
        log_prob = np.asarray(posterior.log_prob({"theta": lab.array(at)}))
        assert log_prob == pytest.approx(stats.norm(mean, sd).logpdf(at), abs=0.4)
    assert "Interrupted" not in posterior.verdict()
    assert "posterior" in posterior.to_arviz(100)


@pytest.mark.slow
def test_chains_from_an_amortised_posterior(lab):
    x = data_sets(1)[0]
    mean, sd, evidence = posterior_of_mean(x)
    refined = lab.trained().run(*lab.key(), lab.array(x)).refine(*lab.key(), "flow_mh", progress_bar=False)
    theta = np.asarray(refined.get_samples()["theta"])
    assert theta.mean() == pytest.approx(mean, abs=0.1 * sd) and theta.std() == pytest.approx(sd, rel=0.1)
    assert refined.log_evidence().value == pytest.approx(evidence, abs=0.02)


def test_calibration_of_a_thousand_data_sets_takes_seconds(lab):
    vi, begin = lab.trained(), time.perf_counter()
    found = lab.calibrate(vi, 1000)
    assert time.perf_counter() - begin < 60  # on a busy machine
    assert found.num_simulations == 1000 and found.verdict().startswith("Calibrated"), found.verdict()
    for name in ("theta", "log_likelihood"):
        for level, estimate in found.coverage()[name].items():
            assert estimate.value == pytest.approx(level, abs=max(0.02, 3 * (level * (1 - level) / 1000) ** 0.5))
    assert lab.calibrate(TooNarrow(vi), 300).verdict().startswith("Miscalibrated")


def test_calibration_of_many_is_that_of_one_after_the_other(lab, no_warnings):
    vi, n = lab.trained(), 10 if lab.jax else 100
    many = lab.calibrate(vi, n)
    one = lab.calibrate(lambda *args: vi(*args), n)
    assert many.ranks.keys() == one.ranks.keys()
    if lab.jax:  # the same keys
        for name in many.ranks:
            np.testing.assert_allclose(many.true[name], one.true[name], rtol=1e-9)
            assert np.abs(many.ranks[name] - one.ranks[name]).max() <= 1
    else:
        assert stats.ks_2samp(many.ranks["theta"], one.ranks["theta"]).pvalue > 0.001


def test_ranks_among_draws_far_from_the_truth(lab):
    """All draws lie below it, and fit the data worse; and each data set is compared with its own truth."""

    class Far:
        def __call__(self, *args):
            raise AssertionError("one at a time, where many can be inferred from at once")

        def infer_many(self, *args):
            values, _, _, n = args[-4:]
            return {"theta": lab.array(np.full((len(values["x"]), n), -1e3))}

    found = lab.calibrate(Far(), 12, num_draws=9)
    for name in ("theta", "log_likelihood"):
        np.testing.assert_array_equal(found.ranks[name], np.full(12, 9))
    assert len(set(found.true["theta"])) == len(set(found.true["log_likelihood"])) == 12


@pytest.mark.slow
def test_calibration_of_refined_posteriors(lab, no_warnings):
    vi = copy.copy(lab.trained())
    vi.refine_steps = 50
    assert lab.calibrate(vi, 20, num_draws=9).verdict().startswith("Calibrated")


@pytest.mark.optimised
@slow_in_jax
def test_sets_of_varying_size(lab):
    """The sizes are drawn with the data, and the width of the posterior follows them."""
    encoder = lab.encoder("SetEncoder", 1, 8, (32,))
    vi = lab.amortised(
        lab.masked_mean,
        encoder,
        data=lambda x, present: (x.reshape(-1, 1), present),
        arguments=lab.present,
        num_steps=800,
    )
    vi.fit(*lab.key(), lab.array(np.zeros(N)), lab.array(np.ones(N, bool)))
    for size in (1, 4, 10):
        x, present = data_sets(60, seed=size, loc=0.0), np.arange(N) < size
        exact = np.array([posterior_of_mean(row[:size], 0.0)[:2] for row in x])
        masks = np.broadcast_to(present, x.shape)
        draws = np.asarray(vi.sample_posteriors(*lab.key(), 500, lab.array(x), lab.array(masks))["theta"])
        assert np.sqrt(np.mean(((draws.mean(1) - exact[:, 0]) / exact[:, 1]) ** 2)) < 0.25
        assert np.mean(draws.std(1)) == pytest.approx(exact[0, 1], rel=0.12)
    posterior = vi.run(*lab.key(), lab.array(np.where(present, x[0], 0.0)), lab.array(present))
    evidence = stats.multivariate_normal(np.zeros(N), np.eye(N) + 4.0).logpdf(x[0])
    assert posterior.log_evidence().value == pytest.approx(evidence, abs=0.02)


@pytest.mark.slow
def test_counts_and_their_positive_rate(lab):
    """A keyword argument of integers, a latent that is positive, a fixed set of simulations, a spline flow."""
    encoder = lab.encoder("MLPEncoder", 4, 4, (16,))
    options = {"data": lambda *, y: y, "num_simulations": 20_000, "num_steps": 1500}
    vi = lab.amortised(lab.counts, encoder, lab.nsf, **options)
    vi.fit(*lab.key(), y=lab.array(np.zeros(4)))
    rng = np.random.default_rng(0)
    y = rng.poisson(rng.gamma(3.0, 0.5, (100, 1)), (100, 4)).astype(float)
    draws = np.asarray(vi.sample_posteriors(*lab.key(), 500, y=lab.array(y))["rate"])
    exact = stats.gamma(3.0 + y.sum(1), scale=1 / 6.0)
    assert (draws > 0).all()
    assert np.sqrt(np.mean(((draws.mean(1) - exact.mean()) / exact.std()) ** 2)) < 0.25
    assert np.median(draws.std(1) / exact.std()) == pytest.approx(1, abs=0.12)
    shares = exact.cdf(np.moveaxis(draws, 1, 0)).ravel()
    assert np.quantile(shares, [0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95], abs=0.03)


@pytest.mark.parametrize("given", [pytest.param(False, marks=pytest.mark.slow), True])
def test_elbo_over_data_sets(lab, given):
    sets = {"data_sets": (lab.array(data_sets(500, seed=5)),)} if given else {}
    vi = lab.mean_vi(objective="elbo", num_steps=300, batch_size=32, **sets).fit(*lab.key(), lab.array(np.zeros(N)))
    x = data_sets(100, seed=6)
    exact = np.array([posterior_of_mean(row) for row in x])
    draws = np.asarray(vi.sample_posteriors(*lab.key(), 500, lab.array(x))["theta"])
    assert np.sqrt(np.mean(((draws.mean(1) - exact[:, 0]) / exact[:, 1]) ** 2)) < 0.3
    assert np.median(draws.std(1) / exact[:, 1]) == pytest.approx(1, abs=0.15)
    assert vi.history.validation[-1, 1] == pytest.approx(-exact[:, 2].mean(), abs=1.5)  # of other data sets


def test_refinement_where_the_guide_is_poor(lab):
    """Semi-amortised: data as the prior hardly ever gives them, from the amortised start to their posterior."""
    vi = copy.copy(lab.trained())
    x = data_sets(1, seed=7)[0] + 14.0
    poor = vi.run(*lab.key(), lab.array(x)).elbo.value
    vi.refine_steps = 500
    posterior = vi.run(*lab.key(), lab.array(x))
    evidence = posterior_of_mean(x)[2]
    assert poor < evidence - 0.2 and evidence - 0.1 < posterior.elbo.value < evidence + 0.01
    assert len(posterior.history.elbo) == 500 and posterior.history.gradients == 500 * 256


class Bar:
    """In place of tqdm: Ctrl-C at the second update."""

    def __init__(self, **_):
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def set_postfix(self, **_):
        pass

    def update(self, _):
        self.count += 1
        if self.count == 2:
            raise KeyboardInterrupt


@pytest.mark.optimised
def test_interrupted_training_keeps_the_best_and_a_seed_makes_it_repeatable(lab, monkeypatch):
    monkeypatch.setattr(lab.module("training"), "tqdm", Bar)
    first, second = (lab.mean_vi().fit(*lab.key(1), lab.array(np.zeros(N))) for _ in range(2))
    history, x = first.history, lab.array(data_sets(2))
    steps, scores = history.validation.T
    assert history.interrupted and len(history.losses) == 100
    assert list(steps) == [50, 100] and history.best_step == steps[scores.argmin()]
    np.testing.assert_array_equal(history.losses, second.history.losses)
    draws = [np.asarray(vi.sample_posteriors(*lab.key(), 3, x)["theta"]) for vi in (first, second)]
    np.testing.assert_array_equal(*draws)
    assert not np.array_equal(lab.trained().history.losses[:100], history.losses)  # of another seed
    assert np.isfinite(draws[0]).all()


@pytest.mark.slow
def test_early_stopping(lab):
    vi = lab.mean_vi(num_simulations=60, num_steps=2000, patience=100, learning_rate=0.03)
    history = vi.fit(*lab.key(), lab.array(np.zeros(N))).history
    assert len(history.losses) == history.best_step + 100 < 2000


def test_files(lab, tmp_path):
    vi, x = lab.trained(), lab.array(data_sets(1)[0])
    posterior = vi.run(*lab.key(), x)
    posterior.save(tmp_path / "posterior")
    read = lab.pkg.FlowPosterior.load(tmp_path / "posterior", lab.mean)
    at = {"theta": lab.array(np.linspace(-1.0, 3.0, 5))}
    expected = np.asarray(posterior.log_prob(at))
    np.testing.assert_allclose(np.asarray(read.log_prob(at)), expected, rtol=1e-6)
    vi.save(tmp_path / "guide")
    again = lab.mean_vi().load(tmp_path / "guide", lab.array(np.zeros(N)))
    np.testing.assert_allclose(np.asarray(again.run(*lab.key(), x).log_prob(at)), expected, rtol=1e-6)
    np.testing.assert_array_equal(again.history.losses, vi.history.losses)
    with pytest.raises(ValueError, match="no amortised guide"):
        lab.mean_vi().load(tmp_path / "posterior", x)


def test_guides_travel_between_the_packages(lab, tmp_path):
    if lab.torch:
        pytest.skip("one of the two directions reads what the other package wrote: run from jax")
    lab.trained().save(tmp_path / "guide")
    x, at = data_sets(1)[0], np.linspace(-1.0, 3.0, 5)
    expected = np.asarray(lab.trained().run(*lab.key(), lab.array(x)).log_prob({"theta": lab.array(at)}))
    torch = importlib.import_module("torch")
    torch.set_default_dtype(torch.float64)
    try:
        other = Lab("torch")
        read = other.mean_vi().load(tmp_path / "guide", other.array(np.zeros(N)))
        found = read.run(other.array(x)).log_prob({"theta": other.array(at)})
        read.save(tmp_path / "back")
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    back = lab.mean_vi().load(tmp_path / "back", lab.array(np.zeros(N)))
    np.testing.assert_allclose(
        np.asarray(back.run(*lab.key(), lab.array(x)).log_prob({"theta": lab.array(at)})), expected, rtol=1e-6
    )


# -- simulations -------------------------------------------------------------------------------------------------------
def draw(lab, source, n):
    """By keys as fits have them."""
    if not lab.jax:
        return source.draw(*lab.key(), n)
    return lab.jax.jit(partial(source.draw, n=n))(lab.module("programs").quick_key(*lab.key()))


def test_simulations_are_draws_of_the_joint_distribution(lab):
    """Of latents with several supports, on the unconstrained space; those that overflow are marked."""

    def model(data):
        one = lab.array(1.0)
        a = lab.ppl.sample("a", lab.dist.Beta(2.0 * one, 3.0 * one))
        b = lab.ppl.sample("b", lab.dist.Exponential(2.0 * one))
        c = lab.ppl.sample("c", lab.dist.HalfCauchy(one))
        d = lab.ppl.sample("d", lab.dist.Dirichlet(lab.array([1.0, 2.0])))
        lab.ppl.sample("y", lab.dist.Normal(a + b, c), obs=data["y"])
        lab.ppl.sample("z", lab.dist.Bernoulli(d[0]), obs=data["z"])

    data = {"z": lab.array(1.0), "y": lab.array(0.5), "unused": lab.array(3.0)}
    source = lab.module("prior_predictive").PriorPredictive(model, (data,), {}, ["c", "a", "b", "d"])
    found = draw(lab, source, 2500)
    u = np.asarray(found.unconstrained)
    assert np.asarray(found.finite).all() and u.shape == (2500, 4)
    scale, a, b = np.exp(u[:, 0]), 1 / (1 + np.exp(-u[:, 1])), np.exp(u[:, 2])
    for values, law in [(scale, stats.halfcauchy()), (a, stats.beta(2, 3)), (b, stats.expon(scale=0.5))]:
        assert stats.kstest(values, law.cdf).pvalue > 1e-3
    args, _ = source.call(tuple(x[:4] for x in found.data))
    assert args[0]["unused"] is data["unused"]
    y, z = (np.asarray(source.call(found.data)[0][0][name]) for name in "yz")
    assert stats.kstest((y - a - b) / scale, "norm").pvalue > 1e-3
    assert z.mean() == pytest.approx(1 / 3, abs=4 * (2 / 9 / 2500) ** 0.5)
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(0, abs=0.08)  # drawn independently

    def overflowing(x):
        s = lab.ppl.sample("s", lab.dist.Normal(0.0, 600.0 + 0.0 * x))
        lab.ppl.sample("x", lab.dist.Normal(lab.backend.array(1.0) * np.e**s, 1.0), obs=x)

    source = lab.module("prior_predictive").PriorPredictive(overflowing, (lab.array(0.0),), {}, ["s"])
    found = draw(lab, source, 500)
    share = np.asarray(found.finite).mean()
    assert share == pytest.approx(stats.norm(0, 600).cdf(709.8), abs=0.06)
    assert np.isfinite(np.asarray(found.data[0])).all() and np.isfinite(np.asarray(found.unconstrained)).all()


def test_counts_are_simulated(lab):
    """jax draws Poisson numbers by keys of its own generator alone, which is not that of fits."""
    simulate, drawn = lab.module("prior_predictive").PriorPredictive, {}
    if lab.jax:
        drawn = {"arguments": lambda key: {"y": 1.0 * lab.jax.random.poisson(key, 3.0, (4,))}}
    for options in ({}, drawn):
        found = draw(lab, simulate(lab.counts, (), {"y": lab.array(np.zeros(4))}, ["rate"], **options), 1000)
        y, rate = np.asarray(found.data[0]), np.exp(np.asarray(found.unconstrained)[:, 0])
        assert stats.kstest(rate, stats.gamma(3, scale=0.5).cdf).pvalue > 1e-3
        assert (y == y.round()).all() and np.var((y - rate[:, None]) / rate[:, None] ** 0.5) == pytest.approx(
            1, abs=0.1
        )


# -- flows as parts of models ------------------------------------------------------------------------------------------
def register(lab, name, flow):
    """The flow with trainable parameters, inside a model."""
    return lab.pkg.flow_module(name, flow) if lab.jax else lab.ppl.module(name, flow)


def build(lab, factory, *args, **kwargs):
    return factory(*args, **kwargs, **({"key": lab.jax.random.key(0)} if lab.jax else {}))


def train(lab, model, guide, args, steps, rate=0.02):
    """Trains model and guide by the ecosystem's SVI, and returns how to evaluate something at its parameters."""
    if lab.jax:
        run = lab.infer.SVI(model, guide, lab.ppl.optim.Adam(rate), lab.infer.Trace_ELBO())
        result = run.run(*lab.key(), steps, *args, progress_bar=False)
        return lambda f: lab.ppl.handlers.substitute(f, data=result.params)()
    lab.key()
    lab.ppl.clear_param_store()
    run = lab.infer.SVI(model, guide, lab.ppl.optim.Adam({"lr": rate}), lab.infer.Trace_ELBO())
    for _ in range(steps):
        run.step(*args)
    return lambda f: f()


def test_a_conditional_flow_as_likelihood(lab):
    """Maximum likelihood in a model: the density of ``y`` given ``c`` is found, location and scale."""
    rng = np.random.default_rng(0)
    c = rng.uniform(-1, 1, (2000, 1))
    y = 1.0 + 2.0 * c + np.exp(0.8 * c) * rng.standard_normal((2000, 1))
    transforms, univariate = lab.pkg.transforms, lab.pkg.univariate
    flow = build(lab, transforms.Elementwise, 1, univariate.Affine(), (8,), context_dim=1)
    base = lab.module("distributions").standard_base(1, like=lab.array(y))

    def density(c):
        return lab.pkg.ConditionalFlowDistribution(base, register(lab, "flow", flow)).condition(c)

    def model(c, y):
        with lab.ppl.plate("data", len(y)):
            lab.ppl.sample("y", density(c), obs=y)

    at = train(lab, model, lambda *args: None, (lab.array(c), lab.array(y)), 500)
    points = lab.array(np.array([[-0.8], [0.0], [0.8]]))
    found = at(lambda: density(points).log_prob(1.0 + 2.0 * points))
    found = np.asarray(found.detach() if lab.torch else found)
    # at the conditional means
    assert found == pytest.approx(stats.norm.logpdf(0) - 0.8 * np.array([-0.8, 0.0, 0.8]), abs=0.12)


def test_a_flow_as_prior_of_local_latents(lab):
    """The prior of latents in a plate is trained with the guide: two modes, where the normal has one."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((400, 1)) < 0.5, -2.0, 2.0) + 0.3 * rng.standard_normal((400, 1))
    flow = lab.pkg.transforms.Elementwise(1, lab.pkg.univariate.RationalQuadraticSpline(8, 5.0))
    base = lab.module("distributions").standard_base(1, like=lab.array(x))

    def prior():
        return lab.pkg.FlowDistribution(base, register(lab, "prior", flow))

    def model(x):
        with lab.ppl.plate("data", len(x)):
            z = lab.ppl.sample("z", prior())
            lab.ppl.sample("x", lab.dist.Normal(z, 0.2).to_event(1), obs=x)

    def guide(x):
        with lab.ppl.plate("data", len(x)):
            lab.ppl.sample("z", lab.dist.Normal(x, 0.2).to_event(1))

    at = train(lab, model, guide, (lab.array(x),), 400)
    found = at(lambda: prior().log_prob(lab.array(np.array([[-2.0], [0.0], [2.0]]))))
    found = np.asarray(found.detach() if lab.torch else found)
    assert min(found[0], found[2]) > -1.6 and found[1] < -3.0


def test_a_flow_of_random_parameters(lab):
    """Its density is that of the model written out; parameters without a prior are trained."""
    affine = lab.pkg.transforms.ElementwiseAffine(2)
    random_flow_module, seen = lab.pkg.random_flow_module, lab.array(np.array([0.5, -1.0]))
    one = lab.array(1.0)

    def model(prior):
        base = lab.module("distributions").standard_base(2, like=seen)
        flow = random_flow_module("flow", affine, prior)
        lab.ppl.sample("x", lab.pkg.FlowDistribution(base, flow), obs=seen)

    def trace(prior):
        if lab.jax:
            with lab.ppl.handlers.seed(rng_seed=0):
                sites = lab.ppl.handlers.trace(model).get_trace(prior)
            return sites, {
                n: np.asarray(s["fn"].log_prob(s["value"])) for n, s in sites.items() if s["type"] == "sample"
            }
        lab.ppl.clear_param_store()
        sites = lab.ppl.poutine.trace(model).get_trace(prior)
        sites.compute_log_prob()
        sites = {n: s for n, s in sites.nodes.items() if n[0] != "_"}
        return sites, {n: s["log_prob"].detach().numpy() for n, s in sites.items() if s["type"] == "sample"}

    value = lambda site: np.asarray(site["value"].detach() if lab.torch else site["value"])  # noqa: E731
    by_function = lambda name, shape: lab.dist.Normal(3.0 * one if name == "loc" else 0.0 * one, 0.5)  # noqa: E731
    for prior, loc_of_loc in ((lab.dist.Normal(0.0 * one, 0.5), 0.0), (by_function, 3.0)):
        sites, log_prob = trace(prior)
        loc, log_scale = value(sites["flow.loc"]), value(sites["flow.log_scale"])
        assert loc.shape == (2,) and set(log_prob) == {"flow.loc", "flow.log_scale", "x"}
        assert log_prob["flow.loc"] == pytest.approx(stats.norm(loc_of_loc, 0.5).logpdf(loc).sum())
        assert log_prob["x"] == pytest.approx(stats.norm(loc, np.exp(log_scale)).logpdf(np.asarray(seen)).sum())
    sites, log_prob = trace({"loc": lab.dist.Normal(0.0 * one, 0.5)})
    assert set(log_prob) == {"flow.loc", "x"} and any(site["type"] == "param" for site in sites.values())
    assert log_prob["x"] == pytest.approx(stats.norm(value(sites["flow.loc"]), 1.0).logpdf(np.asarray(seen)).sum())
    with pytest.raises(ValueError, match=r"prior names \['scale'\], but the parameters are \['loc', 'log_scale'\]"):
        trace({"scale": lab.dist.Normal(0.0, 1.0)})


@pytest.mark.slow
def test_the_posterior_of_a_flows_parameters(lab):
    """By the ecosystem's own autoguide: a normal mean, which has a closed form."""
    x = 0.7 + np.random.default_rng(0).standard_normal((20, 1))
    flow, one = lab.pkg.transforms.ElementwiseAffine(1), lab.array(1.0)
    base = lab.module("distributions").standard_base(1, like=lab.array(x))
    prior = lambda name, shape: lab.dist.Normal(0.0 * one, 1.0 if name == "loc" else 1e-3)  # noqa: E731

    def model(x):
        density = lab.pkg.FlowDistribution(base, lab.pkg.random_flow_module("flow", flow, prior))
        with lab.ppl.plate("data", len(x)):
            lab.ppl.sample("x", density, obs=x)

    posterior = lab.pkg.FlowVI(model, lab.realnvp, num_steps=600, progress_bar=False).run(*lab.key(), lab.array(x))
    loc = lab.sample(posterior, 4000)["flow.loc"]
    assert loc.mean() == pytest.approx(x.sum() / 21, abs=0.03) and loc.std() == pytest.approx(21**-0.5, rel=0.06)


# -- errors ------------------------------------------------------------------------------------------------------------
def test_errors_of_the_guide(lab):
    encoder = lab.encoder("MLPEncoder", N, 4)
    with pytest.raises(TypeError, match="encoder must be callable, but got int"):
        lab.pkg.AutoFlow(lab.mean, encoder=3)
    with pytest.raises(ValueError, match="data= is what an encoder sees"):
        lab.pkg.AutoFlow(lab.mean, data=as_set)
    with pytest.raises(ValueError, match="noncentered=True"):
        lab.pkg.AutoFlow(lab.mean, encoder=encoder, noncentered=True)
    with pytest.raises(ValueError, match=r"MLPEncoder: data have shape .*in_dim=10"):
        lab.pkg.AutoFlow(lab.mean, encoder=encoder).log_density(lab.array(np.zeros(3)))
    with pytest.raises(ValueError, match=r"encoder returned shape \(1,\).*expected \(1, c\)"):
        lab.pkg.AutoFlow(lab.mean, encoder=lambda x: x.sum(-1)).log_density(lab.array(np.zeros(3)))
    with pytest.raises(ValueError, match="no positional argument"):
        lab.pkg.AutoFlow(lab.counts, encoder=encoder).log_density(y=lab.array(np.zeros(N)))
    params = ({},) if lab.jax else ()
    with pytest.raises(ValueError, match="at_data needs a guide with an encoder"):
        lab.pkg.AutoFlow(lab.mean).at_data(*params, lab.array(np.zeros(3)))


def test_errors_of_the_training(lab):
    encoder, x = lab.encoder("MLPEncoder", N, 4), lab.array(np.zeros(N))
    for options, message in [
        ({"objective": "kl"}, "objective must be one of"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1"),
        ({"patience": 0}, "patience must be an integer of at least 1"),
        ({"num_simulations": 1}, "num_simulations must be at least 2"),
        ({"num_simulations": 3}, "holds out 0 of them"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"validation": 1.0}, "validation must be a share"),
        ({"refine_steps": -1}, "refine_steps must not be negative"),
        ({"data_sets": (x,)}, 'only objective="elbo" can use'),
        ({"data_sets": x, "objective": "elbo"}, "must be the tuple"),
    ]:
        with pytest.raises(ValueError, match=message):
            lab.amortised(lab.mean, encoder, **options)
    with pytest.raises(TypeError, match="AmortisedFlowVI: encoder must be callable, but got None"):
        lab.amortised(lab.mean, None)
    vi = lab.amortised(lab.mean, encoder)
    for call in (lambda: vi.run(*lab.key(), x), lambda: vi.sample_posteriors(*lab.key(), 3, x), lambda: vi.guide):
        with pytest.raises(RuntimeError, match=r"call fit\(\.\.\.\) first"):
            call()

    def constant(x):
        lab.ppl.sample("y", lab.dist.Normal(lab.ppl.sample("z", lab.dist.Normal(0.0, 1.0)), 1.0), obs=lab.array(0.3))

    def factor(x):
        lab.ppl.sample("x", lab.dist.Normal(0 * x + lab.ppl.sample("z", lab.dist.Normal(0.0, 1.0)), 1.0), obs=x)
        lab.ppl.factor("f", lab.array(0.1))

    def unobserved(x):
        lab.ppl.sample("z", lab.dist.Normal(0.0, 1.0))

    def wide(x):
        z = lab.ppl.sample("z", lab.dist.Normal(0.0, 1.0))
        with lab.ppl.plate("data", len(x)):
            lab.ppl.sample("x", lab.dist.LogNormal(1e4 + z, 1.0), obs=x)

    simulate = lab.module("prior_predictive").PriorPredictive
    for model, message in [
        (constant, "data of site 'y' are none of the model's arguments"),
        (factor, r"factor site\(s\) \['f'\]"),
        (unobserved, "no observed sites"),
    ]:
        with pytest.raises(ValueError, match=message):
            simulate(model, (x,), {}, ["z"])
    with pytest.raises(ValueError, match="arguments must return a tuple"):
        simulate(lab.mean, (x,), {}, ["theta"], arguments=lambda *key: x)
    with pytest.raises(RuntimeError, match="none of 20 simulations of the model was finite"):
        lab.amortised(wide, encoder).fit(*lab.key(), x + 1.0)
    trained, many = lab.trained(), lab.array(data_sets(2))
    for args, message in [
        ((3, many, 3), r"arguments, \(_, _\), .* simulated, \(_\)\. Pass them in the same way"),
        ((3, many[0]), r"an axis in front of .*\('n', 10\), but got shape \(10,\)"),
        ((0, many), "num_samples must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            trained.sample_posteriors(*lab.key(), *args)
    with pytest.raises(ValueError, match="AmortisedFlowVI: .*Check that the data are"):
        trained.run(*lab.key(), many[0] * np.nan)
    if lab.jax:
        with pytest.raises(TypeError, match="AmortisedFlowVI: rng_key must be a key"):
            trained.run(many[0])


def test_data_that_the_model_changes_are_not_those_it_is_given(lab):
    """As they are for zeros, of which only the shape matters."""
    as_array = lab.jax.numpy.asarray if lab.jax else lab.torch.as_tensor
    simulate = lab.module("prior_predictive").PriorPredictive

    def model(x, change):
        theta = lab.ppl.sample("theta", lab.dist.Normal(0.0, 1.0))
        with lab.ppl.plate("data", N):
            lab.ppl.sample("x", lab.dist.Normal(theta, 1.0), obs=change(as_array(x)))

    for change in (lambda x: x / 10, lambda x: 2 * x, abs, lambda x: x**3):
        with pytest.raises(ValueError, match="data of site 'x' are none of the model's arguments"):
            simulate(model, (lab.array(np.zeros(N)), change), {}, ["theta"])
    for zeros in (np.zeros(N), np.zeros(N, bool)):
        assert simulate(model, (zeros, lambda x: x), {}, ["theta"]).observed == {"x": 0}


# -- the tutorial ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", [pytest.param("numpyro", marks=pytest.mark.slow), "pyro"])
def test_a_vae_gains_by_flows(backend, monkeypatch):
    """The tutorial's, by fewer steps: the held-out ELBO with flows is above that of the plain one."""
    pytest.importorskip(backend)
    path = Path(__file__).parents[2] / "tutorials" / "vae.py"
    spec = importlib.util.spec_from_file_location("vae", path)
    vae = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vae)
    monkeypatch.setattr(vae, "STEPS", 250)
    monkeypatch.setattr(vae, "HELD_OUT", 300)
    monkeypatch.setattr(vae, "PARTICLES", 5)
    train = getattr(vae, f"train_with_{backend}")
    plain, flows = train(False), train(True)
    assert -60 < plain < flows - 1 < -10
