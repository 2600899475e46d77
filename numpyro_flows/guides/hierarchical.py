"""A guide that follows the plates of a model: a flow of the global latents, conditional flows of the local ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_median
from tqdm import tqdm

from numpyro_flows import flows
from numpyro_flows.guides.auto_flow import _cast, check_flow
from numpyro_flows.guides.guide_run import Done, GroupFlow, GuideRun, pseudo_observations
from numpyro_flows.guides.plates import (
    Group,
    check_trace,
    differ,
    first_value,
    groups_of,
    is_latent,
    location_and_scale,
    subsamples,
)
from numpyro_flows.supports import Supported
from numpyro_flows.transform_module import TransformModule, flow_module

LOCAL_FLOW = partial(flows.realnvp, num_layers=4)
_MOST_CORRELATED = 8  # latents of an element that have a full precision matrix unless asked for


class AutoHierarchicalFlow(AutoGuide):
    """Guide ``q(global) prod_i q(local_i | global)`` by a flow and conditional flows, read off the model's plates.

    The latents outside plates have one flow, jointly. The latents of a plate have one conditional flow, shared by all
    its elements, jointly over an element's latents; its context is the global latents (as the flow gives them, before
    their location and scale) and, in nested or crossed plates, the latents of every plate around. What a network does
    not share is the location and scale of an element: with ``amortise=None`` they are parameters of the element, of the
    plate's full size, gathered by the subsample's indices; with an encoder they are functions of the element's data.

    They are those of a pseudo-observation. An element's latents ``u``, whose priors have locations ``m`` and precision
    matrix ``A``, which depend on other latents, are, with ``y`` from the flow::

        B = W^T W,    R R^T = A + B,    u = m + (A + B)^-1 B (loc - m) + R^-T y,    W = diag(exp(-log_scale)) L

    where ``L`` is lower triangular with a unit diagonal, and an element's ``tril`` stands below it. This is the exact
    conditional posterior where the likelihood is normal and linear: local latents move with the global ones as far as
    their data leave them free to (partial non-centring, Papaspiliopoulos et al. 2007; the model's prior as a part of
    the guide, Ambrogioni et al. 2021). Priors that are not of location-scale form, or depend on no other latent, have
    no part in ``m`` and ``A``; where none has, ``u = loc + W^-1 y``, up to a rotation of ``y``.

    The guide runs the model up to its last latent and puts its own draws at the model's sites, so plates, subsample
    indices, masks and scales are the model's: in NumPyro's ``SVI`` the ELBO of a subsample is unbiased. Discrete
    latents are left to enumeration (``config_enumerate``, ``TraceEnum_ELBO``). Parameters are one param site
    ``{prefix}_{group}$params`` for each group of latents: ``global``, and the plates' names joined by ``_``, outermost
    first.

    :param model: NumPyro model with latents in plates.
    :param global_flow: factory ``flow(dim, key=key) -> TransformModule`` for the latents outside plates.
    :param local_flow: factory ``flow(dim, context_dim=c, key=key) -> TransformModule`` for those in a plate; four
        layers of ``flows.realnvp`` unless given.
    :param amortise: encoder from the data of elements ``(..., features)`` to contexts ``(..., c)``, such as a
        ``conditioners.MLP``; trained with the guide if it is an equinox module. A dict from group to encoder for a
        model with several groups of local latents.
    :param data: function of the model's arguments that gives the encoder's data: ``(subsample_size, features)``, or
        all the plate's, ``(size, features)``, which are then indexed by the subsample. In nested plates an axis for
        each, outermost first. The model's first argument unless given; a dict as for ``amortise``.
    :param element_parameters: whether every element has its own location and scale; unless given, where it has no
        encoder. With both, the encoder gives the first guess (semi-amortised, Kim et al. 2018).
    :param noncentered: whether the model's conditional priors are used, as above.
    :param correlated: whether an element's latents have a full precision matrix ``B``, of ``k (k + 1) / 2`` parameters,
        for they may be correlated in another way in every element, as an intercept and a slope are; otherwise ``L`` is
        the identity. Unless given, where an element has two to eight latents, of which none is in another's prior. The
        priors of several sites together need the model's statements up to them run once more.
    :param path_gradient: takes the gradient of ``log q`` by the parameters, whose mean is zero, off that of the ELBO
        ("sticking the landing", Roeder et al. 2017). What is left has no variance where the guide is exact, which is
        what fits the parameters of elements that are seen a few dozen times; far from there it can have more. Costs an
        inverse pass. For ``Trace_ELBO`` only. An attribute which may be changed between two runs of ``SVI``.
    :param prefix: prefix of the guide's parameters.
    :param init_loc_fn: NumPyro's initialisation strategy, which gives the first locations.
    :param init_scale: first scale on the unconstrained space, a positive number. Elements of innermost plates start at
        the gradient and curvature of their likelihood instead, where it can be differentiated twice and there are no
        discrete latents; those of a subsampled plate in as many subsamples as it takes. Where the model gets a
        minibatch as its argument, only the minibatch's do, and the others start at their mean.
    :raises TypeError: for flows or encoders that cannot be called.
    :raises ValueError: at the first call, for a model without plates or local latents, discrete latents that are not
        enumerated, or a log-density that is not finite at the start; at any call, for a plate whose size has changed,
        or data and encodings of a wrong shape.
    """

    def __init__(
        self,
        model: Callable,
        global_flow: Callable[..., TransformModule] = flows.realnvp,
        local_flow: Callable[..., TransformModule] = LOCAL_FLOW,
        amortise: Callable | Mapping[str, Callable] | None = None,
        *,
        data: Callable | Mapping[str, Callable] | None = None,
        element_parameters: bool | None = None,
        noncentered: bool = True,
        correlated: bool | None = None,
        path_gradient: bool = False,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ):
        _check_arguments(global_flow, local_flow, amortise, data, init_scale)
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)
        self.global_flow, self.local_flow, self.amortise, self.data = global_flow, local_flow, amortise, data
        self.element_parameters, self.noncentered, self._init_scale = element_parameters, noncentered, init_scale
        self.correlated, self.path_gradient = correlated, path_gradient
        self.groups: dict[str, Group] = {}
        self.group_flows: dict[str, GroupFlow] = {}

    # -- structure -------------------------------------------------------------------------------------------------
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        key = numpyro.prng_key()
        key = jax.random.key(0) if key is None else key
        trace = self._run_model(key, args, kwargs, self._initial_value)
        check_trace(trace)
        groups = groups_of(trace)
        self._check_keys(groups)
        priors = partial(self._priors, key, args, kwargs, trace)
        here = priors(set()) if self.noncentered else {}
        there, after = (priors(set(trace)), priors(set(), last=True)) if self.noncentered else ({}, {})
        # of location-scale form, and depending on other continuous latents, and on no discrete
        informed = {x for x in here if differ(here, there, x) and not differ(here, after, x, missing=True)}
        modules = {}
        for n, group in enumerate(groups.values()):
            group.informed = informed & set(group.sites)
            group.joint = self._joint(group, trace, priors, here)
            modules[group.label] = self._module(group, groups, trace, args, kwargs, jax.random.fold_in(key, n + 1))
        self.groups, self.group_flows, self.prototype_trace = groups, modules, trace
        self._prototype_call = args, kwargs

    def _run_model(self, key: Array, args: tuple, kwargs: dict, value: Callable) -> dict[str, Any]:
        with handlers.block():
            model = handlers.substitute(handlers.seed(Supported(self.model), key), substitute_fn=value)
            return handlers.trace(model).get_trace(*args, **kwargs)

    def _initial_value(self, site: dict[str, Any]) -> Array | None:
        if not is_latent(site):
            return None
        return first_value(site) if site["fn"].support.is_discrete else self.init_loc_fn(site)

    def _priors(
        self, key: Array, args: tuple, kwargs: dict, trace: dict[str, Any], moved: set[str], last: bool = False
    ) -> dict[str, tuple[Array, Array] | None]:
        """Locations and scales of the sites' priors where the latents ``moved`` are not as in ``trace``.

        :param last: whether the discrete latents have the last of their values, not the first.
        """
        rng, values = np.random.default_rng(0), {}
        for name, site in trace.items():
            if is_latent(site) and not site["fn"].support.is_discrete:
                u = biject_to(site["fn"].support).inv(site["value"])
                values[name] = u + (name in moved) * 0.1 * jnp.asarray(rng.standard_normal(u.shape), u.dtype)

        def value(site: dict[str, Any]) -> Array | None:
            if not is_latent(site):
                return None
            if site["name"] in values:
                return biject_to(site["fn"].support)(values[site["name"]])
            return first_value(site, last)

        run = self._run_model(key, args, kwargs, value)
        return {name: location_and_scale(run[name]["fn"], u.shape) for name, u in values.items() if name in run}

    def _joint(self, group: Group, trace: dict[str, Any], priors: Callable, here: dict[str, Any]) -> bool:
        """Whether an element's latents are placed together, with a full precision matrix.

        :param priors: the priors with some latents moved, as :meth:`_priors` has them; ``here`` those with none.
        """
        most = _MOST_CORRELATED if self.correlated is None else math.inf
        if self.correlated is False or not group.plates or not 1 < group.dim <= most:
            return False
        if len(group.sites) == 1 or not group.informed:
            return True
        latent = [name for name, site in trace.items() if is_latent(site)]
        late = set(latent[min(latent.index(name) for name in group.sites) :])
        there = priors(late)
        bound = [name for name in group.sites if name in group.informed and differ(here, there, name)]
        if bound and self.correlated:
            raise ValueError(
                f"AutoHierarchicalFlow: correlated=True needs the priors of {list(group.sites)} before any of them is "
                f"drawn, but those of {bound} depend on one of them or on a latent that comes later. Move that latent "
                "up in the model, or leave correlated out."
            )
        return not bound

    def _check_keys(self, groups: dict[str, Group]) -> None:
        local = [label for label in groups if label != "global"]
        for argument, given in (("amortise", self.amortise), ("data", self.data)):
            if isinstance(given, Mapping):
                unknown = sorted(set(given) - set(local))
                if unknown:
                    raise ValueError(
                        f"AutoHierarchicalFlow: {argument} has the key(s) {unknown}, but the groups of local latents "
                        f"are {local}."
                    )
            elif given is not None and argument == "amortise" and len(local) > 1:
                raise ValueError(
                    f"AutoHierarchicalFlow: amortise is a single encoder, but there are several groups of local "
                    f"latents: {local}. Pass a dict from group to encoder (and data= likewise)."
                )

    def _module(
        self, group: Group, groups: dict[str, Group], trace: dict[str, Any], args: tuple, kwargs: dict, key: Array
    ) -> GroupFlow:
        start = jnp.concatenate([group.flat_mean(site, trace) for site in group.sites.values()])
        log_scale = jnp.full_like(start, math.log(self._init_scale))
        encoder = self._of_group(self.amortise, group)
        if not group.plates:
            flow = self.global_flow(group.dim, key=key)
            return GroupFlow(_cast(flow, start.dtype), start, log_scale, None, None, None)
        context_dim = sum(groups[parent].dim for parent in group.parents)
        every = bool(self.element_parameters or (self.element_parameters is None and encoder is None))
        shape = group.sizes if every else (1,)
        tril = jnp.zeros((*shape, group.dim * (group.dim - 1) // 2), start.dtype)
        start, log_scale = (jnp.broadcast_to(a, (*shape, group.dim)) for a in (start, log_scale))
        found = self._first_pseudo_observations(group, groups, trace, args, kwargs, key, every)
        if found is not None:
            start, log_scale, tril = found
        if not every:
            start, log_scale, tril = (a.mean(tuple(range(a.ndim - 1))) for a in (start, log_scale, tril))
        head = None
        if encoder is not None:
            sizes = {name: trace[name]["value"] for name in group.plates}
            encoding = self._encode(group, encoder, sizes, args, kwargs)
            context_dim += encoding.shape[-1]
            # small, not zero: many encoders give zeros at the start, and a product of zeros has no gradient
            limit = 0.1 / math.sqrt(encoding.shape[-1])
            head_key, key = jax.random.split(key)
            rows = 2 * group.dim + (tril.shape[-1] if group.joint else 0)
            head = jax.random.uniform(head_key, (rows, encoding.shape[-1]), start.dtype, -limit, limit)
        flow = self.local_flow(group.dim, context_dim=context_dim, key=key)
        return GroupFlow(_cast(flow, start.dtype), start, log_scale, tril if group.joint else None, encoder, head)

    def _first_pseudo_observations(
        self,
        group: Group,
        groups: dict[str, Group],
        trace: dict[str, Any],
        args: tuple,
        kwargs: dict,
        key: Array,
        every: bool,
    ) -> tuple[Array, ...] | None:
        """Location, log-scale and what stands below the diagonal, ``(*sizes, ...)``, by the likelihood at the start.

        A step of Newton's for the elements of a subsample at once: its Hessian takes as many products as an element has
        latents. Those in none of the subsamples begin at the mean of the others.

        :param every: whether all elements are wanted, in as many subsamples as it takes.
        """
        inner = any(group.label in other.parents for other in groups.values())
        if inner or any(is_latent(site) and site["fn"].support.is_discrete for site in trace.values()):
            return None
        here = {name: trace[name]["value"] for name in group.plates}
        present = tuple(len(index) for index in here.values())
        weight = math.prod(size / n for size, n in zip(group.sizes, present, strict=True))
        means = [group.flat_mean(site, trace) for site in group.sites.values()]
        x = jnp.broadcast_to(jnp.concatenate(means), (*group.batch_shape(here), group.dim))
        units = jnp.broadcast_to(jnp.eye(group.dim, dtype=x.dtype)[:, None], (group.dim, x[..., 0].size, group.dim))

        def run(indices: dict[str, Array], parts: dict[str, Array]) -> dict[str, Any]:
            def value(site: dict[str, Any]) -> Array | None:
                if site["type"] == "plate":
                    return indices.get(site["name"])
                if not is_latent(site):
                    return None
                if site["name"] in parts:
                    return biject_to(site["fn"].support)(parts[site["name"]])
                return trace[site["name"]]["value"]

            return self._run_model(key, args, kwargs, value)

        @jax.jit
        def of(indices: dict[str, Array]) -> tuple[Array, ...]:
            def log_likelihood(x: Array) -> Array:
                parts, total = group.split(x), jnp.zeros((), x.dtype)
                for name, site in run(indices, parts).items():
                    if site["type"] != "sample" or name in group.informed:
                        continue
                    factor = 1.0 if site["scale"] is None else site["scale"]
                    total += jnp.sum(factor * site["fn"].log_prob(site["value"]))
                    if name in parts:
                        bijection = biject_to(site["fn"].support)
                        total += weight * jnp.sum(bijection.log_abs_det_jacobian(parts[name], site["value"]))
                return total / weight

            gradient, product = jax.vjp(jax.grad(log_likelihood), x)
            curvature = -jnp.stack([product(unit.reshape(x.shape))[0] for unit in units], -2)
            sites = run(indices, group.split(x))
            _, prior = group.prior({name: sites[name]["fn"] for name in group.sites}, x)
            found = pseudo_observations(x, gradient, curvature, prior, group.joint)
            usual = x, jnp.full_like(x, math.log(self._init_scale)), jnp.zeros_like(found[2])
            finite = jnp.isfinite(jnp.concatenate(found, -1)).all(-1, keepdims=True)
            pairs = zip(found, usual, strict=True)
            return tuple(jnp.where(finite, a, other).reshape(*present, a.shape[-1]) for a, other in pairs)

        try:
            found = of(here)
        except (NotImplementedError, TypeError, ValueError):  # not twice differentiable: solvers, loops
            return None
        tables = [
            np.broadcast_to(np.mean(a, tuple(range(len(present)))), (*group.sizes, a.shape[-1])).copy() for a in found
        ]
        parts = [(here, found)]
        if every and self._indices_are_drawn(here, group.sizes, args, kwargs, key):
            every_one = subsamples(here, group.sizes)
            parts = [(indices, of(indices)) for indices in tqdm(every_one, desc="AutoHierarchicalFlow: start", delay=5)]
        for indices, found in parts:
            for table, values in zip(tables, found, strict=True):
                table[np.ix_(*(np.asarray(index) for index in indices.values()))] = values
        return tuple(jnp.asarray(table) for table in tables)

    def _indices_are_drawn(
        self, here: dict[str, Array], sizes: tuple[int, ...], args: tuple, kwargs: dict, key: Array
    ) -> bool:
        """Whether there are subsamples, and other keys give others, so that the model looks up their data itself."""
        if all(len(index) == size for index, size in zip(here.values(), sizes, strict=True)):
            return False
        for k in jax.random.split(key, 4):
            again = self._run_model(k, args, kwargs, self._initial_value)
            if all(
                len(index) == size or not np.array_equal(index, again[name]["value"])
                for (name, index), size in zip(here.items(), sizes, strict=True)
            ):
                return True
        return False

    @staticmethod
    def _of_group(given: Any, group: Group) -> Any:
        return given.get(group.label) if isinstance(given, Mapping) else given

    def _encode(self, group: Group, encoder: Callable, indices: dict[str, Array], args: tuple, kwargs: dict) -> Array:
        """Encodings ``(*batch, c)`` of the present elements, in the plates' dimensions."""
        function = self._of_group(self.data, group)
        if function is None and not args:
            raise ValueError(
                "AutoHierarchicalFlow: the model has no positional argument which the encoder's data could be. "
                "Pass data=, a function of the model's arguments."
            )
        data = jnp.asarray(args[0] if function is None else function(*args, **kwargs))
        present = tuple(len(indices[name]) for name in group.plates)
        depth = len(present)
        if data.ndim <= depth or data.shape[:depth] not in (present, group.sizes):
            raise ValueError(
                f"AutoHierarchicalFlow: data for {group.label!r} has shape {data.shape}, but expected "
                f"{(*present, 'features')} or, for all elements, {(*group.sizes, 'features')}. Pass data= a function "
                "of the model's arguments that returns one of them."
            )
        if data.shape[:depth] != present:
            data = data[jnp.ix_(*(indices[name] for name in group.plates))]
        encoding = encoder(data)
        if jnp.shape(encoding)[:-1] != present:
            raise ValueError(
                f"AutoHierarchicalFlow: the encoder of {group.label!r} returned shape {jnp.shape(encoding)} for data "
                f"of shape {data.shape}, but expected {(*present, 'c')}. amortise= takes a batch of elements to one "
                "vector for each (wrap a network of single elements in jax.vmap)."
            )
        return encoding.reshape(*group.batch_shape(indices), encoding.shape[-1])

    # -- the guide -------------------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws of the latents present in this call, by site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        modules = {label: flow_module(f"{self.prefix}_{label}", module) for label, module in self.group_flows.items()}
        run = GuideRun(self, modules, numpyro.prng_key(), args, kwargs)
        for group in self.groups.values():
            if group.joint and group.informed and len(group.sites) > 1:
                run.ahead = group
                with contextlib.suppress(Done), run:
                    Supported(self.model)(*args, **kwargs)
        run.ahead = None
        with contextlib.suppress(Done), run:
            Supported(self.model)(*args, **kwargs)
        missing = [name for group in self.groups.values() for name in group.sites if name not in run.values]
        if missing:
            raise ValueError(
                f"AutoHierarchicalFlow: latent site(s) {missing} were there when the guide was set up, but not in this "
                "call. The guide needs a model of fixed structure."
            )
        return run.values

    def sample_posterior(
        self, rng_key: Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of the latents, ``(*sample_shape, *site_shape)``: all elements where the model's plates are full.

        :param params: as ``SVI`` returns them.
        :param args: the model's arguments; those of the guide's first call unless given.
        :raises ValueError: for several draws without arguments, if those of the first call subsample at random.
        """
        draws, indices = self._draws(rng_key, params, args, kwargs, sample_shape)
        if not args and not kwargs:
            _check_same(indices)
        return draws

    def _draws(
        self, rng_key: Array, params: dict[str, Any], args: tuple, kwargs: dict[str, Any], sample_shape: tuple[int, ...]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Draws, and the indices of each plate in every one of them ``(n, size)``."""
        if not args and not kwargs and self.prototype_trace is not None:
            args, kwargs = self._prototype_call

        def draw(key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
            with handlers.block(), handlers.seed(rng_seed=key), handlers.substitute(data=params):
                with handlers.trace() as trace:
                    draws = self(*args, **kwargs)
            return draws, {name: jnp.asarray(site["value"]) for name, site in trace.items() if site["type"] == "plate"}

        if not sample_shape:
            return draw(rng_key)[0], {}
        draws, indices = jax.vmap(draw)(jax.random.split(rng_key, math.prod(sample_shape)))
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws), indices

    def quantiles(
        self,
        params: dict[str, Any],
        quantiles: Any,
        *args: Any,
        rng_key: Array | None = None,
        num_samples: int = 1000,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Quantiles of each latent site, from draws.

        :param args: as for :meth:`sample_posterior`.
        :returns: dict of arrays ``(len(quantiles), *site_shape)``, or ``site_shape`` for a single number.
        :raises ValueError: where plates of the model are subsampled at random: every draw is of other elements.
        """
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        draws, indices = self._draws(rng_key, params, args, kwargs, (num_samples,))
        _check_same(indices)
        return jax.tree.map(lambda x: jnp.quantile(x, jnp.asarray(quantiles), axis=0), draws)

    def median(
        self,
        params: dict[str, Any],
        *args: Any,
        rng_key: Array | None = None,
        num_samples: int = 1000,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Median of each latent site, from draws."""
        return self.quantiles(params, 0.5, *args, rng_key=rng_key, num_samples=num_samples, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # of the trace no more is needed than that there was one; its handlers' closures cannot be pickled
        return {**super().__getstate__(), "prototype_trace": None if self.prototype_trace is None else {}}


def _check_same(indices: dict[str, Array]) -> None:
    """Raises a ``ValueError`` where the elements of plates differ from draw to draw ``(n, size)``."""
    random = [name for name, x in indices.items() if not isinstance(x, jax.core.Tracer) and (x != x[:1]).any()]
    if random:
        raise ValueError(
            f"AutoHierarchicalFlow: plate(s) {random} are subsampled at random, so that nobody knows of which "
            "elements these draws would be. Pass the full data, without a subsample."
        )


def _check_arguments(global_flow: Any, local_flow: Any, amortise: Any, data: Any, init_scale: Any) -> None:
    for argument, flow in (("global_flow", global_flow), ("local_flow", local_flow)):
        check_flow(flow, "AutoHierarchicalFlow", argument)
    for argument, given in (("amortise", amortise), ("data", data)):
        for each in given.values() if isinstance(given, Mapping) else [given]:
            if each is not None and not callable(each):
                raise TypeError(
                    f"AutoHierarchicalFlow: {argument} must be callable, or a dict of callables, but got "
                    f"{type(each).__name__}."
                )
    if data is not None and amortise is None:
        raise ValueError(
            "AutoHierarchicalFlow: data= is what an encoder sees: pass amortise= as well, or leave it out."
        )
    if not isinstance(init_scale, int | float) or not init_scale > 0:
        raise ValueError(f"AutoHierarchicalFlow: init_scale must be a positive number, but got {init_scale!r}.")
