"""Continuous flow: an ordinary differential equation (Chen et al. 2018; FFJORD, Grathwohl et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy.integrate import DOP853

from numpyro_flows.conditioners import MLP
from numpyro_flows.transform_module import TransformModule, check_context

FIXED = {  # schemes of fixed steps: nodes c, weights a of the stages, weights b of the step
    "rk4": (np.array([0, 0.5, 0.5, 1]), np.diag([0.5, 0.5, 1], -1), np.array([1, 2, 2, 1]) / 6),
    "dop853": (DOP853.C, DOP853.A, DOP853.B),
}
ADAPTIVE = ("bosh3", "dopri5", "dopri8")
_MAX_STEPS = 4096  # of the adaptive solvers


class Continuous(TransformModule):
    """``y = x(1)`` with ``dx/dt = v(x, t, context)`` from ``x(0) = x``.

    The log-determinant is the integral of ``tr dv/dx`` on the way (Chen et al. 2018, eq. 8). Both directions take the
    same ``num_steps`` steps, forward or backward in time. The ``velocity`` is a perceptron with bounded slopes, so that
    every solution exists and is unique: a bijection of the whole space. With at most two hidden layers the exact trace
    is one bilinear form of the activations' slopes, and costs no more than a second network pass whatever ``dim`` is;
    with more layers, ``dim`` tangents. The solution is as exact as the solver: check a trained flow by
    :meth:`solver_error`.

    The schemes of fixed steps, ``"dop853"`` (order 8, 12 passes a step) and ``"rk4"`` (order 4, 4 passes), are
    differentiated step by step, in every mode, and read nothing on the host. Of each pass the gradient keeps the point
    alone and computes the activations again (in torch with two hidden layers and the exact trace, in reverse mode). The
    adaptive ones (``"dopri5"``, ``"dopri8"``, ``"bosh3"``, by torchdiffeq in torch and diffrax in jax) keep the local
    error of the batch below ``rtol`` and ``atol``.

    :param dim: size of ``x``.
    :param hidden_dims: hidden widths of the velocity.
    :param context_dim: size of the context, 0 for none.
    :param activation: ``"tanh"`` (a bounded velocity: far away the map is a shift), ``"softplus"`` or ``"silu"`` (a
        velocity that grows linearly: often the better fit, but points at 100 need several times the steps).
    :param trace: ``"exact"``, or ``"hutchinson"``: unbiased, by one draw of noise held fixed through a solution
        (Grathwohl et al. 2019, eq. 7). The noise is made from a hash of the batch: other points, other noise.
    :param solver: one of ``"dop853"``, ``"rk4"``, ``"dopri5"``, ``"dopri8"``, ``"bosh3"``.
    :param num_steps: number of the fixed steps.
    :param rtol: relative tolerance of the adaptive solvers.
    :param atol: absolute tolerance of the adaptive solvers.
    :param adjoint: gradients by an equation solved backward, in constant memory but with the solver's error; for
        adaptive solvers, and first derivatives in reverse mode only. If not, the steps are differentiated.
    """

    velocity: Velocity
    dim: int = eqx.field(static=True)
    trace: str = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    atol: float = eqx.field(static=True)
    adjoint: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
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
    ):
        check_solver(dim, trace, solver, num_steps, rtol, atol, adjoint)
        self.velocity = Velocity(dim, hidden_dims, context_dim, activation, key=key)
        self.dim, self.trace, self.solver, self.num_steps = dim, trace, solver, num_steps
        self.rtol, self.atol, self.adjoint = rtol, atol, adjoint

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.trace == "exact"

    @property
    def passes(self) -> tuple[int, int]:
        """As stated for fixed steps; adaptive ones count as one step."""
        count = self.num_steps * len(FIXED[self.solver][0]) if self.solver in FIXED else 1
        return count, count

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._solve(x, context, 0.0, 1.0)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._solve(y, context, 1.0, 0.0)

    def solver_error(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """Size of the error ``(...)`` of ``y`` and of the log-determinant: the round trip back to ``x``."""
        y, log_det = self.forward_and_log_det(x, context)
        back, opposite = self.inverse_and_log_det(y, context)
        return jnp.abs(back - x).max(-1), jnp.abs(log_det + opposite)

    def _solve(self, x: Array, context: Array | None, start: float, end: float) -> tuple[Array, Array]:
        check_context(context, self.velocity.context_dim, type(self).__name__)
        if context is not None:
            x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape[:-1], context.shape[:-1]) + x.shape[-1:])
        noise = None if self.trace == "exact" else _noise(x)
        log_det = jnp.zeros(x.shape[:-1], x.dtype)
        if self.solver in FIXED:
            return self._fixed_steps(x, log_det, context, noise, start, end)
        return self._adaptive_steps(x, log_det, context, noise, start, end) if x.size else (x, log_det)

    def _fixed_steps(self, x, log_det, context, noise, start, end) -> tuple[Array, Array]:
        nodes, weights, last = FIXED[self.solver]
        constants, size = self.velocity.constants(context), (end - start) / self.num_steps
        following = np.concatenate([weights[1:], last[None]])  # of the next stage's point; at the end, of the step's
        stages = jnp.arange(len(nodes)), *(size * jnp.asarray(part, x.dtype) for part in (nodes, following, last))
        # the gradient computes each pass's activations again, which takes less time than to store and load them
        velocity = jax.checkpoint(lambda *inputs: self.velocity(*inputs), prevent_cse=False)

        def step(carry, time):
            x, log_det = carry

            def stage(carry, stage):
                point, log_det, rates = carry
                index, node, row, share = stage
                rate, trace = velocity(time + node, point, constants, noise)
                rates = lax.dynamic_update_index_in_dim(rates, rate, index, 0)
                return (x + jnp.tensordot(row, rates, 1), log_det + share * trace, rates), None

            rates = jnp.zeros((len(nodes), *x.shape), x.dtype)
            (x, log_det, _), _ = lax.scan(stage, (x, log_det, rates), stages)
            return (x, log_det), None

        times = start + size * jnp.arange(self.num_steps, dtype=x.dtype)
        return lax.scan(step, (x, log_det), times)[0]

    def _adaptive_steps(self, x, log_det, context, noise, start, end) -> tuple[Array, Array]:
        diffrax = _diffrax()

        def rates(time, state, arguments):
            velocity, context, noise = arguments
            return velocity(time, state[0], velocity.constants(context), noise)

        solver = {"bosh3": diffrax.Bosh3, "dopri5": diffrax.Dopri5, "dopri8": diffrax.Dopri8}[self.solver]()
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            solver,
            jnp.asarray(start, x.dtype),
            jnp.asarray(end, x.dtype),
            None,
            (x, log_det),
            (self.velocity, context, noise),
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            adjoint=diffrax.BacksolveAdjoint() if self.adjoint else diffrax.DirectAdjoint(),
            max_steps=_MAX_STEPS,
        )
        return solution.ys[0][-1], solution.ys[1][-1]


class Velocity(MLP):
    """``v(x, t, context)`` and ``tr dv/dx``; the first layer takes ``(x, t, context)``, the last starts at zero."""

    def __init__(self, dim: int, hidden_dims: Sequence[int], context_dim: int, activation: str, *, key: Array):
        super().__init__(dim + 1, hidden_dims, dim, context_dim, activation, key=key)
        if activation not in SMOOTH:
            raise ValueError(f"Continuous: activation must be smooth, one of {sorted(SMOOTH)}, but got {activation!r}.")

    def constants(self, context: Array | None = None) -> tuple[Array, Array | None]:
        """What is the same at all times: the first layer's offset, and the trace's weights of the slopes."""
        weights, dim = [layer.weight for layer in self.layers], self.in_dim - 1
        offset = self.layers[0].bias
        if context is not None:
            offset = offset + context @ weights[0][:, self.in_dim :].T
        inner = weights[0][:, :dim]
        if len(weights) == 2:
            return offset, (inner * weights[1].T).sum(-1)
        return offset, weights[1] * (inner @ weights[2]).T if len(weights) == 3 else None

    def __call__(  # type: ignore[override]
        self,
        time: Any,
        x: Array,
        constants: tuple[Array, Array | None],
        noise: Array | None = None,
        with_trace: bool = True,
    ) -> tuple[Array, Array | None]:
        """Returns ``v`` ``(..., dim)``, and its trace ``(...)`` or the estimate of it by ``noise``."""
        weights, dim, activation = [layer.weight for layer in self.layers], self.in_dim - 1, SMOOTH[self.activation]
        h = x @ weights[0][:, :dim].T + (constants[0] + time * weights[0][:, dim])
        slopes = []
        for layer in self.layers[1:]:
            h, slope = activation(h)
            slopes.append(slope)
            h = h @ layer.weight.T + layer.bias
        if not with_trace:
            return h, None
        trace = _trace(weights[0][:, :dim], weights[1:], slopes, constants[1], noise)
        return h, jnp.broadcast_to(trace, h.shape[:-1])


def _trace(first: Array, rest: list[Array], slopes: list[Array], coupling: Array | None, noise: Array | None) -> Array:
    """``tr(W_n D_{n-1} ... D_1 W_1)`` with the diagonal matrices ``D`` of the activations' slopes."""
    if noise is not None:
        tangent = noise @ first.T
        for weight, slope in zip(rest, slopes, strict=True):
            tangent = (slope * tangent) @ weight.T
        return (noise * tangent).sum(-1)
    if not slopes:
        return jnp.trace(first)
    if coupling is not None:
        return slopes[0] @ coupling if len(slopes) == 1 else (slopes[1] * (slopes[0] @ coupling.T)).sum(-1)
    tangents = slopes[0][..., None] * first
    for weight, slope in zip(rest[:-1], slopes[1:], strict=True):
        tangents = slope[..., None] * (weight @ tangents)
    return (tangents * rest[-1].T).sum((-2, -1))


def _noise(x: Array) -> Array:
    """Signs, of the shape of ``x``: random ones for other values of ``x``, the same for the same."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(x).astype(jnp.float32), jnp.uint32)
    return jax.random.rademacher(jax.random.fold_in(jax.random.key(0), bits.sum(dtype=jnp.uint32)), x.shape, x.dtype)


def _tanh(x: Array) -> tuple[Array, Array]:
    y = jnp.tanh(x)
    return y, 1 - y * y


def _silu(x: Array) -> tuple[Array, Array]:
    gate = jax.nn.sigmoid(x)
    y = x * gate
    return y, gate + y * (1 - gate)


SMOOTH: dict[str, Callable[[Array], tuple[Array, Array]]] = {  # value and slope
    "tanh": _tanh,
    "silu": _silu,
    "softplus": lambda x: (jax.nn.softplus(x), jax.nn.sigmoid(x)),
}


def check_solver(dim: int, trace: str, solver: str, num_steps: int, rtol: float, atol: float, adjoint: bool) -> None:
    """Raises a ``ValueError`` that names the argument with which nothing can be solved."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, but got {dim}.")
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f'Continuous: trace must be "exact" or "hutchinson", but got {trace!r}.')
    if solver not in FIXED and solver not in ADAPTIVE:
        raise ValueError(f"Continuous: solver must be one of {[*FIXED, *ADAPTIVE]}, but got {solver!r}.")
    if num_steps < 1:
        raise ValueError(f"Continuous: num_steps must be at least 1, but got {num_steps}.")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"Continuous: rtol and atol must be positive, but got {rtol} and {atol}.")
    if adjoint and solver in FIXED:
        raise ValueError(
            f"Continuous: adjoint=True needs an adaptive solver, one of {list(ADAPTIVE)}, but solver is {solver!r}."
        )


def _diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("The adaptive solvers of Continuous need diffrax: pip install diffrax.") from error
    return diffrax
