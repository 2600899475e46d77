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

from tests.benchmarks.transforms import partial_kwargs, race

OPERATIONS = ("inverse", "gradient")


# -- torch -------------------------------------------------------------------------------------------------------------
def torch_calls(dim: int, batch: int, layers: int, scale: float) -> tuple[dict[str, dict[str, Callable]], float]:
    import nflows.transforms
    import torch
    import zuko

    from pyroflows import flows

    torch.manual_seed(0)
    width = max(64, dim)
    ours = flows.iaf(dim, layers, (width, width), activation="relu")
    theirs = nflows.transforms.CompositeTransform(
        [
            part
            for _ in range(layers)
            for part in (
                nflows.transforms.MaskedAffineAutoregressiveTransform(
                    dim, width, num_blocks=1, use_residual_blocks=False
                ),
                nflows.transforms.ReversePermutation(dim),
            )
        ]
    )
    orders = torch.arange(dim), torch.arange(dim).flip(0)
    lazy = zuko.lazy.LazyComposedTransform(
        *(
            zuko.flows.autoregressive.MaskedAutoregressiveTransform(
                dim,
                order=orders[i % 2],
                univariate=partial_kwargs(zuko.transforms.MonotonicAffineTransform, {}),
                shapes=[(), ()],
                hidden_features=(width, width),
                activation=torch.nn.ReLU,
            )
            for i in range(layers)
        )
    )
    built = {
        "pyroflows": (ours, ours.forward_and_log_det, ours.inverse_and_log_det),
        "nflows": (theirs, theirs.forward, theirs.inverse),
        "zuko": (lazy, lambda x: lazy().call_and_ladj(x), lambda y: lazy().inv.call_and_ladj(y)),
    }
    calls: dict[str, dict[str, Callable]] = {operation: {} for operation in OPERATIONS}
    x = torch.randn(batch, dim)
    for name, (module, forward, inverse) in built.items():
        with torch.no_grad():
            for p in module.parameters():
                p.add_(scale * torch.randn_like(p) * p.shape[-1] ** -0.5)
            y = forward(x)[0].clone()
            error = (inverse(y)[0] - x).abs().max()
            if not error < 1e-2:
                raise RuntimeError(f"{name}: the inverse is off by {error:.2g} at d = {dim}: choose a smaller --scale.")

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
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    hooks = [m.register_forward_hook(counted) for m in ours.modules() if type(m).__name__ == "MaskedMLP"]
    calls["inverse"]["pyroflows"]()
    for hook in hooks:
        hook.remove()
    return calls, count / layers


# -- jax ---------------------------------------------------------------------------------------------------------------
def jax_calls(dim: int, batch: int, layers: int, scale: float) -> tuple[dict[str, dict[str, Callable]], float]:
    import equinox as eqx
    import flowjax.flows
    import jax
    import jax.numpy as jnp
    import paramax
    from flowjax.distributions import Normal
    from jax.example_libraries import stax
    from numpyro.distributions.flows import InverseAutoregressiveTransform
    from numpyro.distributions.transforms import ComposeTransform, PermuteTransform
    from numpyro.nn import AutoregressiveNN

    from numpyro_flows import flows
    from numpyro_flows.conditioners import MaskedMLP

    width = max(64, dim)
    ours = flows.iaf(dim, layers, (width, width), activation="relu", key=jax.random.key(0))
    theirs = flowjax.flows.masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(dim)),
        flow_layers=layers,
        nn_width=width,
        nn_depth=2,
        invert=False,
    ).bijection
    init, apply = AutoregressiveNN(dim, [width, width], nonlinearity=stax.Relu)
    params = [init(key, (dim,))[1] for key in jax.random.split(jax.random.key(0), layers)]
    reverse = PermuteTransform(jnp.arange(dim)[::-1])

    def stack(params: Any) -> ComposeTransform:
        maps = [InverseAutoregressiveTransform(lambda x, p=p: apply(p, x)) for p in params]
        return ComposeTransform([part for one in maps for part in (one, reverse)])

    def numpyro_inverse(params: Any, y: Any) -> tuple:
        flow = stack(params)
        x = flow._inverse(y)
        return x, -flow.log_abs_det_jacobian(x, y)

    built: dict[str, tuple] = {
        "numpyro_flows": (ours, lambda f, x: f(x), lambda f, y: f.inverse_and_log_det(y)),
        "flowjax": (
            theirs,
            lambda f, x: jax.vmap(paramax.unwrap(f).transform)(x),
            lambda f, y: jax.vmap(paramax.unwrap(f).inverse_and_log_det)(y),
        ),
        "numpyro": (params, lambda p, x: stack(p)(x), numpyro_inverse),
    }
    calls: dict[str, dict[str, Callable]] = {operation: {} for operation in OPERATIONS}
    x = jax.random.normal(jax.random.key(1), (batch, dim))
    moved = {}
    for name, (flow, forward, inverse) in built.items():
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

        moved[name] = eqx.combine(arrays, static)
        y = forward(moved[name], x)
        error = jnp.abs(inverted(arrays, y)[0] - x).max()
        if not error < 1e-2:
            raise RuntimeError(f"{name}: the inverse is off by {error:.2g} at d = {dim}: choose a smaller --scale.")
        for operation, function in (("inverse", inverted), ("gradient", jax.grad(loss, argnums=(0, 1)))):
            compiled = jax.jit(function).lower(arrays, y).compile()
            calls[operation][name] = lambda f=compiled, a=arrays, y=y: jax.block_until_ready(f(a, y))
    count = 0

    def counted(_: Any) -> None:
        nonlocal count
        count += 1

    plain = MaskedMLP.__call__

    def watched(self: MaskedMLP, x: Any, context: Any = None) -> Any:
        jax.debug.callback(counted, x[..., :0])
        return plain(self, x, context)

    MaskedMLP.__call__ = watched  # type: ignore[method-assign]
    try:
        flow = moved["numpyro_flows"]
        jax.block_until_ready(jax.jit(lambda y: flow.inverse_and_log_det(y))(flow(x)))
        jax.effects_barrier()
    finally:
        MaskedMLP.__call__ = plain  # type: ignore[method-assign]
    return calls, (count - layers) / layers  # the forward pass which gave y counts too


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
