"""Neural transport: a trained guide or a flow straightens a model for HMC and NUTS (Hoffman et al. 2019)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.reparam import Reparam
from numpyro.primitives import _PYRO_STACK

from numpyro_flows.centering import COORDINATES
from numpyro_flows.distributions import standard_base
from numpyro_flows.guides import AutoFlow
from numpyro_flows.log_density import check_latents, prototype_trace
from numpyro_flows.supports import supported
from numpyro_flows.transform_module import Compose, TransformModule

_BATCH = 256  # draws per pass over the model: bounds the memory
_CONTEXTS = (numpyro.plate, handlers.scale, handlers.mask)  # what changes the density of the sites within
_RADII = (10.0, 1000.0)  # of the base, between which the growth of a flow's image is measured
_BOUNDED = 1e-5  # a slope between them, in standard deviations of the bulk
_LEAST_SLOPE, _REACH = 0.03, 4.0  # the same of an output that comes less far by the first of them
_NUM_RAYS = 64  # of each kind


class FlowReparam(Reparam):
    """Moves latents of a model into the base space of a flow, where HMC and NUTS have an easy target.

    ::

        neutra = FlowReparam(posterior)              # or FlowReparam(guide, params)
        mcmc = MCMC(NUTS(neutra.reparam(model)), ...)
        mcmc.run(rng_key, *args)
        mcmc.get_samples()                           # holds the model's own sites
        neutra.transform_sample(latent)              # the same from draws of the base space alone

    The reparametrised model draws a vector ``z`` at the site ``{first latent}_base`` and sets the latents to ``f(z)``.
    Its density is that of the model at ``f(z)`` times ``|det df/dz|`` (Hoffman et al. 2019, eq. 4), so that MCMC is
    exact whatever the fit of the flow is. Latents become deterministic sites.

    :param flow_source: a :class:`FlowPosterior`; a trained :class:`AutoFlow`; a :class:`TransformModule` over the
        unconstrained values of all latents, in the model's order; or a dict of such flows, each for a site or a tuple
        of sites, ``{"tau": flow, ("mu", "theta"): other}``, where latents that are not named stay as they are. A flow
        alone also serves as the reparametriser of one site in ``handlers.reparam(config={"tau": FlowReparam(flow)})``.
    :param params: the parameters of an ``AutoFlow``, as ``SVI`` returns them.
    :param check_tails: refuses flows with tails that do not reach (:func:`check_tails`).
    :raises ValueError: for a guide without its parameters; here or at the model's first run, for a flow of another
        size, with an estimated log-determinant or with tails that do not reach; at a run, for latents which the flow
        should move but which are unknown, observed, discrete or not come to.
    """

    def __init__(self, flow_source: Any, params: dict[str, Any] | None = None, *, check_tails: bool = True):
        self.check_tails = check_tails
        self._model: tuple[Callable, tuple, dict] | None = None
        self._others: tuple[str, ...] = ()  # latents which stay as they are
        if hasattr(flow_source, "guide"):  # a posterior
            density, params = flow_source.log_density, flow_source.params
            self._model, flow_source = (density.model, density.args, density.kwargs), flow_source.guide
        if isinstance(flow_source, AutoFlow):
            if params is None:
                raise ValueError("FlowReparam: params is missing: pass FlowReparam(guide, svi_result.params).")
            if flow_source.prototype_trace is None:
                raise ValueError("FlowReparam: the guide has not been called, so it is not trained: train it first.")
            like = flow_source.init_loc
            shapes = {name: jnp.shape(u) for name, u in flow_source._unpack_latent(like).items()}
            transform, base = flow_source.get_base_space(params)
            self._groups = [_Group(transform, tuple(shapes), base, flow_name(flow_source.flow))]
            self._groups[0].settle(shapes, like, check_tails)
            return
        if isinstance(flow_source, TransformModule):
            flow_source = {(): flow_source}
        elif not isinstance(flow_source, dict) or not all(isinstance(f, TransformModule) for f in flow_source.values()):
            raise TypeError(
                "FlowReparam: flow_source must be a FlowPosterior, an AutoFlow, a TransformModule or a dict of sites "
                f"to TransformModules, but got {type(flow_source).__name__}. A factory must be called with a dimension."
            )
        else:
            check_sites(list(flow_source))
        self._groups = [_Group(flow, names_of(sites)) for sites, flow in flow_source.items()]

    @property
    def base_names(self) -> tuple[str, ...]:
        """Sites of the base vectors in the reparametrised model: known once the latents are."""
        return tuple(group.base_name for group in self._groups if group.sites)

    def reparam(self, fn: Callable) -> Callable:
        """The model in the base space of the flow, with the arguments of ``fn``."""

        @functools.wraps(fn, updated=())
        def reparametrised(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
                self._model = fn, args, kwargs
            self._settle(fn, args, kwargs)
            for group in self._groups:
                group.pending.clear()
                group.drawn = False
            result = handlers.reparam(fn, config=self._config)(*args, **kwargs)
            if unmet := [name for group in self._groups for name in (group.pending if group.drawn else group.sites)]:
                raise ValueError(
                    f"FlowReparam: the flow moves site(s) {unmet}, but this run of the model did not come to them. "
                    "Name only those it does come to, {'tau': flow}."
                )
            return result

        return reparametrised

    def _config(self, site: dict[str, Any]) -> FlowReparam | None:
        return self if any(site["name"] in group.sites for group in self._groups) else None

    def _settle(self, fn: Callable, args: tuple, kwargs: dict) -> None:
        """Lays out the groups of latents which are not known yet."""
        if all(group.shapes for group in self._groups):
            return
        trace = prototype_trace(handlers.seed(fn, rng_seed=0), args, kwargs)
        latents = {n: site for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
        moved = [name for group in self._groups for name in group.sites or latents]
        if unknown := [name for name in moved if name not in latents]:
            raise ValueError(
                f"FlowReparam: flow_source names {unknown}, but the model's latent sites are {list(latents)}."
            )
        self._others = tuple(name for name in latents if name not in moved)
        check_latents({name: site for name, site in trace.items() if name not in self._others}, "FlowReparam")
        for group in self._groups:
            sites = {name: site for name, site in latents.items() if name in (group.sites or latents)}
            shapes = {n: biject_to(s["fn"].support).inverse_shape(jnp.shape(s["value"])) for n, s in sites.items()}
            like = jnp.zeros((), jnp.result_type(*(site["value"] for site in sites.values())))
            group.settle(shapes, like, self.check_tails)

    # -- the ecosystem's protocol ----------------------------------------------------------------------------------
    def __call__(self, name: str, fn: dist.Distribution, obs: Array | None) -> tuple[dist.Distribution | None, Any]:
        fn = supported(fn)
        if obs is not None:
            raise ValueError(
                f"FlowReparam: site {name!r} is observed, but the flow moves it. Condition the model before the guide "
                "is trained, or leave the site out of the flow's. Latents within NumPyro's scan cannot be moved."
            )
        if len(self._groups) == 1 and not self._groups[0].sites:  # as the reparametriser of this site alone
            shape = biject_to(fn.support).inverse_shape(fn.shape())
            self._groups[0].settle({name: shape}, jnp.zeros(()), self.check_tails)
        group = next((group for group in self._groups if name in group.sites and group.shapes), None)
        if group is None:
            raise ValueError(
                f"FlowReparam: site {name!r} came to the flow(s) of {[group.sites for group in self._groups]}. Give "
                "every site a FlowReparam of its own, or use neutra.reparam(model) for flows of several."
            )
        if name not in group.pending:  # the first of its group in this run
            self._draw(group)
        u = group.pending.pop(name)
        bijection = biject_to(fn.support)
        value = bijection(u)
        if numpyro.get_mask() is not False:
            log_det = bijection.log_abs_det_jacobian(u, value)
            log_det = sum_rightmost(log_det, jnp.ndim(log_det) - jnp.ndim(value) + len(fn.event_shape))
            numpyro.factor(f"_{name}_log_prob", fn.log_prob(value) + log_det)
        return None, value

    @staticmethod
    def _draw(group: _Group) -> None:
        """Draws the base vector and sets the latents of its group."""
        with _outside_the_model():
            z = numpyro.sample(group.base_name, group.base.mask(False))
            u, log_det = group.transform.forward_and_log_det(z)
            if numpyro.get_mask() is not False:
                numpyro.factor(f"_{group.base_name}_log_det", log_det)
        group.pending, group.drawn = group.unpack(u), True

    # -- draws -----------------------------------------------------------------------------------------------------
    def transform_sample(self, latent: Array | dict[str, Array], *, deterministic: bool = True) -> dict[str, Array]:
        """Draws of the model's latent sites from draws of the base space.

        :param latent: base vectors ``(*batch, dim)``, or a dict with those of every group and the other latents, as
            ``mcmc.get_samples()`` returns it.
        :param deterministic: whether to give the deterministic sites too, as NumPyro's ``MCMC`` does.
        :returns: dict of arrays ``(*batch, *site_shape)``, for the arguments with which the model last ran.
        :raises ValueError: if the model has not run, or sites are missing.
        """
        if self._model is None:
            raise ValueError("FlowReparam: transform_sample needs the model: run neutra.reparam(model) first.")
        fn, args, kwargs = self._model
        self._settle(fn, args, kwargs)
        samples = latent if isinstance(latent, dict) else {self.base_names[0]: latent}
        if missing := [name for name in (*self.base_names, *self._others) if name not in samples]:
            raise ValueError(
                f"FlowReparam: transform_sample needs draws of {missing}: pass the dict of mcmc.get_samples()."
            )
        model = handlers.seed(self.reparam(fn), rng_seed=0)
        wanted = {*self._others, *(name for group in self._groups for name in group.sites)}
        batch = jnp.shape(samples[self.base_names[0]])[:-1]
        flat = {
            name: jnp.reshape(samples[name], (-1, *jnp.shape(samples[name])[len(batch) :]))
            for name in (*self.base_names, *self._others)
        }

        def single(values: dict[str, Array]) -> dict[str, Array]:
            trace = handlers.trace(handlers.substitute(model, data=values)).get_trace(*args, **kwargs)
            return {
                n: site["value"]
                for n, site in trace.items()
                if n in wanted or deterministic and site["type"] == "deterministic"
            }

        sites = jax.jit(lambda values: lax.map(single, values, batch_size=_BATCH))(flat)
        return {name: x.reshape(*batch, *x.shape[1:]) for name, x in sites.items()}


class _Group:
    """A flow and the latents which it moves jointly: all latents, where there are no ``sites`` before it is settled."""

    def __init__(
        self,
        transform: TransformModule,
        sites: tuple[str, ...],
        base: dist.Distribution | None = None,
        name: str | None = None,
    ):
        self.transform, self.sites, self._base = transform, sites, base
        self.name = name or type(transform).__name__
        self.shapes: dict[str, tuple[int, ...]] = {}  # unconstrained, in the model's order
        self.pending: dict[str, Array] = {}  # unconstrained values that this run of the model has not used yet
        self.drawn = False  # in this run

    def settle(self, shapes: dict[str, tuple[int, ...]], like: Array, check: bool) -> None:
        """Takes latents of these unconstrained shapes, of the dtype of ``like``, if the flow fits them."""
        dim, error = sum(math.prod(shape) for shape in shapes.values()), None
        try:
            fits = jax.eval_shape(self.transform, jnp.zeros(dim, like.dtype)).shape == (dim,)
        except (TypeError, ValueError) as raised:
            fits, error = False, raised
        if not fits:
            raise ValueError(
                f"FlowReparam: the flow {self.name} does not take vectors of size {dim}, which is that of the "
                f"unconstrained site(s) {list(shapes)}. Build it with dim={dim}, and bind its context if it has one."
            ) from error
        if not self.transform.log_det_is_exact:
            raise ValueError(
                f"FlowReparam: the log-determinant of the flow {self.name} is an estimate, with which MCMC is not "
                "exact. Use its exact mode (flows.residual: log_det='exact'; flows.cnf: trace='exact')."
            )
        if check:
            check_tails(self.transform, dim, self.name, like)
        self.base = standard_base(dim, like=like) if self._base is None else self._base
        self.shapes, self.sites = shapes, tuple(shapes)

    @property
    def base_name(self) -> str:
        return f"{self.sites[0]}_base"

    def unpack(self, u: Array) -> dict[str, Array]:
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = jnp.split(u, ends[:-1])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


@contextmanager
def _outside_the_model() -> Iterator[None]:
    """Leaves the plates, scales and masks that were entered since the reparametrised model began."""
    stack = list(_PYRO_STACK)
    begin = next((n for n, handler in enumerate(stack) if isinstance(handler, handlers.reparam)), 0)
    _PYRO_STACK[begin:] = [handler for handler in stack[begin:] if not isinstance(handler, _CONTEXTS)]
    try:
        yield
    finally:
        _PYRO_STACK[:] = stack


def check_tails(transform: TransformModule, dim: int, name: str, like: Array) -> None:
    """Raises a ``ValueError`` where a flow's image is bounded or its slope dies in the tails.

    Such a flow truncates a posterior, and neither R-hat nor divergences tell. Looks along rays of the base, between 10
    and 1000: the image must grow along every ray, and every output must rise and fall along some of them, by four
    standard deviations of the bulk up to 10, or else with at least 3 % of the slope which it has there.

    :param transform: the flow; a guide's coordinates are left out, for they may be as steep as the model's scales.
    :param dim: size of its vectors.
    :param name: its name, for the message.
    :param like: an array of its dtype.
    """
    layers = transform.layers if isinstance(transform, Compose) else (transform,)
    transform = Compose([layer for layer in layers if not isinstance(layer, COORDINATES)])
    points = tail_points(dim)
    try:
        with jax.ensure_compile_time_eval():  # the model may run under jit
            y = np.asarray(jax.jit(transform)(jnp.asarray(points, like.dtype)), float)
    except RuntimeError:  # a root that was not found
        y = np.full_like(points, np.nan)
    if problem := tail_problem(y):
        raise ValueError(
            f"FlowReparam: the flow {name} {problem}: MCMC would miss the tails of the posterior without a sign. Use "
            "flows.realnvp, flows.nsf or flows.iaf, or check_tails=False if the tails do not matter."
        )


def tail_points(dim: int) -> np.ndarray:
    """Points of the bulk, then those on rays (axes, diagonals, others) at either of the radii."""
    rng = np.random.default_rng(0)
    axes = np.eye(dim)[rng.permutation(dim)[:_NUM_RAYS]]
    rays = np.concatenate([axes, -axes, rng.choice([-1.0, 1.0], (_NUM_RAYS, dim))])
    others = rng.standard_normal((_NUM_RAYS, dim))
    rays = np.concatenate([rays, others / np.linalg.norm(others, axis=1, keepdims=True)])
    return np.concatenate([rng.standard_normal((256, dim)), *(radius * rays for radius in _RADII)])


def tail_problem(y: np.ndarray) -> str | None:
    """What is wrong with the tails of the image of :func:`tail_points`, if anything."""
    bulk, near, far = y[:256], *np.split(y[256:], 2)
    if np.isnan(y).any() or not np.isfinite(bulk).all() or not np.isfinite(near).all():
        return f"is not finite at {_RADII[0]:.0f} standard deviations of its base"
    scale = bulk.std(0)
    slopes = (far - near) / (_RADII[1] - _RADII[0]) / scale  # (rays, dim), infinite where the growth is beyond all
    reach = (near - bulk.mean(0)) / scale
    if np.sqrt(np.square(slopes).sum(-1)).min() < _BOUNDED:
        return "has an image that is bounded, or nearly so"
    if any(((sign * slopes).max(0) < _LEAST_SLOPE)[(sign * reach).max(0) < _REACH].any() for sign in (1, -1)):
        return "has tails whose slope dies"
    return None


def flow_name(factory: Callable) -> str:
    """The name under which a user knows a flow's factory."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__name__", type(factory).__name__)


def names_of(sites: str | tuple[str, ...]) -> tuple[str, ...]:
    """The sites of one flow."""
    return (sites,) if isinstance(sites, str) else tuple(sites)


def check_sites(keys: list[str | tuple[str, ...]]) -> None:
    """Raises a ``ValueError`` unless each flow has sites, and each site one flow."""
    named = [name for sites in keys for name in names_of(sites)]
    if not keys or not all(keys) or len(set(named)) < len(named):
        raise ValueError(
            f"FlowReparam: flow_source must give every flow its sites, and a site one flow, but got {keys}."
        )
