"""Architectures by their name in the literature.

Each is a factory ``flow(dim, ...) -> TransformModule`` which starts at the identity. Forward is the guide's
direction (base to latent, sampling); inverse is the direction of a density at given points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pyroflows.conditioners import check_image
from pyroflows.transform_module import Compose, Inverse, Repeat, TransformModule
from pyroflows.transforms import (
    ActNorm,
    Autoregressive,
    BlockAutoregressive,
    Continuous,
    Coupling,
    Elementwise,
    ElementwiseAffine,
    Householder,
    ImageCoupling,
    InvertibleConv1x1,
    Leading,
    Permutation,
    Planar,
    Radial,
    Residual,
    Rotated,
    Squeeze,
    Sylvester,
)
from pyroflows.univariate import (
    Additive,
    Affine,
    Bernstein,
    CircularSpline,
    DeepDenseSigmoidal,
    DeepSigmoidal,
    GaussianMixtureCDF,
    MonotoneNetwork,
    RationalQuadraticSpline,
    SumOfSquares,
    TailTransform,
    Univariate,
)


def _coupling_stack(dim: int, univariate: Univariate, num_layers: int, hidden_dims: Sequence[int], **kwargs) -> Compose:
    """Equal coupling layers, each of which exchanges the blocks; at the end every element is at its place again."""
    check_dim(dim)
    make = partial(Coupling, dim, univariate, hidden_dims, swap=True, **kwargs)
    layers: list[TransformModule] = [Repeat(make, num_layers)]
    moved = num_layers * (dim // 2) % dim
    return Compose([*layers, Permutation.roll(dim, moved)] if moved else layers)


def _autoregressive_stack(
    dim: int, univariate: Univariate, num_layers: int, hidden_dims: Sequence[int], **kwargs
) -> Compose:
    """Equal autoregressive layers with the ordering reversed from one to the next."""
    check_dim(dim)
    make = partial(Autoregressive, dim, univariate, hidden_dims, reverse=True, **kwargs)
    layers: list[TransformModule] = [Repeat(make, num_layers)]
    return Compose([*layers, Permutation.reverse(dim)] if num_layers % 2 and dim > 1 else layers)


def _glow_step(shape: Sequence[int], univariate: Univariate, hidden_dims: Sequence[int], **kwargs) -> TransformModule:
    coupling = ImageCoupling(shape, univariate, hidden_dims, **kwargs)
    return Compose([coupling, InvertibleConv1x1(shape), ActNorm(shape)])


def _check_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, but got {num_layers}.")


def _stack(dim: int, make: Callable[..., TransformModule], num_layers: int, reverse: bool = False) -> Compose:
    """Equal layers; where each reverses the order of the elements, every element is at its place again at the end."""
    check_dim(dim)
    layers: list[TransformModule] = [Repeat(make, num_layers)]
    return Compose([*layers, Permutation.reverse(dim)] if reverse and num_layers % 2 and dim > 1 else layers)


def nice(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
) -> TransformModule:
    """Additive coupling and a diagonal scale (Dinh et al. 2015). One pass both ways."""
    stack = _coupling_stack(dim, Additive(), num_layers, hidden_dims, context_dim=context_dim, activation=activation)
    return Compose([stack, ElementwiseAffine(dim)])


def realnvp(
    dim: int,
    num_layers: int = 10,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
    rotated: bool = False,
) -> TransformModule:
    """Affine coupling (Dinh et al. 2017). One pass both ways; the default of ``FlowVI``.

    In one dimension there is nothing to couple, and it is an affine map: take ``nsf`` there. With ``rotated`` every
    layer couples halves of trained coordinates of its own, at random first (:class:`Rotated`), in place of the same two
    blocks by turns: in many dimensions every element meets every other.
    """
    univariate, options = Affine(max_log_scale), {"context_dim": context_dim, "activation": activation}
    if not rotated:
        return _coupling_stack(dim, univariate, num_layers, hidden_dims, **options)
    check_dim(dim)
    make = partial(Coupling, dim, univariate, hidden_dims, swap=False, **options)  # type: ignore[arg-type]
    return Compose([Repeat(lambda: Rotated(make(), dim), num_layers)])


def nsf(
    dim: int,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_bins: int = 8,
    bound: float = 5.0,
    tails: str = "linear",
) -> TransformModule:
    """Rational-quadratic spline coupling (Durkan et al. 2019, RQ-NSF (C)). One pass both ways.

    The splines act within ``[-bound, bound]`` and are the identity outside (with ``tails="learnable"``, linear of
    slopes which are learned): locate and scale the target first.
    """
    spline = RationalQuadraticSpline(num_bins, bound, tails=tails)
    return _coupling_stack(dim, spline, num_layers, hidden_dims, context_dim=context_dim, activation=activation)


def iaf(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
) -> TransformModule:
    """Inverse autoregressive flow (Kingma et al. 2016). Sampling takes one pass a layer, inversion ``dim``."""
    return _autoregressive_stack(
        dim, Affine(max_log_scale), num_layers, hidden_dims, context_dim=context_dim, activation=activation
    )


def maf(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
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
    tails: str = "linear",
) -> TransformModule:
    """Spline autoregressive flow (Durkan et al. 2019, RQ-NSF (AR)), with sampling in one pass a layer.

    Turn it round with ``Inverse(nsf_ar(...))`` where the density has to be the cheap direction.
    """
    spline = RationalQuadraticSpline(num_bins, bound, tails=tails)
    return _autoregressive_stack(dim, spline, num_layers, hidden_dims, context_dim=context_dim, activation=activation)


def ttf(
    dim: int,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_bins: int = 8,
    bound: float = 5.0,
    max_weight: float = 1.0,
) -> TransformModule:
    """Tail transform flow (Hickling & Prangle 2024): ``nsf``, then power-law tails, a location and a scale.

    Each element has a tail weight of its own on either side (with a context, a function of it); the tail index is its
    inverse, at least ``1 / max_weight``. One pass both ways.
    """
    core = nsf(
        dim, num_layers, hidden_dims, context_dim=context_dim, activation=activation, num_bins=num_bins, bound=bound
    )
    tails = Elementwise(dim, TailTransform(max_weight), hidden_dims, context_dim=context_dim, activation=activation)
    return Compose([core, tails, ElementwiseAffine(dim)])


def ncsf(
    dim: int,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_bins: int = 8,
) -> TransformModule:
    """Circular spline coupling of ``dim`` angles, of the torus (Rezende et al. 2020). One pass both ways.

    A map of ``[-pi, pi)^dim`` whose density is continuous across the seams. Its base is one of angles, as the uniform.
    """
    return _coupling_stack(
        dim, CircularSpline(num_bins), num_layers, hidden_dims, context_dim=context_dim, activation=activation
    )


def naf(
    dim: int,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_units: int = 16,
    dense: bool = False,
) -> TransformModule:
    """Neural autoregressive flow (Huang et al. 2018): autoregressive maps by deep sigmoidal networks.

    Sampling takes one pass a layer; the density ``dim``, each with a numerical inverse. Turn it round with
    ``Inverse(naf(...))`` where the density has to be the cheap direction. ``dense`` takes the DDSF (two layers of
    ``num_units``, whose parameters grow as its square) instead of the DSF.
    """
    network = DeepDenseSigmoidal(num_units) if dense else DeepSigmoidal(num_units)
    return _autoregressive_stack(dim, network, num_layers, hidden_dims, context_dim=context_dim, activation=activation)


def unaf(
    dim: int,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_units: int = 8,
    num_nodes: int = 52,
    bound: float = 5.0,
) -> TransformModule:
    """Unconstrained monotonic neural network flow (Wehenkel & Louppe 2019): integrals of positive networks.

    Sampling takes one pass a layer; the density ``dim``, each with a numerical inverse. Turn it round with
    ``Inverse(unaf(...))`` where the density has to be the cheap direction.
    """
    network = MonotoneNetwork(num_units, num_nodes, bound)
    return _autoregressive_stack(dim, network, num_layers, hidden_dims, context_dim=context_dim, activation=activation)


def sospf(
    dim: int,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_squares: int = 2,
    degree: int = 4,
    bound: float = 5.0,
) -> TransformModule:
    """Sum-of-squares polynomial flow (Jaini et al. 2019), autoregressive.

    Sampling takes one pass a layer; the density ``dim``, each with a numerical inverse. Turn it round with
    ``Inverse(sospf(...))`` where the density has to be the cheap direction.
    """
    polynomial = SumOfSquares(num_squares, degree, bound)
    return _autoregressive_stack(
        dim, polynomial, num_layers, hidden_dims, context_dim=context_dim, activation=activation
    )


def bpf(
    dim: int,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    degree: int = 16,
    bound: float = 5.0,
) -> TransformModule:
    """Bernstein polynomial flow (Ramasinghe et al. 2022), autoregressive.

    Sampling takes one pass a layer; the density ``dim``, each with a numerical inverse. Turn it round with
    ``Inverse(bpf(...))`` where the density has to be the cheap direction.
    """
    polynomial = Bernstein(degree, bound)
    return _autoregressive_stack(
        dim, polynomial, num_layers, hidden_dims, context_dim=context_dim, activation=activation
    )


def gaussianization(
    dim: int,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    num_components: int = 8,
) -> TransformModule:
    """Gaussianization flow (Meng et al. 2020): elementwise mixture CDFs in trained rotations of the coordinates.

    No network but with a context (``hidden_dims``). Forward, which makes mixtures normal, is in closed form, so
    sampling is cheap; the density inverts numerically, all elements at once. ``Inverse(gaussianization(...))`` is the
    paper's density, with a closed form.
    """
    check_dim(dim)

    def layer() -> TransformModule:
        mixture = GaussianMixtureCDF(num_components)
        f = Elementwise(dim, mixture, hidden_dims, context_dim=context_dim, activation=activation)
        return Rotated(f, dim)

    return Compose([Repeat(layer, num_layers)])


def householder(
    dim: int,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
) -> TransformModule:
    """A diagonal affine map and ``num_layers`` pairs of Householder reflections (Tomczak & Welling 2016).

    A Gaussian whose covariance is rotated, by ``dim`` reflections in full; with a context, one of its own for each. One
    cheap pass both ways: the network that gives location, scale and reflections sees the context alone.
    """
    check_dim(dim)
    _check_layers(num_layers)
    options: dict[str, Any] = {"context_dim": context_dim, "activation": activation}
    diagonal = Elementwise(dim, Affine(max_log_scale), hidden_dims, **options)
    return Compose([diagonal, Householder(dim, 2 * num_layers, hidden_dims, **options)])


def glow(
    dim: int,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "silu",
    max_log_scale: float = 3.0,
    shape: Sequence[int] | None = None,
    num_scales: int = 3,
) -> TransformModule:
    """Multi-scale flow of images (Kingma & Dhariwal 2018). One pass both ways.

    A scale squeezes the image, runs ``num_layers`` steps (ActNorm, invertible 1 x 1 convolution, affine coupling by a
    convolutional network) and factors half the channels out. The paper takes 32 steps and 512 hidden channels.
    :func:`~pyroflows.transforms.initialised` sets the ActNorms from data.

    :param hidden_dims: channels of the hidden layers.
    :param shape: ``(channels, height, width)`` of the image that a vector of size ``dim`` is, channel by channel;
        ``(dim, 1, 1)`` unless given, which is a single scale of dense networks.
    :param num_scales: the most scales; there are as many as height and width can be halved, and one at least.
    """
    check_dim(dim)
    _check_layers(num_layers)
    channels, height, width = (dim, 1, 1) if shape is None else check_image(shape)
    if channels * height * width != dim or num_scales < 1:
        raise ValueError(
            "glow: shape must have dim elements and num_scales must be at least 1, "
            f"but got {dim=}, {shape=}, {num_scales=}."
        )
    if channels == 1 and dim > 1 and (height % 2 or width % 2):
        raise ValueError(f"glow: shape of one channel must have an even height and width, but got {shape}.")
    affine = Affine(max_log_scale)
    scales, order = [], np.arange(dim)
    for scale in range(num_scales):
        size, can_halve = channels * height * width, height % 2 == width % 2 == 0
        if scale and not can_halve:
            break
        squeeze = Squeeze((channels, height, width)) if can_halve else None
        channels, height, width = squeeze.out_shape if squeeze else (channels, height, width)
        here = (channels, height, width)
        make = partial(_glow_step, here, affine, hidden_dims, context_dim=context_dim, activation=activation)
        level: list[TransformModule] = [Repeat(make, num_layers)]
        moved = num_layers * (channels // 2) % channels * height * width  # by the couplings, which exchange the halves
        level += [Permutation.roll(size, moved)] if moved else []
        if squeeze:
            level.append(Inverse(squeeze))
            order[:size] = order[list(squeeze.permutation)]
        scales.append([Leading(layer, size) if size < dim else layer for layer in level])
        channels //= 2
    # the elements go in as they come out of the squeezes, so that every one of them starts at the identity
    return Compose([Permutation(order.tolist()), *(layer for level in reversed(scales) for layer in level)])


def planar(
    dim: int,
    num_layers: int = 16,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
) -> TransformModule:
    """Planar flow (Rezende & Mohamed 2015). Sampling costs ``O(dim)`` a layer, a density one scalar root more.

    ``hidden_dims`` and ``activation`` are those of the network of a context.
    """
    make = partial(Planar, dim, hidden_dims, context_dim=context_dim, activation=activation)
    return _stack(dim, make, num_layers)


def radial(
    dim: int,
    num_layers: int = 16,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    context_dim: int = 0,
    activation: str = "silu",
) -> TransformModule:
    """Radial flow (Rezende & Mohamed 2015). Both ways cost ``O(dim)`` a layer.

    ``hidden_dims`` and ``activation`` are those of the network of a context.
    """
    make = partial(Radial, dim, hidden_dims, context_dim=context_dim, activation=activation)
    return _stack(dim, make, num_layers)


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
    return _stack(dim, make, num_layers, reverse)


def bnaf(
    dim: int,
    num_layers: int = 2,
    hidden_factors: Sequence[int] = (8, 8),
    *,
    hidden_dims: Sequence[int] = (32, 32),
    context_dim: int = 0,
    activation: str = "silu",
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
    return _stack(dim, make, num_layers, reverse=True)


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
    return _stack(dim, make, num_layers)


def cnf(
    dim: int,
    num_layers: int = 1,
    hidden_dims: Sequence[int] = (64, 64),
    *,
    context_dim: int = 0,
    activation: str = "tanh",
    trace: str = "exact",
    solver: str = "dop853",
    num_steps: int = 4,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    adjoint: bool = False,
) -> TransformModule:
    """Continuous normalizing flow (Chen et al. 2018; Grathwohl et al. 2019, FFJORD). Both ways solve the same equation.

    A layer takes ``12 * num_steps`` network passes with the default solver. Can also be trained without solving
    anything, by ``elbo.flow_matching``.
    """
    check_dim(dim)
    make = partial(
        Continuous,
        dim,
        hidden_dims,
        context_dim=context_dim,
        activation=activation,
        trace=trace,
        solver=solver,
        num_steps=num_steps,
        rtol=rtol,
        atol=atol,
        adjoint=adjoint,
    )
    return Repeat(make, num_layers)


FLOWS: dict[str, Callable[..., TransformModule]] = {
    f.__name__: f
    for f in (
        nice,
        realnvp,
        nsf,
        nsf_ar,
        maf,
        iaf,
        ttf,
        ncsf,
        naf,
        unaf,
        sospf,
        bpf,
        gaussianization,
        householder,
        glow,
        planar,
        radial,
        sylvester,
        bnaf,
        residual,
        cnf,
    )
}


def check_dim(dim: int) -> None:
    """Raises a ``ValueError`` unless ``dim`` is a positive integer."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, but got {dim}.")
