"""A flow as a density: base distribution and transform, fused; base distributions, fixed and learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp, ndtr
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from numpyro_flows.conditioners import MLP
from numpyro_flows.transform_module import Compose, TransformModule
from numpyro_flows.transforms import Elementwise
from numpyro_flows.univariate import SinhArcsinh, TailTransform
from numpyro_flows.univariate.tails import side, stretch


class _InOrder:
    """A distribution whose parts are in the order of their names, which are program inputs.

    NumPyro's come in that of a set, another one in every process, which jax's cache on disk then takes for another
    program.
    """

    @classmethod
    def gather_pytree_data_fields(cls) -> tuple[str, ...]:
        return tuple(sorted(super().gather_pytree_data_fields()))  # type: ignore[misc]


class _Normal(_InOrder, dist.Normal):
    pass


class _Chi2(_InOrder, dist.Chi2):
    pass


class _StudentT(_InOrder, dist.StudentT):
    def __init__(self, df: Any, loc: Any, scale: Any):
        super().__init__(df, loc, scale)
        self._chi2 = _Chi2(self.df)  # by which it is drawn


class FlowDistribution(_InOrder, dist.TransformedDistribution):
    """The density of ``y = transform(x)``, ``x ~ base``: ``log p(y) = log p(x) - log |det dy/dx|``.

    A NumPyro ``TransformedDistribution`` that takes one pass where NumPyro's takes two: a density at given points
    inverts and scores together, and a sample brings its own density along.

    :param base: distribution over vectors ``(..., dim)`` (``event_dim`` 1), or a :class:`Base`, whose distribution at
        its present parameters is taken.
    :param transform: a :class:`TransformModule`, conditioned if it needs a context.
    """

    def __init__(
        self,
        base: dist.Distribution | Base,
        transform: TransformModule,
        *,
        validate_args: bool | None = None,
    ):
        if not isinstance(transform, TransformModule):
            raise TypeError(
                f"FlowDistribution: transform must be a TransformModule, but got {type(transform).__name__}. "
                "Use numpyro.distributions.TransformedDistribution for NumPyro's own transforms."
            )
        base = distribution_of(base)
        super().__init__(base, [transform], validate_args=validate_args)
        if isinstance(base, dist.TransformedDistribution):  # NumPyro takes it apart; here the flow stands alone
            same = base.batch_shape == self.batch_shape
            self.base_dist, self.transforms = base if same else base.expand(self.batch_shape), [transform]

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


class ConditionalFlowDistribution(eqx.Module):
    """A density ``p(y | context)``: call :meth:`condition` to get it as a :class:`FlowDistribution`.

    :param base: as for :class:`FlowDistribution`.
    :param transform: a :class:`TransformModule` that takes a context.
    """

    base: Any
    transform: TransformModule

    def __init__(self, base: dist.Distribution | Base, transform: TransformModule):
        self.base, self.transform = base, transform

    def condition(self, context: Array) -> FlowDistribution:
        """The density given a context ``(..., context_dim)``, whose batch axes become those of the distribution."""
        base = distribution_of(self.base)
        batch = jnp.broadcast_shapes(base.batch_shape, context.shape[:-1])
        return FlowDistribution(base.expand(batch), self.transform.condition(context))


def standard_base(dim: int, df: float | None = None, like: Array | None = None) -> dist.Distribution:
    """Independent standard normals ``(dim,)``, or Student-t's with ``df`` degrees of freedom.

    :param like: an array whose dtype the density has (NumPyro's draws have jax's default); that default unless given.
    """
    zeros = jnp.zeros(dim, None if like is None else like.dtype)
    return _independent(zeros, jnp.ones_like(zeros), df)


def _independent(loc: Array, scale: Array, df: float | None) -> dist.Distribution:
    return (_Normal(loc, scale) if df is None else _StudentT(jnp.full_like(loc, df), loc, scale)).to_event(1)


class Base(eqx.Module):
    """A base distribution that is learned along with the flow: a module of unconstrained parameters."""

    multimodal: ClassVar[bool] = False  # whether it has modes of its own, to be placed by ``at_modes``

    def distribution(self) -> dist.Distribution:
        """The distribution at the present parameters."""
        raise NotImplementedError

    def draw(self, key: Array, n: int) -> tuple[Array, Array | None]:
        """Draws ``(n, dim)``, and their log-density as a function of what they carry no gradient of, if anything.

        For ``elbo.score_gradient``, where a draw's derivative by some parameter is a bad estimator.
        """
        return self.distribution().sample(key, (n,)), None

    def at_modes(self, log_mass: Array, loc: Array, scale: Array) -> Base:
        """The base placed on modes found in its own coordinates, as a copy; itself, unless a base knows how.

        :param log_mass: logarithms of the modes' masses ``(num_modes,)``, up to a constant.
        :param loc: the modes ``(num_modes, dim)``.
        :param scale: their scales ``(num_modes, dim)``.
        """
        return self


def distribution_of(base: dist.Distribution | Base) -> dist.Distribution:
    """The distribution itself, or that of a :class:`Base` at its present parameters."""
    return base.distribution() if isinstance(base, Base) else base


class LocScaleBase(Base):
    """Independent normals, or Student-t's, of learned location and scale; standard at the start.

    :param dim: size of a draw.
    :param df: degrees of freedom (not learned), ``None`` for normals.
    :param key: not used: nothing is drawn.
    """

    loc: Array
    log_scale: Array
    df: float | None = eqx.field(static=True)

    def __init__(self, dim: int, df: float | None = None, *, key: Array | None = None):
        self.df = df
        self.loc, self.log_scale = jnp.zeros(dim), jnp.zeros(dim)

    def distribution(self) -> dist.Distribution:
        return _independent(self.loc, jnp.exp(self.log_scale), self.df)


class _HeavyTails(TailTransform):
    """Weights are positive, which is half of the work."""

    def _weight(self, raw: Array) -> Array:
        return self.max_weight * jax.nn.sigmoid(raw)

    def forward_and_log_det(self, x: Array, params: Array) -> tuple[Array, Array]:
        return stretch(x, True, self._weight(side(x, params)))

    def inverse_and_log_det(self, y: Array, params: Array) -> tuple[Array, Array]:
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
    :param key: not used: nothing is drawn.
    """

    skewness: Elementwise
    tails: Elementwise

    def __init__(self, dim: int, df: float | None = None, *, key: Array | None = None):
        df = 20.0 * max(1.0, dim / 10) ** 0.5 if df is None else df
        check_tail_index(df)
        self.skewness = Elementwise(dim, SinhArcsinh())
        tails = Elementwise(dim, _HeavyTails())
        self.tails = eqx.tree_at(lambda tails: tails.params, tails, jnp.full((2, dim), -math.log(df - 1)))

    def distribution(self) -> FlowDistribution:
        shape = Compose([self.skewness, self.tails])
        return FlowDistribution(standard_base(self.tails.dim, like=self.tails.params), shape)


class MixtureBase(Base):
    """A :class:`DiagonalMixture` of learned weights, locations and scales, for densities of several modes.

    Starts with equal weights, scales of one and locations drawn from a normal.

    :param dim: size of a draw.
    :param num_components: number of normals.
    :param spread: standard deviation of the first locations.
    """

    multimodal = True
    logits: Array
    loc: Array
    log_scale: Array

    def __init__(self, dim: int, num_components: int = 8, spread: float = 2.0, *, key: Array):
        if num_components < 1:
            raise ValueError(f"MixtureBase: num_components must be at least 1, but got {num_components}.")
        self.logits = jnp.zeros(num_components)
        self.loc = spread * jax.random.normal(key, (num_components, dim))
        self.log_scale = jnp.zeros((num_components, dim))

    def distribution(self) -> dist.Distribution:
        return DiagonalMixture(self.logits, self.loc, jnp.exp(self.log_scale))

    def draw(self, key: Array, n: int) -> tuple[Array, Array]:
        k_key, x_key = jax.random.split(key)
        k = jax.random.categorical(k_key, self.logits, shape=(n,))
        scale = jnp.exp(self.log_scale)
        x = self.loc[k] + scale[k] * jax.random.normal(x_key, (n, self.loc.shape[-1]), self.loc.dtype)
        loc, scale, fixed = lax.stop_gradient((self.loc, scale, x))
        return x, DiagonalMixture(self.logits, loc, scale).log_prob(fixed)

    def at_modes(self, log_mass: Array, loc: Array, scale: Array) -> MixtureBase:
        """The components shared out among the modes, of which each gets its mass; those of least mass may get none."""
        mode, logits, offset = _share_out(len(self.logits), log_mass)
        new = logits, loc[mode] + offset * scale[mode] * self.loc, jnp.log(scale[mode])
        return eqx.tree_at(lambda base: (base.logits, base.loc, base.log_scale), self, new)


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

    acceptance: MLP
    num_tries: int = eqx.field(static=True)
    num_draws: int = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        num_tries: int = 100,
        num_draws: int = 4096,
        *,
        key: Array,
    ):
        check_resampling(num_tries, num_draws)
        self.acceptance, self.num_tries = MLP(dim, hidden_dims, 1, key=key), num_tries
        self.num_draws, self.dim = num_draws, dim

    def distribution(self, noise: Array | None = None) -> Resampled:
        if noise is None:
            dtype = self.acceptance.layers[0].weight.dtype
            noise = jnp.asarray(_fixed_noise(self.num_draws, self.dim), dtype)
        return Resampled(self.acceptance, noise, self.num_tries)


class DiagonalMixture(_InOrder, dist.Distribution):
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
    support = constraints.real_vector  # type: ignore[assignment]
    reparametrized_params = ["logits", "loc", "scale"]

    def __init__(self, logits: Array, loc: Array, scale: Array, *, validate_args: bool | None = None):
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__((), jnp.shape(loc)[-1:], validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        terms = _normal_terms(value, self.loc, self.scale)[1].sum(-1) + jax.nn.log_softmax(self.logits)
        return logsumexp(terms, -1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        k_key, x_key = jax.random.split(key)
        k = jax.random.categorical(k_key, self.logits, shape=sample_shape)
        noise = jax.random.normal(x_key, (*sample_shape, *self.event_shape), self.loc.dtype)
        x = lax.stop_gradient(self.loc[k] + self.scale[k] * noise)
        uniform, slope = _conditional_cdfs(x, self.logits, self.loc, self.scale)
        moved = uniform - lax.stop_gradient(uniform)  # zero, but for its gradient
        return x - solve_triangular(lax.stop_gradient(slope), moved[..., None], lower=True)[..., 0]


class Resampled(_InOrder, dist.Distribution):
    """Normals, each accepted with probability ``a(x)`` or drawn anew; the last of ``num_tries`` tries is always taken.

    The density is ``N(x; 0, I) ((1 - t) a(x) / Z + t)`` with ``t = (1 - Z)^(num_tries - 1)`` (Bauer & Mnih 2019;
    Stimper et al. 2022), exact but for ``Z = E[a(x)]``, which is estimated. Draws carry no gradient, and are
    tried together until the last of them is accepted: one network pass over all of them a try.

    :param acceptance: network ``(..., dim) -> (..., 1)`` of the logit of ``a(x)``.
    :param noise: normal draws ``(num_draws, dim)`` that estimate ``Z``.
    :param num_tries: most tries.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector  # type: ignore[assignment]
    has_rsample = False  # type: ignore[assignment]
    pytree_data_fields = ("acceptance", "noise")
    pytree_aux_fields = ("num_tries",)

    def __init__(self, acceptance: MLP, noise: Array, num_tries: int, *, validate_args: bool | None = None):
        self.acceptance, self.noise, self.num_tries = acceptance, noise, num_tries
        super().__init__((), jnp.shape(noise)[-1:], validate_args=validate_args)

    @property
    def normaliser(self) -> tuple[Array, Array]:
        """The estimate of ``Z``, and its standard error."""
        accepted = jax.nn.sigmoid(self._logit(self.noise))
        return accepted.mean(), accepted.std(ddof=1) / len(accepted) ** 0.5

    def _logit(self, x: Array) -> Array:
        return self.acceptance(x)[..., 0]

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        logit = self._logit(self.noise)
        log_z, log_rest = (logsumexp(jax.nn.log_sigmoid(h)) - math.log(len(logit)) for h in (logit, -logit))
        log_last = (self.num_tries - 1) * log_rest
        log_early = jnp.log(-jnp.expm1(log_last)) - log_z
        log_share = jnp.logaddexp(jax.nn.log_sigmoid(self._logit(value)) + log_early, log_last)
        log_normal = -0.5 * jnp.square(value).sum(-1) - 0.5 * value.shape[-1] * math.log(2 * math.pi)
        return log_normal + log_share

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape, dtype = (*sample_shape, *self.event_shape), self.noise.dtype

        def attempt(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            tries, pending, x, key = state
            key, x_key, u_key = jax.random.split(key, 3)
            refused = pending & (jax.random.uniform(u_key, shape[:-1], dtype) >= jax.nn.sigmoid(self._logit(x)))
            fresh = jax.random.normal(x_key, shape, dtype)
            return tries + 1, refused, jnp.where(refused[..., None], fresh, x), key

        key, x_key = jax.random.split(key)
        state = jnp.ones((), int), jnp.ones(shape[:-1], bool), jax.random.normal(x_key, shape, dtype), key
        return lax.while_loop(lambda s: (s[0] < self.num_tries) & s[1].any(), attempt, lax.stop_gradient(state))[2]


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


def _share_out(num_components: int, log_mass: Array) -> tuple[Array, Array, Array]:
    """Mode of each component, its log-weight, and whether it is not the mode's first one ``(num_components, 1)``."""
    order = jnp.argsort(-log_mass)[:num_components]
    place = jnp.arange(num_components)
    index = place % len(order)
    shares = jnp.bincount(index, length=len(order)).astype(log_mass.dtype)
    log_mass = jax.nn.log_softmax(log_mass[order]) - jnp.log(shares)
    return order[index], log_mass[index], (place >= len(order)).astype(log_mass.dtype)[:, None]


def _normal_terms(x: Array, loc: Array, scale: Array) -> tuple[Array, Array]:
    """Standardised values and log-densities ``(..., num_components, dim)``."""
    u = (x[..., None, :] - loc) / scale
    return u, -0.5 * u * u - jnp.log(scale) - 0.5 * math.log(2 * math.pi)


def _conditional_cdfs(x: Array, logits: Array, loc: Array, scale: Array) -> tuple[Array, Array]:
    """``P(X_i <= x_i | x_1, ..., x_{i-1})`` ``(..., dim)``, and its Jacobian by ``x``, lower triangular."""
    u, log_density = _normal_terms(x, loc, scale)
    given = jnp.cumsum(log_density, -1) - log_density  # of the elements before
    weights = jax.nn.softmax(logits[:, None] + given, -2)
    below = ndtr(u)
    cdf = (weights * below).sum(-2)
    slope = (weights * jnp.exp(log_density)).sum(-2)
    lower = jnp.swapaxes(weights * (below - cdf[..., None, :]), -1, -2) @ (-u / scale)
    return cdf, jnp.tril(lower, -1) + slope[..., None] * jnp.eye(slope.shape[-1], dtype=x.dtype)


BASES = {base.__name__: base for base in (LocScaleBase, FlexibleBase, MixtureBase)}  # which a file can describe
