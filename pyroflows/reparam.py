"""Neural transport: a trained guide or a flow straightens a model for HMC and NUTS (Hoffman et al. 2019)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import block_messengers
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.centering import COORDINATES
from pyroflows.distributions import standard_base
from pyroflows.guides import AutoFlow
from pyroflows.log_density import check_latents, prototype_trace
from pyroflows.supports import supported
from pyroflows.transform_module import Compose, TransformModule

_BATCH = 256  # draws per pass over the model: bounds the memory
_CONTEXTS = (PlateMessenger, ScaleMessenger, MaskMessenger)  # what changes the density of the sites within
_RADII = (10.0, 1000.0)  # of the base, between which the growth of a flow's image is measured
_BOUNDED = 1e-5  # a slope between them, in standard deviations of the bulk
_LEAST_SLOPE, _REACH = 0.03, 4.0  # the same of an output that comes less far by the first of them
_NUM_RAYS = 64  # of each kind


class FlowReparam(Reparam):
    """Moves latents of a model into the base space of a flow, where HMC and NUTS have an easy target.

    ::

        neutra = FlowReparam(posterior)              # or FlowReparam(guide)
        mcmc = MCMC(NUTS(neutra.reparam(model)), ...)
        mcmc.run(*args)
        neutra.transform_sample(mcmc.get_samples())  # the model's own sites

    The reparametrised model draws a vector ``z`` at the site ``{first latent}_base`` and sets the latents to ``f(z)``.
    Its density is that of the model at ``f(z)`` times ``|det df/dz|`` (Hoffman et al. 2019, eq. 4), so that MCMC is
    exact whatever the fit of the flow is. Latents become deterministic sites, which Pyro's MCMC does not keep.

    The flow is held fixed, as it stands when it is given.

    :param flow_source: a :class:`FlowPosterior`; a trained :class:`AutoFlow`; a :class:`TransformModule` over the
        unconstrained values of all latents, in the model's order; or a dict of such flows, each for a site or a tuple
        of sites, ``{"tau": flow, ("mu", "theta"): other}``, where latents that are not named stay as they are. A flow
        alone also serves as the reparametriser of one site in ``poutine.reparam(config={"tau": FlowReparam(flow)})``.
    :param check_tails: refuses flows with tails that do not reach (:func:`check_tails`).
    :raises ValueError: for a guide that has not been called; here or at the model's first run, for a flow of another
        size, with an estimated log-determinant or with tails that do not reach; at a run, for latents which the flow
        should move but which are unknown, observed, discrete or not come to.
    """

    def __init__(self, flow_source: Any, *, check_tails: bool = True):
        self.check_tails = check_tails
        self._model: tuple[Callable, tuple, dict] | None = None
        self._others: tuple[str, ...] = ()  # latents which stay as they are
        if hasattr(flow_source, "guide"):  # a posterior
            density = flow_source.log_density
            self._model, flow_source = (density.model, density.args, density.kwargs), flow_source.guide
        if isinstance(flow_source, AutoFlow):
            if flow_source.prototype_trace is None:
                raise ValueError("FlowReparam: the guide has not been called, so it is not trained: train it first.")
            like, shapes = flow_source.init_loc, dict(flow_source._unconstrained_shapes)
            transform, base = flow_source.get_base_space()
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
            self._model = fn, args, kwargs
            self._settle(fn, args, kwargs)
            for group in self._groups:
                group.pending.clear()
                group.drawn = False
            result = poutine.reparam(fn, config=self._config)(*args, **kwargs)
            if unmet := [name for group in self._groups for name in (group.pending if group.drawn else group.sites)]:
                raise ValueError(
                    f"FlowReparam: the flow moves site(s) {unmet}, but this run of the model did not come to them. "
                    "Name only those it does come to, {'tau': flow}."
                )
            return result

        return reparametrised

    def _config(self, site: Any) -> FlowReparam | None:
        return self if any(site["name"] in group.sites for group in self._groups) else None

    def _settle(self, fn: Callable, args: tuple, kwargs: dict) -> None:
        """Lays out the groups of latents which are not known yet."""
        if all(group.shapes for group in self._groups):
            return
        trace = prototype_trace(fn, args, kwargs)
        latents = {n: site for n, site in trace.iter_stochastic_nodes() if not poutine.util.site_is_subsample(site)}
        moved = [name for group in self._groups for name in group.sites or latents]
        if unknown := [name for name in moved if name not in latents]:
            raise ValueError(
                f"FlowReparam: flow_source names {unknown}, but the model's latent sites are {list(latents)}."
            )
        self._others = tuple(name for name in latents if name not in moved)
        for name in self._others:
            trace.remove_node(name)
        check_latents(trace, "FlowReparam")
        for group in self._groups:
            sites = {name: site for name, site in latents.items() if name in (group.sites or latents)}
            shapes = {n: biject_to(s["fn"].support).inverse_shape(s["value"].shape) for n, s in sites.items()}
            like = next(iter(sites.values()))["value"]
            group.settle(shapes, like, self.check_tails)

    # -- the ecosystem's protocol ----------------------------------------------------------------------------------
    def apply(self, msg: Any) -> Any:
        name, fn = msg["name"], supported(msg["fn"])
        if msg["is_observed"]:
            raise ValueError(
                f"FlowReparam: site {name!r} is observed, but the flow moves it. Condition the model before the guide "
                "is trained, or leave the site out of the flow's."
            )
        if len(self._groups) == 1 and not self._groups[0].sites:  # as the reparametriser of this site alone
            shape, like = biject_to(fn.support).inverse_shape(fn.shape()), fn.sample()
            self._groups[0].settle({name: shape}, like, self.check_tails)
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
        with _outside_the_model():
            if poutine.get_mask() is not False:
                pyro.factor(f"_{name}_log_det", bijection.log_abs_det_jacobian(u, value).sum())
        log_prob = fn.log_prob(value) if poutine.get_mask() is not False else 0.0
        return {"fn": dist.Delta(value, log_prob, event_dim=fn.event_dim), "value": value, "is_observed": True}

    @staticmethod
    def _draw(group: _Group) -> None:
        """Draws the base vector and sets the latents of its group."""
        with _outside_the_model():
            z = pyro.sample(group.base_name, group.base.mask(False))
            u, log_det = group.transform.forward_and_log_det(z)
            if poutine.get_mask() is not False:
                pyro.factor(f"_{group.base_name}_log_det", log_det)
        group.pending, group.drawn = group.unpack(u), True

    # -- draws -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def transform_sample(self, latent: Tensor | dict[str, Tensor], *, deterministic: bool = False) -> dict[str, Tensor]:
        """Draws of the model's latent sites from draws of the base space.

        :param latent: base vectors ``(*batch, dim)``, or a dict with those of every group and the other latents, as
            ``mcmc.get_samples()`` returns it.
        :param deterministic: whether to give the deterministic sites too, which Pyro's ``MCMC`` leaves out.
        :returns: dict of tensors ``(*batch, *site_shape)``, for the arguments with which the model last ran.
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
        model, wanted = self.reparam(fn), {*self._others, *(name for group in self._groups for name in group.sites)}
        batch = samples[self.base_names[0]].shape[:-1]
        flat = {
            name: samples[name].reshape(-1, *samples[name].shape[len(batch) :])
            for name in (*self.base_names, *self._others)
        }

        def single(values: dict[str, Tensor]) -> dict[str, Tensor]:
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            return {
                n: site["value"]
                for n, site in trace.nodes.items()
                if n in wanted or deterministic and site["type"] == "sample" and site["infer"].get("_deterministic")
            }

        with pyro.validation_enabled(False), poutine.block():
            try:
                parts = [
                    torch.func.vmap(single)(dict(zip(flat, values, strict=True)))
                    for values in zip(*(v.split(_BATCH) for v in flat.values()), strict=True)
                ]
            except Exception:  # whatever a model does that vmap cannot: one draw at a time, correct for every model
                rows = [single(dict(zip(flat, values, strict=True))) for values in zip(*flat.values(), strict=True)]
                parts = [{name: x[None] for name, x in row.items()} for row in rows]
        sites = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: x.reshape(batch + x.shape[1:]) for name, x in sites.items()}


class _Group:
    """A flow and the latents which it moves jointly: all latents, where there are no ``sites`` before it is settled."""

    def __init__(
        self,
        transform: TransformModule,
        sites: tuple[str, ...],
        base: dist.TorchDistribution | None = None,
        name: str | None = None,
    ):
        self.transform = copy.deepcopy(transform).requires_grad_(False)
        self.sites, self._base = sites, base
        self.name = name or type(transform).__name__
        self.shapes: dict[str, torch.Size] = {}  # unconstrained, in the model's order
        self.pending: dict[str, Tensor] = {}  # unconstrained values that this run of the model has not used yet
        self.drawn = False  # in this run

    def settle(self, shapes: dict[str, torch.Size], like: Tensor, check: bool) -> None:
        """Takes latents of these unconstrained shapes, of the dtype of ``like``, if the flow fits them."""
        dim, error = sum(shape.numel() for shape in shapes.values()), None
        try:
            fits = self.transform.to(like)(like.new_zeros(dim)).shape == (dim,)
        except (RuntimeError, ValueError) as raised:
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

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


@contextmanager
def _outside_the_model() -> Iterator[None]:
    """Leaves the plates, scales and masks that were entered since the reparametrised model began."""
    begin = next((n for n, messenger in enumerate(_PYRO_STACK) if isinstance(messenger, ReparamMessenger)), 0)
    inner = {id(messenger) for messenger in _PYRO_STACK[begin:] if isinstance(messenger, _CONTEXTS)}
    with block_messengers(lambda messenger: id(messenger) in inner):
        yield


def check_tails(transform: TransformModule, dim: int, name: str, like: Tensor) -> None:
    """Raises a ``ValueError`` where a flow's image is bounded or its slope dies in the tails.

    Such a flow truncates a posterior, and neither R-hat nor divergences tell. Looks along rays of the base, between 10
    and 1000: the image must grow along every ray, and every output must rise and fall along some of them, by four
    standard deviations of the bulk up to 10, or else with at least 3 % of the slope which it has there.

    :param transform: the flow; a guide's coordinates are left out, for they may be as steep as the model's scales.
    :param dim: size of its vectors.
    :param name: its name, for the message.
    :param like: a tensor of its dtype and device.
    """
    layers = transform.layers if isinstance(transform, Compose) else [transform]
    transform = Compose([layer for layer in layers if not isinstance(layer, COORDINATES)])
    points = tail_points(dim)
    try:
        with torch.no_grad():
            y = transform(torch.as_tensor(points).to(like)).double().numpy(force=True)
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
