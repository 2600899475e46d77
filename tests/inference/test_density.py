"""Densities from data: bases, maximum likelihood, flow matching, in both packages."""

import copy
import functools
import importlib
import math

import numpy as np
import pytest
from scipy import stats

from tests import backends
from tests.benchmarks import known_densities as targets
from tests.registry import BY_NAME


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def keyed(backend, seed=0):
    """What makes a call random: torch's generator, or a key."""
    if backend.name == "torch":
        backend.torch.manual_seed(seed)
        return {}
    return {"key": backend.jax.random.key(seed)}


def draw(backend, distribution, n, seed=0):
    if backend.name == "torch":
        backend.torch.manual_seed(seed)
        return distribution.rsample((n,))
    return distribution.sample(backend.jax.random.key(seed), (n,))


def with_parameters(backend, base, values):
    if backend.name == "torch":
        base.load_state_dict({name: backend.array(np.float64(v)) for name, v in values.items()}, assign=True)
        return base
    names = list(values)
    return backend.eqx.tree_at(
        lambda b: [functools.reduce(getattr, n.split("."), b) for n in names],
        base,
        [backend.jnp.asarray(np.float64(values[n])) for n in names],
    )


def bases(backend, dim):
    module, rng = backend.pkg.distributions, np.random.default_rng(0)
    loc, log_scale = rng.normal(size=dim), 0.3 * rng.normal(size=dim)
    mixture = {
        "logits": [0.3, -0.5, 0.0],
        "loc": rng.normal(size=(3, dim)) * 2,
        "log_scale": 0.3 * rng.normal(size=(3, dim)),
    }
    return {
        "standard": module.standard_base(dim),
        "student": module.standard_base(dim, 5.0),
        "loc_scale": with_parameters(backend, module.LocScaleBase(dim), {"loc": loc, "log_scale": log_scale}),
        "loc_scale_student": with_parameters(
            backend, module.LocScaleBase(dim, 5.0), {"loc": loc, "log_scale": log_scale}
        ),
        "flexible": with_parameters(
            backend,
            module.FlexibleBase(dim),
            {
                "skewness.params": [[-0.2, -0.5, 0.4][:dim]],
                "tails.params": [[-1.5, -1.3, -3.0][:dim], [-2.0, -0.8, -1.0][:dim]],
            },
        ),
        "mixture": with_parameters(backend, module.MixtureBase(dim, 3, **keyed(backend)), mixture),
    }


@pytest.mark.parametrize("name", ["standard", "student", "loc_scale", "loc_scale_student", "flexible", "mixture"])
def test_a_base_integrates_to_one_and_is_that_of_its_draws(backend, name):
    base = bases(backend, 2)[name]
    distribution = getattr(base, "distribution", lambda: base)()
    assert tuple(distribution.event_shape) == (2,) and tuple(distribution.batch_shape) == ()
    axis, step = np.linspace(-60, 60, 1201, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    density = np.exp(backend.numpy(distribution.log_prob(backend.array(grid))))
    assert density.sum() * step**2 == pytest.approx(1, abs=1e-3)
    draws = np.float64(backend.numpy(draw(backend, distribution, 20_000)))
    for axis_number in (0, 1):
        below = (density.sum(axis_number) * step**2).cumsum()
        expected = np.interp([-2.0, -0.5, 0.5, 2.0], axis + step / 2, below)
        shares = (draws[:, axis_number, None] < [-2.0, -0.5, 0.5, 2.0]).mean(0)
        np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / 20_000**0.5 + 1e-3)


def test_draws_of_a_mixture_carry_the_gradient_of_every_parameter(backend):
    """d/dtheta E[f(x)] by the draws' own gradients, against E[f] by quadrature at moved parameters."""
    base = bases(backend, 2)["mixture"]
    axis, step = np.linspace(-12, 12, 241, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    values = np.sin(grid[..., 0]) * grid[..., 1] + 0.3 * grid[..., 0]
    rng = np.random.default_rng(1)
    parameters = {n: np.float64(backend.numpy(getattr(base, n))) for n in ("logits", "loc", "log_scale")}
    n = 40_000
    if backend.name == "torch":
        x = draw(backend, base.distribution(), n)
        mean = ((x[:, 0].sin() * x[:, 1]) + 0.3 * x[:, 0]).mean()
        grads = backend.torch.autograd.grad(mean, [getattr(base, name) for name in parameters])
        grads = dict(zip(parameters, map(backend.numpy, grads), strict=True))
    else:

        def mean(base):
            x = draw(backend, base.distribution(), n)
            return (backend.jnp.sin(x[:, 0]) * x[:, 1] + 0.3 * x[:, 0]).mean()

        by_base = backend.eqx.filter_grad(mean)(base)
        grads = {name: np.asarray(getattr(by_base, name)) for name in parameters}
    for name in parameters:  # each on its own: a wrong one must not hide behind the others
        direction = rng.normal(size=parameters[name].shape)

        def expectation(step_size, name=name, direction=direction):
            moved = {**parameters, name: parameters[name] + step_size * direction}
            distribution = with_parameters(backend, bases(backend, 2)["mixture"], moved).distribution()
            density = np.exp(backend.numpy(distribution.log_prob(backend.array(grid))))
            return (density * values).sum() * step**2

        numeric = (expectation(1e-4) - expectation(-1e-4)) / 2e-4
        assert (grads[name] * direction).sum() == pytest.approx(numeric, abs=0.04), name


@pytest.mark.parametrize("df", [None, 5.0])
def test_a_standard_base_has_the_dtype_asked_for(backend, df):
    x = backend.array(np.zeros((3, 2), "float32"))
    assert backend.numpy(backend.pkg.distributions.standard_base(2, df, like=x).log_prob(x)).dtype == np.float32


@pytest.mark.parametrize("name", ["mixture", "flexible"])
def test_a_flow_distribution_takes_a_learned_base(backend, name):
    """Also one that is a flow's distribution itself, which NumPyro would take apart."""
    base = bases(backend, 3)[name].distribution()
    flow = backend.pkg.flows.realnvp(3, 2, (8,), **keyed(backend))
    flow = flow.double() if backend.name == "torch" else flow
    flow = backend.with_state(flow, backends.perturbed(backend.state(flow), 0.3, True))
    density = backend.pkg.FlowDistribution(base, flow)
    assert density.transform is flow
    x = draw(backend, density, 5)
    z, log_det = flow.inverse_and_log_det(x)
    expected = backend.numpy(base.log_prob(z) + log_det)
    np.testing.assert_allclose(backend.numpy(density.log_prob(x)), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(backend.numpy(flow.forward_and_log_det(draw(backend, base, 5))[0]), backend.numpy(x))


def fit(backend, flow, data, **kwargs):
    arrays = {name: backend.array(value) for name, value in kwargs.items() if isinstance(value, np.ndarray)}
    options = {"progress_bar": False, "num_steps": 300, **kwargs, **arrays}
    return backend.pkg.fit_density(flow, backend.array(data), **options, **keyed(backend))


def flow_of(backend, name, dim, *args, **kwargs):
    flow = getattr(backend.pkg.flows, name)(dim, *args, **kwargs, **keyed(backend))
    if backend.name == "torch":
        return flow.float()
    return backend.jax.tree.map(lambda a: a.astype("float32") if backend.eqx.is_inexact_array(a) else a, flow)


def divergence(backend, density, target, n=4000, seed=9):
    """KL(target || density) and its standard error."""
    x = target.sample(np.random.default_rng(seed), n)
    terms = target.log_prob(x) - np.float64(backend.numpy(density.log_prob(backend.array(np.float32(x)))))
    return terms.mean(), terms.std() / n**0.5


def test_fit_recovers_the_entropy_of_a_gaussian(backend):
    rng = np.random.default_rng(0)
    factor = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-1.0, 0.3, 0.2]])
    data = np.float32(rng.normal(size=(4000, 3)) @ factor.T + 5)
    density, history = fit(backend, flow_of(backend, "realnvp", 3, 4, (16,)), data, num_steps=600, learning_rate=1e-2)
    entropy = 1.5 * math.log(2 * math.pi * math.e) + np.log(np.diag(factor)).sum()
    assert history.validation[:, 1].min() == pytest.approx(entropy, abs=0.1)  # 400 held-out points: sd 0.06
    assert history.losses[-100:].mean() == pytest.approx(entropy, abs=0.05)
    assert len(history.losses) <= 600 and history.skipped == 0 and not history.interrupted
    assert history.best_step == history.validation[history.validation[:, 1].argmin(), 0]
    assert draw(backend, density, 7).shape == (7, 3)


def test_fit_ends_early_and_keeps_the_best(backend):
    data = np.float32(np.random.default_rng(0).normal(size=(40, 2)))
    flow = flow_of(backend, "nsf", 2, 2, (32, 32))
    _, history = fit(backend, flow, data, num_steps=1000, learning_rate=2e-2, patience=150, validation=0.5)
    assert len(history.losses) < 1000 and history.best_step < len(history.losses) - 100


def test_fit_trains_the_base_too(backend):
    target = targets.eight_gaussians(radius=3.0, sd=0.5)
    data = np.float32(target.sample(np.random.default_rng(0), 4000))
    base = backend.pkg.distributions.MixtureBase(2, 16, 1.0, **keyed(backend))
    if backend.name == "torch":
        base = base.float()
    density, _ = fit(
        backend, flow_of(backend, "realnvp", 2, 2, (8,)), data, base=base, num_steps=800, learning_rate=3e-2
    )
    value, error = divergence(backend, density, target)
    assert -4 * error < value < 0.1


def test_fit_with_a_context(backend):
    rng = np.random.default_rng(0)
    context = np.float32(rng.normal(size=(4000, 1)))
    data = np.float32(np.concatenate([2 * context, -context], -1) + 0.3 * rng.normal(size=(4000, 2)))
    flow = flow_of(backend, "maf", 2, 2, (16,), context_dim=1)
    density, history = fit(backend, flow, data, context=context, num_steps=600, learning_rate=1e-2)
    assert history.losses[-100:].mean() == pytest.approx(math.log(2 * math.pi * math.e) + 2 * math.log(0.3), abs=0.15)
    given = density.condition(backend.array(np.float32([[1.0], [-1.0]])))
    draws = backend.numpy(draw(backend, given, 2000))
    np.testing.assert_allclose(draws.mean(0), [[2, -1], [-2, 1]], atol=0.15)
    assert backend.numpy(given.log_prob(backend.array(draws))).shape == (2000, 2)


@pytest.mark.parametrize("wild", [0, 30])
def test_a_wild_gradient_does_not_end_the_training(backend, wild):
    """The first one, whose size nothing tells of, or a later one; steps that are not finite are counted."""
    training = importlib.import_module(f"{backend.pkg.__name__}.training")

    def gradient(n, w):
        factor = {wild: 1e20, 40: np.inf}.get(n, 1.0)
        return factor * 2 * (w - 1)

    if backend.name == "jax":
        update = backend.jax.jit(training.update)
        state = training.first_state(backend.array(np.zeros(3)))
        for n in range(200):
            state = update(state, gradient(n, state[0]), 0.05)
        w, skipped = state[0], int(state[2])
    else:
        w = backend.torch.nn.Parameter(backend.array(np.zeros(3)))
        ascent = training.Ascent([w])
        skipped = sum(int(ascent.update(gradient(n, w.detach()), 0.05)) for n in range(200))
        w = w.detach()
    np.testing.assert_allclose(backend.numpy(w), 1, atol=0.05)
    assert skipped == 1


def test_steps_are_those_of_adam(backend):
    """Of small and large arrays (which jax updates apart); the first gradient's length alone is noted."""
    training, rng = importlib.import_module(f"{backend.pkg.__name__}.training"), np.random.default_rng(0)
    shapes, rates = ((3,), (70, 90), (2, 2), (5000,)), 0.1 / np.arange(1, 31)
    params = [rng.normal(size=shape) for shape in shapes]
    gradients = [[rng.normal(size=shape) for shape in shapes] for _ in rates]
    expected, means, squares = params, [0.0] * 4, [0.0] * 4
    for n, (gradient, rate) in enumerate(zip(gradients[1:], rates[1:], strict=True), 1):
        means = [0.9 * m + 0.1 * g for m, g in zip(means, gradient, strict=True)]
        squares = [0.999 * s + 0.001 * g**2 for s, g in zip(squares, gradient, strict=True)]
        expected = [
            p - rate * m / (1 - 0.9**n) / (np.sqrt(s / (1 - 0.999**n)) + 1e-8)
            for p, m, s in zip(expected, means, squares, strict=True)
        ]
    if backend.name == "jax":
        update = backend.jax.jit(training.update)
        state = training.first_state([backend.array(p) for p in params])
        for gradient, rate in zip(gradients, rates, strict=True):
            state = update(state, [backend.array(g) for g in gradient], rate)
        found = state[0]
    else:
        found = [backend.torch.nn.Parameter(backend.array(p)) for p in params]
        ascent = training.Ascent(found)
        for gradient, rate in zip(gradients, rates, strict=True):
            ascent.update(backend.torch.cat([backend.array(g).reshape(-1) for g in gradient]), rate)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(backend.numpy(a.detach() if backend.name == "torch" else a), b, rtol=1e-9, atol=1e-9)


def test_fit_skips_steps_that_are_not_finite(backend):
    """A spike, whose log-density overflows in float32 for some batches only, would end a plain Adam."""
    data = np.float32(np.random.default_rng(0).normal(size=(2000, 2)))
    data[:3] = 3e19  # squares overflow
    flow = flow_of(backend, "realnvp", 2, 2, (8,))
    density, history = fit(backend, flow, data, standardize=False, validation=0.0, num_steps=100, batch_size=64)
    assert 0 < history.skipped < 100
    assert np.isfinite(backend.numpy(density.log_prob(backend.array(data[5:50])))).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "elbo"}, "objective"),
        ({"num_steps": 0}, "num_steps"),
        ({"validation": 1.0}, "validation"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, but got -1.0"),
        ({"patience": 0}, "patience must be an integer of at least 1"),
        ({"context": np.zeros((9, 1), "float32")}, "context must be finite, of shape .* n = 10 .* has shape"),
        ({"context": np.full((10, 1), np.nan, "float32")}, "context must be finite"),
    ],
)
def test_bad_options_are_named(backend, options, message):
    flow, data = flow_of(backend, "realnvp", 2), np.zeros((10, 2), "float32")
    with pytest.raises(ValueError, match=message):
        fit(backend, flow, data, **options)


def test_bad_data_flows_and_bases_are_named(backend):
    flow, data = flow_of(backend, "realnvp", 2), np.zeros((10, 2), "float32")
    with pytest.raises(ValueError, match="data must be finite"):
        fit(backend, flow, data + np.float32("nan"))
    with pytest.raises(ValueError, match=r"takes vectors of 2 elements, but got shape \(\d+, 3\)"):
        fit(backend, flow, np.zeros((10, 3), "float32"))
    with pytest.raises(ValueError, match="flow and base have no parameters to train"):
        fit(backend, backend.pkg.transforms.Permutation([1, 0]), data)
    with pytest.raises(TypeError, match="single Continuous"):
        fit(backend, flow, data, objective="flow_matching")
    with pytest.raises(TypeError, match="flow must be a TransformModule, but got maf. A class or factory must be call"):
        fit(backend, backend.pkg.flows.maf, data)
    module = backend.pkg.distributions
    with pytest.raises(TypeError, match="base must be a distribution or a Base, but got MixtureBase"):
        fit(backend, flow, data, base=module.MixtureBase)
    loc = backend.array(np.zeros(2, "float32"))
    normal = (
        backend.torch.distributions if backend.name == "torch" else importlib.import_module("numpyro").distributions
    ).Normal
    for base in (normal(loc, 1.0), module.standard_base(3), module.LocScaleBase(3)):
        with pytest.raises(ValueError, match=r"base must be .* event shape \(2,\), but has"):
            fit(backend, flow, data, base=base)


@pytest.mark.parametrize(
    "data", [np.ones((10, 2)), np.ones((10, 2), int), [[1, 2], [3, 4]]], ids=["f64", "int", "list"]
)
def test_data_are_taken_in_the_dtype_of_the_flow(backend, data):
    flow = flow_of(backend, "maf", 2, 1, (4,), context_dim=2)
    options = {"context": data, "num_steps": 1, "progress_bar": False}
    density, _ = backend.pkg.fit_density(flow, data, **options, **keyed(backend))
    given = density.condition(backend.array(np.ones(2, "float32")))
    assert backend.numpy(given.log_prob(backend.array(np.ones(2, "float32")))).dtype == np.float32


def test_a_fit_needs_gradients_and_takes_them_where_it_can():
    backend = backends.get("torch")
    flow, data = flow_of(backend, "realnvp", 2, 1, (4,)), np.ones((10, 2), "float32")
    with backend.torch.no_grad():
        assert len(fit(backend, flow, data, num_steps=2)[1].losses) == 2
    with backend.torch.inference_mode(), pytest.raises(RuntimeError, match="fit_density: torch.inference_mode"):
        fit(backend, flow, data)


@pytest.mark.optimised
def test_flow_matching_learns_a_mixture(backend):
    """Trained without solving the equation; judged by the exact likelihood, which solves it."""
    target = targets._mixture_of_normals(np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]]), 0.5)
    data = np.float32(target.sample(np.random.default_rng(0), 8000))
    flow = flow_of(backend, "cnf", 2, 1, (64, 64), activation="silu")
    options = {"objective": "flow_matching", "num_steps": 2000, "batch_size": 1024, "learning_rate": 5e-3}
    density, _ = fit(backend, flow, data, **options, validation=0.0)
    value, error = divergence(backend, density, target)
    assert -4 * error < value < 0.06
    continuous = backend.pkg.elbo.velocity_of(density.transform.layers[0])
    errors = continuous.solver_error(backend.array(np.float32(np.random.default_rng(1).normal(size=(500, 2)))))
    assert max(float(e.max()) for e in errors) < 1e-2


# -- learned bases under the ELBO, and resampled ones
def test_the_elbo_gradient_of_a_mixture_base(backend):
    """d/dtheta E[f(x)] by ``Base.draw`` and ``score_gradient``, against its closed form."""
    elbo = importlib.import_module(f"{backend.pkg.__name__}.elbo")
    base, n = bases(backend, 2)["mixture"], 40_000
    names = ("logits", "loc", "log_scale")
    logits, loc, log_scale = (np.float64(backend.numpy(getattr(base, name))) for name in names)

    def loss(x, log_density):
        f = 0.1 * x[:, 0] ** 2 + x[:, 1]
        return elbo.score_gradient(f, log_density) - f.mean()

    if backend.name == "torch":
        backend.torch.manual_seed(0)
        grads = backend.torch.autograd.grad(loss(*base.draw(n)), [getattr(base, name) for name in names])
        grads = [-backend.numpy(g) for g in grads]
    else:
        by_base = backend.eqx.filter_grad(lambda b: loss(*b.draw(backend.jax.random.key(0), n)))(base)
        grads = [-np.asarray(getattr(by_base, name)) for name in names]
    weights = np.exp(logits) / np.exp(logits).sum()
    means = 0.1 * (loc[:, 0] ** 2 + np.exp(2 * log_scale[:, 0])) + loc[:, 1]
    np.testing.assert_allclose(grads[0], weights * (means - weights @ means), atol=0.03)
    expected = weights[:, None] * np.stack([0.2 * loc[:, 0], 0 * loc[:, 0] + 1], -1)
    np.testing.assert_allclose(grads[1], expected, atol=0.03)
    expected = weights[:, None] * np.stack([0.2 * np.exp(2 * log_scale[:, 0]), 0 * loc[:, 0]], -1)
    np.testing.assert_allclose(grads[2], expected, atol=0.03)


def test_a_mixture_base_shares_its_components_out_among_modes(backend):
    base = bases(backend, 2)["mixture"]
    modes = [np.log([0.1, 0.6, 0.3]), 10.0 * np.arange(6).reshape(3, 2), np.full((3, 2), 0.1)]
    placed = base.at_modes(*map(backend.array, modes))
    np.testing.assert_allclose(np.sort(np.exp(backend.numpy(placed.logits))), [0.1, 0.3, 0.6], rtol=1e-6)
    placed = bases(backend, 2)["mixture"].at_modes(*(backend.array(m[1:]) for m in modes))
    weights, loc = np.exp(backend.numpy(placed.logits)), backend.numpy(placed.loc)
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(loc, [[20, 30], [40, 50], [20, 30]], atol=1)
    assert not np.allclose(loc[0], loc[2])


@pytest.mark.parametrize("num_tries", [3, 100])
def test_a_resampled_base_integrates_to_one_and_is_that_of_its_draws(backend, num_tries):
    module = backend.pkg.distributions
    base = module.ResampledBase(1, (8,), num_tries, **keyed(backend))
    base = base.double() if backend.name == "torch" else base
    rng, state = np.random.default_rng(5), backend.state(base)
    grid, step = np.linspace(-9, 9, 3601, retstep=True)
    points = backend.array(grid[:, None])
    np.testing.assert_allclose(backend.numpy(base.distribution().log_prob(points)), stats.norm.logpdf(grid), atol=1e-5)
    base = backend.with_state(base, {name: 2 * rng.normal(size=value.shape) for name, value in state.items()})
    distribution = base.distribution()
    value, error = (float(backend.numpy(part)) for part in distribution.normaliser)
    density = np.exp(np.float64(backend.numpy(distribution.log_prob(points))))
    assert 0.02 < value < 0.9 and 0 < error < 0.01
    assert np.abs(density - stats.norm.pdf(grid)).max() > 0.1
    assert density.sum() * step == pytest.approx(1, abs=4 * error / value)
    if backend.name == "torch":
        backend.torch.manual_seed(0)
        draws = backend.numpy(distribution.sample((20_000,)))
    else:
        draws = np.asarray(distribution.sample(backend.jax.random.key(0), (20_000,)))
    at = [-1.5, -0.5, 0.0, 0.5, 1.5]
    expected = np.interp(at, grid + step / 2, density.cumsum() * step)
    np.testing.assert_allclose((draws < at).mean(0), expected, atol=2 / 20_000**0.5 + 4 * error / value)


def test_maximum_likelihood_trains_a_resampled_base(backend):
    rng = np.random.default_rng(0)
    x = np.float32(rng.choice([-1.0, 1.0], (2000, 2)) + 0.2 * rng.normal(size=(2000, 2)))
    base = backend.pkg.distributions.ResampledBase(2, (16,), num_draws=512, **keyed(backend))
    density, history = fit(backend, flow_of(backend, "realnvp", 2, 1, (4,)), x, base=base, learning_rate=1e-2)
    assert history.losses[-50:].mean() < history.losses[:20].mean() - 0.3
    assert tuple(density.base_dist.event_shape) == (2,)


def test_guides_refuse_a_base_whose_draws_carry_no_gradient(backend):
    models = importlib.import_module(f"tests.inference.models_{'pyro' if backend.name == 'torch' else 'numpyro'}")
    guide = backend.pkg.AutoFlow(models.bimodal, base=backend.pkg.distributions.ResampledBase)
    with pytest.raises(ValueError, match="draws of ResampledBase are not reparameterised"):
        guide.log_density()
    for option in ("num_tries", "num_draws"):
        with pytest.raises(ValueError, match=option):
            backend.pkg.distributions.ResampledBase(2, **{option: 1}, **keyed(backend))


def test_the_path_gradient_of_a_learned_base_vanishes_at_an_exact_fit(backend):
    """Its parameters are held fixed in the density of the draws, in every one of which the terms are then equal."""
    elbo = importlib.import_module(f"{backend.pkg.__name__}.elbo")
    flow = backend.pkg.Compose([backend.pkg.transforms.ElementwiseAffine(2)])
    for name in ("loc_scale_student", "flexible", "mixture"):
        base, exact = (bases(backend, 2)[name] for _ in range(2))
        log_density = exact.distribution().log_prob
        if backend.name == "torch":
            x, score = base.draw(50)
            terms = elbo.elbo_terms(flow.double(), base, log_density, x, path=True)
            loss = terms.sum() + (0 if score is None else elbo.score_gradient(terms, score))
            grads = backend.torch.autograd.grad(loss, list(base.parameters()), allow_unused=True)
            grads = [backend.numpy(g) for g in grads if g is not None]
        else:

            def loss(base, log_density=log_density):
                x, score = base.draw(backend.jax.random.key(0), 50)
                terms = elbo.elbo_terms(flow, base, log_density, x, path=True)
                return terms.sum() + (0 if score is None else elbo.score_gradient(terms, score))

            grads = backend.jax.tree.leaves(backend.eqx.filter_grad(loss)(base))
        for gradient in grads:
            np.testing.assert_allclose(gradient, 0, atol=1e-5)


def _plain_elbo(elbo, flow, fixed, log_density, x):
    """The ELBO of the path estimator, by an inverse pass in place of scores."""
    u = flow.forward_and_log_det(x)[0]
    back, log_det = fixed[0].inverse_and_log_det(u)
    return (log_density(u) - elbo.distribution_of(fixed[1]).log_prob(back) - log_det).mean()


@pytest.mark.parametrize("name", ["loc_scale", "flexible", "mixture"])
def test_gradients_by_scores_are_those_by_inverse_passes(backend, name):
    """Of the path estimator, by all parameters of flow and base."""
    elbo = importlib.import_module(f"{backend.pkg.__name__}.elbo")
    base = bases(backend, 2)[name]
    flow = backend.build(BY_NAME["realnvp-rotated"], 2)
    flow = backend.with_state(flow, backends.perturbed(backend.state(flow), 0.2, deep=True))

    def log_density(u):
        return -0.25 * (u**2).sum(-1) ** 2

    if backend.name == "torch":
        x = base.draw(12)[0]
        parameters = [*flow.parameters(), *base.parameters()]

        def gradient(loss):
            grads = backend.torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            return [backend.numpy(g) for g in grads if g is not None]

        held = copy.deepcopy(flow).requires_grad_(False), copy.deepcopy(base).requires_grad_(False)
        plain = _plain_elbo(elbo, flow, held, log_density, x)
        terms = elbo.elbo_terms(flow, base, log_density, x, path=True)
        found, expected = gradient(terms.mean()), gradient(plain)
    else:
        stop = backend.jax.lax.stop_gradient

        def by_scores(modules):
            x = modules[1].draw(backend.jax.random.key(0), 12)[0]
            return elbo.elbo_terms(*modules, log_density, x, path=True).mean()

        def plain(modules):
            x = modules[1].draw(backend.jax.random.key(0), 12)[0]
            return _plain_elbo(elbo, modules[0], stop(modules), log_density, x)

        found, expected = (
            backend.jax.tree.leaves(backend.eqx.filter_jit(backend.eqx.filter_grad(loss))((flow, base)))
            for loss in (by_scores, plain)
        )
    assert len(found) == len(expected) > 5
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_flexible_tails_start_near_those_of_student(backend):
    """Of the same tail index: the densities' slopes in log-log far out; and nearly the normal's in the bulk."""
    base = backend.pkg.distributions.FlexibleBase(1, 5.0)
    far = np.array([[-2e4], [-1e4], [1e4], [2e4]])
    left, right = np.diff(backend.numpy(base.distribution().log_prob(backend.array(far))))[[0, 2]] / np.log(2)
    # the power law is that of P(|y| > r), but for the root of a logarithm
    assert left == pytest.approx(6, abs=0.1) and right == pytest.approx(-6, abs=0.1)
    with pytest.raises(ValueError, match="df must be greater than 1"):
        backend.pkg.distributions.FlexibleBase(1, 1.0)


def test_bases_are_the_same_in_both_packages():
    x = np.random.default_rng(0).normal(size=(7, 2)) * 3
    here, there = (bases(backends.get(name), 2) for name in ("torch", "jax"))
    for name in ("loc_scale", "loc_scale_student", "flexible", "mixture"):
        torch, jax = (
            b.numpy(base[name].distribution().log_prob(b.array(x)))
            for b, base in zip(map(backends.get, ("torch", "jax")), (here, there), strict=True)
        )
        np.testing.assert_allclose(torch, jax, rtol=1e-10, err_msg=name)


def test_a_resampled_base_is_the_same_in_both_packages():
    densities, x = [], np.random.default_rng(0).normal(size=(7, 2))
    for backend in map(backends.get, ("torch", "jax")):
        base = backend.pkg.distributions.ResampledBase(2, (4,), 5, 100, **keyed(backend))
        state, rng = backend.state(base), np.random.default_rng(1)
        base = base.double() if backend.name == "torch" else base
        base = backend.with_state(base, {name: rng.normal(size=value.shape) for name, value in state.items()})
        densities.append(backend.numpy(base.distribution().log_prob(backend.array(x))))
    np.testing.assert_allclose(*densities, atol=1e-5)
