"""Time and memory of the transforms beside those of other libraries, in one run: markdown tables of ratios.

    python -m tests.benchmarks.transforms [--backend torch|jax] [--families nsf ...] [--dims 8 64]
        [--batches 64 1024 8192] [--threads 2] [--budget 0.3]

Every stack has four layers, conditioners of two hidden layers of 64 ReLU units, splines of eight bins on [-5, 5], in
float32. Operations: ``forward`` (value and log-det, the direction of one pass), ``inverse`` (value and log-det),
``backward`` (forward, and the gradient of a loss of value and log-det with respect to input and parameters).
The libraries take turns in every round; a cell is the peer's least time over ours, so above 1 we are faster.
Memory is the peak of what ``backward`` allocates. Torch runs eagerly, jax compiled. ``pip install '.[all,benchmark]'``.

Layers alternate as each library's own examples do: blocks exchanged (ours; normflows' affine couplings and
autoregressive layers by ``Permute``), masks (zuko, nflows, normflows' splines), orders reversed (ours, zuko, nflows'
autoregressive layers, Pyro's and NumPyro's by a permutation), a random permutation per layer (FlowJAX). Pyro's
``spline_coupling`` also maps the first block by a free spline (more work).

The neural and numerical families have sizes of their own: ``bnaf`` two layers with hidden factors of 8 and 8, ``naf``
two layers of 16 sigmoidal units (zuko's are monotone networks of as many), ``residual`` four layers with unbiased
log-determinants of two sure terms (and about two more at random in both libraries), ``cnf`` one velocity of two hidden
layers of 64 with exact traces, by each library's own solver at its own tolerances (ours in steps of a fixed number,
zuko's adaptive). What a peer cannot do is left empty.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

LAYERS, HIDDEN, BINS, BOUND = 4, (64, 64), 8, 5.0
OPERATIONS = ("forward", "inverse", "backward")


class Candidate(NamedTuple):
    """A library's flow: calls that do one operation and wait for its end, and the peak bytes of ``backward``."""

    run: dict[str, Callable[[], Any]]
    memory: Callable[[], int]


def built_or_none(build: Callable[..., tuple], dim: int, ours: bool) -> tuple | None:
    """A flow, or ``None`` where a peer refuses: Pyro's and NumPyro's masked networks are no narrower than the data."""
    try:
        return build(dim)
    except ValueError:
        if ours:
            raise
        return None


# -- torch -------------------------------------------------------------------------------------------------------------
def torch_candidates(family: str, dim: int, batch: int, device: str) -> Iterator[tuple[str, Candidate]]:
    import torch

    for name, build in TORCH[family].items():
        torch.manual_seed(0)
        with torch.device(device):  # what peers keep beside their parameters, too
            built = built_or_none(build, dim, name == "pyroflows")
        if built is None:
            continue
        module, forward, inverse = built
        if name != "pyroflows":
            module.train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # away from the identity, the same spread for all
            for p in module.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(device))
        x = torch.randn(batch, dim, generator=generator).to(device)
        yield name, torch_candidate(module, forward, inverse, x)


def torch_candidate(module: Any, forward: Callable, inverse: Callable | None, x: Any) -> Candidate:
    import torch

    cuda = x.device.type == "cuda"
    with torch.no_grad():
        y = forward(x)[0].clone()

    def settled(f: Callable) -> Callable:
        def call() -> None:
            f()
            if cuda:
                torch.cuda.synchronize()

        return call

    def plain(f: Callable, argument: Any) -> Callable:
        def call() -> None:
            with torch.no_grad():
                f(argument)

        return settled(call)

    def backward() -> None:
        point = x.clone().requires_grad_()
        value, log_det = forward(point)
        loss = 0.5 * value.square().sum() - log_det.sum()
        torch.autograd.grad(loss, [point, *module.parameters()], allow_unused=True)

    def memory() -> int:
        if cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            backward()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            backward()
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        running = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        return int(max(running, default=0))

    run = {"forward": plain(forward, x), "backward": settled(backward)}
    return Candidate(run if inverse is None else {**run, "inverse": plain(inverse, y)}, memory)


def _ours(factory: str, *sizes: Any, **options: Any) -> Callable[..., tuple]:
    def build(dim: int, num_layers: int = LAYERS, hidden: tuple[int, int] = HIDDEN) -> tuple:
        from pyroflows import flows

        flow = getattr(flows, factory)(dim, *(sizes or (num_layers, hidden)), **{"activation": "relu", **options})
        return flow, flow.forward_and_log_det, flow.inverse_and_log_det

    return build


def _zuko(kind: str, univariate: str, shapes: list[tuple[int, ...]]) -> Callable[..., tuple]:
    def build(dim: int, num_layers: int = LAYERS, hidden: tuple[int, int] = HIDDEN) -> tuple:
        import torch
        import zuko

        make = getattr(zuko.transforms, univariate)
        common = {"univariate": make, "shapes": shapes, "hidden_features": hidden, "activation": torch.nn.ReLU}
        if kind == "coupling":
            layers = [
                zuko.flows.coupling.GeneralCouplingTransform(dim, mask=torch.arange(dim) % 2 == i % 2, **common)
                for i in range(num_layers)
            ]
        else:
            orders = torch.arange(dim), torch.arange(dim).flip(0)
            layers = [
                zuko.flows.autoregressive.MaskedAutoregressiveTransform(dim, order=orders[i % 2], **common)
                for i in range(num_layers)
            ]
        lazy = zuko.lazy.LazyComposedTransform(*layers)
        return lazy, lambda x: lazy().call_and_ladj(x), lambda y: lazy().inv.call_and_ladj(y)

    return build


def _perceptron(inputs: int, outputs: int) -> Any:
    from torch import nn

    class Perceptron(nn.Sequential):
        def forward(self, x: Any, context: Any = None) -> Any:
            return super().forward(x)

    first, second = HIDDEN
    return Perceptron(
        nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, outputs)
    )


def _nflows(make_layer: Callable[..., Any], made: bool = False) -> Callable[..., tuple]:
    """``make_layer(transforms, dim, mask)``, or for ``made`` with the keyword arguments of a masked network in place of
    the mask."""

    def build(dim: int, num_layers: int = LAYERS, hidden: tuple[int, int] = HIDDEN) -> tuple:
        import torch
        from nflows import transforms

        if made:
            network = {"hidden_features": hidden[0], "num_blocks": 1, "use_residual_blocks": False}
            layers = [make_layer(transforms, dim, network) for _ in range(num_layers)]
        else:
            layers = [make_layer(transforms, dim, (torch.arange(dim) + i) % 2) for i in range(num_layers)]
        flow = transforms.CompositeTransform(layers)
        return flow, flow.forward, flow.inverse

    return build


def _reversing(transforms: Any, dim: int, layer: Any) -> Any:
    return transforms.CompositeTransform([layer, transforms.ReversePermutation(dim)])


def _normflows(
    make_layer: Callable[[Any, int, Any], Any], reverse: bool = False, permute: bool = False
) -> Callable[[int], tuple]:
    def build(dim: int) -> tuple:
        import normflows
        import torch
        from torch import nn

        masks = [(torch.arange(dim) + i) % 2 for i in range(LAYERS)]
        layers = nn.ModuleList(make_layer(normflows, dim, mask) for mask in masks)
        if permute:
            layers = nn.ModuleList(m for layer in layers for m in (layer, normflows.flows.Permute(dim, mode="swap")))

        def forward(x: Any) -> tuple:
            total = 0
            for layer in layers:
                x, log_det = layer(x)
                total = total + log_det
            return x, total

        def inverse(y: Any) -> tuple:
            total = 0
            for layer in reversed(layers):
                y, log_det = layer.inverse(y)
                total = total + log_det
            return y, total

        return (layers, inverse, forward) if reverse else (layers, forward, inverse)

    return build


def _pyro(
    make_layer: Callable[[Any, int], Any], num_layers: int = LAYERS, inverts: bool = True
) -> Callable[[int], tuple]:
    def build(dim: int) -> tuple:
        import torch
        from pyro.distributions import transforms

        modules = torch.nn.ModuleList(make_layer(transforms, dim) for _ in range(num_layers))
        reverse = transforms.Permute(torch.arange(dim - 1, -1, -1))
        layers = [layer for module in modules for layer in (module, reverse)]

        def forward(x: Any) -> tuple:
            total = 0
            for layer in layers:
                layer.clear_cache()
                x, before = layer(x), x
                total = total + layer.log_abs_det_jacobian(before, x)
            return x, total

        def inverse(y: Any) -> tuple:
            total = 0
            for layer in reversed(layers):
                layer.clear_cache()
                after = y
                y = layer._inverse(y)
                layer._cached_x_y = y, after
                total = total - layer.log_abs_det_jacobian(y, after)
            return y, total

        return modules, forward, inverse if inverts else None

    return build


def _zuko_neural(kind: str, **options: Any) -> Callable[[int], tuple]:
    def build(dim: int) -> tuple:
        import zuko

        lazy = getattr(zuko.flows, kind)(dim, **options).transform
        return lazy, lambda x: lazy().call_and_ladj(x), lambda y: lazy().inv.call_and_ladj(y)

    return build


def _normflows_residual(n: Any, dim: int, mask: Any) -> Any:
    network = n.nets.LipschitzMLP([dim, *HIDDEN, dim], lipschitz_const=0.9, init_zeros=False)
    return n.flows.Residual(network, reverse=False)


SPLINE = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
MADE = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
RQS_SHAPES = [(BINS,), (BINS,), (BINS - 1,)]

# some take other numbers of layers and widths than those above: what other benchmarks ask of them
TORCH: dict[str, dict[str, Callable[..., tuple]]] = {
    "nice": {
        "pyroflows": _ours("nice"),
        "zuko": _zuko("coupling", "AdditiveTransform", [()]),
        "nflows": _nflows(lambda t, d, mask: t.AdditiveCouplingTransform(mask, _perceptron)),
    },
    "realnvp": {
        "pyroflows": _ours("realnvp"),
        "zuko": _zuko("coupling", "MonotonicAffineTransform", [(), ()]),
        "nflows": _nflows(lambda t, d, mask: t.AffineCouplingTransform(mask, _perceptron)),
        "normflows": _normflows(lambda n, d, mask: n.flows.AffineCouplingBlock(_perceptron(d // 2, d)), permute=True),
        "pyro": _pyro(lambda t, d: t.affine_coupling(d, list(HIDDEN))),
    },
    "nsf": {
        "pyroflows": _ours("nsf"),
        "zuko": _zuko("coupling", "MonotonicRQSTransform", RQS_SHAPES),
        "nflows": _nflows(
            lambda t, d, mask: t.PiecewiseRationalQuadraticCouplingTransform(mask, _perceptron, **SPLINE)
        ),
        "normflows": _normflows(
            lambda n, d, mask: n.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
                mask, _perceptron, **SPLINE
            )
        ),
        "pyro": _pyro(lambda t, d: t.spline_coupling(d, hidden_dims=list(HIDDEN), count_bins=BINS, bound=BOUND)),
    },
    "maf, iaf": {
        "pyroflows": _ours("iaf"),
        "zuko": _zuko("autoregressive", "MonotonicAffineTransform", [(), ()]),
        "nflows": _nflows(
            lambda t, d, network: _reversing(t, d, t.MaskedAffineAutoregressiveTransform(d, **network)), made=True
        ),
        "normflows": _normflows(lambda n, d, mask: n.flows.MaskedAffineAutoregressive(d, **MADE), permute=True),
        "pyro": _pyro(lambda t, d: t.affine_autoregressive(d, list(HIDDEN))),
    },
    "nsf_ar": {
        "pyroflows": _ours("nsf_ar"),
        "zuko": _zuko("autoregressive", "MonotonicRQSTransform", RQS_SHAPES),
        "nflows": _nflows(
            lambda t, d, network: _reversing(
                t, d, t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(d, **network, **SPLINE)
            ),
            made=True,
        ),
        "normflows": _normflows(
            lambda n, d, mask: n.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(
                d, **MADE, **SPLINE
            ),
            permute=True,
        ),
        "pyro": _pyro(lambda t, d: t.spline_autoregressive(d, list(HIDDEN), count_bins=BINS, bound=BOUND)),
    },
    "lu": {
        "pyroflows": lambda dim: _lu_stack(dim),
        "nflows": _nflows(lambda t, d, mask: t.LULinear(d)),
        "normflows": _normflows(lambda n, d, mask: n.flows.LULinearPermute(d), reverse=True),
    },
    "bnaf": {
        "pyroflows": _ours("bnaf", 2, (8, 8)),
        "pyro": _pyro(lambda t, d: t.block_autoregressive(d, hidden_factors=[8, 8]), num_layers=2, inverts=False),
    },
    "naf": {
        "pyroflows": _ours("naf", 2, HIDDEN, num_units=16),
        "zuko": _zuko_neural("NAF", transforms=2, hidden_features=HIDDEN, network={"hidden_features": (16,)}),
        "pyro": _pyro(lambda t, d: t.neural_autoregressive(d, list(HIDDEN), width=16), num_layers=2, inverts=False),
    },
    "residual": {
        "pyroflows": _ours("residual", LAYERS, HIDDEN, log_det="unbiased", exact_terms=2),
        "normflows": _normflows(_normflows_residual),
    },
    "cnf": {
        "pyroflows": _ours("cnf", 1, HIDDEN, activation="tanh"),
        "zuko": _zuko_neural("CNF", hidden_features=HIDDEN, exact=True),
    },
}


def _lu_stack(dim: int) -> tuple:
    from pyroflows import Compose
    from pyroflows.transforms import LULinear

    flow = Compose([LULinear(dim) for _ in range(LAYERS)])
    return flow, flow.forward_and_log_det, flow.inverse_and_log_det


# -- jax ---------------------------------------------------------------------------------------------------------------
def jax_candidates(family: str, dim: int, batch: int, device: str) -> Iterator[tuple[str, Candidate]]:
    import jax

    for name, build in JAX[family].items():
        built = built_or_none(build, dim, name == "numpyro_flows")
        if built is None:
            continue
        flow, forward, inverse = built
        x = jax.random.normal(jax.random.key(1), (batch, dim))
        yield name, jax_candidate(flow, forward, inverse, x)


def jax_candidate(flow: Any, forward: Callable, inverse: Callable | None, x: Any) -> Candidate:
    """``forward`` and ``inverse`` (if there is one) take the flow and a batch."""
    import equinox as eqx
    import jax

    arrays, static = eqx.partition(flow, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [a + 0.05 * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)]
    arrays = jax.tree.unflatten(tree, leaves)

    def loss(arrays: Any, x: Any) -> Any:
        value, log_det = forward(eqx.combine(arrays, static), x)
        return 0.5 * (value**2).sum() - log_det.sum()

    y = forward(eqx.combine(arrays, static), x)[0]
    functions = {
        "forward": (lambda a, x: forward(eqx.combine(a, static), x), x),
        "inverse": (lambda a, y: inverse(eqx.combine(a, static), y), y),
        "backward": (jax.value_and_grad(loss, argnums=(0, 1)), x),
    }
    if inverse is None:
        del functions["inverse"]
    run, compiled = {}, {}
    for name, (function, argument) in functions.items():
        compiled[name] = jax.jit(function).lower(arrays, argument).compile()
        run[name] = lambda f=compiled[name], argument=argument: jax.block_until_ready(f(arrays, argument))

    def memory() -> int:
        analysis = compiled["backward"].memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    return Candidate(run, memory)


def _numpyro_flows(factory: str, *sizes: Any, **options: Any) -> Callable[..., tuple]:
    def build(dim: int, num_layers: int = LAYERS, hidden: tuple[int, int] = HIDDEN) -> tuple:
        import jax

        from numpyro_flows import flows

        given = {"activation": "relu", **options, "key": jax.random.key(0)}
        flow = getattr(flows, factory)(dim, *(sizes or (num_layers, hidden)), **given)
        return flow, lambda f, x: f.forward_and_log_det(x), lambda f, y: f.inverse_and_log_det(y)

    return build


def _flowjax(factory: str, spline: bool = False) -> Callable[..., tuple]:
    def build(dim: int, num_layers: int = LAYERS, hidden: tuple[int, int] = HIDDEN) -> tuple:
        import flowjax.flows
        import jax
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import Normal

        density = getattr(flowjax.flows, factory)(
            jax.random.key(0),
            base_dist=Normal(jax.numpy.zeros(dim)),
            transformer=RationalQuadraticSpline(knots=BINS - 1, interval=BOUND) if spline else None,
            flow_layers=num_layers,
            nn_width=hidden[0],
            nn_depth=len(hidden),
            invert=False,
        )

        return density.bijection, *_of_flowjax()

    return build


def _flowjax_bnaf(dim: int) -> tuple:
    import flowjax.flows
    import jax
    from flowjax.distributions import Normal

    density = flowjax.flows.block_neural_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jax.numpy.zeros(dim)),
        nn_depth=2,
        nn_block_dim=8,
        flow_layers=2,
        invert=False,
    )
    return density.bijection, *_of_flowjax()


def _of_flowjax() -> tuple[Callable, Callable]:
    """What evaluates a bijection on a batch, both ways."""
    import jax
    import paramax

    def forward(bijection: Any, x: Any) -> tuple:
        return jax.vmap(paramax.unwrap(bijection).transform_and_log_det)(x)

    def inverse(bijection: Any, y: Any) -> tuple:
        return jax.vmap(paramax.unwrap(bijection).inverse_and_log_det)(y)

    return forward, inverse


def _numpyro_bnaf(dim: int) -> tuple:
    import jax
    from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform
    from numpyro.distributions.transforms import ComposeTransform, PermuteTransform
    from numpyro.nn import BlockNeuralAutoregressiveNN

    init, apply = BlockNeuralAutoregressiveNN(dim, [8, 8])
    params = [init(key, (dim,))[1] for key in jax.random.split(jax.random.key(0), 2)]

    def forward(params: Any, x: Any) -> tuple:
        reverse = PermuteTransform(jax.numpy.arange(dim)[::-1])
        layers = [BlockNeuralAutoregressiveTransform(lambda x, p=p: apply(p, x)) for p in params]
        flow = ComposeTransform([part for layer in layers for part in (layer, reverse)])
        y, intermediates = flow.call_with_intermediates(x)
        return y, flow.log_abs_det_jacobian(x, y, intermediates)

    return params, forward, None


def _numpyro(dim: int, num_layers: int = LAYERS, hidden: tuple[int, int] = HIDDEN) -> tuple:
    import jax
    from jax.example_libraries import stax
    from numpyro.distributions.flows import InverseAutoregressiveTransform
    from numpyro.distributions.transforms import ComposeTransform, PermuteTransform
    from numpyro.nn import AutoregressiveNN

    init, apply = AutoregressiveNN(dim, list(hidden), nonlinearity=stax.Relu)
    params = [init(key, (dim,))[1] for key in jax.random.split(jax.random.key(0), num_layers)]

    def stack(params: Any) -> ComposeTransform:
        reverse = PermuteTransform(jax.numpy.arange(dim)[::-1])
        layers = [InverseAutoregressiveTransform(lambda x, p=p: apply(p, x)) for p in params]
        return ComposeTransform([part for layer in layers for part in (layer, reverse)])

    def forward(params: Any, x: Any) -> tuple:
        flow = stack(params)
        y, intermediates = flow.call_with_intermediates(x)
        return y, flow.log_abs_det_jacobian(x, y, intermediates)

    def inverse(params: Any, y: Any) -> tuple:
        flow = stack(params)
        x = flow._inverse(y)
        return x, -flow.log_abs_det_jacobian(x, y)

    return params, forward, inverse


JAX: dict[str, dict[str, Callable[..., tuple]]] = {
    "realnvp": {"numpyro_flows": _numpyro_flows("realnvp"), "flowjax": _flowjax("coupling_flow")},
    "nsf": {"numpyro_flows": _numpyro_flows("nsf"), "flowjax": _flowjax("coupling_flow", spline=True)},
    "maf, iaf": {
        "numpyro_flows": _numpyro_flows("iaf"),
        "flowjax": _flowjax("masked_autoregressive_flow"),
        "numpyro": _numpyro,
    },
    "nsf_ar": {
        "numpyro_flows": _numpyro_flows("nsf_ar"),
        "flowjax": _flowjax("masked_autoregressive_flow", spline=True),
    },
    "bnaf": {
        "numpyro_flows": _numpyro_flows("bnaf", 2, (8, 8)),
        "flowjax": _flowjax_bnaf,
        "numpyro": _numpyro_bnaf,
    },
}


# -- timing ------------------------------------------------------------------------------------------------------------
def race(calls: dict[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """Least seconds a call. The libraries take ten turns of a tenth of ``budget`` seconds each; one that has used its
    budget has no more turns, so that a slow one does not hold up the others."""
    least: dict[str, float] = {}
    used = dict.fromkeys(calls, 0.0)
    for turn in range(-2, 10):  # two single calls to warm up, of which a very slow one makes only the first
        for name, call in calls.items():
            if turn > -2 and used[name] > budget:
                continue
            repeats = 1 if turn < 0 else max(1, int(budget / 10 / max(least[name], 1e-6)))
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds = time.perf_counter() - start
            used[name] += seconds if turn >= 0 or seconds > budget else 0.0
            least[name] = min(least[name], seconds / repeats) if turn > -1 else seconds
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch", "jax"], default="torch")
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--dims", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 1024, 8192])
    parser.add_argument("--threads", type=int, help="torch's threads (jax uses all cores)")
    parser.add_argument("--device", default="cpu", help="torch's device (jax uses its default)")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a library and operation")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = TORCH if options.backend == "torch" else JAX
    candidates = torch_candidates if options.backend == "torch" else jax_candidates
    if options.backend == "torch" and options.threads:
        import torch

        torch.set_num_threads(options.threads)
    families = options.families or list(table)
    peers = list(dict.fromkeys(peer for family in families for peer in list(table[family])[1:]))
    ours = next(iter(table[families[0]]))
    columns = ["family", "d", "batch", "operation", f"{ours} ms", *(f"{peer} x" for peer in peers), "best peer x"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    worst: dict[tuple[str, str], list[float]] = {}
    for family in families:
        for dim in options.dims:
            for batch in options.batches:
                built = dict(candidates(family, dim, batch, options.device))
                measured = {
                    operation: race(
                        {name: c.run[operation] for name, c in built.items() if operation in c.run}, options.budget
                    )
                    for operation in OPERATIONS
                }
                measured["memory"] = {name: float(c.memory()) for name, c in built.items()}
                for operation, values in measured.items():
                    own = values[ours]
                    ratios = {peer: values[peer] / own for peer in peers if peer in values}
                    shown = f"{own * 1e3:.3f}" if operation != "memory" else f"{own / 2**20:.1f} MiB"
                    cells = [f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in peers]
                    if ratios:
                        cells.append(f"{min(ratios.values()):.2f}")
                        worst.setdefault((family, operation), []).append(min(ratios.values()))
                    row = [family, dim, batch, operation, shown, *cells]
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print("\nBest peer over ours: least, geometric mean\n\n| family | operation | least | mean |\n|---|---|---|---|")
    for (family, operation), ratios in worst.items():
        mean = math.exp(np.mean(np.log(ratios)))
        print(f"| {family} | {operation} | {min(ratios):.2f} | {mean:.2f} |")


if __name__ == "__main__":
    main()
