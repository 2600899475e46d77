"""A flow as a density: base distribution and transform, fused."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.transform_module import Conditioned, TransformModule


class FlowDistribution(dist.TransformedDistribution):
    """The density of ``y = transform(x)``, ``x ~ base``: ``log p(y) = log p(x) - log |det dy/dx|``.

    A ``TransformedDistribution`` that takes one pass where torch's takes two: a density at given points inverts and
    scores together, and a sample brings its own density along.

    :param base: distribution over vectors ``(..., dim)`` (``event_dim`` 1).
    :param transform: a :class:`TransformModule`, conditioned if it needs a context.
    """

    def __init__(
        self,
        base: dist.TorchDistribution,
        transform: TransformModule | Conditioned,
        *,
        validate_args: bool | None = None,
    ):
        if not isinstance(transform, TransformModule | Conditioned):
            raise TypeError(
                f"FlowDistribution: transform must be a TransformModule, but got {type(transform).__name__}. "
                "Use pyro.distributions.TransformedDistribution for Pyro's own transforms."
            )
        super().__init__(base, [transform], validate_args=validate_args)

    @property
    def transform(self) -> TransformModule | Conditioned:
        return self.transforms[0]

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> FlowDistribution:
        base = self.base_dist.expand(torch.Size(batch_shape))
        return type(self)(base, self.transform, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x = self.transform._inv_call(value)  # with a value of our own making, both steps are look-ups
        return self.base_dist.log_prob(x) - self.transform.log_abs_det_jacobian(x, value)

    def sample_and_log_prob(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Reparameterised draws ``(*sample_shape, ..., dim)`` and their log-densities in one pass."""
        x = self.base_dist.rsample(torch.Size(sample_shape))
        y, log_det = self.transform.forward_and_log_det(x)
        return y, self.base_dist.log_prob(x) - log_det
