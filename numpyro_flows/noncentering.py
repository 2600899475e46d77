"""Non-centering read off the model: latents relative to what their prior says, given the latents before them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from numpyro_flows.log_density import LogDensity
from numpyro_flows.transform_module import TransformModule

WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
# of location-scale form; the log-normal's unconstrained value, its logarithm, is of that form
LOCATION_SCALE = (dist.Normal, dist.StudentT, dist.Cauchy, dist.Laplace, dist.Logistic, dist.Gumbel, dist.LogNormal)


def unwrapped(fn: Any) -> Any:
    """A distribution without masks, expansions and reinterpreted dimensions."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


class Noncentering(TransformModule):
    """Takes a model's conditional priors out of a guide's way; the last layer of a guide.

    An element ``u`` of a latent with a prior of location-scale form, whose location or scale depend on other latents,
    becomes that of its conditional posterior under a pseudo-observation ``pseudo_data`` of precision ``precision``::

        s = (1 / scale^2 + precision)^(-1/2),    u = loc + precision s^2 (pseudo_data - loc) + s x

    With precision 0 it is non-centred (Papaspiliopoulos et al. 2007), with a large one centred, and exact where the
    likelihood is normal in ``u``: the funnel between scales and effects is gone for every value of the scale. Partially
    non-centred in between, as in Gorinova et al. 2020, and by the prior as in Ambrogioni et al. 2021, but adapted to
    the scale. All other elements pass. Both directions run the model once a draw; ``precision`` and ``pseudo_data``
    are not trained.

    Shapes: ``x`` and ``u`` ``(..., dim)``, log-determinants ``(...)``.

    :param log_density: the model, with its arguments, and the layout of its latent vector.
    :param points: unconstrained vectors ``(n, dim)`` at which it is seen which priors depend on other latents.
    """

    precision: Array  # (dim,), 0 where an element passes
    pseudo_data: Array  # (dim,)
    prior: _Prior = eqx.field(static=True)

    def __init__(self, log_density: LogDensity, points: Array):
        self.prior = _Prior(log_density, points)
        self.precision = self.pseudo_data = jnp.zeros_like(points[0])

    @property
    def sites(self) -> tuple[str, ...]:
        """Latents whose prior depends on other latents."""
        return self.prior.sites

    @property
    def elements(self) -> np.ndarray:
        """Which elements ``(dim,)`` do not pass."""
        parts = [np.full(np.prod(shape, dtype=int), name in self.sites) for name, shape in self.prior.shapes.items()]
        return np.concatenate(parts)

    def with_pseudo_observations(self, precision: Any, pseudo_data: Any) -> Noncentering:
        """This layer with other pseudo-observations, both ``(dim,)``."""
        dtype = self.precision.dtype
        new = jnp.asarray(precision, dtype), jnp.asarray(pseudo_data, dtype)
        return eqx.tree_at(lambda layer: (layer.precision, layer.pseudo_data), self, new)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._map(x, False)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._map(y, True)

    def scales(self, x: Array) -> Array:
        """``s`` of every element ``(dim,)`` at ``x`` ``(dim,)``; 1 where an element passes."""
        return jnp.exp(self.prior.run(x, self.precision, self.pseudo_data, False)[1])

    def _map(self, x: Array, inverse: bool) -> tuple[Array, Array]:
        fixed = lax.stop_gradient((self.precision, self.pseudo_data))
        y, log_scales = jax.vmap(lambda row: self.prior.run(row, *fixed, inverse))(x.reshape(-1, x.shape[-1]))
        log_det = log_scales.sum(-1).reshape(x.shape[:-1])
        return y.reshape(x.shape), -log_det if inverse else log_det


class _Prior:
    """The model as a sequence of conditional priors. Compared by identity, being a static part of a pytree."""

    def __init__(self, log_density: LogDensity, points: Array):
        self.model, self.args, self.kwargs = log_density.model, log_density.args, log_density.kwargs
        self.shapes = {name: jnp.shape(value) for name, value in log_density.unpack(points[0]).items()}
        self.sites: tuple[str, ...] = ()
        order: list[str] = []

        def seen(point: Array) -> dict[str, tuple[Array, Array]]:
            found = self._sweep(point, _stay).seen
            order[:] = found
            return found

        values = jax.jit(jax.vmap(seen))(points)  # one program for dozens
        self.sites = tuple(name for name in order if any(np.ptp(np.asarray(a), 0).any() for a in values[name]))

    def run(self, x: Array, precision: Array, pseudo_data: Array, inverse: bool) -> tuple[Array, Array]:
        """The other side of ``x`` ``(dim,)`` and the logarithms ``(dim,)`` of the scales ``s``."""
        precisions, data = self._unpack(precision), self._unpack(pseudo_data)

        def move(name: str, loc: Array, scale: Array, value: Array) -> tuple[Array, Array, Array]:
            s = lax.rsqrt(scale**-2 + precisions[name])
            centre = loc + precisions[name] * s**2 * (data[name] - loc)
            if inverse:
                return value, (value - centre) / s, jnp.log(s)
            u = centre + s * value
            return u, u, jnp.log(s)

        sweep = self._sweep(x, move)
        parts = [jnp.ravel(sweep.results[name]) for name in self.shapes]
        return jnp.concatenate(parts), jnp.concatenate([jnp.ravel(sweep.log_scales[name]) for name in self.shapes])

    def _sweep(self, x: Array, move: Callable) -> _Sweep:
        sweep = _Sweep(handlers.seed(self.model, rng_seed=0), self._unpack(x), self.sites, move)
        with contextlib.suppress(_Done), handlers.block():
            sweep(*self.args, **self.kwargs)
        return sweep

    def _unpack(self, x: Array) -> dict[str, Array]:
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in self.shapes.values()])
        parts = jnp.split(x, ends[:-1])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


def _stay(name: str, loc: Array, scale: Array, value: Array) -> tuple[Array, Array, Array]:
    return value, value, jnp.zeros_like(value)


class _Done(Exception):
    """Every latent is set: what the model does from here on, its likelihood, is not needed."""


class _Sweep(Messenger):
    """Sets the latents in the model's order, each by ``move`` from its location, scale and given value.

    Those of NumPyro's ``scan`` pass: they come with values, from a run of their own.
    """

    def __init__(self, fn: Callable, values: dict[str, Array], sites: tuple[str, ...], move: Callable):
        super().__init__(fn)
        self.values, self.sites, self.move = values, sites, move
        self.seen: dict[str, tuple[Array, Array]] = {}  # location and scale of every site of that form
        self.results: dict[str, Array] = {}
        self.log_scales: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["name"] not in self.values:
            return
        name = msg["name"]
        u = self.values[name]
        self.results[name], self.log_scales[name] = u, jnp.zeros_like(u)
        fn = unwrapped(msg["fn"])
        if isinstance(fn, LOCATION_SCALE) and msg["value"] is None:
            loc, scale = jnp.broadcast_to(fn.loc, u.shape), jnp.broadcast_to(fn.scale, u.shape)
            self.seen[name] = loc, scale
            if name in self.sites:
                u, self.results[name], self.log_scales[name] = self.move(name, loc, scale, u)
        if len(self.results) == len(self.values):
            raise _Done
        msg["value"] = biject_to(msg["fn"].support)(u)


def noncentering_of(log_density: LogDensity, prototype: Array) -> Noncentering | None:
    """The layer for a model, not centred at all; ``None`` if no latent's prior depends on other latents.

    :param prototype: an unconstrained vector ``(dim,)`` where the model's density is finite.
    """
    noise = np.random.default_rng(0).standard_normal((2, len(prototype)))
    points = jnp.concatenate([prototype[None], prototype + 0.1 * jnp.asarray(noise, prototype.dtype)])
    layer = Noncentering(log_density, points)
    return layer if layer.sites else None


def pulled_back(log_density: LogDensity, noncentering: Noncentering | None) -> Callable[[Array], Array]:
    """The log-density of one vector ``(dim,)`` before the layer, its log-determinant included."""
    if noncentering is None:
        return log_density

    def density(x: Array) -> Array:
        u, log_det = noncentering.forward_and_log_det(x)
        return log_density(u) + log_det

    return density
