"""Residual flows (Behrmann et al. 2019, i-ResNet; Chen et al. 2019, Residual Flows)."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_flows.conditioners import MLP, Linear, check_network, first_weights
from numpyro_flows.numerical import fixed_point_root
from numpyro_flows.transform_module import TransformModule, _typed_key

LOG_DETS = ("exact", "unbiased")
_LIP_SWISH = 1.1  # above the largest slope of x sigmoid(beta x), 1.0998, for any beta
_LEAST_RATE = 1e-3  # at which a series goes on, lest an estimate divide by zero


class Residual(TransformModule):
    """``y = x + g(x)`` with a network ``g`` of Lipschitz constant at most ``lipschitz < 1``.

    Each weight is scaled down to its share of the constant by an upper bound of its 2-norm (by a power of its
    Gram matrix: the same in every pass, at most 0.5% above the norm up to width 100); the activation is LipSwish,
    ``h sigmoid(beta h) / 1.1``. Starts at the identity.

    Forward takes one pass of ``g``, the inverse as many as the fixed point ``x = y - g(x)`` needs, about ``36 /
    -log(Lip g)`` in float64. The log-determinant costs, beside that:

    - ``log_det="exact"``: the Jacobian (``dim`` products with the weights) and ``O(dim^3)``.
    - ``log_det="unbiased"``: ``exact_terms`` of the power series of ``log det(I + J)`` and a random number more, each
      kept with probability ``p``, the bound of Lip g which the weights have at present (Russian roulette, for which the
      variance is finite), with one random vector for the trace (Hutchinson): about ``exact_terms + p / (1 - p)``
      vector products with ``J``, and ``p <= lipschitz``. Its gradient is the unbiased Neumann series (Chen et al. 2019,
      eq. 8), whose memory does not grow with the number of terms; second derivatives of this estimate are not.
      Noise is a pure function of the map's ``noise_key`` and of the bits of ``x``, so that both methods stay pure and
      no two inputs share it; ``flow.with_key(key)`` renews it for data that come again.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of ``g``, and of the conditioner of its biases, used with a context only.
    :param context_dim: size of the context, 0 for none.
    :param lipschitz: bound of the Lipschitz constant of ``g``.
    :param log_det: ``"exact"`` or ``"unbiased"``; :meth:`log_det_estimate` gives the latter's standard error.
    :param exact_terms: terms of the series which are always summed.
    :param activation: the conditioner's activation.
    :raises RuntimeError: where the inverse does not converge.
    """

    layers: tuple[Linear, ...]
    slopes: tuple[Array, ...]
    conditioner: MLP | None
    noise_key: Array | None
    dim: int = eqx.field(static=True)
    lipschitz: float = eqx.field(static=True)
    log_det: str = eqx.field(static=True)
    exact_terms: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        lipschitz: float = 0.9,
        log_det: str = "exact",
        exact_terms: int = 4,
        activation: str = "silu",
        key: Array,
    ):
        check_network(hidden_dims, context_dim, activation)
        check_residual(hidden_dims, lipschitz, log_det)
        self.dim, self.lipschitz, self.log_det, self.exact_terms = dim, lipschitz, log_det, exact_terms
        dims = (dim, *hidden_dims, dim)
        noise_key, c_key, key = jax.random.split(key, 3)
        shapes = list(zip(dims[1:], dims, strict=False))
        self.layers = tuple(Linear(*weights) for weights in first_weights(shapes, key))
        self.slopes = tuple(jnp.zeros(width) for width in hidden_dims)
        self.conditioner = (
            MLP(0, hidden_dims, sum(dims[1:]), context_dim, activation, key=c_key) if context_dim else None
        )
        self.noise_key = None if log_det == "exact" else _typed_key(noise_key)

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.log_det == "exact"

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        weights, biases, rate = self._layers(x, context)
        g, slopes = self._g(weights, biases, x)
        return x + g, self._log_det(weights, slopes, rate, x)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        if context is not None:
            y = jnp.broadcast_to(y, jnp.broadcast_shapes(y.shape[:-1], context.shape[:-1]) + y.shape[-1:])
        weights, biases, rate = self._layers(y, context)
        x = fixed_point_root(
            lambda x: self._g(weights, biases, x)[0],
            y,
            jacobian=lambda x: _jacobian(weights, self._g(weights, biases, x)[1]),
            owner="Residual",
        )
        _, slopes = self._g(weights, biases, x)
        return x, -self._log_det(weights, slopes, rate, x)

    def log_det_estimate(
        self, x: Array, num_samples: int = 100, context: Array | None = None, *, key: Array
    ) -> tuple[Array, Array]:
        """``log |det dy/dx|`` at ``x`` as the mean of unbiased estimates, and its standard error, both ``(...)``."""
        weights, biases, rate = self._layers(x, context)
        _, slopes = self._g(weights, biases, x)
        estimates = lax.map(lambda k: self._unbiased(weights, slopes, rate, k), jax.random.split(key, num_samples))
        return estimates.mean(0), estimates.std(0, ddof=1) / num_samples**0.5

    def _layers(self, x: Array, context: Array | None) -> tuple[list[Array], list[Array], Array]:
        """The weights, scaled to the share of the Lipschitz constant that each may have, the biases, and the constant
        that these weights have."""
        share = self.lipschitz ** (1 / len(self.layers))
        bounds = [spectral_bound(layer.weight) for layer in self.layers]
        weights = [layer.weight * (share / jnp.maximum(b, share)) for layer, b in zip(self.layers, bounds, strict=True)]
        rate = jnp.minimum(lax.stop_gradient(jnp.stack(bounds)), share).prod()
        biases = [layer.bias for layer in self.layers]
        if self.conditioner is not None:
            theta, start = self.conditioner(x[..., :0], context), 0
            for n, bias in enumerate(biases):
                biases[n], start = bias + theta[..., start : start + bias.size], start + bias.size
        return weights, biases, rate

    def _g(self, weights: list[Array], biases: list[Array], x: Array) -> tuple[Array, list[Array]]:
        """``g(x)`` and the slopes of the activations in each hidden layer."""
        h, slopes = x @ weights[0].T + biases[0], []
        for raw, weight, bias in zip(self.slopes, weights[1:], biases[1:], strict=True):
            beta = jax.nn.softplus(raw)
            gate = jax.nn.sigmoid(beta * h)
            slopes.append((gate + beta * h * gate * (1 - gate)) / _LIP_SWISH)
            h = (h * gate / _LIP_SWISH) @ weight.T + bias
        return h, slopes

    def _log_det(self, weights: list[Array], slopes: list[Array], rate: Array, x: Array) -> Array:
        if self.noise_key is None:
            return _exact(weights, slopes)
        bits = lax.bitcast_convert_type(lax.stop_gradient(x).sum().astype(jnp.float32), jnp.uint32)
        return self._unbiased(weights, slopes, rate, jax.random.fold_in(self.noise_key, bits))

    def _unbiased(self, weights: list[Array], slopes: list[Array], rate: Array, key: Array) -> Array:
        """One unbiased estimate of ``log det(I + J)``, with an unbiased gradient."""
        noise_key, stop_key = jax.random.split(key)
        like = slopes[0]
        noise = jax.random.rademacher(noise_key, (*like.shape[:-1], self.dim), like.dtype)
        keep = jnp.maximum(rate, _LEAST_RATE)
        more = jnp.floor(jnp.log1p(-jax.random.uniform(stop_key, dtype=like.dtype)) / jnp.log(keep))  # P(>= j) = keep^j
        fixed, fixed_slopes = lax.stop_gradient((weights, slopes))

        def term(k, state):
            power, neumann, value = state
            power = _pull(fixed, fixed_slopes, power)
            sign = jnp.where(k % 2 == 0, 1.0, -1.0).astype(like.dtype)
            weight = sign * keep ** -jnp.maximum(k - self.exact_terms, 0)
            value = value - weight / k * (power * noise).sum(-1)
            return power, neumann + weight * power, value

        start = noise, noise, jnp.zeros_like(noise[..., 0])
        _, neumann, value = lax.fori_loop(1, self.exact_terms + 1 + more.astype(int), term, start)
        surrogate = (neumann * _push(weights, slopes, noise)).sum(-1)  # only its gradient counts
        return value + surrogate - lax.stop_gradient(surrogate)


def _jacobian(weights: list[Array], slopes: list[Array]) -> Array:
    """The Jacobian of ``g`` ``(..., dim, dim)``."""
    jacobian = weights[0]
    for slope, weight in zip(slopes, weights[1:], strict=True):
        jacobian = weight @ (slope[..., None] * jacobian)
    return jacobian


def _exact(weights: list[Array], slopes: list[Array]) -> Array:
    """``log det(I + J)``."""
    jacobian = _jacobian(weights, slopes)
    return jnp.linalg.slogdet(jnp.eye(jacobian.shape[-1], dtype=jacobian.dtype) + jacobian)[1]


def _push(weights: list[Array], slopes: list[Array], v: Array) -> Array:
    """``J v``."""
    v = v @ weights[0].T
    for slope, weight in zip(slopes, weights[1:], strict=True):
        v = (slope * v) @ weight.T
    return v


def _pull(weights: list[Array], slopes: list[Array], v: Array) -> Array:
    """``J^T v``."""
    for slope, weight in zip(slopes[::-1], weights[:0:-1], strict=True):
        v = slope * (v @ weight)
    return v @ weights[0]


def spectral_bound(weight: Array) -> Array:
    """An upper bound of the 2-norm, ``rank^(1 / 1024)`` times it at most (Delattre et al. 2023).

    By the Frobenius norm of the 256th power of the Gram matrix, which lies above its largest eigenvalue's.
    """
    power = weight.mT @ weight if weight.shape[-1] <= weight.shape[-2] else weight @ weight.mT

    def raise_power(power, share):  # scaled each time before it is raised to the fourth power, lest it vanish
        norm = _frobenius(power)
        power = power / norm
        power = power @ power
        return power @ power, jnp.log(norm) * share

    power, log_norms = lax.scan(raise_power, power, 4.0 ** -jnp.arange(4, dtype=power.dtype))
    return jnp.exp(0.5 * (log_norms.sum() + jnp.log(_frobenius(power)) / 256))


def _frobenius(matrix: Array) -> Array:
    return jnp.sqrt((matrix**2).sum() + jnp.finfo(matrix.dtype).tiny)


def check_residual(hidden_dims: Sequence[int], lipschitz: float, log_det: str) -> None:
    """Raises a ``ValueError`` that names the argument with which no residual map can be built."""
    if not hidden_dims:
        raise ValueError("Residual: hidden_dims must hold at least one width.")
    if not 0 < lipschitz < 1:
        raise ValueError(f"Residual: lipschitz must lie between 0 and 1, but got {lipschitz}.")
    if log_det not in LOG_DETS:
        raise ValueError(f"Residual: log_det must be one of {LOG_DETS}, but got {log_det!r}.")
