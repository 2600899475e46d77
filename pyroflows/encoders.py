"""Encoders: networks from a data set to the context of an amortised guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyroflows.conditioners import MLP

_LINEAR = 3.0  # standard deviations up to which standardised data stay as they are


class MLPEncoder(nn.Module):
    """Perceptron of data ``(..., in_dim)``, one vector for each data set; the encoding is ``(..., out_dim)``.

    :param in_dim: size of a data set.
    :param out_dim: size of the encoding.
    :param hidden_dims: widths of the hidden layers.
    :param activation: one of ``conditioners.ACTIVATIONS``.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64, 64), *, activation: str = "silu"):
        super().__init__()
        check_encoder(in_dim, out_dim)
        self.network = MLP(in_dim, hidden_dims, out_dim, activation=activation, zero=False)

    def forward(self, x: Tensor) -> Tensor:
        check_features(tuple(x.shape), self.network.in_dim, 1, type(self).__name__)
        return self.network(x)


class SetEncoder(nn.Module):
    """A permutation-invariant encoder of sets ``(..., n, in_dim)`` (Zaheer et al. 2017, deep sets, theorem 2).

    One network for every element, the mean over the elements, and a second network of that mean. Sets may differ in
    size: in different calls, or padded to one size with a mask that says which elements are there.

    :param in_dim: numbers of an element.
    :param out_dim: size of the encoding ``(..., out_dim)``.
    :param hidden_dims: widths of the hidden layers, in both networks.
    :param pooled_dim: numbers of which the mean is taken; ``out_dim`` unless given.
    :param size_feature: gives the second network the logarithm of one plus the set's size, which the mean is blind to,
        and a posterior's width is not.
    :param activation: one of ``conditioners.ACTIVATIONS``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        pooled_dim: int | None = None,
        size_feature: bool = True,
        activation: str = "silu",
    ):
        super().__init__()
        pooled_dim = out_dim if pooled_dim is None else pooled_dim
        check_encoder(in_dim, out_dim, pooled_dim)
        self.element = MLP(in_dim, hidden_dims, pooled_dim, activation=activation, zero=False)
        self.pooled = MLP(pooled_dim + size_feature, hidden_dims, out_dim, activation=activation, zero=False)
        self.size_feature = size_feature

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoding ``(..., out_dim)``.

        :param x: sets ``(..., n, in_dim)``.
        :param mask: which elements count ``(..., n)``, all unless given. What stands in the others does not matter.
        """
        check_features(tuple(x.shape), self.element.in_dim, 2, type(self).__name__)
        present = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        check_mask(tuple(present.shape), tuple(x.shape))
        there = present.unsqueeze(-1)
        h = self.element(torch.where(there, x, torch.zeros_like(x)))  # a NaN in the padding would get into the gradient
        size = there.sum(-2).to(h.dtype)
        mean = torch.where(there, h, torch.zeros_like(h)).sum(-2) / size.clamp_min(1)
        return self.pooled(torch.cat([mean, size.log1p()], -1) if self.size_feature else mean)


class StandardizedEncoder(nn.Module):
    """An encoder of standardised data: ``encoder(*data)``, each number with a location and scale that are not trained.

    Within three scales of the location, data enter as they are, up to that shift and factor; beyond, the distance grows
    as its logarithm, so that a single wild number of a heavy-tailed model cannot rule the network. Location and scale
    are one pair for each entry of the last axis: of a vector's elements, or of the features of a set's elements. They
    are buffers.

    :param encoder: takes tensors of one leading axis of data sets to encodings ``(batch, c)``.
    :param data: data sets ``(n, *shape)``, a tensor for each argument of the encoder, from which the location (the
        median) and the scale (half the distance of the 16 % and 84 % quantiles) are taken. Logical tensors, such as
        masks, pass.
    """

    loc: nn.Module
    scale: nn.Module

    def __init__(self, encoder: Callable[..., Tensor], data: Sequence[Tensor], dtype: torch.dtype | None = None):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.encoder = encoder
        self.loc, self.scale = nn.Module(), nn.Module()
        for i, a in enumerate(data):
            loc, scale = (None, None) if a.dtype == torch.bool else location_and_scale(a.to(dtype))
            self.loc.register_buffer(str(i), loc)
            self.scale.register_buffer(str(i), scale)

    def forward(self, *data: Tensor) -> Tensor:
        return self.encoder(
            *(_standardized(a, getattr(self.loc, str(i)), getattr(self.scale, str(i))) for i, a in enumerate(data))
        )


@torch.no_grad()
def location_and_scale(data: Tensor) -> tuple[Tensor, Tensor]:
    """Median and half the distance of the 16 % and 84 % quantiles, over all axes but the last ``(features,)``.

    Where that distance is zero the standard deviation stands for it, and one for that. What is not finite is left out.
    """
    rows = data.reshape(-1, data.shape[-1]) if data.dim() > 1 else data.reshape(-1, 1)
    rows = torch.where(rows.isfinite(), rows, torch.nan)
    # torch.quantile takes sixteen million numbers at most, and one column at a time the fewest
    levels = torch.tensor([0.16, 0.5, 0.84], dtype=rows.dtype, device=rows.device)
    low, loc, high = torch.stack([column.nanquantile(levels) for column in rows.unbind(-1)], -1)
    deviation = (rows - rows.nanmean(0)).square().nanmean(0).sqrt()
    spread = 0.5 * (high - low)
    ones = torch.ones_like(spread)
    scale = torch.where(spread > 0, spread, torch.where(deviation > 0, deviation, ones))
    return torch.where(loc.isfinite(), loc, 0 * ones), torch.where(scale.isfinite(), scale, ones)


def _standardized(x: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
    if loc is None or scale is None:
        return x
    x = (x.to(loc.dtype) - loc) / scale
    beyond = (x.abs() - _LINEAR).clamp_min(0)
    return x.clamp(-_LINEAR, _LINEAR) + x.sign() * beyond.log1p()


def check_encoder(in_dim: int, out_dim: int, pooled_dim: int = 1) -> None:
    """Raises a ``ValueError`` that names the size with which no encoder can be built."""
    for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("pooled_dim", pooled_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}.")


def check_features(shape: tuple[int, ...], in_dim: int, least: int, owner: str) -> None:
    """Raises a ``ValueError`` unless data of ``shape`` are what an encoder takes."""
    if len(shape) < least or shape[-1] != in_dim:
        expected = "(..., n, in_dim)" if least == 2 else "(..., in_dim)"
        raise ValueError(
            f"{owner}: data have shape {tuple(shape)}, but expected {expected} with in_dim={in_dim}. Change in_dim=, "
            "or the guide's data=, a function of the model's arguments that gives what the encoder sees (such as "
            "lambda x: x.reshape(-1), or lambda x: x[:, None] for a set of numbers)."
        )


def check_mask(mask: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises a ``ValueError`` unless a mask has the shape of the sets' elements."""
    if mask != tuple(shape[:-1]):
        raise ValueError(f"SetEncoder: mask has shape {tuple(mask)}, but expected {tuple(shape[:-1])}.")
