"""FlowVI with default settings on posteriors of known evidence: one row a target and seed, in markdown.

    python -m tests.benchmarks.targets --backend numpyro|pyro [--seeds 1] [names ...]

The gap ``log Z - ELBO`` is the KL divergence of the guide from the posterior in nats, so zero is the limit; the error
of the importance-sampled log evidence stands beside it. float64, defaults only. Reads its data from the folder that
``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib

from tests.benchmarks.models import TARGETS, available_targets
from tests.benchmarks.posteriors import fitter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    fit = fitter(options.backend)
    models = importlib.import_module(f"tests.benchmarks.models.{options.backend}_models")
    if absent := [name for name in TARGETS if name not in available_targets()]:
        print(f"Skipped, for PYROFLOWS_DATA names no folder with their data: {', '.join(absent)}.\n")
    header = "target | d | seed | log Z | gap | +- | log evidence: error | +- | Pareto k | gradients | s"
    print(f"| {header} |\n|" + "---|" * 11)
    for name in options.names or available_targets():
        target = models.get_target(name)
        for seed in range(options.seeds):
            fitted = fit(target, seed)
            elbo, evidence = fitted.elbo, fitted._log_evidence()
            columns = [
                name, target.dimension, seed, f"{target.log_evidence:.3f}",
                f"{target.log_evidence - elbo.value:.4f}", f"{elbo.standard_error:.4f}",
                f"{evidence.value - target.log_evidence:.4f}", f"{evidence.standard_error:.4f}",
                f"{fitted.pareto_k:.2f}", fitted.history.gradients, f"{fitted.history.seconds:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join(map(str, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()
