"""NUTS on hard geometries, plain, preconditioned and by neural transport: a markdown table.

    python -m tests.benchmarks.neutra --backend numpyro|pyro [--models funnel ...] [--steps 500] [--particles 32]

Methods: ``NUTS`` (diagonal mass matrix), ``dense`` (linear preconditioning: a dense one), ``nutpie`` (low-rank
adaptation; for NumPyro, where it is installed), ``IAF`` and ``BNAF`` (the ecosystem's ``NeuTraReparam`` on its own
guides; the latter NumPyro's), and ``ours``: ``FlowVI`` with ``--steps`` steps of ``--particles`` draws, then
``FlowReparam``; from the same fit ``MH`` (``refine("flow_mh")``) and ``adapted`` (``refine("nuts", adapt=True)``), both
with half the warm-up. The ecosystem's guides are trained with Adam for 5000 steps of 8 draws.

Columns: least bulk and tail ESS of all latent scalars; gradient evaluations of training, warm-up and draws; least ESS
per 1000 gradients of all three, and per second (of everything, compilation included); divergences; largest R-hat; and
the error of mean and standard deviation of the hardest quantity, in true standard deviations. float64; in NumPyro four
vectorised chains, in Pyro two. A gradient is one of one chain or draw. The truth is closed form (funnel), quadrature
(schools, banana) or a long run of the same posterior with its effects not centred (volatility, items: 4 chains of
20,000 draws, which are made with ``--reference``).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

with warnings.catch_warnings():  # 0.23 announces 1.x on import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
NUM_TIMES, NUM_PERSONS, NUM_ITEMS = 40, 25, 8
METHODS = ["NUTS", "dense", "nutpie", "IAF", "BNAF", "ours", "MH", "adapted"]


class Target(NamedTuple):
    model: Callable[[], None]
    hardest: str  # a site, or the logarithm of one: "log site"
    mean: float
    sd: float
    noncentred: Callable[[], None] | None = None  # the same posterior, easier to sample


class Run(NamedTuple):
    draws: dict[str, np.ndarray]  # (chains, draws, ...)
    gradients: tuple[int, int, int]  # of training, warm-up and draws
    divergences: int
    seconds: float


def banana_truth() -> tuple[float, float]:
    """Mean and sd of ``y``, by quadrature."""
    x, y = np.meshgrid(np.linspace(-7, 7, 2001), np.linspace(-5, 45, 5001), indexing="ij")
    log_p = -0.5 * (x**2 + (y / 10) ** 2 + ((y - x**2) / 0.3) ** 2)
    p = np.exp(log_p - log_p.max())
    mean = (p * y).sum() / p.sum()
    return mean, ((p * (y - mean) ** 2).sum() / p.sum()) ** 0.5


def targets(ecosystem: Any, xp: Any, array: Callable) -> dict[str, Target]:
    """The models, in NumPyro or Pyro (``ecosystem``) with jax.numpy or torch (``xp``)."""
    dist, sample, plate = ecosystem.distributions, ecosystem.sample, ecosystem.plate
    rng = np.random.default_rng(0)

    def funnel():
        v = sample("v", dist.Normal(0.0, 3.0))
        with plate("rows", 9):
            sample("x", dist.Normal(0.0, xp.exp(v / 2)))

    def schools():
        mu = sample("mu", dist.Normal(0.0, 5.0))
        tau = sample("tau", dist.HalfCauchy(5.0))
        with plate("schools", 8):
            theta = sample("theta", dist.Normal(mu, tau))
            sample("obs", dist.Normal(theta, array(SIGMA)), obs=array(Y))

    def banana():
        with plate("pairs", 10):
            x = sample("x", dist.Normal(0.0, 1.0))
            y = sample("y", dist.Normal(0.0, 10.0))
            sample("obs", dist.Normal(y - x**2, 0.3), obs=array(np.zeros(10)))

    walk = np.zeros(NUM_TIMES)
    for t in range(1, NUM_TIMES):
        walk[t] = 0.95 * walk[t - 1] + 0.25 * rng.normal()
    returns = np.exp(walk / 2) * rng.normal(size=NUM_TIMES)
    lag = np.subtract.outer(np.arange(NUM_TIMES), np.arange(NUM_TIMES))

    def volatility(centred=True):
        mu = sample("mu", dist.Normal(0.0, 2.0))
        sigma = sample("sigma", dist.HalfNormal(array(0.5)))
        phi = sample("phi", dist.Beta(array(20.0), array(1.5)))
        first = array((lag >= 0) & (np.arange(NUM_TIMES) == 0))  # of a stationary process
        root = sigma * array(lag >= 0) * phi ** array(np.maximum(lag, 0)) * xp.where(first, (1 - phi**2) ** -0.5, 1.0)
        if centred:
            h = sample("h", dist.MultivariateNormal(mu * array(np.ones(NUM_TIMES)), scale_tril=root))
        else:
            noise = sample("noise", dist.Normal(array(np.zeros(NUM_TIMES)), 1.0).to_event(1))
            h = mu + root @ noise
        with plate("times", NUM_TIMES):
            sample("obs", dist.Normal(0.0, xp.exp(h / 2)), obs=array(returns))

    ability, log_slope, difficulty = rng.normal(size=NUM_PERSONS), 0.3 * rng.normal(size=NUM_ITEMS), rng.normal(size=8)
    chance = 1 / (1 + np.exp(-np.exp(log_slope) * (ability[:, None] - difficulty)))
    answers = (rng.uniform(size=chance.shape) < chance).astype(float)

    def items(centred=True):
        sigma_a = sample("sigma_a", dist.HalfCauchy(array(1.0)))
        sigma_b = sample("sigma_b", dist.HalfCauchy(array(2.0)))
        mu_b = sample("mu_b", dist.Normal(0.0, 3.0))
        ability = sample("ability", dist.Normal(array(np.zeros(NUM_PERSONS)), 1.0).to_event(1))
        zeros = array(np.zeros(NUM_ITEMS))
        if centred:
            log_a = sample("log_a", dist.Normal(zeros, sigma_a).to_event(1))
            b = sample("b", dist.Normal(mu_b + zeros, sigma_b).to_event(1))
        else:
            log_a = sigma_a * sample("noise_a", dist.Normal(zeros, 1.0).to_event(1))
            b = mu_b + sigma_b * sample("noise_b", dist.Normal(zeros, 1.0).to_event(1))
        logits = xp.exp(log_a) * (ability[:, None] - b)
        sample("obs", dist.Bernoulli(logits=logits).to_event(2), obs=array(answers))

    return {
        "funnel": Target(funnel, "v", 0.0, 3.0),
        "schools": Target(schools, "log tau", 0.8021, 1.1712),
        "banana": Target(banana, "y", *banana_truth()),
        "volatility": Target(volatility, "log sigma", -1.544, 0.899, lambda: volatility(centred=False)),
        "items": Target(items, "log sigma_a", -1.158, 1.147, lambda: items(centred=False)),
    }


class NumPyro:
    def __init__(self) -> None:
        self.numpyro = importlib.import_module("numpyro")
        self.numpyro.enable_x64()
        self.jax, self.infer = importlib.import_module("jax"), importlib.import_module("numpyro.infer")
        self.package = importlib.import_module("numpyro_flows")
        self.array = self.jax.numpy.asarray
        self.targets = targets(self.numpyro, self.jax.numpy, self.array)

    def nuts(self, model: Callable, warmup: int, draws: int, seed: int, dense: bool = False) -> Run:
        begin, warm_key, key = time.perf_counter(), *self.jax.random.split(self.jax.random.key(seed))
        mcmc = self.infer.MCMC(
            self.infer.NUTS(model, dense_mass=dense), num_warmup=warmup, num_samples=draws, num_chains=4,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        mcmc.warmup(warm_key, extra_fields=("num_steps",), collect_warmup=True)
        warm = int(mcmc.get_extra_fields()["num_steps"].sum())
        mcmc.run(key, extra_fields=("num_steps", "diverging"))
        fields = mcmc.get_extra_fields()
        samples = {name: np.asarray(x) for name, x in mcmc.get_samples(group_by_chain=True).items()}
        gradients = 0, warm, int(fields["num_steps"].sum())
        return Run(samples, gradients, int(fields["diverging"].sum()), time.perf_counter() - begin)

    def transported(self, model: Callable, guide: str, warmup: int, draws: int, seed: int) -> Run:
        begin = time.perf_counter()
        guide = getattr(self.infer.autoguide, f"Auto{guide}Normal")(model)
        loss = self.infer.Trace_ELBO(num_particles=8)
        svi = self.infer.SVI(model, guide, self.numpyro.optim.Adam(5e-3), loss)
        params = svi.run(self.jax.random.key(seed), 5000, progress_bar=False).params
        neutra = self.infer.reparam.NeuTraReparam(guide, params)
        run = self.nuts(neutra.reparam(model), warmup, draws, seed)
        return run._replace(gradients=(40_000, *run.gradients[1:]), seconds=time.perf_counter() - begin)

    def nutpie(self, model: Callable, warmup: int, draws: int, seed: int) -> Run:
        begin, nutpie = time.perf_counter(), importlib.import_module("nutpie")
        density = self.package.AutoFlow(model).log_density()
        value_and_grad = self.jax.jit(self.jax.value_and_grad(density))

        def log_density(u: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = value_and_grad(u)
            return float(value), np.asarray(gradient)

        compiled = nutpie.compiled_pyfunc.from_pyfunc(
            density.dim,
            lambda: log_density,
            lambda *_: lambda u: {"u": u},
            [np.dtype("float64")],
            [(density.dim,)],
            ["u"],
        )
        trace = nutpie.sample(
            compiled, tune=warmup, draws=draws, chains=4, cores=1, seed=seed, low_rank_modified_mass_matrix=True,
            progress_bar=False,
        )  # fmt: skip
        u = self.array(trace["posterior"]["u"].values)
        samples = {
            k: np.asarray(x) for k, x in self.jax.jit(self.jax.vmap(self.jax.vmap(density.constrain)))(u).items()
        }
        warm, here = (trace[group]["n_steps"].values.sum() for group in ("warmup_sample_stats", "sample_stats"))
        divergences = int(trace["sample_stats"]["diverging"].values.sum())
        return Run(samples, (0, int(warm), int(here)), divergences, time.perf_counter() - begin)

    def fit(self, model: Callable, seed: int, **options: Any) -> Any:
        return self.package.FlowVI(model, progress_bar=False, **options).run(self.jax.random.key(seed))

    def refine(self, posterior: Any, seed: int, method: str, **options: Any) -> Any:
        return posterior.refine(self.jax.random.key(seed), method, progress_bar=False, **options)


class Pyro:
    def __init__(self) -> None:
        self.pyro, self.torch = importlib.import_module("pyro"), importlib.import_module("torch")
        self.torch.set_default_dtype(self.torch.float64)
        self.torch.set_num_threads(1)
        self.infer, self.package = importlib.import_module("pyro.infer"), importlib.import_module("pyroflows")

        def array(x: Any) -> Any:
            x = self.torch.as_tensor(x)
            return x.double() if x.dtype == self.torch.int64 else x

        self.array, self.targets = array, targets(self.pyro, self.torch, array)

    def nuts(self, model: Callable, warmup: int, draws: int, seed: int, dense: bool = False) -> Run:
        begin, runs, counts, divergences = time.perf_counter(), 0, [], 0
        chains: list[dict[str, Any]] = []

        def counted() -> Any:  # a gradient is a run of the model
            nonlocal runs
            runs += 1
            return model()

        def hook(kernel: Any, samples: Any, stage: str, i: int) -> None:
            if stage.lower().startswith("warmup") and i == warmup - 1:
                counts.append(runs)

        for chain in range(2):
            self.pyro.set_rng_seed(10 * seed + chain)
            kernel = self.infer.NUTS(counted, full_mass=dense)
            mcmc = self.infer.MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True, hook_fn=hook)
            mcmc.run()
            counts.append(runs)
            divergences += sum(len(found) for found in mcmc.diagnostics()["divergences"].values())
            chains.append(mcmc.get_samples())
        warm = counts[0] + counts[2] - counts[1]
        samples = {name: self.torch.stack([chain[name] for chain in chains]) for name in chains[0]}
        return Run(samples, (0, warm, runs - warm), divergences, time.perf_counter() - begin)

    def transported(self, model: Callable, guide: str, warmup: int, draws: int, seed: int) -> Run | None:
        if guide == "BNAF":
            return None  # Pyro has none
        begin = time.perf_counter()
        self.pyro.set_rng_seed(seed)
        guide = self.infer.autoguide.AutoIAFNormal(model, hidden_dim=[32, 32], num_transforms=2)
        loss = self.infer.Trace_ELBO(num_particles=8)
        svi = self.infer.SVI(model, guide, self.pyro.optim.Adam({"lr": 5e-3}), loss)
        for _ in range(5000):
            svi.step()
        neutra = self.infer.reparam.NeuTraReparam(guide.requires_grad_(False))
        run = self.nuts(neutra.reparam(model), warmup, draws, seed)
        (z,) = run.draws.values()
        transformed = [neutra.transform_sample(part.unsqueeze(-2)) for part in z]
        samples = {name: self.torch.stack([part[name] for part in transformed]) for name in transformed[0]}
        return Run(samples, (40_000, *run.gradients[1:]), run.divergences, time.perf_counter() - begin)

    def fit(self, model: Callable, seed: int, **options: Any) -> Any:
        self.pyro.set_rng_seed(seed)
        return self.package.FlowVI(model, progress_bar=False, **options).run()

    def refine(self, posterior: Any, seed: int, method: str, **options: Any) -> Any:
        self.pyro.set_rng_seed(seed)
        return posterior.refine(method, num_chains=2, progress_bar=False, **options)


def sampled(lab: Any, model: Callable, method: str, options: argparse.Namespace) -> Run | None:
    """A run of one method; ``None`` where the ecosystem has none."""
    begin, size = time.perf_counter(), (options.warmup, options.draws, options.seed)
    if method in ("NUTS", "dense"):
        return lab.nuts(model, *size, dense=method == "dense")
    if method == "nutpie":
        return lab.nutpie(model, *size) if hasattr(lab, "nutpie") else None
    if method in ("IAF", "BNAF"):
        return lab.transported(model, method, *size)
    posterior = lab.fit(model, options.seed, num_steps=options.steps, num_particles=options.particles)
    if method in ("MH", "adapted"):
        how = {"method": "flow_mh"} if method == "MH" else {"method": "nuts", "adapt": True}
        refined = lab.refine(posterior, options.seed, num_samples=options.draws, num_warmup=options.warmup // 2, **how)
        spent = refined.gradients
        gradients = spent["fit"] + spent.get("adaptation", 0), spent["warm-up"], spent["sampling"]
        draws = {name: np.asarray(x) for name, x in refined.get_samples(group_by_chain=True).items()}
        return Run(draws, gradients, refined.divergences, time.perf_counter() - begin)
    neutra = lab.package.FlowReparam(posterior)
    run = lab.nuts(neutra.reparam(model), *size)
    draws = neutra.transform_sample({name: lab.array(x) for name, x in run.draws.items()})
    gradients = posterior.history.gradients, *run.gradients[1:]
    return Run(draws, gradients, run.divergences, time.perf_counter() - begin)


def hardest(target: Target, draws: dict[str, Any]) -> np.ndarray:
    x = np.asarray(draws[target.hardest.removeprefix("log ")])
    return np.log(x) if target.hardest.startswith("log ") else x


def cells(target: Target, run: Run) -> list[Any]:
    sites = [np.asarray(x) for name, x in run.draws.items() if not name.endswith(("_base", "_shared_latent"))]
    scalars = np.concatenate([x.reshape(*x.shape[:2], -1) for x in sites], -1)
    bulk, tail = (
        min(float(az.ess(scalars[..., i], method=method)) for i in range(scalars.shape[-1]))
        for method in ("bulk", "tail")
    )
    r_hat = max(float(az.rhat(scalars[..., i])) for i in range(scalars.shape[-1]))
    x, thousands = hardest(target, run.draws), sum(run.gradients) / 1000
    return [
        f"{bulk:.0f}, {tail:.0f}", ", ".join(map(str, run.gradients)),
        f"{bulk / thousands:.2f}, {tail / thousands:.2f}", f"{bulk / run.seconds:.1f}, {tail / run.seconds:.1f}",
        run.divergences, f"{r_hat:.3f}",
        f"{target.hardest}: {(x.mean() - target.mean) / target.sd:+.2f}, {x.std() / target.sd:.2f}",
        f"{run.seconds:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--models", nargs="*", default=["funnel", "schools", "banana", "volatility", "items"])
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=METHODS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help="prints the truth by long runs of easier forms")
    options = parser.parse_args()
    lab = {"numpyro": NumPyro, "pyro": Pyro}[options.backend]()
    if options.reference:
        for name, target in lab.targets.items():
            if target.noncentred is not None:
                x = hardest(target, lab.nuts(target.noncentred, 2000, 20_000, options.seed).draws)
                print(f"{name}: {target.hardest} {x.mean():.4f}, {x.std():.4f} (ESS {float(az.ess(x)):.0f})")
        return
    if "nutpie" in options.methods and importlib.util.find_spec("nutpie") is None:
        print("nutpie is left out: it is not installed (pip install nutpie).\n")
        options.methods.remove("nutpie")
    header = (
        "model | method | ESS: bulk, tail | gradients: training, warm-up, draws | ESS per 1000 gradients | ESS per s | "
        "divergences | R-hat | hardest: error of mean, ratio of sds | s"
    )
    print(f"| {header} |\n|" + "---|" * 10)
    for name in options.models:
        for method in options.methods:
            run = sampled(lab, lab.targets[name].model, method, options)
            row = ["-"] * 8 if run is None else cells(lab.targets[name], run)
            print("| " + " | ".join(map(str, [name, method, *row])) + " |", flush=True)


if __name__ == "__main__":
    main()
