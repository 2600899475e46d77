"""The contract: one invertible map, its value and its exact log-determinant in one pass.

A family subclasses :class:`TransformModule` and writes ``forward_and_log_det`` and ``inverse_and_log_det``.
Calling, ``.inv``, ``log_abs_det_jacobian``, reuse of a result, composition and conditioning come from here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor
from torch.distributions import Transform, constraints

_Module = TypeVar("_Module", bound=torch.nn.Module)


class _Produced(NamedTuple):
    """The last result of a transform, valid for exactly the tensor it returned."""

    output: weakref.ref
    source: Tensor
    log_det: Tensor  # of the direction that was run
    inverse: bool
    grad: bool
    state: list[tuple[Tensor, int]]


class _Fused(Transform):
    """torch's ``Transform`` protocol on top of two fused maps.

    After ``y = t(x)`` the pair and its log-determinant are kept for the tensor ``y`` itself: scoring or inverting that
    very tensor costs no second pass. The key is the *output produced* and the state of the parameters, never the
    input, so a changed parameter, ``functional_call``, ``vmap`` or ``no_grad`` cannot give a stale answer. The record
    goes with the output, and with any copy or pickle of the transform.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    log_det_is_exact = True

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``y = f(x)`` and ``log |det dy/dx|``."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``x = f^{-1}(y)`` and ``log |det dx/dy|``."""
        raise NotImplementedError

    @property
    def passes(self) -> tuple[int, int]:
        """Sequential network passes which the forward and the inverse direction take."""
        return 1, 1

    def _tensors(self) -> list[Tensor]:
        """The tensors a result depends on besides its input."""
        return []

    # -- torch.distributions ---------------------------------------------------------------------------------------
    def __call__(self, x: Tensor) -> Tensor:
        found = self._find(x, inverse=True)
        return self._run(x, inverse=False) if found is None else found.source

    def _inv_call(self, y: Tensor) -> Tensor:
        found = self._find(y, inverse=False)
        return self._run(y, inverse=True) if found is None else found.source

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det dy/dx|`` at the pair ``y = f(x)``: reused, or computed in the direction of fewer passes."""
        found = self._find(y, inverse=False)
        if found is not None and found.source is x:
            return found.log_det
        found = self._find(x, inverse=True)
        if found is not None and found.source is y:
            return -found.log_det
        forward, inverse = self.passes
        return self.forward_and_log_det(x)[1] if forward <= inverse else -self.inverse_and_log_det(y)[1]

    def _run(self, source: Tensor, inverse: bool) -> Tensor:
        output, log_det = self.inverse_and_log_det(source) if inverse else self.forward_and_log_det(source)
        if not torch.compiler.is_compiling():
            me = weakref.ref(self)
            ref = weakref.ref(output, lambda dead: _forget(me(), dead))
            self.__dict__["_produced"] = _Produced(
                ref, source, log_det, inverse, torch.is_grad_enabled(), self._state()
            )
        return output

    def _find(self, output: Tensor, inverse: bool) -> _Produced | None:
        found = self.__dict__.get("_produced")
        if (
            found is None
            or found.inverse is not inverse
            or found.output() is not output
            or (torch.is_grad_enabled() and not found.grad)
        ):
            return None
        state = self._state()
        same = len(state) == len(found.state) and all(
            a is b and m == n for (a, m), (b, n) in zip(state, found.state, strict=True)
        )
        return found if same else None

    def _state(self) -> list[tuple[Tensor, int]]:
        return [(t, -1 if t.is_inference() else t._version) for t in self._tensors()]

    def clear_cache(self) -> None:
        """Forgets the last result (never needed for correctness)."""
        self.__dict__.pop("_produced", None)

    def with_cache(self, cache_size: int = 1) -> Any:
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_produced", None)
        return state

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def _forget(transform: _Fused | None, dead: weakref.ref) -> None:
    if transform is not None:
        found = transform.__dict__.get("_produced")
        if found is not None and found.output is dead:
            del transform.__dict__["_produced"]


def _sized(method: Callable) -> Callable:
    """The method, which refuses vectors of another size than the ``dim`` of its transform, where that has one."""

    @wraps(method)
    def sized(self: Any, *args: Any, **kwargs: Any) -> Any:
        dim = getattr(self, "dim", None)
        if dim is not None and args and args[0].shape[-1:] != (dim,):
            raise ValueError(
                f"{type(self).__name__}: takes vectors of {dim} elements, but got shape {tuple(args[0].shape)}. "
                "Build the flow for vectors of that size."
            )
        return method(self, *args, **kwargs)

    return sized


class TransformModule(_Fused, dist.TransformModule, ConditionalTransform):
    """An invertible map ``y = f(x)`` of real vectors which carries its parameters.

    It is an ``nn.Module`` and a torch ``Transform`` (through Pyro's ``TransformModule``), so ``pyro.module``,
    ``TransformedDistribution``, autoguides, ``state_dict``, ``torch.func`` and ``torch.compile`` take it. A subclass
    defines two methods, each a single pass.

    Shapes: ``x`` and ``y`` ``(..., dim)``, ``context`` ``(..., context_dim)`` (its batch axes broadcast against those
    of ``x``), log-determinants ``(...)``. A transform with an attribute ``dim`` raises a
    ``ValueError`` for vectors of another size.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("forward_and_log_det", "inverse_and_log_det", "forward_and_score"):
            if name in vars(cls):
                setattr(cls, name, _sized(vars(cls)[name]))

    def condition(self, context: Tensor) -> Conditioned:
        """Binds a context ``(..., context_dim)``: the result is a transform of ``x`` alone."""
        return Conditioned(self, context)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``y``, ``log |det dy/dx|`` and what the score of a density becomes at ``y``.

        The score is the gradient of the log-density by its argument, with all parameters held fixed; it carries no
        gradient itself. What is ``score`` at ``x`` becomes ``J^{-T} (score - grad log |det J|)`` at ``y`` (Vaitl et al.
        2024, Fast and unified path gradient estimators for normalizing flows, section 3). Costs an inverse pass and
        its gradient, unless a family knows a shorter way.
        """
        y, log_det = self.forward_and_log_det(x, context)
        with held_fixed(self), torch.enable_grad():
            point = y.detach().requires_grad_()
            back, opposite = self.inverse_and_log_det(point, None if context is None else context.detach())
            score = torch.autograd.grad((back * score).sum() + opposite.sum(), point)[0]
        return y, log_det, score

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``forward_and_log_det``, under the name which ``torch.compile`` and ``DistributedDataParallel`` look for."""
        return self.forward_and_log_det(x, context)

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def __repr__(self) -> str:
        return torch.nn.Module.__repr__(self)

    __hash__ = object.__hash__


class Inverse(TransformModule):
    """Exchanges the two directions of ``transform``, as a module; ``transform.inv`` is torch's view without one."""

    def __init__(self, transform: TransformModule):
        super().__init__()
        self.transform = transform

    @property
    def passes(self) -> tuple[int, int]:
        forward, inverse = self.transform.passes
        return inverse, forward

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(y, context)


class Conditioned(_Fused):
    """``transform`` with its context bound: a transform of ``x`` alone. It owns no parameters."""

    def __init__(self, transform: TransformModule, context: Tensor):
        super().__init__()
        self.transform, self.context = transform, context

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def _tensors(self) -> list[Tensor]:
        return [*self.transform._tensors(), self.context]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(y, self.context)


class Compose(TransformModule):
    """Applies ``layers`` in order; the log-determinants add up in the same pass."""

    layers: Any  # an nn.ModuleList, whose items are typed as plain modules

    def __init__(self, layers: Sequence[TransformModule]):
        super().__init__()
        flat: list[TransformModule] = []
        for layer in layers:
            if not isinstance(layer, TransformModule):
                raise TypeError(
                    f"Compose: layers must be TransformModules, but got {type(layer).__name__}. "
                    "Use pyro.distributions.ComposeTransformModule to mix them with Pyro's own."
                )
            flat += list(layer.layers) if type(layer) is Compose else [layer]
        self.layers = torch.nn.ModuleList(flat)

    @property
    def passes(self) -> tuple[int, int]:
        each = [layer.passes for layer in self.layers]
        return sum(f for f, _ in each), sum(i for _, i in each)

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return all(layer.log_det_is_exact for layer in self.layers)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for layer in self.layers:
            x, log_det = layer.forward_and_log_det(x, context)
            total = log_det if total is None else total + log_det
        return x, x.new_zeros(x.shape[:-1]) if total is None else total

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for layer in reversed(self.layers):
            y, log_det = layer.inverse_and_log_det(y, context)
            total = log_det if total is None else total + log_det
        return y, y.new_zeros(y.shape[:-1]) if total is None else total

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        total: Tensor | None = None
        for layer in self.layers:
            x, log_det, score = layer.forward_and_score(x, score, context)
            total = log_det if total is None else total + log_det
        return x, x.new_zeros(x.shape[:-1]) if total is None else total, score


class Repeat(Compose):
    """``num_layers`` layers of one shape.

    :param make_layer: makes a layer; every call must give the same structure.
    """

    def __init__(self, make_layer: Callable[[], TransformModule], num_layers: int):
        if num_layers < 1:
            raise ValueError(f"Repeat: num_layers must be at least 1, but got {num_layers}.")
        super().__init__([])
        self.layers.extend(make_layer() for _ in range(num_layers))


def differentiable(x: Tensor) -> Tensor:
    """``x``, or a leaf of its value where it carries no gradient."""
    return x if x.requires_grad else x.detach().requires_grad_()


def with_axes_of(context: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Values ``(..., dim)`` with the batch axes which the context gives them."""
    if context is None:
        return values
    return tuple(v.expand(torch.broadcast_shapes(v.shape[:-1], context.shape[:-1]) + v.shape[-1:]) for v in values)


@contextmanager
def held_fixed(module: torch.nn.Module) -> Iterator[None]:
    """Parameters are constants in the graph that is built inside."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def random_flow_module(name: str, transform: _Module, prior: Any) -> _Module:
    """The transform with parameters drawn from a prior: latent sites ``{name}.{parameter}`` of the model around it.

    The prior has independent elements for every parameter. (``pyro.module`` makes parameters of a model trainable.)

    :param transform: a transform, or any other module.
    :param prior: a distribution of single numbers, for every parameter; a function ``prior(parameter, shape)`` that
        returns one; or a dict of them by the parameters' dotted names (``named_parameters``), the other parameters
        being registered as by ``pyro.module``.
    :returns: a copy of the transform with the parameters drawn. It lives as long as this run of the model.
    :raises ValueError: for a name in ``prior`` that is none of the parameters.
    """
    given = dict(transform.named_parameters())
    priors = check_priors(prior, {parameter: tuple(value.shape) for parameter, value in given.items()})
    if len(priors) < len(given):
        pyro.module(name, transform)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*given.values(), *transform.buffers()]}
    for parameter, fn in priors.items():
        shape = given[parameter].shape
        memo[id(given[parameter])] = pyro.sample(f"{name}.{parameter}", fn.expand(shape).to_event(len(shape)))
    return copy.deepcopy(transform, memo)  # which puts what the memo holds into the parameters' places


def check_priors(prior: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The prior of each parameter that has one; a ``ValueError`` for one of a parameter that is not there."""
    if not isinstance(prior, dict):
        is_function = callable(prior) and not hasattr(prior, "log_prob")
        return {name: prior(name, shape) if is_function else prior for name, shape in shapes.items()}
    unknown = sorted(set(prior) - set(shapes))
    if unknown:
        raise ValueError(f"random_flow_module: prior names {unknown}, but the parameters are {list(shapes)}.")
    return {name: prior[name] for name in shapes if name in prior}


def check_context(context: Tensor | None, context_dim: int, owner: str) -> None:
    """Raises a ``ValueError`` unless ``context`` is what a transform with ``context_dim`` expects."""
    if context is None and context_dim:
        raise ValueError(
            f"{owner}: context is missing: expected shape (..., {context_dim}). "
            "Bind one with .condition(context), or build the transform with context_dim=0."
        )
    if context is not None and context.shape[-1:] != (context_dim,):
        raise ValueError(
            f"{owner}: context has shape {tuple(context.shape)}, but expected (..., {context_dim}). "
            "Pass context_dim= to the constructor so that it agrees with the context's last axis."
        )
