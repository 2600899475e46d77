"""AutoHierarchicalFlow on a normal hierarchy of many groups, in minibatches, against the closed form: markdown tables.

    python -m tests.benchmarks.hierarchical --backend numpyro|pyro [--groups 100000] [--steps 10000] [guides ...]

``mu ~ N(0, 5), tau ~ HalfNormal(2), theta_i ~ N(mu, tau)`` and five observations ``N(theta_i, 1)`` a group; minibatches
of 256 groups, Adam with a cosine schedule, the path gradient. Guides: ``elements`` (each group has its location and
scale, which start at its likelihood), ``encoder`` (of the group's observations) and ``both``. Errors are those of the
means of 1,000 groups in posterior standard deviations, from 10,000 draws (which alone make a mean error of 0.008);
beside ``mu`` and ``tau`` stand their exact posterior means. The second table is of the milliseconds a step takes by the
number of groups: with parameters of elements Adam passes over all of them each time.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

OBSERVATIONS, BATCH, CHUNK = 5, 256, 500
RATES = {"elements": (2e-3, 1e-3), "encoder": (2e-2, 1e-3), "both": (2e-2, 1e-3)}  # of elements' parameters and others


def simulated(num_groups: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    theta = 1 + 0.7 * rng.standard_normal((num_groups, 1))
    return (theta + rng.standard_normal((num_groups, OBSERVATIONS))).astype(np.float32)


def closed_form(y: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """Means ``(groups,)`` and sd of the groups, means of ``mu`` and ``tau``: exact but for quadrature over ``tau``."""
    num_groups, n = y.shape
    means = y.mean(1).astype(float)
    log_tau = np.linspace(np.log(0.05), np.log(5), 40_001)
    tau = np.exp(log_tau)
    v = tau**2 + 1 / n
    wide = 25 + v / num_groups
    squares = np.square(means - means.mean()).sum()
    log_p = -0.5 * ((num_groups - 1) * np.log(v) + squares / v + np.log(wide) + means.mean() ** 2 / wide)
    log_p += log_tau - tau**2 / 8
    w = np.exp(log_p - log_p.max())
    w /= w.sum()
    var = 1 / (1 / 25 + num_groups / v)
    mu, weight = var * num_groups * means.mean() / v, tau**2 / v
    theta = (w * (1 - weight) * mu).sum() + (w * weight).sum() * means
    sd = np.sqrt((w * (tau**2 * (1 - weight) + (1 - weight) ** 2 * var)).sum())
    return theta, float(sd), float((w * mu).sum()), float((w * tau).sum())


def numpyro_run(y: np.ndarray, guide_name: str, steps: int) -> tuple[Callable, Callable, int]:
    """``train(num_steps)``, ``draws(index, n)`` and the number of parameters."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import optax
    from numpyro import distributions as dist
    from numpyro import handlers
    from numpyro.infer import SVI, Trace_ELBO

    from numpyro_flows import AutoHierarchicalFlow, conditioners

    def model(y, batch=None, index=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfNormal(2.0))
        with handlers.substitute(data={} if index is None else {"groups": index}):
            groups = numpyro.plate("groups", len(y), subsample_size=batch if index is None else len(index))
        with groups as i:
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta[:, None], 1.0).to_event(1), obs=y[i])

    encoder = conditioners.MLP(OBSERVATIONS, (32,), 8, key=jax.random.key(3))
    guide = AutoHierarchicalFlow(model, path_gradient=True, **options_of(guide_name, encoder))

    def labels(params):
        own = lambda site, name: site == "auto_groups$params" and name in ("loc", "log_scale")  # noqa: E731
        return {site: {name: "own" if own(site, name) else "net" for name in values} for site, values in params.items()}

    rates = [optax.adam(optax.cosine_decay_schedule(rate, steps)) for rate in RATES[guide_name]]
    svi = SVI(model, guide, optax.multi_transform(dict(zip(("own", "net"), rates, strict=True)), labels), Trace_ELBO())
    data = jnp.asarray(y)
    state = svi.init(jax.random.key(0), data, BATCH)
    update = jax.jit(lambda state, y: jax.lax.scan(lambda s, _: svi.update(s, y, BATCH), state, length=CHUNK))

    def train(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps // CHUNK):
            state, losses = update(state, data)
        losses.block_until_ready()

    def draws(index: np.ndarray, n: int) -> dict[str, np.ndarray]:
        params, present = svi.get_params(state), jnp.asarray(index)
        sample = jax.jit(lambda key: guide.sample_posterior(key, params, data, None, present, sample_shape=(n,)))
        return {name: np.asarray(value) for name, value in sample(jax.random.key(9)).items()}

    return train, draws, sum(x.size for x in jax.tree.leaves(svi.get_params(state)))


def pyro_run(y: np.ndarray, guide_name: str, steps: int) -> tuple[Callable, Callable, int]:
    """``train(num_steps)``, ``draws(index, n)`` and the number of parameters."""
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import Trace_ELBO

    from pyroflows import AutoHierarchicalFlow, conditioners

    def model(y, batch=None, index=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", len(y), subsample_size=batch, subsample=index) as i:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta[..., None], 1.0).to_event(1), obs=y[i])

    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    encoder = conditioners.MLP(OBSERVATIONS, (32,), 8)
    guide = AutoHierarchicalFlow(model, path_gradient=True, **options_of(guide_name, encoder))
    data = torch.as_tensor(y)
    guide(data, BATCH)
    own: list[Any] = []
    net: list[Any] = []
    for name, parameter in guide.named_parameters():
        (own if name.endswith(("groups.loc", "groups.log_scale")) else net).append(parameter)
    groups = [{"params": part, "lr": rate} for part, rate in zip((own, net), RATES[guide_name], strict=True)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    elbo = Trace_ELBO()

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            elbo.differentiable_loss(model, guide, data, BATCH).backward()
            optimizer.step()
            schedule.step()

    def draws(index: np.ndarray, n: int) -> dict[str, np.ndarray]:
        found = guide.sample_posterior(data, None, torch.as_tensor(index), sample_shape=(n,))
        return {name: value.numpy() for name, value in found.items()}

    return train, draws, sum(p.numel() for p in guide.parameters())


def options_of(guide_name: str, encoder: Any) -> dict[str, Any]:
    """The options of an ``AutoHierarchicalFlow`` by the name of its row."""
    return {
        "elements": {},
        "encoder": {"amortise": encoder},
        "both": {"amortise": encoder, "element_parameters": True},
    }[guide_name]


def row(run: Callable, guide_name: str, num_groups: int, steps: int) -> str:
    y = simulated(num_groups)
    theta, sd, mu, tau = closed_form(y)
    start = time.perf_counter()
    train, draws, num_parameters = run(y, guide_name, steps)
    train(CHUNK)
    warm = time.perf_counter()
    train(steps - CHUNK)
    end = time.perf_counter()
    index = np.random.default_rng(5).choice(num_groups, min(num_groups, 1000), replace=False)
    found = draws(index, 10_000)
    errors = np.abs(found["theta"].mean(0) - theta[index]) / sd
    ratios = found["theta"].std(0) / sd
    cells = [
        guide_name, num_groups, steps, num_parameters, f"{errors.mean():.3f}", f"{errors.max():.2f}",
        f"{ratios.min():.2f}-{ratios.max():.2f}", f"{found['mu'].mean():.4f}, {mu:.4f}",
        f"{found['tau'].mean():.4f}, {tau:.4f}", f"{1e3 * (end - warm) / max(steps - CHUNK, 1):.1f}",
        f"{end - start:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def milliseconds(run: Callable, guide_name: str, num_groups: int) -> float:
    train = run(simulated(num_groups), guide_name, 10 * CHUNK)[0]
    train(CHUNK)
    start = time.perf_counter()
    train(2 * CHUNK)
    return 1e3 * (time.perf_counter() - start) / (2 * CHUNK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("guides", nargs="*", choices=[*RATES, []])
    options = parser.parse_args()
    importlib.import_module(options.backend)
    run = {"numpyro": numpyro_run, "pyro": pyro_run}[options.backend]
    guides = options.guides or list(RATES)
    header = "guide | groups | steps | parameters | mean error | largest | sd ratios | mu | tau | ms a step | s"
    print(f"| {header} |\n|" + "---|" * 11)
    for name in guides:
        print(row(run, name, options.groups, options.steps), flush=True)
    print("\n| guide | " + " | ".join(f"{10**k:,} groups, ms" for k in (3, 4, 5)) + " |\n|" + "---|" * 4)
    for name in guides:
        print(
            f"| {name} | " + " | ".join(f"{milliseconds(run, name, 10**k):.2f}" for k in (3, 4, 5)) + " |", flush=True
        )


if __name__ == "__main__":
    main()
