"""Architectures by their name in the literature.

Each is a factory ``flow(dim, ..., key=key) -> TransformModule`` which starts at the identity. Forward is the guide's
direction (base to latent, sampling); inverse is the direction of a density at given points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jax import Array

from numpyro_flows.transform_module import Compose, Inverse, Repeat, TransformModule
from numpyro_flows.transforms import Autoregressive, Continuous, Coupling, ElementwiseAffine, Permutation
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
    key: Array,
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
    return Repeat(make, num_layers, key=key)


FLOWS: dict[str, Callable[..., TransformModule]] = {f.__name__: f for f in (nice, realnvp, nsf, nsf_ar, maf, iaf, cnf)}


def check_dim(dim: int) -> None:
    """Raises a ``ValueError`` unless ``dim`` is a positive integer."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, but got {dim}.")
