"""Shift, and shift with scale (Dinh et al. 2015, NICE; Dinh et al. 2017, Density estimation using Real NVP)."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from numpyro_flows.univariate.base import Univariate, soft_clip


class Additive(Univariate):
    """``y = x + shift``: volume preserving (Dinh et al. 2015, eq. 4). Params: shift."""

    straight = True

    @property
    def num_params(self) -> int:
        return 1

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        y = x + params[..., 0, :]
        return y, jnp.zeros_like(y)

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        x = y - params[..., 0, :]
        return x, jnp.zeros_like(x)


class Affine(Univariate):
    """``y = x * exp(log_scale) + shift`` (Dinh et al. 2017, eq. 7). Params: shift, raw log-scale.

    The log-scale is the raw one softly limited to ``+-max_log_scale``: smooth, and of slope one at zero, so that no
    sample and no gradient can explode.
    """

    max_log_scale: float = eqx.field(static=True, default=3.0)
    straight = True

    @property
    def num_params(self) -> int:
        return 2

    def _unpack(self, params: Array) -> tuple[Array, Array]:
        # the gradient of a split joins its parts, where those of slices would be padded and added
        shift, raw = (part.squeeze(-2) for part in jnp.split(params, 2, axis=-2))
        return shift, soft_clip(raw, self.max_log_scale)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        shift, log_scale = self._unpack(params)
        return x * jnp.exp(log_scale) + shift, log_scale

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        shift, log_scale = self._unpack(params)
        return (y - shift) * jnp.exp(-log_scale), -log_scale
