"""The integral of a positive network (Wehenkel & Louppe 2019, Unconstrained monotonic neural networks)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.univariate.base import (
    Univariate,
    check_positive,
    constant,
    numerical_inverse,
    soft_clip,
    unit_quadrature,
)


@dataclass(frozen=True)
class MonotoneNetwork(Univariate):
    """``y = shift + scale * integral of f from 0 to x``, ``f(t) = exp(sum_k w_k tanh(s_k (t - c_k)))``.

    Wehenkel & Louppe 2019, eq. 1, with the integrand's weights as params. Outside ``[-bound, bound]`` the integrand is
    that of the nearer end, so the tails are exactly linear. The log-derivative is the integrand itself. The integral is
    by Gauss-Legendre quadrature over ``[0, x]``; as sharpness ``s <= max_sharpness`` and ``|log f| <= max_log_slope``
    are limited, its error is too: at the defaults, 5e-11 in the value and 5e-10 in its slope (both relative, at params
    of sd 3). The number of nodes for the same error grows as ``bound * max_sharpness``.

    Forward costs ``num_nodes`` passes through the integrand; the inverse is numerical.
    Params: ``num_units`` centres, sharpnesses and weights, log-scale and shift, all raw.

    :param num_units: width of the integrand's hidden layer.
    :param num_nodes: nodes of the quadrature.
    :param bound: half the width of the box.
    :param max_log_slope: limit of the integrand's logarithm, and of the log-scale.
    :param max_sharpness: limit of the units' sharpness; they start at half of it, and do not fall below a quarter.
    """

    num_units: int = 8
    num_nodes: int = 52
    bound: float = 5.0
    max_log_slope: float = 4.0
    max_sharpness: float = 2.0

    def __post_init__(self) -> None:
        check_positive("MonotoneNetwork", **vars(self))

    @property
    def num_params(self) -> int:
        return 3 * self.num_units + 2

    def _unpack(self, params: Tensor) -> tuple[Tensor, ...]:
        k = self.num_units
        raw_centers, raw_sharpness, raw_weights, raw_scale, shift = params.split([k, k, k, 1, 1], -2)
        edge = self.bound * (1 - 1 / k)
        centers = raw_centers + torch.linspace(-edge, edge, k, dtype=params.dtype, device=params.device).unsqueeze(-1)
        sharpness = (self.max_sharpness / 2) * soft_clip(raw_sharpness, math.log(2)).exp()
        limit = self.max_log_slope / k**0.5  # of the weights' norm: their absolute values sum to max_log_slope at most
        weights = limit * raw_weights * (1 + raw_weights.square().sum(-2, keepdim=True)).rsqrt()
        log_scale = soft_clip(raw_scale, self.max_log_slope)
        return centers, sharpness, weights, log_scale.squeeze(-2), shift.squeeze(-2)

    def _evaluate(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        centers, sharpness, weights, log_scale, shift = parts
        nodes, node_weights = (constant(part[:, None], x) for part in unit_quadrature(self.num_nodes))
        u = x.clamp(-self.bound, self.bound)
        t = torch.cat([u.unsqueeze(-2) * nodes, u.unsqueeze(-2)], -2)  # (..., num_nodes + 1, n)
        z = (t.unsqueeze(-2) - centers.unsqueeze(-3)) * sharpness.unsqueeze(-3)
        log_f = (weights.unsqueeze(-3) * z.tanh()).sum(-2)
        f = log_f.exp()
        integral = u * (f[..., :-1, :] * node_weights).sum(-2) + f[..., -1, :] * (x - u)
        return torch.addcmul(shift, log_scale.exp(), integral), log_scale + log_f[..., -1, :]

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluate(x, self._unpack(params))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._unpack(params)
        least = math.exp(-2 * self.max_log_slope)
        return numerical_inverse(lambda x: self._evaluate(x, parts), y, least, owner="MonotoneNetwork")
