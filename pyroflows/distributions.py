"""A flow as a density: base distribution and transform, fused; base distributions, fixed and learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyroflows.conditioners import MLP
from pyroflows.transform_module import Compose, Conditioned, TransformModule
from pyroflows.transforms import Elementwise
from pyroflows.univariate import SinhArcsinh, TailTransform
from pyroflows.univariate.tails import side, stretch


class FlowDistribution(dist.TransformedDistribution):
    """The density of ``y = transform(x)``, ``x ~ base``: ``log p(y) = log p(x) - log |det dy/dx|``.

    A ``TransformedDistribution`` that takes one pass where torch's takes two: a density at given points inverts and
    scores together, and a sample brings its own density along.

    :param base: distribution over vectors ``(..., dim)`` (``event_dim`` 1), or a :class:`Base`, whose distribution at
        its present parameters is taken.
    :param transform: a :class:`TransformModule`, conditioned if it needs a context.
    """

    def __init__(
        self,
        base: dist.TorchDistribution | Base,
        transform: TransformModule | Conditioned,
        *,
        validate_args: bool | None = None,
    ):
        if not isinstance(transform, TransformModule | Conditioned):
            raise TypeError(
                f"FlowDistribution: transform must be a TransformModule, but got {type(transform).__name__}. "
                "Use pyro.distributions.TransformedDistribution for Pyro's own transforms."
            )
        base = distribution_of(base)
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


class ConditionalFlowDistribution:
    """A density ``p(y | context)``: call :meth:`condition` to get it as a :class:`FlowDistribution`.

    :param base: as for :class:`FlowDistribution`.
    :param transform: a :class:`TransformModule` that takes a context.
    """

    def __init__(self, base: dist.TorchDistribution | Base, transform: TransformModule):
        self.base, self.transform = base, transform

    def condition(self, context: Tensor) -> FlowDistribution:
        """The density given a context ``(..., context_dim)``, whose batch axes become those of the distribution."""
        base = distribution_of(self.base)
        batch = torch.broadcast_shapes(base.batch_shape, context.shape[:-1])
        return FlowDistribution(base.expand(batch), self.transform.condition(context))


def standard_base(dim: int, df: float | None = None, like: Tensor | None = None) -> dist.TorchDistribution:
    """Independent standard normals ``(dim,)``, or Student-t's with ``df`` degrees of freedom.

    :param like: a tensor whose dtype and device the draws have; torch's defaults unless given.
    """
    zeros = torch.zeros(dim) if like is None else like.new_zeros(dim)
    return _independent(zeros, torch.ones_like(zeros), df)


def _independent(loc: Tensor, scale: Tensor, df: float | None) -> dist.TorchDistribution:
    """Not validated: that waits for the device, and what is not finite is for those to see who train."""
    if df is None:
        return dist.Normal(loc, scale, validate_args=False).to_event(1)
    return dist.StudentT(torch.full_like(loc, df), loc, scale, validate_args=False).to_event(1)


class Base(nn.Module):
    """A base distribution that is learned along with the flow: a module of unconstrained parameters."""

    multimodal: ClassVar[bool] = False  # whether it has modes of its own, to be placed by ``at_modes``

    def distribution(self) -> dist.TorchDistribution:
        """The distribution at the present parameters."""
        raise NotImplementedError

    def draw(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Draws ``(n, dim)``, and their log-density as a function of what they carry no gradient of, if anything.

        For ``elbo.score_gradient``, where a draw's derivative by some parameter is a bad estimator.
        """
        return self.distribution().rsample((n,)), None

    def at_modes(self, log_mass: Tensor, loc: Tensor, scale: Tensor) -> Base:
        """The base placed on modes found in its own coordinates, in place; itself, unless a base knows how.

        :param log_mass: logarithms of the modes' masses ``(num_modes,)``, up to a constant.
        :param loc: the modes ``(num_modes, dim)``.
        :param scale: their scales ``(num_modes, dim)``.
        """
        return self


def distribution_of(base: dist.TorchDistribution | Base) -> dist.TorchDistribution:
    """The distribution itself, or that of a :class:`Base` at its present parameters."""
    return base.distribution() if isinstance(base, Base) else base


class LocScaleBase(Base):
    """Independent normals, or Student-t's, of learned location and scale; standard at the start.

    :param dim: size of a draw.
    :param df: degrees of freedom (not learned), ``None`` for normals.
    """

    def __init__(self, dim: int, df: float | None = None):
        super().__init__()
        self.df = df
        self.loc, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def distribution(self) -> dist.TorchDistribution:
        return _independent(self.loc, self.log_scale.exp(), self.df)


class _HeavyTails(TailTransform):
    """Weights are positive, which is half of the work."""

    def _weight(self, raw: Tensor) -> Tensor:
        return self.max_weight * raw.sigmoid()

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return stretch(x, True, self._weight(side(x, params)))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return stretch(y, False, self._weight(side(y, params)))


class FlexibleBase(Base):
    """Independent elements of learned shape: normals skewed by a ``SinhArcsinh``, with tails by a ``TailTransform``.

    A flow of affine couplings has to bend one element by way of another, and can be slow to begin; here every element
    takes its skewness at once. Student's t pays for its tails everywhere; these grow where the posterior asks for them,
    each side for itself, and shrink elsewhere. They are never lighter than the normal's, for light tails make
    importance weights unbounded.

    :param dim: size of a draw.
    :param df: tail index at the start: about the degrees of freedom of a Student-t with such tails. Unless given, 20,
        and in more than ten dimensions ``20 sqrt(dim / 10)``: what they cost a normal then stays the same.
    """

    def __init__(self, dim: int, df: float | None = None):
        super().__init__()
        df = 20.0 * max(1.0, dim / 10) ** 0.5 if df is None else df
        check_tail_index(df)
        self.skewness = Elementwise(dim, SinhArcsinh())
        self.tails = Elementwise(dim, _HeavyTails())
        nn.init.constant_(self.tails.params, -math.log(df - 1))

    def distribution(self) -> FlowDistribution:
        shape = Compose([self.skewness, self.tails])
        return FlowDistribution(
            standard_base(self.tails.dim, like=self.tails.params.detach()), shape, validate_args=False
        )


class MixtureBase(Base):
    """A :class:`DiagonalMixture` of learned weights, locations and scales, for densities of several modes.

    Starts with equal weights, scales of one and locations drawn from a normal.

    :param dim: size of a draw.
    :param num_components: number of normals.
    :param spread: standard deviation of the first locations.
    """

    multimodal = True

    def __init__(self, dim: int, num_components: int = 8, spread: float = 2.0):
        super().__init__()
        if num_components < 1:
            raise ValueError(f"MixtureBase: num_components must be at least 1, but got {num_components}.")
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(num_components, dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, dim))

    def distribution(self) -> dist.TorchDistribution:
        return DiagonalMixture(self.logits, self.loc, self.log_scale.exp(), validate_args=False)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        k = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample((n,))
        scale = self.log_scale.exp()
        x = self.loc[k] + scale[k] * torch.randn_like(self.loc[k])
        return x, DiagonalMixture(self.logits, self.loc.detach(), scale.detach(), validate_args=False).log_prob(
            x.detach()
        )

    @torch.no_grad()
    def at_modes(self, log_mass: Tensor, loc: Tensor, scale: Tensor) -> MixtureBase:
        """The components shared out among the modes, of which each gets its mass; those of least mass may get none."""
        mode, logits, offset = _share_out(len(self.logits), log_mass)
        self.loc.copy_(loc[mode] + offset * scale[mode] * self.loc)
        self.log_scale.copy_(scale[mode].log())
        self.logits.copy_(logits)
        return self


class ResampledBase(Base):
    """Normals thinned by a learned acceptance probability: a :class:`Resampled` (Stimper et al. 2022).

    Gives the base gaps and modes, which a flow could only approach. Starts as the normal. For maximum
    likelihood: its draws are not reparameterised, so that guides refuse it. Its normaliser is an estimate from the same
    draws at every step, which a large network could fit: ``base.distribution(noise).normaliser`` is one from others.

    :param dim: size of a draw.
    :param hidden_dims: widths of the acceptance network's hidden layers.
    :param num_tries: draws of the normal after which the last one is taken.
    :param num_draws: normal draws by which the normaliser is estimated, a network pass over them for each density.
    """

    noise: Tensor

    def __init__(self, dim: int, hidden_dims: Sequence[int] = (32, 32), num_tries: int = 100, num_draws: int = 4096):
        super().__init__()
        check_resampling(num_tries, num_draws)
        self.acceptance, self.num_tries = MLP(dim, hidden_dims, 1), num_tries
        noise = torch.as_tensor(_fixed_noise(num_draws, dim), dtype=torch.get_default_dtype())
        self.register_buffer("noise", noise, persistent=False)

    def distribution(self, noise: Tensor | None = None) -> Resampled:
        return Resampled(self.acceptance, self.noise if noise is None else noise, self.num_tries)


class DiagonalMixture(dist.TorchDistribution):
    """A mixture of normals with diagonal covariances.

    Draws carry the gradient of every parameter, weights included, by implicit reparameterisation (Figurnov et al.
    2018, eq. 5, through the multivariate distributional transform): exact to first order; not to second. The price is a
    triangular solve a draw, ``O(num_components * dim^2)``. Between components far apart, the gradient of the weights is
    that of the rare draws from the gap: then it is better estimated as ``MixtureBase.draw`` does for ``FlowVI``.

    :param logits: unnormalised log-weights ``(num_components,)``.
    :param loc: locations ``(num_components, dim)``.
    :param scale: positive scales ``(num_components, dim)``.
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None):
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(torch.Size(), loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = type(self)(self.logits, self.loc, self.scale, validate_args=False)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        terms = _normal_terms(value, self.loc, self.scale)[1].sum(-1) + torch.log_softmax(self.logits, -1)
        return terms.logsumexp(-1).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def rsample(self, sample_shape=()) -> Tensor:  # type: ignore[override]
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            k = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(shape)
            x = self.loc[k] + self.scale[k] * torch.randn_like(self.loc[k])
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in (self.logits, self.loc, self.scale))):
            return x
        uniform, slope = _conditional_cdfs(x, self.logits, self.loc, self.scale)
        moved = (uniform - uniform.detach()).unsqueeze(-1)  # zero, but for its gradient
        return x - torch.linalg.solve_triangular(slope.detach(), moved, upper=False).squeeze(-1)


class Resampled(dist.TorchDistribution):
    """Normals, each accepted with probability ``a(x)`` or drawn anew; the last of ``num_tries`` tries is always taken.

    The density is ``N(x; 0, I) ((1 - t) a(x) / Z + t)`` with ``t = (1 - Z)^(num_tries - 1)`` (Bauer & Mnih 2019;
    Stimper et al. 2022), exact but for ``Z = E[a(x)]``, which is estimated. A draw carries no gradient and takes
    ``1 / Z`` network passes on average.

    :param acceptance: network ``(..., dim) -> (..., 1)`` of the logit of ``a(x)``.
    :param noise: normal draws ``(num_draws, dim)`` that estimate ``Z``.
    :param num_tries: most tries.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, acceptance: nn.Module, noise: Tensor, num_tries: int, *, validate_args: bool | None = None):
        self.acceptance, self.noise, self.num_tries = acceptance, noise, num_tries
        super().__init__(torch.Size(), noise.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = type(self)(self.acceptance, self.noise, self.num_tries, validate_args=False)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @property
    def normaliser(self) -> tuple[Tensor, Tensor]:
        """The estimate of ``Z``, and its standard error."""
        accepted = self._logit(self.noise).sigmoid()
        return accepted.mean(), accepted.std() / len(accepted) ** 0.5

    def _logit(self, x: Tensor) -> Tensor:
        return self.acceptance(x).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logit = self._logit(self.noise)
        log_z, log_rest = (F.logsigmoid(h).logsumexp(0) - math.log(len(logit)) for h in (logit, -logit))
        log_last = (self.num_tries - 1) * log_rest
        log_early = torch.log(-torch.expm1(log_last)) - log_z
        log_share = torch.logaddexp(F.logsigmoid(self._logit(value)) + log_early, log_last)
        log_normal = -0.5 * value.square().sum(-1) - 0.5 * value.shape[-1] * math.log(2 * math.pi)
        return (log_normal + log_share).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape=()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        x = torch.randn(shape, dtype=self.noise.dtype, device=self.noise.device).reshape(-1, shape[-1])
        pending = torch.arange(len(x), device=x.device)
        for _ in range(self.num_tries - 1):
            refused = torch.rand_like(x[pending, 0]) >= self._logit(x[pending]).sigmoid()
            pending = pending[refused]
            if not len(pending):
                break
            x[pending] = torch.randn_like(x[pending])
        return x.reshape(shape)


def check_tail_index(df: float) -> None:
    """Raises a ``ValueError`` unless tails of this index have a mean."""
    if not df > 1:
        raise ValueError(f"FlexibleBase: df must be greater than 1, but got {df}.")


def check_resampling(num_tries: int, num_draws: int) -> None:
    """Raises a ``ValueError`` that names the option with which nothing can be resampled."""
    for name, value in (("num_tries", num_tries), ("num_draws", num_draws)):
        if value < 2:
            raise ValueError(f"ResampledBase: {name} must be at least 2, but got {value}.")


def _fixed_noise(num_draws: int, dim: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_draws, dim))


def _share_out(num_components: int, log_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mode of each component, its log-weight, and whether it is not the mode's first one ``(num_components, 1)``."""
    order = log_mass.argsort(descending=True)[:num_components]
    place = torch.arange(num_components, device=log_mass.device)
    index = place % len(order)
    shares = torch.bincount(index, minlength=len(order)).to(log_mass)
    log_mass = torch.log_softmax(log_mass[order], 0) - shares.log()
    return order[index], log_mass[index], (place >= len(order)).to(log_mass).unsqueeze(-1)


def _normal_terms(x: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised values and log-densities ``(..., num_components, dim)``."""
    u = (x.unsqueeze(-2) - loc) / scale
    return u, -0.5 * u * u - scale.log() - 0.5 * math.log(2 * math.pi)


def _conditional_cdfs(x: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``P(X_i <= x_i | x_1, ..., x_{i-1})`` ``(..., dim)``, and its Jacobian by ``x``, lower triangular."""
    u, log_density = _normal_terms(x, loc, scale)
    given = log_density.cumsum(-1) - log_density  # of the elements before
    weights = torch.softmax(logits.unsqueeze(-1) + given, -2)
    below = torch.special.ndtr(u)
    cdf = (weights * below).sum(-2)
    slope = (weights * log_density.exp()).sum(-2)
    lower = (weights * (below - cdf.unsqueeze(-2))).mT @ (-u / scale)
    return cdf, lower.tril(-1) + torch.diag_embed(slope)


BASES = {base.__name__: base for base in (LocScaleBase, FlexibleBase, MixtureBase)}  # which a file can describe
