"""What every univariate map provides."""

from __future__ import annotations

from torch import Tensor


class Univariate:
    """A monotone map of the real line whose parameters are given from outside; it holds none itself.

    Shapes: ``x`` ``(..., n)``, ``params`` ``(..., num_params, n)``, values and log-derivatives ``(..., n)``. The
    parameters' axis is the second to last, so that sums over it run over contiguous columns. Any real ``params`` are
    valid; all zeros give the identity.
    """

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
