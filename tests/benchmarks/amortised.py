"""Amortised posteriors: neural posterior estimation, ours beside sbi's, on two tasks with known answers.

``python -m tests.benchmarks.amortised --backend numpyro|pyro``. Tasks (Lueckmann et al. 2021): two moons, and a
Gaussian of ten dimensions (``gaussian_linear``). As many simulations for all. sbi (``pip install sbi``) trains by its
defaults until it stops by itself; the seconds of both are in the table. Columns:

- C2ST: accuracy of a classifier between draws of the guide and of the posterior, mean over observations (0.5 is best;
  Lopez-Paz & Oquab 2017; by scikit-learn, which sbi brings along);
- MMD: squared maximum mean discrepancy of the same draws, times 1000 (Gaussian kernel of the median distance);
- coverage of the central 50, 80 and 95 % intervals, mean over the latents, and least p-value of simulation-based
  calibration (Bonferroni: times the number of latents), over ``--sbc`` data sets.

``ours, fresh`` is not bound to a number of simulations: it draws new ones for every step, as its default is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

DIM, VARIANCE = 10, 0.1  # of the Gaussian
RADIUS, RADIUS_SD, OFFSET, SQRT2 = 0.1, 0.01, 0.25, 2**0.5  # of the moons
NUM_REFERENCE = 2000


# -- tasks: simulators, exact posteriors and models --------------------------------------------------------------------
class GaussianLinear:
    name, latents, data = "gaussian_linear", DIM, DIM

    def simulate(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        theta = VARIANCE**0.5 * rng.standard_normal((n, DIM))
        return theta, theta + VARIANCE**0.5 * rng.standard_normal((n, DIM))

    def posterior(self, rng: np.random.Generator, x: np.ndarray, n: int) -> np.ndarray:
        return 0.5 * x + (0.5 * VARIANCE) ** 0.5 * rng.standard_normal((n, DIM))

    def model(self, lang: Any, x: Any) -> None:
        dist = lang.distributions
        theta = lang.sample("theta", dist.Normal(0.0 * x, VARIANCE**0.5).to_event(1))
        lang.sample("x", dist.Normal(theta, VARIANCE**0.5).to_event(1), obs=x)

    def torch_prior(self, torch: Any) -> Any:
        scale = VARIANCE**0.5 * torch.ones(DIM)
        return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(DIM), scale), 1)


class TwoMoons:
    """A crescent, shifted by ``theta`` up to the sign of its sum."""

    name, latents, data = "two_moons", 2, 2

    def _crescent(self, rng: np.random.Generator, n: int) -> np.ndarray:
        angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, n), RADIUS + RADIUS_SD * rng.standard_normal(n)
        return np.stack([radius * np.cos(angle) + OFFSET, radius * np.sin(angle)], 1)

    def simulate(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        theta = rng.uniform(-1, 1, (n, 2))
        shift = np.stack([-np.abs(theta.sum(1)), theta[:, 1] - theta[:, 0]], 1) / SQRT2
        return theta, self._crescent(rng, n) + shift

    def posterior(self, rng: np.random.Generator, x: np.ndarray, n: int) -> np.ndarray:
        """The noise by which ``x`` came about, solved for ``theta``: the map is of constant volume."""
        p = self._crescent(rng, 20 * n)
        total, difference = SQRT2 * (p[:, 0] - x[0]), SQRT2 * (x[1] - p[:, 1])
        total = np.where(total >= 0, total, np.nan) * rng.choice([-1.0, 1.0], len(p))
        theta = np.stack([total - difference, total + difference], 1) / 2
        return theta[(np.abs(theta) <= 1).all(1)][:n]

    def model(self, lang: Any, x: Any) -> None:
        """The noise enters by its angle and radius, which are integrated out of the posterior: never asked for."""
        dist = lang.distributions
        theta = lang.sample("theta", dist.Uniform(0.0 * x - 1.0, 0.0 * x + 1.0).to_event(1))
        lang.sample("x", crescent(lang)(theta), obs=x)

    def torch_prior(self, torch: Any) -> Any:
        return torch.distributions.Independent(torch.distributions.Uniform(-torch.ones(2), torch.ones(2)), 1)


_crescents: dict[str, Any] = {}


def crescent(lang: Any) -> Any:
    """The distribution of the moons' data given ``theta``, in NumPyro or Pyro."""
    if lang.__name__ in _crescents:
        return _crescents[lang.__name__]
    dist = lang.distributions
    jax = lang.__name__ == "numpyro"
    xp = importlib.import_module("jax.numpy" if jax else "torch")
    base: Any = dist.Distribution if jax else dist.TorchDistribution

    class Crescent(base):
        arg_constraints: dict[str, Any] = {}
        support = dist.constraints.real_vector

        def __init__(self, theta: Any):
            self.shift = xp.stack([-abs(theta.sum(-1)), theta[..., 1] - theta[..., 0]], -1) / SQRT2
            super().__init__(tuple(theta.shape[:-1]), tuple(theta.shape[-1:]), validate_args=False)

        def log_prob(self, value: Any) -> Any:
            p = value - self.shift
            radius = xp.sqrt((p[..., 0] - OFFSET) ** 2 + p[..., 1] ** 2)
            normal = -0.5 * ((radius - RADIUS) / RADIUS_SD) ** 2 - np.log(RADIUS_SD * (2 * np.pi) ** 0.5)
            return xp.where(p[..., 0] > OFFSET, normal - xp.log(np.pi * radius), -np.inf)

        def _of(self, uniform: Any, normal: Any) -> Any:
            angle, radius = np.pi * (uniform - 0.5), RADIUS + RADIUS_SD * normal
            return self.shift + xp.stack([radius * xp.cos(angle) + OFFSET, radius * xp.sin(angle)], -1)

        if jax:

            def sample(self, key: Any, sample_shape: tuple = ()) -> Any:
                random, shape = importlib.import_module("jax").random, (*sample_shape, *self.batch_shape)
                first, second = random.split(key)
                return self._of(random.uniform(first, shape), random.normal(second, shape))

        else:

            def sample(self, sample_shape: tuple = ()) -> Any:
                shape = (*sample_shape, *self.batch_shape)
                return self._of(xp.rand(shape), xp.randn(shape))

    _crescents[lang.__name__] = Crescent
    return Crescent


TASKS = {task.name: task for task in (TwoMoons(), GaussianLinear())}


# -- methods -----------------------------------------------------------------------------------------------------------
class Ours:
    """``AmortisedFlowVI`` in one package."""

    def __init__(self, backend: str, steps: int):
        self.jax = importlib.import_module("jax") if backend == "numpyro" else None
        self.lang = importlib.import_module(backend)
        self.pkg = importlib.import_module("numpyro_flows" if self.jax else "pyroflows")
        self.steps = steps
        if self.jax is None:
            importlib.import_module("torch").set_num_threads(1)

    def key(self, seed: int) -> tuple:
        if self.jax:
            return (self.jax.random.key(seed),)
        self.lang.set_rng_seed(seed)
        return ()

    def array(self, x: np.ndarray) -> Any:
        x = np.asarray(x, "float32")
        return self.jax.numpy.asarray(x) if self.jax else importlib.import_module("torch").from_numpy(x)

    def train(self, task: Any, num_simulations: int | None, seed: int) -> Callable:
        key = {"key": self.key(seed)[0]} if self.jax else {}
        self.key(seed)
        vi = self.pkg.AmortisedFlowVI(
            partial(task.model, self.lang),
            encoder=self.pkg.encoders.MLPEncoder(task.data, 16, **key),
            num_simulations=num_simulations,
            num_steps=self.steps,
            progress_bar=False,
        )
        vi.fit(*self.key(seed), self.array(np.zeros(task.data)))

        def draws(x: np.ndarray, n: int) -> np.ndarray:
            return np.asarray(vi.sample_posteriors(*self.key(seed + 1), n, self.array(x))["theta"])

        return draws


class Sbi:
    """sbi's neural posterior estimation."""

    def __init__(self, estimator: str):
        self.estimator, self.torch = estimator, importlib.import_module("torch")
        self.inference = importlib.import_module("sbi.inference")

    def train(self, task: Any, num_simulations: int, seed: int) -> Callable:
        torch = self.torch
        torch.manual_seed(seed)
        theta, x = (
            torch.from_numpy(a.astype("float32")) for a in task.simulate(np.random.default_rng(seed), num_simulations)
        )
        prior = task.torch_prior(torch)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it leaves its logs where it runs
            npe = self.inference.NPE(prior, density_estimator=self.estimator, show_progress_bars=False)
            npe.append_simulations(theta, x).train()
        posterior = npe.build_posterior()

        def draws(x: np.ndarray, n: int) -> np.ndarray:
            x = torch.from_numpy(x.astype("float32"))
            return posterior.sample_batched((n,), x=x, show_progress_bars=False).transpose(0, 1).numpy()

        return draws


# -- metrics -----------------------------------------------------------------------------------------------------------
def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3)."""
    points, n = np.concatenate([a, b]), len(a)
    squares = cdist(points, points, "sqeuclidean")
    kernel = np.exp(-squares / np.median(squares[squares > 0]))
    np.fill_diagonal(kernel, 0)
    m = len(b)
    return float(
        kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1)) - 2 * kernel[:n, n:].mean()
    )


def c2st(a: np.ndarray, b: np.ndarray) -> float:
    """Cross-validated accuracy of a classifier of two hidden layers; NaN without scikit-learn."""
    try:
        selection = importlib.import_module("sklearn.model_selection")
        network = importlib.import_module("sklearn.neural_network")
    except ImportError:
        return float("nan")
    points, labels = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    points = (points - a.mean(0)) / a.std(0)
    classifier = network.MLPClassifier((10 * a.shape[1],) * 2, max_iter=1000, solver="adam", random_state=0)
    folds = selection.KFold(5, shuffle=True, random_state=0)
    return float(selection.cross_val_score(classifier, points, labels, cv=folds).mean())


def row(name: str, task: Any, train: Callable, simulations: str, sbc: int, observations: int, package: Any) -> str:
    begin = time.perf_counter()
    draws = train()
    seconds = time.perf_counter() - begin
    rng = np.random.default_rng(1000)
    _, x = task.simulate(rng, observations)
    found, begin = draws(x, NUM_REFERENCE), time.perf_counter()
    pairs = [(d, task.posterior(rng, one, NUM_REFERENCE)) for d, one in zip(found, x, strict=True)]
    accuracy = np.mean([c2st(exact[: len(d)], d) for d, exact in pairs])
    discrepancy = 1000 * np.mean([mmd(exact[:1000], d[:1000]) for d, exact in pairs])
    theta, x = task.simulate(rng, sbc)
    begin = time.perf_counter()
    ranks = (draws(x, 99) < theta[:, None]).sum(1)
    sbc_seconds = time.perf_counter() - begin
    calibration = package.Calibration({"theta": ranks}, {"theta": theta}, 99)
    coverage = calibration.coverage()
    cells = [f"{100 * np.mean([c[level].value for c in coverage.values()]):.1f}" for level in (0.5, 0.8, 0.95)]
    p = min(1.0, min(calibration.p_values().values()) * task.latents)
    return (
        f"| {task.name} | {name} | {simulations} | {seconds:.0f} | {accuracy:.3f} | {discrepancy:.2f} | "
        f"{' / '.join(cells)} | {p:.2g} | {sbc_seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=["ours", "fresh", "sbi"], choices=["ours", "fresh", "sbi"])
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--observations", type=int, default=5)
    parser.add_argument("--sbc", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ours, n, seed = Ours(options.backend, options.steps), options.simulations, options.seed
    print("| task | method | simulations | s, training | C2ST | 1000 MMD | coverage 50 / 80 / 95 % | p, SBC | s, SBC |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.tasks:
        task = TASKS[name]
        show = partial(row, task=task, sbc=options.sbc, observations=options.observations, package=ours.pkg)
        if "ours" in options.methods:
            print(show("ours", train=partial(ours.train, task, n, seed), simulations=str(n)), flush=True)
        if "fresh" in options.methods:
            total = options.steps * 256
            print(show("ours, fresh", train=partial(ours.train, task, None, seed), simulations=str(total)), flush=True)
        if "sbi" in options.methods:
            try:
                peers = {f"sbi {e}": Sbi(e) for e in ("nsf", "maf")}
            except ImportError:
                print(f"| {task.name} | sbi: not installed (pip install sbi) |" + " – |" * 7)
                continue
            for label, peer in peers.items():
                print(show(label, train=partial(peer.train, task, n, seed), simulations=str(n)), flush=True)


if __name__ == "__main__":
    main()
