"""Non-centering read off the model: latents relative to what their prior says, given the latents before them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.graphs import close
from pyroflows.log_density import LogDensity, _Unconstrained
from pyroflows.supports import WRAPPERS
from pyroflows.transform_module import Compose, TransformModule

# of location-scale form; the log-normal's unconstrained value, its logarithm, is of that form
LOCATION_SCALE = tuple(
    getattr(torch.distributions, name) for name in ("Normal", "StudentT", "Cauchy", "Laplace", "Gumbel", "LogNormal")
) + (dist.Logistic,)

JOINT = (torch.distributions.MultivariateNormal, dist.MultivariateStudentT)
# at its kink, of the quantile function of a Laplace of scale 1 at a normal's cdf
_SLOPE = math.sqrt(2 / math.pi)


def prior_of(fn: Any, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Location ``shape`` and scale of a latent, if its prior has them.

    The scale of a multivariate normal or Student-t is its Cholesky factor ``(*shape, shape[-1])``.
    """
    fn = unwrapped(fn)
    if isinstance(fn, LOCATION_SCALE):
        return _floating(fn.loc).expand(shape), _floating(fn.scale).expand(shape)
    if isinstance(fn, JOINT):
        return fn.loc.expand(shape), fn.scale_tril.expand(shape + shape[-1:])
    return None


def _floating(x: Tensor) -> Tensor:
    """``Normal(mu, torch.tensor(1))`` keeps an integer."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def unwrapped(fn: Any) -> Any:
    """A distribution without masks, expansions and reinterpreted dimensions."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


class Noncentering(TransformModule):
    """Takes a model's conditional priors out of a guide's way; the last layer of a guide.

    An element ``u`` of a latent with a prior of location-scale form, whose location or scale depend on other latents,
    becomes that of its conditional posterior under a pseudo-observation ``pseudo_data`` of precision ``precision``::

        s = (1 / scale^2 + precision)^(-1/2),    u = loc + precision s^2 (pseudo_data - loc) + s x

    and so do all elements of one with a multivariate normal prior (a Gaussian process) together: with ``L`` the prior's
    Cholesky factor and ``R R^T = I + L^T precision L``, the scale is the matrix ``L R^{-T}``, at ``O(n^3)`` a draw for
    ``n`` elements. With precision 0 it is non-centred (Papaspiliopoulos et al. 2007), with a large one centred, and
    exact where the likelihood is normal in ``u``: the funnel between scales and effects is gone for every value of the
    scale. Partially non-centred in between, as in Gorinova et al. 2020, and by the prior as in Ambrogioni et al. 2021,
    but adapted to the scale.

    The density of a latent with a Laplace prior, also of fixed location and scale, has a kink at ``loc``, which no flow
    can follow once a guide turns its coordinates. Such an element is mapped likewise, but with a bend at ``loc`` that
    cancels the kink (a map of this package's own, see ``_unkinked``).

    All other elements pass. Both directions run the model once a batch, under ``vmap``; ``precision`` and
    ``pseudo_data`` are not trained.

    Shapes: ``x`` and ``u`` ``(..., dim)``, log-determinants ``(...)``.

    :param log_density: the model, with its arguments, and the layout of its latent vector.
    :param trace: a trace of the model.
    :param points: unconstrained vectors ``(n, dim)`` at which it is seen which priors depend on other latents.
    """

    precision: Tensor  # (dim,), 0 where an element passes
    pseudo_data: Tensor  # (dim,)

    def __init__(self, log_density: LogDensity, trace: Any, points: Tensor):
        super().__init__()
        seen = priors_at(log_density, points)
        kinked = tuple(n for n in seen if isinstance(unwrapped(trace.nodes[n]["fn"]), torch.distributions.Laplace))
        sites = (name for name, pair in seen.items() if name in kinked or any((a != a[:1]).any() for a in pair))
        self.prior = _Prior(log_density, tuple(sites), kinked)
        self.register_buffer("precision", torch.zeros_like(points[0]))
        self.register_buffer("pseudo_data", torch.zeros_like(points[0]))

    @property
    def sites(self) -> tuple[str, ...]:
        """Latents that do not pass: those with a Laplace prior, or one that depends on other latents."""
        return self.prior.sites

    @property
    def elements(self) -> np.ndarray:
        """Which elements ``(dim,)`` do not pass."""
        parts = [np.full(shape.numel(), name in self.sites) for name, shape in self.prior.log_density.shapes.items()]
        return np.concatenate(parts)

    def with_pseudo_observations(self, precision: Any, pseudo_data: Any) -> Noncentering:
        """This layer with other pseudo-observations, both ``(dim,)``."""
        new = copy.deepcopy(self)
        new.precision.copy_(torch.as_tensor(precision))
        new.pseudo_data.copy_(torch.as_tensor(pseudo_data))
        return new

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, False)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, True)

    def factor(self, x: Tensor) -> Tensor:
        """The matrix ``(dim, dim)`` by which the conditional priors at ``x`` ``(dim,)`` scale standard normals there.

        Diagonal, but for multivariate normals; that of the identity for elements that pass.
        """
        log_density = self.prior.log_density
        sweep = self.prior._sweep(x, self.prior.move(self.precision, self.pseudo_data, False))
        blocks = []
        for name, shape in log_density.shapes.items():
            scale = sweep.seen[name][1] if name in self.sites else x.new_ones(shape)
            if name in self.prior.kinked:  # the map's own slope, as its scale is not the same for all values
                scale = sweep.log_scales[name].exp()
            joint = scale.dim() > len(shape)
            blocks += [*scale.reshape(-1, *scale.shape[-2:])] if joint else [torch.diag(scale.reshape(-1))]
        return torch.block_diag(*blocks)

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        with pyro.validation_enabled(False):
            y, log_scales = torch.func.vmap(lambda row: self.prior.run(row, self.precision, self.pseudo_data, inverse))(
                x.reshape(-1, x.shape[-1])
            )
        log_det = log_scales.sum(-1).reshape(x.shape[:-1])
        return y.reshape(x.shape), -log_det if inverse else log_det


class _Prior:
    """The model as a sequence of conditional priors. A copy of a layer refers to the same one.

    :param log_density: the model, its arguments, and the layout of its latent vector.
    :param sites: latents that do not pass.
    :param kinked: those of them with a Laplace prior.
    """

    def __init__(self, log_density: LogDensity, sites: tuple[str, ...] = (), kinked: tuple[str, ...] = ()):
        self.log_density, self.sites, self.kinked = log_density, sites, kinked

    def run(self, x: Tensor, precision: Tensor, pseudo_data: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The other side of ``x`` ``(dim,)`` and the logarithms ``(dim,)`` of the scales ``s``."""
        sweep = self._sweep(x, self.move(precision, pseudo_data, inverse))
        return tuple(
            torch.cat([values[name].reshape(-1) for name in self.log_density.shapes])
            for values in (sweep.results, sweep.log_scales)
        )  # type: ignore[return-value]

    def move(self, precision: Tensor, pseudo_data: Tensor, inverse: bool) -> Callable:
        """What a sweep does with a latent of ``sites``."""
        precisions, data = self.log_density._unpack(precision), self.log_density._unpack(pseudo_data)

        def move(name: str, loc: Tensor, scale: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            by = _unkinked if name in self.kinked else _conditioned
            moved, log_scale = by(loc, scale, precisions[name], data[name], value, inverse)
            return (value if inverse else moved), moved, log_scale

        return move

    def _sweep(self, x: Tensor, move: Callable) -> _Sweep:
        log_density = self.log_density
        sweep = _Sweep(log_density._unpack(x), self.sites, move, last=len(log_density.shapes))
        with contextlib.suppress(_Done), poutine.block(), log_density._running(x), sweep:
            log_density.model(*log_density.args, **log_density.kwargs)
        return sweep

    def __deepcopy__(self, memo: dict) -> _Prior:
        return self


def priors_at(log_density: LogDensity, points: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Location and scale of every latent with a prior of that form, at every point."""
    seen = [_Prior(log_density)._sweep(point, _stay).seen for point in points]
    return {name: tuple(map(torch.stack, zip(*(at[name] for at in seen), strict=True))) for name in seen[0]}  # type: ignore[misc]


def _stay(name: str, loc: Tensor, scale: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value, value, torch.zeros_like(value)


def _conditioned(
    loc: Tensor, scale: Tensor, precision: Tensor, data: Tensor, value: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """``u`` of ``x``, or the other way round, and the logarithms of the scales."""
    if scale.dim() == loc.dim():
        s = (scale**-2 + precision) ** -0.5
        centre = loc + precision * s**2 * (data - loc)
        return ((value - centre) / s if inverse else centre + s * value), s.log()
    eye = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    root = torch.linalg.cholesky(eye + (scale.mT * precision.unsqueeze(-2)) @ scale)
    told = scale.mT @ (precision * (data - loc)).unsqueeze(-1)
    shift = torch.linalg.solve_triangular(root, told, upper=False)
    log_scale = scale.diagonal(dim1=-2, dim2=-1).log() - root.diagonal(dim1=-2, dim2=-1).log()
    if inverse:
        standard = torch.linalg.solve_triangular(scale, (value - loc).unsqueeze(-1), upper=False)
        return (root.mT @ standard - shift).squeeze(-1), log_scale
    standard = torch.linalg.solve_triangular(root.mT, value.unsqueeze(-1) + shift, upper=True)
    return loc + (scale @ standard).squeeze(-1), log_scale


def _unkinked(
    loc: Tensor, scale: Tensor, precision: Tensor, data: Tensor, value: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The same for a Laplace prior: a map whose derivative jumps at ``loc`` as the prior's log-density does there, with
    the other sign, so that the density of ``x`` is smooth.

    With precision 0 it is close to the quantile function of the prior at a normal's cdf (the same slope at ``loc``,
    quadratic tails), with a large one affine. In closed form both ways; derivatives are right at the kink itself.
    """
    s = ((_SLOPE * scale) ** -2 + precision) ** -0.5
    bend, end = s / scale, precision * s**2

    def unbent(y: Tensor) -> Tensor:
        root = (1 + 2 * bend * y.abs() + (end * y) ** 2).sqrt()
        return y * (1 + root) / (1 + bend * y.abs() + root)

    centre = unbent(precision * s * (data - loc))
    t = unbent((value - loc) / s) if inverse else value + centre
    root = (1 + (end * t) ** 2).sqrt()
    log_scale = s.log() + (bend * t.abs() / root).log1p()
    return (t - centre if inverse else loc + s * (t + bend * t * t.abs() / (1 + root))), log_scale


class _Done(Exception):
    """Every latent is set: what the model does from here on, its likelihood, is not needed."""


class _Sweep(_Unconstrained):
    """Sets the latents in the model's order, each by ``move`` from its location, scale and given value.

    The scales' logarithms count among the Jacobians. With ``last``, ends the run after so many latents.
    """

    def __init__(self, values: dict[str, Tensor], sites: tuple[str, ...], move: Callable, last: int | None = None):
        super().__init__(values)
        self.sites, self.move, self.last = sites, move, last
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}  # location and scale of every site of that form
        self.results: dict[str, Tensor] = {}
        self.log_scales: dict[str, Tensor] = {}

    def unconstrained(self, name: str, fn: Any) -> Tensor:
        u = self.values[name]
        self.results[name], self.log_scales[name] = u, torch.zeros_like(u)
        prior = prior_of(fn, u.shape)
        if prior is not None:
            self.seen[name] = prior
            if name in self.sites:
                u, self.results[name], self.log_scales[name] = self.move(name, *prior, u)
                self.log_det = self.log_det + self.log_scales[name].sum()
        if len(self.results) == self.last:
            raise _Done
        return u


class _PulledBack(LogDensity):
    """The log-density of vectors before the layers, in one run of the model; ``constrain`` and the like do not move."""

    def __init__(self, log_density: LogDensity, coordinates: Compose):
        self.__dict__.update(log_density.__dict__)
        self._graphs = {}
        layers = list(coordinates.layers)
        self.noncentering = layers.pop() if isinstance(layers[-1], Noncentering) else None
        self.before = Compose(layers) if layers else None

    def __call__(self, u: Tensor) -> Tensor:
        if self.before is None:
            return super().__call__(u)
        u, log_det = self.before.forward_and_log_det(u)
        return super().__call__(u) + log_det

    def _latents(self, values: dict[str, Tensor]) -> _Unconstrained:
        layer = self.noncentering
        if layer is None:
            return super()._latents(values)
        return _Sweep(values, layer.sites, layer.prior.move(layer.precision, layer.pseudo_data, False))

    def _with_plate(self, u: Tensor) -> Tensor:
        if self.noncentering is None:
            return super()._with_plate(u)
        u, log_det = self.noncentering.forward_and_log_det(u)
        return super()._with_plate(u) + log_det


def noncentering_of(log_density: LogDensity, trace: Any, prototype: Tensor) -> Noncentering | None:
    """The layer for a model, not centred at all.

    ``None`` if all latents pass, and for models whose latents cannot be drawn under ``vmap``: by control flow that
    depends on their values.

    :param trace: a trace of the model.
    :param prototype: an unconstrained vector ``(dim,)`` where the model's density is finite.
    """
    points = points_around(prototype)
    layer = Noncentering(log_density, trace, points)
    if not layer.sites:
        return None
    for log_density._writes in (False, True):  # as the density's own trials
        try:
            together = layer.forward_and_log_det(points)[0]
            break
        except RuntimeError:  # torch's word for what vmap cannot do
            continue
    else:
        return None
    alone = torch.stack([layer.prior.run(x, layer.precision, layer.pseudo_data, False)[0] for x in points])
    return layer if close(together, alone) else None


def points_around(prototype: Tensor) -> Tensor:
    """Three unconstrained vectors ``(3, dim)`` at which it is seen which priors depend on other latents."""
    noise = torch.as_tensor(np.random.default_rng(0).standard_normal((2, len(prototype)))).to(prototype)
    return torch.cat([prototype[None], prototype + 0.1 * noise])


def pulled_back(log_density: LogDensity, coordinates: Compose) -> LogDensity:
    """The log-density of vectors ``(n, dim)`` before a guide's coordinates, their log-determinant included."""
    return _PulledBack(log_density, coordinates) if len(coordinates.layers) else log_density
