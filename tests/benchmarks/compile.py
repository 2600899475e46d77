"""CPU seconds from a new program to its first training step, for flows of growing depth, in jax.

    python -m tests.benchmarks.compile [--depths 4 8 16 32] [--dim 16] [--batch 256] [--rounds 3]

A step: value, log-det and the gradient of a loss of both by the parameters, of a coupling flow (``realnvp``) and of an
autoregressive one (``iaf``), two hidden layers of 32 units. The time is the processor's for tracing, compiling and one
run, without a cache, the least of ``--rounds``, the libraries in turns. "growth" is the last depth's over the first
one's. FlowJAX scans its layers; "unrolled" are the same layers one after the other (its ``Chain``); NumPyro's
autoregressive flow unrolls its own. ``pip install '.[all,benchmark]'``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

from tests.benchmarks.transforms import JAX

WIDTH = (32, 32)
FAMILIES = {"realnvp": "realnvp", "iaf": "maf, iaf"}


def candidates(family: str, dim: int, depth: int) -> dict[str, tuple[Any, Callable]]:
    """Of every library, its flow and a function of flow and batch that gives values and log-dets."""
    from flowjax.bijections import Chain

    builds = JAX[FAMILIES[family]]
    found = {name: build(dim, depth, WIDTH)[:2] for name, build in builds.items()}
    layers = [builds["flowjax"](dim, 1, WIDTH)[0] for _ in range(depth)]
    return {**found, "flowjax, unrolled": (Chain(layers), found["flowjax"][1])}


def first_step(flow: Any, run: Callable, x: Any) -> float:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    arrays, static = eqx.partition(flow, eqx.is_inexact_array)

    def loss(arrays: Any, x: Any) -> Any:
        value, log_det = run(eqx.combine(arrays, static), x)
        return 0.5 * jnp.square(value).sum() - log_det.sum()

    jax.clear_caches()
    start = time.process_time()
    jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(arrays, x))
    return time.process_time() - start


def main() -> None:
    import jax

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    jax.config.update("jax_enable_compilation_cache", False)
    print("| family | library | " + " | ".join(f"{depth} layers, s" for depth in options.depths) + " | growth |")
    print("|" + "---|" * (3 + len(options.depths)))
    for family in ("realnvp", "iaf"):
        least: dict[str, list[float]] = {}
        for depth in options.depths:
            built = candidates(family, options.dim, depth)
            x = jax.random.normal(jax.random.key(1), (options.batch, options.dim))
            rounds = [{name: first_step(*flow, x) for name, flow in built.items()} for _ in range(options.rounds)]
            for name in built:
                least.setdefault(name, []).append(min(seconds[name] for seconds in rounds))
        for name, seconds in least.items():
            shown = " | ".join(f"{value:.2f}" for value in seconds)
            print(f"| {family} | {name} | {shown} | {seconds[-1] / seconds[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
