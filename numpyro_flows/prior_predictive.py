"""Latents and data sets drawn from a model together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to

from numpyro_flows.programs import default_key, quick_key
from numpyro_flows.supports import Supported

_BATCH = 1000  # simulations at a time: bounds the memory


class Simulations(NamedTuple):
    """Draws of a model's latents and of the arguments that hold its data."""

    unconstrained: Array  # (n, dim)
    data: tuple[Array, ...]  # arguments of the model that vary, (n, *shape) each
    finite: Array  # (n,): where either is not, zeros stand for both


class PriorPredictive:
    """Draws from a model's joint distribution of latents and data, the data in the place of its arguments.

    Which arguments are data is read off the model: those that it passes to ``sample(..., obs=)``, on their own or
    within lists, tuples and dicts.

    :param model: NumPyro model with proper priors and observed sites.
    :param args: positional arguments of the model; of those that are data only the shapes matter.
    :param kwargs: keyword arguments of the model.
    :param site_names: the latents in the order of the unconstrained vector; may be set later.
    :param arguments: function ``arguments(key)`` that draws the model's positional arguments anew for every simulation
        (as a tuple; as a dict its keyword arguments): covariates, sizes, masks. They must have the same shapes each
        time; where they are data, only their shapes matter. Unless given, all that is no data is as in ``args``.
    :param owner: of error messages.
    :raises ValueError: for a model whose data cannot be simulated: no observed sites, factors, improper priors, data
        that are none of its arguments, or have another shape than the model draws.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        site_names: list[str] | None = None,
        *,
        arguments: Callable | None = None,
        owner: str = "PriorPredictive",
    ):
        self.model, self.site_names, self.arguments = Supported(model), site_names, arguments
        self._fixed, self.owner = (args, kwargs), owner
        self._structure: Any
        call, trace = self._first_draw(owner)
        self.leaves, self._structure = jax.tree.flatten(call)
        self.observed = self._find_data(trace, owner)
        drawn = arguments is not None  # numbers of Python's stay as they are: a model may take them for sizes
        arrays = [i for i, leaf in enumerate(self.leaves) if drawn and isinstance(leaf, jax.Array | np.ndarray)]
        self.varying = sorted({*arrays, *self.observed.values()})

    def _arguments(self, key: Array) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = self._fixed
        if self.arguments is None:
            return args, kwargs
        drawn = self.arguments(self._keys(key))
        if not isinstance(drawn, tuple | dict):
            raise ValueError(
                "arguments must return a tuple of the model's positional arguments, or a dict of its keyword "
                f"arguments, but returned {type(drawn).__name__}."
            )
        return (args, {**kwargs, **drawn}) if isinstance(drawn, dict) else (drawn, kwargs)

    def _first_draw(self, owner: str) -> tuple[tuple[tuple, dict[str, Any]], dict[str, Any]]:
        """The model's arguments and a trace; settles of which generator its keys are.

        Of that of fits, but where the model takes keys of jax's own alone, as its Poisson draws do.
        """
        for self._keys in (quick_key, default_key):
            try:
                call = self._arguments(jax.random.key(0))
                return call, self._trace(jax.random.key(0), *call)
            except NotImplementedError as error:
                cause = error
        raise ValueError(
            f"{owner}: the model cannot be drawn from ({cause}). Every latent needs a proper prior, and every "
            "observed site a distribution that can be sampled."
        ) from cause

    def _find_data(self, trace: dict[str, Any], owner: str) -> dict[str, int]:
        """Which leaf of the arguments each observed site has for its data."""
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        factors = [n for n, s in sites.items() if isinstance(s["fn"], dist.Unit) or s["infer"].get("is_auxiliary")]
        if factors:
            raise ValueError(
                f"{owner}: factor site(s) {factors} change the density without a way to draw from it. Write them as "
                "priors, or as observed sites of a distribution."
            )
        data = {name: site for name, site in sites.items() if site["infer"].get("was_observed")}
        if not data:
            raise ValueError(
                f"{owner}: the model has no observed sites: there is nothing to simulate. Give the data as an argument "
                "of the model, which it passes to sample(..., obs=); only its shape matters."
            )
        found = {}
        for name, site in data.items():
            given = site["infer"]["obs"]
            places = [i for i, leaf in enumerate(self.leaves) if leaf is given]
            places = places or [i for i, x in enumerate(self.leaves) if _same(x, given) and self._passes_on(name, i)]
            if len(places) != 1:
                raise ValueError(
                    f"{owner}: the data of site {name!r} are {'none' if not places else 'several'} of the model's "
                    "arguments, so that simulated data cannot be put in their place. Make them an argument, which goes "
                    "to sample(..., obs=) as it is."
                )
            if np.shape(given) != np.shape(site["value"]):
                raise ValueError(
                    f"{owner}: site {name!r} is observed with shape {np.shape(given)}, but the model draws "
                    f"{np.shape(site['value'])}. Give its distribution the shape of the data, by a plate or expand()."
                )
            found[name] = places[0]
        return found

    def _passes_on(self, name: str, i: int) -> bool:
        """Whether the data of a site are this leaf of the arguments whatever its values."""
        leaf, leaves = self.leaves[i], list(self.leaves)
        n = np.arange(math.prod(np.shape(leaf))).reshape(np.shape(leaf))
        values = (2 + n) * (-1) ** n  # whole numbers, no two alike, of either sign
        leaves[i] = (
            jnp.asarray(values, leaf.dtype) if isinstance(leaf, Array) else values.astype(np.asarray(leaf).dtype)
        )
        try:
            trace = self._trace(jax.random.key(0), *jax.tree.unflatten(self._structure, leaves))
        except Exception:  # whatever a model does with such values
            return False
        return _same(leaves[i], trace[name]["infer"]["obs"])

    def _trace(self, key: Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        with handlers.block(), handlers.seed(rng_seed=self._keys(key)), handlers.uncondition():
            return handlers.trace(self.model).get_trace(*args, **kwargs)

    def call(self, data: tuple[Array, ...]) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments with one data set in its place."""
        leaves = list(self.leaves)
        for i, value in zip(self.varying, data, strict=True):
            leaves[i] = value
        return jax.tree.unflatten(self._structure, leaves)

    def data_of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Array, ...]:
        """The data set that the model's arguments hold: the inverse of :meth:`call`."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        if structure != self._structure:
            raise ValueError(
                f"{self.owner}: the model's arguments, {_named(args, kwargs)}, are not as those from which data are "
                f"simulated, {_named(*self._fixed)}. Pass them in the same way."
            )
        return tuple(jnp.asarray(leaves[i]) for i in self.varying)

    def example(self, key: Array) -> tuple[dict[str, Array], tuple, dict[str, Any]]:
        """One simulation: the latents by site, and the model's arguments with the data in their places."""
        trace, leaves = self._simulate(key)
        latents = {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "sample" and name not in self.observed
        }
        return latents, *jax.tree.unflatten(self._structure, leaves)

    def _simulate(self, key: Array) -> tuple[dict[str, Any], list[Any]]:
        """A trace, and the leaves of the model's arguments with the data in their places."""
        argument_key, model_key = jax.random.split(key)
        args, kwargs = self._arguments(argument_key)
        trace = self._trace(model_key, args, kwargs)
        leaves = jax.tree.leaves((args, kwargs))
        for name, i in self.observed.items():
            leaves[i] = jnp.asarray(trace[name]["value"], jnp.result_type(self.leaves[i]))
        return trace, leaves

    def _one(self, key: Array) -> Simulations:
        trace, leaves = self._simulate(key)
        parts = []
        for name in self.site_names or []:
            parts.append(jnp.ravel(biject_to(trace[name]["fn"].support).inv(trace[name]["value"])))
        u, data = jnp.concatenate(parts), tuple(jnp.asarray(leaves[i]) for i in self.varying)
        finite = jnp.isfinite(u).all()
        for value in data:
            finite &= jnp.isfinite(value).all()
        return jax.tree.map(lambda a: jnp.where(finite, a, jnp.zeros_like(a)), Simulations(u, data, finite))

    def draw(self, key: Array, n: int) -> Simulations:
        """``n`` simulations, as many at a time as the memory is sure to hold."""
        keys = jax.random.split(key, n)
        return jax.vmap(self._one)(keys) if n <= _BATCH else lax.map(self._one, keys, batch_size=_BATCH)


def _named(args: tuple, kwargs: dict[str, Any]) -> str:
    """How arguments are passed: ``(_, x=_)``."""
    return f"({', '.join(['_'] * len(args) + [f'{name}=_' for name in kwargs])})"


def _same(leaf: Any, given: Any) -> bool:
    return np.shape(leaf) == np.shape(given) and bool(np.array_equal(leaf, given))
