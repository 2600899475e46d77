"""A model's log-density as a function of unconstrained vectors, for batches of draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from pyroflows.graphs import close, compiled, record, simplified
from pyroflows.supports import Supported

_ROWS = 256  # of a Hessian at once: as many as a fit has draws in a step
MODES = ("traced", "vmap", "plates", "loop")
# the ways to evaluate a batch, and whether with room for what a model writes into tensors of its own
_TRIALS = ("traced", False), ("traced", True), ("vmap", False), ("vmap", True), ("plates", False)


class LogDensity:
    """``log p(data, latents)`` of a model on the unconstrained space, with the Jacobians of the supports.

    Takes batches ``(n, dim)``. The support of a site may depend on other sites. A batch is evaluated in the fastest of
    these ways that gives, at trial draws, the values and gradients of one draw at a time (``mode``):

    - ``"traced"``: the batched density is recorded once as a graph of tensor operations, so that a call costs no
      Pyro at all. The data are those at the time of recording.
    - ``"vmap"``: ``torch.func.vmap`` over a run of the model.
    - ``"plates"``: an outer plate of draws, for models that draw at random besides their latents (subsampling).
    - ``"loop"``: one draw at a time, correct for every model.

    :param model: Pyro model with continuous latents.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param shapes: unconstrained shape of each latent site, in the order of the vector.
    :param prototype: an unconstrained vector ``(dim,)`` where the density is finite; gives dtype and device.
    :param mode: one of the above, chosen by trial unless given.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict,
        shapes: dict[str, torch.Size],
        prototype: Tensor,
        *,
        mode: str | None = None,
    ):
        if mode is not None and mode not in MODES:
            raise ValueError(f"LogDensity: mode must be one of {MODES}, but got {mode!r}.")
        self.model, self.args, self.kwargs, self.shapes = Supported()(model), args, kwargs, shapes
        self.site_names, self.prototype = list(shapes), prototype.detach()
        self.dim = sum(shape.numel() for shape in shapes.values())
        self._graphs: dict[tuple, Callable[[Tensor], Tensor]] = {}
        self._writes = False  # whether the model writes draws into tensors of its own, which have room for one draw
        self._nesting: int | None = None  # of the model's plates
        self.obstacle = ""  # what keeps a batch from being evaluated at once
        self.mode = mode or self._fastest_mode()

    # -- evaluation ------------------------------------------------------------------------------------------------
    def __call__(self, u: Tensor) -> Tensor:
        """Log-densities ``(n,)`` of unconstrained vectors ``(n, dim)``; minus infinity for one that overflows.

        (That of an inverse gamma is plus infinity where its values underflow.)
        """
        values = self._evaluate(u, self.mode)
        return torch.where(values == torch.inf, -torch.inf, values)

    def _evaluate(self, u: Tensor, mode: str) -> Tensor:
        with pyro.validation_enabled(False):
            if mode == "traced":
                key = tuple(u.shape), u.dtype, u.device
                if key not in self._graphs:
                    self._record(u.detach())
                return self._graphs[key](u)
            if mode == "vmap":
                return torch.func.vmap(self._single)(u)
            if mode == "plates":
                return self._with_plate(u)
            return torch.stack([self._single(row) for row in u]) if len(u) else u.new_zeros(0)

    def _single(self, u: Tensor) -> Tensor:
        """Log-density of one vector ``(dim,)``."""
        with self._running(u), self._latents(self._unpack(u)) as latents:
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            return trace.log_prob_sum() + latents.log_det

    def _running(self, like: Tensor) -> NotRaising:
        """What a run of the model for one draw, or for one of those under ``vmap``, happens in."""
        return Widening(like) if self._writes else NotRaising()

    def _latents(self, values: dict[str, Tensor]) -> _Unconstrained:
        """What sets the latents of one draw, and adds up the Jacobians."""
        return _Unconstrained(values)

    def _with_plate(self, u: Tensor) -> Tensor:
        if self._nesting is None:
            self._nesting = self._plate_nesting()
        nesting = self._nesting
        plate = pyro.plate("_draws", len(u), dim=-1 - nesting)
        with NotRaising(), _Unconstrained(self._unpack(u), nesting) as latents, plate:
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        trace.compute_log_prob()
        total = latents.log_det
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site["name"] == "_draws":
                log_prob = site["log_prob"]
                if log_prob.dim() <= nesting or log_prob.shape[-1 - nesting] != len(u):
                    if poutine.util.site_is_subsample(site):
                        continue
                    raise ValueError("a site does not broadcast over the plate of draws")
                total = total + log_prob.reshape(len(u), -1).sum(-1)
        return total

    def _plate_nesting(self) -> int:
        with torch.random.fork_rng(devices=[]):  # so that the run after it draws as one alone would
            trace = poutine.trace(poutine.block(self.model, hide=[])).get_trace(*self.args, **self.kwargs)
        dims = [
            -frame.dim
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ]
        return max(dims, default=0)

    def _unpack(self, u: Tensor) -> dict[str, Tensor]:
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape(u.shape[:-1] + shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def _fastest_mode(self) -> str:
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.randn((3, self.dim), generator=generator, dtype=self.prototype.dtype, device="cpu")
        u = self.prototype + 0.1 * noise.to(self.prototype.device)
        try:
            expected = self._value_and_grad_seeded(u, "loop")
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "The model writes into a tensor whose earlier values its gradient needs, as x[t] = a * x[t - 1] does, "
                "so that torch has no gradient of it. Collect the parts in a list, and torch.stack them at the end."
            ) from error
        for mode, self._writes in _TRIALS:
            try:
                if mode == "traced":  # recorded at other draws than those it is tried on
                    self._record(self.prototype.expand_as(u).clone())
                actual = self._value_and_grad_seeded(u, mode)
            except Exception as error:  # whatever a model does that a mode cannot: the next one is tried
                if mode == "vmap":
                    self.obstacle = str(error).partition("\n")[0]
                self._graphs.clear()
                continue
            if all(close(a, b) for a, b in zip(actual, expected, strict=True)):
                return mode
        self._writes, self.obstacle = False, self.obstacle or "a batch of draws gives other values"
        return "loop"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}}  # recorded again when needed

    def _record(self, u: Tensor) -> None:
        """Adds the graph for batches like ``u``, simplified where that gives the same."""

        def recorded() -> fx.GraphModule:
            batched = torch.func.functionalize(lambda u: torch.func.vmap(self._single)(u))
            return record(batched, u, decompositions={torch.ops.aten.copy.default: _copied})

        with pyro.validation_enabled(False):
            graph = recorded()
            with torch.no_grad():
                expected = graph(u)
            try:  # some rules are for large batches alone
                call = compiled(simplified(graph, u.detach()))
                with torch.no_grad():
                    same = close(call(u), expected)
            except Exception:  # whatever a model does that a rule has not foreseen
                same = False
            self._graphs[(tuple(u.shape), u.dtype, u.device)] = call if same else compiled(recorded())

    @torch.enable_grad()
    def _value_and_grad_seeded(self, u: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Values and gradients with the same random stream for every draw, so that minibatches agree."""
        rows = u.split(1) if mode == "loop" else (u,)
        values, gradients = [], []
        for row in rows:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                row = row.detach().requires_grad_()
                value = self._evaluate(row, mode)
                gradients.append(torch.autograd.grad(value.sum(), row)[0])
                values.append(value.detach())
        return torch.cat(values), torch.cat(gradients)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density and gradient at one vector ``(dim,)``."""
        values, gradients = self._values_and_grads(u[None])
        return values[0], gradients[0]

    @torch.enable_grad()
    def _values_and_grads(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities ``(n,)`` and gradients at vectors ``(n, dim)``."""
        u = u.detach().requires_grad_()
        values = self(u)
        return values.detach(), torch.autograd.grad(values.sum(), u)[0]

    def hessian(self, u: Tensor) -> Tensor:
        """Hessian ``(dim, dim)`` at one vector ``(dim,)``."""
        return self._gradients_and_hessians(u[None])[1][0]

    @torch.enable_grad()
    def _gradients_and_hessians(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(n, dim)`` and Hessians ``(n, dim, dim)`` at vectors ``(n, dim)``."""
        u = u.detach()
        if self.mode == "loop":
            pairs = [self._hessian_by_loop(row) for row in u]
            return torch.stack([g for g, _ in pairs]), torch.stack([h for _, h in pairs])
        elements = torch.arange(self.dim, device=u.device).repeat(len(u))
        at, size = u.repeat_interleave(self.dim, 0), min(_ROWS, len(elements))
        parts = [self._rows_of_hessian(*part, size) for part in zip(at.split(size), elements.split(size), strict=True)]
        gradients, rows = (torch.cat(column) for column in zip(*parts, strict=True))
        return gradients[:: self.dim], rows.reshape(*u.shape, self.dim)

    def _hessian_by_loop(self, u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.clone().requires_grad_()
        gradient = torch.autograd.grad(self(u[None])[0], u, create_graph=True)[0]
        found = [
            torch.autograd.grad(g, u, retain_graph=True, materialize_grads=True)[0] if g.requires_grad else 0 * u
            for g in gradient
        ]
        return gradient.detach(), torch.stack(found).detach()

    def _rows_of_hessian(self, at: Tensor, elements: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Gradients at vectors ``(n, dim)`` and each one's derivative of one element ``(n, dim)``, in one pass of
        ``size`` draws: a shape is recorded once."""
        missing = size - len(at)
        x = torch.cat([at, at[-1:].expand(missing, -1)]).requires_grad_()
        gradient = torch.autograd.grad(self(x).sum(), x, create_graph=True)[0]
        rows = torch.zeros_like(x)
        if gradient.requires_grad:
            each = gradient.gather(1, torch.cat([elements, elements[-1:].expand(missing)])[:, None]).sum()
            rows = torch.autograd.grad(each, x, materialize_grads=True)[0]
        return gradient.detach()[: len(at)], rows.detach()[: len(at)]

    # -- constrained values ----------------------------------------------------------------------------------------
    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Latent and deterministic sites ``(n, *site_shape)`` at unconstrained vectors ``(n, dim)``."""
        return self._map(self._constrain_one, u)

    def _constrain_one(self, u: Tensor) -> dict[str, Tensor]:
        with _Unconstrained(self._unpack(u)):
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        return {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and (name in self.shapes or site["infer"].get("_deterministic"))
        }

    def unconstrain(self, samples: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors ``(n, dim)`` of draws of all latent sites, and ``log |det d samples / d u|`` ``(n,)``."""
        missing = [name for name in self.site_names if name not in samples]
        if missing:
            raise ValueError(f"samples: site(s) {missing} are missing; a draw of every latent site is needed.")

        def single(samples: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with _Constrained(samples) as latents:
                self.model(*self.args, **self.kwargs)
            return torch.cat([latents.unconstrained[name].reshape(-1) for name in self.shapes]), latents.log_det

        return self._map(single, {name: samples[name] for name in self.site_names})

    def site_log_probs(self, u: Tensor) -> dict[str, Tensor]:
        """Log-density ``(n,)`` of each site, factors included, at unconstrained vectors ``(n, dim)``."""

        def single(u: Tensor) -> dict[str, Tensor]:
            with _Unconstrained(self._unpack(u)):
                trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            trace.compute_log_prob()
            return {
                name: site["log_prob_sum"]
                for name, site in trace.nodes.items()
                if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
            }

        return self._map(single, u)

    def log_likelihood(self, u: Tensor) -> dict[str, Tensor]:
        """Log-density of each observation at unconstrained vectors ``(n, dim)``; factors are left out.

        Of each observed site ``(n, *site_batch_shape)``, as its mask leaves it, without the scale of a subsample.
        """

        def single(u: Tensor) -> dict[str, Tensor]:
            with _Unconstrained(self._unpack(u)):
                trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            trace.compute_log_prob(lambda name, site: _is_data(site))
            return {name: site["unscaled_log_prob"] for name, site in trace.nodes.items() if _is_data(site)}

        return self._map(single, u)

    @torch.no_grad()
    def _map(self, single: Callable, batch: Any) -> Any:
        """``single`` over the leading axis, by ``vmap`` where the density can."""

        def run(row: Any) -> Any:
            with self._running(torch.utils._pytree.tree_leaves(row)[0]):
                return single(row)

        with pyro.validation_enabled(False), NotRaising():
            if self.mode in ("traced", "vmap"):
                return torch.func.vmap(run)(batch)
            leaves, spec = torch.utils._pytree.tree_flatten(batch)
            rows = [single(torch.utils._pytree.tree_unflatten(list(row), spec)) for row in zip(*leaves, strict=True)]
            flat = [torch.utils._pytree.tree_flatten(row) for row in rows]
            stacked = [torch.stack(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
            return torch.utils._pytree.tree_unflatten(stacked, flat[0][1])

    def observed(self) -> dict[str, np.ndarray]:
        """The observed sites' data."""
        nodes = self._prototype_trace().nodes
        return {name: site["value"].numpy(force=True) for name, site in nodes.items() if _is_data(site)}

    @torch.no_grad()
    def _prototype_trace(self) -> poutine.Trace:
        """The model's run at the prototype."""
        with _Unconstrained(self._unpack(self.prototype)):
            return poutine.trace(self.model).get_trace(*self.args, **self.kwargs)


def _copied(into: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
    """What stands in ``into`` once ``values`` are written there, which has no derivative as an operation of its own."""
    return values.to(into).expand(into.shape)


class NotRaising(TorchFunctionMode):
    """Matrices that cannot be factored or inverted give NaN: a draw of no finite log-density, and not a fit's end."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        checked = _CHECKED.get(func)
        if func is Tensor.__setitem__ and _is_fill(*args):  # which vmap knows by another name
            return args[0].masked_fill_(*args[1:])
        if checked is None or kwargs and "out" in kwargs:
            return func(*args, **(kwargs or {}))
        result, info = checked(*args, **(kwargs or {}))
        failed = (info > 0).reshape(info.shape + (1,) * (result.dim() - info.dim()))
        return torch.where(failed, math.nan, result)


class Widening(NotRaising):
    """Gives tensors that a model makes for itself an axis of draws under ``vmap``, so that it can write into them.

    :param like: a tensor of one draw under ``vmap``.
    """

    def __init__(self, like: Tensor):
        super().__init__()
        self.zero = torch.zeros_like(like.detach().reshape(-1)[0])  # of every draw

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _IN_PLACE:
            return _IN_PLACE[func](*args)
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in _NEW or kwargs and "out" in kwargs:
            return result
        zero = self.zero.to(result)
        return result | zero if result.dtype == torch.bool else result + zero


def _is_fill(x: Tensor, index: Any, value: Any) -> bool:
    """Whether writing ``x[index] = value`` fills what a mask of the tensor's own shape shows with one number."""
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == x.shape
    return is_mask and (not isinstance(value, Tensor) or value.dim() == 0)


_NEW = {
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.clone, torch.nan_to_num),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.clone),
    Tensor.nan_to_num,
}
_IN_PLACE: dict[Callable, Callable] = {
    Tensor.__iadd__: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.__itruediv__: torch.div,
}


def _cholesky(matrix: Tensor, upper: bool = False) -> tuple[Tensor, Tensor]:
    return torch.linalg.cholesky_ex(matrix, upper=upper)


_CHECKED: dict[Callable, Callable] = {
    torch.linalg.cholesky: _cholesky,
    torch.cholesky: _cholesky,
    Tensor.cholesky: _cholesky,
    torch.linalg.inv: torch.linalg.inv_ex,
    torch.inverse: torch.linalg.inv_ex,
    Tensor.inverse: torch.linalg.inv_ex,
    torch.linalg.solve: torch.linalg.solve_ex,
}


def _is_data(site: dict[str, Any]) -> bool:
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
        and not isinstance(site["fn"], pyro.distributions.Unit)
        and not poutine.util.site_is_subsample(site)
    )


class _Unvalidated(Messenger):
    """Runs with distributions that take any value: those made before the run may have been told to refuse some."""

    def _pyro_sample(self, msg: dict) -> None:
        if isinstance(msg["fn"], torch.distributions.Distribution):
            msg["fn"] = _unvalidated(msg["fn"])


def _unvalidated(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    parts = {
        name: _unvalidated(part)
        for name, part in vars(fn).items()
        if isinstance(part, torch.distributions.Distribution)
    }
    if fn._validate_args or any(part is not vars(fn)[name] for name, part in parts.items()):
        fn = copy.copy(fn)
        vars(fn).update(parts, _validate_args=False)
    return fn


_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"  # ends of the names of a site's two parts, where it has obs_mask=


class _Unconstrained(_Unvalidated):
    """Sets latent sites from unconstrained values and adds up the Jacobians of their supports.

    With ``nesting``, the values carry a leading axis of draws, which is put to the left of ``nesting`` plates.
    """

    def __init__(self, values: dict[str, Tensor], nesting: int | None = None):
        super().__init__()
        self.values, self.nesting = values, nesting
        self.log_det: Any = 0.0
        self.partly_observed: set[str] = set()  # sites with obs_mask=

    def _pyro_sample(self, msg: dict) -> None:
        super()._pyro_sample(msg)
        if msg["is_observed"] and msg["name"].endswith(_OBSERVED):
            self.partly_observed.add(msg["name"].removesuffix(_OBSERVED))
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        if msg["name"].removesuffix(_UNOBSERVED) in self.partly_observed:
            msg["mask"] = None  # what it masks is never read, and keeps its prior, that the density be proper
        bijection, u = biject_to(msg["fn"].support), self.unconstrained(msg["name"], msg["fn"])
        if self.nesting is not None:
            event_dim = msg["fn"].event_dim + bijection.domain.event_dim - bijection.codomain.event_dim
            batch = u.dim() - 1 - event_dim
            u = u.reshape(u.shape[:1] + (1,) * (self.nesting - batch) + u.shape[1:])
        msg["value"], msg["done"] = bijection(u), True
        log_det = bijection.log_abs_det_jacobian(u, msg["value"])
        self.log_det = self.log_det + (log_det.sum() if self.nesting is None else log_det.reshape(len(u), -1).sum(-1))

    def unconstrained(self, name: str, fn: TorchDistribution) -> Tensor:
        """The unconstrained value of a latent site of distribution ``fn``."""
        return self.values[name]


class _Constrained(Messenger):
    """Sets latent sites from constrained values and keeps their unconstrained ones and the Jacobians."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values
        self.unconstrained: dict[str, Tensor] = {}
        self.log_det: Any = 0.0

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        bijection, value = biject_to(msg["fn"].support), self.values[msg["name"]]
        msg["value"], msg["done"] = value, True
        u = bijection.inv(value)
        self.unconstrained[msg["name"]] = u
        self.log_det = self.log_det + bijection.log_abs_det_jacobian(u, value).sum()


def prototype_trace(
    model: Callable, args: tuple, kwargs: dict, init_loc_fn: Callable = init_to_median
) -> poutine.Trace:
    """One trace of a model, with latents at the values of ``init_loc_fn``."""

    def init(site: dict) -> Tensor:  # strategies know continuous sites only
        return site["fn"].sample() if site["fn"].support.is_discrete else start_of(init_loc_fn, site)

    # what is out of its support, or cannot be factored, shows in the density
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(False), NotRaising(), _Unvalidated():
        return poutine.trace(InitMessenger(init)(Supported()(model))).get_trace(*args, **kwargs)


def start_of(init_loc_fn: Callable, site: dict) -> Tensor:
    """A site's value by an initialisation strategy, also where its prior is improper, from which none can draw."""
    try:
        return init_loc_fn(site)
    except NotImplementedError:
        fn = site["fn"]
        return init_loc_fn({**site, "fn": _Drawable(fn.support, fn.batch_shape, fn.event_shape)})


class _Drawable(pyro.distributions.ImproperUniform):
    """Draws the image of standard normal numbers in the unconstrained space."""

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        bijection, shape = biject_to(self.support), self.shape(torch.Size(sample_shape))
        return bijection(torch.randn(bijection.inverse_shape(shape)))


def check_finite(trace: poutine.Trace, owner: str) -> None:
    """Raises a ``ValueError`` that names the sites of a start whose log-density is not finite."""
    with pyro.validation_enabled(False):
        trace.compute_log_prob()
    sites = {
        name: float(site["log_prob_sum"])
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not math.isfinite(site["log_prob_sum"])
    }
    if sites:
        raise ValueError(
            f"{owner}: the model's log-density is not finite at the start: site(s) {sites}. Check the data and the "
            "priors of what these sites depend on, or give init_loc_fn= a valid start."
        )


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    """The latent sites of a traced model."""
    return {
        name: site
        for name, site in trace.iter_stochastic_nodes()
        if not poutine.util.site_is_subsample(site) and not site["infer"].get("is_auxiliary", False)
    }


def check_plates(trace: poutine.Trace, owner: str) -> None:
    """Raises a ``ValueError`` where the density of the traced model is that of a subsample."""
    frames = [f for site in trace.nodes.values() for f in site.get("cond_indep_stack", ())]
    plates = {f.name: f"{f.size} of {f.full_size}" for f in frames if f.full_size not in (None, f.size)}
    if plates:
        raise ValueError(
            f"{owner}: plate(s) {plates} are subsampled, but a posterior is that of all data. Leave subsample_size "
            "out, or train AutoFlow (AutoHierarchicalFlow, for latents in plates) by SVI."
        )


def check_latents(trace: poutine.Trace, owner: str) -> None:
    """Raises a ``ValueError`` where a flow over all latents jointly cannot serve the traced model."""
    latent = latent_sites(trace)
    if not latent:
        raise ValueError(f"{owner}: the model has no latent sites: there is nothing to infer.")
    discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"{owner}: site(s) {discrete} are discrete, but a flow is a density of continuous variables. Sum them out "
            "of the model (as a mixture, or by pyro.infer.config_enumerate and TraceEnum_ELBO with a guide over "
            "poutine.block(model, hide=[...])), or relax them."
        )
    for name, site in latent.items():
        for frame in site["cond_indep_stack"]:
            full = frame.full_size or frame.size
            if frame.size != full:
                raise ValueError(
                    f"{owner}: latent site {name!r} lies in plate {frame.name!r}, which is subsampled "
                    f"({frame.size} of {full}). A flow over all latents jointly needs them all: use the full plate, or "
                    "AutoHierarchicalFlow, which has a conditional flow for local latents."
                )
