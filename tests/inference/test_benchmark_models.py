"""The benchmark models: twins agree with each other, and with the reference draws where there are some."""

import importlib
import importlib.util
import math

import numpy as np
import pytest

from tests.benchmarks.models import POSTERIORS, TARGETS, available, available_targets, flatten

NUM_POINTS = 32


def load(backend: str, name: str):
    """The posterior or target in one backend; skips where it cannot be had."""
    for library in {"pyro": ("torch", "pyro"), "numpyro": ("jax", "numpyro")}[backend]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    if name not in (*available(), *available_targets()):
        pytest.skip(f"the data of {name} are absent; PYROFLOWS_DATA names their folder")
    models = importlib.import_module(f"tests.benchmarks.models.{backend}_models")
    return models.get(name) if name in POSTERIORS else models.get_target(name)


@pytest.fixture(autouse=True)
def torch_float64():
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def reference_samples(posterior) -> dict[str, np.ndarray]:
    """The reference draws of the latent sites ``(draws, *shape)``, recovered where only a function of them is known."""
    sizes = np.cumsum([math.prod(shape) for _, _, shape in posterior.mapping])
    parts = np.split(posterior.reference.draws, sizes[:-1], axis=1)
    samples = {site: part.reshape(-1, *shape) for part, (site, _, shape) in zip(parts, posterior.mapping, strict=True)}
    if "noncentered" in posterior.name:
        samples["theta_trans"] = (samples.pop("theta") - samples["mu"][:, None]) / samples["tau"][:, None]
    if "garch" in posterior.name:
        samples["beta1_share"] = samples.pop("beta1") / (1 - samples["alpha1"])
    if "gp_pois" in posterior.name:
        x, rho, alpha = np.asarray(posterior.args[0]), samples["rho"][:, None, None], samples["alpha"][:, None, None]
        covariance = alpha**2 * np.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + 1e-10 * np.eye(len(x))
        samples["f_tilde"] = np.linalg.solve(np.linalg.cholesky(covariance), samples.pop("f")[..., None])[..., 0]
    return samples


def pyro_potential(posterior):
    """Pyro's own potential, with the shapes and the bijections of its unconstrained sites."""
    from pyro.infer.mcmc.util import initialize_model

    start, potential, to_unconstrained, _ = initialize_model(
        posterior.model, model_args=posterior.args, model_kwargs=posterior.kwargs
    )
    return potential, {site: tuple(value.shape) for site, value in start.items()}, to_unconstrained


def points(posterior, shapes, to_unconstrained) -> dict[str, np.ndarray]:
    """Unconstrained points ``(NUM_POINTS, *shape)`` by site: reference draws, or random without a reference.

    In the posterior's bulk the log-density is small enough for a wrong constant to show.
    """
    generator = np.random.default_rng(0)
    if not posterior.reference:
        return {site: 0.7 * generator.standard_normal((NUM_POINTS, *shape)) for site, shape in shapes.items()}
    import torch

    which = generator.choice(len(posterior.reference.draws), NUM_POINTS, replace=False)
    draws = {site: torch.as_tensor(x[which]) for site, x in reference_samples(posterior).items()}
    return {
        site: to_unconstrained[site](x).numpy() if site in to_unconstrained else x.numpy() for site, x in draws.items()
    }


def rounding(posterior, u) -> np.ndarray:
    """How far two correct evaluations in float64 may lie apart at the points ``u``: ``(NUM_POINTS,)``.

    The Gaussian process factorises a covariance of condition number up to 1e11. Against evaluations with 60 digits at
    25 reference draws, the ten with the largest difference between the backends among them, both were off by at most
    0.03 of (machine epsilon) x (condition number) where that exceeds 1e-8.
    """
    if "gp_pois" not in posterior.name:
        return np.full(NUM_POINTS, 1e-8)
    x, rho, alpha = np.asarray(posterior.args[0]), np.exp(u["rho"]), np.exp(u["alpha"])
    distances = (x[:, None] - x) / rho[:, None, None]
    covariance = alpha[:, None, None] ** 2 * np.exp(-0.5 * distances**2) + 1e-10 * np.eye(len(x))
    return 1e-9 + 0.1 * np.finfo(np.float64).eps * np.linalg.cond(covariance)


@pytest.mark.parametrize("name", [*POSTERIORS, *TARGETS])
def test_twins_have_the_same_log_density(name):
    ours, twin = load("pyro", name), load("numpyro", name)
    import jax
    import torch
    from numpyro.infer.util import potential_energy

    torch.manual_seed(0)
    potential, shapes, to_unconstrained = pyro_potential(ours)
    u = points(ours, shapes, to_unconstrained)
    assert sum(math.prod(shape) for shape in shapes.values()) == ours.dimension == twin.dimension
    assert ours.mapping == twin.mapping

    expected = [float(potential({site: torch.as_tensor(x[i]) for site, x in u.items()})) for i in range(NUM_POINTS)]
    actual = jax.jit(jax.vmap(lambda u: potential_energy(twin.model, twin.args, twin.kwargs, u)))(u)
    assert np.isfinite(expected).all()
    allowed = rounding(ours, u) + 1e-12 * np.abs(expected)
    assert (np.abs(actual - np.array(expected)) <= allowed).all()


@pytest.mark.parametrize("name", POSTERIORS)
def test_reference_draws_are_from_the_posterior(name):
    # Stein's identities: E[score] = 0 and E[(u - E u) score] = -1
    posterior = load("numpyro", name)
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree
    from numpyro.infer.util import potential_energy, unconstrain_fn

    model, args, kwargs = posterior.model, posterior.args, posterior.kwargs

    def score(draw):
        u, unravel = ravel_pytree(unconstrain_fn(model, args, kwargs, draw))
        return u, jax.grad(lambda u: -potential_energy(model, args, kwargs, unravel(u)))(u)

    u, scores = (
        np.asarray(x) for x in jax.jit(jax.vmap(score))(jax.tree.map(jnp.asarray, reference_samples(posterior)))
    )
    assert u.shape[1] == posterior.dimension
    for statistic in (scores, 1 + (u - u.mean(0)) * scores):
        z = statistic.mean(0) / statistic.std(0) * len(u) ** 0.5
        assert np.abs(z).max() < 5, z


@pytest.mark.parametrize("name", [*POSTERIORS, *TARGETS])
def test_pyro_models_run_on_a_batch_of_draws(name):
    posterior = load("pyro", name)
    import pyro
    import torch
    from pyro import poutine

    torch.manual_seed(0)
    potential, shapes, to_unconstrained = pyro_potential(posterior)
    u = {site: torch.as_tensor(x) for site, x in points(posterior, shapes, to_unconstrained).items()}
    expected = torch.stack([potential({site: x[i] for site, x in u.items()}) for i in range(NUM_POINTS)])
    values = {site: to_unconstrained[site].inv(x) for site, x in u.items()}
    log_det = sum(
        to_unconstrained[site].inv.log_abs_det_jacobian(u[site], value).reshape(NUM_POINTS, -1).sum(-1)
        for site, value in values.items()
    )

    def trace(values):
        return poutine.trace(poutine.condition(posterior.model, values)).get_trace(*posterior.args, **posterior.kwargs)

    single = trace({site: value[0] for site, value in values.items()}).nodes
    nesting = max((-frame.dim for site in single.values() for frame in site.get("cond_indep_stack", ())), default=0)
    for site, value in values.items():
        inner = nesting - len(single[site]["fn"].batch_shape)
        values[site] = value.reshape(NUM_POINTS, *(1,) * inner, *value.shape[1:])
    with pyro.plate("draws", NUM_POINTS, dim=-1 - nesting):
        batched = trace(values)
    batched.compute_log_prob()
    sites = {
        name: site
        for name, site in batched.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    }
    log_joint = sum(site["log_prob"].reshape(NUM_POINTS, -1).sum(-1) for site in sites.values())
    allowed = rounding(posterior, u) + 1e-12 * expected.abs().numpy()
    assert ((-(log_joint + log_det) - expected).abs().numpy() <= allowed).all()

    if posterior.reference:
        names, matrix = flatten({name: site["value"] for name, site in sites.items()}, posterior.mapping)
        assert names == posterior.reference.names and matrix.shape == (NUM_POINTS, len(names))


def test_absent_data_are_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PYROFLOWS_DATA", str(tmp_path))
    assert available() == [] and available_targets() == ["funnel"]
    backend = "pyro" if importlib.util.find_spec("pyro") else "numpyro"
    models = importlib.import_module(f"tests.benchmarks.models.{backend}_models")
    with pytest.raises(FileNotFoundError, match="set PYROFLOWS_DATA"):
        models.get("arK-arK")
    with pytest.raises(KeyError, match="unknown posterior 'arK'"):
        models.get("arK")
