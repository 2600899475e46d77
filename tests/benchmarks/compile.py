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

WIDTH = (32, 32)


def candidates(family: str, dim: int, depth: int) -> dict[str, tuple[Any, Callable]]:
    """Of every library, its flow and a function of flow and batch that gives values and log-dets."""
    import flowjax.flows
    import jax
    import jax.numpy as jnp
    import paramax
    from flowjax.bijections import Chain
    from flowjax.distributions import Normal
    from jax.example_libraries import stax
    from numpyro.distributions.flows import InverseAutoregressiveTransform
    from numpyro.distributions.transforms import ComposeTransform, PermuteTransform
    from numpyro.nn import AutoregressiveNN

    from numpyro_flows import flows

    ours = getattr(flows, family)(dim, depth, WIDTH, activation="relu", key=jax.random.key(0))
    factory = {"realnvp": flowjax.flows.coupling_flow, "iaf": flowjax.flows.masked_autoregressive_flow}[family]

    def theirs(layers: int) -> Any:
        return factory(
            jax.random.key(0),
            base_dist=Normal(jnp.zeros(dim)),
            flow_layers=layers,
            nn_width=WIDTH[0],
            nn_depth=len(WIDTH),
            invert=False,
        ).bijection

    def flowjax_pass(flow: Any, x: Any) -> tuple:
        return jax.vmap(paramax.unwrap(flow).transform_and_log_det)(x)

    found: dict[str, tuple[Any, Callable]] = {
        "numpyro_flows": (ours, lambda f, x: f.forward_and_log_det(x)),
        "flowjax": (theirs(depth), flowjax_pass),
        "flowjax, unrolled": (Chain([theirs(1) for _ in range(depth)]), flowjax_pass),
    }
    if family == "iaf":
        init, apply = AutoregressiveNN(dim, list(WIDTH), nonlinearity=stax.Relu)
        reverse = PermuteTransform(jnp.arange(dim)[::-1])

        def numpyro_pass(params: Any, x: Any) -> tuple:
            maps = [InverseAutoregressiveTransform(lambda x, p=p: apply(p, x)) for p in params]
            flow = ComposeTransform([part for one in maps for part in (one, reverse)])
            y, intermediates = flow.call_with_intermediates(x)
            return y, flow.log_abs_det_jacobian(x, y, intermediates)

        keys = jax.random.split(jax.random.key(0), depth)
        found["numpyro"] = [init(key, (dim,))[1] for key in keys], numpyro_pass
    return found


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
