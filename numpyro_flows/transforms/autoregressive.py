"""Masked autoregressive maps (Kingma et al. 2016, IAF; Papamakarios et al. 2017, MAF)."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from numpyro_flows.conditioners import MaskedMLP
from numpyro_flows.numerical import triangular_fixed_point
from numpyro_flows.transform_module import TransformModule
from numpyro_flows.univariate import Univariate


class Autoregressive(TransformModule):
    """``y_i = g(x_i; theta_i(x_1 .. x_{i-1}, context))``: a triangular Jacobian.

    Forward takes one network pass. The inverse takes sweeps of one pass each, of which every one makes one more element
    exact: ``dim`` at most, in many dimensions far fewer, since they end where nothing moves any more; its gradient is
    that of the implicit function. As written it is an IAF layer; :class:`~numpyro_flows.Inverse` turns it into a MAF
    layer.

    :param dim: size of ``x``.
    :param univariate: the elementwise map ``g``.
    :param hidden_dims: hidden widths of the masked conditioner.
    :param context_dim: size of the context, 0 for none.
    :param reverse: returns ``y`` in reversed order, so that equal layers alternate the ordering.
    :param ordering: the elements ``0 .. dim - 1`` from the first to the last in the chain: ``y_i`` depends on ``x_i``
        and on the elements named before ``i``. The natural order unless given.
    :param activation: the conditioner's activation.
    """

    conditioner: MaskedMLP
    univariate: Univariate
    dim: int = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        reverse: bool = True,
        activation: str = "silu",
        ordering: Sequence[int] | None = None,
        key: Array,
    ):
        self.dim, self.univariate, self.reverse = dim, univariate, reverse
        num_params, num_features = univariate.num_params, univariate.num_features
        self.conditioner = MaskedMLP(
            dim, hidden_dims, num_params, context_dim, activation, num_features, ordering, key=key
        )

    @property
    def passes(self) -> tuple[int, int]:
        return 1, self.dim

    def _params(self, x: Array, context: Array | None) -> Array:
        theta = self.conditioner(self.univariate.features(x), context)
        return theta.reshape(*theta.shape[:-1], self.univariate.num_params, self.dim)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        y, log_det = self.univariate.forward_and_log_det(x, self._params(x, context))
        return y[..., ::-1] if self.reverse else y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        if self.reverse:
            y = y[..., ::-1]
        if context is not None:
            y = jnp.broadcast_to(y, jnp.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])

        def sweep(x):
            return self.univariate.inverse_and_log_det(y, self._params(x, context))

        # the parameters of the last element need all elements but itself
        x = triangular_fixed_point(lambda x: sweep(x)[0], y, self.dim - 1)
        x, log_det = sweep(x)
        return x, log_det.sum(-1)
