"""Objectives of variational inference and their gradient estimators."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.distributions import Base, FlowDistribution, distribution_of
from pyroflows.transform_module import Compose, TransformModule, differentiable
from pyroflows.transforms import Continuous


def elbo_terms(
    transform: TransformModule,
    base: dist.TorchDistribution | Base,
    log_density: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    path: bool = False,
) -> Tensor:
    """``log p(u) - log q(u)`` at ``u = transform(x)``; its mean over ``x ~ base`` is the ELBO.

    :param transform: the flow from the base to the unconstrained latents.
    :param base: the distribution of ``x``, or a :class:`Base`, whose parameters are trained too.
    :param log_density: log-density of a batch ``(n, dim) -> (n,)``.
    :param x: base draws ``(n, dim)``.
    :param path: holds the parameters fixed in ``log q``, so that the gradient flows through the draws alone: still
        unbiased, and of vanishing variance as ``q`` approaches ``p`` (Roeder et al. 2017, eq. 8, "sticking the
        landing"). The score of ``q`` goes along with the draws (``forward_and_score``), at a conditioner's gradient a
        coupling.
    """
    if not path:
        u, log_det = transform.forward_and_log_det(x)
        return log_density(u) - distribution_of(base).log_prob(x) + log_det
    with torch.enable_grad():
        x = differentiable(x).view_as(x)  # a tensor of its own, at which the score's gradient ends
        log_base = distribution_of(base).log_prob(x)
        score = torch.autograd.grad(log_base.sum(), x)[0]
    u, log_det, score = transform.forward_and_score(x, score)
    log_q = log_base - log_det
    moved = (score * (u - u.detach())).sum(-1)  # zero; its gradient is that of log q by way of the draws
    return log_density(u) - log_q.detach() - moved


def unfolded(
    transform: TransformModule, base: dist.TorchDistribution | Base
) -> tuple[TransformModule, dist.TorchDistribution | Base]:
    """The same density, by the base of its base and the longer flow where its base is a flow itself."""
    distribution = distribution_of(base)
    if not (isinstance(distribution, FlowDistribution) and isinstance(distribution.transform, TransformModule)):
        return transform, base
    return Compose([distribution.transform, transform]), distribution.base_dist


def score_gradient(terms: Tensor, log_density: Tensor) -> Tensor:
    """A loss whose gradient is the negative ELBO's by the parameters of ``log_density``, with the mean as a baseline.

    Its variance vanishes as the terms become equal.

    :param terms: ``log p(u) - log q(u)`` ``(n,)``, held fixed.
    :param log_density: of the base's draws ``(n,)``, as ``Base.draw`` returns it.
    """
    centred = terms.detach() - terms.detach().mean()
    return -(centred * log_density).sum() / max(len(log_density) - 1, 1)


def flow_matching(
    flow: TransformModule, base: dist.TorchDistribution, data: Tensor, context: Tensor | None = None
) -> Tensor:
    """A loss that trains a continuous flow on data without solving its equation (Lipman et al. 2023, eq. 23).

    The mean of ``|v(x_t, t) - (data - x)|^2`` over ``x ~ base``, times ``t`` and the straight paths
    ``x_t = (1 - t) x + t data`` (the conditional optimal transport path). Costs one network pass. Its minimum is the
    velocity that carries the base to the data's density, not the one of largest likelihood within a small family.

    :param flow: a :class:`Continuous` map, or a stack of one.
    :param base: distribution of vectors ``(dim,)``.
    :param data: draws of the target ``(n, dim)``.
    :param context: their contexts ``(n, context_dim)``, if the flow takes one.
    """
    velocity, n = velocity_of(flow).velocity, len(data)
    x = base.sample((n,)).to(data)
    time = (torch.arange(n, device=data.device) + torch.rand(n, device=data.device)).to(data).unsqueeze(-1) / n
    rate, _ = velocity(time, (1 - time) * x + time * data, velocity.constants(context), None, False)
    return (rate - (data - x)).square().sum(-1).mean()


def velocity_of(flow: TransformModule) -> Continuous:
    """The one :class:`Continuous` map of ``flow``; a ``TypeError`` if it is something else."""
    if isinstance(flow, Compose) and len(flow.layers) == 1:
        return velocity_of(flow.layers[0])
    if not isinstance(flow, Continuous):
        raise TypeError(f"flow_matching: flow must be a single Continuous map, but got {type(flow).__name__}.")
    return flow
