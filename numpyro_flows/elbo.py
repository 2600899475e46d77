"""Gradient estimators of the evidence lower bound."""

from __future__ import annotations

from collections.abc import Callable

import numpyro.distributions as dist
from jax import Array, lax

from numpyro_flows.transform_module import TransformModule


def elbo_terms(
    transform: TransformModule,
    base: dist.Distribution,
    log_density: Callable[[Array], Array],
    x: Array,
    path: bool = False,
) -> Array:
    """``log p(u) - log q(u)`` at ``u = transform(x)``; its mean over ``x ~ base`` is the ELBO.

    :param transform: the flow from the base to the unconstrained latents.
    :param base: the distribution of ``x``.
    :param log_density: log-density of a batch ``(n, dim) -> (n,)``.
    :param x: base draws ``(n, dim)``.
    :param path: holds the parameters fixed in ``log q``, so that the gradient flows through the draws alone: still
        unbiased, and of vanishing variance as ``q`` approaches ``p`` (Roeder et al. 2017, eq. 8, "sticking the
        landing"). Costs one inverse pass.
    :returns: the terms ``(n,)``.
    """
    u, log_det = transform.forward_and_log_det(x)
    if path:
        z, inverse_log_det = lax.stop_gradient(transform).inverse_and_log_det(u)
        log_q = base.log_prob(z) + inverse_log_det
    else:
        log_q = base.log_prob(x) - log_det
    return log_density(u) - log_q
