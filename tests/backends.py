"""What the suites need of torch and of jax, behind one face in numpy."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import numpy as np
import pytest

from tests.registry import CONTEXT_DIM, Case


class Torch:
    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.torch = importlib.import_module("torch")
        self.pkg = importlib.import_module("pyroflows")
        self.serialization = importlib.import_module("pyroflows.serialization")

    def build(
        self, case: Case, dim: int, context: bool = False, seed: int = 0, dtype: str = "float64", anew: bool = False
    ) -> Any:
        self.torch.manual_seed(seed)
        flow = case.make(self.pkg, dim, **({"context_dim": CONTEXT_DIM} if context else {}))
        return flow.to(self.device, getattr(self.torch, dtype))

    def outline(self, case: Case, dim: int, context: bool = False) -> Any:
        """The flow, perturbed, where its numbers do not matter."""
        flow = self.build(case, dim, context)
        return self.with_state(flow, perturbed(self.state(flow), 0.3, case.deep))

    def state(self, flow: Any) -> dict[str, np.ndarray]:
        return {k: self.numpy(v).copy() for k, v in self.serialization.state_dict(flow).items()}

    def with_state(self, flow: Any, state: dict[str, np.ndarray]) -> Any:
        return self.serialization.load_state_dict(copy.deepcopy(flow), state)

    def array(self, x: np.ndarray | None) -> Any:
        return None if x is None else self.torch.as_tensor(np.array(x), device=self.device)

    def numpy(self, x: Any) -> np.ndarray:
        return x.numpy(force=True)

    def run(self, flow: Any, x: np.ndarray, context: np.ndarray | None = None, inverse: bool = False):
        method = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
        return tuple(self.numpy(part) for part in method(self.array(x), self.array(context)))

    def shapes(self, flow: Any, shape: tuple, context: tuple | None, inverse: bool) -> tuple[tuple, tuple]:
        y, log_det = self.run(flow, np.ones(shape), None if context is None else np.ones(context), inverse)
        return y.shape, log_det.shape

    def specs(self, flow: Any, x: tuple, context: tuple | None, inverse: bool, dtype: str) -> tuple[tuple, tuple]:
        """Shapes and dtypes of value and log-det for inputs of the given shapes."""
        context = None if context is None else np.ones(context, dtype)
        out = self.run(flow, np.ones(x, dtype), context, inverse)
        return tuple(a.shape for a in out), tuple(a.dtype.name for a in out)

    def with_jacobian(
        self, flow: Any, x: np.ndarray, context: np.ndarray | None, inverse: bool, jacobian: bool = True
    ) -> tuple[np.ndarray, ...]:
        """Value, log-det and, unless declined, the Jacobian ``(n, dim, dim)`` by reverse mode."""
        if not jacobian:
            return self.run(flow, x, context, inverse)
        method = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
        point = self.array(x).requires_grad_()
        y, log_det = method(point, self.array(context))
        rows = [
            self.torch.autograd.grad(
                y[:, i].sum(), point, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            for i in range(x.shape[-1])
        ]
        return self.numpy(y), self.numpy(log_det), self.numpy(self.torch.stack(rows, -2))

    def jacobian(self, flow: Any, x: np.ndarray, context: np.ndarray | None, inverse: bool) -> np.ndarray:
        return self.with_jacobian(flow, x, context, inverse)[2]

    def pushed(self, flow: Any, x: np.ndarray, v: np.ndarray, context: np.ndarray | None, inverse: bool) -> np.ndarray:
        """The Jacobian's product with ``v``, by forward mode."""
        method, context = flow.inverse_and_log_det if inverse else flow.forward_and_log_det, self.array(context)
        return self.numpy(self.torch.func.jvp(lambda x: method(x, context)[0], (self.array(x),), (self.array(v),))[1])

    def scalar(self, flow: Any, state: dict, x: np.ndarray, context: Any, inverse: bool) -> float:
        return float(self._loss(self.with_state(flow, state), self.array(x), context, inverse).detach())

    def _loss(self, flow, x, context, inverse):
        method = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
        y, log_det = method(x, self.array(context))
        # asinh: a power law's values, of any size, enter by their logarithm
        return (y.asinh().sum() + (0.7 * log_det).sum()) / len(x)

    def gradients(self, flow: Any, x: np.ndarray, context: Any, inverse: bool):
        """Gradients of :meth:`scalar`: by parameter name, and of ``x``."""
        x = self.array(x).requires_grad_()
        flow = copy.deepcopy(flow).requires_grad_(True)
        names, parameters = zip(*flow.named_parameters(), strict=True) if list(flow.parameters()) else ((), ())
        loss = self._loss(flow, x, context, inverse)
        grads = self.torch.autograd.grad(loss, [x, *parameters], materialize_grads=True, allow_unused=True)
        return dict(zip(names, (self.numpy(g) for g in grads[1:]), strict=True)), self.numpy(grads[0])

    def held_for_gradient(self, flow: Any, x: np.ndarray) -> int:
        """Bytes that a forward pass keeps for the gradient, beside the parameters."""
        flow, total = copy.deepcopy(flow).double(), 0
        own = {p.untyped_storage().data_ptr() for p in flow.parameters()}

        def pack(t):
            nonlocal total
            total += 0 if t.untyped_storage().data_ptr() in own else t.numel() * t.element_size()
            return t

        with self.torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            flow.forward_and_log_det(self.array(x).requires_grad_())
        return total

    def round_trip_gradients(self, flow: Any, x: np.ndarray, w: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Gradients of ``sum(w * f^{-1}(f(x)))`` by the parameters and by ``x``."""
        x, parameters = self.array(x).requires_grad_(), list(flow.parameters())
        back = flow.inverse_and_log_det(flow.forward_and_log_det(x)[0])[0]
        *by_params, by_x = self.torch.autograd.grad((self.array(w) * back).sum(), [*parameters, x])
        return [self.numpy(g) for g in by_params], self.numpy(by_x)

    def log_det_derivatives(self, flow: Any, x: np.ndarray, v: np.ndarray, context: Any, inverse: bool):
        """The gradient of the summed log-det by ``x``, and its Hessian's product with ``v``."""
        x = self.array(x).requires_grad_()
        method = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
        log_det = method(x, self.array(context))[1].sum()
        if not log_det.requires_grad:
            return np.zeros(x.shape), np.zeros(x.shape)
        (g,) = self.torch.autograd.grad(log_det, x, create_graph=True, allow_unused=True, materialize_grads=True)
        if not g.requires_grad:
            return self.numpy(g), np.zeros(x.shape)
        (h,) = self.torch.autograd.grad((g * self.array(v)).sum(), x, allow_unused=True, materialize_grads=True)
        return self.numpy(g), self.numpy(h)

    def scored(self, flow: Any, x: np.ndarray, score: np.ndarray, context: Any) -> tuple[np.ndarray, ...]:
        """Value, log-det and score; and what the score was at ``x``, back from there by the definition."""
        x, context = self.array(x).requires_grad_(), self.array(context)
        y, log_det, score = flow.forward_and_score(x, self.array(score), context)
        assert not score.requires_grad
        value, volume = flow.forward_and_log_det(x, context)
        (back,) = self.torch.autograd.grad((score * value).sum() + volume.sum(), x)
        return tuple(map(self.numpy, (y, log_det, score, back)))

    def copies(self, flow: Any) -> list[Any]:
        return [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]

    def fit(self, flow: Any, data: np.ndarray, steps: int, rate: float) -> float:
        """Trains ``flow`` by maximum likelihood, from a normal base; returns the mean log-likelihood at the end."""
        optimizer, y = self.torch.optim.Adam(flow.parameters(), rate), self.array(data)

        def log_likelihood():
            x, log_det = flow.inverse_and_log_det(y)
            return (-0.5 * (x**2).sum(-1) + log_det).mean() - 0.5 * y.shape[-1] * np.log(2 * np.pi)

        for _ in range(steps):
            optimizer.zero_grad()
            (-log_likelihood()).backward()
            optimizer.step()
        return float(log_likelihood().detach())

    def vmapped(self, flow: Any, states: list[dict], x: np.ndarray) -> np.ndarray:
        stacked = {k: self.torch.stack([self.array(s[k]) for s in states]) for k in states[0]}
        call = self.torch.func.functional_call
        out = self.torch.func.vmap(lambda p: call(flow, p, (self.array(x),)))(stacked)
        return self.numpy(out)


class Jax:
    name = "jax"

    def __init__(self) -> None:
        self.jax, self.eqx = importlib.import_module("jax"), importlib.import_module("equinox")
        self.jnp = self.jax.numpy
        self.pkg = importlib.import_module("numpyro_flows")
        self.serialization = importlib.import_module("numpyro_flows.serialization")
        self._run = self.eqx.filter_jit(_method)
        self._jacobian = self.eqx.filter_jit(self._jacobian_of)
        self._grads = self.eqx.filter_jit(self._grads_of)
        self._scored = self.eqx.filter_jit(self._scored_of)
        self._built: dict[tuple, Any] = {}
        self._hvp = self.eqx.filter_jit(lambda f, x, v, c, i: self.jax.jvp(self._log_det_gradient(f, c, i), (x,), (v,)))

    def build(
        self, case: Case, dim: int, context: bool = False, seed: int = 0, dtype: str = "float64", anew: bool = False
    ) -> Any:
        """The flow, which is immutable: built once, unless ``anew``, for that takes longer than most of the tests."""
        key = case, dim, context, seed, dtype
        if anew or key not in self._built:
            flow = self._made(case, dim, context, seed)
            self._built[key] = self.jax.tree.map(lambda a: a.astype(dtype) if self.eqx.is_inexact_array(a) else a, flow)
        return self._built[key]

    def _made(self, case: Case, dim: int, context: bool, seed: int) -> Any:
        options = {"context_dim": CONTEXT_DIM} if context else {}
        return case.make(self.pkg, dim, key=self.jax.random.key(seed, impl="rbg"), **options)

    def outline(self, case: Case, dim: int, context: bool = False) -> Any:
        """The flow with shapes in place of arrays, which takes no time to build."""
        return self.eqx.filter_eval_shape(self._made, case, dim, context, 0)

    def state(self, flow: Any) -> dict[str, np.ndarray]:
        return self.serialization.state_dict(flow)

    def with_state(self, flow: Any, state: dict[str, np.ndarray]) -> Any:
        return self.serialization.load_state_dict(flow, state)

    def array(self, x: np.ndarray | None) -> Any:
        return None if x is None else self.jnp.asarray(x)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def run(self, flow: Any, x: np.ndarray, context: np.ndarray | None = None, inverse: bool = False):
        return tuple(np.asarray(part) for part in self._run(flow, self.array(x), self.array(context), inverse))

    def shapes(self, flow: Any, shape: tuple, context: tuple | None, inverse: bool) -> tuple[tuple, tuple]:
        x, c = self.jnp.ones(shape), None if context is None else self.jnp.ones(context)
        y, log_det = self.eqx.filter_eval_shape(_method, flow, x, c, inverse)
        return y.shape, log_det.shape

    def specs(self, flow: Any, x: tuple, context: tuple | None, inverse: bool, dtype: str) -> tuple[tuple, tuple]:
        context = None if context is None else self.jnp.ones(context, dtype)
        out = self.eqx.filter_eval_shape(_method, flow, self.jnp.ones(x, dtype), context, inverse)
        return tuple(a.shape for a in out), tuple(a.dtype.name for a in out)

    def _jacobian_of(self, flow, x, context, inverse):
        def column(unit):
            (y, log_det), (dy, _) = self.jax.jvp(lambda x: _method(flow, x, context, inverse), (x,), (unit,))
            return y, log_det, dy

        d = x.shape[-1]
        units = self.jnp.broadcast_to(self.jnp.eye(d)[:, None], (d, *x.shape))
        return self.jax.vmap(column, out_axes=(None, None, -1))(units)

    def with_jacobian(
        self, flow: Any, x: np.ndarray, context: np.ndarray | None, inverse: bool, jacobian: bool = True
    ) -> tuple[np.ndarray, ...]:
        """Value, log-det and the Jacobian by forward mode: one program for all, since compiling is what takes time."""
        del jacobian
        return tuple(np.asarray(a) for a in self._jacobian(flow, self.array(x), self.array(context), inverse))

    def jacobian(self, flow: Any, x: np.ndarray, context: np.ndarray | None, inverse: bool) -> np.ndarray:
        return self.with_jacobian(flow, x, context, inverse)[2]

    def _loss_of(self, flow, x, context, inverse):
        y, log_det = _method(flow, x, context, inverse)
        return (self.jnp.arcsinh(y).sum() + (0.7 * log_det).sum()) / len(x)

    def scalar(self, flow: Any, state: dict, x: np.ndarray, context: Any, inverse: bool) -> float:
        return float(self._grads(self.with_state(flow, state), self.array(x), self.array(context), inverse)[0])

    def _grads_of(self, flow, x, context, inverse):
        params, static = self.eqx.partition(flow, self.eqx.is_inexact_array)
        return self.jax.value_and_grad(
            lambda p, x: self._loss_of(self.eqx.combine(p, static), x, context, inverse), argnums=(0, 1)
        )(params, x)

    def gradients(self, flow: Any, x: np.ndarray, context: Any, inverse: bool):
        _, (by_params, by_x) = self._grads(flow, self.array(x), self.array(context), inverse)
        return self.state(by_params), np.asarray(by_x)

    def held_for_gradient(self, flow: Any, x: np.ndarray) -> int:
        grad = self.eqx.filter_grad(lambda f: f.forward_and_log_det(self.array(x))[1].sum())
        return self.eqx.filter_jit(grad).lower(flow).compile().compiled.memory_analysis().temp_size_in_bytes

    def round_trip_gradients(self, flow: Any, x: np.ndarray, w: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        params, static = self.eqx.partition(flow, self.eqx.is_inexact_array)

        def loss(params, x):
            flow = self.eqx.combine(params, static)
            return (w * flow.inverse_and_log_det(flow.forward_and_log_det(x)[0])[0]).sum()

        by_params, by_x = self.jax.jit(self.jax.grad(loss, argnums=(0, 1)))(params, x)
        return [np.asarray(g) for g in self.jax.tree.leaves(by_params)], np.asarray(by_x)

    def _log_det_gradient(self, flow, context, inverse):
        return self.jax.grad(lambda x: _method(flow, x, context, inverse)[1].sum())

    def log_det_derivatives(self, flow: Any, x: np.ndarray, v: np.ndarray, context: Any, inverse: bool):
        found = self._hvp(flow, self.array(x), self.array(v), self.array(context), inverse)
        return tuple(np.asarray(part) for part in found)

    def _scored_of(self, flow, x, score, context):
        y, log_det, score = flow.forward_and_score(x, score, context)

        def given(x):
            value, volume = flow.forward_and_log_det(x, context)
            return (score * value).sum() + volume.sum()

        return y, log_det, score, self.jax.grad(given)(x)

    def scored(self, flow: Any, x: np.ndarray, score: np.ndarray, context: Any) -> tuple[np.ndarray, ...]:
        """Value, log-det and score; and what the score was at ``x``, back from there by the definition."""
        found = self._scored(flow, self.array(x), self.array(score), self.array(context))
        return tuple(np.asarray(part) for part in found)

    def copies(self, flow: Any) -> list[Any]:
        return [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))]

    def fit(self, flow: Any, data: np.ndarray, steps: int, rate: float) -> float:
        """Trains ``flow`` by maximum likelihood, from a normal base; returns the mean log-likelihood at the end."""
        optax, y = importlib.import_module("optax"), self.array(data)
        optimizer = optax.adam(rate)
        params, static = self.eqx.partition(flow, self.eqx.is_inexact_array)

        def loss(params):
            x, log_det = self.eqx.combine(params, static).inverse_and_log_det(y)
            return (0.5 * (x**2).sum(-1) - log_det).mean() + 0.5 * y.shape[-1] * np.log(2 * np.pi)

        def step(state, _):
            params, moments = state
            updates, moments = optimizer.update(self.jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        @self.jax.jit
        def train(params):
            return loss(self.jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])

        return -float(train(params))

    def vmapped(self, flow: Any, states: list[dict], x: np.ndarray) -> np.ndarray:
        flows = [self.with_state(flow, s) for s in states]
        stacked = self.jax.tree.map(lambda *leaves: self.jnp.stack(leaves), *flows)
        return np.asarray(self.eqx.filter_jit(self.eqx.filter_vmap(lambda f: f(self.array(x))))(stacked))


def _method(flow: Any, x: Any, context: Any, inverse: bool) -> tuple[Any, Any]:
    return (flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(x, context)


_made: dict[str, Any] = {}


def get(name: str) -> Any:
    """The backend ``"torch"`` or ``"jax"``; skips the test where it is not installed."""
    pytest.importorskip({"torch": "pyro", "jax": "numpyro"}[name])
    if name not in _made:
        _made[name] = {"torch": Torch, "jax": Jax}[name]()
    return _made[name]


def on_accelerator(name: str) -> Any:
    """The backend on a GPU; skips the test where it sees none."""
    backend = get(name)
    if name == "jax":
        if backend.jax.default_backend() == "cpu":
            pytest.skip("jax sees no accelerator")
        return backend
    if not backend.torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return _made.setdefault("torch on cuda", Torch("cuda"))


def perturbed(state: dict[str, np.ndarray], sd: float, deep: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter moved by noise of the given size (matrices of deep stacks: over the root of their fan-in)."""
    rng = np.random.default_rng(seed)
    out = {}
    for name in sorted(state):
        value = np.asarray(state[name])
        size = sd / np.sqrt(np.prod(value.shape[1:])) if deep and value.ndim > 1 and value.size else sd
        out[name] = value + (size * rng.standard_normal(value.shape)).astype(value.dtype)
    return out
