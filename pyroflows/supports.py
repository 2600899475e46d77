"""Supports of priors which torch takes for the whole space."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import ComposeTransform, biject_to, constraints, transform_to

WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, dist.torch_distribution.ExpandedDistribution)
_ANGLE = constraints.interval(-math.pi, math.pi)


class Supported(Messenger):
    """Runs a model with latents that tell their support: ``Supported()(model)``, see :func:`supported`."""

    def _pyro_sample(self, msg: dict) -> None:
        if not msg["is_observed"]:
            msg["fn"] = supported(msg["fn"])


def supported(fn: Any) -> Any:
    """A distribution with the support that it has, where torch says that it has all numbers; else itself.

    ``TransformedDistribution(Beta(2, 2), AffineTransform(-1, 2))`` lies between -1 and 1, for one, and an angle is one
    between -pi and pi: over all numbers its density has no end.
    """
    if isinstance(fn, WRAPPERS):
        return _with_base(fn, supported(fn.base_dist))
    if type(fn) in _TRANSFORMED:
        fn = _with_base(fn, supported(fn.base_dist))
        whole = _is_whole(fn.transforms[0].domain) and not _is_whole(fn.base_dist.support)
        return _as(_Image, fn) if whole and all(t.bijective for t in fn.transforms) else fn
    return _as(_ANGLES[type(fn)], fn) if type(fn) in _ANGLES else fn


def _with_base(fn: Any, base: Any) -> Any:
    if base is not fn.base_dist:
        fn = copy.copy(fn)
        fn.base_dist = base
    return fn


def _as(kind: type, fn: Any) -> Any:
    fn = copy.copy(fn)
    fn.__class__ = kind
    return fn


def _is_whole(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


class _Image(dist.TransformedDistribution):
    @property
    def support(self) -> constraints.Constraint:
        return _ImageOf(self.base_dist.support, self.transforms, self.event_dim)


class _ImageOf(constraints.Constraint):
    """The image of a set under transforms."""

    def __init__(self, base: constraints.Constraint, transforms: list, event_dim: int):
        self.base, self.transforms, self._event_dim = base, transforms, event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        inside = self.base.check(ComposeTransform(self.transforms).inv(value))
        return inside.flatten(-rank).all(-1) if (rank := inside.dim() - value.dim() + self.event_dim) else inside


@transform_to.register(_ImageOf)
@biject_to.register(_ImageOf)
def _onto_image(constraint: _ImageOf) -> ComposeTransform:
    return ComposeTransform([biject_to(constraint.base), *constraint.transforms])


class _VonMises(dist.VonMises):
    support = _ANGLE


class _SineBivariateVonMises(dist.SineBivariateVonMises):
    support = constraints.independent(_ANGLE, 1)


class _SineSkewed(dist.SineSkewed):
    support = constraints.independent(_ANGLE, 1)


_TRANSFORMED = {torch.distributions.TransformedDistribution, dist.TransformedDistribution}
_ANGLES = {
    **{dist.VonMises: _VonMises, torch.distributions.VonMises: _VonMises},
    **{dist.SineBivariateVonMises: _SineBivariateVonMises, dist.SineSkewed: _SineSkewed},
}
