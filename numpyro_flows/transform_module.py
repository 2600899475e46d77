"""The contract: one invertible map, its value and its exact log-determinant in one pass.

A family subclasses :class:`TransformModule` and writes ``forward_and_log_det`` and ``inverse_and_log_det``.
Calling, ``.inv``, ``log_abs_det_jacobian``, NumPyro's intermediates, composition and conditioning come from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jax import Array, lax
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

_Module = TypeVar("_Module", bound=eqx.Module)


def full_precision(function: Callable) -> Callable:
    """Matrix products of ``function`` in the precision of their inputs, whatever ``jax_default_matmul_precision`` is.

    On GPUs jax multiplies float32 in TF32, to three digits, unless told otherwise. What a conditioner says may be
    rounded so, since both directions and the log-determinant see the same; a matrix that is itself the map may not.
    """

    @wraps(function)  # jax's context itself, as a decorator, has one state for all calls: nested and other threads'
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


class _EquinoxPytree:
    """Leaves the pytree registration to Equinox: ``Transform`` would register the class a second time."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(Transform, cls).__init_subclass__(**kwargs)


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


class TransformModule(_EquinoxPytree, eqx.Module, Transform):
    """An invertible map ``y = f(x)`` of real vectors which carries its parameters.

    It is an :class:`equinox.Module` (a frozen dataclass and pytree: ``jit``, ``grad``, ``vmap`` and ``scan`` see the
    parameters) and a NumPyro ``Transform``. A subclass defines two methods, each a single pass.

    Shapes: ``x`` and ``y`` ``(..., dim)``, ``context`` ``(..., context_dim)`` (its batch axes broadcast against those
    of ``x``), log-determinants ``(...)``. A transform with an attribute ``dim`` raises a
    ``ValueError`` for vectors of another size.
    """

    domain = constraints.real_vector  # type: ignore[assignment]
    codomain = constraints.real_vector  # type: ignore[assignment]
    log_det_is_exact = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("forward_and_log_det", "inverse_and_log_det", "forward_and_score"):
            if name in vars(cls):
                setattr(cls, name, _sized(vars(cls)[name]))

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """Returns ``y = f(x)`` and ``log |det dy/dx|``."""
        raise NotImplementedError

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """Returns ``x = f^{-1}(y)`` and ``log |det dx/dy|``."""
        raise NotImplementedError

    @property
    def passes(self) -> tuple[int, int]:
        """Sequential network passes which the forward and the inverse direction take."""
        return 1, 1

    def forward_and_score(self, x: Array, score: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        """Returns ``y``, ``log |det dy/dx|`` and what the score of a density becomes at ``y``.

        The score is the gradient of the log-density by its argument, with all parameters held fixed; it carries no
        gradient itself. What is ``score`` at ``x`` becomes ``J^{-T} (score - grad log |det J|)`` at ``y`` (Vaitl et al.
        2024, Fast and unified path gradient estimators for normalizing flows, section 3). Costs an inverse pass and
        its gradient, unless a family knows a shorter way.
        """
        y, log_det = self.forward_and_log_det(x, context)
        fixed, context = lax.stop_gradient((self, context))
        (_, opposite), pull = jax.vjp(lambda y: fixed.inverse_and_log_det(y, context), lax.stop_gradient(y))
        return y, log_det, pull((jnp.broadcast_to(score, y.shape), jnp.ones_like(opposite)))[0]

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Any, Array, Array]:
        """Runs one direction and returns ``(transform, output, log_det)``, the transform with what its normalisation
        layers took from the batch (see ``transforms.normalisation``). A transform that holds others passes it on."""
        return self, *(self.inverse_and_log_det if inverse else self.forward_and_log_det)(x, context)

    def condition(self, context: Array) -> Conditioned:
        """Binds a context ``(..., context_dim)``: the result is a transform of ``x`` alone."""
        return Conditioned(self, context)

    def with_key(self, key: Array) -> Self:
        """The same map with the noise of its stochastic log-determinants drawn anew; the map itself if it has none."""
        leaves, structure = jax.tree.flatten(self)
        for n, leaf in enumerate(leaves):
            if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaves[n] = jax.random.split(jax.random.fold_in(_typed_key(key), n), leaf.shape)
        return jax.tree.unflatten(structure, leaves)

    # -- NumPyro's Transform protocol ------------------------------------------------------------------------------
    def __call__(self, x: Array) -> Array:
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Array) -> Array:
        return self.inverse_and_log_det(y)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        return self.forward_and_log_det(x)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        """``log |det dy/dx|`` at the pair ``y = f(x)``, computed in whichever direction takes fewer passes."""
        if intermediates is not None:
            return intermediates
        forward, inverse = self.passes
        return self.forward_and_log_det(x)[1] if forward <= inverse else -self.inverse_and_log_det(y)[1]

    @property
    def inv(self) -> TransformModule:
        return Inverse(self)

    def tree_flatten(self) -> Any:  # jax goes through Equinox's registration; this serves direct callers only
        return jax.tree.flatten(self)

    def eq(self, other: object, static: bool = False) -> Any:
        return self is other if static else eqx.tree_equal(self, other)

    __eq__ = Transform.__eq__
    __hash__ = object.__hash__


class Inverse(TransformModule):
    """Exchanges the two directions of ``transform``; what ``transform.inv`` returns."""

    transform: TransformModule

    @property
    def passes(self) -> tuple[int, int]:
        forward, inverse = self.transform.passes
        return inverse, forward

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    @property
    def inv(self) -> TransformModule:
        return self.transform

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(y, context)

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Any, Array, Array]:
        transform, y, log_det = self.transform._fitted(x, context, not inverse, start)
        return Inverse(transform), y, log_det


class Conditioned(TransformModule):
    """``transform`` with its context bound: a transform of ``x`` alone."""

    transform: TransformModule
    context: Array

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self.transform.inverse_and_log_det(y, self.context)

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Any, Array, Array]:
        transform, y, log_det = self.transform._fitted(x, self.context, inverse, start)
        return Conditioned(transform, self.context), y, log_det


class Compose(TransformModule):
    """Applies ``layers`` in order; the log-determinants add up in the same pass."""

    layers: tuple[TransformModule, ...]

    def __init__(self, layers: Sequence[TransformModule]):
        flat: list[TransformModule] = []
        for layer in layers:
            if not isinstance(layer, TransformModule):
                raise TypeError(
                    f"Compose: layers must be TransformModules, but got {type(layer).__name__}. "
                    "Use numpyro.distributions.transforms.ComposeTransform to mix them with NumPyro's own."
                )
            flat += layer.layers if isinstance(layer, Compose) else [layer]
        self.layers = tuple(flat)

    @property
    def passes(self) -> tuple[int, int]:
        each = [layer.passes for layer in self.layers]
        return sum(f for f, _ in each), sum(i for _, i in each)

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return all(layer.log_det_is_exact for layer in self.layers)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        total = jnp.zeros(x.shape[:-1], x.dtype)
        for layer in self.layers:
            x, log_det = layer.forward_and_log_det(x, context)
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        total = jnp.zeros(y.shape[:-1], y.dtype)
        for layer in reversed(self.layers):
            y, log_det = layer.inverse_and_log_det(y, context)
            total = total + log_det
        return y, total

    def forward_and_score(self, x: Array, score: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        total = jnp.zeros(x.shape[:-1], x.dtype)
        for layer in self.layers:
            x, log_det, score = layer.forward_and_score(x, score, context)
            total = total + log_det
        return x, total, score

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Any, Array, Array]:
        total, layers = jnp.zeros(x.shape[:-1], x.dtype), []
        for layer in reversed(self.layers) if inverse else self.layers:
            layer, x, log_det = layer._fitted(x, context, inverse, start)
            layers.append(layer)
            total = total + log_det
        return eqx.tree_at(lambda c: c.layers, self, tuple(layers[::-1] if inverse else layers)), x, total


class Repeat(TransformModule):
    """``num_layers`` layers of one shape, run as one ``lax.scan``: compile time does not grow with depth.

    Their parameters are stacked along a leading axis.

    :param make_layer: makes a layer from ``key=``; every call must give the same structure.
    """

    layers: TransformModule
    num_layers: int = eqx.field(static=True)

    def __init__(self, make_layer: Callable[..., TransformModule], num_layers: int, *, key: Array):
        if num_layers < 1:
            raise ValueError(f"Repeat: num_layers must be at least 1, but got {num_layers}.")
        self.num_layers = num_layers
        self.layers = eqx.filter_vmap(lambda k: make_layer(key=k))(jax.random.split(key, num_layers))

    @property
    def passes(self) -> tuple[int, int]:
        forward, inverse = self.layers.passes
        return self.num_layers * forward, self.num_layers * inverse

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.layers.log_det_is_exact

    @property
    def _unroll(self) -> bool:
        """Of two layers: a loop copies each one's parameters, which may take as long as a pass of few draws."""
        return self.num_layers <= 2

    def _carried(self, context: Array | None, *values: Array) -> tuple[Array, ...]:
        """Values with the batch shape and the dtype which they end with: a loop needs them from the start."""
        dtype = jnp.result_type(*values, *jax.tree.leaves(eqx.filter((self.layers, context), eqx.is_inexact_array)))
        return tuple(value.astype(dtype) for value in with_axes_of(context, *values))

    def _scan(self, x: Array, context: Array | None, inverse: bool, start: bool | None = None) -> tuple[Any, Any]:
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(carry, arrays):
            x, total = carry
            layer, fitted = eqx.combine(arrays, static), None
            if start is None:
                x, log_det = (layer.inverse_and_log_det if inverse else layer.forward_and_log_det)(x, context)
            else:
                layer, x, log_det = layer._fitted(x, context, inverse, start)
                fitted = eqx.filter(layer, eqx.is_array)
            return (x, total + log_det), fitted

        (x,) = self._carried(context, x)
        return lax.scan(step, (x, jnp.zeros(x.shape[:-1], x.dtype)), arrays, reverse=inverse, unroll=self._unroll)

    def forward_and_log_det(self, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._scan(x, context, inverse=False)[0]

    def inverse_and_log_det(self, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        return self._scan(y, context, inverse=True)[0]

    def forward_and_score(self, x: Array, score: Array, context: Array | None = None) -> tuple[Array, Array, Array]:
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(carry, arrays):
            x, total, score = carry
            x, log_det, score = eqx.combine(arrays, static).forward_and_score(x, score, context)
            return (x, total + log_det, score), None

        x, score = self._carried(context, x, score)
        return lax.scan(step, (x, jnp.zeros(x.shape[:-1], x.dtype), score), arrays, unroll=self._unroll)[0]

    def _fitted(self, x: Array, context: Array | None, inverse: bool, start: bool) -> tuple[Any, Array, Array]:
        (y, log_det), arrays = self._scan(x, context, inverse, start)
        layers = eqx.combine(arrays, eqx.filter(self.layers, eqx.is_array, inverse=True))
        return eqx.tree_at(lambda r: r.layers, self, layers), y, log_det


def with_axes_of(context: Array | None, *values: Array) -> tuple[Array, ...]:
    """Values ``(..., dim)`` with the batch axes which the context gives them."""
    if context is None:
        return values
    axes = context.shape[:-1]
    return tuple(jnp.broadcast_to(v, jnp.broadcast_shapes(v.shape[:-1], axes) + v.shape[-1:]) for v in values)


def flow_module(name: str, transform: _Module) -> _Module:
    """Registers the parameters of ``transform`` as the NumPyro param site ``{name}$params``, a dict of arrays.

    :param transform: a transform, or any other equinox module, such as a learned base.
    :returns: the transform with the parameters of the current substitution (of ``SVI``, ``handlers.substitute``, ...).
    """
    params, static = eqx.partition(transform, eqx.is_inexact_array)
    current = numpyro.param(f"{name}$params", lambda _: parameters(transform))
    leaves = [current[name] for name in parameters(transform)]
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(params), leaves), static)


def random_flow_module(name: str, transform: _Module, prior: Any) -> _Module:
    """The transform with parameters drawn from a prior: latent sites ``{name}.{parameter}`` of the model around it.

    As ``numpyro.contrib.module.random_eqx_module``, with a prior of independent elements for every parameter.

    :param transform: a transform, or any other equinox module.
    :param prior: a distribution of single numbers, for every parameter; a function ``prior(parameter, shape)`` that
        returns one; or a dict of them by the parameters' dotted names (:func:`parameters`), the other parameters being
        registered as by :func:`flow_module`.
    :returns: the transform with the parameters drawn.
    :raises ValueError: for a name in ``prior`` that is none of the parameters.
    """
    given = parameters(transform)
    priors = check_priors(prior, {parameter: jnp.shape(value) for parameter, value in given.items()})
    values = parameters(flow_module(name, transform)) if len(priors) < len(given) else given
    values = {parameter: values[parameter] for parameter in given}
    for parameter, fn in priors.items():
        shape = jnp.shape(given[parameter])
        values[parameter] = numpyro.sample(f"{name}.{parameter}", fn.expand(shape).to_event(len(shape)))
    params, static = eqx.partition(transform, eqx.is_inexact_array)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(params), list(values.values())), static)


def check_priors(prior: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The prior of each parameter that has one; a ``ValueError`` for one of a parameter that is not there."""
    if not isinstance(prior, dict):
        is_function = callable(prior) and not hasattr(prior, "log_prob")
        return {name: prior(name, shape) if is_function else prior for name, shape in shapes.items()}
    unknown = sorted(set(prior) - set(shapes))
    if unknown:
        raise ValueError(f"random_flow_module: prior names {unknown}, but the parameters are {list(shapes)}.")
    return {name: prior[name] for name in shapes if name in prior}


def parameters(transform: eqx.Module) -> dict[str, Array]:
    """The trainable arrays by their dotted names, layers of a :class:`Repeat` stacked: what the param site holds."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(transform, eqx.is_inexact_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _typed_key(key: Array) -> Array:
    """The key as a typed one (``jax.random.key``), which tells it from other arrays."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def check_context(context: Array | None, context_dim: int, owner: str) -> None:
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
