"""A flow as a density: base distribution and transform, fused."""

from __future__ import annotations

from typing import Any

import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.util import validate_sample

from numpyro_flows.transform_module import TransformModule


class FlowDistribution(dist.TransformedDistribution):
    """The density of ``y = transform(x)``, ``x ~ base``: ``log p(y) = log p(x) - log |det dy/dx|``.

    A NumPyro ``TransformedDistribution`` that takes one pass where NumPyro's takes two: a density at given points
    inverts and scores together, and a sample brings its own density along.

    :param base: distribution over vectors ``(..., dim)`` (``event_dim`` 1).
    :param transform: a :class:`TransformModule`, conditioned if it needs a context.
    """

    def __init__(self, base: dist.Distribution, transform: TransformModule, *, validate_args: bool | None = None):
        if not isinstance(transform, TransformModule):
            raise TypeError(
                f"FlowDistribution: transform must be a TransformModule, but got {type(transform).__name__}. "
                "Use numpyro.distributions.TransformedDistribution for NumPyro's own transforms."
            )
        super().__init__(base, [transform], validate_args=validate_args)

    @property
    def transform(self) -> Any:
        return self.transforms[0]

    @validate_sample
    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        if intermediates:
            ((x, log_det),) = intermediates
            return self.base_dist.log_prob(x) - log_det
        x, log_det = self.transform.inverse_and_log_det(value)
        return self.base_dist.log_prob(x) + log_det

    def sample_and_log_prob(self, key: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
        """Draws ``(*sample_shape, ..., dim)`` and their log-densities in one pass."""
        x = self.base_dist.sample(key, sample_shape)
        y, log_det = self.transform.forward_and_log_det(x)
        return y, self.base_dist.log_prob(x) - log_det
