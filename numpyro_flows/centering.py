"""Centering read off the likelihood: latents relative to what the data say of them, given those that scale them."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro import distributions as dist

from numpyro_flows.initialization import Likelihood
from numpyro_flows.log_density import LogDensity
from numpyro_flows.noncentering import Noncentering, priors_at, unwrapped
from numpyro_flows.programs import Programs
from numpyro_flows.transform_module import TransformModule, full_precision


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

    rotation: Array  # (dim, dim), orthogonal
    loc: Array  # (dim,), of the prior, as its scale
    scale: Array
    precision: Array  # (dim,), in units of the prior's; 0 where an element passes
    pseudo_data: Array  # (dim,)
    origin: Array  # (dim,)
    slopes: Array  # (dim, dim), rows of elements that do not pass, columns of elements that pass; zero elsewhere
    shifts: Array

    def __init__(self, dim: int):
        zeros, square = jnp.zeros(dim), jnp.zeros((dim, dim))
        self.rotation, self.loc, self.scale = jnp.eye(dim), zeros, jnp.ones(dim)
        self.precision = self.pseudo_data = self.origin = zeros
        self.slopes = self.shifts = square

    def with_likelihood(self, likelihood: Likelihood) -> Centering:
        """This layer for what a likelihood amounts to (``initialization.conditional_likelihood``)."""
        dtype = self.loc.dtype
        new = tuple(jnp.asarray(part, dtype) for part in likelihood)
        return eqx.tree_at(lambda layer: tuple(getattr(layer, name) for name in Likelihood._fields), self, new)

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        fixed = lax.stop_gradient(self)
        centre, log_scale = fixed._conditional(x)
        y = fixed.loc + fixed.scale * ((centre + jnp.exp(log_scale) * x) @ fixed.rotation.T)
        return y, (log_scale + jnp.log(fixed.scale)).sum(-1)

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        fixed = lax.stop_gradient(self)
        w = ((y - fixed.loc) / fixed.scale) @ fixed.rotation
        centre, log_scale = fixed._conditional(w)
        return (w - centre) * jnp.exp(-log_scale), -(log_scale + jnp.log(fixed.scale)).sum(-1)

    def _conditional(self, h: Array) -> tuple[Array, Array]:
        """Locations and logarithms of the scales of ``w``, given the elements of ``h`` that pass."""
        away = h - self.origin
        told = self.precision > 0
        log_precision = jnp.log(jnp.where(told, self.precision, 1.0)) + away @ self.slopes.T
        # in one exponent: where the scale tends to zero, the precision does so faster than the datum grows
        centre = self.pseudo_data * jnp.exp(-jax.nn.softplus(-log_precision) - away @ self.shifts.T)
        return jnp.where(told, centre, 0.0), jnp.where(told, -0.5 * jax.nn.softplus(log_precision), 0.0)


COORDINATES = (Centering, Noncentering)  # the last layers of a guide, which take the model's own structure out of it


def normal_priors(
    log_density: LogDensity, trace: Any, points: Array, programs: Programs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each element ``(dim,)``: location and scale of its prior, and the number of its latent, -1 unless that is one
    of several elements with a normal prior that depends on no other latent.

    :param log_density: the model, with its arguments, and the layout of its latent vector.
    :param trace: a trace of the model.
    :param points: unconstrained vectors ``(n, dim)`` at which it is seen which priors depend on other latents.
    :param programs: where what that takes is compiled.
    """
    seen = programs(priors_at, log_density, points)
    locs, scales, latents = [], [], []
    for number, (name, shape) in enumerate(log_density.shapes):
        size, prior = math.prod(shape), unwrapped(trace[name]["fn"])
        pair = tuple(np.asarray(a, float).reshape(len(points), -1) for a in seen.get(name, ()))
        normal = isinstance(prior, dist.Normal) and len(pair) == 2
        fixed = size > 1 and normal and not any(np.ptp(a, 0).any() for a in pair)
        locs.append(pair[0][0] if fixed else np.zeros(size))
        scales.append(pair[1][0] if fixed else np.ones(size))
        latents.append(np.full(size, number if fixed else -1))
    return np.concatenate(locs), np.concatenate(scales), np.concatenate(latents)
