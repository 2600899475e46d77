"""FlowVI with default settings on posteriors of known evidence: one row a target and seed, in markdown.

    python -m tests.benchmarks.targets --backend numpyro|pyro [--seeds 1] [--peers [name ...]] [names ...]

The gap ``log Z - ELBO`` is the KL divergence of the guide from the posterior in nats, so zero is the limit; the error
of the importance-sampled log evidence stands beside it. With ``--peers``, a second table of the same by ``peers``.
float64, defaults only. Reads its data from the folder that ``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib

from tests.benchmarks.models import TARGETS, available_targets
from tests.benchmarks.posteriors import add_options, fitter, peer_rows, print_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("names", nargs="*", choices=[*TARGETS, []])
    options = parser.parse_args()
    fit = fitter(options.backend)
    models = importlib.import_module(f"tests.benchmarks.models.{options.backend}_models")
    if absent := [name for name in TARGETS if name not in available_targets()]:
        print(f"Skipped, for PYROFLOWS_DATA names no folder with their data: {', '.join(absent)}.\n")
    targets = [models.get_target(name) for name in options.names or available_targets()]
    if not options.only_peers:
        print_row(
            "target", "d", "seed", "log Z", "gap", "+-", "log evidence: error", "+-", "Pareto k", "gradients", "s",
            "fit that was kept, of how many",
        )  # fmt: skip
        print("|" + "---|" * 12)
    for target in () if options.only_peers else targets:
        for seed in range(options.seeds):
            fitted = fit(target, seed)
            elbo, evidence = fitted.elbo, fitted._log_evidence()
            tried = fitted.history.tried
            kept = next((line.split(", ")[0] for line in tried if f"ELBO {elbo}," in line), tried[0])
            print_row(
                target.name, target.dimension, seed, f"{target.log_evidence:.3f}",
                f"{target.log_evidence - elbo.value:.4f}", f"{elbo.standard_error:.4f}",
                f"{evidence.value - target.log_evidence:.4f}", f"{evidence.standard_error:.4f}",
                f"{fitted.pareto_k:.2f}", fitted.history.gradients, f"{fitted.history.seconds:.0f}",
                f"{kept}, {len(tried)}",
            )  # fmt: skip
    if options.peers is None:
        return
    print("\n| target | peer | seed | gap | +- | gradients | s |\n|" + "---|" * 7)
    for target in targets:
        for name, seed, found in peer_rows(options, target):
            if name != "NUTS":  # which has no ELBO
                gap = f"{target.log_evidence - found.elbo:.4f}"
                print_row(target.name, name, seed, gap, f"{found.error:.4f}", found.gradients, f"{found.seconds:.0f}")


if __name__ == "__main__":
    main()
