"""What every univariate map provides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyroflows.numerical import monotone_root


class Univariate:
    """A monotone map of the real line whose parameters are given from outside; it holds none itself.

    Shapes: ``x`` ``(..., n)``, ``params`` ``(..., num_params, n)``, values and log-derivatives ``(..., n)``. The
    parameters' axis is the second to last, so that sums over it run over contiguous columns. Any real ``params`` are
    valid; all zeros give the identity.
    """

    num_features = 1  # of an element, for a conditioner
    straight = False  # whether the slope is the same at every x

    @property
    def num_params(self) -> int:
        """Parameters per element."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``y = g(x; params)`` and ``log dy/dx``, elementwise."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` with ``g(x; params) = y`` and ``log dx/dy``, elementwise."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """What a conditioner sees of ``x``: ``(..., num_features * n)``, laid out as ``(num_features, n)``."""
        return x


def pushed_score(univariate: Univariate, x: Tensor, log_slope: Tensor, score: Tensor) -> Tensor:
    """What a score at ``x`` becomes at ``y``, elementwise: ``(score - d log_slope / dx) / slope``."""
    if not univariate.straight:
        score = score - torch.autograd.grad(log_slope.sum(), x, retain_graph=True)[0]
    return score * (-log_slope.detach()).exp()


def soft_clip(x: Tensor, limit: float) -> Tensor:
    """``x`` smoothly limited to ``(-limit, limit)``, with slope one at zero: ``limit * tanh(x / limit)``."""
    gate = (x * (2 / limit)).sigmoid_()  # torch's sigmoid is its faster tanh
    if torch.is_grad_enabled():
        return torch.rsub(gate, -limit, alpha=-2 * limit)
    return gate.mul_(2 * limit).sub_(limit)  # the pages of another large array cost more than that


def numerical_inverse(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, min_slope: float, owner: str
) -> tuple[Tensor, Tensor]:
    """Inverts ``x -> (g(x), log g'(x))`` where ``g' >= min_slope > 0``; returns ``x`` and ``log dx/dy``.

    The bound of the slope gives the root's bracket.
    """
    with torch.no_grad():
        reach = (y - function(torch.zeros_like(y))[0]) * (1.01 / min_slope)
    x = monotone_root(function, y.expand(reach.shape), reach.clamp_max(0), reach.clamp_min(0), owner=owner)
    return x, -function(x)[1]


def log_sum_and_mean(log_weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``log sum_k exp(log_weights_k)`` and the mean of ``values`` by those weights, over the second-to-last axis."""
    top = log_weights.detach().amax(-2, keepdim=True)
    weights = torch.exp(log_weights - top)
    total = weights.sum(-2)
    return top.squeeze(-2) + total.log(), (weights * values).sum(-2) / total


def constant(values: np.ndarray, like: Tensor) -> Tensor:
    """``values`` in the dtype and on the device of ``like``, without waiting for the device."""
    return torch.tensor(values.tolist(), dtype=like.dtype).to(like.device, non_blocking=True)


def unit_quadrature(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss-Legendre rule on ``[0, 1]``: exact for polynomials of degree 2 num_nodes - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (nodes + 1) / 2, weights / 2


def check_positive(owner: str, **arguments: float) -> None:
    """Raises a ``ValueError`` that names the argument which is not positive."""
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{owner}: {name} must be positive, but got {value}.")
