"""What a model says of its plates: the latents in each, their shapes and their priors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to

from numpyro_flows.log_density import check_finite
from numpyro_flows.noncentering import LOCATION_SCALE, unwrapped
from numpyro_flows.supports import WRAPPERS


@dataclasses.dataclass
class Site:
    """A latent site: the shape of one element's unconstrained value, its batch axes outside plates first."""

    name: str
    rest: tuple[int, ...]
    event: tuple[int, ...]
    axes: tuple[int, ...]  # of the group's plates among the batch axes, from the right

    @property
    def size(self) -> int:
        return math.prod(self.rest) * math.prod(self.event)


@dataclasses.dataclass
class Group:
    """The latents that lie in the same plates."""

    plates: dict[str, int]  # plate -> its dimension, outermost first
    sizes: tuple[int, ...]  # of the full plates
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    parents: tuple[str, ...] = ()
    informed: set[str] = dataclasses.field(default_factory=set)
    joint: bool = False  # an element's latents have a full precision matrix

    @property
    def label(self) -> str:
        return "_".join(self.plates) or "global"

    @property
    def dim(self) -> int:
        return sum(site.size for site in self.sites.values())

    def batch_shape(self, indices: dict[str, Array]) -> tuple[int, ...]:
        shape = [1] * max((-dim for dim in self.plates.values()), default=0)
        for name, dim in self.plates.items():
            shape[dim] = len(indices[name])
        return tuple(shape)

    def flat_mean(self, site: Site, trace: dict[str, Any]) -> Array:
        """The first unconstrained value of a site as ``(size,)``, the mean over elements."""
        u = biject_to(trace[site.name]["fn"].support).inv(trace[site.name]["value"])
        batch = u.ndim - len(site.event)
        return jnp.mean(u, axis=tuple(batch + axis for axis in site.axes)).reshape(-1)

    def split(self, x: Array) -> dict[str, Array]:
        """Vectors ``(*batch, dim)`` as values of the sites, each in the layout of its unconstrained value."""
        return {name: self.layout(self.sites[name], part) for name, part in self.pieces(x).items()}

    def pieces(self, x: Array) -> dict[str, Array]:
        """Vectors ``(*batch, dim)`` as those of the sites, ``(*batch, size)``."""
        ends = np.cumsum([site.size for site in self.sites.values()])
        return dict(zip(self.sites, jnp.split(x, ends[:-1], -1), strict=True))

    def layout(self, site: Site, x: Array) -> Array:
        sizes = tuple(x.shape[dim - 1] for dim in self.plates.values())
        value = x.reshape(*sizes, *site.rest, *site.event)
        batch = value.ndim - len(site.event)
        # axes of size one stand in for plates of others between those of the group
        return jnp.moveaxis(value, range(len(sizes)), [batch + axis for axis in site.axes])

    def flat(self, name: str, value: Array, batch: tuple[int, ...]) -> Array:
        """A value in a site's layout as vectors ``(*batch, size)``."""
        site = self.sites[name]
        axes = [value.ndim - len(site.event) + axis for axis in site.axes]
        return jnp.moveaxis(value, axes, range(len(axes))).reshape(*batch, site.size)

    def prior(self, priors: dict[str, Any], like: Array) -> tuple[Array, Array]:
        """Location ``(*batch, dim)`` and precision ``(*batch, dim, dim)`` of the priors; zeros for those not used."""
        batch, end = like.shape[:-1], 0
        locs, precision = [], jnp.zeros((*like.shape, self.dim), like.dtype)
        for name, part in self.split(like).items():
            start, end = end, end + self.sites[name].size
            if name not in self.informed:
                locs.append(jnp.zeros((*batch, end - start), like.dtype))
                continue
            loc, scale = (self.flat(name, a, batch) for a in location_and_scale(priors[name], part.shape))  # type: ignore[union-attr]
            block, fn = jnp.eye(end - start, dtype=like.dtype) / jnp.square(scale)[..., None], unwrapped(priors[name])
            if isinstance(fn, dist.MultivariateNormal) and part.shape[-1] == end - start:
                full = jnp.broadcast_to(fn.precision_matrix, (*part.shape, end - start))
                axes = [full.ndim - 2 + axis for axis in self.sites[name].axes]
                block = jnp.moveaxis(full, axes, range(len(axes))).reshape(block.shape)
            locs.append(loc)
            precision = precision.at[..., start:end, start:end].set(block)
        return jnp.concatenate(locs, -1), precision


def subsamples(here: dict[str, Array], sizes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Indices that together hold all elements of the plates, as many at a time as in ``here``."""
    each = []
    for index, size in zip(here.values(), sizes, strict=True):
        starts = [min(start, size - len(index)) for start in range(0, size, len(index))]
        each.append([np.arange(start, start + len(index)) for start in starts])
    return [dict(zip(here, some, strict=True)) for some in itertools.product(*each)]


def differ(some: dict[str, Any], others: dict[str, Any], name: str, missing: bool = False) -> bool:
    """Whether a site's prior is another one; ``missing`` where one is none, or not of location-scale form."""
    one, other = some.get(name), others.get(name)
    if one is None or other is None:
        return missing
    return any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is for the guide to draw, or to leave to enumeration."""
    return site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary", False)


def first_value(site: dict[str, Any], last: bool = False) -> Array:
    """The first (or last) value of a discrete site's support."""
    fn = site["fn"]
    return jnp.broadcast_to(fn.enumerate_support(expand=False)[-1 if last else 0], fn.shape())


def location_and_scale(fn: Any, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    """Location and scale of an unconstrained value of ``shape``; ``None`` unless the distribution is of that form."""
    fn = unwrapped(fn)
    if isinstance(fn, dist.MultivariateNormal):
        loc, scale = fn.loc, jnp.sqrt(jnp.square(fn.scale_tril).sum(-1))
    elif isinstance(fn, LOCATION_SCALE):
        loc, scale = fn.loc, fn.scale
    else:
        return None
    return jnp.broadcast_to(loc, shape), jnp.broadcast_to(scale, shape)


def mask_of(fn: Any) -> Array | None:
    """The mask that handlers have put on a distribution."""
    mask = None
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return mask


def groups_of(trace: dict[str, Any]) -> dict[str, Group]:
    """The groups of latents by their labels, in the order of the model."""
    groups: dict[str, Group] = {}
    for name, site in trace.items():
        if not is_latent(site) or site["fn"].support.is_discrete:
            continue
        frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
        plates = {frame.name: frame.dim for frame in frames}
        group = Group(plates, tuple(trace[plate]["args"][0] for plate in plates))
        known = groups.setdefault(group.label, group)
        if known.plates != group.plates:
            raise ValueError(
                f"AutoHierarchicalFlow: the plates {list(known.plates)} and {list(group.plates)} make one name, "
                f"{group.label!r}. Rename one of them."
            )
        group = known
        bijection, batch = biject_to(site["fn"].support), site["fn"].batch_shape
        shape = jnp.shape(bijection.inv(site["value"]))
        event = shape[len(batch) :]
        rest = tuple(n for i, n in enumerate(batch) if i - len(batch) not in plates.values())
        group.sites[name] = Site(name, rest, event, tuple(plates.values()))
    order = list(groups)
    order.sort(key=lambda label: label != "global")
    groups = {label: groups[label] for label in order}
    for n, label in enumerate(order):
        group = groups[label]
        group.parents = tuple(other for other in order[:n] if set(groups[other].plates) < set(group.plates))
    return groups


def check_trace(trace: dict[str, Any]) -> None:
    """Raises a ``ValueError`` where a guide that follows the plates cannot serve the traced model."""
    if any(isinstance(site["value"], jax.core.Tracer) for site in trace.values() if site["type"] == "sample"):
        raise ValueError(
            "AutoHierarchicalFlow: the guide's first call, which reads the model's structure, is inside jax.jit or "
            "another transformation. Call svi.init (or the guide) once outside it."
        )
    latent = {name: site for name, site in trace.items() if is_latent(site)}
    discrete = [
        name for name, site in latent.items() if site["fn"].support.is_discrete and "enumerate" not in site["infer"]
    ]
    if discrete:
        raise ValueError(
            f"AutoHierarchicalFlow: site(s) {discrete} are discrete and not enumerated, but a flow is a density of "
            "continuous variables. Wrap the model in numpyro.contrib.funsor.config_enumerate and train with "
            "TraceEnum_ELBO, or sum them out of the model (as a mixture)."
        )
    continuous = {name: site for name, site in latent.items() if not site["fn"].support.is_discrete}
    if not continuous:
        raise ValueError("AutoHierarchicalFlow: the model has no continuous latent sites: there is nothing to infer.")
    if not any(site["cond_indep_stack"] for site in continuous.values()):
        raise ValueError(
            "AutoHierarchicalFlow: no latent of the model lies in a plate, so there are no local latents. Use "
            "AutoFlow, or put the latents that belong to elements into numpyro.plate."
        )
    check_finite(trace, "AutoHierarchicalFlow")
