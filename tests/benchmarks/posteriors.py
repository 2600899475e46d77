"""FlowVI with default settings against gold-standard draws: one row a posterior, in markdown.

    python -m tests.benchmarks.posteriors --backend numpyro [--seeds 1] [--max-dim 13] [names ...]

Columns: unconstrained dimension, ELBO, log evidence, Pareto k, largest mean error in reference standard deviations and
range of the ratios of standard deviations (of the guide's draws, and after importance resampling), gradient
evaluations, seconds. float64, defaults only. Reads its data from the folder that ``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.models import POSTERIORS, available, flatten


def fitter(backend: str) -> Callable[[Any, int], Any]:
    """Sets the backend to float64; returns ``fit(posterior, seed)``, which runs FlowVI with default settings."""
    package = importlib.import_module({"numpyro": "numpyro_flows", "pyro": "pyroflows"}[backend])
    ecosystem = importlib.import_module(backend)
    if backend == "numpyro":
        ecosystem.enable_x64()
    else:
        torch = importlib.import_module("torch")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)

    def fit(posterior: Any, seed: int) -> Any:
        vi = package.FlowVI(posterior.model, progress_bar=False)
        if backend == "numpyro":
            return vi.run(importlib.import_module("jax").random.key(seed), *posterior.args, **posterior.kwargs)
        ecosystem.set_rng_seed(seed)
        return vi.run(*posterior.args, **posterior.kwargs)

    return fit


def draws_of(backend: str, fitted: Any, seed: int, n: int = 20_000) -> list[dict[str, np.ndarray]]:
    """Draws of the guide, and importance-resampled ones."""
    key = (importlib.import_module("jax").random.key(seed + 1),) if backend == "numpyro" else ()
    return [
        {name: np.asarray(x) for name, x in d.items()}
        for d in (fitted.sample(*key, (n,)), fitted.importance_resample(*key, n))
    ]


def errors(draws: dict[str, np.ndarray], posterior: Any) -> str:
    """Largest |mean error| in reference sds, and the range of sd ratios."""
    x = flatten(draws, posterior.mapping)
    x = x[1] if isinstance(x, tuple) else x
    reference = posterior.reference
    mean = np.abs((x.mean(0) - reference.mean) / reference.sd).max()
    ratios = x.std(0) / reference.sd
    return f"{mean:.3f}, {ratios.min():.2f}-{ratios.max():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max-dim", type=int, default=13)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    fit = fitter(options.backend)
    models = importlib.import_module(f"tests.benchmarks.models.{options.backend}_models")
    names = options.names or [name for name in POSTERIORS if name in available()]
    if not names:
        print("No data found: set PYROFLOWS_DATA to the folder that holds posteriordb.")
        return
    header = "posterior | d | seed | ELBO | log evidence | Pareto k | mean, sd | resampled: mean, sd | gradients | s"
    print(f"| {header} |\n|" + "---|" * 10)
    for name in names:
        posterior = models.get(name)
        if posterior.dimension > options.max_dim:
            continue
        for seed in range(options.seeds):
            fitted = fit(posterior, seed)
            draws = draws_of(options.backend, fitted, seed)
            columns = [
                name.split("-")[-1], posterior.dimension, seed, f"{fitted.elbo.value:.3f}", fitted._log_evidence(),
                f"{fitted.pareto_k:.2f}", *(errors(d, posterior) for d in draws), fitted.history.gradients,
                f"{fitted.history.seconds:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join(map(str, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()
