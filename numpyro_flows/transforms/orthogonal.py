"""Orthogonal maps (log-determinant zero), and the QR factorisation of a matrix that rests on them."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from numpyro_flows.conditioners import MLP
from numpyro_flows.transform_module import TransformModule, full_precision
from numpyro_flows.transforms.linear import solve


class Householder(TransformModule):
    """``y = H_1 H_2 .. H_k x`` with reflections ``H_i = I - 2 v_i v_i^T / |v_i|^2``: a rotation, log-determinant zero.

    Tomczak & Welling 2016, eq. 8. The product is taken at once, as ``I - U^T S^{-1} U`` (compact WY form). Costs
    ``O(k dim)`` an element of the batch and ``O(k^2 dim)`` a call, both ways; with a context, ``O(k^2 dim)`` an
    element. The vectors start as pairs of equal ones, whose reflections cancel: at the identity.

    :param dim: size of ``x``.
    :param num_reflections: ``k``, even; ``dim`` of them reach every rotation.
    :param hidden_dims: hidden widths of the network that gives the vectors, used with a context only.
    :param context_dim: size of the context, 0 for none (then the vectors are free parameters).
    :param activation: the network's activation.
    :param seed: of the pairs' first directions.
    """

    vectors: Array
    conditioner: MLP | None
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_reflections: int = 2,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        context_dim: int = 0,
        activation: str = "silu",
        seed: int = 0,
        key: Array | None = None,
    ):
        self.dim = dim
        self.vectors = jnp.asarray(pairs(dim, num_reflections, seed), float)
        self.conditioner = None
        if context_dim:
            if key is None:
                raise ValueError("Householder: key= is needed to initialise the conditioner of a context.")
            self.conditioner = MLP(0, hidden_dims, num_reflections * dim, context_dim, activation, key=key)

    def _factors(self, x: Array, context: Array | None) -> tuple[Array, Array]:
        if self.conditioner is None:
            return reflections(self.vectors)
        theta = self.conditioner(x[..., :0], context)
        return reflections(self.vectors + theta.reshape(*theta.shape[:-1], *self.vectors.shape))

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, w = self._factors(x, context)
        y = subtract(x, w, u)
        return y, jnp.zeros(y.shape[:-1], y.dtype)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, w = self._factors(y, context)
        x = subtract(y, u, w)
        return x, jnp.zeros(x.shape[:-1], x.dtype)


class QRLinear(TransformModule):
    """``y = Q R x + bias``; ``Q`` a product of reflections, ``R`` upper triangular with diagonal ``exp(log_diag)``.

    Hoogeboom et al. 2019 (Emerging convolutions), section 3.2. ``log |det|`` is the sum of ``log_diag``. Costs
    ``O(dim^2)`` an element of the batch, both ways, and ``O(k^2 dim)`` a call. Every matrix of positive determinant is
    one of these (with the default of ``k``). Starts at the identity.

    :param dim: size of ``x``.
    :param num_reflections: ``k``, even; ``dim`` rounded down to an even number (at least 2) unless given.
    :param seed: of the reflections' first directions, which come in pairs that cancel.
    """

    vectors: Array
    upper: Array
    log_diag: Array
    bias: Array
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, num_reflections: int | None = None, seed: int = 0):
        self.dim = dim
        num_reflections = max(2, dim - dim % 2) if num_reflections is None else num_reflections
        self.vectors = jnp.asarray(pairs(dim, num_reflections, seed), float)
        self.upper = jnp.zeros((dim, dim))
        self.log_diag, self.bias = jnp.zeros(dim), jnp.zeros(dim)

    def _upper(self) -> Array:
        return jnp.triu(self.upper, 1) + jnp.diag(jnp.exp(self.log_diag))

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, w = reflections(self.vectors)
        y = subtract(x @ self._upper().T, w, u) + self.bias
        return y, jnp.broadcast_to(self.log_diag.sum(-1), x.shape[:-1])

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        u, w = reflections(self.vectors)
        x = solve(self._upper(), subtract(y - self.bias, u, w), lower=False)
        return x, jnp.broadcast_to(-self.log_diag.sum(-1), y.shape[:-1])


class Orthogonal(TransformModule):
    """``y = Q x``, a rotation from a skew-symmetric ``A``: ``Q = exp(A)``, or ``(I + A)^{-1} (I - A)``; log-det zero.

    Costs ``O(dim^2)`` an element of the batch and ``O(dim^3)`` a call, both ways. ``exp`` reaches every rotation,
    ``cayley`` (cheaper) all but those by half a turn. ``Q`` is orthogonal to rounding for any ``A``. Starts at the
    identity. Only the lower triangle of ``skew`` counts.

    Golinski et al. 2019 (Improving normalizing flows via better orthogonal parameterizations).

    :param dim: size of ``x``.
    :param method: ``"exp"`` or ``"cayley"``.
    """

    skew: Array
    method: str = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, method: str = "exp"):
        check_method(method)
        self.dim, self.method = dim, method
        self.skew = jnp.zeros((dim, dim))

    @property
    def matrix(self) -> Array:
        """``Q`` ``(dim, dim)``."""
        lower = jnp.tril(self.skew, -1)
        skew = lower - lower.T
        if self.method == "exp":
            return _exp_of_skew(skew)
        eye = jnp.eye(len(skew), dtype=skew.dtype)
        return jnp.linalg.solve(eye + skew, eye - skew)

    @full_precision
    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return x @ self.matrix.T, jnp.zeros(x.shape[:-1], x.dtype)

    @full_precision
    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return y @ self.matrix, jnp.zeros(y.shape[:-1], y.dtype)


# Pade approximant [7/7] of exp (Higham 2005, table 2.3): exact to float64 for norms up to 0.95
PADE = [1.0, 1 / 2, 3 / 26, 5 / 312, 5 / 3432, 1 / 11440, 1 / 308880, 1 / 17297280]


@full_precision
def _exp_of_skew(a: Array) -> Array:
    """``exp(A)`` by scaling and squaring, with nothing read on the host. It is accurate for norms up to 243; beyond
    them it is orthogonal all the same, as the approximant of any skew ``A`` is."""
    norm = lax.stop_gradient(jnp.abs(a).sum(-1).max())
    halvings = jnp.clip(jnp.ceil(jnp.log2(norm / 0.95)), 0, 8)
    a = a * jnp.exp2(-halvings)
    eye = jnp.eye(len(a), dtype=a.dtype)
    a2 = a @ a
    a4 = a2 @ a2
    a6 = a4 @ a2
    odd = a @ (PADE[7] * a6 + PADE[5] * a4 + PADE[3] * a2 + PADE[1] * eye)
    even = PADE[6] * a6 + PADE[4] * a4 + PADE[2] * a2 + eye
    q = jnp.linalg.solve(even - odd, even + odd)
    for step in range(8):
        q = jnp.where(halvings > step, q @ q, q)
    return q


@full_precision
def reflections(vectors: Array) -> tuple[Array, Array]:
    """``U`` and ``W`` ``(..., k, dim)`` with ``H_1 .. H_k = I - U^T W`` for the reflections at ``vectors``."""
    square = jnp.square(vectors).sum(-1, keepdims=True)
    u = vectors * lax.rsqrt(jnp.where(square > jnp.finfo(square.dtype).tiny, square, 1))  # none at a zero vector
    eye = jnp.eye(u.shape[-2], dtype=u.dtype)
    return u, solve_triangular(jnp.triu(u @ u.mT, 1) + 0.5 * eye, u)


@full_precision
def subtract(x: Array, first: Array, second: Array) -> Array:
    """``x - second^T first x`` for matrices ``(..., k, dim)``."""
    if first.ndim == 2:
        return x - x @ first.T @ second
    return x - (x[..., None, :] @ first.mT @ second)[..., 0, :]


def pairs(dim: int, num_reflections: int, seed: int) -> np.ndarray:
    """Random unit vectors ``(num_reflections, dim)``, each twice in a row: the same in both packages."""
    if num_reflections < 2 or num_reflections % 2:
        raise ValueError(f"num_reflections must be even and at least 2, but got {num_reflections}.")
    vectors = np.random.default_rng(seed).normal(size=(num_reflections // 2, dim))
    return np.repeat(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), 2, axis=0)


def check_method(method: str) -> None:
    """Raises a ``ValueError`` unless ``method`` names a parametrisation of :class:`Orthogonal`."""
    if method not in ("exp", "cayley"):
        raise ValueError(f'Orthogonal: method must be "exp" or "cayley", but got {method!r}.')
