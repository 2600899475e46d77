"""What every univariate map provides."""

from __future__ import annotations

import equinox as eqx
from jax import Array, lax


class Univariate(eqx.Module):
    """A monotone map of the real line whose parameters are given from outside; it holds none itself.

    Shapes: ``x`` ``(..., n)``, ``params`` ``(..., num_params, n)``, values and log-derivatives ``(..., n)``. The
    parameters' axis is the second to last, so that sums over it run over contiguous columns. Any real ``params`` are
    valid; all zeros give the identity.
    """

    num_features = 1  # of an element, for a conditioner

    @property
    def num_params(self) -> int:
        """Parameters per element."""
        raise NotImplementedError

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        """Returns ``y = g(x; params)`` and ``log dy/dx``, elementwise."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        """Returns ``x`` with ``g(x; params) = y`` and ``log dx/dy``, elementwise."""
        raise NotImplementedError

    def features(self, x: Array) -> Array:
        """What a conditioner sees of ``x``: ``(..., num_features * n)``, laid out as ``(num_features, n)``."""
        return x


def soft_clip(x: Array, limit: float) -> Array:
    """``x`` smoothly limited to ``(-limit, limit)``, with slope one at zero: ``x / sqrt(1 + (x / limit)^2)``."""
    return x * lax.rsqrt(1 + x * x * limit**-2)
