"""Microseconds of a step of variational inference, beside the ecosystems' own, in one run.

    python -m tests.benchmarks.svi [--backend numpyro|pyro] [--particles 16 256] [--steps 200] [--rounds 3]
        [--device cuda]

Models: eight schools, centred (10 latents), and a normal regression with 100 coefficients on 500 observations (101).
Guides: an inverse autoregressive flow of two layers with two hidden layers of 32 units (128 in the regression), ReLU
(in ``AutoIAFNormal`` its own activation), all draws of a step in one vectorised pass, Adam. "FlowVI": our loop with
this flow (it has a full-rank affine map besides), its base fixed and the plain ELBO; "FlowVI, default": as it comes.
"AutoFlow": our guide in the ecosystem's own ``SVI``. In NumPyro its steps run in one compiled ``lax.scan``, as
``svi.run`` does without a progress bar; flowjax has a loop in Python. A cell is the least time in ``--rounds`` rounds
of ``--steps`` steps, without compilation; in parentheses that over FlowVI's.
``pip install '.[all,benchmark]'``.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

LAYERS = 2
WIDTHS = {"schools": (32, 32), "regression": (128, 128)}  # the others need no less than the latents
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def regression_data(dim: int = 100, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, dim)) / math.sqrt(dim)
    return x, x @ rng.normal(size=dim) + 0.5 * rng.normal(size=n)


class Watch:
    """In place of the progress bar: notes the time of every chunk of steps, and ends the fit after some."""

    def __init__(self, **_: Any):
        self.times: list[float] = []
        self.total = 0
        WATCHES.append(self)

    def __enter__(self) -> Watch:
        self.last = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def set_postfix(self, **_: Any) -> None:
        pass

    def update(self, n: int) -> None:
        now = time.perf_counter()
        self.times.append((now - self.last) / n)
        self.last = now
        if len(self.times) == CHUNKS:
            raise KeyboardInterrupt  # FlowVI ends here


WATCHES: list[Watch] = []
CHUNKS = 8


def least_of_fit(inference: Any, fit: Callable[[], Any]) -> float:
    """Least seconds a step of the chunks of a fit, of which the first has been compiled in."""
    WATCHES.clear()
    plain, inference.tqdm = inference.tqdm, Watch
    try:
        fit()
    finally:
        inference.tqdm = plain
    return min(t for watch in WATCHES for t in watch.times)


# -- NumPyro -----------------------------------------------------------------------------------------------------------
def numpyro_candidates(name: str, particles: int, steps: int) -> dict[str, Callable[[], float]]:
    import flowjax.flows
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from flowjax.distributions import Normal
    from flowjax.train import fit_to_key_based_loss
    from flowjax.train.losses import ElboLoss
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal

    from numpyro_flows import AutoFlow, FlowVI, flows, inference

    x, y = map(jnp.asarray, regression_data())

    def schools() -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, SIGMA), obs=jnp.asarray(Y))

    def regression() -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    model, width = {"schools": schools, "regression": regression}[name], WIDTHS[name]
    flow = partial(flows.iaf, num_layers=LAYERS, hidden_dims=width, activation="relu")

    def svi(guide: Any) -> Callable[[], float]:
        loop = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(particles, vectorize_particles=True))
        state = loop.init(jax.random.key(0))
        run = jax.jit(lambda state: jax.lax.scan(lambda s, _: loop.update(s), state, length=steps))
        jax.block_until_ready(run(state))

        def call() -> float:
            start = time.perf_counter()
            jax.block_until_ready(run(state))
            return (time.perf_counter() - start) / steps

        return call

    def flowjax_loop() -> Callable[[], float]:
        density = AutoFlow(model).log_density()
        target = flowjax.flows.masked_autoregressive_flow(
            jax.random.key(0),
            base_dist=Normal(jnp.zeros(density.dim)),
            flow_layers=LAYERS,
            nn_width=width[0],
            nn_depth=len(width),
            invert=False,
        )
        loss, optimizer = ElboLoss(density, particles), optax.adam(1e-3)

        def run(n: int) -> float:
            start = time.perf_counter()
            fit_to_key_based_loss(
                jax.random.key(0), target, loss_fn=loss, steps=n, optimizer=optimizer, show_progress=False
            )
            return time.perf_counter() - start

        run(5)
        return lambda: run(steps) / steps

    def ours(**options: Any) -> float:
        vi = FlowVI(model, num_particles=particles, num_starts=1, **options)
        return least_of_fit(inference, lambda: vi.run(jax.random.key(0)))

    plain = {"flow": flow, "base": None, "noncentered": False, "path_gradient": False}
    return {
        "FlowVI": partial(ours, **plain),
        "FlowVI, default": ours,
        "AutoFlow": svi(AutoFlow(model, flow)),
        "AutoIAFNormal": svi(AutoIAFNormal(model, num_flows=LAYERS, hidden_dims=list(width))),
        "AutoBNAFNormal": svi(AutoBNAFNormal(model)),
        "flowjax": flowjax_loop(),
    }


# -- Pyro --------------------------------------------------------------------------------------------------------------
def pyro_candidates(name: str, particles: int, steps: int) -> dict[str, Callable[[], float]]:
    import pyro
    import pyro.distributions as dist
    import torch
    import zuko
    from pyro.contrib.zuko import ZukoToPyro
    from pyro.distributions.transforms import iterated, spline_coupling
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoContinuous, AutoIAFNormal, AutoNormalizingFlow
    from pyro.infer.autoguide.initialization import init_to_median

    from pyroflows import AutoFlow, FlowVI, flows, inference

    x, y = (torch.as_tensor(a, dtype=torch.get_default_dtype()) for a in regression_data())
    of_schools, errors = (torch.as_tensor(a, dtype=torch.get_default_dtype()) for a in (Y, SIGMA))

    def schools() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, errors), obs=of_schools)

    def regression() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y)):
            mean = beta @ x.T  # the axis of the draws is left of the plate's
            pyro.sample("y", dist.Normal(mean.squeeze(-2) if mean.ndim > 1 else mean, sigma), obs=y)

    model, width = {"schools": schools, "regression": regression}[name], WIDTHS[name]
    flow = partial(flows.iaf, num_layers=LAYERS, hidden_dims=width, activation="relu")

    class AutoZuko(AutoContinuous):
        def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
            super()._setup_prototype(*args, **kwargs)
            self.flow = zuko.flows.MAF(self.latent_dim, transforms=LAYERS, hidden_features=width)
            self.flow.transform = zuko.lazy.LazyComposedTransform(
                *(zuko.lazy.LazyInverse(t) for t in self.flow.transform.transforms)
            )

        def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
            return ZukoToPyro(self.flow())

    def svi(make: Callable[[], Any]) -> Callable[[], float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        store = pyro.get_param_store()
        loop = SVI(model, make(), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(particles, vectorize_particles=True))
        for _ in range(3):
            loop.step()
        state = store.get_state()

        def call() -> float:
            store.set_state(state)
            start = time.perf_counter()
            for _ in range(steps):
                loop.step()
            return (time.perf_counter() - start) / steps

        return call

    def ours(**options: Any) -> float:
        vi = FlowVI(model, num_particles=particles, num_starts=1, **options)
        return least_of_fit(inference, vi.run)

    def splines(dim: int) -> Any:
        return iterated(LAYERS, spline_coupling, dim, hidden_dims=list(width))

    plain = {"flow": flow, "base": None, "noncentered": False, "path_gradient": False}
    return {
        "FlowVI": partial(ours, **plain),
        "FlowVI, default": ours,
        "AutoFlow": svi(lambda: AutoFlow(model, flow)),
        "AutoIAFNormal": svi(
            lambda: AutoIAFNormal(model, hidden_dim=list(width), num_transforms=LAYERS, init_loc_fn=init_to_median)
        ),
        "AutoNormalizingFlow, splines": svi(lambda: AutoNormalizingFlow(model, splines)),
        "ZukoToPyro, IAF": svi(lambda: AutoZuko(model)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--models", nargs="*", default=["schools", "regression"], choices=["schools", "regression"])
    parser.add_argument("--particles", type=int, nargs="*", default=[16, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="torch's device (jax uses its default)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.backend == "pyro":
        import torch

        torch.set_default_device(options.device)
    candidates = numpyro_candidates if options.backend == "numpyro" else pyro_candidates
    header: list[str] = []
    for model in options.models:
        for particles in options.particles:
            built = candidates(model, particles, options.steps)
            least = dict.fromkeys(built, math.inf)
            for n in range(options.rounds):
                for name, call in built.items():
                    if n == 0 or not name.startswith("FlowVI"):  # which is the least of several chunks by itself
                        least[name] = min(least[name], call())
            if not header:
                header = ["model", "draws a step", *least]
                print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
            ours = least["FlowVI"]
            cells = [f"{seconds * 1e6:.0f} ({seconds / ours:.1f})" for seconds in least.values()]
            print("| " + " | ".join([model, str(particles), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
