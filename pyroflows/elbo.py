"""Objectives of variational inference and their gradient estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.transform_module import TransformModule

_LARGEST_WEIGHT = 8.0  # of an importance weight, in means


def elbo_terms(
    transform: TransformModule,
    base: dist.TorchDistribution,
    log_density: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    path: bool = False,
) -> tuple[Tensor, Tensor]:
    """``log p(u) - log q(u)`` at ``u = transform(x)``; its mean over ``x ~ base`` is the ELBO.

    :param transform: the flow from the base to the unconstrained latents.
    :param base: the distribution of ``x``.
    :param log_density: log-density of a batch ``(n, dim) -> (n,)``.
    :param x: base draws ``(n, dim)``.
    :param path: holds the parameters fixed in ``log q``, so that the gradient flows through the draws alone: still
        unbiased, and of vanishing variance as ``q`` approaches ``p`` (Roeder et al. 2017, eq. 8, "sticking the
        landing"). Costs one inverse pass.
    :returns: the terms ``(n,)`` and the draws ``u`` ``(n, dim)``.
    """
    u, log_det = transform.forward_and_log_det(x)
    if path:
        with _held_fixed(transform):
            log_q = _log_prob(transform, base, u)
    else:
        log_q = base.log_prob(x) - log_det
    return log_density(u) - log_q, u


def forward_kl(transform: TransformModule, base: dist.TorchDistribution, u: Tensor, log_ratios: Tensor) -> Tensor:
    """A loss whose gradient estimates that of ``KL(p || q)``, by truncated self-normalised importance weights.

    The ELBO says little about the tails of ``q``; this says that ``q`` must not be small where ``p`` is not, which is
    what keeps importance weights bounded. No weight counts for more than eight times the mean one (Ionides 2008,
    truncated importance sampling), or single draws would rule the steps. The mean of ``log q``, whose gradient has
    expectation zero, is a control variate: the gradient vanishes where the weights are equal. Costs one inverse pass.

    :param u: draws of ``q`` ``(n, dim)``, held fixed.
    :param log_ratios: ``log p(u) - log q(u)`` ``(n,)``, held fixed.
    """
    log_q = _log_prob(transform, base, u.detach())
    weights = torch.softmax(log_ratios.detach(), 0).clamp_max(_LARGEST_WEIGHT / len(log_q))
    return log_q.mean() - (weights * log_q).sum() / weights.sum()


def _log_prob(transform: TransformModule, base: dist.TorchDistribution, u: Tensor) -> Tensor:
    x, log_det = transform.inverse_and_log_det(u)
    return base.log_prob(x) + log_det


@contextmanager
def _held_fixed(transform: TransformModule) -> Iterator[None]:
    """Parameters are constants in the graph that is built inside."""
    trainable = [p for p in transform.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
