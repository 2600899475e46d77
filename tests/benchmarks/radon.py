"""Guides of a varying-intercept-and-slope regression against long NUTS: a markdown table.

    python -m tests.benchmarks.radon --backend numpyro|pyro [--steps 5000] [--particles 16] [guides ...]

A simulation of the size of the radon survey of Minnesota (Gelman & Hill 2007, chapter 12): 919 houses in 85 counties of
1 to 55, a predictor of the house (its floor) and one of the county (its uranium)::

    mu_a ~ N(0, 5), gamma, mu_b ~ N(0, 2), sigma_a, sigma_b ~ HalfNormal(1), sigma ~ HalfNormal(2)
    alpha_j ~ N(mu_a + gamma uranium_j, sigma_a), beta_j ~ N(mu_b, sigma_b)
    y_i ~ N(alpha_j + beta_j floor_i, sigma),  j the county of house i

that is 176 latents, centred. The reference is NumPyro's NUTS on the non-centred model, four chains of 5,000 draws.
Every guide is trained by the ecosystem's SVI: as many steps of as many draws, Adam from 5e-3 down along a cosine, with
gradients of a norm of at most 10 (in NumPyro of all parameters together, in Pyro of each, as its optimisers do), since
the first of them are far larger and would hold Adam back for long.
``elements`` and ``both`` are ``AutoHierarchicalFlow`` with the path gradient: parameters of every county, and besides
an encoder of its numbers of houses, means and uranium. The others are as they come. Columns: ELBO (of 4,096 draws),
largest error of a mean in reference standard deviations, range of the ratios of standard deviations (both over
all 176 latents, from 10,000 draws), parameters, seconds with compilation. float64. ``pip install '.[all,benchmark]'``.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.hierarchical import RATES, options_of
from tests.benchmarks.peers import LEARNING_RATE, pyro_schedule
from tests.benchmarks.posteriors import print_row

COUNTIES, HOUSES = 85, 919
GUIDES = {
    "numpyro": ["elements", "both", "AutoNormal", "AutoLowRankMultivariateNormal", "AutoIAFNormal", "AutoSemiDAIS"],
    "pyro": [
        "elements", "both", "AutoNormal", "AutoLowRankMultivariateNormal", "AutoIAFNormal", "AutoStructured",
        "AutoNormalMessenger",
    ],
}  # fmt: skip
SITES = ("mu_a", "gamma", "mu_b", "sigma_a", "sigma_b", "sigma", "alpha", "beta")
DRAWS, ELBO_DRAWS, CLIP = 10_000, 4096, 10.0


def simulated() -> tuple[np.ndarray, ...]:
    """County ``(houses,)``, floor, uranium ``(counties,)`` and log radon ``(houses,)``."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(sigma=1.2, size=COUNTIES)
    county = np.concatenate([np.arange(COUNTIES), rng.choice(COUNTIES, HOUSES - COUNTIES, p=share / share.sum())])
    floor, uranium = (rng.random(HOUSES) < 1 / 6).astype(float), 0.4 * rng.standard_normal(COUNTIES)
    alpha = 1.5 + 0.7 * uranium + 0.2 * rng.standard_normal(COUNTIES)
    beta = -0.65 + 0.3 * rng.standard_normal(COUNTIES)
    return county, floor, uranium, alpha[county] + beta[county] * floor + 0.75 * rng.standard_normal(HOUSES)


def features(county: np.ndarray, floor: np.ndarray, uranium: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What an encoder sees of every county ``(counties, 6)``, standardised."""
    houses, above, total, total_above = (np.bincount(county, w, COUNTIES) for w in (None, floor, y, y * floor))
    columns = (
        np.log(houses), np.log1p(above), total / houses, total_above / np.maximum(above, 1),
        (total - total_above) / np.maximum(houses - above, 1), uranium,
    )  # fmt: skip
    table = np.stack(columns, -1)
    return (table - table.mean(0)) / table.std(0)


def hierarchical_guide(kind: Callable, name: str, model: Callable, encoder: Any, seen: Any) -> Any:
    options = options_of(name, encoder)
    return kind(model, path_gradient=True, **options, **({"data": lambda *_: seen} if options else {}))


def sampled(ppl: Any) -> tuple[Any, ...]:
    """The global latents, in either ecosystem."""
    normal, half_normal = ppl.distributions.Normal, ppl.distributions.HalfNormal
    priors = (normal(0.0, 5.0), *[normal(0.0, 2.0)] * 2, *[half_normal(1.0)] * 2, half_normal(2.0))
    return tuple(ppl.sample(name, prior) for name, prior in zip(SITES, priors, strict=False))


def numpyro_model(county: Any, floor: Any, uranium: Any, y: Any) -> None:
    import numpyro
    from numpyro import distributions as dist

    mu_a, gamma, mu_b, sigma_a, sigma_b, sigma = sampled(numpyro)
    with numpyro.plate("counties", COUNTIES):
        alpha = numpyro.sample("alpha", dist.Normal(mu_a + gamma * uranium, sigma_a))
        beta = numpyro.sample("beta", dist.Normal(mu_b, sigma_b))
    with numpyro.plate("houses", HOUSES):
        numpyro.sample("y", dist.Normal(alpha[county] + beta[county] * floor, sigma), obs=y)


def reference(data: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Draws by NUTS of the non-centred model."""
    import jax
    import numpyro
    from numpyro.infer import MCMC, NUTS
    from numpyro.infer.reparam import LocScaleReparam

    numpyro.enable_x64()
    config = {"alpha": LocScaleReparam(0.0), "beta": LocScaleReparam(0.0)}
    kernel = NUTS(numpyro.handlers.reparam(numpyro_model, config=config), target_accept_prob=0.9)
    mcmc = MCMC(
        kernel, num_warmup=2000, num_samples=5000, num_chains=4, chain_method="vectorized", progress_bar=False
    )  # fmt: skip
    mcmc.run(jax.random.key(0), *data)
    draws = mcmc.get_samples(group_by_chain=True)
    worst = max(float(np.max(numpyro.diagnostics.split_gelman_rubin(np.asarray(draws[site])))) for site in SITES)
    least = min(float(np.min(numpyro.diagnostics.effective_sample_size(np.asarray(draws[site])))) for site in SITES)
    print(f"Reference: R-hat at most {worst:.4f}, effective sample size at least {least:.0f}.\n", flush=True)
    return {site: np.asarray(draws[site]).reshape(20_000, -1) for site in SITES}


def by_county(county: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Values of the houses as ``(counties, most houses of one)``, and which cells are houses."""
    place = np.zeros(len(county), int)
    for j in range(COUNTIES):
        place[county == j] = np.arange((county == j).sum())
    found = np.zeros((1 + len(values), COUNTIES, place.max() + 1))
    for table, value in zip(found, (*values, np.ones(len(county))), strict=True):
        table[county, place] = value
    return tuple(found)


def numpyro_run(guide_name: str, data: tuple[np.ndarray, ...], steps: int, particles: int) -> tuple[Any, ...]:
    """ELBO, draws, number of parameters, seconds."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import optax
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    from numpyro_flows import AutoHierarchicalFlow, conditioners

    model: Callable = numpyro_model
    if guide_name == "AutoSemiDAIS":  # its local model must be of one county at a time
        uranium, floors, ys, is_house = (jnp.asarray(a) for a in (data[2], *by_county(data[0], data[1], data[3])))

        def global_model(*_):
            return dict(zip(SITES, sampled(numpyro), strict=False))

        def local_model(found):
            mu_a, gamma, mu_b, sigma_a, sigma_b, sigma = (found[name] for name in SITES[:6])
            with numpyro.plate("counties", COUNTIES) as index:
                alpha = numpyro.sample("alpha", dist.Normal(mu_a + gamma * uranium[index], sigma_a))
                beta = numpyro.sample("beta", dist.Normal(mu_b, sigma_b))
                houses = dist.Normal(alpha[:, None] + beta[:, None] * floors[index], sigma)
                numpyro.sample("y", houses.mask(is_house[index] > 0).to_event(1), obs=ys[index])

        def model(*_):
            local_model(global_model())

        guide = autoguide.AutoSemiDAIS(
            model, local_model, autoguide.AutoNormal(global_model), subsample_plate="counties"
        )  # fmt: skip
    elif guide_name in RATES:
        encoder = conditioners.MLP(6, (32,), 8, key=jax.random.key(3))
        guide = hierarchical_guide(AutoHierarchicalFlow, guide_name, model, encoder, jnp.asarray(features(*data)))
    else:
        guide = getattr(autoguide, guide_name)(model)
    begin = time.perf_counter()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True)
    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    svi = SVI(model, guide, optax.chain(optax.clip_by_global_norm(CLIP), adam), elbo)
    params = svi.run(jax.random.key(0), steps, *data, progress_bar=False, stable_update=True).params
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    many = Trace_ELBO(num_particles=256, vectorize_particles=True)
    loss = jax.jit(lambda key: many.loss(key, params, model, guide, *data))
    values = [-float(loss(key)) for key in jax.random.split(jax.random.key(1), ELBO_DRAWS // 256)]
    arguments = data if isinstance(guide, AutoHierarchicalFlow) else ()
    draws = guide.sample_posterior(jax.random.key(2), params, *arguments, sample_shape=(DRAWS,))
    size = sum(x.size for x in jax.tree.leaves(params))
    found = {name: np.asarray(draws[name]).reshape(DRAWS, -1) for name in SITES}
    return float(np.mean(values)), found, size, seconds


def pyro_run(guide_name: str, data: tuple[np.ndarray, ...], steps: int, particles: int) -> tuple[Any, ...]:
    """ELBO, draws, number of parameters, seconds."""
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI, Predictive, Trace_ELBO, autoguide

    from pyroflows import AutoHierarchicalFlow, conditioners

    def model(county, floor, uranium, y):
        mu_a, gamma, mu_b, sigma_a, sigma_b, sigma = sampled(pyro)
        with pyro.plate("counties", COUNTIES):
            alpha = pyro.sample("alpha", dist.Normal(mu_a + gamma * uranium, sigma_a))
            beta = pyro.sample("beta", dist.Normal(mu_b, sigma_b))
        with pyro.plate("houses", HOUSES):
            pyro.sample("y", dist.Normal(alpha[..., county] + beta[..., county] * floor, sigma), obs=y)

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    tensors = tuple(torch.as_tensor(a) for a in data)
    if guide_name in RATES:
        encoder, seen = conditioners.MLP(6, (32,), 8), torch.as_tensor(features(*data))
        guide = hierarchical_guide(AutoHierarchicalFlow, guide_name, model, encoder, seen)
    else:
        guide = getattr(autoguide, guide_name)(model)
    begin = time.perf_counter()
    guide(*tensors)
    schedule = pyro_schedule(steps, CLIP)
    svi = SVI(model, guide, schedule, Trace_ELBO(particles, max_plate_nesting=1, vectorize_particles=True))
    for _ in range(steps):
        svi.step(*tensors)
        schedule.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        many = Trace_ELBO(256, max_plate_nesting=1, vectorize_particles=True)
        values = [-many.loss(model, guide, *tensors) for _ in range(ELBO_DRAWS // 256)]
        if isinstance(guide, AutoHierarchicalFlow):
            draws = guide.sample_posterior(*tensors, sample_shape=(DRAWS,))
        else:
            draws = Predictive(guide, num_samples=DRAWS, parallel=True)(*tensors)
    size = sum(p.numel() for p in pyro.get_param_store().values())
    found = {name: draws[name].numpy(force=True).reshape(DRAWS, -1) for name in SITES}
    return float(np.mean(values)), found, size, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("guides", nargs="*")
    options = parser.parse_args()
    known = GUIDES[options.backend]
    if unknown := [name for name in options.guides if name not in known]:
        raise SystemExit(f"Unknown guides {unknown}: in {options.backend} there are {known}.")
    importlib.import_module(options.backend)
    data = simulated()
    truth = reference(data)
    run = {"numpyro": numpyro_run, "pyro": pyro_run}[options.backend]
    print("| guide | ELBO | largest mean error | sd ratios | parameters | s |\n|" + "---|" * 6)
    for name in options.guides or known:
        elbo, draws, size, seconds = run(name, data, options.steps, options.particles)
        errors, ratios = [], []
        for site in SITES:
            sd = truth[site].std(0)
            errors.append(np.max(np.abs(draws[site].mean(0) - truth[site].mean(0)) / sd))
            ratios.append(np.ravel(draws[site].std(0) / sd))
        spread = np.concatenate(ratios)
        print_row(
            name, f"{elbo:.2f}", f"{max(errors):.3f}", f"{spread.min():.2f}-{spread.max():.2f}", size, f"{seconds:.0f}"
        )  # fmt: skip


if __name__ == "__main__":
    main()
