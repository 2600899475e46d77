"""A model's log-density as a function of one unconstrained vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import compute_log_probs, constrain_fn, potential_energy
from numpyro.primitives import Messenger

from numpyro_flows.programs import Held, is_array
from numpyro_flows.supports import Supported


class LogDensity(eqx.Module):
    """``log p(data, latents)`` of a model on the unconstrained space, with the Jacobians of the supports.

    Works on one draw; map it over a batch with ``jax.vmap``, which is correct for every model that runs under it. The
    support of a site may depend on other sites.

    :param model: NumPyro model with continuous latents.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param shapes: of the sites' unconstrained values, in the order of the vector.
    :param held: whether the arguments are a part of the programs that the density is compiled into (see ``Programs``),
        as a model needs that looks at their values; else their arrays are inputs, and one program serves all data sets
        of a shape (:meth:`takes_inputs`).
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    _model: Held = eqx.field(static=True)
    _call: Any  # arguments, held or as they are

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict,
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        *,
        held: bool = True,
    ):
        self.shapes, self._model = tuple(shapes), Held(model)
        self._call = Held((args, kwargs)) if held else (args, kwargs)

    @property
    def model(self) -> Callable:
        return self._model.value

    @property
    def args(self) -> tuple:
        return (self._call.value if isinstance(self._call, Held) else self._call)[0]

    @property
    def kwargs(self) -> dict:
        return (self._call.value if isinstance(self._call, Held) else self._call)[1]

    @property
    def site_names(self) -> list[str]:
        return [name for name, _ in self.shapes]

    @property
    def dim(self) -> int:
        """Size of the unconstrained vector."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def unpack(self, u: Array) -> dict[str, Array]:
        """The sites' unconstrained values in one vector ``(dim,)``."""
        ends = np.cumsum([math.prod(shape) for _, shape in self.shapes])
        return {n: part.reshape(shape) for part, (n, shape) in zip(jnp.split(u, ends[:-1]), self.shapes, strict=True)}

    def takes_inputs(self) -> bool:
        """Whether the model runs, and its arguments can be told apart, where their arrays are not known."""
        inputs, rest = eqx.partition((self.args, self.kwargs), is_array)

        def evaluate(inputs: Any, u: Array) -> Array:
            args, kwargs = eqx.combine(inputs, rest)
            return LogDensity(self.model, args, kwargs, self.shapes)(u)

        try:
            hash(tuple(jax.tree.leaves(rest)))
            with handlers.block():  # it may be a guide's first call, within handlers of its own
                jax.eval_shape(evaluate, inputs, jax.ShapeDtypeStruct((self.dim,), jnp.result_type(float)))
        except Exception:  # whatever a model does that needs the numbers
            return False
        return True

    def __call__(self, u: Array) -> Array:
        """Log-density of one unconstrained vector ``(dim,)``, the same whether compiled or not: not finite where
        NumPyro's validation, which sees numbers alone, would end the run; minus infinity where it overflows."""
        with numpyro.validation_enabled(False):
            return _no_overflow(-potential_energy(self._seeded(), self.args, self.kwargs, self.unpack(u)))

    def constrain(self, u: Array) -> dict[str, Array]:
        """Latent and deterministic sites at one unconstrained vector ``(dim,)``."""
        return constrain_fn(self._seeded(), self.args, self.kwargs, self.unpack(u), return_deterministic=True)

    def unconstrain(self, samples: dict[str, Array]) -> tuple[Array, Array]:
        """The unconstrained vector ``(dim,)`` of one draw of all latents, and ``log |det d samples / d u|``."""
        missing = [name for name in self.site_names if name not in samples]
        if missing:
            raise ValueError(f"samples: site(s) {missing} are missing; a draw of every latent site is needed.")
        data = {name: samples[name] for name in self.site_names}
        trace = handlers.trace(handlers.substitute(self._seeded(), data=data)).get_trace(*self.args, **self.kwargs)
        parts, total = [], jnp.zeros(())
        for name in self.site_names:
            fn, value = trace[name]["fn"], trace[name]["value"]
            bijection = biject_to(fn.support)
            u = bijection.inv(value)
            log_det = bijection.log_abs_det_jacobian(u, value)
            total = total + sum_rightmost(log_det, jnp.ndim(log_det))
            parts.append(jnp.ravel(u))
        return jnp.concatenate(parts), total

    def site_log_probs(self, u: Array) -> dict[str, Array]:
        """Log-density of each site at one unconstrained vector: observed and latent ones, and factors."""
        values = constrain_fn(self._seeded(), self.args, self.kwargs, self.unpack(u))
        return compute_log_probs(self._seeded(), self.args, self.kwargs, values)[0]

    def log_likelihood(self, u: Array) -> dict[str, Array]:
        """Log-density of each observation of each observed site at one unconstrained vector; factors are left out."""
        values = constrain_fn(self._seeded(), self.args, self.kwargs, self.unpack(u))
        trace = handlers.trace(handlers.substitute(self._seeded(), data=values)).get_trace(*self.args, **self.kwargs)
        return {name: site["fn"].log_prob(site["value"]) for name, site in trace.items() if _is_data(site)}

    def observed(self) -> dict[str, np.ndarray]:
        """The observed sites' data."""
        trace = prototype_trace(self._seeded(), self.args, self.kwargs)
        return {name: np.asarray(site["value"]) for name, site in trace.items() if _is_data(site)}

    def _seeded(self) -> Callable:
        # a fixed key: only sites that are not latent (such as subsample indices) can draw from it
        return handlers.seed(_Proper(Supported(self.model)), rng_seed=0)


def _no_overflow(value: Array) -> Array:
    """Minus infinity for plus infinity, as the log-density of an inverse gamma is where its values underflow."""
    return jnp.where(value == jnp.inf, -jnp.inf, value)


class _Proper(Messenger):
    """Mends what NumPyro leaves open in a density.

    What is missing of a site with ``obs_mask=`` gets its prior everywhere: NumPyro masks it where the site is observed,
    as what is never read, so that the density there is improper. And data outside of a support that depends on latents
    (``Uniform(0, top)``) have no density there, where NumPyro computes one.
    """

    def __enter__(self) -> _Proper:
        self.partly_observed: set[str] = set()
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if not msg["is_observed"]:
            if name.removesuffix(_UNOBSERVED) in self.partly_observed:
                msg["fn"] = _unmasked(msg["fn"])
            return
        if name.endswith(_OBSERVED):
            self.partly_observed.add(name.removesuffix(_OBSERVED))
        support: Any = msg["fn"].support
        if not isinstance(msg["fn"], dist.Unit) and any(isinstance(x, Array) for x in jax.tree.leaves(support)):
            numpyro.factor(f"support of {name}", jnp.where(support(jnp.asarray(msg["value"])), 0.0, -jnp.inf))


_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"  # ends of the names of such a site's two parts


def _unmasked(fn: dist.Distribution) -> dist.Distribution:
    if isinstance(fn, dist.MaskedDistribution):
        return fn.base_dist.expand(fn.batch_shape)
    if isinstance(fn, dist.ExpandedDistribution):
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    return fn


def _is_data(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit)


def prototype_trace(model: Callable, args: tuple, kwargs: dict, init_loc_fn: Callable = init_to_uniform) -> dict:
    """One trace of a seeded model, with latents at the values of ``init_loc_fn``."""
    with handlers.block(), numpyro.validation_enabled(False):  # what is out of its support shows in the density
        model = handlers.substitute(Supported(model), substitute_fn=init_loc_fn)
        return handlers.trace(model).get_trace(*args, **kwargs)


def check_finite(trace: dict[str, Any], owner: str) -> None:
    """Raises a ``ValueError`` that names the sites of a start whose log-density is not finite."""
    log_probs = {
        name: float(jnp.sum(site["fn"].log_prob(site["value"])))
        for name, site in trace.items()
        if site["type"] == "sample"
    }
    sites = {name: value for name, value in log_probs.items() if not np.isfinite(value)}
    if sites:
        raise ValueError(
            f"{owner}: the model's log-density is not finite at the start: site(s) {sites}. Check the data and the "
            "priors of what these sites depend on, or give init_loc_fn= a valid start."
        )


def latent_sites(trace: dict[str, Any]) -> dict[str, Any]:
    """The latent sites of a traced model."""
    return {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary", False)
    }


def check_plates(trace: dict[str, Any], owner: str) -> None:
    """Raises a ``ValueError`` where the density of the traced model is that of a subsample."""
    sizes = {name: site["args"] for name, site in trace.items() if site["type"] == "plate"}
    plates = {name: f"{part} of {size}" for name, (size, part) in sizes.items() if part not in (None, size)}
    if plates:
        raise ValueError(
            f"{owner}: plate(s) {plates} are subsampled, but a posterior is that of all data. Leave subsample_size "
            "out, or train AutoFlow (AutoHierarchicalFlow, for latents in plates) by SVI."
        )


def check_latents(trace: dict[str, Any], owner: str) -> None:
    """Raises a ``ValueError`` where a flow over all latents jointly cannot serve the traced model."""
    latent = latent_sites(trace)
    if not latent:
        raise ValueError(f"{owner}: the model has no latent sites: there is nothing to infer.")
    discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"{owner}: site(s) {discrete} are discrete, but a flow is a density of continuous variables. Sum them out "
            "of the model (as a mixture, or by numpyro.contrib.funsor's enumeration), or relax them."
        )
    sizes = {name: site["args"] for name, site in trace.items() if site["type"] == "plate"}
    for name, site in latent.items():
        for frame in site["cond_indep_stack"]:
            full = sizes[frame.name][0] if frame.name in sizes else frame.size
            if frame.size != full:
                raise ValueError(
                    f"{owner}: latent site {name!r} lies in plate {frame.name!r}, which is subsampled "
                    f"({frame.size} of {full}). A flow over all latents jointly needs them all: use the full plate, or "
                    "AutoHierarchicalFlow, which has a conditional flow for local latents."
                )
