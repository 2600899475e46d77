"""AutoHierarchicalFlow in both packages: closed forms, subsampling, structure, data and errors."""

import copy
import functools
import importlib
import itertools
import math
import pickle

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

SCALE = 0.7  # of the groups' means, where it is known


class NumPyro:
    """What the tests ask of the two packages; here of ``numpyro_flows``."""

    def __init__(self):
        self.ppl, self.jax = importlib.import_module("numpyro"), importlib.import_module("jax")
        self.np, self.infer = self.jax.numpy, importlib.import_module("numpyro.infer")
        self.dist, self.handlers = importlib.import_module("numpyro.distributions"), self.ppl.handlers
        self.flows = importlib.import_module("numpyro_flows").flows
        self.guides = importlib.import_module("numpyro_flows.guides.hierarchical")
        self.conditioners = importlib.import_module("numpyro_flows.conditioners")
        self.compiled = {}

    array = staticmethod(lambda x: importlib.import_module("jax.numpy").asarray(x))

    def mask(self, mask):
        return self.handlers.mask(mask=mask)

    def plate(self, name, size, batch=None, index=None, dim=None):
        with self.handlers.substitute(data={} if index is None else {name: index}):
            return self.ppl.plate(name, size, subsample_size=batch if index is None else len(index), dim=dim)

    def mlp(self, features, context_dim):
        return self.conditioners.MLP(features, (8,), context_dim, key=self.jax.random.key(7))

    def guide(self, model, **kwargs):
        small = functools.partial(self.flows.realnvp, num_layers=2, hidden_dims=(8,))
        kwargs = {"global_flow": small, "local_flow": small, **kwargs}
        return self.guides.AutoHierarchicalFlow(model, **kwargs)

    def start(self, guide, *args):
        with self.handlers.seed(rng_seed=0), self.handlers.trace() as trace:
            guide(*args)
        return {name: dict(site["value"]) for name, site in trace.items() if site["type"] == "param"}

    def get(self, guide, params, group):
        return {name: np.asarray(value) for name, value in params[f"auto_{group}$params"].items()}

    def put(self, guide, params, group, values):
        values = {name: self.np.asarray(value, dtype=float) for name, value in values.items()}
        return {**params, f"auto_{group}$params": {**params[f"auto_{group}$params"], **values}}

    def fit(self, model, guide, *args, steps, rate, particles=8, loss=None):
        schedule = lambda i: rate * 0.5 * (1 + self.np.cos(math.pi * i / steps))  # noqa: E731
        loss = self.infer.Trace_ELBO(num_particles=particles) if loss is None else loss
        svi = self.infer.SVI(model, guide, self.ppl.optim.Adam(schedule), loss)
        return svi.run(self.jax.random.key(0), steps, *args, progress_bar=False).params

    def elbos(self, model, guide, params, *args, n=1, seed=0, loss=None):
        """ELBO of every of ``n`` draws."""
        loss = self.infer.Trace_ELBO() if loss is None else loss
        keys = self.jax.random.split(self.jax.random.key(seed), n)
        arrays, others = [isinstance(x, self.jax.Array) for x in args], list(args)

        def elbo(key, params, data):
            data = iter(data)
            full = [next(data) if is_array else x for is_array, x in zip(arrays, others, strict=True)]
            return loss.loss(key, params, model, guide, *full)

        data = [x for is_array, x in zip(arrays, args, strict=True) if is_array]
        signature = (
            id(guide),
            type(loss),
            tuple(None if is_array else x for is_array, x in zip(arrays, args, strict=True)),
        )
        if signature not in self.compiled:
            self.compiled[signature] = self.jax.jit(self.jax.vmap(elbo, (0, None, None)))
        return -np.asarray(self.compiled[signature](keys, params, data))

    def gradients(self, model, guide, params, *args, n=1):
        """Mean gradients of the ELBO over ``n`` draws and their standard errors, by parameter."""
        elbo = lambda params, key: -self.infer.Trace_ELBO().loss(key, params, model, guide, *args)  # noqa: E731
        keys = self.jax.random.split(self.jax.random.key(2), n)
        found = self.jax.jit(self.jax.vmap(self.jax.grad(elbo), (None, 0)))(params, keys)
        flat = np.concatenate([np.asarray(x).reshape(n, -1) for x in self.jax.tree.leaves(found)], 1)
        return flat.mean(0), flat.std(0) / math.sqrt(n)

    def slope(self, guide, params, direction, *args):
        """The ELBO's derivative along a direction, at the draw that ``elbos`` makes with ``seed=5``."""
        key = self.jax.random.split(self.jax.random.key(5), 1)[0]
        elbo = lambda params: -self.infer.Trace_ELBO().loss(key, params, guide.model, guide, *args)  # noqa: E731
        found = self.jax.jit(self.jax.grad(elbo))(params)
        return sum(
            (np.asarray(found[f"auto_{group}$params"][name]) * x).sum()
            for group, part in direction.items()
            for name, x in part.items()
        )

    def enumerated_elbo(self):
        return self.infer.TraceEnum_ELBO()

    def enumerated(self, model):
        return importlib.import_module("numpyro.contrib.funsor").config_enumerate(model)

    def draws(self, guide, params, *args, n=1000):
        sample = self.jax.jit(lambda key, params: guide.sample_posterior(key, params, *args, sample_shape=(n,)))
        return {name: np.asarray(value) for name, value in sample(self.jax.random.key(1), params).items()}

    def predictive(self, model, guide, params, *args, n=4):
        draws = self.infer.Predictive(model, guide=guide, params=params, num_samples=n)(self.jax.random.key(0), *args)
        return {name: value.shape for name, value in draws.items()}


class Pyro:
    """The same of ``pyroflows``."""

    def __init__(self):
        self.ppl, self.torch = importlib.import_module("pyro"), importlib.import_module("torch")
        self.np, self.infer = self.torch, importlib.import_module("pyro.infer")
        self.dist = importlib.import_module("pyro.distributions")
        self.flows = importlib.import_module("pyroflows").flows
        self.guides = importlib.import_module("pyroflows.guides.hierarchical")
        self.conditioners = importlib.import_module("pyroflows.conditioners")
        self.ppl.clear_param_store()
        self.ppl.set_rng_seed(0)

    def array(self, x):
        x = self.torch.as_tensor(np.array(x))
        return x.to(self.torch.get_default_dtype()) if x.is_floating_point() else x

    def mask(self, mask):
        return self.ppl.poutine.mask(mask=mask)

    def plate(self, name, size, batch=None, index=None, dim=None):
        return self.ppl.plate(name, size, subsample_size=batch, subsample=index, dim=dim)

    def mlp(self, features, context_dim):
        return self.conditioners.MLP(features, (8,), context_dim)

    guide = NumPyro.guide

    def start(self, guide, *args):
        guide(*args)

    def get(self, guide, params, group):
        module = guide._modules["group_flows"][group]
        return {name: value.detach().numpy().copy() for name, value in module.named_parameters()}

    def put(self, guide, params, group, values):
        parameters = dict(guide._modules["group_flows"][group].named_parameters())
        with self.torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(self.array(value).expand(parameters[name].shape))

    def fit(self, model, guide, *args, steps, rate, particles=8, loss=None):
        schedule = {"optimizer": self.torch.optim.Adam, "optim_args": {"lr": rate}, "T_max": steps}
        optimizer = self.ppl.optim.CosineAnnealingLR(schedule)
        if loss is None:
            loss = self.infer.Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=2)
        svi = self.infer.SVI(model, guide, optimizer, loss)
        for _ in range(steps):
            svi.step(*args)
            optimizer.step()

    def elbos(self, model, guide, params, *args, n=1, seed=0, loss=None):
        self.ppl.set_rng_seed(seed)
        loss = self.infer.Trace_ELBO() if loss is None else loss
        return -np.array([loss.loss(model, guide, *args) for _ in range(n)])

    def gradients(self, model, guide, params, *args, n=1):
        rows = []
        self.ppl.set_rng_seed(2)
        for _ in range(n):
            guide.zero_grad()
            self.infer.Trace_ELBO().loss_and_grads(model, guide, *args)
            rows.append(np.concatenate([-p.grad.numpy().ravel() for p in guide.parameters() if p.grad is not None]))
        return np.mean(rows, 0), np.std(rows, 0) / math.sqrt(n)

    def slope(self, guide, params, direction, *args):
        guide.zero_grad()
        self.ppl.set_rng_seed(5)
        self.infer.Trace_ELBO().loss_and_grads(guide.model, guide, *args)
        found = dict(guide.named_parameters())
        parts = [
            (found[f"group_flows.{g}.{name}"].grad, x) for g, part in direction.items() for name, x in part.items()
        ]
        return -sum((g.numpy() * x).sum() for g, x in parts if g is not None)

    def enumerated_elbo(self):
        return self.infer.TraceEnum_ELBO(max_plate_nesting=1)

    def enumerated(self, model):
        return self.infer.config_enumerate(model)

    def draws(self, guide, params, *args, n=1000):
        self.ppl.set_rng_seed(1)
        return {name: x.numpy() for name, x in guide.sample_posterior(*args, sample_shape=(n,)).items()}

    def predictive(self, model, guide, params, *args, n=4):
        return {
            name: tuple(x.shape) for name, x in self.infer.Predictive(model, guide=guide, num_samples=n)(*args).items()
        }


BACKENDS = [
    pytest.param(("numpyro", NumPyro), id="numpyro", marks=pytest.mark.xdist_group("jax-hierarchical")),
    pytest.param(("pyro", Pyro), id="pyro", marks=pytest.mark.xdist_group("torch-hierarchical")),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    name, make = request.param
    pytest.importorskip(name)
    backend = make()
    if name == "pyro":
        yield backend
        return
    backend.jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than running
    yield backend
    backend.jax.config.update("jax_disable_most_optimizations", False)


# -- a normal hierarchy and its closed form ------------------------------------------------------------------------
def normal_hierarchy(b):
    """``mu ~ N(0, 3), theta_i ~ N(mu, 0.7), y_ij ~ N(theta_i, 1)``; the rows of ``y`` are groups."""

    def model(y, batch=None, index=None, size=None, mask=None):
        mu = b.ppl.sample("mu", b.dist.Normal(0.0, 3.0))
        with b.plate("groups", len(y) if size is None else size, batch, index) as i:
            present = y if size is not None else y[i]
            keep = b.array(np.ones(len(present), bool)) if mask is None else mask[i]
            with b.mask(keep):
                theta = b.ppl.sample("theta", b.dist.Normal(mu, SCALE))
                b.ppl.sample("y", b.dist.Normal(theta[..., None], 1.0).to_event(1), obs=present)

    return model


def observations(num_groups, n=4, seed=0):
    rng = np.random.default_rng(seed)
    return 1.0 + SCALE * rng.normal(size=(num_groups, 1)) + rng.normal(size=(num_groups, n))


def closed_form(y):
    """Mean and sd of ``mu``, means ``(groups,)`` and sd of ``theta``, and the log evidence."""
    num_groups, n = y.shape
    v, mean = SCALE**2 + 1 / n, y.mean(1)
    var = 1 / (1 / 9 + num_groups / v)
    mu, weight = var * mean.sum() / v, SCALE**2 / v
    theta = (1 - weight) * mu + weight * mean
    sd = math.sqrt(SCALE**2 * (1 - weight) + (1 - weight) ** 2 * var)
    covariance = 9 + np.kron(SCALE**2 * np.eye(num_groups), np.ones((n, n))) + np.eye(y.size)
    return mu, math.sqrt(var), theta, sd, multivariate_normal(np.zeros(y.size), covariance).logpdf(y.ravel())


def at_the_posterior(b, guide, y, *args):
    """Parameters at which the guide is the posterior of the normal hierarchy: its flows are the identity."""
    params = b.start(guide, b.array(y), *args)
    mu, sd = closed_form(y)[:2]
    params = b.put(guide, params, "global", {"loc": np.array([mu]), "log_scale": np.log([sd])})
    element = {"loc": y.mean(1, keepdims=True), "log_scale": np.full((len(y), 1), -0.5 * math.log(y.shape[1]))}
    return b.put(guide, params, "groups", element)


def moved(b, guide, params, size=0.2):
    """Every parameter moved by noise, so that no flow is the identity."""
    rng = np.random.default_rng(3)
    for group in guide.groups:
        values = b.get(guide, params, group)
        noise = {name: value + size * rng.normal(size=value.shape) for name, value in sorted(values.items())}
        params = b.put(guide, params, group, noise)
    return params


def test_exact_at_the_posterior(backend):
    """Every draw's ELBO is the evidence there, so location, scale, prior and density of every site are right."""
    y = observations(6)
    guide = backend.guide(normal_hierarchy(backend))
    params = at_the_posterior(backend, guide, y)
    elbos = backend.elbos(guide.model, guide, params, backend.array(y), n=4)
    np.testing.assert_allclose(elbos, closed_form(y)[-1], rtol=1e-5)
    draws = backend.draws(guide, params, backend.array(y), n=4000)
    mu, _, theta, sd, _ = closed_form(y)
    assert draws["theta"].shape == (4000, 6) and abs(draws["mu"].mean() - mu) < 0.02
    np.testing.assert_allclose(draws["theta"].mean(0), theta, atol=0.08 * sd)
    np.testing.assert_allclose(draws["theta"].std(0), sd, rtol=0.06)


def test_trained_on_minibatches(backend):
    y = observations(20)
    guide = backend.guide(normal_hierarchy(backend))
    params = backend.fit(guide.model, guide, backend.array(y), 5, steps=1000, rate=3e-2)
    mu, mu_sd, theta, sd, evidence = closed_form(y)
    elbo = backend.elbos(guide.model, guide, params, backend.array(y), n=200).mean()
    assert evidence - 0.2 < elbo < evidence + 0.1
    draws = backend.draws(guide, params, backend.array(y), n=8000)
    errors = np.abs(draws["theta"].mean(0) - theta) / sd
    assert errors.mean() < 0.05 and errors.max() < 0.2
    assert abs(draws["mu"].mean() - mu) < 0.15 * mu_sd
    np.testing.assert_allclose(draws["theta"].std(0), sd, rtol=0.25)


def test_subsampled_elbo_is_unbiased_draw_by_draw(backend):
    """With exact conditionals what is left depends on ``mu`` alone: the mean over all subsamples is the full ELBO."""
    y = observations(5)
    guide = backend.guide(normal_hierarchy(backend))
    params = at_the_posterior(backend, guide, y)
    params = backend.put(guide, params, "global", {"loc": np.array([0.5]), "log_scale": np.array([-0.2])})
    full = backend.elbos(guide.model, guide, params, backend.array(y), seed=3)[0]
    subsets = list(itertools.combinations(range(5), 2))
    values = [
        backend.elbos(guide.model, guide, params, backend.array(y), None, backend.array(np.array(subset)), seed=3)[0]
        for subset in subsets
    ]
    assert np.std(values) > 1  # they differ, and by a lot
    np.testing.assert_allclose(np.mean(values), full, rtol=1e-5)


def test_subsampled_elbo_is_unbiased_for_any_parameters(backend):
    y = observations(5)
    guide = backend.guide(normal_hierarchy(backend))
    params = moved(backend, guide, at_the_posterior(backend, guide, y), 0.1)
    full = backend.elbos(guide.model, guide, params, backend.array(y), n=400, seed=1)
    part = backend.elbos(guide.model, guide, params, backend.array(y), 2, n=1000, seed=2)
    error = math.hypot(full.std() / math.sqrt(len(full)), part.std() / math.sqrt(len(part)))
    assert abs(full.mean() - part.mean()) < 4 * error < 0.2 * part.std()


def test_density_with_all_parameters_moved(backend):
    """Importance weights average to the evidence for any guide whose density is that of its draws."""
    y = observations(3)
    guide = backend.guide(normal_hierarchy(backend))
    params = moved(backend, guide, at_the_posterior(backend, guide, y), 0.1)
    log_weights = backend.elbos(guide.model, guide, params, backend.array(y), n=1000) - closed_form(y)[-1]
    assert -1.0 < log_weights.mean() < -0.02
    weights = np.exp(log_weights)
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights)) < 0.2


def assert_plain_mean(backend, guide, params, y):
    """The path gradient has the plain one's mean, which is not zero."""
    path, path_error = backend.gradients(guide.model, guide, params, backend.array(y), n=400)
    guide.path_gradient = False
    plain, plain_error = backend.gradients(guide.model, guide, params, backend.array(y), n=400)
    z = (path - plain) / np.hypot(path_error, plain_error).clip(1e-6)
    assert np.abs(plain / plain_error.clip(1e-6)).max() > 5 and np.abs(z).max() < 5


def test_path_gradient(backend):
    """It is zero for every draw where the guide is exact, and has the plain one's mean elsewhere."""
    y = observations(4)
    guide = backend.guide(normal_hierarchy(backend), path_gradient=True)
    params = at_the_posterior(backend, guide, y)
    exact, _ = backend.gradients(guide.model, guide, params, backend.array(y), n=2)
    assert np.abs(exact).max() < 1e-3
    params = moved(backend, guide, params, 0.1)
    assert_plain_mean(backend, guide, params, y)


def test_gradient_is_that_of_the_elbo(backend):
    """The derivative along a direction, at one draw, beside its finite difference."""
    y = observations(4)
    guide = backend.guide(normal_hierarchy(backend))
    params = moved(backend, guide, at_the_posterior(backend, guide, y), 0.3)
    rng, step, start, values = np.random.default_rng(4), 1e-3, {}, []
    for group in guide.groups:
        start[group] = backend.get(guide, params, group)
    direction = {
        g: {name: rng.normal(size=x.shape) for name, x in sorted(values.items())} for g, values in start.items()
    }
    slope = backend.slope(guide, params, direction, backend.array(y))
    for sign in (1, -1):
        for group, x in start.items():
            there = {name: value + sign * step * direction[group][name] for name, value in x.items()}
            params = backend.put(guide, params, group, there)
        values.append(backend.elbos(guide.model, guide, params, backend.array(y), seed=5)[0])
    np.testing.assert_allclose(slope, (values[0] - values[1]) / (2 * step), rtol=0.02)


# -- intercepts and slopes: elements whose latents are correlated --------------------------------------------------
SLOPE_SCALE, COVARIANCE = 0.4, np.array([[0.5, 0.2], [0.2, 0.3]])


def slopes_hierarchy(b, vector=False, chained=False, design=None):
    """``y_ij ~ N(alpha_i + beta_i x_ij, 1)`` with the priors' means ``mu`` and ``mu / 2``; rows of ``y`` are groups.

    :param vector: whether intercept and slope are one site, with a correlated prior.
    :param chained: whether the slope's prior depends on the intercept.
    """

    def model(y, batch=None):
        mu = b.ppl.sample("mu", b.dist.Normal(0.0, 3.0))
        with b.plate("groups", len(y), batch) as i:
            if vector:
                loc = mu[..., None] * b.array(np.array([1.0, 0.5]))
                both = b.ppl.sample("both", b.dist.MultivariateNormal(loc, b.array(COVARIANCE)))
                alpha, beta = both[..., 0], both[..., 1]
            else:
                alpha = b.ppl.sample("alpha", b.dist.Normal(mu, SCALE))
                beta = b.ppl.sample("beta", b.dist.Normal((alpha if chained else mu) / 2, SLOPE_SCALE))
            loc = alpha[..., None] + beta[..., None] * b.array(design)[i]
            b.ppl.sample("y", b.dist.Normal(loc, 1.0).to_event(1), obs=y[i])

    return model


def slopes_data(num_groups=5, n=6):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(num_groups, n)) + 1.5 * rng.normal(size=(num_groups, 1))
    alpha, beta = 1 + SCALE * rng.normal(size=(num_groups, 1)), 0.5 + SLOPE_SCALE * rng.normal(size=(num_groups, 1))
    return x, alpha + beta * x + rng.normal(size=x.shape)


def slopes_posterior(x, y, covariance):
    """Mean and sd of ``mu``, the log evidence, and the pseudo-observations of the elements."""
    rows = np.stack([np.ones_like(x), x], -1)  # (groups, n, 2)
    direction = (rows @ [1.0, 0.5]).ravel()
    noise = np.zeros((x.size, x.size))
    for i, row in enumerate(rows):
        part = slice(i * len(row), (i + 1) * len(row))
        noise[part, part] = row @ covariance @ row.T + np.eye(len(row))
    precision = 1 / 9 + direction @ np.linalg.solve(noise, direction)
    mean = direction @ np.linalg.solve(noise, y.ravel()) / precision
    evidence = multivariate_normal(np.zeros(x.size), noise + 9 * np.outer(direction, direction)).logpdf(y.ravel())
    information = rows.mT @ rows
    factor = np.linalg.cholesky(information[:, ::-1, ::-1])[:, ::-1, ::-1].mT  # lower, and W^T W is the information
    diagonal = np.diagonal(factor, 0, 1, 2)
    loc = np.linalg.solve(information, rows.mT @ y[..., None])[..., 0]
    element = {"loc": loc, "log_scale": -np.log(diagonal), "tril": factor[:, 1:, 0] / diagonal[:, 1:]}
    return mean, precision**-0.5, evidence, element


@pytest.mark.parametrize("vector", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_correlated_elements(backend, vector):
    """Exact for every draw where likelihoods are linear and normal, whatever the subsample; without bias elsewhere."""
    x, y = slopes_data()
    guide = backend.guide(slopes_hierarchy(backend, vector, design=x), path_gradient=True)
    params = backend.start(guide, backend.array(y))
    covariance = COVARIANCE if vector else np.diag([SCALE**2, SLOPE_SCALE**2])
    mean, sd, evidence, element = slopes_posterior(x, y, covariance)
    params = backend.put(guide, params, "global", {"loc": np.array([mean]), "log_scale": np.log([sd])})
    params = backend.put(guide, params, "groups", element)
    elbos = backend.elbos(guide.model, guide, params, backend.array(y), n=4)
    np.testing.assert_allclose(elbos, evidence, rtol=2e-5)
    exact, _ = backend.gradients(guide.model, guide, params, backend.array(y), n=2)
    assert np.abs(exact).max() < 2e-3
    params = moved(backend, guide, params, 0.05)
    weights = np.exp(backend.elbos(guide.model, guide, params, backend.array(y), n=500) - evidence)
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights)) < 0.25
    full = backend.elbos(guide.model, guide, params, backend.array(y), n=200, seed=1)
    part = backend.elbos(guide.model, guide, params, backend.array(y), 2, n=500, seed=2)
    error = math.hypot(full.std() / math.sqrt(len(full)), part.std() / math.sqrt(len(part)))
    assert abs(full.mean() - part.mean()) < 4 * error < 0.3 * part.std()


@pytest.mark.parametrize("vector, batch", [(False, None), (True, None), (False, 2)])
def test_elements_start_at_their_likelihood(backend, vector, batch):
    """All of them, also those that the subsample of the first call does not hold."""
    x, y = slopes_data()
    guide = backend.guide(slopes_hierarchy(backend, vector, design=x))
    params = backend.start(guide, backend.array(y), batch)
    found = backend.get(guide, params, "groups")
    expected = slopes_posterior(x, y, np.eye(2))[-1]
    # but for a thousandth of the largest curvature
    np.testing.assert_allclose(found["loc"], expected["loc"], atol=1e-2)
    np.testing.assert_allclose(found["log_scale"], expected["log_scale"], atol=1e-2)
    np.testing.assert_allclose(found["tril"], expected["tril"], atol=1e-2)


def test_a_subsample_from_around_the_guide_is_refused():
    """In Pyro, where the run ahead for the priors does not see it; in NumPyro it does."""
    pytest.importorskip("pyro")
    b = Pyro()
    x, y = slopes_data()
    guide, args = b.guide(slopes_hierarchy(b, design=x)), (b.array(y), 2)
    b.start(guide, *args)
    trace = b.ppl.poutine.trace(guide).get_trace(*args)
    with pytest.raises(ValueError, match="'groups' is given by a handler around.*correlated=False"):
        for _ in range(20):  # the subsamples may be the same
            b.ppl.poutine.replay(guide, trace=trace)(*args)


def test_a_likelihood_without_a_second_derivative():
    """In jax, which says so; elements then start as the others do."""
    pytest.importorskip("numpyro")
    b = NumPyro()
    once = b.jax.custom_vjp(lambda x: -(x**2))

    def backward(x, g):
        return (g * b.jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, -2 * c[1]), (0, x))[1],)

    once.defvjp(lambda x: (once(x), x), backward)

    def model():
        mu = b.ppl.sample("mu", b.dist.Normal(0.0, 1.0))
        with b.plate("groups", 3):
            b.ppl.factor("likelihood", once(b.ppl.sample("theta", b.dist.Normal(mu, 1.0))))

    guide = b.guide(model, init_scale=0.3)
    params = b.start(guide)
    np.testing.assert_allclose(b.get(guide, params, "groups")["log_scale"], math.log(0.3), rtol=1e-6)


def test_gradient_with_correlated_elements(backend):
    x, y = slopes_data(3)
    guide = backend.guide(slopes_hierarchy(backend, design=x), path_gradient=True, amortise=backend.mlp(6, 3))
    params = moved(backend, guide, backend.start(guide, backend.array(y)), 0.1)
    assert_plain_mean(backend, guide, params, y)


def test_which_elements_are_correlated(backend):
    x, y = slopes_data()
    y = backend.array(y)

    def has_tril(model, **kwargs):
        guide = backend.guide(model, **kwargs)
        params = backend.start(guide, y)
        return "tril" in backend.get(guide, params, "groups")

    chained = slopes_hierarchy(backend, chained=True, design=x)
    assert has_tril(slopes_hierarchy(backend, design=x)) and has_tril(chained, noncentered=False)
    assert not has_tril(chained) and not has_tril(slopes_hierarchy(backend, design=x), correlated=False)
    with pytest.raises(ValueError, match=r"correlated=True needs the priors of \['alpha', 'beta'\].*\['beta'\] depend"):
        backend.start(backend.guide(chained, correlated=True), y)


# -- structure -----------------------------------------------------------------------------------------------------
def nested_hierarchy(b):
    """Groups in groups, both plates subsampled on demand: ``a_i ~ N(mu, 1), c_ij ~ N(a_i, 0.5), y_ij ~ N(c_ij, 1)``."""

    def model(y, outer=None, inner=None):
        mu = b.ppl.sample("mu", b.dist.Normal(0.0, 2.0))
        with b.plate("outer", y.shape[0], outer, dim=-2) as i:
            a = b.ppl.sample("a", b.dist.Normal(mu, 1.0))
            with b.plate("inner", y.shape[1], inner, dim=-1) as j:
                c = b.ppl.sample("c", b.dist.Normal(a, 0.5))
                b.ppl.sample("y", b.dist.Normal(c, 1.0), obs=y[i][:, j])

    return model


def nested_evidence(y):
    rows, columns = y.shape
    covariance = 4 + np.kron(np.eye(rows), np.ones((columns, columns))) + 1.25 * np.eye(y.size)
    return multivariate_normal(np.zeros(y.size), covariance).logpdf(y.ravel())


def test_nested_plates(backend):
    y = np.random.default_rng(1).normal(size=(4, 3)) + 1.0
    guide = backend.guide(nested_hierarchy(backend))
    params = backend.fit(guide.model, guide, backend.array(y), steps=400, rate=2e-2)
    groups = guide.groups
    assert list(groups) == ["global", "outer", "outer_inner"]
    assert groups["outer_inner"].parents == ("global", "outer")
    assert backend.get(guide, params, "outer_inner")["loc"].shape == (4, 3, 1)
    elbos = backend.elbos(guide.model, guide, params, backend.array(y), n=400)
    evidence = nested_evidence(y)
    assert evidence - 0.3 < elbos.mean() < evidence + 0.05
    assert abs(np.exp(elbos - evidence).mean() - 1) < 0.1
    part = backend.elbos(guide.model, guide, params, backend.array(y), 2, 2, n=600, seed=1)
    assert abs(part.mean() - elbos.mean()) < 4 * part.std() / math.sqrt(len(part)) + 0.05
    assert backend.draws(guide, params, backend.array(y), 2, 2, n=3)["c"].shape == (3, 2, 2)
    shapes = backend.predictive(guide.model, guide, params, backend.array(y))
    assert shapes["y"] == (4, 4, 3)


def test_masked_elements_count_for_nothing(backend):
    y = observations(6)
    guide = backend.guide(normal_hierarchy(backend))
    params = at_the_posterior(backend, guide, y)
    mu, sd, *_, evidence = closed_form(y[:4])
    params = backend.put(guide, params, "global", {"loc": np.array([mu]), "log_scale": np.log([sd])})
    mask = backend.array(np.arange(6) < 4)
    elbos = backend.elbos(guide.model, guide, params, backend.array(y), None, None, None, mask, n=4)
    np.testing.assert_allclose(elbos, evidence, rtol=1e-5)


def all_supports(b):
    def model(batch=None):
        scale = b.ppl.sample("scale", b.dist.LogNormal(0.0, 0.5))
        with b.plate("elements", 3, batch):
            b.ppl.sample("real", b.dist.Normal(0.0, scale))
            b.ppl.sample("positive", b.dist.Gamma(3.0, 2.0))
            b.ppl.sample("interval", b.dist.Beta(2.0, 3.0))
            b.ppl.sample("simplex", b.dist.Dirichlet(b.array(np.array([2.0, 3.0, 4.0]))))
            b.ppl.sample("vector", b.dist.Normal(b.array(np.zeros(2)), 1.0).to_event(1))
        b.ppl.sample("late", b.dist.HalfNormal(1.0))

    return model


def test_supports(backend):
    """Without data the evidence is 1, on every support."""
    guide = backend.guide(all_supports(backend), init_scale=0.5)
    params = backend.fit(guide.model, guide, steps=300, rate=3e-2, particles=4)
    log_weights = backend.elbos(guide.model, guide, params, n=1000)
    assert -0.7 < log_weights.mean() < 0.05
    assert abs(np.exp(log_weights).mean() - 1) < 0.15
    draws = backend.draws(guide, params, n=500)
    assert draws["simplex"].shape == (500, 3, 3) and draws["scale"].shape == (500,)
    np.testing.assert_allclose(draws["simplex"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(draws["simplex"].mean((0, 1)), np.array([2, 3, 4]) / 9, atol=0.04)
    assert (draws["positive"] > 0).all() and ((draws["interval"] > 0) & (draws["interval"] < 1)).all()


def mixture(b, summed_out):
    def model(y, batch=None):
        mu = b.ppl.sample("mu", b.dist.Normal(b.array(np.array([-2.0, 2.0])), 1.0).to_event(1))
        with b.plate("elements", len(y), batch) as i:
            if not summed_out:
                z = b.ppl.sample("z", b.dist.Categorical(b.array(np.array([0.3, 0.7]))))
            shift = b.ppl.sample("shift", b.dist.Normal(0.0, 1.0))
            if summed_out:
                weights = b.dist.Categorical(b.array(np.array([0.3, 0.7])))
                parts = b.dist.Normal(mu + shift[..., None], 1.0)
                family = "MixtureSameFamily"
                b.ppl.sample("y", getattr(b.dist, family)(weights, parts), obs=y[i])
            else:
                b.ppl.sample("y", b.dist.Normal(mu[z] + shift, 1.0), obs=y[i])

    return model


def test_enumerated_discrete_latents(backend):
    y, loss = backend.array(np.random.default_rng(0).normal(size=6) * 2), backend.enumerated_elbo()
    model, same = backend.enumerated(mixture(backend, False)), mixture(backend, True)
    guides = [backend.guide(model), backend.guide(same)]
    values = []
    for each, guide, elbo in zip((model, same), guides, (loss, None), strict=True):
        params = backend.start(guide, y)
        if not values:
            params = moved(backend, guide, params)
            first = {group: backend.get(guide, params, group) for group in guide.groups}
        for group in guide.groups:
            params = backend.put(guide, params, group, first[group])
        values.append(backend.elbos(each, guide, params, y, loss=elbo)[0])
    assert [set(guide.groups["elements"].sites) for guide in guides] == [{"shift"}, {"shift"}]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    params = backend.fit(model, guides[0], y, 3, steps=20, rate=1e-2, loss=loss)
    assert np.isfinite(backend.elbos(model, guides[0], params, y, loss=loss)).all()


def test_prior_that_depends_on_a_discrete_latent_is_not_used(backend):
    def model(y):
        mu = backend.ppl.sample("mu", backend.dist.Normal(0.0, 1.0))
        with backend.plate("elements", len(y)):
            z = backend.ppl.sample("z", backend.dist.Bernoulli(0.5))
            theta = backend.ppl.sample("theta", backend.dist.Normal(mu + 3.0 * z, 1.0))
            backend.ppl.sample("y", backend.dist.Normal(theta, 1.0), obs=y)

    guide = backend.guide(backend.enumerated(model))
    backend.start(guide, backend.array(np.zeros(3)))
    assert guide.groups["elements"].informed == set()


# -- minibatches and encoders --------------------------------------------------------------------------------------
def test_minibatches_as_arguments(backend):
    """Only the present elements' parameters are trained, and the draws are theirs."""
    y, index = observations(6), np.array([4, 1])
    guide = backend.guide(normal_hierarchy(backend))
    args = backend.array(y[index]), None, backend.array(index), 6
    before = backend.get(guide, backend.start(guide, *args), "groups")["loc"]
    after = backend.get(guide, backend.fit(guide.model, guide, *args, steps=2, rate=1e-2), "groups")["loc"]
    assert before.shape == (6, 1)
    np.testing.assert_allclose(before[index, 0], y[index].mean(1), rtol=1e-5)  # what their likelihood says
    np.testing.assert_allclose(before[[0, 2, 3, 5]], before[index].mean(), rtol=1e-5)
    changed = np.abs(after - before)[:, 0] > 1e-3
    np.testing.assert_array_equal(changed, np.isin(np.arange(6), index))
    params = at_the_posterior(backend, guide, y)
    draws = backend.draws(guide, params, *args, n=4000)["theta"]
    np.testing.assert_allclose(draws.mean(0), closed_form(y)[2][index], atol=0.05)


@pytest.mark.parametrize("element_parameters", [None, True])
def test_amortised(backend, element_parameters):
    y = observations(20)
    if element_parameters:
        options = {"amortise": backend.mlp(4, 3), "element_parameters": True}
    else:
        options = {"amortise": backend.mlp(1, 3), "data": lambda y, *_: y.mean(1)[:, None]}
    guide = backend.guide(normal_hierarchy(backend), **options)
    params = backend.fit(guide.model, guide, backend.array(y), 10, steps=600, rate=2e-2)
    values = backend.get(guide, params, "groups")
    assert values["loc"].shape == ((20, 1) if element_parameters else (1,))
    assert values["head"].shape == (2, 3) and "encoder.layers.0.weight" in values
    draws = backend.draws(guide, params, backend.array(y), n=4000)["theta"]
    _, _, theta, sd, _ = closed_form(y)
    assert (np.abs(draws.mean(0) - theta) / sd).mean() < 0.15
    if element_parameters is None:  # another data set, of another size
        new = observations(30, seed=5)
        draws = backend.draws(guide, params, backend.array(new), n=4000)["theta"]
        within = (1 - SCALE**2 / (SCALE**2 + 0.25)) * closed_form(y)[0]  # mu is as it was
        expected = within + SCALE**2 / (SCALE**2 + 0.25) * new.mean(1)
        assert (np.abs(draws.mean(0) - expected) / sd).mean() < 0.2


# -- the guide as an object ----------------------------------------------------------------------------------------
def test_copies_and_quantiles(backend):
    y = backend.array(observations(4))
    guide = backend.guide(normal_hierarchy(backend))
    params = moved(backend, guide, backend.start(guide, y))
    copied = copy.deepcopy(guide)
    assert pickle.loads(pickle.dumps(backend.guide(len))).model is len  # as far as the model is of a module
    np.testing.assert_array_equal(
        backend.draws(copied, params, y, n=3)["theta"], backend.draws(guide, params, y, n=3)["theta"]
    )
    first = () if params is None else (params,)
    low, high = np.asarray(guide.quantiles(*first, [0.1, 0.9], y, num_samples=100)["theta"])
    assert low.shape == (4,) and (low < high).all()
    assert np.asarray(guide.median(*first, y, num_samples=100)["theta"]).shape == (4,)


def test_medians_of_subsamples_are_refused(backend):
    """Each draw would be of other elements; those of a subsample that is given are not."""
    y = backend.array(observations(4))
    guide = backend.guide(normal_hierarchy(backend))
    params = backend.start(guide, y, 2)
    first = () if params is None else (params,)
    calls = [lambda *args: guide.median(*first, *args), lambda *args: guide.quantiles(*first, [0.1, 0.9], *args)]
    if params is not None:  # without arguments, those of the first call
        calls.append(lambda *args: guide.sample_posterior(backend.jax.random.key(1), params, sample_shape=(3,)))
    for call in calls:
        for args in ((y, 2), () if params else (y, 3)):
            with pytest.raises(ValueError, match=r"plate\(s\) \['groups'\] are subsampled.*Pass the full data"):
                call(*args)
    assert backend.draws(guide, params, y, 2, n=3)["theta"].shape == (3, 2)
    given = backend.array(y[:2]), None, backend.array(np.array([3, 1])), 4
    assert guide.median(*first, *given)["theta"].shape == (2,)
    assert guide.median(*first, y)["theta"].shape == (4,)


def test_parameters_are_alike():
    """Names and shapes of the two packages' parameters."""
    for name in ("numpyro", "pyro"):
        pytest.importorskip(name)
    shapes = []
    for b in (NumPyro(), Pyro()):
        one = functools.partial(b.flows.realnvp, num_layers=1)
        guide = b.guide(normal_hierarchy(b), amortise=b.mlp(4, 3), element_parameters=True, local_flow=one)
        params = b.start(guide, b.array(observations(5)))
        found = {name: value.shape for name, value in b.get(guide, params, "groups").items()}
        shapes.append({name: shape for name, shape in found.items() if not name.startswith("flow.")})
    assert shapes[0] == shapes[1] and shapes[0]["loc"] == (5, 1)
    shapes = []
    for b in (NumPyro(), Pyro()):
        x, y = slopes_data()
        guide = b.guide(slopes_hierarchy(b, design=x), amortise=b.mlp(6, 3), element_parameters=True)
        params = b.start(guide, b.array(y))
        shapes.append({name: value.shape for name, value in b.get(guide, params, "groups").items()})
    assert [s["tril"] for s in shapes] == [(5, 1)] * 2 and [s["head"] for s in shapes] == [(5, 3)] * 2


def test_parameters_stand_in_the_param_store():
    pytest.importorskip("pyro")
    b = Pyro()
    y, guides = b.array(observations(4)), [b.guide(normal_hierarchy(b)) for _ in range(2)]
    for guide in guides:
        b.start(guide, y)
        assert {id(p) for p in guide.parameters()} == {id(p) for p in b.ppl.get_param_store()._params.values()}


# -- errors --------------------------------------------------------------------------------------------------------
def test_errors_of_the_constructor(backend):
    model, make = normal_hierarchy(backend), backend.guides.AutoHierarchicalFlow
    for argument in ("global_flow", "local_flow"):
        with pytest.raises(TypeError, match=f"{argument} must be a factory"):
            make(model, **{argument: 3})
    with pytest.raises(TypeError, match="amortise must be callable"):
        make(model, amortise=3)
    with pytest.raises(ValueError, match="pass amortise="):
        make(model, data=len)
    with pytest.raises(ValueError, match="init_scale must be a positive number"):
        make(model, init_scale=0.0)


@pytest.mark.filterwarnings("ignore:Out-of-support")
def test_errors_of_the_model(backend):
    def without_plates():
        backend.ppl.sample("z", backend.dist.Normal(0.0, 1.0))

    def discrete():
        with backend.plate("elements", 3):
            backend.ppl.sample("z", backend.dist.Bernoulli(0.5))

    def infinite():
        with backend.plate("elements", 3):
            z = backend.ppl.sample("z", backend.dist.Normal(0.0, 1.0))
            backend.ppl.sample("y", backend.dist.Normal(z, 1.0), obs=backend.array(np.full(3, np.inf)))

    def ambiguous():
        backend.ppl.sample("z", backend.dist.Normal(0.0, 1.0))
        with backend.plate("global", 3):
            backend.ppl.sample("local", backend.dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="make one name, 'global'"):
        backend.start(backend.guide(ambiguous))
    with pytest.raises(ValueError, match="Use AutoFlow"):
        backend.start(backend.guide(without_plates))
    with pytest.raises(ValueError, match="discrete and not enumerated.*TraceEnum_ELBO"):
        backend.start(backend.guide(discrete))
    with pytest.raises(ValueError, match="not finite at the start.*'y'"):
        backend.start(backend.guide(infinite))


def test_improper_priors(backend):
    y = backend.array(observations(4))

    def model(y):
        mu = backend.ppl.sample("mu", backend.dist.ImproperUniform(backend.dist.constraints.real, (), ()))
        with backend.plate("elements", 4):
            tau = backend.ppl.sample("tau", backend.dist.ImproperUniform(backend.dist.constraints.positive, (), ()))
            backend.ppl.sample("y", backend.dist.Normal(mu, tau), obs=y)

    guide = backend.guide(model)
    draws = backend.draws(guide, backend.start(guide, y), y, n=50)
    assert np.isfinite(draws["mu"]).all() and (draws["tau"] > 0).all() and draws["tau"].shape == (50, 4)


def test_errors_of_a_call(backend):
    guide = backend.guide(normal_hierarchy(backend))
    backend.start(guide, backend.array(observations(4)))
    with pytest.raises(ValueError, match="'groups' has size 5, but it had 4.*amortise="):
        backend.start(guide, backend.array(observations(5)))

    def changing(y, late):
        with backend.plate("elements", 3):
            backend.ppl.sample("z", backend.dist.Normal(0.0, 1.0))
            if late:
                backend.ppl.sample("late", backend.dist.Normal(0.0, 1.0))

    guide = backend.guide(changing)
    backend.start(guide, None, True)
    with pytest.raises(ValueError, match=r"site\(s\) \['late'\] were there"):
        backend.start(guide, None, False)


def test_error_of_a_first_call_under_jit():
    pytest.importorskip("numpyro")
    b = NumPyro()
    guide, y = b.guide(normal_hierarchy(b)), b.array(observations(4))
    svi = b.infer.SVI(guide.model, guide, b.ppl.optim.Adam(1e-3), b.infer.Trace_ELBO())
    with pytest.raises(ValueError, match="first call.*outside"):
        b.jax.jit(svi.init)(b.jax.random.key(0), y)
    state = svi.init(b.jax.random.key(0), y)
    assert np.isfinite(b.jax.jit(svi.update)(state, y)[1])


def test_errors_of_encoders(backend):
    y, model = backend.array(observations(4)), normal_hierarchy(backend)
    with pytest.raises(ValueError, match=r"encoder of 'groups' returned shape \(4,\).*expected \(4, 'c'\)"):
        backend.start(backend.guide(model, amortise=lambda x: x.sum(-1)), y)
    with pytest.raises(ValueError, match=r"data for 'groups' has shape \(3, 4\).*Pass data="):
        backend.start(backend.guide(model, amortise=lambda x: x, data=lambda y: y[:3]), y)
    with pytest.raises(ValueError, match=r"key\(s\) \['pupils'\].*\['groups'\]"):
        backend.start(backend.guide(model, amortise={"pupils": lambda x: x}), y)
    nested = backend.guide(nested_hierarchy(backend), amortise=lambda x: x[..., None])
    with pytest.raises(ValueError, match="several groups.*Pass a dict"):
        backend.start(nested, backend.array(np.zeros((2, 3))))


def test_normal_quantiles_of_elements(backend):
    """An element's quantiles are those of the normal posterior."""
    y = observations(5)
    guide = backend.guide(normal_hierarchy(backend))
    params = at_the_posterior(backend, guide, y)
    first = () if params is None else (params,)
    found = np.asarray(guide.quantiles(*first, [0.05, 0.95], backend.array(y), num_samples=8000)["theta"])
    _, _, theta, sd, _ = closed_form(y)
    np.testing.assert_allclose(found, theta + sd * norm.ppf([[0.05], [0.95]]), atol=0.06)
