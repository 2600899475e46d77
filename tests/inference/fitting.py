"""FlowVI in one package, with numpy in and out."""

import importlib
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tests import backends

# of a fixture ``in_float64``: where what jax adds is the time to compile, since torch runs the same test
slow_in_jax = pytest.mark.parametrize(
    "in_float64", ["torch", pytest.param("jax", marks=pytest.mark.slow)], indirect=True
)


class Fitter:
    """FlowVI in one package, with numpy in and out; every fit is made once."""

    def __init__(self, name):
        self.name = name
        backends.get(name)
        self.pkg = importlib.import_module({"torch": "pyroflows", "jax": "numpyro_flows"}[name])
        self.models = importlib.import_module(f"tests.inference.models_{'pyro' if name == 'torch' else 'numpyro'}")
        self.fits = {}

    def module(self, name):
        return importlib.import_module(f"{self.pkg.__name__}.{name}")

    def array(self, x):
        if self.name == "jax":
            return importlib.import_module("jax.numpy").asarray(x)
        return importlib.import_module("torch").as_tensor(x)

    def key(self, seed=0):
        """The leading argument of sampling calls, or the seed set."""
        if self.name == "jax":
            return (importlib.import_module("jax").random.key(seed),)
        importlib.import_module("pyro").set_rng_seed(seed)
        return ()

    def run(self, model, *args, seed=0, **options):
        vi = self.pkg.FlowVI(getattr(self.models, model), **{"progress_bar": False, **options})
        return vi.run(*self.key(seed), *args)

    def fit(self, model, *args, **options):
        """The fit of a model, made once for its name and the options."""
        name = model, *options.items()
        if name not in self.fits:
            self.fits[name] = self.run(model, *args, **options)
        return self.fits[name]

    def refine(self, posterior, method, seed=1, **options):
        return posterior.refine(*self.key(seed), method, **{"progress_bar": False, **options})

    def sample(self, posterior, n, seed=1):
        return {k: np.asarray(v) for k, v in posterior.sample(*self.key(seed), n, deterministic=True).items()}

    def resample(self, posterior, n, seed=1):
        draws = posterior.importance_resample(*self.key(seed), n, deterministic=True)
        return {k: np.asarray(v) for k, v in draws.items()}


@contextmanager
def within_steps(context):
    """Has FlowVI in torch run its steps within ``context()``, but for the first ones, which record the model.

    Gives a list that takes up the numbers of those steps.
    """
    torch, inference = importlib.import_module("torch"), importlib.import_module("pyroflows.inference")
    counts, next_chunk, tolist = [], inference.Schedule.next_chunk, torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, ExitStack() as entered:

        def before_steps(schedule, trace, divergence):
            steps = next_chunk(schedule, trace, divergence)
            if trace and steps is not None:
                entered.enter_context(context())
                counts.append(len(steps))
            return steps

        def after_steps(x):
            entered.close()
            return tolist(x)

        patch.setattr(inference.Schedule, "next_chunk", before_steps)
        patch.setattr(torch.Tensor, "tolist", after_steps)
        yield counts
