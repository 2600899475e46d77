"""A guide that follows the plates of a model: a flow of the global latents, conditional flows of the local ones."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_median
from numpyro.primitives import Messenger
from tqdm import tqdm

from numpyro_flows import flows
from numpyro_flows.distributions import standard_base
from numpyro_flows.guides.auto_flow import _cast
from numpyro_flows.log_density import check_finite
from numpyro_flows.noncentering import LOCATION_SCALE, WRAPPERS, unwrapped
from numpyro_flows.transform_module import TransformModule, flow_module, full_precision

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
        _check_trace(trace)
        groups = _groups(trace)
        self._check_keys(groups)
        priors = partial(self._priors, key, args, kwargs, trace)
        here = priors(set()) if self.noncentered else {}
        there, after = (priors(set(trace)), priors(set(), last=True)) if self.noncentered else ({}, {})
        # of location-scale form, and depending on other continuous latents, and on no discrete
        informed = {x for x in here if _differ(here, there, x) and not _differ(here, after, x, missing=True)}
        modules = {}
        for n, group in enumerate(groups.values()):
            group.informed = informed & set(group.sites)
            group.joint = self._joint(group, trace, priors, here)
            modules[group.label] = self._module(group, groups, trace, args, kwargs, jax.random.fold_in(key, n + 1))
        self.groups, self.group_flows, self.prototype_trace = groups, modules, trace
        self._prototype_call = args, kwargs

    def _run_model(self, key: Array, args: tuple, kwargs: dict, value: Callable) -> dict[str, Any]:
        with handlers.block():
            model = handlers.substitute(handlers.seed(self.model, key), substitute_fn=value)
            return handlers.trace(model).get_trace(*args, **kwargs)

    def _initial_value(self, site: dict[str, Any]) -> Array | None:
        if not _is_latent(site):
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
            if _is_latent(site) and not site["fn"].support.is_discrete:
                u = biject_to(site["fn"].support).inv(site["value"])
                values[name] = u + (name in moved) * 0.1 * jnp.asarray(rng.standard_normal(u.shape), u.dtype)

        def value(site: dict[str, Any]) -> Array | None:
            if not _is_latent(site):
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
        latent = [name for name, site in trace.items() if _is_latent(site)]
        late = set(latent[min(latent.index(name) for name in group.sites) :])
        there = priors(late)
        bound = [name for name in group.sites if name in group.informed and _differ(here, there, name)]
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
        if inner or any(_is_latent(site) and site["fn"].support.is_discrete for site in trace.values()):
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
                if not _is_latent(site):
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
            found = _pseudo_observations(x, gradient, curvature, prior, group.joint)
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
        run = _GuideRun(self, modules, numpyro.prng_key(), args, kwargs)
        for group in self.groups.values():
            if group.joint and group.informed and len(group.sites) > 1:
                run.ahead = group
                with contextlib.suppress(_Done), run:
                    self.model(*args, **kwargs)
        run.ahead = None
        with contextlib.suppress(_Done), run:
            self.model(*args, **kwargs)
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
        """
        if not args and not kwargs and self.prototype_trace is not None:
            args, kwargs = self._prototype_call

        def draw(key: Array) -> dict[str, Array]:
            with handlers.block(), handlers.seed(rng_seed=key), handlers.substitute(data=params):
                return self(*args, **kwargs)

        if not sample_shape:
            return draw(rng_key)
        draws = jax.vmap(draw)(jax.random.split(rng_key, math.prod(sample_shape)))
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

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
        """
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        draws = self.sample_posterior(rng_key, params, *args, sample_shape=(num_samples,), **kwargs)
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


class GroupFlow(eqx.Module):
    """What is learned of one group of latents: its flow, location and scale, and its encoder.

    :param flow: flow of size ``dim``, with a context unless it is the global one.
    :param loc: ``(dim,)``, or ``(*plate_sizes, dim)`` where elements have their own.
    :param log_scale: as ``loc``.
    :param tril: ``(dim (dim - 1) / 2,)``, likewise: what stands below the diagonal of ``L``, row by row, where an
        element's latents may be correlated.
    :param encoder: encoder to ``(..., c)``, if any.
    :param head: ``(2 dim, c)``, or as many rows more as ``tril`` has numbers: what the encoding adds to location,
        log-scale and ``tril``.
    """

    flow: TransformModule
    loc: Array
    log_scale: Array
    tril: Array | None
    encoder: Any
    head: Array | None


@dataclasses.dataclass
class Site:
    """A latent site: the shape of one element's unconstrained value, its batch axes outside plates first."""

    name: str
    rest: tuple[int, ...]
    event: tuple[int, ...]
    axes: tuple[int, ...]  # of the group's plates among the batch axes, from the right

    @property
    def size(self) -> int:
        return math.prod(self.rest) * math.prod(self.event)


@dataclasses.dataclass
class Group:
    """The latents that lie in the same plates."""

    plates: dict[str, int]  # plate -> its dimension, outermost first
    sizes: tuple[int, ...]  # of the full plates
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    parents: tuple[str, ...] = ()
    informed: set[str] = dataclasses.field(default_factory=set)
    joint: bool = False  # an element's latents have a full precision matrix

    @property
    def label(self) -> str:
        return "_".join(self.plates) or "global"

    @property
    def dim(self) -> int:
        return sum(site.size for site in self.sites.values())

    def batch_shape(self, indices: dict[str, Array]) -> tuple[int, ...]:
        shape = [1] * max((-dim for dim in self.plates.values()), default=0)
        for name, dim in self.plates.items():
            shape[dim] = len(indices[name])
        return tuple(shape)

    def flat_mean(self, site: Site, trace: dict[str, Any]) -> Array:
        """The first unconstrained value of a site as ``(size,)``, the mean over elements."""
        u = biject_to(trace[site.name]["fn"].support).inv(trace[site.name]["value"])
        batch = u.ndim - len(site.event)
        return jnp.mean(u, axis=tuple(batch + axis for axis in site.axes)).reshape(-1)

    def split(self, x: Array) -> dict[str, Array]:
        """Vectors ``(*batch, dim)`` as values of the sites, each in the layout of its unconstrained value."""
        return {name: self.layout(self.sites[name], part) for name, part in self.pieces(x).items()}

    def pieces(self, x: Array) -> dict[str, Array]:
        """Vectors ``(*batch, dim)`` as those of the sites, ``(*batch, size)``."""
        ends = np.cumsum([site.size for site in self.sites.values()])
        return dict(zip(self.sites, jnp.split(x, ends[:-1], -1), strict=True))

    def layout(self, site: Site, x: Array) -> Array:
        sizes = tuple(x.shape[dim - 1] for dim in self.plates.values())
        value = x.reshape(*sizes, *site.rest, *site.event)
        batch = value.ndim - len(site.event)
        # axes of size one stand in for plates of others between those of the group
        return jnp.moveaxis(value, range(len(sizes)), [batch + axis for axis in site.axes])

    def flat(self, name: str, value: Array, batch: tuple[int, ...]) -> Array:
        """A value in a site's layout as vectors ``(*batch, size)``."""
        site = self.sites[name]
        axes = [value.ndim - len(site.event) + axis for axis in site.axes]
        return jnp.moveaxis(value, axes, range(len(axes))).reshape(*batch, site.size)

    def prior(self, priors: dict[str, Any], like: Array) -> tuple[Array, Array]:
        """Location ``(*batch, dim)`` and precision ``(*batch, dim, dim)`` of the priors; zeros for those not used."""
        batch, end = like.shape[:-1], 0
        locs, precision = [], jnp.zeros((*like.shape, self.dim), like.dtype)
        for name, part in self.split(like).items():
            start, end = end, end + self.sites[name].size
            if name not in self.informed:
                locs.append(jnp.zeros((*batch, end - start), like.dtype))
                continue
            loc, scale = (self.flat(name, a, batch) for a in location_and_scale(priors[name], part.shape))  # type: ignore[union-attr]
            block, fn = jnp.eye(end - start, dtype=like.dtype) / jnp.square(scale)[..., None], unwrapped(priors[name])
            if isinstance(fn, dist.MultivariateNormal) and part.shape[-1] == end - start:
                full = jnp.broadcast_to(fn.precision_matrix, (*part.shape, end - start))
                axes = [full.ndim - 2 + axis for axis in self.sites[name].axes]
                block = jnp.moveaxis(full, axes, range(len(axes))).reshape(block.shape)
            locs.append(loc)
            precision = precision.at[..., start:end, start:end].set(block)
        return jnp.concatenate(locs, -1), precision


class _Done(Exception):
    """Every latent is drawn: what the model does from here on, its likelihood, is not needed."""


class _GuideRun(Messenger):
    """Runs the model with the guide's draws at its latent sites; its plates, masks and scales stay in force."""

    def __init__(
        self, guide: AutoHierarchicalFlow, modules: dict[str, GroupFlow], key: Array, args: tuple, kwargs: dict
    ):
        super().__init__(None)
        self.guide, self.modules, self.key, self.call = guide, modules, key, (args, kwargs)
        self.group_of = {name: group for group in guide.groups.values() for name in group.sites}
        self.indices: dict[str, Array] = {}
        self.noise: dict[str, Array] = {}  # what the flows give, by group: the contexts of others
        self.parts: dict[str, tuple[Array, Array, Array]] = {}  # y, loc and log-scale of every site of a group drawn
        self.log_q: dict[str, Array] = {}  # of a group's flow, which its last site takes
        self.encodings: dict[str, Array] = {}
        self.standard: dict[str, tuple[Array, Array]] = {}
        self.values: dict[str, Array] = {}
        self.late: set[str] = set()  # sites of a group drawn whose own messages are still to come
        self.drawn: dict[str, tuple[Array, Any]] = {}  # value and distribution of the sites
        self.placed: dict[str, tuple[Array, Array]] = {}  # unconstrained value and log-scale of sites placed together
        self.ahead: Group | None = None  # whose priors this run of the model is to find
        self.priors: dict[str, Any] = {}
        if "global" in guide.groups:
            self._draw(guide.groups["global"])

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "deterministic":
            msg["stop"] = True
        if msg["type"] == "plate" and msg["name"] in self.indices:
            msg["value"] = self.indices[msg["name"]]  # of the run ahead
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if name not in self.group_of:
            msg["stop"] = True  # observed, or left to the model
            if msg["value"] is None:
                if not msg["fn"].support.is_discrete:
                    raise ValueError(
                        f"AutoHierarchicalFlow: latent site {name!r} was not there when the guide was set up. "
                        "The guide needs a model of fixed structure."
                    )
                msg["value"] = first_value(msg)
            return
        group, ahead = self.group_of[name], self.ahead
        if ahead is not None:
            msg["stop"] = True
            if name not in self.drawn and (group is ahead or not self.priors.keys().isdisjoint(ahead.sites)):
                bijection = biject_to(msg["fn"].support)  # a stand-in, on which none of these priors depend
                msg["value"] = bijection(jnp.zeros(bijection.inverse_shape(msg["fn"].shape())))
                if group is ahead:
                    self.priors[name] = msg["fn"]
                return
        if name not in self.drawn:
            if group.label not in self.noise:
                self.priors.setdefault(name, msg["fn"])
                self._draw(group)
            self.drawn[name] = self._site(group, name, msg["fn"])
        msg["value"], msg["fn"] = self.drawn[name]
        if ahead is None:
            self.values[name] = msg["value"]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self.indices[msg["name"]] = msg["value"]
            for group in self.guide.groups.values():
                position = list(group.plates).index(msg["name"]) if msg["name"] in group.plates else None
                per_element = self.modules[group.label].loc.ndim > 1
                if position is not None and per_element and msg["args"][0] != group.sizes[position]:
                    raise ValueError(
                        f"AutoHierarchicalFlow: plate {msg['name']!r} has size {msg['args'][0]}, but it had "
                        f"{group.sizes[position]} when the guide was set up, and its elements have parameters of their "
                        "own. Keep the size (subsample_size= may change), make a new guide, or use amortise=."
                    )
        elif msg["type"] == "sample" and (
            self.priors.keys() >= self.ahead.sites.keys() if self.ahead else len(self.values) == len(self.group_of)
        ):
            raise _Done

    def _draw(self, group: Group) -> None:
        """Draws the joint vectors of a group, and their log-density."""
        module = self.modules[group.label]
        batch = group.batch_shape(self.indices)
        contexts = [self.noise[parent] for parent in group.parents]
        loc, log_scale, tril = module.loc, module.log_scale, module.tril
        if loc.ndim > 1:
            index = tuple(self.indices[name].reshape([-1] + [1] * (-dim - 1)) for name, dim in group.plates.items())
            loc, log_scale, tril = loc[index], log_scale[index], None if tril is None else tril[index]
        if module.encoder is not None:
            encoding = self.guide._encode(group, module.encoder, self.indices, *self.call)
            self.encodings[group.label] = encoding
            contexts.append(encoding)
            assert module.head is not None
            shift, log_factor, skew = jnp.split(encoding @ module.head.T, [group.dim, 2 * group.dim], -1)
            loc, log_scale, tril = loc + shift, log_scale + log_factor, None if tril is None else tril + skew
        number = list(self.guide.groups).index(group.label)
        base = standard_base(group.dim, like=loc)
        x = base.sample(jax.random.fold_in(self.key, number), batch)
        y, log_det = module.flow.forward_and_log_det(x, _joined(contexts, batch))
        self.noise[group.label], self.log_q[group.label] = y, base.log_prob(x) - log_det
        self.late.update(group.sites)
        loc, log_scale = (jnp.broadcast_to(a, y.shape) for a in (loc, log_scale))
        if tril is not None:
            self._place(group, y, loc, log_scale, tril)
            return
        ys, locs, log_scales = (group.split(a) for a in (y, loc, log_scale))
        for name in group.sites:
            self.parts[name] = ys[name], locs[name], log_scales[name]
            if self.guide.path_gradient and name not in group.informed:
                u = locs[name] + jnp.exp(log_scales[name]) * ys[name]
                self._standardise(group, name, u, locs[name], log_scales[name])

    @full_precision
    def _place(self, group: Group, y: Array, loc: Array, log_scale: Array, tril: Array) -> None:
        """Puts the latents of a group's elements where their priors and pseudo-observations together have them."""
        prior = group.prior(self.priors, y)
        centre, factor = _posterior(loc, log_scale, tril, *prior)
        u = centre + solve_triangular(factor.mT, y[..., None], lower=False)[..., 0]
        us, log_ss = group.split(u), group.split(-jnp.log(jnp.diagonal(factor, 0, -2, -1)))
        self.placed.update((name, (us[name], log_ss[name])) for name in group.sites)
        if self.guide.path_gradient:
            centre, factor = _posterior(loc, log_scale, tril, *lax.stop_gradient(prior))
            y = (factor.mT @ (lax.stop_gradient(u) - centre)[..., None])[..., 0]
            ys, log_ss = group.pieces(y), group.pieces(-jnp.log(jnp.diagonal(factor, 0, -2, -1)))
            self.standard.update((name, (ys[name], log_ss[name])) for name in group.sites)

    def _site(self, group: Group, name: str, fn: Any) -> tuple[Array, Any]:
        """Value of a site, and its distribution in the guide: a point that carries the log-density."""
        u, log_s = self.placed[name] if group.joint else self._alone(group, name, fn)
        self.late.remove(name)
        bijection = biject_to(fn.support)
        value = bijection(u)
        event_dim = fn.event_dim
        log_det = bijection.log_abs_det_jacobian(u, value)
        log_det = sum_rightmost(log_det, log_det.ndim - value.ndim + event_dim)
        site = group.sites[name]
        log_q = -log_det - sum_rightmost(log_s, len(site.event))
        if self.late.isdisjoint(group.sites):  # the last site takes the flow's part
            joint = self.log_q[group.label]
            if self.guide.path_gradient:
                joint = joint - self._score(group)
            once = dataclasses.replace(site, rest=(1,) * len(site.rest), event=())
            log_q = log_q + group.layout(once, joint[..., None]) / math.prod(site.rest)  # spread over its other axes
        delta = dist.Delta(value, log_q, event_dim)
        mask = mask_of(fn)
        return value, delta if mask is None else delta.mask(mask)

    def _alone(self, group: Group, name: str, fn: Any) -> tuple[Array, Array]:
        """Unconstrained value of a site by its own prior and pseudo-observation, and its log-scale."""
        y, loc, log_scale = self.parts[name]
        if name not in group.informed:
            return loc + jnp.exp(log_scale) * y, log_scale
        prior_loc, prior_scale = location_and_scale(fn, y.shape)  # type: ignore[misc]
        centre, log_s = _with_prior(loc, log_scale, prior_loc, prior_scale)
        u = centre + jnp.exp(log_s) * y
        if self.guide.path_gradient:
            fixed = _with_prior(loc, log_scale, lax.stop_gradient(prior_loc), lax.stop_gradient(prior_scale))
            self._standardise(group, name, u, *fixed)
        return u, log_s

    # -- the path gradient: the log-density's gradient by the parameters, at fixed values, is taken off ------------
    def _standardise(self, group: Group, name: str, u: Array, centre: Array, log_s: Array) -> None:
        """What the flow would have to give for ``u``, held fixed; and the log-scales; both ``(*batch, size)``."""
        y = (lax.stop_gradient(u) - centre) * jnp.exp(-log_s)
        batch = self.noise[group.label].shape[:-1]
        self.standard[name] = group.flat(name, y, batch), group.flat(name, jnp.broadcast_to(log_s, y.shape), batch)

    def _score(self, group: Group) -> Array:
        """Zeros ``(*batch)`` with the gradient of the group's log-density by the parameters, the values held fixed."""
        module, batch = self.modules[group.label], self.noise[group.label].shape[:-1]
        contexts = [self._standard_of(self.guide.groups[parent], group) for parent in group.parents]
        if group.label in self.encodings:
            contexts.append(self.encodings[group.label])
        y = self._standard_of(group, group)
        x, log_det = module.flow.inverse_and_log_det(y, _joined(contexts, batch))
        log_scales = jnp.concatenate([self.standard[name][1] for name in group.sites], -1)
        log_q = standard_base(group.dim, like=y).log_prob(x) + log_det - log_scales.sum(-1)
        return log_q - lax.stop_gradient(log_q)

    def _standard_of(self, group: Group, inner: Group) -> Array:
        late = [name for name in group.sites if name not in self.standard]
        if late:
            raise ValueError(
                f"AutoHierarchicalFlow: path_gradient=True needs the latents of {group.label!r} before those of "
                f"{inner.label!r}, but site(s) {late} come later. Move them up in the model, or set it to False."
            )
        return jnp.concatenate([self.standard[name][0] for name in group.sites], -1)


def _joined(contexts: list[Array], batch: tuple[int, ...]) -> Array | None:
    """One context ``(*batch, c)``, or none."""
    if not contexts:
        return None
    return jnp.concatenate([jnp.broadcast_to(c, (*batch, c.shape[-1])) for c in contexts], -1)


def _with_prior(loc: Array, log_scale: Array, prior_loc: Array, prior_scale: Array) -> tuple[Array, Array]:
    """Centre and log-scale of a latent with its prior and pseudo-observation."""
    log_s = -0.5 * jnp.logaddexp(-2 * log_scale, -2 * jnp.log(prior_scale))
    return prior_loc + jnp.exp(2 * (log_s - log_scale)) * (loc - prior_loc), log_s


def _posterior(loc: Array, log_scale: Array, tril: Array, prior_loc: Array, precision: Array) -> tuple[Array, Array]:
    """Centre of an element's latents and the lower Cholesky factor of their precision matrix."""
    eye = jnp.eye(loc.shape[-1], dtype=loc.dtype)
    rows, columns = np.tril_indices(loc.shape[-1], -1)
    factor = jnp.zeros((*tril.shape[:-1], *eye.shape), tril.dtype).at[..., rows, columns].set(tril) + eye
    factor = jnp.exp(-log_scale)[..., None] * factor
    observed = factor.mT @ factor
    cholesky = jnp.linalg.cholesky(precision + observed)
    pull = observed @ (loc - prior_loc)[..., None]
    pull = solve_triangular(cholesky.mT, solve_triangular(cholesky, pull, lower=True), lower=False)
    return prior_loc + pull[..., 0], cholesky


def _pseudo_observations(
    x: Array, gradient: Array, curvature: Array, prior: Array, joint: bool
) -> tuple[Array, Array, Array]:
    """Location, log-scale and what stands below the diagonal where ``x`` has a likelihood's gradient and curvature.

    Where it is flat or convex, a hundredth of the prior's precision.
    """
    if not joint:
        curvature = curvature * jnp.eye(x.shape[-1], dtype=x.dtype)
    curvature = jnp.nan_to_num(curvature)
    values, vectors = jnp.linalg.eigh(0.5 * (curvature + curvature.mT))
    least = 1e-2 * jnp.diagonal(prior, 0, -2, -1).mean(-1) + 1e-3 * jnp.abs(values).max(-1) + 1e-6
    values = jnp.maximum(values, least[..., None])
    far = 10 / jnp.sqrt(values)  # no further, in standard deviations
    step = jnp.clip((vectors.mT @ gradient[..., None])[..., 0] / values, -far, far)
    loc = x + (vectors @ step[..., None])[..., 0]
    precision = (vectors * values[..., None, :]) @ vectors.mT
    factor = jnp.linalg.cholesky(precision[..., ::-1, ::-1])[..., ::-1, ::-1].mT  # lower, W^T W
    diagonal = jnp.diagonal(factor, 0, -2, -1)
    rows, columns = np.tril_indices(x.shape[-1], -1)
    return loc, -jnp.log(diagonal), (factor / diagonal[..., None])[..., rows, columns]


def subsamples(here: dict[str, Array], sizes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Indices that together hold all elements of the plates, as many at a time as in ``here``."""
    each = []
    for index, size in zip(here.values(), sizes, strict=True):
        starts = [min(start, size - len(index)) for start in range(0, size, len(index))]
        each.append([np.arange(start, start + len(index)) for start in starts])
    return [dict(zip(here, some, strict=True)) for some in itertools.product(*each)]


def _differ(some: dict[str, Any], others: dict[str, Any], name: str, missing: bool = False) -> bool:
    """Whether a site's prior is another one; ``missing`` where one is none, or not of location-scale form."""
    one, other = some.get(name), others.get(name)
    if one is None or other is None:
        return missing
    return any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# -- reading a model -----------------------------------------------------------------------------------------------
def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary", False)


def first_value(site: dict[str, Any], last: bool = False) -> Array:
    """The first (or last) value of a discrete site's support."""
    fn = site["fn"]
    return jnp.broadcast_to(fn.enumerate_support(expand=False)[-1 if last else 0], fn.shape())


def location_and_scale(fn: Any, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    """Location and scale of an unconstrained value of ``shape``; ``None`` unless the distribution is of that form."""
    fn = unwrapped(fn)
    if isinstance(fn, dist.MultivariateNormal):
        loc, scale = fn.loc, jnp.sqrt(jnp.square(fn.scale_tril).sum(-1))
    elif isinstance(fn, LOCATION_SCALE):
        loc, scale = fn.loc, fn.scale
    else:
        return None
    return jnp.broadcast_to(loc, shape), jnp.broadcast_to(scale, shape)


def mask_of(fn: Any) -> Array | None:
    """The mask that handlers have put on a distribution."""
    mask = None
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return mask


def _groups(trace: dict[str, Any]) -> dict[str, Group]:
    """The groups of latents by their labels, in the order of the model."""
    groups: dict[str, Group] = {}
    for name, site in trace.items():
        if not _is_latent(site) or site["fn"].support.is_discrete:
            continue
        frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
        plates = {frame.name: frame.dim for frame in frames}
        group = Group(plates, tuple(trace[plate]["args"][0] for plate in plates))
        known = groups.setdefault(group.label, group)
        if known.plates != group.plates:
            raise ValueError(
                f"AutoHierarchicalFlow: the plates {list(known.plates)} and {list(group.plates)} make one name, "
                f"{group.label!r}. Rename one of them."
            )
        group = known
        bijection, batch = biject_to(site["fn"].support), site["fn"].batch_shape
        shape = jnp.shape(bijection.inv(site["value"]))
        event = shape[len(batch) :]
        rest = tuple(n for i, n in enumerate(batch) if i - len(batch) not in plates.values())
        group.sites[name] = Site(name, rest, event, tuple(plates.values()))
    order = list(groups)
    order.sort(key=lambda label: label != "global")
    groups = {label: groups[label] for label in order}
    for n, label in enumerate(order):
        group = groups[label]
        group.parents = tuple(other for other in order[:n] if set(groups[other].plates) < set(group.plates))
    return groups


def _check_trace(trace: dict[str, Any]) -> None:
    if any(isinstance(site["value"], jax.core.Tracer) for site in trace.values() if site["type"] == "sample"):
        raise ValueError(
            "AutoHierarchicalFlow: the guide's first call, which reads the model's structure, is inside jax.jit or "
            "another transformation. Call svi.init (or the guide) once outside it."
        )
    latent = {name: site for name, site in trace.items() if _is_latent(site)}
    discrete = [
        name for name, site in latent.items() if site["fn"].support.is_discrete and "enumerate" not in site["infer"]
    ]
    if discrete:
        raise ValueError(
            f"AutoHierarchicalFlow: site(s) {discrete} are discrete and not enumerated, but a flow is a density of "
            "continuous variables. Wrap the model in numpyro.contrib.funsor.config_enumerate and train with "
            "TraceEnum_ELBO, or sum them out of the model (as a mixture)."
        )
    continuous = {name: site for name, site in latent.items() if not site["fn"].support.is_discrete}
    if not continuous:
        raise ValueError("AutoHierarchicalFlow: the model has no continuous latent sites: there is nothing to infer.")
    if not any(site["cond_indep_stack"] for site in continuous.values()):
        raise ValueError(
            "AutoHierarchicalFlow: no latent of the model lies in a plate, so there are no local latents. Use "
            "AutoFlow, or put the latents that belong to elements into numpyro.plate."
        )
    check_finite(trace, "AutoHierarchicalFlow")


def _check_arguments(global_flow: Any, local_flow: Any, amortise: Any, data: Any, init_scale: Any) -> None:
    for argument, flow in (("global_flow", global_flow), ("local_flow", local_flow)):
        if not callable(flow) or isinstance(flow, TransformModule):
            raise TypeError(
                f"AutoHierarchicalFlow: {argument} must be a factory 'dim, *, key -> TransformModule', but got "
                f"{type(flow).__name__}. Pass flows.realnvp, or functools.partial(flows.realnvp, num_layers=4), not a "
                "built flow."
            )
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
