"""FlowVI on models written twice, centred and non-centred by hand: a markdown table.

    python -m tests.benchmarks.parametrisation --backend numpyro|pyro [--models ...] [--seeds 1] [--plain]

Both forms of a model have the same evidence, so that their ELBOs can be compared, and neither should cost the fit
anything: latents whose prior depends on others are non-centred by the guide, those of a fixed normal prior centred.

``groups``: varying intercepts and slopes of 919 observations in 85 groups (as simulated in ``tests.benchmarks.radon``);
``counts``: Poisson counts of 40 groups with a log-rate each; ``walk``: the volatility of ``tests.benchmarks.neutra``;
``process``: Poisson counts at 30 places, whose log-rate is a Gaussian process of unknown amplitude and length scale;
``counties``: varying intercepts of 2,000 observations in 386 groups (390 latents), which is not run unless named.
Columns: number of latents, log evidence, its gap to the ELBO in nats (also that of the first fit), Pareto k, the
verdict's first words, millions of gradients, seconds with compilation. ``--plain`` adds fits with
``noncentered=False``. float64.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.neutra import NumPyro, Pyro
from tests.benchmarks.posteriors import print_row
from tests.benchmarks.radon import simulated

GROUPS, PLACES, COUNTIES = 40, 30, 386


def models(lab: Any, ecosystem: Any, xp: Any) -> dict[str, Callable[[bool], None]]:
    """``model(centred)`` by name, in NumPyro or Pyro (``ecosystem``) with jax.numpy or torch (``xp``)."""
    array, volatility = lab.array, lab.targets["volatility"]
    dist, sample, plate = ecosystem.distributions, ecosystem.sample, ecosystem.plate
    rng = np.random.default_rng(0)
    county, floor, uranium, radon = simulated()

    def effects(name: str, loc: Any, scale: Any, size: int, centred: bool) -> Any:
        """Independent normal effects."""
        zeros = array(np.zeros(size))
        if centred:
            return sample(name, dist.Normal(loc + zeros, scale).to_event(1))
        return loc + scale * sample(f"{name}_z", dist.Normal(zeros, array(1.0)).to_event(1))

    def correlated(name: str, root: Any, size: int, centred: bool) -> Any:
        """Effects of mean zero with a Cholesky factor."""
        zeros = array(np.zeros(size))
        if centred:
            return sample(name, dist.MultivariateNormal(zeros, scale_tril=root))
        return root @ sample(f"{name}_z", dist.Normal(zeros, array(1.0)).to_event(1))

    def groups(centred: bool) -> None:
        mu_a, gamma = sample("mu_a", dist.Normal(array(0.0), 5.0)), sample("gamma", dist.Normal(array(0.0), 2.0))
        mu_b = sample("mu_b", dist.Normal(array(0.0), 2.0))
        sigma_a, sigma_b = (sample(name, dist.HalfNormal(array(1.0))) for name in ("sigma_a", "sigma_b"))
        sigma = sample("sigma", dist.HalfNormal(array(2.0)))
        alpha = effects("alpha", mu_a + gamma * array(uranium), sigma_a, len(uranium), centred)
        beta = effects("beta", mu_b, sigma_b, len(uranium), centred)
        with plate("houses", len(radon)):
            sample("y", dist.Normal(alpha[county] + beta[county] * array(floor), sigma), obs=array(radon))

    observed = rng.poisson(np.exp(1.0 + 0.7 * rng.standard_normal(GROUPS)))

    def counts(centred: bool) -> None:
        mu, tau = sample("mu", dist.Normal(array(0.0), 2.0)), sample("tau", dist.HalfCauchy(array(1.0)))
        log_rate = effects("log_rate", mu, tau, GROUPS, centred)
        with plate("groups", GROUPS):
            sample("y", dist.Poisson(xp.exp(log_rate)), obs=array(observed.astype(float)))

    places = np.linspace(0, 6, PLACES)
    at_places = rng.poisson(np.exp(1 + np.sin(places)))
    square = array(np.square(places[:, None] - places))

    def process(centred: bool) -> None:
        amplitude, length = (
            sample("amplitude", dist.HalfNormal(array(2.0))),
            sample("length", dist.Gamma(array(4.0), 4.0)),
        )
        covariance = amplitude**2 * xp.exp(-0.5 * square / length**2) + array(1e-6 * np.eye(PLACES))
        f = correlated("f", xp.linalg.cholesky(covariance), PLACES, centred)
        with plate("places", PLACES):
            sample("y", dist.Poisson(xp.exp(1.0 + f)), obs=array(at_places.astype(float)))

    of_many = rng.choice(COUNTIES, 2000 - COUNTIES, p=rng.dirichlet(np.ones(COUNTIES)))
    member = np.concatenate([np.arange(COUNTIES), of_many])
    treated = rng.binomial(1, 0.2, 2000).astype(float)
    outcome = 1.2 + 0.4 * rng.standard_normal(COUNTIES)[member] - 0.6 * treated + 0.75 * rng.standard_normal(2000)

    def counties(centred: bool) -> None:
        mu, beta = sample("mu", dist.Normal(array(0.0), 10.0)), sample("beta", dist.Normal(array(0.0), 10.0))
        tau, sigma = (sample(name, dist.HalfNormal(array(1.0))) for name in ("tau", "sigma"))
        alpha = effects("alpha", mu, tau, COUNTIES, centred)
        with plate("observations", len(outcome)):
            sample("y", dist.Normal(alpha[member] + beta * array(treated), sigma), obs=array(outcome))

    def walk(centred: bool) -> None:
        (volatility.model if centred else volatility.noncentred)()

    return {"groups": groups, "counts": counts, "walk": walk, "process": process, "counties": counties}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--models", nargs="*", default=["groups", "counts", "walk", "process"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="also with noncentered=False")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.backend == "numpyro":
        lab: Any = NumPyro()
        known = models(lab, lab.numpyro, lab.jax.numpy)
    else:
        lab = Pyro()
        known = models(lab, lab.pyro, lab.torch)
    if unknown := [name for name in options.models if name not in known]:
        raise SystemExit(f"Unknown models {unknown}: there are {list(known)}.")
    print("| model | form | d | log evidence | gap | of the first fit | Pareto k | verdict | gradients | s |")
    print("|" + "---|" * 10)
    for name in options.models:
        for noncentered in (True, False)[: 1 + options.plain]:
            for centred in (True, False):
                for seed in range(options.seeds):
                    begin = time.perf_counter()
                    posterior = lab.fit(lambda: known[name](centred), seed, noncentered=noncentered)  # noqa: B023
                    seconds = time.perf_counter() - begin
                    first = re.search(r"gap (\S+),", posterior.history.tried[0])
                    form = ("centred" if centred else "by hand") + ("" if noncentered else ", plain")
                    evidence = posterior._log_evidence().value
                    print_row(
                        name, form, posterior.draws.unconstrained.shape[-1], f"{evidence:.2f}", f"{posterior._gap:.3f}",
                        first[1] if first else "", f"{posterior.pareto_k:.2f}", posterior.verdict().split(":")[0],
                        f"{posterior.history.gradients / 1e6:.2f}", f"{seconds:.0f}",
                    )  # fmt: skip


if __name__ == "__main__":
    main()
