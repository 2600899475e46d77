"""What stands beside FlowVI in the benchmarks: the ecosystems' own guides, flowjax's variational inference, and NUTS.

Guides are trained by the ecosystem's SVI, with Adam whose step size falls from 5e-3 along a cosine, and are otherwise
as their defaults make them. NUTS runs four chains. Times include compilation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

NAMES = {
    "numpyro": ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "AutoBNAFNormal", "flowjax", "NUTS"],
    "pyro": ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "spline_coupling", "NUTS"],
}
LEARNING_RATE = 5e-3


class Result(NamedTuple):
    elbo: float  # NaN for NUTS
    error: float  # its standard error
    draws: dict[str, np.ndarray]  # latent and deterministic sites
    gradients: int
    seconds: float


def run(backend: str, name: str, posterior: Any, seed: int, steps: int, particles: int, n: int = 10_000) -> Result:
    """One peer on one posterior.

    :param backend: ``"numpyro"`` or ``"pyro"``, set to float64.
    :param name: one of ``NAMES``.
    :param posterior: a ``models.Posterior``.
    :param steps: gradient steps of a guide; draws of NUTS' chains after 1,000 of warm-up are a fifth of them.
    :param particles: draws a step.
    :param n: draws to return.
    """
    return {"numpyro": _numpyro, "pyro": _pyro}[backend](name, posterior, seed, steps, particles, n)


def mmd(x: np.ndarray, y: np.ndarray, size: int = 2000) -> float:
    """Maximum mean discrepancy of two samples ``(n, d)``: Gaussian kernel, median distance of ``y`` as bandwidth.

    The root of the unbiased estimate of its square (Gretton et al. 2012, eq. 3), zero where that is negative.
    """
    rng = np.random.default_rng(0)
    loc, scale = y.mean(0), y.std(0)
    x, y = ((a[rng.permutation(len(a))[:size]] - loc) / scale for a in (x, y))

    def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0)

    within = squares(y, y)
    width = np.median(within[np.triu_indices(len(y), 1)])

    def mean(d: np.ndarray) -> float:
        k = np.exp(-d / width)
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    between = float(np.exp(-squares(x, y) / width).mean())
    return math.sqrt(max(mean(squares(x, x)) + mean(within) - 2 * between, 0.0))


# -- NumPyro -------------------------------------------------------------------------------------------------------
def _numpyro(name: str, posterior: Any, seed: int, steps: int, particles: int, n: int) -> Result:
    import jax
    import numpyro.infer
    import optax
    from numpyro.infer import autoguide

    model, args, kwargs = posterior.model, posterior.args, posterior.kwargs
    fit_key, elbo_key, draw_key = jax.random.split(jax.random.key(seed), 3)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    begin = time.perf_counter()
    if name == "NUTS":
        fields = ("num_steps",)
        mcmc = numpyro.infer.MCMC(
            numpyro.infer.NUTS(model), num_warmup=1000, num_samples=steps // 5, num_chains=4,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        mcmc.warmup(fit_key, *args, extra_fields=fields, collect_warmup=True, **kwargs)
        gradients = int(mcmc.get_extra_fields()["num_steps"].sum())
        mcmc.run(draw_key, *args, extra_fields=fields, **kwargs)
        gradients += int(mcmc.get_extra_fields()["num_steps"].sum())
        draws = {site: np.asarray(x) for site, x in mcmc.get_samples().items()}
        return Result(math.nan, math.nan, draws, gradients, time.perf_counter() - begin)
    if name == "flowjax":
        return _flowjax(posterior, optimizer, seed, steps, particles, n)
    guide = getattr(autoguide, name)(model)
    elbo = numpyro.infer.Trace_ELBO(num_particles=particles, vectorize_particles=True)
    svi = numpyro.infer.SVI(model, guide, optimizer, elbo)
    params = svi.run(fit_key, steps, *args, progress_bar=False, stable_update=True, **kwargs).params
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    loss = jax.jit(lambda key: elbo.loss(key, params, model, guide, *args, **kwargs))
    values = -np.array([float(loss(key)) for key in jax.random.split(elbo_key, max(n // particles, 2))])
    latent = guide.sample_posterior(draw_key, params, sample_shape=(n,))
    others = numpyro.infer.Predictive(model, latent)(draw_key, *args, **kwargs)
    draws = {site: np.asarray(x) for site, x in {**others, **latent}.items()}
    return Result(values.mean(), values.std() / len(values) ** 0.5, draws, steps * particles, seconds)


def _flowjax(posterior: Any, optimizer: Any, seed: int, steps: int, particles: int, n: int) -> Result:
    """Its masked autoregressive flow, of cheap sampling, on the unconstrained density."""
    import jax
    import jax.numpy as jnp
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_key_based_loss
    from flowjax.train.losses import ElboLoss

    from numpyro_flows import AutoFlow

    flow_key, fit_key, draw_key = jax.random.split(jax.random.key(seed), 3)
    density = AutoFlow(posterior.model).log_density(*posterior.args, **posterior.kwargs)
    begin = time.perf_counter()
    flow = masked_autoregressive_flow(flow_key, base_dist=Normal(jnp.zeros(density.dim)), invert=False)
    loss = ElboLoss(density, particles)
    flow, _ = fit_to_key_based_loss(
        fit_key, flow, loss_fn=loss, steps=steps, optimizer=optimizer, show_progress=False
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    u, log_q = flow.sample_and_log_prob(draw_key, (n,))
    terms = np.asarray(jax.jit(jax.vmap(density))(u) - log_q)
    sites = jax.jit(jax.vmap(density.constrain))(u)
    draws = {site: np.asarray(x) for site, x in sites.items()}
    return Result(terms.mean(), terms.std() / n**0.5, draws, steps * particles, seconds)


# -- Pyro ----------------------------------------------------------------------------------------------------------
def pyro_schedule(steps: int, clip: float | None = None) -> Any:
    """Adam whose step size falls to zero along a cosine, as optax has it; ``clip``: norm of a gradient at most."""
    import pyro
    import torch

    return pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": LEARNING_RATE},
            "lr_lambda": lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))),
        },
        None if clip is None else {"clip_norm": clip},
    )


def _pyro(name: str, posterior: Any, seed: int, steps: int, particles: int, n: int) -> Result:
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, autoguide

    from pyroflows import AutoFlow

    model, args, kwargs = posterior.model, posterior.args, posterior.kwargs
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    density = AutoFlow(model).log_density(*args, **kwargs)

    def complete(u: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {site: x.numpy(force=True) for site, x in density.constrain(u).items()}

    begin = time.perf_counter()
    if name == "NUTS":
        gradients = 0

        def potential(latent: dict[str, Any]) -> Any:
            nonlocal gradients
            gradients += 1
            return -density(latent["u"][None])[0]

        u = []
        for _ in range(4):
            start = {"u": density.prototype + 0.1 * torch.randn_like(density.prototype)}
            kernel = NUTS(potential_fn=potential)
            mcmc = MCMC(kernel, steps // 20, 500, initial_params=start, disable_progbar=True)
            mcmc.run()
            u.append(mcmc.get_samples()["u"])
        seconds = time.perf_counter() - begin
        return Result(math.nan, math.nan, complete(torch.cat(u)), gradients, seconds)
    make: Callable
    if name == "spline_coupling":
        from pyro.distributions.transforms import iterated, spline_coupling

        make = partial(
            autoguide.AutoNormalizingFlow, init_transform_fn=partial(iterated, 4, spline_coupling, bound=8.0)
        )
    else:
        make = getattr(autoguide, name)
    guide = make(model)
    schedule = pyro_schedule(steps)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True)
    svi = SVI(model, guide, schedule, elbo)
    for _ in range(steps):
        svi.step(*args, **kwargs)
        schedule.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        values = -np.array([elbo.loss(model, guide, *args, **kwargs) for _ in range(max(n // particles, 2))])
        if isinstance(guide, autoguide.AutoContinuous):
            u = guide.get_posterior().sample((n,))
        else:
            latent = Predictive(guide, num_samples=4000)(*args, **kwargs)
            sites = {site: latent[site].reshape(4000, *latent[site].shape[1:]) for site in density.site_names}
            u = density.unconstrain(sites)[0]
    return Result(values.mean(), values.std() / len(values) ** 0.5, complete(u), steps * particles, seconds)
