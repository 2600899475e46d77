"""FlowVI with default settings against gold-standard draws: one row a posterior, in markdown.

    python -m tests.benchmarks.posteriors --backend numpyro [--seeds 1] [--max-dim 13] [names ...]

Columns: unconstrained dimension, ELBO, log evidence, Pareto k, largest mean error in reference standard deviations and
range of the ratios of standard deviations (of the guide's draws, and after importance resampling), gradient
evaluations, seconds. float64, defaults only. Reads its data from the folder that ``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

from tests.benchmarks.models import POSTERIORS, available, flatten


def fit_numpyro(posterior: Any, seed: int) -> tuple[Any, list[dict[str, np.ndarray]]]:
    import jax

    from numpyro_flows import FlowVI

    fitted = FlowVI(posterior.model, progress_bar=False).run(jax.random.key(seed), *posterior.args, **posterior.kwargs)
    key = jax.random.key(seed + 1)
    return fitted, [fitted.sample(key, (20_000,)), fitted.importance_resample(key, 20_000)]


def fit_pyro(posterior: Any, seed: int) -> tuple[Any, list[dict[str, np.ndarray]]]:
    import pyro

    from pyroflows import FlowVI

    pyro.set_rng_seed(seed)
    fitted = FlowVI(posterior.model, progress_bar=False).run(*posterior.args, **posterior.kwargs)
    draws = [fitted.sample((20_000,)), fitted.importance_resample(20_000)]
    return fitted, [{name: x.numpy(force=True) for name, x in d.items()} for d in draws]


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
    if options.backend == "numpyro":
        importlib.import_module("numpyro").enable_x64()
        fit = fit_numpyro
    else:
        torch = importlib.import_module("torch")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        fit = fit_pyro
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
            fitted, draws = fit(posterior, seed)
            columns = [
                name.split("-")[-1], posterior.dimension, seed, f"{fitted.elbo.value:.3f}", fitted._log_evidence(),
                f"{fitted.pareto_k:.2f}", *(errors(d, posterior) for d in draws), fitted.history.gradients,
                f"{fitted.history.seconds:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join(map(str, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()
