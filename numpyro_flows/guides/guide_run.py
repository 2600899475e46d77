"""One run of a hierarchical guide: the draws of its groups, at the places where the model has them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.primitives import Messenger

from numpyro_flows.distributions import standard_base
from numpyro_flows.guides.plates import Group, first_value, location_and_scale, mask_of
from numpyro_flows.transform_module import TransformModule, full_precision

if TYPE_CHECKING:
    from numpyro_flows.guides.hierarchical import AutoHierarchicalFlow


class GroupFlow(eqx.Module):
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

    flow: TransformModule
    loc: Array
    log_scale: Array
    tril: Array | None
    encoder: Any
    head: Array | None


class Done(Exception):
    """Every latent is drawn: what the model does from here on, its likelihood, is not needed."""


class GuideRun(Messenger):
    """Runs the model with the guide's draws at its latent sites; its plates, masks and scales stay in force."""

    def __init__(
        self, guide: AutoHierarchicalFlow, modules: dict[str, GroupFlow], key: Array, args: tuple, kwargs: dict
    ):
        super().__init__(None)
        self.guide, self.modules, self.key, self.call = guide, modules, key, (args, kwargs)
        self.group_of = {name: group for group in guide.groups.values() for name in group.sites}
        self.indices: dict[str, Array] = {}
        self.noise: dict[str, Array] = {}  # what the flows give, by group: the contexts of others
        self.parts: dict[str, tuple[Array, Array, Array]] = {}  # y, loc and log-scale of every site of a group drawn
        self.log_q: dict[str, Array] = {}  # of a group's flow, which its last site takes
        self.encodings: dict[str, Array] = {}
        self.standard: dict[str, tuple[Array, Array]] = {}
        self.values: dict[str, Array] = {}
        self.late: set[str] = set()  # sites of a group drawn whose own messages are still to come
        self.drawn: dict[str, tuple[Array, Any]] = {}  # value and distribution of the sites
        self.placed: dict[str, tuple[Array, Array]] = {}  # unconstrained value and log-scale of sites placed together
        self.ahead: Group | None = None  # whose priors this run of the model is to find
        self.priors: dict[str, Any] = {}
        if "global" in guide.groups:
            self._draw(guide.groups["global"])

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "deterministic":
            msg["stop"] = True
        if msg["type"] == "plate" and msg["name"] in self.indices:
            msg["value"] = self.indices[msg["name"]]  # of the run ahead
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if name not in self.group_of:
            msg["stop"] = True  # observed, or left to the model
            if msg["value"] is None:
                if not msg["fn"].support.is_discrete:
                    raise ValueError(
                        f"AutoHierarchicalFlow: latent site {name!r} was not there when the guide was set up. "
                        "The guide needs a model of fixed structure."
                    )
                msg["value"] = first_value(msg)
            return
        group, ahead = self.group_of[name], self.ahead
        if ahead is not None:
            msg["stop"] = True
            if name not in self.drawn and (group is ahead or not self.priors.keys().isdisjoint(ahead.sites)):
                bijection = biject_to(msg["fn"].support)  # a stand-in, on which none of these priors depend
                msg["value"] = bijection(jnp.zeros(bijection.inverse_shape(msg["fn"].shape())))
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

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self.indices[msg["name"]] = msg["value"]
            for group in self.guide.groups.values():
                position = list(group.plates).index(msg["name"]) if msg["name"] in group.plates else None
                per_element = self.modules[group.label].loc.ndim > 1
                if position is not None and per_element and msg["args"][0] != group.sizes[position]:
                    raise ValueError(
                        f"AutoHierarchicalFlow: plate {msg['name']!r} has size {msg['args'][0]}, but it had "
                        f"{group.sizes[position]} when the guide was set up, and its elements have parameters of their "
                        "own. Keep the size (subsample_size= may change), make a new guide, or use amortise=."
                    )
        elif msg["type"] == "sample" and (
            self.priors.keys() >= self.ahead.sites.keys() if self.ahead else len(self.values) == len(self.group_of)
        ):
            raise Done

    def _draw(self, group: Group) -> None:
        """Draws the joint vectors of a group, and their log-density."""
        module = self.modules[group.label]
        batch = group.batch_shape(self.indices)
        contexts = [self.noise[parent] for parent in group.parents]
        loc, log_scale, tril = module.loc, module.log_scale, module.tril
        if loc.ndim > 1:
            index = tuple(self.indices[name].reshape([-1] + [1] * (-dim - 1)) for name, dim in group.plates.items())
            loc, log_scale, tril = loc[index], log_scale[index], None if tril is None else tril[index]
        if module.encoder is not None:
            encoding = self.guide._encode(group, module.encoder, self.indices, *self.call)
            self.encodings[group.label] = encoding
            contexts.append(encoding)
            assert module.head is not None
            shift, log_factor, skew = jnp.split(encoding @ module.head.T, [group.dim, 2 * group.dim], -1)
            loc, log_scale, tril = loc + shift, log_scale + log_factor, None if tril is None else tril + skew
        number = list(self.guide.groups).index(group.label)
        base = standard_base(group.dim, like=loc)
        x = base.sample(jax.random.fold_in(self.key, number), batch)
        y, log_det = module.flow.forward_and_log_det(x, joined(contexts, batch))
        self.noise[group.label], self.log_q[group.label] = y, base.log_prob(x) - log_det
        self.late.update(group.sites)
        loc, log_scale = (jnp.broadcast_to(a, y.shape) for a in (loc, log_scale))
        if tril is not None:
            self._place(group, y, loc, log_scale, tril)
            return
        ys, locs, log_scales = (group.split(a) for a in (y, loc, log_scale))
        for name in group.sites:
            self.parts[name] = ys[name], locs[name], log_scales[name]
            if self.guide.path_gradient and name not in group.informed:
                u = locs[name] + jnp.exp(log_scales[name]) * ys[name]
                self._standardise(group, name, u, locs[name], log_scales[name])

    @full_precision
    def _place(self, group: Group, y: Array, loc: Array, log_scale: Array, tril: Array) -> None:
        """Puts the latents of a group's elements where their priors and pseudo-observations together have them."""
        prior = group.prior(self.priors, y)
        centre, factor = conditional_posterior(loc, log_scale, tril, *prior)
        u = centre + solve_triangular(factor.mT, y[..., None], lower=False)[..., 0]
        us, log_ss = group.split(u), group.split(-jnp.log(jnp.diagonal(factor, 0, -2, -1)))
        self.placed.update((name, (us[name], log_ss[name])) for name in group.sites)
        if self.guide.path_gradient:
            centre, factor = conditional_posterior(loc, log_scale, tril, *lax.stop_gradient(prior))
            y = (factor.mT @ (lax.stop_gradient(u) - centre)[..., None])[..., 0]
            ys, log_ss = group.pieces(y), group.pieces(-jnp.log(jnp.diagonal(factor, 0, -2, -1)))
            self.standard.update((name, (ys[name], log_ss[name])) for name in group.sites)

    def _site(self, group: Group, name: str, fn: Any) -> tuple[Array, Any]:
        """Value of a site, and its distribution in the guide: a point that carries the log-density."""
        u, log_s = self.placed[name] if group.joint else self._alone(group, name, fn)
        self.late.remove(name)
        bijection = biject_to(fn.support)
        value = bijection(u)
        event_dim = fn.event_dim
        log_det = bijection.log_abs_det_jacobian(u, value)
        log_det = sum_rightmost(log_det, log_det.ndim - value.ndim + event_dim)
        site = group.sites[name]
        log_q = -log_det - sum_rightmost(log_s, len(site.event))
        if self.late.isdisjoint(group.sites):  # the last site takes the flow's part
            joint = self.log_q[group.label]
            if self.guide.path_gradient:
                joint = joint - self._score(group)
            once = dataclasses.replace(site, rest=(1,) * len(site.rest), event=())
            log_q = log_q + group.layout(once, joint[..., None]) / math.prod(site.rest)  # spread over its other axes
        delta = dist.Delta(value, log_q, event_dim)
        mask = mask_of(fn)
        return value, delta if mask is None else delta.mask(mask)

    def _alone(self, group: Group, name: str, fn: Any) -> tuple[Array, Array]:
        """Unconstrained value of a site by its own prior and pseudo-observation, and its log-scale."""
        y, loc, log_scale = self.parts[name]
        if name not in group.informed:
            return loc + jnp.exp(log_scale) * y, log_scale
        prior_loc, prior_scale = location_and_scale(fn, y.shape)  # type: ignore[misc]
        centre, log_s = with_prior(loc, log_scale, prior_loc, prior_scale)
        u = centre + jnp.exp(log_s) * y
        if self.guide.path_gradient:
            fixed = with_prior(loc, log_scale, lax.stop_gradient(prior_loc), lax.stop_gradient(prior_scale))
            self._standardise(group, name, u, *fixed)
        return u, log_s

    # -- the path gradient: the log-density's gradient by the parameters, at fixed values, is taken off ------------
    def _standardise(self, group: Group, name: str, u: Array, centre: Array, log_s: Array) -> None:
        """What the flow would have to give for ``u``, held fixed; and the log-scales; both ``(*batch, size)``."""
        y = (lax.stop_gradient(u) - centre) * jnp.exp(-log_s)
        batch = self.noise[group.label].shape[:-1]
        self.standard[name] = group.flat(name, y, batch), group.flat(name, jnp.broadcast_to(log_s, y.shape), batch)

    def _score(self, group: Group) -> Array:
        """Zeros ``(*batch)`` with the gradient of the group's log-density by the parameters, the values held fixed."""
        module, batch = self.modules[group.label], self.noise[group.label].shape[:-1]
        contexts = [self._standard_of(self.guide.groups[parent], group) for parent in group.parents]
        if group.label in self.encodings:
            contexts.append(self.encodings[group.label])
        y = self._standard_of(group, group)
        x, log_det = module.flow.inverse_and_log_det(y, joined(contexts, batch))
        log_scales = jnp.concatenate([self.standard[name][1] for name in group.sites], -1)
        log_q = standard_base(group.dim, like=y).log_prob(x) + log_det - log_scales.sum(-1)
        return log_q - lax.stop_gradient(log_q)

    def _standard_of(self, group: Group, inner: Group) -> Array:
        late = [name for name in group.sites if name not in self.standard]
        if late:
            raise ValueError(
                f"AutoHierarchicalFlow: path_gradient=True needs the latents of {group.label!r} before those of "
                f"{inner.label!r}, but site(s) {late} come later. Move them up in the model, or set it to False."
            )
        return jnp.concatenate([self.standard[name][0] for name in group.sites], -1)


def joined(contexts: list[Array], batch: tuple[int, ...]) -> Array | None:
    """One context ``(*batch, c)``, or none."""
    if not contexts:
        return None
    return jnp.concatenate([jnp.broadcast_to(c, (*batch, c.shape[-1])) for c in contexts], -1)


def with_prior(loc: Array, log_scale: Array, prior_loc: Array, prior_scale: Array) -> tuple[Array, Array]:
    """Centre and log-scale of a latent with its prior and pseudo-observation."""
    log_s = -0.5 * jnp.logaddexp(-2 * log_scale, -2 * jnp.log(prior_scale))
    return prior_loc + jnp.exp(2 * (log_s - log_scale)) * (loc - prior_loc), log_s


def conditional_posterior(
    loc: Array, log_scale: Array, tril: Array, prior_loc: Array, precision: Array
) -> tuple[Array, Array]:
    """Centre of an element's latents and the lower Cholesky factor of their precision matrix."""
    eye = jnp.eye(loc.shape[-1], dtype=loc.dtype)
    rows, columns = np.tril_indices(loc.shape[-1], -1)
    factor = jnp.zeros((*tril.shape[:-1], *eye.shape), tril.dtype).at[..., rows, columns].set(tril) + eye
    factor = jnp.exp(-log_scale)[..., None] * factor
    observed = factor.mT @ factor
    cholesky = jnp.linalg.cholesky(precision + observed)
    pull = observed @ (loc - prior_loc)[..., None]
    pull = solve_triangular(cholesky.mT, solve_triangular(cholesky, pull, lower=True), lower=False)
    return prior_loc + pull[..., 0], cholesky


def pseudo_observations(
    x: Array, gradient: Array, curvature: Array, prior: Array, joint: bool
) -> tuple[Array, Array, Array]:
    """Location, log-scale and what stands below the diagonal where ``x`` has a likelihood's gradient and curvature.

    Where it is flat or convex, a hundredth of the prior's precision.
    """
    if not joint:
        curvature = curvature * jnp.eye(x.shape[-1], dtype=x.dtype)
    curvature = jnp.nan_to_num(curvature)
    values, vectors = jnp.linalg.eigh(0.5 * (curvature + curvature.mT))
    least = 1e-2 * jnp.diagonal(prior, 0, -2, -1).mean(-1) + 1e-3 * jnp.abs(values).max(-1) + 1e-6
    values = jnp.maximum(values, least[..., None])
    far = 10 / jnp.sqrt(values)  # no further, in standard deviations
    step = jnp.clip((vectors.mT @ gradient[..., None])[..., 0] / values, -far, far)
    loc = x + (vectors @ step[..., None])[..., 0]
    precision = (vectors * values[..., None, :]) @ vectors.mT
    factor = jnp.linalg.cholesky(precision[..., ::-1, ::-1])[..., ::-1, ::-1].mT  # lower, W^T W
    diagonal = jnp.diagonal(factor, 0, -2, -1)
    rows, columns = np.tril_indices(x.shape[-1], -1)
    return loc, -jnp.log(diagonal), (factor / diagonal[..., None])[..., rows, columns]
