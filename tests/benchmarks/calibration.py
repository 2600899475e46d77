"""Simulation-based calibration of FlowVI and NUTS: p-values and coverage, on a conjugate model and on eight schools.

``python -m tests.benchmarks.calibration --backend numpyro|pyro``. Where the inference is exact, a verdict is negative
for one seed in twenty. FlowVI has a reduced budget (``--steps``, ``--particles``), NUTS is thinned by ten.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
WARMUP, THINNING = 500, 10


def conjugate(lang: Any, array: Callable, y: Any) -> None:
    """A normal mean of a normal prior."""
    theta = lang.sample("theta", lang.distributions.Normal(0.0, 2.0))
    with lang.plate("data", 20):
        lang.sample("y", lang.distributions.Normal(theta, 1.0), obs=y)


def schools(lang: Any, array: Callable, y: Any) -> None:
    """Eight schools, non-centred."""
    dist = lang.distributions
    mu = lang.sample("mu", dist.Normal(0.0, 5.0))
    tau = lang.sample("tau", dist.HalfCauchy(array(5.0)))
    with lang.plate("schools", 8):
        z = lang.sample("z", dist.Normal(0.0, 1.0))
        lang.sample("y", dist.Normal(mu + tau * z, array(SIGMA)), obs=y)


SIZES = {conjugate: 20, schools: 8}


def exact(lab: Any, conditioned: Callable, args: tuple, kwargs: dict, *rest: Any) -> dict[str, Any]:
    """Draws of the conjugate model's posterior."""
    y, rng = np.asarray(conditioned.data["y"]), lab.generator(rest)  # type: ignore[attr-defined]
    return {"theta": y.sum() / (len(y) + 0.25) + (len(y) + 0.25) ** -0.5 * rng.standard_normal(rest[-1])}


class NumPyro:
    def __init__(self) -> None:
        self.lang = importlib.import_module("numpyro")
        self.lang.enable_x64()
        self.jax, self.infer = importlib.import_module("jax"), importlib.import_module("numpyro.infer")
        self.array = self.jax.numpy.asarray
        self.package = importlib.import_module("numpyro_flows.calibration")

    def generator(self, rest: tuple) -> np.random.Generator:
        return np.random.default_rng(np.asarray(self.jax.random.key_data(rest[0])))

    def nuts(self, model: Callable, num_draws: int) -> Callable:
        mcmc = self.infer.MCMC(
            self.infer.NUTS(model), num_warmup=WARMUP, num_samples=THINNING * num_draws, thinning=THINNING,
            progress_bar=False,
        )  # fmt: skip

        @self.jax.jit  # compiled once
        def draws(rng_key: Any, y: Any) -> dict[str, Any]:
            mcmc.run(rng_key, y)
            return mcmc.get_samples()

        def infer(conditioned: Any, args: tuple, kwargs: dict, rng_key: Any, num_draws: int) -> dict[str, Any]:
            return draws(rng_key, conditioned.data["y"])

        return infer

    def run(self, model: Callable, args: tuple, seed: int, **options: Any) -> Any:
        return self.package.simulation_based_calibration(self.jax.random.key(seed), model, args, **options)


class Pyro:
    def __init__(self) -> None:
        self.lang, self.torch = importlib.import_module("pyro"), importlib.import_module("torch")
        self.torch.set_default_dtype(self.torch.float64)
        self.torch.set_num_threads(1)
        self.infer, self.array = importlib.import_module("pyro.infer"), self.torch.as_tensor
        self.package = importlib.import_module("pyroflows.calibration")

    def generator(self, rest: tuple) -> np.random.Generator:
        return np.random.default_rng(np.random.randint(2**31))

    def nuts(self, model: Callable, num_draws: int) -> Callable:
        def infer(conditioned: Any, args: tuple, kwargs: dict, num_draws: int) -> dict[str, Any]:
            kernel = self.infer.NUTS(conditioned, jit_compile=True, ignore_jit_warnings=True)
            mcmc = self.infer.MCMC(kernel, num_samples=THINNING * num_draws, warmup_steps=WARMUP, disable_progbar=True)
            mcmc.run(*args, **kwargs)
            return {name: x[::THINNING] for name, x in mcmc.get_samples().items()}

        return infer

    def run(self, model: Callable, args: tuple, seed: int, **options: Any) -> Any:
        self.lang.set_rng_seed(seed)
        return self.package.simulation_based_calibration(model, args, **options)


def cells(calibration: Any, seconds: float) -> list[str]:
    p_values, coverage = calibration.p_values(), calibration.coverage()
    least = min(p_values, key=p_values.__getitem__)
    cells = [str(len(calibration.failures)), f"{p_values[least]:.2g} ({least})", f"{p_values['log_likelihood']:.2g}"]
    for level in (0.5, 0.8, 0.95):
        values = [estimate[level].value for estimate in coverage.values()]
        cells.append(f"{np.mean(values):.3f} ({min(values):.2f}-{max(values):.2f})")
    verdict = calibration.verdict()
    total = calibration.num_simulations + len(calibration.failures)
    return [*cells, verdict.split(" (p ")[0].split(" as far")[0], f"{seconds / total:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--models", nargs="*", default=["conjugate", "schools"], choices=["conjugate", "schools"])
    parser.add_argument(
        "--methods", nargs="*", default=["exact", "NUTS", "FlowVI"], choices=["exact", "NUTS", "FlowVI"]
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--draws", type=int, default=99)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--verbose", action="store_true", help="prints every summary, with a progress bar")
    options = parser.parse_args()
    lab: Any = {"numpyro": NumPyro, "pyro": Pyro}[options.backend]()
    header = "model | method | seed | simulations | failed | least p | p of log-likelihood"
    print(f"| {header} | cover 50 % (range) | 80 % | 95 % | verdict | s each |\n|" + "---|" * 12)
    for function in (f for f in SIZES if f.__name__ in options.models):
        model, args = partial(function, lab.lang, lab.array), (lab.array(np.zeros(SIZES[function])),)
        methods = {
            "exact": partial(exact, lab) if function is conjugate else None,
            "NUTS": lab.nuts(model, options.draws),
            "FlowVI": {"num_steps": options.steps, "num_particles": options.particles},
        }
        for method in (name for name in options.methods if methods[name] is not None):
            for seed in options.seeds:
                begin = time.perf_counter()
                calibration = lab.run(
                    model, args, seed, infer=methods[method], num_simulations=options.simulations,
                    num_draws=options.draws, progress_bar=options.verbose,
                )  # fmt: skip
                row = cells(calibration, time.perf_counter() - begin)
                print(
                    "| " + " | ".join([function.__name__, method, f"{seed}", f"{options.simulations}", *row]) + " |",
                    flush=True,
                )
                if options.verbose:
                    calibration.print_summary()


if __name__ == "__main__":
    main()
