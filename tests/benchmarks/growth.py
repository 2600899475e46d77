"""How the cost of a training step grows, and how far it is from that of its matrix products alone.

    python -m tests.benchmarks.growth [--backend jax|torch] [--budget 0.5]

A step: draws pushed through a ``realnvp`` (two hidden layers of 32 units), and the gradient of a loss of value and
log-det by the parameters; for the size of the data, the log-density of a logistic regression with ten coefficients and
its gradient, at 256 draws. One quantity varies, the others stay at d = 32, ten layers, 256 draws. "exponent" is the
slope of log time over log size between the last two sizes, "expected" that of the matrix products' work. "floor" is the
time of forward and backward pass of the products alone, the same networks without activations one after the other: how
far the largest case is from the machine's limit. A second table has the gradient of deep flows (d = 16, 1,024 draws) as
they come, and in ``Reversible``: its time, and the peak of what it allocates.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.transforms import jax_candidate, race, torch_candidate

WIDTH = (32, 32)
BASE = {"d": 32, "layers": 10, "draws": 256}
SIZES = {
    "d": [8, 32, 128, 512],
    "layers": [2, 8, 32, 64],
    "draws": [64, 512, 4096, 16384],
    "data": [100, 1000, 10_000, 100_000],
}


def products(d: int, layers: int, draws: int) -> float:
    """Multiplications of the forward pass."""
    return float(draws * layers * (d // 2 * WIDTH[0] + WIDTH[0] * WIDTH[1] + WIDTH[1] * 2 * (d - d // 2)))


def jax_calls(sizes: dict[str, int]) -> dict[str, Callable[[], Any]]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from numpyro_flows import flows

    d, n = sizes["d"], sizes["draws"]
    flow = flows.realnvp(d, sizes["layers"], WIDTH, key=jax.random.key(0))
    arrays, static = eqx.partition(flow, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (n, d))

    def loss(arrays: Any) -> Any:
        value, log_det = eqx.combine(arrays, static).forward_and_log_det(x)
        return 0.5 * jnp.square(value).sum() - log_det.sum()

    shapes = [(d // 2, WIDTH[0]), WIDTH, (WIDTH[1], 2 * (d - d // 2))]
    weights = [jnp.ones((sizes["layers"], *shape)) / shape[0] for shape in shapes]

    def linear(weights: Any) -> Any:
        def layer(h: Any, own: Any) -> tuple[Any, None]:
            for weight in own:
                h = h @ weight
            return h[:, : d // 2], None

        return jax.lax.scan(layer, x[:, : d // 2], weights)[0].sum()

    calls = {}
    for name, function, argument in (("step", loss, arrays), ("floor", linear, weights)):
        compiled = jax.jit(jax.grad(function)).lower(argument).compile()
        calls[name] = lambda f=compiled, a=argument: jax.block_until_ready(f(a))
    return calls


def torch_calls(sizes: dict[str, int]) -> dict[str, Callable[[], Any]]:
    import torch

    from pyroflows import flows

    d, n = sizes["d"], sizes["draws"]
    flow = flows.realnvp(d, sizes["layers"], WIDTH)
    parameters, x = list(flow.parameters()), torch.randn(n, d)
    shapes = [(d // 2, WIDTH[0]), WIDTH, (WIDTH[1], 2 * (d - d // 2))]
    weights = [torch.ones(shape).div(shape[0]).requires_grad_() for _ in range(sizes["layers"]) for shape in shapes]

    def step() -> None:
        value, log_det = flow.forward_and_log_det(x)
        torch.autograd.grad(0.5 * value.square().sum() - log_det.sum(), parameters, allow_unused=True)

    def floor() -> None:
        h = x[:, : d // 2]
        for n in range(0, len(weights), 3):
            for weight in weights[n : n + 3]:
                h = h @ weight
            h = h[:, : d // 2]
        torch.autograd.grad(h.sum(), weights, allow_unused=True)

    return {"step": step, "floor": floor}


def data_call(backend: str, n: int) -> Callable[[], Any]:
    """The log-density of a model at many draws, and its gradient, as a fit evaluates it."""
    rng = np.random.default_rng(0)
    x, y, u = rng.normal(size=(n, 10)), rng.integers(0, 2, n).astype(float), rng.normal(size=(BASE["draws"], 10))
    if backend == "jax":
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        from numpyro_flows import AutoFlow

        def model(x: Any, y: Any) -> None:
            beta = numpyro.sample("beta", dist.Normal(0, 1).expand([10]).to_event(1))
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

        density = AutoFlow(model).log_density(jnp.asarray(x), jnp.asarray(y))
        point = jnp.asarray(u)
        compiled = jax.jit(jax.grad(lambda u: jax.vmap(density)(u).sum())).lower(point).compile()
        return lambda: jax.block_until_ready(compiled(point))
    import pyro
    import pyro.distributions as pyro_dist
    import torch

    from pyroflows import AutoFlow as PyroAutoFlow

    def pyro_model(x: Any, y: Any) -> None:
        beta = pyro.sample("beta", pyro_dist.Normal(torch.zeros(10), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            logits = beta @ x.T  # the axis of the draws is left of the plate's
            pyro.sample("y", pyro_dist.Bernoulli(logits=logits.squeeze(-2) if logits.ndim > 1 else logits), obs=y)

    arguments = [torch.as_tensor(a, dtype=torch.get_default_dtype()) for a in (x, y)]
    torch_density = PyroAutoFlow(pyro_model).log_density(*arguments)
    torch_point = torch.as_tensor(u, dtype=torch.get_default_dtype()).requires_grad_()
    return lambda: torch.autograd.grad(torch_density(torch_point).sum(), torch_point)


def reversible(backend: str, family: str, layers: int) -> dict[str, Any]:
    """A deep flow as it comes, and with a gradient that stores no activations."""
    if backend == "jax":
        import jax

        from numpyro_flows import Reversible, flows

        flow = getattr(flows, family)(16, layers, WIDTH, key=jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (1024, 16))
        directions = (lambda f, x: f.forward_and_log_det(x)), (lambda f, y: f.inverse_and_log_det(y))
        return {name: jax_candidate(f, *directions, x) for name, f in (("plain", flow), ("own", Reversible(flow)))}
    import torch

    import pyroflows

    deep, points = getattr(pyroflows.flows, family)(16, layers, WIDTH), torch.randn(1024, 16)
    return {
        name: torch_candidate(f, f.forward_and_log_det, f.inverse_and_log_det, points)
        for name, f in (("plain", deep), ("own", pyroflows.Reversible(deep)))
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the last two sizes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["jax", "torch"], default="jax")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a measurement")
    options = parser.parse_args()
    calls = jax_calls if options.backend == "jax" else torch_calls
    print("| varied | sizes | ms a step | exponent | expected | floor of the largest, ms | step over floor |")
    print("|---|---|---|---|---|---|---|")
    for name, sizes in SIZES.items():
        seconds, floor = [], math.nan
        for size in sizes:
            if name == "data":
                measured = race({"step": data_call(options.backend, size)}, options.budget)
            else:
                measured = race(calls(BASE | {name: size}), options.budget)
                floor = measured["floor"]
            seconds.append(measured["step"])
        work = [float(size) if name == "data" else products(**(BASE | {name: size})) for size in sizes]
        shown = [f"{value * 1e3:.2f}" for value in seconds]
        ends = ["", ""] if name == "data" else [f"{floor * 1e3:.2f}", f"{seconds[-1] / floor:.1f}"]
        slopes = [f"{exponent(sizes, values):.2f}" for values in (seconds, work)]
        row = [name, ", ".join(map(str, sizes)), ", ".join(shown), *slopes, *ends]
        print("| " + " | ".join(row) + " |", flush=True)
    print("\n| flow | layers | plain, ms | reversible, ms | plain, MiB | reversible, MiB |\n|---|---|---|---|---|---|")
    for family, layers in itertools.product(("realnvp", "nsf"), (4, 16, 64)):
        both = reversible(options.backend, family, layers)
        measured = race({name: candidate.run["backward"] for name, candidate in both.items()}, options.budget)
        times = [f"{measured[name] * 1e3:.1f}" for name in both]
        memory = [f"{candidate.memory() / 2**20:.1f}" for candidate in both.values()]
        print("| " + " | ".join([family, str(layers), *times, *memory]) + " |", flush=True)


if __name__ == "__main__":
    main()
