"""Block neural autoregressive flow (De Cao et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.conditioners import MLP
from pyroflows.numerical import monotone_root
from pyroflows.transform_module import TransformModule
from pyroflows.transforms.planar import expm1_asinh, slope
from pyroflows.univariate.base import soft_clip

_MAX_LOG_GAIN = 3.0


class BlockAutoregressive(TransformModule):
    """``y = f(x)`` for one network ``f`` whose weights are block triangular, with positive blocks on the diagonal.

    Element ``i`` owns ``factor`` units of each hidden layer; they see those of the elements up to ``i`` and are
    increasing in ``x_i`` (section 3). The weights of a diagonal block are a softmax along each row times the row's
    gain, and the activation is ``h + m tanh(h + b)`` with a trainable ``m > -1`` a unit: increasing and *unbounded*,
    so that the image is the whole space (with the paper's ``tanh`` it is nearly a box, which truncates posteriors).
    Zero ``m`` and zero weights off the diagonal are the identity: the start.

    ``dy_i/dx_i`` is a product along the diagonal blocks (section 3.2), of which one logarithm is taken.
    Forward costs one masked network pass, ``O((dim factor)^2)``. The inverse finds ``dim`` scalar roots, one after the
    other; each evaluates one diagonal chain, ``O(factor^2)``, some ten times, so that all together cost a few passes of
    the network.

    :param dim: size of ``x``.
    :param hidden_factors: units an element in each hidden layer.
    :param hidden_dims: hidden widths of the conditioner of the gains, ``m`` and biases, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param reverse: returns ``y`` in reversed order, so that equal layers alternate the ordering.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    def __init__(
        self,
        dim: int,
        hidden_factors: Sequence[int] = (8, 8),
        *,
        hidden_dims: Sequence[int] = (32, 32),
        context_dim: int = 0,
        reverse: bool = False,
        activation: str = "silu",
    ):
        super().__init__()
        self.dim, self.reverse, self.factors = dim, reverse, check_factors(hidden_factors)
        self.weights, self.units = nn.ParameterList(), nn.ParameterList()
        index = torch.arange(dim)
        for i, o in zip((1, *self.factors), (*self.factors, 1), strict=True):
            weight = torch.zeros(dim, o, dim, i)
            weight[index, :, index] = torch.empty(dim, o, i).uniform_(-1, 1)
            self.weights.append(nn.Parameter(weight.reshape(dim * o, dim * i)))
            self.units.append(nn.Parameter(torch.zeros(3, dim, o)))  # gain, m, b
            nn.init.uniform_(self.units[-1].data[2], -2, 2)
        self.units[-1] = nn.Parameter(torch.zeros(2, dim, 1))  # gain and shift of the output
        self.conditioner = None
        if context_dim:
            out_dim = sum(unit.numel() for unit in self.units)
            self.conditioner = MLP(0, hidden_dims, out_dim, context_dim, activation)

    @property
    def passes(self) -> tuple[int, int]:
        return 1, self.dim

    def _layers(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of every layer: weights below the diagonal, as a matrix; its diagonal blocks ``(dim, o, i)``; its units."""
        units = list(self.units)
        if self.conditioner is not None:
            parts = self.conditioner(x[..., :0], context).split([unit.numel() for unit in units], -1)
            units = [u + part.unflatten(-1, tuple(u.shape)) for u, part in zip(units, parts, strict=True)]
        layers = []
        for weight, unit in zip(self.weights, units, strict=True):
            o, i = (size // self.dim for size in weight.shape)
            blocks = weight.unflatten(0, (self.dim, o)).unflatten(-1, (self.dim, i))
            diagonal = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).softmax(-1)
            place = torch.arange(self.dim, device=weight.device)
            below = place.repeat_interleave(o).unsqueeze(-1) > place.repeat_interleave(i)
            layers.append((torch.where(below, weight, 0.0), diagonal, unit))
        return layers

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, slopes = x.unsqueeze(-1), x.new_ones(self.dim, 1)  # of a unit by the element that owns it
        for below, diagonal, unit in self._layers(x, context):
            whole = torch.diagonal_scatter(
                below.view(*diagonal.shape[:2], self.dim, -1), diagonal.movedim(0, -1), 0, 0, 2
            )
            mixed = F.linear(h.flatten(-2), whole.view_as(below)).unflatten(-1, diagonal.shape[:2])
            h, slopes = _unit(mixed, unit, _pass_on(slopes, diagonal))
        y = h.squeeze(-1)
        return y.flip(-1) if self.reverse else y, slopes.log().sum((-1, -2))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = y.flip(-1) if self.reverse else y
        if context is not None:
            y = y.expand(torch.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])
        layers = self._layers(y, context)
        mixed = [y.new_zeros(()).expand(*y.shape[:-1], *diagonal.shape[:2]) for _, diagonal, _ in layers]
        solved: list[Tensor] = []
        log_det = y.new_zeros(y.shape[:-1])
        for i in range(self.dim):

            def chain(v: Tensor, i: int = i, mixed: list[Tensor] = mixed) -> tuple[Tensor, Tensor, list[Tensor]]:
                h, inputs, slopes = v[..., None, None], [], v.new_ones(1, 1)
                for (_, diagonal, unit), part in zip(layers, mixed, strict=True):
                    inputs.append(h.squeeze(-2))
                    own = slice(i, i + 1)
                    total = part[..., own, :] + _pass_on(h, diagonal[own])
                    h, slopes = _unit(total, unit[..., own, :], _pass_on(slopes, diagonal[own]))
                return h[..., 0, 0], slopes[..., 0, 0].log(), inputs

            v = monotone_root(lambda v: chain(v)[:2], y[..., i], owner="BlockAutoregressive")
            _, log_slope, inputs = chain(v)
            solved, log_det = [*solved, v], log_det - log_slope
            columns = [below.unflatten(-1, (self.dim, -1))[:, i] for below, _, _ in layers]
            mixed = [m + F.linear(h, c).view_as(m) for m, c, h in zip(mixed, columns, inputs, strict=True)]
        return torch.stack(solved, -1), log_det


def _pass_on(h: Tensor, diagonal: Tensor) -> Tensor:
    """What the diagonal blocks ``(n, o, i)`` make of ``(..., n, i)``."""
    return torch.einsum("noi,...ni->...no", diagonal, h)


def _unit(mixed: Tensor, unit: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The units' values and slopes, by the element that owns them, from what the weights have made of the last ones."""
    gain = soft_clip(unit[..., 0, :, :], _MAX_LOG_GAIN).exp()
    h, slopes = mixed * gain, slopes * gain
    if unit.shape[-3] == 2:
        return h + unit[..., 1, :, :], slopes
    m, t = unit[..., 1, :, :], torch.tanh(h + unit[..., 2, :, :])
    return torch.addcmul(h, expm1_asinh(m), t), slopes * slope(t, m)


def check_factors(factors: Sequence[int]) -> tuple[int, ...]:
    """The widths as a tuple; a ``ValueError`` unless they are positive."""
    if isinstance(factors, int) or any(factor < 1 for factor in factors):
        raise ValueError(f"hidden_factors must be a sequence of positive integers, but got {factors!r}.")
    return tuple(factors)
