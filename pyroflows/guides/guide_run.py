"""One run of a hierarchical guide: the draws of its groups, at the places where the model has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyroflows.distributions import standard_base
from pyroflows.guides.plates import Group, first_value, location_and_scale, mask_of
from pyroflows.transform_module import TransformModule

if TYPE_CHECKING:
    from pyroflows.guides.hierarchical import AutoHierarchicalFlow


class GroupFlow(nn.Module):
    """What is learned of one group of latents: its flow, location and scale, and its encoder.

    :param flow: flow of size ``dim``, with a context unless it is the global one.
    :param loc: ``(dim,)``, or ``(*plate_sizes, dim)`` where elements have their own.
    :param log_scale: as ``loc``.
    :param tril: ``(dim (dim - 1) / 2,)``, likewise: what stands below the diagonal of ``L``, row by row, where an
        element's latents may be correlated.
    :param encoder: encoder to ``(..., c)``, if any.
    :param head: ``(2 dim, c)``, or as many rows more as ``tril`` has numbers: what the encoding adds to location,
        log-scale and ``tril``.
    """

    def __init__(
        self,
        flow: TransformModule,
        loc: Tensor,
        log_scale: Tensor,
        tril: Tensor | None,
        encoder: Callable | None,
        head: Tensor | None,
    ):
        super().__init__()
        self.flow, self.encoder = flow, encoder
        self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(log_scale)
        self.tril = None if tril is None else nn.Parameter(tril)
        self.head = None if head is None else nn.Parameter(head)


class Subsamples(Messenger):
    """Gives plates the indices of their subsamples."""

    def __init__(self, indices: dict[str, Tensor]):
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


class Done(Exception):
    """Every latent is drawn: what the model does from here on, its likelihood, is not needed."""


class GuideRun(Messenger):
    """Runs the model with the guide's draws at its latent sites; its plates, masks and scales stay in force."""

    def __init__(self, guide: AutoHierarchicalFlow, modules: nn.ModuleDict, args: tuple, kwargs: dict):
        super().__init__()
        self.guide, self.modules, self.call = guide, modules, (args, kwargs)
        self.group_of = {name: group for group in guide.groups.values() for name in group.sites}
        self.noise_sites = {f"_{guide._pyro_name}_{label}_noise": label for label in guide.groups}
        self.indices: dict[str, Tensor] = {}
        self.noise: dict[str, Tensor] = {}  # what the flows give, by group: the contexts of others
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # y, loc and log-scale of every site of a group drawn
        self.log_q: dict[str, Tensor] = {}  # of a group's flow, which its last site takes
        self.encodings: dict[str, Tensor] = {}
        self.standard: dict[str, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.late: set[str] = set()  # sites of a group drawn whose own messages are still to come
        self.drawn: dict[str, tuple[Tensor, Any]] = {}  # value and distribution of the sites
        self.placed: dict[str, tuple[Tensor, Tensor]] = {}  # unconstrained value and log-scale of sites placed together
        self.ahead: Group | None = None  # whose priors this run of the model is to find
        self.priors: dict[str, Any] = {}
        if "global" in guide.groups:
            self._draw(guide.groups["global"])

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.noise_sites:
            return
        if site_is_subsample(msg):
            msg["stop"] = msg["stop"] or self.ahead is not None
            if name in self.indices:  # of the run ahead
                msg["value"], msg["done"] = self.indices[name], True
            return
        if name not in self.group_of or msg["is_observed"]:
            msg["stop"] = True  # observed, or left to the model
            if msg["value"] is None:
                if not msg["fn"].support.is_discrete:
                    raise ValueError(
                        f"AutoHierarchicalFlow: latent site {name!r} was not there when the guide was set up. "
                        "The guide needs a model of fixed structure."
                    )
                msg["value"], msg["done"] = first_value(msg), True
            return
        msg["done"] = True
        group, ahead = self.group_of[name], self.ahead
        if ahead is not None:
            msg["stop"] = True
            if name not in self.drawn and (group is ahead or not self.priors.keys().isdisjoint(ahead.sites)):
                bijection = biject_to(msg["fn"].support)  # a stand-in, on which none of these priors depend
                loc: Tensor = self.modules[group.label].loc  # type: ignore[assignment]
                msg["value"] = bijection(loc.new_zeros(bijection.inverse_shape(msg["fn"].shape())))
                if group is ahead:
                    self.priors[name] = msg["fn"]
                return
        if name not in self.drawn:
            if group.label not in self.noise:
                self.priors.setdefault(name, msg["fn"])
                self._draw(group)
            self.drawn[name] = self._site(group, name, msg["fn"])
        msg["value"], msg["fn"] = self.drawn[name]
        if ahead is None:
            self.values[name] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._check_plate(msg["name"], msg["fn"].size)
            indices = torch.as_tensor(msg["value"])
            if not torch.equal(indices, self.indices.setdefault(msg["name"], indices)):
                raise ValueError(
                    f"AutoHierarchicalFlow: the subsample of plate {msg['name']!r} is given by a handler around the "
                    "guide, which its run ahead for the priors does not see. Give it to pyro.plate(subsample=), or set "
                    "correlated=False."
                )
        elif self.priors.keys() >= self.ahead.sites.keys() if self.ahead else len(self.values) == len(self.group_of):
            raise Done

    def _check_plate(self, name: str, size: int) -> None:
        for group in self.guide.groups.values():
            if name not in group.plates or self.modules[group.label].loc.dim() == 1:  # type: ignore[operator]
                continue
            expected = group.sizes[list(group.plates).index(name)]
            if size != expected:
                raise ValueError(
                    f"AutoHierarchicalFlow: plate {name!r} has size {size}, but it had {expected} when the guide was "
                    "set up, and its elements have parameters of their own. Keep the size (subsample_size= may "
                    "change), make a new guide, or use amortise=."
                )

    def _draw(self, group: Group) -> None:
        """Draws the joint vectors of a group, and their log-density."""
        module: GroupFlow = self.modules[group.label]  # type: ignore[assignment]
        loc: Tensor = module.loc
        log_scale: Tensor = module.log_scale
        tril: Tensor | None = module.tril
        base = standard_base(group.dim, like=loc.detach())
        # the noise's own density is part of that of the flow: the site only makes it follow plates of particles
        name = f"_{self.guide._pyro_name}_{group.label}_noise"
        x = pyro.sample(name, base.mask(False), infer={"is_auxiliary": True})
        contexts = [self.noise[parent] for parent in group.parents]
        if loc.dim() > 1:
            index = tuple(self.indices[name].reshape([-1] + [1] * (-dim - 1)) for name, dim in group.plates.items())
            loc, log_scale, tril = loc[index], log_scale[index], None if tril is None else tril[index]
        if module.encoder is not None:
            encoding = self.guide._encode(group, module.encoder, self.indices, *self.call)
            self.encodings[group.label] = encoding
            contexts.append(encoding)
            assert module.head is not None
            sizes = [group.dim, group.dim, len(module.head) - 2 * group.dim]
            shift, log_factor, skew = (encoding @ module.head.T).split(sizes, -1)
            loc, log_scale, tril = loc + shift, log_scale + log_factor, None if tril is None else tril + skew
        y, log_det = module.flow.forward_and_log_det(x, joined(contexts, x.shape[:-1]))
        self.noise[group.label], self.log_q[group.label] = y, base.log_prob(x) - log_det
        self.late.update(group.sites)
        if tril is not None:
            self._place(group, y, loc, log_scale, tril)
            return
        ys, locs, log_scales = (group.split(t) for t in (y, loc, log_scale))
        for name in group.sites:
            self.parts[name] = ys[name], locs[name], log_scales[name]
            if self.guide.path_gradient and name not in group.informed:
                u = locs[name] + log_scales[name].exp() * ys[name]
                self._standardise(group, name, u, locs[name], log_scales[name])

    def _place(self, group: Group, y: Tensor, loc: Tensor, log_scale: Tensor, tril: Tensor) -> None:
        """Puts the latents of a group's elements where their priors and pseudo-observations together have them."""
        prior = group.prior(self.priors, y)
        centre, factor = conditional_posterior(loc, log_scale, tril, *prior)
        u = centre + torch.linalg.solve_triangular(factor.mT, y[..., None], upper=True)[..., 0]
        us, log_ss = group.split(u), group.split(-factor.diagonal(0, -2, -1).log())
        self.placed.update((name, (us[name], log_ss[name])) for name in group.sites)
        if self.guide.path_gradient:
            centre, factor = conditional_posterior(loc, log_scale, tril, *(t.detach() for t in prior))
            y = (factor.mT @ (u.detach() - centre)[..., None])[..., 0]
            ys, log_ss = group.pieces(y), group.pieces(-factor.diagonal(0, -2, -1).log())
            self.standard.update((name, (ys[name], log_ss[name])) for name in group.sites)

    def _site(self, group: Group, name: str, fn: Any) -> tuple[Tensor, Any]:
        """Value of a site, and its distribution in the guide: a point that carries the log-density."""
        u, log_s = self.placed[name] if group.joint else self._alone(group, name, fn)
        self.late.remove(name)
        bijection = biject_to(fn.support)
        value = bijection(u)
        log_det = bijection.log_abs_det_jacobian(u, value)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + fn.event_dim)
        log_q = -log_det - sum_rightmost(log_s, len(group.sites[name].event))
        if self.late.isdisjoint(group.sites):  # the last site takes the flow's part
            log_q = log_q + self.log_q[group.label]
            if self.guide.path_gradient:
                log_q = log_q - self._score(group)
        delta = dist.Delta(value, log_q, event_dim=fn.event_dim)
        mask = mask_of(fn)
        return value, delta if mask is None else delta.mask(mask)

    def _alone(self, group: Group, name: str, fn: Any) -> tuple[Tensor, Tensor]:
        """Unconstrained value of a site by its own prior and pseudo-observation, and its log-scale."""
        y, loc, log_scale = self.parts[name]
        if name not in group.informed:
            return loc + log_scale.exp() * y, log_scale.expand(y.shape)
        prior_loc, prior_scale = location_and_scale(fn, y)  # type: ignore[misc]
        centre, log_s = with_prior(loc, log_scale, prior_loc, prior_scale)
        u = centre + log_s.exp() * y
        if self.guide.path_gradient:
            fixed = with_prior(loc, log_scale, prior_loc.detach(), prior_scale.detach())
            self._standardise(group, name, u, *fixed)
        return u, log_s

    # -- the path gradient: the log-density's gradient by the parameters, at fixed values, is taken off ------------
    def _standardise(self, group: Group, name: str, u: Tensor, centre: Tensor, log_s: Tensor) -> None:
        """What the flow would have to give for ``u``, held fixed; and the log-scales; both ``(*batch, size)``."""
        y, size = (u.detach() - centre) * (-log_s).exp(), group.sites[name].size
        batch = self.noise[group.label].shape[:-1]
        self.standard[name] = y.reshape(*batch, size), log_s.expand(y.shape).reshape(*batch, size)

    def _score(self, group: Group) -> Tensor:
        """Zeros ``(*batch)`` with the gradient of the group's log-density by the parameters, the values held fixed."""
        module: GroupFlow = self.modules[group.label]  # type: ignore[assignment]
        contexts = [self._standard_of(self.guide.groups[parent], group) for parent in group.parents]
        if group.label in self.encodings:
            contexts.append(self.encodings[group.label])
        y = self._standard_of(group, group)
        x, log_det = module.flow.inverse_and_log_det(y, joined(contexts, y.shape[:-1]))
        log_scales = torch.cat([self.standard[name][1] for name in group.sites], -1)
        log_q = standard_base(group.dim, like=y.detach()).log_prob(x) + log_det - log_scales.sum(-1)
        return log_q - log_q.detach()

    def _standard_of(self, group: Group, inner: Group) -> Tensor:
        late = [name for name in group.sites if name not in self.standard]
        if late:
            raise ValueError(
                f"AutoHierarchicalFlow: path_gradient=True needs the latents of {group.label!r} before those of "
                f"{inner.label!r}, but site(s) {late} come later. Move them up in the model, or set it to False."
            )
        return torch.cat([self.standard[name][0] for name in group.sites], -1)


def joined(contexts: list[Tensor], batch: torch.Size) -> Tensor | None:
    """One context ``(*batch, c)``, or none."""
    if not contexts:
        return None
    return torch.cat([c.expand(*batch, c.shape[-1]) for c in contexts], -1)


def with_prior(loc: Tensor, log_scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and log-scale of a latent with its prior and pseudo-observation."""
    log_s = -0.5 * torch.logaddexp(-2 * log_scale, -2 * prior_scale.log())
    return prior_loc + (2 * (log_s - log_scale)).exp() * (loc - prior_loc), log_s


def conditional_posterior(
    loc: Tensor, log_scale: Tensor, tril: Tensor, prior_loc: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Centre of an element's latents and the lower Cholesky factor of their precision matrix."""
    dim = loc.shape[-1]
    rows, columns = torch.tril_indices(dim, dim, -1, device=tril.device)
    factor = torch.eye(dim, dtype=tril.dtype, device=tril.device).repeat(*tril.shape[:-1], 1, 1)
    factor[..., rows, columns] = tril
    factor = (-log_scale).exp()[..., None] * factor
    observed = factor.mT @ factor
    cholesky, failed = torch.linalg.cholesky_ex(precision + observed)
    cholesky = torch.where((failed > 0)[..., None, None], math.nan, cholesky)  # as where a log-density is not finite
    pull = torch.cholesky_solve(observed @ (loc - prior_loc)[..., None], cholesky)
    return prior_loc + pull[..., 0], cholesky


def pseudo_observations(
    x: Tensor, gradient: Tensor, curvature: Tensor, prior: Tensor, joint: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Location, log-scale and what stands below the diagonal where ``x`` has a likelihood's gradient and curvature.

    Where it is flat or convex, a hundredth of the prior's precision.
    """
    if not joint:
        curvature = curvature.diagonal(0, -2, -1).diag_embed()
    curvature = curvature.nan_to_num()
    values, vectors = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    least = 1e-2 * prior.diagonal(0, -2, -1).mean(-1) + 1e-3 * values.abs().amax(-1) + 1e-6
    values = torch.maximum(values, least[..., None])
    far = 10 / values.sqrt()  # no further, in standard deviations
    step = ((vectors.mT @ gradient[..., None])[..., 0] / values).clamp(-far, far)
    loc = x + (vectors @ step[..., None])[..., 0]
    precision = (vectors * values[..., None, :]) @ vectors.mT
    factor = torch.linalg.cholesky_ex(precision.flip(-2, -1))[0].flip(-2, -1).mT  # lower, W^T W
    diagonal = factor.diagonal(0, -2, -1)
    rows, columns = torch.tril_indices(x.shape[-1], x.shape[-1], -1, device=x.device)
    return loc, -diagonal.log(), (factor / diagonal[..., None])[..., rows, columns]
