"""The expensive direction of autoregressive flows beside other libraries: passes of the network, time, gradient.

    python -m tests.benchmarks.inversion [--backend torch|jax] [--dims 16 64 256] [--batch 256] [--layers 2]
        [--scale 0.3] [--budget 2]

Affine autoregressive layers (the density of an IAF, draws of a MAF) with conditioners of two hidden layers of
``max(64, dim)`` ReLU units, in float32, away from the identity by normal noise on every parameter, of the standard
deviation ``--scale`` over the root of its last axis. ``inverse``: value and log-det; ``gradient``: the gradient of a
loss of both by input and parameters, for which the others go back through their ``dim`` passes. A cell is a peer's
least time over ours, the libraries in turns. "passes" are those of one of our layers in the inverse, the last of which
gives the log-det; the others take ``dim``.
``pip install '.[all,benchmark]'``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

from tests.benchmarks.transforms import JAX, TORCH, race

OPERATIONS = ("inverse", "gradient")
FAMILY = "maf, iaf"


def torch_calls(dim: int, batch: int, layers: int, scale: float) -> tuple[dict[str, dict[str, Callable]], float]:
    """The calls of every library by operation, and the passes of one of our layers."""
    import torch

    width = max(64, dim)
    calls: dict[str, dict[str, Callable]] = {operation: {} for operation in OPERATIONS}
    x, passes = torch.randn(batch, dim, generator=torch.Generator().manual_seed(1)), 0

    def counted(*_: Any) -> None:
        nonlocal passes
        passes += 1

    for name in ("pyroflows", "nflows", "zuko"):
        torch.manual_seed(0)
        module, forward, inverse = TORCH[FAMILY][name](dim, layers, (width, width))
        with torch.no_grad():
            for p in module.parameters():
                p.add_(scale * torch.randn_like(p) * p.shape[-1] ** -0.5)
            y = forward(x)[0].clone()
            networks = [m for m in module.modules() if name == "pyroflows" and type(m).__name__ == "MaskedMLP"]
            hooks = [network.register_forward_hook(counted) for network in networks]
            check(name, dim, float((inverse(y)[0] - x).abs().max()))
            for hook in hooks:
                hook.remove()

        def plain(y=y, inverse=inverse) -> None:
            with torch.no_grad():
                inverse(y)

        def gradient(y=y, inverse=inverse, module=module) -> None:
            point = y.clone().requires_grad_()
            value, log_det = inverse(point)
            loss = 0.5 * value.square().sum() - log_det.sum()
            torch.autograd.grad(loss, [point, *module.parameters()], allow_unused=True)

        gradient()  # what torch loads at the first one
        calls["inverse"][name], calls["gradient"][name] = plain, gradient
    return calls, passes / layers


def jax_calls(dim: int, batch: int, layers: int, scale: float) -> tuple[dict[str, dict[str, Callable]], float]:
    """The calls of every library by operation, and the passes of one of our layers."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from numpyro_flows.conditioners import MaskedMLP

    width = max(64, dim)
    calls: dict[str, dict[str, Callable]] = {operation: {} for operation in OPERATIONS}
    x, passes, plain = jax.random.normal(jax.random.key(1), (batch, dim)), 0, MaskedMLP.__call__
    for name, build in JAX[FAMILY].items():
        flow, forward, inverse = build(dim, layers, (width, width))
        arrays, static = eqx.partition(flow, eqx.is_inexact_array)
        leaves, tree = jax.tree.flatten(arrays)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        noise = [scale * jax.random.normal(k, a.shape) * a.shape[-1] ** -0.5 for k, a in zip(keys, leaves, strict=True)]
        arrays = jax.tree.unflatten(tree, [a + e for a, e in zip(leaves, noise, strict=True)])

        def inverted(arrays: Any, y: Any, static=static, inverse=inverse) -> Any:
            return inverse(eqx.combine(arrays, static), y)

        def loss(arrays: Any, y: Any, inverted=inverted) -> Any:
            value, log_det = inverted(arrays, y)
            return 0.5 * jnp.square(value).sum() - log_det.sum()

        y = forward(eqx.combine(arrays, static), x)[0]
        for operation, function in (("inverse", inverted), ("gradient", jax.grad(loss, argnums=(0, 1)))):
            compiled = jax.jit(function).lower(arrays, y).compile()
            calls[operation][name] = lambda f=compiled, a=arrays, y=y: jax.block_until_ready(f(a, y))
        check(name, dim, float(jnp.abs(calls["inverse"][name]()[0] - x).max()))
        if name == "numpyro_flows":

            def counted(_: Any) -> None:
                nonlocal passes
                passes += 1

            def watched(self: MaskedMLP, x: Any, context: Any = None) -> Any:
                jax.debug.callback(counted, x[..., :0])
                return plain(self, x, context)

            MaskedMLP.__call__ = watched  # type: ignore[method-assign]
            try:
                jax.block_until_ready(jax.jit(lambda y, a=arrays, f=inverted: f(a, y))(y))  # a program of its own
                jax.effects_barrier()
            finally:
                MaskedMLP.__call__ = plain  # type: ignore[method-assign]
    return calls, passes / layers


def check(name: str, dim: int, error: float) -> None:
    if not error < 1e-2:
        raise RuntimeError(f"{name}: the inverse is off by {error:.2g} at d = {dim}: choose a smaller --scale.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch", "jax"], default="jax")
    parser.add_argument("--dims", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=0.3)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a library and operation")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    calls_of = torch_calls if options.backend == "torch" else jax_calls
    peers: list[str] | None = None
    for dim in options.dims:
        calls, passes = calls_of(dim, options.batch, options.layers, options.scale)
        for operation in OPERATIONS:
            seconds = race(calls[operation], options.budget)
            ours, *others = seconds
            if peers is None:
                peers = others
                columns = ["d", "passes", "operation", f"{ours} ms", *(f"{peer} x" for peer in peers)]
                print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
            ratios = [f"{seconds[peer] / seconds[ours]:.1f}" for peer in peers]
            row = [dim, f"{passes:.1f}", operation, f"{seconds[ours] * 1e3:.2f}", *ratios]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
