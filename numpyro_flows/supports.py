"""Supports of priors which NumPyro takes for the whole space."""

from __future__ import annotations

import copy
from typing import Any

import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import ComposeTransform
from numpyro.primitives import Messenger

WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


class Supported(Messenger):
    """Runs a model with latents that tell their support: ``Supported(model)``, see :func:`supported`."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = supported(msg["fn"])


def supported(fn: Any) -> Any:
    """A distribution with the support that it has, where NumPyro says that it has all numbers; else itself.

    ``TransformedDistribution(Beta(2, 2), AffineTransform(-1, 2))`` lies between -1 and 1, for one: NumPyro asks for a
    ``domain=constraints.unit_interval`` of its transform.
    """
    if isinstance(fn, WRAPPERS):
        return _with_base(fn, supported(fn.base_dist))
    if type(fn) is dist.TransformedDistribution:
        fn = _with_base(fn, supported(fn.base_dist))
        if _is_whole(fn.transforms[0].domain) and not _is_whole(fn.base_dist.support):
            fn = copy.copy(fn)
            fn.__class__ = _Image
    return fn


def _with_base(fn: Any, base: Any) -> Any:
    if base is not fn.base_dist:
        fn = copy.copy(fn)
        fn.base_dist = base
    return fn


def _is_whole(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


class _Image(dist.TransformedDistribution):
    @property
    def support(self) -> constraints.Constraint:
        return _ImageOf(self.base_dist.support, ComposeTransform(self.transforms), self.event_dim)


class _ImageOf(constraints.Constraint):
    """The image of a set under a transform."""

    def __init__(self, base: constraints.Constraint, transform: ComposeTransform, event_dim: int):
        self.base, self.transform, self._event_dim = base, transform, event_dim

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self._event_dim

    def __call__(self, x: Any) -> Array:
        return self.base(self.transform.inv(x))

    def feasible_like(self, prototype: Any) -> Array:
        return self.transform(self.base.feasible_like(prototype))

    def tree_flatten(self) -> Any:
        return (self.base, self.transform), (("base", "transform"), {"_event_dim": self._event_dim})


@biject_to.register(_ImageOf)
def _onto_image(constraint: _ImageOf) -> ComposeTransform:
    return ComposeTransform([biject_to(constraint.base), *constraint.transform.parts])
