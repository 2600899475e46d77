"""FlowVI with default settings against gold-standard draws: one row a posterior, in markdown.

    python -m tests.benchmarks.posteriors --backend numpyro [--seeds 1] [--max-dim 30] [--processes 1]
        [--peers [name ...]] [names ...]

Columns: unconstrained dimension, ELBO, log evidence, Pareto k, largest mean error in reference standard deviations and
range of the ratios of standard deviations (of the guide's draws, and after importance resampling), maximum mean
discrepancy to the reference draws (likewise), gradient evaluations, seconds; with several seeds, a second table of the
worst of them. ``--processes`` share the fits. With ``--peers``, a table of the same by ``peers``, on as many steps of
as many draws as FlowVI takes at most (``--peer-steps``, ``--peer-particles``). float64, defaults only. Reads its data
from the folder that ``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby, product
from typing import Any, NamedTuple

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
        for d in (fitted.sample(*key, n, deterministic=True), fitted.importance_resample(*key, n, deterministic=True))
    ]


def scalars(draws: dict[str, np.ndarray], posterior: Any) -> np.ndarray:
    """The reference's scalars, ``(draws, scalars)``."""
    return flatten(draws, posterior.mapping)[1]


class Errors(NamedTuple):
    """Largest |mean error| in reference standard deviations, and the range of the ratios of these."""

    mean: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}, {self.least:.2f}-{self.most:.2f}"


def errors(x: np.ndarray, posterior: Any) -> Errors:
    reference = posterior.reference
    ratios = x.std(0) / reference.sd
    return Errors(np.abs((x.mean(0) - reference.mean) / reference.sd).max(), ratios.min(), ratios.max())


class Fit(NamedTuple):
    """What FlowVI makes of a posterior; errors and discrepancies are of the guide's draws and of resampled ones."""

    name: str
    dimension: int
    seed: int
    elbo: float
    log_evidence: float
    pareto_k: float
    errors: tuple[Errors, Errors]
    discrepancies: tuple[float, float]
    gradients: int
    seconds: float


def measured(backend: str, name: str, seed: int) -> Fit:
    fit = fitter(backend)  # sets the precision of the data
    posterior = importlib.import_module(f"tests.benchmarks.models.{backend}_models").get(name)
    fitted = fit(posterior, seed)
    plain, resampled = (scalars(draws, posterior) for draws in draws_of(backend, fitted, seed))
    return Fit(
        name.split("-")[-1], posterior.dimension, seed, fitted.elbo.value, fitted._log_evidence().value,
        fitted.pareto_k, (errors(plain, posterior), errors(resampled, posterior)),
        (peers.mmd(plain, posterior.reference.draws), peers.mmd(resampled, posterior.reference.draws)),
        fitted.history.gradients, fitted.history.seconds,
    )  # fmt: skip


def all_measured(backend: str, names: list[str], seeds: int, processes: int) -> Iterator[Fit]:
    """One fit after the other, as they are done."""
    tasks = [(backend, name, seed) for name, seed in product(names, range(seeds))]
    if processes == 1:
        yield from (measured(*task) for task in tasks)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(measured, *task) for task in tasks]):
                yield future.result()
        finally:  # of an error, too, or Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)


def print_worst(fits: list[Fit]) -> None:
    """The table of the README: of all seeds, the worst number or the range."""
    columns = ("posterior", "d", "log evidence", "ELBO", "Pareto k", "mean, sd", "resampled: mean, sd")
    print()
    print_row(*columns, "million gradients", "s")
    print("|" + "---|" * 9)
    for (name, dimension), group in groupby(sorted(fits), key=lambda fit: fit[:2]):
        seeds = list(group)
        worst = [
            Errors(max(e.mean for e in kind), min(e.least for e in kind), max(e.most for e in kind))
            for kind in zip(*(fit.errors for fit in seeds), strict=True)
        ]
        gradients, seconds = [fit.gradients / 1e6 for fit in seeds], [fit.seconds for fit in seeds]
        print_row(
            name, dimension, f"{np.mean([fit.log_evidence for fit in seeds]):.3f}",
            f"{min(fit.elbo for fit in seeds):.3f}", f"{max(fit.pareto_k for fit in seeds):.2f}", *worst,
            f"{min(gradients):.2f}-{max(gradients):.2f}", f"{min(seconds):.0f}-{max(seconds):.0f}",
        )  # fmt: skip


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
    parser.add_argument("--processes", type=int, default=1, help="that share the fits of FlowVI")
    parser.add_argument("names", nargs="*", type=lambda name: short.get(name, name), choices=[*POSTERIORS, []])
    options = parser.parse_args()
    fitter(options.backend)
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
        began, fits = time.perf_counter(), []
        for fit in all_measured(options.backend, [p.name for p in posteriors], options.seeds, options.processes):
            fits.append(fit)
            print_row(
                *fit[:3], f"{fit.elbo:.3f}", f"{fit.log_evidence:.3f}", f"{fit.pareto_k:.2f}", fit.errors[0],
                f"{fit.discrepancies[0]:.3f}", fit.errors[1], f"{fit.discrepancies[1]:.3f}", fit.gradients,
                f"{fit.seconds:.0f}",
            )  # fmt: skip
        if options.seeds > 1:
            print_worst(fits)
        print(f"\nIn all: {(time.perf_counter() - began) / 60:.1f} minutes.")
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
