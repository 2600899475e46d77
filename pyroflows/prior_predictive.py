"""Latents and data sets drawn from a model together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyroflows.noncentering import unwrapped
from pyroflows.supports import Supported

_BATCH = 1000  # simulations at a time: bounds the memory


class Simulations(NamedTuple):
    """Draws of a model's latents and of the arguments that hold its data."""

    unconstrained: Tensor  # (n, dim)
    data: tuple[Tensor, ...]  # arguments of the model that vary, (n, *shape) each
    finite: Tensor  # (n,): where either is not, zeros stand for both


class PriorPredictive:
    """Draws from a model's joint distribution of latents and data, the data in the place of its arguments.

    Which arguments are data is read off the model: those that it passes to ``sample(..., obs=)``, on their own or
    within lists, tuples and dicts. Simulations run side by side in ``torch.func.vmap``, where the model can.

    :param model: Pyro model with proper priors and observed sites.
    :param args: positional arguments of the model; of those that are data only the shapes matter.
    :param kwargs: keyword arguments of the model.
    :param site_names: the latents in the order of the unconstrained vector; may be set later.
    :param arguments: function ``arguments()`` that draws the model's positional arguments anew for every simulation
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
        self.model, self.site_names, self.arguments = Supported()(model), site_names, arguments
        self._fixed, self.owner = (args, kwargs), owner
        self.leaves, self._structure = pytree.tree_flatten(self._arguments())
        self.observed = self._find_data(owner)
        drawn = arguments is not None  # numbers of Python's stay as they are: a model may take them for sizes
        tensors = [i for i, leaf in enumerate(self.leaves) if drawn and isinstance(leaf, Tensor)]
        self.varying = sorted({*tensors, *self.observed.values()})

    def _arguments(self) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = self._fixed
        if self.arguments is None:
            return args, kwargs
        drawn = self.arguments()
        if not isinstance(drawn, tuple | dict):
            raise ValueError(
                "arguments must return a tuple of the model's positional arguments, or a dict of its keyword "
                f"arguments, but returned {type(drawn).__name__}."
            )
        return (args, {**kwargs, **drawn}) if isinstance(drawn, dict) else (drawn, kwargs)

    def _find_data(self, owner: str) -> dict[str, int]:
        """Which leaf of the arguments each observed site has for its data."""
        try:
            trace = self._trace(*pytree.tree_unflatten(self.leaves, self._structure))
        except NotImplementedError as error:
            raise ValueError(
                f"{owner}: the model cannot be drawn from ({str(error).splitlines()[0]}). Every latent needs a proper "
                "prior, and every observed site a distribution that can be sampled."
            ) from error
        sites = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and not poutine.util.site_is_subsample(site)
            and not site["infer"].get("_deterministic")
        }
        data = {name: site for name, site in sites.items() if site["infer"].get("was_observed")}
        factors = [
            n
            for n, s in sites.items()
            if isinstance(s["fn"], dist.Unit) or n in data and s["infer"].get("is_auxiliary")
        ]
        if factors:
            raise ValueError(
                f"{owner}: factor site(s) {factors} change the density without a way to draw from it. Write them as "
                "priors, or as observed sites of a distribution."
            )
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
            if np.shape(given) != tuple(site["value"].shape):
                raise ValueError(
                    f"{owner}: site {name!r} is observed with shape {tuple(np.shape(given))}, but the model draws "
                    f"{tuple(site['value'].shape)}. Give its distribution the shape of the data, by a plate or "
                    "expand()."
                )
            found[name] = places[0]
        return found

    def _passes_on(self, name: str, i: int) -> bool:
        """Whether the data of a site are this leaf of the arguments whatever its values."""
        leaf, leaves = self.leaves[i], list(self.leaves)
        n = np.arange(math.prod(np.shape(leaf))).reshape(np.shape(leaf))
        values = (2 + n) * (-1) ** n  # whole numbers, no two alike, of either sign
        leaves[i] = (
            torch.as_tensor(values).to(leaf) if isinstance(leaf, Tensor) else values.astype(np.asarray(leaf).dtype)
        )
        try:
            trace = self._trace(*pytree.tree_unflatten(leaves, self._structure))
        except Exception:  # whatever a model does with such values
            return False
        return _same(leaves[i], trace.nodes[name]["infer"]["obs"])

    def _trace(self, args: tuple, kwargs: dict[str, Any]) -> poutine.Trace:
        with poutine.block(), ByGammas(), poutine.uncondition():
            return poutine.trace(self.model).get_trace(*args, **kwargs)

    def call(self, data: tuple[Tensor, ...]) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments with one data set in its place."""
        leaves = list(self.leaves)
        for i, value in zip(self.varying, data, strict=True):
            leaves[i] = value
        return pytree.tree_unflatten(leaves, self._structure)

    def data_of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The data set that the model's arguments hold: the inverse of :meth:`call`."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if structure != self._structure:
            raise ValueError(
                f"{self.owner}: the model's arguments, {_named(args, kwargs)}, are not as those from which data are "
                f"simulated, {_named(*self._fixed)}. Pass them in the same way."
            )
        return tuple(torch.as_tensor(leaves[i]) for i in self.varying)

    @torch.no_grad()
    def example(self) -> tuple[dict[str, Tensor], tuple, dict[str, Any]]:
        """One simulation: the latents by site, and the model's arguments with the data in their places."""
        trace, leaves = self._simulate()
        latents = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and name not in self.observed and not poutine.util.site_is_subsample(site)
        }
        return latents, *pytree.tree_unflatten(leaves, self._structure)

    def _simulate(self) -> tuple[poutine.Trace, list[Any]]:
        """A trace, and the leaves of the model's arguments with the data in their places."""
        args, kwargs = self._arguments()
        trace = self._trace(args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        for name, i in self.observed.items():
            leaves[i] = trace.nodes[name]["value"].to(torch.as_tensor(self.leaves[i]).dtype)
        return trace, leaves

    def _one(self, _: Tensor) -> Simulations:
        trace, leaves = self._simulate()
        parts = []
        for name in self.site_names or []:
            site = trace.nodes[name]
            parts.append(biject_to(site["fn"].support).inv(site["value"]).reshape(-1))
        u, data = torch.cat(parts), tuple(torch.as_tensor(leaves[i]) for i in self.varying)
        finite = torch.stack([value.isfinite().all() for value in (u, *data)]).all()
        clear = [torch.where(finite, value, torch.zeros_like(value)) for value in (u, *data)]
        return Simulations(clear[0], tuple(clear[1:]), finite)

    @torch.no_grad()
    def draw(self, n: int) -> Simulations:
        """``n`` simulations, as many at a time as the memory is sure to hold."""
        parts = [batched(self._one, torch.empty(min(_BATCH, n - done))) for done in range(0, n, _BATCH)]
        return pytree.tree_map(lambda *rows: torch.cat(rows), *parts) if len(parts) > 1 else parts[0]


def batched(function: Callable, *inputs: Any) -> Any:
    """``function`` of every row of tensors (and tuples of them) ``(n, ...)``, its random numbers drawn anew for each.

    By ``torch.func.vmap`` where it can, and else row by row.
    """
    with pyro.validation_enabled(False):
        try:
            with _OutOfPlace(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.func.vmap(function, randomness="different")(*inputs)
        except Exception:  # whatever a model does that vmap cannot
            leaves, structure = pytree.tree_flatten(inputs)
            rows = [function(*pytree.tree_unflatten(list(row), structure)) for row in zip(*leaves, strict=True)]
            return pytree.tree_map(lambda *values: torch.stack(values), *rows)


class ByGammas(Messenger):
    """Draws of beta and Dirichlet distributions as ratios of gammas: torch's own have no rule for ``vmap``."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = unwrapped(msg["fn"])
        if msg["done"] or not isinstance(fn, dist.Beta | dist.Dirichlet):
            return
        beta, shape = isinstance(fn, dist.Beta), msg["fn"].shape()
        concentration = torch.stack([fn.concentration1, fn.concentration0], -1) if beta else fn.concentration
        gammas = torch._standard_gamma(concentration.expand((*shape, 2) if beta else shape))
        gammas = gammas.clamp_min(torch.finfo(gammas.dtype).tiny)
        ratios = gammas / gammas.sum(-1, keepdim=True)
        msg["value"], msg["done"] = ratios[..., 0] if beta else ratios, True


class _OutOfPlace(TorchFunctionMode):
    """Random numbers that distributions draw in place, which ``vmap`` refuses: drawn as new tensors."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        draw = _DRAWS.get(func)
        return func(*args, **(kwargs or {})) if draw is None else draw(*args, **(kwargs or {}))


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(x.shape, dtype=x.dtype, device=x.device)


def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(x.shape, dtype=x.dtype, device=x.device)


def _exponential(x: Tensor, rate: float = 1.0) -> Tensor:
    return -torch.log1p(-_uniform(x)) / rate


def _cauchy(x: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * torch.tan(torch.pi * (_uniform(x) - 0.5))


_DRAWS: dict[Any, Callable] = {
    Tensor.normal_: _normal,
    Tensor.uniform_: _uniform,
    Tensor.exponential_: _exponential,
    Tensor.cauchy_: _cauchy,
}


def _named(args: tuple, kwargs: dict[str, Any]) -> str:
    """How arguments are passed: ``(_, x=_)``."""
    return f"({', '.join(['_'] * len(args) + [f'{name}=_' for name in kwargs])})"


def _same(leaf: Any, given: Any) -> bool:
    return np.shape(leaf) == np.shape(given) and bool(
        torch.equal(torch.as_tensor(leaf), torch.as_tensor(given)) if np.size(leaf) else True
    )
