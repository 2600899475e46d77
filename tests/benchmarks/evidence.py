"""The log evidence by three estimators against its true value, and the acceptance of independent proposals.

    python -m tests.benchmarks.evidence --backend numpyro|pyro [--seeds 20] [--tables closed,compare,acceptance] [names]

- ``closed``: linear regressions and mixtures of normals of known evidence, d up to 50. Each is fitted once with default
  settings; then every seed draws anew from the guide and by ``refine``. Share of seeds within three standard errors,
  root-mean-square error and mean standard error of importance sampling, bridge sampling and the harmonic mean.
- ``compare``: Radiata pine and Pima: log evidences and log Bayes factors beside the true ones.
- ``acceptance``: rate at which ``refine`` accepts the guide's proposals on posteriordb's models up to 13 dimensions.

float64, defaults only. The last two read their data from the folder that ``PYROFLOWS_DATA`` names.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np
from scipy import stats

from tests.benchmarks.models import POSTERIORS, TARGETS, Posterior, available, available_targets
from tests.benchmarks.posteriors import fitter

TABLES = ("closed", "compare", "acceptance")
PAIRS = (
    ("radiata_pine-2", "radiata_pine-1"),
    ("pima-1-precision_0.01", "pima-2-precision_0.01"),
    ("pima-1-precision_1", "pima-2-precision_1"),
)


class Backend:
    def __init__(self, name: str):
        self.name, self.fit = name, fitter(name)
        self.models = importlib.import_module(f"tests.benchmarks.models.{name}_models")
        simple = "numpyro" if name == "numpyro" else "pyro"
        self.simple = importlib.import_module(f"tests.inference.models_{simple}")

    def array(self, x: np.ndarray) -> Any:
        return importlib.import_module("jax.numpy").asarray(x) if self.name == "numpyro" else self.torch.as_tensor(x)

    @property
    def torch(self) -> Any:
        return importlib.import_module("torch")

    def again(self, fitted: Any, seed: int) -> Any:
        """The same guide, with other draws for its diagnostics."""
        kind = type(fitted)
        if self.name == "numpyro":
            key = importlib.import_module("jax").random.key(1000 + seed)
            return kind(fitted.guide, fitted.params, fitted.log_density, fitted.history, rng_key=key)
        self.torch.manual_seed(1000 + seed)
        return kind(fitted.guide, fitted.log_density, fitted.history)

    def refine(self, fitted: Any, seed: int) -> Any:
        key = (importlib.import_module("jax").random.key(2000 + seed),) if self.name == "numpyro" else ()
        return fitted.refine(*key, "flow_mh", progress_bar=False)


def regression(backend: Backend, dim: int) -> Posterior:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((2 * dim + 20, dim))
    y = x @ rng.standard_normal(dim) + rng.standard_normal(len(x))
    truth = float(stats.multivariate_normal.logpdf(y, cov=np.eye(len(x)) + x @ x.T))
    args = backend.array(x), backend.array(y)
    return Posterior(f"regression-{dim}", backend.simple.regression, args, {}, [], dim, log_evidence=truth)


def mixture(backend: Backend, dim: int) -> Posterior:
    rng = np.random.default_rng(dim)
    loc = np.stack([np.full(dim, -2.5), np.full(dim, 2.5)]) / (dim / 2) ** 0.5 + 0.1 * rng.standard_normal((2, dim))
    scale = rng.uniform(0.4, 0.8, (2, dim))
    args = tuple(map(backend.array, (loc, scale, np.log([0.3, 0.7]))))
    return Posterior(f"mixture-{dim}", backend.models.gauss_modes, args, {}, [], dim, log_evidence=0.0)


def closed(backend: Backend, names: list[str], seeds: int) -> None:
    methods = ("importance", "bridge", "harmonic")
    each = " | ".join(f"{m}: within 3 | rms error | standard error" for m in methods)
    print(f"| target | d | gap | Pareto k | flow moves | {each} | s a fit, a seed |\n|" + "---|" * 15)
    problems = [regression(backend, d) for d in (2, 10, 20, 50)] + [mixture(backend, d) for d in (2, 10, 20, 50)]
    for problem in problems:
        if names and problem.name not in names:
            continue
        fitted = backend.fit(problem, 0)
        begin = time.perf_counter()
        found: dict[str, list] = {method: [] for method in methods}
        rates = []
        for seed in range(seeds):
            refined = backend.refine(backend.again(fitted, seed), seed)
            rates.append(refined.acceptance["flow"])
            for method in methods:
                if method != "harmonic" or fitted._base is None or not hasattr(fitted._base, "logits"):
                    found[method].append(refined.log_evidence(method))
        seconds = (time.perf_counter() - begin) / seeds
        columns = [
            problem.name, problem.dimension, f"{problem.log_evidence - fitted.elbo.value:.4f}",
            f"{fitted.pareto_k:.2f}", f"{np.mean(rates):.2f}",
        ]  # fmt: skip
        for method in methods:
            if not found[method]:
                columns += ["-"] * 3
                continue
            value, error = np.array(found[method]).T
            z = (value - problem.log_evidence) / error
            columns += [
                f"{(np.abs(z) < 3).mean():.0%}",
                f"{np.sqrt(np.square(value - problem.log_evidence).mean()):.4f}",
                f"{error.mean():.4f}",
            ]
        columns.append(f"{fitted.history.seconds:.0f}, {seconds:.1f}")
        print("| " + " | ".join(map(str, columns)) + " |", flush=True)


def compare(backend: Backend, names: list[str]) -> None:
    if absent := [name for pair in PAIRS for name in pair if name not in available_targets()]:
        print(f"Skipped, for PYROFLOWS_DATA names no folder with their data: {', '.join(absent)}.")
        return
    package = importlib.import_module({"numpyro": "numpyro_flows", "pyro": "pyroflows"}[backend.name])
    header = "model | log Z | importance: error | +- | bridge: error | +- | log Bayes factor | true | +- | k | s"
    print(f"| {header} |\n|" + "---|" * 11)
    for pair in PAIRS:
        if names and not set(pair) & set(names):
            continue
        fits = {name: backend.fit(backend.models.get_target(name), 0) for name in pair}
        refined = {name: backend.refine(fit, 0) for name, fit in fits.items()}
        table = package.compare(refined, loo=False)
        for name in pair:
            truth = TARGETS[name].log_evidence
            plain, row = fits[name].log_evidence(), table.loc[name]
            columns = [
                name, f"{truth:.4f}", f"{plain.value - truth:.4f}", f"{plain.standard_error:.4f}",
                f"{row['log_evidence'] - truth:.4f}", f"{row['log_evidence_se']:.4f}",
                f"{row['log_bayes_factor']:.4f}", f"{truth - TARGETS[pair[0]].log_evidence:.4f}",
                f"{row['log_bayes_factor_se']:.4f}", f"{row['pareto_k']:.2f}",
                f"{fits[name].history.seconds + refined[name].seconds:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join(map(str, columns)) + " |", flush=True)


def acceptance(backend: Backend, names: list[str]) -> None:
    present = [name for name in POSTERIORS if name in available() and (not names or name in names)]
    if not present:
        print("No data found: set PYROFLOWS_DATA to the folder that holds posteriordb.")
        return
    header = "posterior | d | Pareto k | flow moves | local moves | R-hat | ESS bulk, tail of 4,000 | s a fit, refining"
    print(f"| {header} |\n|" + "---|" * 8)
    for name in present:
        posterior = backend.models.get(name)
        if posterior.dimension > 13:
            continue
        fitted = backend.fit(posterior, 0)
        refined = backend.refine(fitted, 0)
        columns = [
            name.split("-")[-1], posterior.dimension, f"{fitted.pareto_k:.2f}",
            *(f"{refined.acceptance[kind]:.2f}" for kind in ("flow", "local")), f"{refined.r_hat:.3f}",
            f"{refined.ess_bulk:.0f}, {refined.ess_tail:.0f}",
            f"{fitted.history.seconds:.0f}, {refined.seconds:.0f}",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, columns)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    chosen = options.tables.split(",")
    if unknown := [table for table in chosen if table not in TABLES]:
        parser.error(f"--tables: {unknown} are not among {TABLES}")
    backend = Backend(options.backend)
    for table in chosen:
        if table == "closed":
            closed(backend, options.names, options.seeds)
        elif table == "compare":
            compare(backend, options.names)
        else:
            acceptance(backend, options.names)
        print()


if __name__ == "__main__":
    main()
