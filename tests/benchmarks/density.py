"""Maximum likelihood on densities of which everything is known: every flow beside zuko's or flowjax's.

    python -m tests.benchmarks.density [--backend torch|jax] [--targets rings ...] [--flows nsf ...] [--steps 2000]
        [--batch 256] [--data 20000] [--ours-only]

Prints the divergence of the fit from the truth, ``KL = E_p[log p - log q]`` in nats over 20,000 fresh draws, its
standard error, and the seconds of the training (compilation included). All train on the same standardised data in
float32 with Adam, a step size of 2e-3 that falls along a cosine, the same steps and batch, and nothing held out: ours
by ``fit_density``, the peers in a plain loop, with their own depths and two hidden layers of 64. A flow whose inverse
takes more passes than its forward direction, or root finding, is turned round, as one does for likelihood.
``checkerboard`` and ``rings`` have jumps or near jumps, so no flow reaches zero there. ``cnf, matched`` is ``cnf``
trained by flow matching. A flow that fails, or whose loss is not finite, says so in its row.
``pip install '.[all,benchmark]'``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.known_densities import TARGETS, Target

LEARNING_RATE, HIDDEN, PIECE = 2e-3, (64, 64), 2000
NUMERICAL_INVERSE = ("gaussianization", "planar", "sylvester", "residual")  # of as many passes as the other direction
Score = Callable[[np.ndarray], np.ndarray]  # points (n, dim) -> log q (n,)


def divergence(target: Target, score: Score, n: int = 20_000) -> tuple[float, float]:
    """``KL(p || q)`` and its standard error."""
    x = target.sample(np.random.default_rng(1), n)
    log_q = np.concatenate([score(np.float32(piece)) for piece in x.reshape(-1, PIECE, target.dim)])
    terms = target.log_prob(x) - np.float64(log_q)
    return float(terms.mean()), float(terms.std() / n**0.5)


def ours(package: Any, name: str, dim: int, **key: Any) -> Any:
    """The flow of this name, turned so that its density is the cheap direction."""
    flow = package.flows.FLOWS[name](dim, hidden_dims=HIDDEN, **key)
    return package.Inverse(flow) if flow.passes[1] > flow.passes[0] or name in NUMERICAL_INVERSE else flow


# -- torch -------------------------------------------------------------------------------------------------------------
def torch_ours(name: str, data: np.ndarray, steps: int, batch: int) -> Score:
    import torch

    import pyroflows

    torch.manual_seed(0)
    name, matched = name.removesuffix(", matched"), name.endswith(", matched")
    density, _ = pyroflows.fit_density(
        ours(pyroflows, name, data.shape[1]),
        torch.as_tensor(data),
        objective="flow_matching" if matched else "likelihood",
        num_steps=steps,
        batch_size=batch,
        learning_rate=LEARNING_RATE,
        validation=0.0,
        progress_bar=False,
    )

    def score(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return density.log_prob(torch.as_tensor(x)).numpy()

    return score


def torch_peer(name: str, data: np.ndarray, steps: int, batch: int) -> Score:
    import torch
    import zuko

    torch.manual_seed(0)
    flow = getattr(zuko.flows, name)(data.shape[1], hidden_features=HIDDEN)
    loc, scale = data.mean(0), data.std(0)
    inputs = torch.as_tensor((data - loc) / scale)
    adam = torch.optim.Adam(flow.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        loss = -flow().log_prob(inputs[torch.randint(len(inputs), (batch,))]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()

    def score(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return flow().log_prob(torch.as_tensor((x - loc) / scale)).numpy() - np.log(scale).sum()

    return score


TORCH_PEERS = ("NICE", "RealNVP", "MAF", "NSF", "NAF", "UNAF", "SOSPF", "BPF", "GF", "CNF")


# -- jax ---------------------------------------------------------------------------------------------------------------
def jax_ours(name: str, data: np.ndarray, steps: int, batch: int) -> Score:
    import jax

    import numpyro_flows

    name, matched = name.removesuffix(", matched"), name.endswith(", matched")
    density, _ = numpyro_flows.fit_density(
        ours(numpyro_flows, name, data.shape[1], key=jax.random.key(0)),
        jax.numpy.asarray(data),
        objective="flow_matching" if matched else "likelihood",
        num_steps=steps,
        batch_size=batch,
        learning_rate=LEARNING_RATE,
        validation=0.0,
        progress_bar=False,
        key=jax.random.key(1),
    )
    scored = jax.jit(lambda density, x: density.log_prob(x))
    return lambda x: np.asarray(scored(density, x))


def jax_peer(name: str, data: np.ndarray, steps: int, batch: int) -> Score:
    import equinox as eqx
    import flowjax.flows
    import jax
    import jax.numpy as jnp
    import optax
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal

    factory, spline = name.removesuffix(", spline"), name.endswith(", spline")
    options: dict[str, Any] = {}
    if factory in ("coupling_flow", "masked_autoregressive_flow"):
        transformer = RationalQuadraticSpline(knots=8, interval=5) if spline else None
        options = {"transformer": transformer, "nn_width": HIDDEN[0], "nn_depth": len(HIDDEN)}
    if factory == "planar_flow":
        options = {"width_size": HIDDEN[0], "depth": len(HIDDEN), "negative_slope": 0.1}
    base = Normal(jnp.zeros(data.shape[1]))
    density = getattr(flowjax.flows, factory)(jax.random.key(0), base_dist=base, **options)
    params, static = eqx.partition(
        density, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    loc, scale = data.mean(0), data.std(0)
    inputs = jnp.asarray((data - loc) / scale)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def log_prob(params: Any, x: Any) -> Any:
        return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    def step(state: tuple, key: Any) -> tuple:
        params, moments = state
        rows = inputs[jax.random.randint(key, (batch,), 0, len(inputs))]
        gradient = jax.grad(lambda params: -log_prob(params, rows).mean())(params)
        update, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, update), moments), None

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda params, moments: jax.lax.scan(step, (params, moments), keys)[0][0])
    params = jax.block_until_ready(run(params, optimizer.init(params)))
    scored = jax.jit(log_prob)
    return lambda x: np.asarray(scored(params, (x - loc) / scale)) - np.log(scale).sum()


JAX_PEERS = (
    "coupling_flow",
    "coupling_flow, spline",
    "masked_autoregressive_flow",
    "masked_autoregressive_flow, spline",
    "block_neural_autoregressive_flow",
    "triangular_spline_flow",
    "planar_flow",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["torch", "jax"], default="torch")
    parser.add_argument("--targets", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--flows", nargs="*", help="ours by their name in flows.FLOWS, peers by theirs")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--data", type=int, default=20_000)
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.backend == "torch":
        from pyroflows.flows import FLOWS

        library, peers, fits = "pyroflows", ("zuko", TORCH_PEERS), (torch_ours, torch_peer)
    else:
        from numpyro_flows.flows import FLOWS  # type: ignore[assignment]

        library, peers, fits = "numpyro_flows", ("flowjax", JAX_PEERS), (jax_ours, jax_peer)
    # an iaf turned round is a maf, and ncsf is for angles
    names = [name for name in FLOWS if name not in ("iaf", "ncsf")] + ["cnf, matched"]
    rows = [(library, name, fits[0]) for name in names]
    rows += [] if options.ours_only else [(peers[0], name, fits[1]) for name in peers[1]]
    rows = [row for row in rows if not options.flows or row[1] in options.flows]
    print("| target | library | flow | KL | error | seconds |\n|---|---|---|---|---|---|")
    for name in options.targets:
        target = TARGETS[name]
        data = np.float32(target.sample(np.random.default_rng(0), options.data))
        for library, flow, fit in rows:
            begin = time.perf_counter()
            try:
                score = fit(flow, data, options.steps, options.batch)
                seconds = time.perf_counter() - begin
                kl, error = divergence(target, score)
                result = f"{kl:.3f} | {error:.3f} | {seconds:.1f}"
            except Exception as problem:  # a table with a gap is worth more than none
                result = f"{type(problem).__name__}: {problem} | | ".replace("\n", " ")
            print(f"| {name} | {library} | {flow} | {result} |", flush=True)


if __name__ == "__main__":
    main()
