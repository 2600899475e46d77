"""Centering read off the likelihood: latents relative to what the data say of them, given those that scale them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.initialization import Likelihood
from pyroflows.log_density import LogDensity
from pyroflows.noncentering import Noncentering, priors_at, unwrapped
from pyroflows.transform_module import TransformModule


class Centering(TransformModule):
    """Takes what the data say of latents with a fixed normal prior out of a guide's way; before :class:`Noncentering`.

    Of models that are non-centred by hand (``effect = tau * z`` with ``z ~ N(0, 1)``): the more the data say of the
    effects, the more the posterior of ``z`` is a funnel, for it is that of ``effect / tau``. The likelihood is taken
    for that of normal observations ``pseudo_data`` of ``w``, where ``u = loc + scale * (rotation @ w)``, each of a
    precision that the other latents ``h`` scale. With the standard normal prior of ``w``, its conditional posterior is
    the normal which standard normal elements ``x`` become by ::

        p = precision * exp(slopes @ (h - origin)),     y = pseudo_data * exp(-shifts @ (h - origin))
        s = (1 + p)^(-1/2),                             w = p s^2 y + s x

    It is exact where the likelihood is normal in ``tau * z`` and ``slopes`` is ``2``, ``shifts`` ``1`` at ``log tau``:
    what a conditional Laplace approximation gives (Rue et al. 2009, section 2.2), extrapolated in the latents which it
    is given. Where the data say nothing (``precision`` 0) an element passes, as all others do. Nothing is trained.

    Shapes: ``x`` and ``u`` ``(..., dim)``, log-determinants ``(...)``.

    :param dim: size of the latent vector. The layer begins as the identity.
    """

    rotation: Tensor  # (dim, dim), orthogonal
    loc: Tensor  # (dim,), of the prior, as its scale
    scale: Tensor
    precision: Tensor  # (dim,), in units of the prior's; 0 where an element passes
    pseudo_data: Tensor  # (dim,)
    origin: Tensor  # (dim,)
    slopes: Tensor  # (dim, dim), rows of elements that do not pass, columns of elements that pass; zero elsewhere
    shifts: Tensor

    def __init__(self, dim: int):
        super().__init__()
        for name in Likelihood._fields:
            square = name in ("rotation", "slopes", "shifts")
            value = torch.ones(dim) if name == "scale" else torch.zeros((dim, dim) if square else dim)
            self.register_buffer(name, torch.eye(dim) if name == "rotation" else value)

    def with_likelihood(self, likelihood: Likelihood) -> Centering:
        """This layer for what a likelihood amounts to (``initialization.conditional_likelihood``)."""
        new = copy.deepcopy(self)
        for name, part in likelihood._asdict().items():
            getattr(new, name).copy_(torch.as_tensor(part))
        return new

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, log_scale = self._conditional(x)
        y = self.loc + self.scale * ((centre + log_scale.exp() * x) @ self.rotation.mT)
        return y, (log_scale + self.scale.log()).sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w = ((y - self.loc) / self.scale) @ self.rotation
        centre, log_scale = self._conditional(w)
        return (w - centre) * (-log_scale).exp(), -(log_scale + self.scale.log()).sum(-1)

    def _conditional(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and logarithms of the scales of ``w``, given the elements of ``h`` that pass."""
        away = h - self.origin
        told = self.precision > 0
        log_precision = torch.where(told, self.precision, 1.0).log() + away @ self.slopes.mT
        # in one exponent: where the scale tends to zero, the precision does so faster than the datum grows
        centre = self.pseudo_data * (-F.softplus(-log_precision) - away @ self.shifts.mT).exp()
        return torch.where(told, centre, 0.0), torch.where(told, -0.5 * F.softplus(log_precision), 0.0)


COORDINATES = (Centering, Noncentering)  # the last layers of a guide, which take the model's own structure out of it


def normal_priors(log_density: LogDensity, trace: Any, points: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each element ``(dim,)``: location and scale of its prior, and the number of its latent, -1 unless that is one
    of several elements with a normal prior that depends on no other latent.

    :param log_density: the model, with its arguments, and the layout of its latent vector.
    :param trace: a trace of the model.
    :param points: unconstrained vectors ``(n, dim)`` at which it is seen which priors depend on other latents.
    """
    seen = priors_at(log_density, points)
    locs, scales, latents = [], [], []
    for number, (name, shape) in enumerate(log_density.shapes.items()):
        size, prior = shape.numel(), unwrapped(trace.nodes[name]["fn"])
        pair = tuple(a.double().numpy(force=True).reshape(len(points), -1) for a in seen.get(name, ()))
        normal = isinstance(prior, torch.distributions.Normal) and len(pair) == 2
        fixed = size > 1 and normal and not any(np.ptp(a, 0).any() for a in pair)
        locs.append(pair[0][0] if fixed else np.zeros(size))
        scales.append(pair[1][0] if fixed else np.ones(size))
        latents.append(np.full(size, number if fixed else -1))
    return np.concatenate(locs), np.concatenate(scales), np.concatenate(latents)
