"""FlowVI with default settings against gold-standard draws: one row a posterior, in markdown.

    python -m tests.benchmarks.posteriors --backend numpyro [--seeds 1] [--max-dim 30] [--peers [name ...]] [names ...]

Columns: unconstrained dimension, ELBO, log evidence, Pareto k, largest mean error in reference standard deviations and
range of the ratios of standard deviations (of the guide's draws, and after importance resampling), maximum mean
discrepancy to the reference draws (likewise), gradient evaluations, seconds. With ``--peers``, a second table of the
same by ``peers``, on as many steps of as many draws as FlowVI takes at most (``--peer-steps``, ``--peer-particles``).
float64, defaults only. Reads its data from the folder that ``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.benchmarks import peers
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


def scalars(draws: dict[str, np.ndarray], posterior: Any) -> np.ndarray:
    """The reference's scalars, ``(draws, scalars)``."""
    return flatten(draws, posterior.mapping)[1]


def errors(x: np.ndarray, posterior: Any) -> str:
    """Largest |mean error| in reference sds, and the range of sd ratios."""
    reference = posterior.reference
    mean = np.abs((x.mean(0) - reference.mean) / reference.sd).max()
    ratios = x.std(0) / reference.sd
    return f"{mean:.3f}, {ratios.min():.2f}-{ratios.max():.2f}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the benchmarks of posteriors and of targets share."""
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peers", nargs="*", help="peers to run as well: all of the backend's, or those named")
    parser.add_argument("--peer-steps", type=int, default=5000)
    parser.add_argument("--peer-particles", type=int, default=256)
    parser.add_argument("--only-peers", action="store_true", help="without FlowVI")


def peer_rows(options: argparse.Namespace, posterior: Any) -> Iterator[tuple[str, int, peers.Result]]:
    """Every peer asked for on a posterior, by its name and seed; one that fails is told and left out."""
    known = peers.NAMES[options.backend]
    chosen = known if options.peers == [] else options.peers or []
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"--peers {unknown}: known in {options.backend} are {known}.")
    for name in chosen:
        for seed in range(options.seeds):
            try:
                found = peers.run(
                    options.backend, name, posterior, seed, options.peer_steps, options.peer_particles
                )  # fmt: skip
            except Exception as error:  # whatever a peer cannot do: the others go on
                print(f"{name} on {posterior.name} failed: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            yield name, seed, found


def print_row(*columns: Any) -> None:
    print("| " + " | ".join(map(str, columns)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--max-dim", type=int, help="of the posteriors; 13 unless some are named")
    short = {name.split("-")[-1]: name for name in POSTERIORS}  # as the table has them
    parser.add_argument("names", nargs="*", type=lambda name: short.get(name, name), choices=[*POSTERIORS, []])
    options = parser.parse_args()
    fit = fitter(options.backend)
    models = importlib.import_module(f"tests.benchmarks.models.{options.backend}_models")
    names = options.names or [name for name in POSTERIORS if name in available()]
    if not names:
        print("No data found: set PYROFLOWS_DATA to the folder that holds posteriordb.")
        return
    most = options.max_dim or (math.inf if options.names else 13)
    posteriors = [posterior for posterior in map(models.get, names) if posterior.dimension <= most]
    if not options.only_peers:
        print_row(
            "posterior", "d", "seed", "ELBO", "log evidence", "Pareto k", "mean, sd", "MMD", "resampled: mean, sd",
            "MMD", "gradients", "s",
        )  # fmt: skip
        print("|" + "---|" * 12)
    for posterior in () if options.only_peers else posteriors:
        for seed in range(options.seeds):
            fitted = fit(posterior, seed)
            draws = [scalars(d, posterior) for d in draws_of(options.backend, fitted, seed)]
            compared = [(errors(x, posterior), f"{peers.mmd(x, posterior.reference.draws):.3f}") for x in draws]
            print_row(
                posterior.name.split("-")[-1], posterior.dimension, seed, f"{fitted.elbo.value:.3f}",
                fitted._log_evidence(), f"{fitted.pareto_k:.2f}", *compared[0], *compared[1], fitted.history.gradients,
                f"{fitted.history.seconds:.0f}",
            )  # fmt: skip
    if options.peers is None:
        return
    print("\n| posterior | peer | seed | ELBO | mean, sd | MMD | gradients | s |\n|" + "---|" * 8)
    for posterior in posteriors:
        for name, seed, found in peer_rows(options, posterior):
            x = scalars(found.draws, posterior)
            elbo = "" if np.isnan(found.elbo) else f"{found.elbo:.3f} +- {found.error:.3f}"
            print_row(
                posterior.name.split("-")[-1], name, seed, elbo, errors(x, posterior),
                f"{peers.mmd(x, posterior.reference.draws):.3f}", found.gradients, f"{found.seconds:.0f}",
            )  # fmt: skip


if __name__ == "__main__":
    main()
