"""The inverse normal CDF of a mixture's CDF (Meng et al. 2020, Gaussianization flows)."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array, lax

from numpyro_flows.univariate.base import Univariate, check_positive, log_sum_and_mean, numerical_inverse, soft_clip

SPREAD = 0.75  # of the means at the start: far enough apart for each component to learn a part of its own


class GaussianMixtureCDF(Univariate):
    """``T(x) = Phi^{-1}(sum_k w_k Phi((x - m_k) / s_k))``, relative to its start: it makes a mixture a normal.

    Meng et al. 2020, eq. 6, with normal instead of logistic kernels: the tails are linear then, of slope ``1 / s`` of
    the widest component. All is in terms of the logarithm of the smaller tail, so nothing saturates: float32 holds to
    |x| = 100 and beyond. With ``T_0`` that of params of zero, whose slope is at most one, the map is::

        y = x + (1 - min_slope) (T(x) - T_0(x)),

    which has slope ``min_slope`` at least (``T`` alone is flat between components far apart), and is the identity at
    the start though the components are not alike there (equal ones would have equal gradients, and stay equal).

    Forward costs two mixtures; the inverse is numerical. Params: ``num_components`` weight logits, means, log-scales.

    :param num_components: number of components.
    :param max_log_scale: limit of the components' log-scales.
    :param min_slope: least slope of the map, less than 1.
    """

    num_components: int = eqx.field(static=True, default=8)
    max_log_scale: float = eqx.field(static=True, default=2.0)
    min_slope: float = eqx.field(static=True, default=0.02)

    def __check_init__(self) -> None:
        check_positive("GaussianMixtureCDF", **vars(self))

    @property
    def num_params(self) -> int:
        return 3 * self.num_components

    def _gaussianize(self, x: Array, params: Array) -> tuple[Array, Array]:
        """``T(x)`` and its slope."""
        logits, raw_means, raw_scales = jnp.split(params, 3, -2)
        start = jnp.linspace(-SPREAD, SPREAD, self.num_components, dtype=x.dtype)[:, None]
        log_weights = jax.nn.log_softmax(logits, -2)
        precision = jnp.exp(-soft_clip(raw_scales, self.max_log_scale))
        z = (x[..., None, :] - raw_means - start) * precision
        left = z < 0
        distance = jnp.where(left, -z, z)
        scaled = _scaled_tail(distance)
        log_tail = jnp.log(scaled) - jnp.square(distance) / 2
        tail = jnp.exp(log_tail)  # Phi(-|z|)
        # on which side of the median, so which tail of the mixture is the smaller one
        right = (jnp.exp(log_weights) * jnp.where(left, tail, 1 - tail)).sum(-2) > 0.5
        outer = left ^ right[..., None, :]  # components whose own tail on that side is the smaller one
        log_part = jnp.where(outer, log_tail, jnp.log1p(-tail))
        # density over tail, without the exponentials that cancel
        hazard = jnp.where(outer, 1.0, tail / (1 - tail)) * precision / scaled
        log_total, mean_hazard = log_sum_and_mean(log_weights + log_part, hazard)
        t = _tail_quantile(log_total)
        return jnp.where(right, t, -t), mean_hazard * _scaled_tail(t)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        both = jnp.stack([params, jnp.zeros_like(params)])  # in one graph: it is a long one to compile
        (value, value_0), (slope, slope_0) = jax.vmap(self._gaussianize, (None, 0))(x, both)
        y = x + (1 - self.min_slope) * (value - value_0)
        return y, jnp.log1p((1 - self.min_slope) * (slope - slope_0))

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
        return numerical_inverse(
            lambda x: self.forward_and_log_det(x, params), y, self.min_slope, owner="GaussianMixtureCDF"
        )


def _erfcx_series() -> list[float]:
    """Coefficients of ``(1 + 2 u) erfcx(u)`` in powers of ``(u - 3.75) / (u + 3.75)``: for ``u >= 0``, to 4e-15."""

    def scaled(t):
        u = 3.75 * (1 + t) / (1 - t)
        return (1 + 2 * u) * scipy.special.erfcx(u)

    chebyshev = np.polynomial.chebyshev.chebinterpolate(scaled, 20)
    return np.polynomial.chebyshev.cheb2poly(chebyshev).tolist()


SERIES = _erfcx_series()


@jax.custom_jvp
def _scaled_tail(t: Array) -> Array:
    """``Phi(-t) exp(t^2 / 2)``.

    jax's own erfcx is zero about 26.5, in float32 between 9.2 and 16, and takes long to compile.
    """
    u = t * math.sqrt(0.5)
    place = (u - 3.75) / (u + 3.75)
    value = jnp.full_like(u, SERIES[-1])
    for coefficient in SERIES[-2::-1]:
        value = coefficient + value * place
    return 0.5 * value / (1 + 2 * u)


@_scaled_tail.defjvp
def _scaled_tail_jvp(primals, tangents):
    (t,) = primals
    scaled = _scaled_tail(t)
    return scaled, (t * scaled - math.sqrt(0.5 / math.pi)) * tangents[0]


@jax.custom_jvp
def _tail_quantile(log_tail: Array) -> Array:
    """``t >= 0`` with ``log Phi(-t) = log_tail``, by Newton's steps: as the left side is concave, they converge."""

    def step(_, t):
        scaled = _scaled_tail(t)
        return t + (jnp.log(scaled) - jnp.square(t) / 2 - log_tail) * scaled * math.sqrt(2 * math.pi)

    return lax.fori_loop(0, 6, step, jnp.sqrt(jnp.maximum(-2 * (log_tail + math.log(2)), 1e-6)))


@_tail_quantile.defjvp
def _tail_quantile_jvp(primals, tangents):
    t = _tail_quantile(*primals)
    return t, -math.sqrt(2 * math.pi) * _scaled_tail(t) * tangents[0]
