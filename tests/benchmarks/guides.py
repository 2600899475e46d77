"""Every flow of ``flows.FLOWS`` as the guide of one posterior, centred eight schools: a markdown table.

    python -m tests.benchmarks.guides --backend numpyro|pyro [--steps 2000] [--seed 0] [flows ...]

``FlowVI`` with all its defaults but the flow and the number of steps, in float64. The log evidence is -31.311 (by
two-dimensional quadrature): no ELBO may lie above it by more than its Monte-Carlo error. ``mu`` and ``tau`` are means
and standard deviations of the guide's draws; the truth is 4.40, 3.32 and 3.60, 3.22.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

ANGLES = {"ncsf"}  # flows of angles, which no latent here is


def fit(backend: str, name: str, steps: int, seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    package = importlib.import_module({"pyro": "pyroflows", "numpyro": "numpyro_flows"}[backend])
    model = importlib.import_module(f"tests.inference.models_{backend}").eight_schools
    vi = package.FlowVI(model, package.flows.FLOWS[name], num_steps=steps, progress_bar=False)
    if backend == "numpyro":
        key = importlib.import_module("jax").random.key(seed)
        posterior = vi.run(key)
        draws = posterior.sample(key, (20_000,))
    else:
        importlib.import_module("pyro").set_rng_seed(seed)
        posterior = vi.run()
        draws = posterior.sample((20_000,))
    return posterior, {name: np.asarray(value) for name, value in draws.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flows", nargs="*")
    options = parser.parse_args()
    if options.backend == "numpyro":
        importlib.import_module("numpyro").enable_x64()
    else:
        torch = importlib.import_module("torch")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
    package = importlib.import_module({"pyro": "pyroflows", "numpyro": "numpyro_flows"}[options.backend])
    print("| flow | ELBO | Pareto k | mu | tau | s |\n|" + "---|" * 6)
    for name in options.flows or [name for name in package.flows.FLOWS if name not in ANGLES]:
        posterior, draws = fit(options.backend, name, options.steps, options.seed)
        moments = [f"{draws[site].mean():.2f}, {draws[site].std():.2f}" for site in ("mu", "tau")]
        cells = [name, posterior.elbo, f"{posterior.pareto_k:.2f}", *moments, f"{posterior.history.seconds:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
