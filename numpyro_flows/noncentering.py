"""Non-centering read off the model: latents relative to what their prior says, given the latents before them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.infer.util import _unconstrain_reparam as _constrained
from numpyro.infer.util import log_density as log_joint
from numpyro.primitives import Messenger

from numpyro_flows.log_density import LogDensity, _no_overflow
from numpyro_flows.programs import Programs
from numpyro_flows.supports import WRAPPERS
from numpyro_flows.transform_module import Compose, TransformModule

_ROWS = 256  # of a Hessian at once: as many as a fit has draws in a step
# of location-scale form; the log-normal's unconstrained value, its logarithm, is of that form
LOCATION_SCALE = (dist.Normal, dist.StudentT, dist.Cauchy, dist.Laplace, dist.Logistic, dist.Gumbel, dist.LogNormal)

JOINT = (dist.MultivariateNormal, dist.MultivariateStudentT)
# at its kink, of the quantile function of a Laplace of scale 1 at a normal's cdf
_SLOPE = math.sqrt(2 / math.pi)


def prior_of(fn: Any, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    """Location ``shape`` and scale of a latent, if its prior has them.

    The scale of a multivariate normal or Student-t is its Cholesky factor ``(*shape, shape[-1])``, that of a random
    walk the one of its steps ``(*shape[:-1], 1)``.
    """
    fn = unwrapped(fn)
    if isinstance(fn, LOCATION_SCALE):
        return jnp.broadcast_to(_floating(fn.loc), shape), jnp.broadcast_to(_floating(fn.scale), shape)
    if isinstance(fn, dist.GaussianRandomWalk):
        return jnp.zeros(shape), jnp.broadcast_to(_floating(fn.scale), shape[:-1])[..., None]
    if isinstance(fn, JOINT):
        factor = jnp.broadcast_to(_floating(fn.scale_tril), (*shape, shape[-1]))
        return jnp.broadcast_to(_floating(fn.loc), shape), factor
    return None


def _floating(x: Any) -> Array:
    """``Normal(mu, 1)`` keeps an integer."""
    return jnp.asarray(x, jnp.result_type(x, float))


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

    and so do all elements of one with a multivariate normal prior (a Gaussian process) together: with ``L`` the prior's
    Cholesky factor and ``R R^T = I + L^T precision L``, the scale is the matrix ``L R^{-T}``, at ``O(n^3)`` a draw for
    ``n`` elements (of a ``GaussianRandomWalk`` at ``O(n)``). With precision 0 it is non-centred (Papaspiliopoulos et
    al. 2007), with a large one centred, and exact where the likelihood is normal in ``u``: the funnel between scales
    and effects is gone for every value of the scale. Partially non-centred in between, as in Gorinova et al. 2020, and
    by the prior as in Ambrogioni et al. 2021, but adapted to the scale.

    The density of a latent with a Laplace prior, also of fixed location and scale, has a kink at ``loc``, which no flow
    can follow once a guide turns its coordinates. Such an element is mapped likewise, but with a bend at ``loc`` that
    cancels the kink (a map of this package's own, see ``_unkinked``).

    All other elements pass. Both directions run the model once a draw; ``precision`` and ``pseudo_data`` are not
    trained.

    Shapes: ``x`` and ``u`` ``(..., dim)``, log-determinants ``(...)``.

    :param log_density: the model, with its arguments, and the layout of its latent vector.
    :param trace: a trace of the model.
    :param points: unconstrained vectors ``(n, dim)`` at which it is seen which priors depend on other latents.
    :param programs: where what that takes is compiled.
    """

    precision: Array  # (dim,), 0 where an element passes
    pseudo_data: Array  # (dim,)
    prior: _Prior = eqx.field(static=True)

    def __init__(self, log_density: LogDensity, trace: Any, points: Array, programs: Programs | None = None):
        seen = (programs or Programs())(priors_at, log_density, points)  # one program for dozens
        changes = {name: any(np.ptp(np.asarray(a), 0).any() for a in pair) for name, pair in seen.items()}
        kinked = tuple(name for name in changes if isinstance(unwrapped(trace[name]["fn"]), dist.Laplace))
        sites = (name for name, _ in log_density.shapes if changes.get(name) or name in kinked)
        self.prior = _Prior(log_density, tuple(sites), kinked)
        self.precision = self.pseudo_data = jnp.zeros_like(points[0])

    @property
    def sites(self) -> tuple[str, ...]:
        """Latents that do not pass: those with a Laplace prior, or one that depends on other latents."""
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

    def with_density(self, log_density: LogDensity | None) -> Noncentering:
        """This layer with other arguments of its model, or ``None`` of them: to be given again before it is used."""
        new = copy.copy(self)
        object.__setattr__(new, "prior", self.prior.with_density(log_density))
        return new

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._map(x, False)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._map(y, True)

    def factor(self, x: Array) -> Array:
        """The matrix ``(dim, dim)`` by which the conditional priors at ``x`` ``(dim,)`` scale standard normals there.

        Diagonal, but for multivariate normals; that of the identity for elements that pass.
        """
        sweep = self.prior._sweep(x, self.prior.move(self.precision, self.pseudo_data, False))
        blocks = []
        for name, shape in self.prior.shapes.items():
            scale = sweep.seen[name][1] if name in self.sites else jnp.ones(shape, x.dtype)
            if name in self.prior.kinked:  # the map's own slope, as its scale is not the same for all values
                scale = jnp.exp(sweep.log_scales[name])
            if _is_walk(scale, shape):
                scale = scale[..., None] * jnp.tri(shape[-1], dtype=x.dtype)
            joint = scale.ndim > len(shape)
            blocks += [*scale.reshape(-1, *scale.shape[-2:])] if joint else [jnp.diag(scale.reshape(-1))]
        return jax.scipy.linalg.block_diag(*blocks)

    def forward_and_log_density(self, x: Array) -> tuple[Array, Array, Array]:
        """Where ``x`` goes, log-determinants, and the model's log-densities there, by one run of the model a draw."""
        fixed = lax.stop_gradient((self.precision, self.pseudo_data))
        u, log_scales, value = jax.vmap(lambda row: self.prior.run_to_the_end(row, *fixed))(x.reshape(-1, x.shape[-1]))
        batch = x.shape[:-1]
        return u.reshape(x.shape), log_scales.sum(-1).reshape(batch), value.reshape(batch)

    def _map(self, x: Array, inverse: bool) -> tuple[Array, Array]:
        fixed = lax.stop_gradient((self.precision, self.pseudo_data))
        y, log_scales = jax.vmap(lambda row: self.prior.run(row, *fixed, inverse))(x.reshape(-1, x.shape[-1]))
        log_det = log_scales.sum(-1).reshape(x.shape[:-1])
        return y.reshape(x.shape), -log_det if inverse else log_det


class _Prior:
    """The model as a sequence of conditional priors. Equal to others of the same model with the same arguments.

    :param log_density: the model, its arguments, and the layout of its latent vector.
    :param sites: latents that do not pass.
    :param kinked: those of them with a Laplace prior.
    """

    def __init__(self, log_density: LogDensity, sites: tuple[str, ...] = (), kinked: tuple[str, ...] = ()):
        self.shapes, self.sites, self.kinked = dict(log_density.shapes), sites, kinked
        self._held = log_density._model
        self.log_density: LogDensity | None = log_density

    def with_density(self, log_density: LogDensity | None) -> _Prior:
        new = copy.copy(self)
        new.log_density = log_density
        return new

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Prior) and self._key() == other._key() and self.log_density is other.log_density

    def __hash__(self) -> int:
        return hash((self._key(), id(self.log_density)))

    def _key(self) -> tuple:
        return self._held, tuple(self.shapes.items()), self.sites, self.kinked

    def run(self, x: Array, precision: Array, pseudo_data: Array, inverse: bool) -> tuple[Array, Array]:
        """The other side of ``x`` ``(dim,)`` and the logarithms ``(dim,)`` of the scales ``s``."""
        return self._vectors(self._sweep(x, self.move(precision, pseudo_data, inverse)))

    def run_to_the_end(self, x: Array, precision: Array, pseudo_data: Array) -> tuple[Array, Array, Array]:
        """``u`` of ``x`` ``(dim,)``, the logarithms ``(dim,)`` of the scales ``s``, and the model's log-density."""
        density = self.log_density
        assert density is not None
        sweep = self._messenger(x, self.move(precision, pseudo_data, False), to_the_end=True)
        with numpyro.validation_enabled(False), handlers.block():
            value, _ = log_joint(sweep, density.args, density.kwargs, {})
        return *self._vectors(sweep), _no_overflow(value)

    def _vectors(self, sweep: _Sweep) -> tuple[Array, Array]:
        by_site = sweep.results, sweep.log_scales
        results, log_scales = (jnp.concatenate([jnp.ravel(of[name]) for name in self.shapes]) for of in by_site)
        return results, log_scales

    def move(self, precision: Array, pseudo_data: Array, inverse: bool) -> Callable:
        """What a sweep does with a latent of ``sites``."""
        assert self.log_density is not None
        precisions, data = self.log_density.unpack(precision), self.log_density.unpack(pseudo_data)

        def move(name: str, loc: Array, scale: Array, value: Array, at: Any = ...) -> tuple[Array, Array, Array]:
            by = _unkinked if name in self.kinked else _conditioned
            moved, log_scale = by(loc, scale, precisions[name][at], data[name][at], value, inverse)
            return (value if inverse else moved), moved, log_scale

        return move

    def _sweep(self, x: Array, move: Callable) -> _Sweep:
        density, sweep = self.log_density, self._messenger(x, move)
        assert density is not None
        with contextlib.suppress(_Done), handlers.block():
            sweep(*density.args, **density.kwargs)
        return sweep

    def _messenger(self, x: Array, move: Callable, to_the_end: bool = False) -> _Sweep:
        density = self.log_density
        assert density is not None
        return _Sweep(density._seeded(), density.unpack(x), self.sites, move, to_the_end)


def priors_at(log_density: LogDensity, points: Array) -> dict[str, tuple[Array, Array]]:
    """Location and scale of every latent with a prior of that form, at every point."""
    return jax.vmap(lambda point: _Prior(log_density)._sweep(point, _stay).seen)(points)


def _stay(name: str, loc: Array, scale: Array, value: Array, at: Any = ...) -> tuple[Array, Array, Array]:
    return value, value, jnp.zeros_like(value)


def _conditioned(
    loc: Array, scale: Array, precision: Array, data: Array, value: Array, inverse: bool
) -> tuple[Array, Array]:
    """``u`` of ``x``, or the other way round, and the logarithms of the scales."""
    if _is_walk(scale, loc.shape):
        return _walked(scale[..., 0] ** 2, precision, data, value, inverse)
    if scale.ndim == loc.ndim:
        s = lax.rsqrt(scale**-2 + precision)
        centre = loc + precision * s**2 * (data - loc)
        return ((value - centre) / s if inverse else centre + s * value), jnp.log(s)
    transposed = jnp.swapaxes(scale, -1, -2)
    root = jnp.linalg.cholesky(
        jnp.eye(scale.shape[-1], dtype=scale.dtype) + (transposed * precision[..., None, :]) @ scale
    )
    told = transposed @ (precision * (data - loc))[..., None]
    shift = solve_triangular(root, told, lower=True)
    log_scale = jnp.log(jnp.diagonal(scale, axis1=-2, axis2=-1)) - jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1))
    if inverse:
        standard = solve_triangular(scale, (value - loc)[..., None], lower=True)
        return (jnp.swapaxes(root, -1, -2) @ standard - shift).squeeze(-1), log_scale
    standard = solve_triangular(root, value[..., None] + shift, lower=True, trans="T")
    return loc + (scale @ standard).squeeze(-1), log_scale


def _unkinked(
    loc: Array, scale: Array, precision: Array, data: Array, value: Array, inverse: bool
) -> tuple[Array, Array]:
    """The same for a Laplace prior: a map whose derivative jumps at ``loc`` as the prior's log-density does there, with
    the other sign, so that the density of ``x`` is smooth.

    With precision 0 it is close to the quantile function of the prior at a normal's cdf (the same slope at ``loc``,
    quadratic tails), with a large one affine. In closed form both ways; derivatives are right at the kink itself.
    """
    s = lax.rsqrt((_SLOPE * scale) ** -2 + precision)
    bend, end = s / scale, precision * s**2

    def unbent(y: Array) -> Array:
        root = jnp.sqrt(1 + 2 * bend * jnp.abs(y) + (end * y) ** 2)
        return y * (1 + root) / (1 + bend * jnp.abs(y) + root)

    centre = unbent(precision * s * (data - loc))
    t = unbent((value - loc) / s) if inverse else value + centre
    root = jnp.sqrt(1 + (end * t) ** 2)
    log_scale = jnp.log(s) + jnp.log1p(bend * jnp.abs(t) / root)
    return (t - centre if inverse else loc + s * (t + bend * t * jnp.abs(t) / (1 + root))), log_scale


def _is_walk(scale: Array, shape: tuple[int, ...]) -> bool:
    return scale.ndim == len(shape) and scale.shape != shape


def _walked(variance: Array, precision: Array, data: Array, value: Array, inverse: bool) -> tuple[Array, Array]:
    """The same for a random walk, step by step, each given the one before and all pseudo-observations to come.

    What these say of a step, a precision and it times a value, comes backwards from the end (Kalman filtering), so that
    a walk of ``n`` steps takes ``O(n)``.
    """

    def look_ahead(later: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple, tuple]:
        share = 1 / (1 + variance * later[0])
        told = at[0] + share * later[0], at[0] * at[1] + share * later[1]
        return told, told

    def step(before: Array, given: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        shrinkage, shift, s, x = given
        u = shrinkage * before + shift + s * x
        return u, u

    precision, data, value = (jnp.moveaxis(a, -1, 0) for a in (precision, data, value))
    nothing = jnp.zeros_like(value[0])
    _, (told, weighted) = lax.scan(look_ahead, (nothing, nothing), (precision, data), reverse=True)
    shrinkage = 1 / (1 + variance * told)
    shift, s = variance * shrinkage * weighted, jnp.sqrt(variance * shrinkage)
    if inverse:
        before = jnp.concatenate([nothing[None], value[:-1]])
        moved = (value - shrinkage * before - shift) / s
    else:
        moved = lax.scan(step, nothing, (shrinkage, shift, s, value))[1]
    return jnp.moveaxis(moved, 0, -1), jnp.moveaxis(jnp.log(s), 0, -1)


class _Done(Exception):
    """Every latent is set: what the model does from here on, its likelihood, is not needed."""


class _Sweep(Messenger):
    """Sets the latents in the model's order, each by ``move`` from its location, scale and given value.

    Those of NumPyro's ``scan`` are set within it, step by step. (Those of a reversed one pass.) The supports' Jacobians
    become factors of the model, as NumPyro's own.

    :param to_the_end: whether the model's likelihood is run too.
    """

    def __init__(
        self, fn: Callable, values: dict[str, Array], sites: tuple[str, ...], move: Callable, to_the_end: bool = False
    ):
        super().__init__(fn)
        self.values, self.sites, self.move, self.to_the_end = values, sites, move, to_the_end
        self.seen: dict[str, tuple[Array, Array]] = {}  # location and scale of every site of that form
        self.results: dict[str, Array] = {}
        self.log_scales: dict[str, Array] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if _is_scan(msg):
            within = partial(_constrained, self.values) if _is_reversed(msg) else self._within_scan
            msg["kwargs"]["substitute_stack"].append(("substitute", within))
        elif self._is_latent(msg) and msg["name"] not in self.results:
            name, done = msg["name"], msg.get("_control_flow_done", False)
            u = self._set(name, prior_of(msg["fn"], self.values[name].shape) if msg["value"] is None else None)
            if not done:
                msg["value"] = _constrained({name: u}, msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if _is_scan(msg) and not _is_reversed(msg):
            trace = msg["value"][1][0].trace
            for name in [name for name, site in trace.items() if self._is_latent(site)]:
                loc, scale = (trace.pop(part, None) for part in _parts(name))
                self._set(name, None if loc is None else (loc["value"], scale["value"]))

    def _is_latent(self, msg: dict[str, Any]) -> bool:
        return msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.values

    def _set(self, name: str, prior: tuple[Array, Array] | None) -> Array:
        """Notes what becomes of a latent; returns its unconstrained value."""
        u = self.values[name]
        self.results[name], self.log_scales[name] = u, jnp.zeros_like(u)
        if prior is not None:
            self.seen[name] = prior
            if name in self.sites:
                u, self.results[name], self.log_scales[name] = self.move(name, *prior, u)
        if len(self.results) == len(self.values) and not self.to_the_end:
            raise _Done
        return u

    def _within_scan(self, site: dict[str, Any]) -> Array | None:
        """The value of a latent at a step of a scan, whose location and scale leave it as sites beside."""
        if not self._is_latent(site):
            return None
        name, step = site["name"], site["infer"]["_scan_current_index"]
        u = self.values[name][step]
        prior = prior_of(site["fn"], u.shape)
        if prior is not None:
            for part, value in zip(_parts(name), prior, strict=True):
                numpyro.deterministic(part, value)
            if name in self.sites:
                u = self.move(name, *prior, u, step)[0]
        return _constrained({name: u}, site)


def _is_scan(msg: dict[str, Any]) -> bool:
    return msg["type"] == "control_flow" and msg["fn"] is scan_wrapper


def _is_reversed(msg: dict[str, Any]) -> bool:
    return msg["args"][-1]


def _parts(name: str) -> tuple[str, str]:
    return f"{name}'s location", f"{name}'s scale"


def noncentering_of(log_density: LogDensity, trace: Any, prototype: Array, programs: Programs) -> Noncentering | None:
    """The layer for a model, not centred at all; ``None`` if all latents pass.

    :param trace: a trace of the model.
    :param prototype: an unconstrained vector ``(dim,)`` where the model's density is finite.
    :param programs: where what it takes to see that is compiled.
    """
    layer = Noncentering(log_density, trace, points_around(prototype), programs)
    return layer if layer.sites else None


def points_around(prototype: Array) -> Array:
    """Three unconstrained vectors ``(3, dim)`` at which it is seen which priors depend on other latents."""
    noise = np.random.default_rng(0).standard_normal((2, len(prototype)))
    return jnp.concatenate([prototype[None], prototype + 0.1 * jnp.asarray(noise, prototype.dtype)])


def with_density(transform: TransformModule, log_density: LogDensity | None) -> TransformModule:
    """A guide's transform, or its last layers, with other arguments of the model in its non-centring.

    Without any (``None``), those of all data sets are alike, so that one program serves them.
    """
    if isinstance(transform, Noncentering):
        return transform.with_density(log_density)
    if isinstance(transform, Compose) and transform.layers and isinstance(transform.layers[-1], Noncentering):
        return Compose([*transform.layers[:-1], transform.layers[-1].with_density(log_density)])
    return transform


def forward_and_log_density(
    transform: TransformModule, log_density: LogDensity, x: Array
) -> tuple[Array, Array, Array]:
    """Where vectors ``(n, dim)`` go by a guide's transform, the log-determinants, and the model's log-densities there.

    The model runs once for both its non-centring and its density.
    """
    transform = with_density(transform, log_density)
    if not (isinstance(transform, Compose) and transform.layers and isinstance(transform.layers[-1], Noncentering)):
        u, log_det = transform.forward_and_log_det(x)
        return u, log_det, jax.vmap(log_density)(u)
    *others, last = transform.layers
    u, log_det = Compose(others).forward_and_log_det(x)
    u, last_log_det, value = last.forward_and_log_density(u)
    return u, log_det + last_log_det, value


def pulled_back(log_density: LogDensity, coordinates: TransformModule) -> Callable[[Array], Array]:
    """The log-density of one vector ``(dim,)`` before a guide's coordinates, their log-determinant included."""

    def density(x: Array) -> Array:
        _, log_det, value = forward_and_log_density(coordinates, log_density, x[None])
        return (value + log_det)[0]

    return density


# -- what is compiled, of layers without the model's arguments ---------------------------------------------------------
def forward(coordinates: TransformModule, log_density: LogDensity, x: Array) -> tuple[Array, Array]:
    """Latent vectors from those before the coordinates, with the log-determinants."""
    return with_density(coordinates, log_density).forward_and_log_det(x)


def inverse(coordinates: TransformModule, log_density: LogDensity, u: Array) -> tuple[Array, Array]:
    """The other way round."""
    return with_density(coordinates, log_density).inverse_and_log_det(u)


def log_densities(log_density: LogDensity, coordinates: TransformModule, x: Array) -> Array:
    """Log-densities of vectors ``(n, dim)`` before the coordinates."""
    return jax.vmap(pulled_back(log_density, coordinates))(x)


def value_and_grad(log_density: LogDensity, coordinates: TransformModule, x: Array) -> tuple[Array, Array]:
    """Log-density of one vector ``(dim,)`` before the coordinates, and its gradient."""
    return jax.value_and_grad(pulled_back(log_density, coordinates))(x)


def hessian(log_density: LogDensity, coordinates: TransformModule, x: Array) -> Array:
    """Hessian ``(dim, dim)`` of that log-density."""
    density = pulled_back(log_density, coordinates)
    if len(x) <= _ROWS:
        return jax.hessian(density)(x)

    def row(axis: Array) -> Array:
        return jax.jvp(jax.grad(density), (x,), (axis,))[1]

    return lax.map(row, jnp.eye(len(x), dtype=x.dtype), batch_size=_ROWS)
