"""What a model says of its plates: the latents in each, their shapes and their priors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.log_density import check_finite
from pyroflows.noncentering import LOCATION_SCALE, unwrapped
from pyroflows.supports import WRAPPERS


@dataclasses.dataclass
class Site:
    """A latent site: the shape of one element's unconstrained value, and the number of axes of the site's."""

    name: str
    event: tuple[int, ...]
    dim: int

    @property
    def size(self) -> int:
        return math.prod(self.event)


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
        return "_".join(self.plates).replace(".", "_") or "global"  # a module's name has no dots

    @property
    def dim(self) -> int:
        return sum(site.size for site in self.sites.values())

    def batch_shape(self, indices: dict[str, Tensor]) -> tuple[int, ...]:
        shape = [1] * max((-dim for dim in self.plates.values()), default=0)
        for name, dim in self.plates.items():
            shape[dim] = len(indices[name])
        return tuple(shape)

    def flat_mean(self, site: Site, trace: poutine.Trace) -> Tensor:
        """The first unconstrained value of a site as ``(size,)``, the mean over elements."""
        node = trace.nodes[site.name]
        u = biject_to(node["fn"].support).inv(node["value"])
        return u.reshape(-1, site.size).mean(0)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Vectors ``(*batch, dim)`` as unconstrained values of the sites, ``(*batch, *event)``."""
        return {name: part.reshape((*x.shape[:-1], *self.sites[name].event)) for name, part in self.pieces(x).items()}

    def pieces(self, x: Tensor) -> dict[str, Tensor]:
        """Vectors ``(*batch, dim)`` as those of the sites, ``(*batch, size)``."""
        return dict(zip(self.sites, x.split([site.size for site in self.sites.values()], -1), strict=True))

    def prior(self, priors: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """Location ``(*batch, dim)`` and precision ``(*batch, dim, dim)`` of the priors; zeros for those not used."""
        batch, end = like.shape[:-1], 0
        locs, precision = [], like.new_zeros(*like.shape, self.dim)
        for name, part in self.split(like).items():
            start, end = end, end + self.sites[name].size
            if name not in self.informed:
                locs.append(like.new_zeros(*batch, end - start))
                continue
            loc, scale = (t.reshape(*batch, end - start) for t in location_and_scale(priors[name], part))  # type: ignore[union-attr]
            block, fn = scale.square().reciprocal().diag_embed(), unwrapped(priors[name])
            if isinstance(fn, torch.distributions.MultivariateNormal) and part.shape[-1:] == (end - start,):
                block = fn.precision_matrix.expand(*part.shape, end - start).reshape(block.shape)
            locs.append(loc)
            precision[..., start:end, start:end] = block
        return torch.cat(locs, -1), precision


def subsamples(here: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Indices that together hold all elements of the plates, as many at a time as in ``here``."""
    each = []
    for index, size in zip(here.values(), sizes, strict=True):
        starts = [min(start, size - len(index)) for start in range(0, size, len(index))]
        each.append([torch.arange(start, start + len(index), device=index.device) for start in starts])
    return [dict(zip(here, some, strict=True)) for some in itertools.product(*each)]


def differ(some: dict[str, Any], others: dict[str, Any], name: str, missing: bool = False) -> bool:
    """Whether a site's prior is another one; ``missing`` where one is none, or not of location-scale form."""
    one, other = some.get(name), others.get(name)
    if one is None or other is None:
        return missing
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def is_latent(site: dict) -> bool:
    """Whether a site of a trace is for the guide to draw, or to leave to enumeration."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary", False)
    )


def first_value(site: Any, last: bool = False) -> Tensor:
    """The first (or last) value of a discrete site's support."""
    fn = site["fn"]
    return fn.enumerate_support(expand=False)[-1 if last else 0].expand(fn.shape())


def location_and_scale(fn: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Location and scale of an unconstrained value; ``None`` unless the distribution is of that form."""
    fn = unwrapped(fn)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        loc, scale = fn.loc, fn.scale_tril.square().sum(-1).sqrt()
    elif isinstance(fn, LOCATION_SCALE):
        loc, scale = fn.loc, fn.scale
    else:
        return None
    shape = torch.broadcast_shapes(loc.shape, like.shape)
    return loc.expand(shape), scale.expand(shape)


def mask_of(fn: Any) -> Any:
    """The mask that a distribution itself carries; that of handlers stands at the site."""
    mask = None
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return mask


def frames_of(site: dict) -> list:
    """The plates of a site, outermost first, without those that are iterated."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda frame: frame.dim)


def groups_of(trace: poutine.Trace) -> dict[str, Group]:
    """The groups of latents by their labels, in the order of the model."""
    groups: dict[str, Group] = {}
    for name, site in trace.nodes.items():
        if not is_latent(site) or site["fn"].support.is_discrete:
            continue
        frames = frames_of(site)
        group = Group({f.name: f.dim for f in frames}, tuple(f.full_size or f.size for f in frames))
        known = groups.setdefault(group.label, group)
        if known.plates != group.plates:
            raise ValueError(
                f"AutoHierarchicalFlow: the plates {list(known.plates)} and {list(group.plates)} make one name, "
                f"{group.label!r}. Rename one of them."
            )
        group = known
        batch = site["fn"].batch_shape
        outside = [size for dim, size in enumerate(batch, -len(batch)) if size > 1 and dim not in group.plates.values()]
        if outside:
            raise ValueError(
                f"AutoHierarchicalFlow: site {name!r} has batch shape {tuple(batch)}, of which plates explain only the "
                f"dimension(s) {list(group.plates.values())}. Put the rest into a plate, or declare it by .to_event()."
            )
        shape = biject_to(site["fn"].support).inv(site["value"]).shape
        group.sites[name] = Site(name, tuple(shape[len(batch) :]), site["value"].dim())
    order = sorted(groups, key=lambda label: label != "global")
    groups = {label: groups[label] for label in order}
    for n, label in enumerate(order):
        group = groups[label]
        group.parents = tuple(other for other in order[:n] if set(groups[other].plates) < set(group.plates))
    return groups


def check_trace(trace: poutine.Trace) -> None:
    """Raises a ``ValueError`` where a guide that follows the plates cannot serve the traced model."""
    latent = {name: site for name, site in trace.nodes.items() if is_latent(site)}
    discrete = [
        name for name, site in latent.items() if site["fn"].support.is_discrete and not site["infer"].get("enumerate")
    ]
    if discrete:
        raise ValueError(
            f"AutoHierarchicalFlow: site(s) {discrete} are discrete and not enumerated, but a flow is a density of "
            "continuous variables. Wrap the model in pyro.infer.config_enumerate and train with TraceEnum_ELBO, or sum "
            "them out of the model (as a mixture)."
        )
    continuous = {name: site for name, site in latent.items() if not site["fn"].support.is_discrete}
    if not continuous:
        raise ValueError("AutoHierarchicalFlow: the model has no continuous latent sites: there is nothing to infer.")
    if not any(frames_of(site) for site in continuous.values()):
        raise ValueError(
            "AutoHierarchicalFlow: no latent of the model lies in a plate, so there are no local latents. Use "
            "AutoFlow, or put the latents that belong to elements into pyro.plate (as a context)."
        )
    for name, site in continuous.items():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"AutoHierarchicalFlow: site {name!r} lies in plate {frame.name!r}, which is iterated and "
                    "subsampled. Enter it as a context, 'with pyro.plate(...)'."
                )
    check_finite(trace, "AutoHierarchicalFlow")
