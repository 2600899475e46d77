"""Architectures by their name in the literature.

Each is a factory ``flow(dim, ..., key=key) -> TransformModule`` which starts at the identity. Forward is the guide's
direction (base to latent, sampling); inverse is the direction of a density at given points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jax import Array

from numpyro_flows.transform_module import Compose, Inverse, Repeat, TransformModule
from numpyro_flows.transforms import (
    Autoregressive,
    BlockAutoregressive,
    Coupling,
    ElementwiseAffine,
    Permutation,
    Planar,
    Radial,
    Residual,
    Sylvester,
)
from numpyro_flows.univariate import Additive, Affine, RationalQuadraticSpline, Univariate


def _coupling_stack(
    dim: int, univariate: Univariate, num_layers: int, hidden_dims: Sequence[int], key: Array, **kwargs
) -> Compose:
    """Equal coupling layers, each of which exchanges the blocks; at the end every element is at its place again."""
    check_dim(dim)
    make = partial(Coupling, dim, univariate, hidden_dims, swap=True, **kwargs)
    layers: list[TransformModule] = [Repeat(make, num_layers, key=key)]
    moved = num_layers * (dim // 2) % dim
    return Compose([*layers, Permutation.roll(dim, moved)] if moved else layers)


def _autoregressive_stack(
    dim: int, univariate: Univariate, num_layers: int, hidden_dims: Sequence[int], key: Array, **kwargs
) -> Compose:
    """Equal autoregressive layers with the ordering reversed from one to the next."""
    check_dim(dim)
    make = partial(Autoregressive, dim, univariate, hidden_dims, reverse=True, **kwargs)
    layers: list[TransformModule] = [Repeat(make, num_layers, key=key)]
    return Compose([*layers, Permutation.reverse(dim)] if num_layers % 2 and dim > 1 else layers)


def _stack(
    dim: int, make: Callable[..., TransformModule], num_layers: int, reverse: bool = False, *, key: Array
) -> Compose:
    """Equal layers; where each reverses the order of the elements, every element is at its place again at the end."""
    check_dim(dim)
    layers: list[TransformModule] = [Repeat(make, num_layers, key=key)]
    return Compose([*layers, Permutation.reverse(dim)] if reverse and num_layers % 2 and dim > 1 else layers)


def nice(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    key: Array,
) -> TransformModule:
    """Additive coupling and a diagonal scale (Dinh et al. 2015). One pass both ways."""
    stack = _coupling_stack(
        dim, Additive(), num_layers, hidden_dims, key, context_dim=context_dim, activation=activation
    )
    return Compose([stack, ElementwiseAffine(dim)])


def realnvp(
    dim: int,
    num_layers: int = 10,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
    key: Array,
) -> TransformModule:
    """Affine coupling (Dinh et al. 2017). One pass both ways; the default of the guides.

    In one dimension there is nothing to couple, and it is an affine map: take ``nsf`` there.
    """
    return _coupling_stack(
        dim, Affine(max_log_scale), num_layers, hidden_dims, key, context_dim=context_dim, activation=activation
    )


def nsf(
    dim: int,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_bins: int = 8,
    bound: float = 5.0,
    key: Array,
) -> TransformModule:
    """Rational-quadratic spline coupling (Durkan et al. 2019, RQ-NSF (C)). One pass both ways.

    The splines act within ``[-bound, bound]`` and are the identity outside: locate and scale the target first.
    """
    spline = RationalQuadraticSpline(num_bins, bound)
    return _coupling_stack(dim, spline, num_layers, hidden_dims, key, context_dim=context_dim, activation=activation)


def iaf(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
    key: Array,
) -> TransformModule:
    """Inverse autoregressive flow (Kingma et al. 2016). Sampling takes one pass a layer, inversion ``dim``."""
    return _autoregressive_stack(
        dim, Affine(max_log_scale), num_layers, hidden_dims, key, context_dim=context_dim, activation=activation
    )


def maf(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
    key: Array,
) -> TransformModule:
    """Masked autoregressive flow (Papamakarios et al. 2017). A density takes one pass a layer, sampling ``dim``."""
    return Inverse(
        iaf(
            dim,
            num_layers,
            hidden_dims,
            context_dim=context_dim,
            activation=activation,
            max_log_scale=max_log_scale,
            key=key,
        )
    )


def nsf_ar(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_bins: int = 8,
    bound: float = 5.0,
    key: Array,
) -> TransformModule:
    """Spline autoregressive flow (Durkan et al. 2019, RQ-NSF (AR)), with sampling in one pass a layer.

    Turn it round with ``Inverse(nsf_ar(...))`` where the density has to be the cheap direction.
    """
    spline = RationalQuadraticSpline(num_bins, bound)
    return _autoregressive_stack(
        dim, spline, num_layers, hidden_dims, key, context_dim=context_dim, activation=activation
    )


def planar(
    dim: int,
    num_layers: int = 16,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    key: Array,
) -> TransformModule:
    """Planar flow (Rezende & Mohamed 2015). Sampling costs ``O(dim)`` a layer, a density one scalar root more.

    ``hidden_dims`` and ``activation`` are those of the network of a context.
    """
    make = partial(Planar, dim, hidden_dims, context_dim=context_dim, activation=activation)
    return _stack(dim, make, num_layers, key=key)


def radial(
    dim: int,
    num_layers: int = 16,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    key: Array,
) -> TransformModule:
    """Radial flow (Rezende & Mohamed 2015). Both ways cost ``O(dim)`` a layer.

    ``hidden_dims`` and ``activation`` are those of the network of a context.
    """
    make = partial(Radial, dim, hidden_dims, context_dim=context_dim, activation=activation)
    return _stack(dim, make, num_layers, key=key)


def sylvester(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    rank: int | None = None,
    kind: str = "orthogonal",
    num_reflections: int = 4,
    key: Array,
) -> TransformModule:
    """Sylvester flow (van den Berg et al. 2018). Sampling is cheap; a density takes ``rank`` scalar roots a layer.

    ``hidden_dims`` and ``activation`` are those of the network of a context.
    """
    reverse = kind == "triangular"
    make = partial(
        Sylvester,
        dim,
        rank,
        kind=kind,
        num_reflections=num_reflections,
        reverse=reverse,
        hidden_dims=hidden_dims,
        context_dim=context_dim,
        activation=activation,
    )
    return _stack(dim, make, num_layers, reverse, key=key)


def bnaf(
    dim: int,
    num_layers: int = 2,
    hidden_factors: Sequence[int] = (8, 8),
    *,
    hidden_dims: Sequence[int] = (32, 32),
    context_dim: int = 0,
    activation: str = "silu",
    key: Array,
) -> TransformModule:
    """Block neural autoregressive flow (De Cao et al. 2019). One pass a layer to sample, ``dim`` roots to invert.

    ``hidden_dims`` and ``activation`` are those of the network of a context.
    """
    make = partial(
        BlockAutoregressive,
        dim,
        hidden_factors,
        hidden_dims=hidden_dims,
        context_dim=context_dim,
        reverse=True,
        activation=activation,
    )
    return _stack(dim, make, num_layers, reverse=True, key=key)


def residual(
    dim: int,
    num_layers: int = 10,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    lipschitz: float = 0.9,
    log_det: str = "exact",
    exact_terms: int = 4,
    key: Array,
) -> TransformModule:
    """Residual flow (Behrmann et al. 2019; Chen et al. 2019). Sampling takes one pass a layer, inversion a fixed point.

    ``log_det="exact"`` costs ``O(dim^3)`` a layer, ``"unbiased"`` some ten vector products; ``activation`` is that of
    the network of a context.
    """
    make = partial(
        Residual,
        dim,
        hidden_dims,
        context_dim=context_dim,
        lipschitz=lipschitz,
        log_det=log_det,
        exact_terms=exact_terms,
        activation=activation,
    )
    return _stack(dim, make, num_layers, key=key)


FLOWS: dict[str, Callable[..., TransformModule]] = {
    f.__name__: f for f in (nice, realnvp, nsf, nsf_ar, maf, iaf, planar, radial, sylvester, bnaf, residual)
}


def check_dim(dim: int) -> None:
    """Raises a ``ValueError`` unless ``dim`` is a positive integer."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, but got {dim}.")
