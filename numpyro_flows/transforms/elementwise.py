"""Maps that act on each element alone."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from numpyro_flows.conditioners import MLP
from numpyro_flows.transform_module import TransformModule, with_axes_of
from numpyro_flows.univariate import Univariate
from numpyro_flows.univariate.base import pushed_score


class Elementwise(TransformModule):
    """``y_i = g(x_i; theta_i(context))``; without a context, ``theta`` is a free parameter.

    :param dim: size of ``x``.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the conditioner, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param activation: the conditioner's activation.
    """

    params: Array
    conditioner: MLP | None
    univariate: Univariate
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
        key: Array | None = None,
    ):
        self.dim, self.univariate = dim, univariate
        self.params = jnp.zeros((univariate.num_params, dim))
        self.conditioner = None
        if context_dim:
            if key is None:
                raise ValueError("Elementwise: key= is needed to initialise the conditioner of a context.")
            out_dim = univariate.num_params * dim
            self.conditioner = MLP(0, hidden_dims, out_dim, context_dim, activation, key=key)

    def _params(self, x: Array, context: Array | None) -> Array:
        if self.conditioner is None:
            return self.params
        theta = self.conditioner(x[..., :0], context)
        return self.params + theta.reshape(*theta.shape[:-1], *self.params.shape)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_det = self.univariate.forward_and_log_det(x, self._params(x, context))
        return y, jnp.broadcast_to(log_det, y.shape).sum(-1)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        x, log_det = self.univariate.inverse_and_log_det(y, self._params(y, context))
        return x, jnp.broadcast_to(log_det, x.shape).sum(-1)

    def forward_and_score(self, x: Array, score: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        x, score = with_axes_of(context, x, score)
        params = self._params(x, context)
        y, log_slope = self.univariate.forward_and_log_det(x, params)
        score = pushed_score(self.univariate, x, params, score)
        return y, jnp.broadcast_to(log_slope, y.shape).sum(-1), score


class ElementwiseAffine(TransformModule):
    """``y = loc + scale * x`` with free location and positive scale (stored as ``log_scale``).

    :param dim: size of ``x``.
    :param loc: first location ``(dim,)``; zeros unless given.
    :param scale: first scale, positive, ``(dim,)`` or a scalar; ones unless given.
    """

    loc: Array
    log_scale: Array
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, loc: Array | None = None, scale: Array | float | None = None):
        self.dim = dim
        self.loc = jnp.zeros(dim) if loc is None else jnp.asarray(loc)
        scale = jnp.ones((), self.loc.dtype) if scale is None else jnp.asarray(scale, self.loc.dtype)
        self.log_scale = jnp.broadcast_to(jnp.log(scale), (dim,))

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.loc + jnp.exp(self.log_scale) * x, jnp.broadcast_to(self.log_scale.sum(-1), x.shape[:-1])

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return (y - self.loc) * jnp.exp(-self.log_scale), jnp.broadcast_to(-self.log_scale.sum(-1), y.shape[:-1])
