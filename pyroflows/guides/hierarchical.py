"""A guide that follows the plates of a model: a flow of the global latents, conditional flows of the local ones."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from tqdm import tqdm

from pyroflows import flows
from pyroflows.distributions import standard_base
from pyroflows.guides.auto_flow import AutoFlow
from pyroflows.log_density import check_finite
from pyroflows.noncentering import LOCATION_SCALE, WRAPPERS, unwrapped
from pyroflows.transform_module import TransformModule

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
    indices, masks and scales are the model's: in Pyro's ``SVI`` the ELBO of a subsample is unbiased. Discrete latents
    are left to enumeration (``config_enumerate``, ``TraceEnum_ELBO``). Parameters are those of the modules
    ``group_flows.{group}``: ``global``, and the plates' names joined by ``_``, outermost first. In the param store they
    stand under the guide's name, as those of ``AutoFlow`` do.

    :param model: Pyro model with latents in plates.
    :param global_flow: factory ``flow(dim) -> TransformModule`` for the latents outside plates.
    :param local_flow: factory ``flow(dim, context_dim=c) -> TransformModule`` for those in a plate; four layers of
        ``flows.realnvp`` unless given.
    :param amortise: encoder from the data of elements ``(..., features)`` to contexts ``(..., c)``, such as a
        ``conditioners.MLP``; trained with the guide if it is a module. A dict from group to encoder for a model with
        several groups of local latents.
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
    :param init_loc_fn: Pyro's initialisation strategy, which gives the first locations.
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
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ):
        _check_arguments(global_flow, local_flow, amortise, data, init_scale)
        super().__init__(model)
        self.global_flow, self.local_flow, self.data = global_flow, local_flow, data
        self._given = (amortise,)  # not a submodule: what is trained stands with its group
        self.element_parameters, self.noncentered = element_parameters, noncentered
        self.correlated, self.path_gradient = correlated, path_gradient
        self.init_loc_fn, self._init_scale = init_loc_fn, init_scale
        self.groups: dict[str, Group] = {}
        self.group_flows = nn.ModuleDict()

    @property
    def amortise(self) -> Callable | Mapping[str, Callable] | None:
        return self._given[0]

    # -- structure -------------------------------------------------------------------------------------------------
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        seed = int(torch.randint(2**31, ()))
        trace = self._run_model(seed, args, kwargs, self._initial_value)
        _check_trace(trace)
        groups = _groups(trace)
        self._check_keys(groups)
        priors = partial(self._priors, seed, args, kwargs, trace)
        here = priors(set()) if self.noncentered else {}
        there, after = (priors(set(trace.nodes)), priors(set(), last=True)) if self.noncentered else ({}, {})
        # of location-scale form, and depending on other continuous latents, and on no discrete
        informed = {x for x in here if _differ(here, there, x) and not _differ(here, after, x, missing=True)}
        modules = nn.ModuleDict()
        for group in groups.values():
            group.informed = informed & set(group.sites)
            group.joint = self._joint(group, trace, priors, here)
            modules[group.label] = self._module(group, groups, trace, args, kwargs, seed)
        self.groups, self.group_flows = groups, modules
        self.prototype_trace = trace

    def _run_model(
        self,
        seed: int,
        args: tuple,
        kwargs: dict,
        value: Callable,
        indices: dict[str, Tensor] | None = None,
        grad: bool = False,
    ) -> poutine.Trace:
        with poutine.block(), torch.set_grad_enabled(grad), pyro.validation_enabled(False), torch.random.fork_rng([]):
            torch.manual_seed(seed)
            with _Subsamples(indices or {}):
                return poutine.trace(InitMessenger(value)(self.model)).get_trace(*args, **kwargs)

    def _initial_value(self, site: dict) -> Tensor:
        return first_value(site) if site["fn"].support.is_discrete else self.init_loc_fn(site)

    def _priors(
        self, seed: int, args: tuple, kwargs: dict, trace: poutine.Trace, moved: set[str], last: bool = False
    ) -> dict[str, tuple[Tensor, Tensor] | None]:
        """Locations and scales of the sites' priors where the latents ``moved`` are not as in ``trace``.

        :param last: whether the discrete latents have the last of their values, not the first.
        """
        generator, values = torch.Generator().manual_seed(0), {}
        for name, site in trace.nodes.items():
            if _is_latent(site) and not site["fn"].support.is_discrete:
                u = biject_to(site["fn"].support).inv(site["value"])
                values[name] = u + (name in moved) * 0.1 * torch.randn(u.shape, generator=generator).to(u)

        def value(site: dict) -> Tensor:
            if site["name"] in values:
                return biject_to(site["fn"].support)(values[site["name"]])
            return first_value(site, last)

        run = self._run_model(seed, args, kwargs, value).nodes
        return {name: location_and_scale(run[name]["fn"], u) for name, u in values.items() if name in run}

    def _joint(self, group: Group, trace: poutine.Trace, priors: Callable, here: dict[str, Any]) -> bool:
        """Whether an element's latents are placed together, with a full precision matrix.

        :param priors: the priors with some latents moved, as :meth:`_priors` has them; ``here`` those with none.
        """
        most = _MOST_CORRELATED if self.correlated is None else math.inf
        if self.correlated is False or not group.plates or not 1 < group.dim <= most:
            return False
        if len(group.sites) == 1 or not group.informed:
            return True
        latent = [name for name, site in trace.nodes.items() if _is_latent(site)]
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
                    f"AutoHierarchicalFlow: {argument} is a single encoder, but there are several groups of local "
                    f"latents: {local}. Pass a dict from group to encoder (and data= likewise)."
                )

    @torch.no_grad()
    def _module(
        self, group: Group, groups: dict[str, Group], trace: poutine.Trace, args: tuple, kwargs: dict, seed: int
    ) -> GroupFlow:
        start = torch.cat([group.flat_mean(site, trace) for site in group.sites.values()])
        log_scale = torch.full_like(start, math.log(self._init_scale))
        encoder = self._of_group(self.amortise, group)
        if not group.plates:
            return GroupFlow(self.global_flow(group.dim).to(start), start, log_scale, None, None, None)
        context_dim = sum(groups[parent].dim for parent in group.parents)
        every = bool(self.element_parameters or (self.element_parameters is None and encoder is None))
        shape = group.sizes if every else (1,)
        tril = start.new_zeros(*shape, group.dim * (group.dim - 1) // 2)
        start, log_scale = (t.expand(*shape, group.dim).clone() for t in (start, log_scale))
        found = self._first_pseudo_observations(group, groups, trace, args, kwargs, seed, every)
        if found is not None:
            start, log_scale, tril = found
        if not every:
            start, log_scale, tril = (t.mean(tuple(range(t.dim() - 1))) for t in (start, log_scale, tril))
        head = None
        if encoder is not None:
            indices = {name: trace.nodes[name]["value"] for name in group.plates}
            encoding = self._encode(group, encoder, indices, args, kwargs)
            context_dim += encoding.shape[-1]
            # small, not zero: many encoders give zeros at the start, and a product of zeros has no gradient
            limit = 0.1 / math.sqrt(encoding.shape[-1])
            rows = 2 * group.dim + (tril.shape[-1] if group.joint else 0)
            head = start.new_empty(rows, encoding.shape[-1]).uniform_(-limit, limit)
        flow = self.local_flow(group.dim, context_dim=context_dim).to(start)
        return GroupFlow(flow, start, log_scale, tril if group.joint else None, encoder, head)

    def _first_pseudo_observations(
        self,
        group: Group,
        groups: dict[str, Group],
        trace: poutine.Trace,
        args: tuple,
        kwargs: dict,
        seed: int,
        every: bool,
    ) -> tuple[Tensor, ...] | None:
        """Location, log-scale and what stands below the diagonal, ``(*sizes, ...)``, by the likelihood at the start.

        A step of Newton's for the elements of a subsample at once: its Hessian takes as many products as an element has
        latents. Those in none of the subsamples begin at the mean of the others.

        :param every: whether all elements are wanted, in as many subsamples as it takes.
        """
        nodes = trace.nodes
        inner = any(group.label in other.parents for other in groups.values())
        if inner or any(_is_latent(site) and site["fn"].support.is_discrete for site in nodes.values()):
            return None
        here = {name: torch.as_tensor(nodes[name]["value"]) for name in group.plates}
        present = tuple(len(index) for index in here.values())
        weight = math.prod(size / n for size, n in zip(group.sizes, present, strict=True))
        means = [group.flat_mean(site, trace) for site in group.sites.values()]
        start = torch.cat(means).expand(*group.batch_shape(here), group.dim).clone()

        def of(indices: dict[str, Tensor]) -> tuple[Tensor, ...]:
            x = start.clone().requires_grad_()
            with torch.enable_grad():
                parts = group.split(x)
                values = {name: biject_to(nodes[name]["fn"].support)(u) for name, u in parts.items()}

                def value(site: dict) -> Tensor:
                    return values.get(site["name"], nodes[site["name"]]["value"])

                run = self._run_model(seed, args, kwargs, value, indices, grad=True)
                run.compute_log_prob(lambda name, site: name not in group.informed)
                total = 0 * x.square().sum()  # there may be nothing that depends on them
                for name, site in run.nodes.items():
                    if site["type"] != "sample" or name in group.informed:
                        continue
                    total = total + site["log_prob_sum"]
                    if name in parts:
                        bijection = biject_to(site["fn"].support)
                        total = total + weight * bijection.log_abs_det_jacobian(parts[name], site["value"]).sum()
                (gradient,) = torch.autograd.grad(total / weight, x, create_graph=True)
                sums = [gradient[..., j].sum() for j in range(group.dim)]
                rows = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in sums]
            gradient = gradient.detach()
            _, prior = group.prior({name: run.nodes[name]["fn"] for name in group.sites}, start)
            found = _pseudo_observations(start, gradient, -torch.stack(rows, -2), prior.detach(), group.joint)
            usual = start, torch.full_like(start, math.log(self._init_scale)), torch.zeros_like(found[2])
            finite = torch.cat(found, -1).isfinite().all(-1, keepdim=True)
            pairs = zip(found, usual, strict=True)
            return tuple(torch.where(finite, t, other).reshape(*present, t.shape[-1]) for t, other in pairs)

        try:
            found = of(here)
        except RuntimeError:  # an operation without a second derivative
            return None
        tables = tuple(t.mean(tuple(range(len(present)))).expand(*group.sizes, -1).clone() for t in found)
        each = [(here, found)]
        if every and self._indices_are_drawn(here, group.sizes, args, kwargs, seed):
            every_one = subsamples(here, group.sizes)
            each = [(indices, of(indices)) for indices in tqdm(every_one, desc="AutoHierarchicalFlow: start", delay=5)]
        for indices, found in each:
            for table, values in zip(tables, found, strict=True):
                table[torch.meshgrid(*indices.values(), indexing="ij")] = values
        return tables

    def _indices_are_drawn(
        self, here: dict[str, Tensor], sizes: tuple[int, ...], args: tuple, kwargs: dict, seed: int
    ) -> bool:
        """Whether there are subsamples, and other seeds give others, so that the model looks up their data itself."""
        if all(len(index) == size for index, size in zip(here.values(), sizes, strict=True)):
            return False
        for n in range(1, 5):
            again = self._run_model(seed + n, args, kwargs, self._initial_value).nodes
            if all(
                len(index) == size or not torch.equal(index, torch.as_tensor(again[name]["value"]))
                for (name, index), size in zip(here.items(), sizes, strict=True)
            ):
                return True
        return False

    @staticmethod
    def _of_group(given: Any, group: Group) -> Any:
        return given.get(group.label) if isinstance(given, Mapping) else given

    def _encode(self, group: Group, encoder: Callable, indices: dict[str, Tensor], args: tuple, kwargs: dict) -> Tensor:
        """Encodings ``(*batch, c)`` of the present elements, in the plates' dimensions."""
        function = self._of_group(self.data, group)
        if function is None and not args:
            raise ValueError(
                "AutoHierarchicalFlow: the model has no positional argument which the encoder's data could be. "
                "Pass data=, a function of the model's arguments."
            )
        data = torch.as_tensor(args[0] if function is None else function(*args, **kwargs))
        present = tuple(len(indices[name]) for name in group.plates)
        depth = len(present)
        if data.dim() <= depth or tuple(data.shape[:depth]) not in (present, group.sizes):
            raise ValueError(
                f"AutoHierarchicalFlow: data for {group.label!r} has shape {tuple(data.shape)}, but expected "
                f"{(*present, 'features')} or, for all elements, {(*group.sizes, 'features')}. Pass data= a function "
                "of the model's arguments that returns one of them."
            )
        if tuple(data.shape[:depth]) != present:
            data = data[torch.meshgrid(*(indices[name] for name in group.plates), indexing="ij")]
        encoding = encoder(data)
        if tuple(encoding.shape[:-1]) != present:
            raise ValueError(
                f"AutoHierarchicalFlow: the encoder of {group.label!r} returned shape {tuple(encoding.shape)} for data "
                f"of shape {tuple(data.shape)}, but expected {(*present, 'c')}. amortise= takes a batch of elements to "
                "one vector for each."
            )
        return encoding.reshape((*group.batch_shape(indices), encoding.shape[-1]))

    # -- the guide -------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the latents present in this call, by site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        modules = self._modules["group_flows"]
        if not pyro.settings.get("module_local_params"):
            AutoFlow._register(self, "group_flows", modules)  # type: ignore[arg-type]
        run = _GuideRun(self, modules, args, kwargs)  # type: ignore[arg-type]
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

    @torch.no_grad()
    def sample_posterior(self, *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the latents, ``(*sample_shape, *site_shape)``: all elements where the model's plates are full.

        They are made at once, in a plate of draws around the model: its statements up to the last latent must
        broadcast, as for ``Trace_ELBO(vectorize_particles=True)``.

        :param args: the model's arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if not sample_shape:
            with poutine.block():
                return self(*args, **kwargs)
        nesting = max(-dim for group in self.groups.values() for dim in group.plates.values())
        with poutine.block(), pyro.plate("_draws", math.prod(sample_shape), dim=-1 - nesting):
            draws = self(*args, **kwargs)
        depths = {name: site.dim for group in self.groups.values() for name, site in group.sites.items()}
        result = {}
        for name, value in draws.items():
            inner = value.shape[value.dim() - depths[name] :]
            result[name] = value.reshape(*sample_shape, *inner)
        return result

    def quantiles(self, quantiles: Any, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent site, from draws.

        :returns: dict of tensors ``(len(quantiles), *site_shape)``, or ``site_shape`` for a single number.
        """
        draws = self.sample_posterior(*args, sample_shape=(num_samples,), **kwargs)
        return {
            name: torch.quantile(x, torch.as_tensor(quantiles, dtype=x.dtype, device=x.device), dim=0)
            for name, x in draws.items()
        }

    def median(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each latent site, from draws."""
        return self.quantiles(0.5, *args, num_samples=num_samples, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # unlike the base class's, leaves this guide as it is; the copied parameters are free of Pyro's weak references
        trace = None if self.prototype_trace is None else poutine.Trace()
        return {**self.__dict__, "master": None, "prototype_trace": trace, "_modules": copy.deepcopy(self._modules)}


class GroupFlow(nn.Module):
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

    def __init__(
        self,
        flow: TransformModule,
        loc: Tensor,
        log_scale: Tensor,
        tril: Tensor | None,
        encoder: Callable | None,
        head: Tensor | None,
    ):
        super().__init__()
        self.flow, self.encoder = flow, encoder
        self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(log_scale)
        self.tril = None if tril is None else nn.Parameter(tril)
        self.head = None if head is None else nn.Parameter(head)


@dataclasses.dataclass
class Site:
    """A latent site: the shape of one element's unconstrained value, and the number of axes of the site's."""

    name: str
    event: tuple[int, ...]
    dim: int

    @property
    def size(self) -> int:
        return math.prod(self.event)


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
        return "_".join(self.plates).replace(".", "_") or "global"  # a module's name has no dots

    @property
    def dim(self) -> int:
        return sum(site.size for site in self.sites.values())

    def batch_shape(self, indices: dict[str, Tensor]) -> tuple[int, ...]:
        shape = [1] * max((-dim for dim in self.plates.values()), default=0)
        for name, dim in self.plates.items():
            shape[dim] = len(indices[name])
        return tuple(shape)

    def flat_mean(self, site: Site, trace: poutine.Trace) -> Tensor:
        """The first unconstrained value of a site as ``(size,)``, the mean over elements."""
        node = trace.nodes[site.name]
        u = biject_to(node["fn"].support).inv(node["value"])
        return u.reshape(-1, site.size).mean(0)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Vectors ``(*batch, dim)`` as unconstrained values of the sites, ``(*batch, *event)``."""
        return {name: part.reshape((*x.shape[:-1], *self.sites[name].event)) for name, part in self.pieces(x).items()}

    def pieces(self, x: Tensor) -> dict[str, Tensor]:
        """Vectors ``(*batch, dim)`` as those of the sites, ``(*batch, size)``."""
        return dict(zip(self.sites, x.split([site.size for site in self.sites.values()], -1), strict=True))

    def prior(self, priors: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """Location ``(*batch, dim)`` and precision ``(*batch, dim, dim)`` of the priors; zeros for those not used."""
        batch, end = like.shape[:-1], 0
        locs, precision = [], like.new_zeros(*like.shape, self.dim)
        for name, part in self.split(like).items():
            start, end = end, end + self.sites[name].size
            if name not in self.informed:
                locs.append(like.new_zeros(*batch, end - start))
                continue
            loc, scale = (t.reshape(*batch, end - start) for t in location_and_scale(priors[name], part))  # type: ignore[union-attr]
            block, fn = scale.square().reciprocal().diag_embed(), unwrapped(priors[name])
            if isinstance(fn, torch.distributions.MultivariateNormal) and part.shape[-1:] == (end - start,):
                block = fn.precision_matrix.expand(*part.shape, end - start).reshape(block.shape)
            locs.append(loc)
            precision[..., start:end, start:end] = block
        return torch.cat(locs, -1), precision


class _Subsamples(Messenger):
    """Gives plates the indices of their subsamples."""

    def __init__(self, indices: dict[str, Tensor]):
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


class _Done(Exception):
    """Every latent is drawn: what the model does from here on, its likelihood, is not needed."""


class _GuideRun(Messenger):
    """Runs the model with the guide's draws at its latent sites; its plates, masks and scales stay in force."""

    def __init__(self, guide: AutoHierarchicalFlow, modules: nn.ModuleDict, args: tuple, kwargs: dict):
        super().__init__()
        self.guide, self.modules, self.call = guide, modules, (args, kwargs)
        self.group_of = {name: group for group in guide.groups.values() for name in group.sites}
        self.noise_sites = {f"_{guide._pyro_name}_{label}_noise": label for label in guide.groups}
        self.indices: dict[str, Tensor] = {}
        self.noise: dict[str, Tensor] = {}  # what the flows give, by group: the contexts of others
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # y, loc and log-scale of every site of a group drawn
        self.log_q: dict[str, Tensor] = {}  # of a group's flow, which its last site takes
        self.encodings: dict[str, Tensor] = {}
        self.standard: dict[str, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.late: set[str] = set()  # sites of a group drawn whose own messages are still to come
        self.drawn: dict[str, tuple[Tensor, Any]] = {}  # value and distribution of the sites
        self.placed: dict[str, tuple[Tensor, Tensor]] = {}  # unconstrained value and log-scale of sites placed together
        self.ahead: Group | None = None  # whose priors this run of the model is to find
        self.priors: dict[str, Any] = {}
        if "global" in guide.groups:
            self._draw(guide.groups["global"])

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.noise_sites:
            return
        if site_is_subsample(msg):
            msg["stop"] = msg["stop"] or self.ahead is not None
            if name in self.indices:  # of the run ahead
                msg["value"], msg["done"] = self.indices[name], True
            return
        if name not in self.group_of or msg["is_observed"]:
            msg["stop"] = True  # observed, or left to the model
            if msg["value"] is None:
                if not msg["fn"].support.is_discrete:
                    raise ValueError(
                        f"AutoHierarchicalFlow: latent site {name!r} was not there when the guide was set up. "
                        "The guide needs a model of fixed structure."
                    )
                msg["value"], msg["done"] = first_value(msg), True
            return
        msg["done"] = True
        group, ahead = self.group_of[name], self.ahead
        if ahead is not None:
            msg["stop"] = True
            if name not in self.drawn and (group is ahead or not self.priors.keys().isdisjoint(ahead.sites)):
                bijection = biject_to(msg["fn"].support)  # a stand-in, on which none of these priors depend
                loc: Tensor = self.modules[group.label].loc  # type: ignore[assignment]
                msg["value"] = bijection(loc.new_zeros(bijection.inverse_shape(msg["fn"].shape())))
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

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._check_plate(msg["name"], msg["fn"].size)
            indices = torch.as_tensor(msg["value"])
            if not torch.equal(indices, self.indices.setdefault(msg["name"], indices)):
                raise ValueError(
                    f"AutoHierarchicalFlow: the subsample of plate {msg['name']!r} is given by a handler around the "
                    "guide, which its run ahead for the priors does not see. Give it to pyro.plate(subsample=), or set "
                    "correlated=False."
                )
        elif self.priors.keys() >= self.ahead.sites.keys() if self.ahead else len(self.values) == len(self.group_of):
            raise _Done

    def _check_plate(self, name: str, size: int) -> None:
        for group in self.guide.groups.values():
            if name not in group.plates or self.modules[group.label].loc.dim() == 1:  # type: ignore[operator]
                continue
            expected = group.sizes[list(group.plates).index(name)]
            if size != expected:
                raise ValueError(
                    f"AutoHierarchicalFlow: plate {name!r} has size {size}, but it had {expected} when the guide was "
                    "set up, and its elements have parameters of their own. Keep the size (subsample_size= may "
                    "change), make a new guide, or use amortise=."
                )

    def _draw(self, group: Group) -> None:
        """Draws the joint vectors of a group, and their log-density."""
        module: GroupFlow = self.modules[group.label]  # type: ignore[assignment]
        loc: Tensor = module.loc
        log_scale: Tensor = module.log_scale
        tril: Tensor | None = module.tril
        base = standard_base(group.dim, like=loc.detach())
        # the noise's own density is part of that of the flow: the site only makes it follow plates of particles
        name = f"_{self.guide._pyro_name}_{group.label}_noise"
        x = pyro.sample(name, base.mask(False), infer={"is_auxiliary": True})
        contexts = [self.noise[parent] for parent in group.parents]
        if loc.dim() > 1:
            index = tuple(self.indices[name].reshape([-1] + [1] * (-dim - 1)) for name, dim in group.plates.items())
            loc, log_scale, tril = loc[index], log_scale[index], None if tril is None else tril[index]
        if module.encoder is not None:
            encoding = self.guide._encode(group, module.encoder, self.indices, *self.call)
            self.encodings[group.label] = encoding
            contexts.append(encoding)
            assert module.head is not None
            sizes = [group.dim, group.dim, len(module.head) - 2 * group.dim]
            shift, log_factor, skew = (encoding @ module.head.T).split(sizes, -1)
            loc, log_scale, tril = loc + shift, log_scale + log_factor, None if tril is None else tril + skew
        y, log_det = module.flow.forward_and_log_det(x, _joined(contexts, x.shape[:-1]))
        self.noise[group.label], self.log_q[group.label] = y, base.log_prob(x) - log_det
        self.late.update(group.sites)
        if tril is not None:
            self._place(group, y, loc, log_scale, tril)
            return
        ys, locs, log_scales = (group.split(t) for t in (y, loc, log_scale))
        for name in group.sites:
            self.parts[name] = ys[name], locs[name], log_scales[name]
            if self.guide.path_gradient and name not in group.informed:
                u = locs[name] + log_scales[name].exp() * ys[name]
                self._standardise(group, name, u, locs[name], log_scales[name])

    def _place(self, group: Group, y: Tensor, loc: Tensor, log_scale: Tensor, tril: Tensor) -> None:
        """Puts the latents of a group's elements where their priors and pseudo-observations together have them."""
        prior = group.prior(self.priors, y)
        centre, factor = _posterior(loc, log_scale, tril, *prior)
        u = centre + torch.linalg.solve_triangular(factor.mT, y[..., None], upper=True)[..., 0]
        us, log_ss = group.split(u), group.split(-factor.diagonal(0, -2, -1).log())
        self.placed.update((name, (us[name], log_ss[name])) for name in group.sites)
        if self.guide.path_gradient:
            centre, factor = _posterior(loc, log_scale, tril, *(t.detach() for t in prior))
            y = (factor.mT @ (u.detach() - centre)[..., None])[..., 0]
            ys, log_ss = group.pieces(y), group.pieces(-factor.diagonal(0, -2, -1).log())
            self.standard.update((name, (ys[name], log_ss[name])) for name in group.sites)

    def _site(self, group: Group, name: str, fn: Any) -> tuple[Tensor, Any]:
        """Value of a site, and its distribution in the guide: a point that carries the log-density."""
        u, log_s = self.placed[name] if group.joint else self._alone(group, name, fn)
        self.late.remove(name)
        bijection = biject_to(fn.support)
        value = bijection(u)
        log_det = bijection.log_abs_det_jacobian(u, value)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + fn.event_dim)
        log_q = -log_det - sum_rightmost(log_s, len(group.sites[name].event))
        if self.late.isdisjoint(group.sites):  # the last site takes the flow's part
            log_q = log_q + self.log_q[group.label]
            if self.guide.path_gradient:
                log_q = log_q - self._score(group)
        delta = dist.Delta(value, log_q, event_dim=fn.event_dim)
        mask = mask_of(fn)
        return value, delta if mask is None else delta.mask(mask)

    def _alone(self, group: Group, name: str, fn: Any) -> tuple[Tensor, Tensor]:
        """Unconstrained value of a site by its own prior and pseudo-observation, and its log-scale."""
        y, loc, log_scale = self.parts[name]
        if name not in group.informed:
            return loc + log_scale.exp() * y, log_scale.expand(y.shape)
        prior_loc, prior_scale = location_and_scale(fn, y)  # type: ignore[misc]
        centre, log_s = _with_prior(loc, log_scale, prior_loc, prior_scale)
        u = centre + log_s.exp() * y
        if self.guide.path_gradient:
            fixed = _with_prior(loc, log_scale, prior_loc.detach(), prior_scale.detach())
            self._standardise(group, name, u, *fixed)
        return u, log_s

    # -- the path gradient: the log-density's gradient by the parameters, at fixed values, is taken off ------------
    def _standardise(self, group: Group, name: str, u: Tensor, centre: Tensor, log_s: Tensor) -> None:
        """What the flow would have to give for ``u``, held fixed; and the log-scales; both ``(*batch, size)``."""
        y, size = (u.detach() - centre) * (-log_s).exp(), group.sites[name].size
        batch = self.noise[group.label].shape[:-1]
        self.standard[name] = y.reshape(*batch, size), log_s.expand(y.shape).reshape(*batch, size)

    def _score(self, group: Group) -> Tensor:
        """Zeros ``(*batch)`` with the gradient of the group's log-density by the parameters, the values held fixed."""
        module: GroupFlow = self.modules[group.label]  # type: ignore[assignment]
        contexts = [self._standard_of(self.guide.groups[parent], group) for parent in group.parents]
        if group.label in self.encodings:
            contexts.append(self.encodings[group.label])
        y = self._standard_of(group, group)
        x, log_det = module.flow.inverse_and_log_det(y, _joined(contexts, y.shape[:-1]))
        log_scales = torch.cat([self.standard[name][1] for name in group.sites], -1)
        log_q = standard_base(group.dim, like=y.detach()).log_prob(x) + log_det - log_scales.sum(-1)
        return log_q - log_q.detach()

    def _standard_of(self, group: Group, inner: Group) -> Tensor:
        late = [name for name in group.sites if name not in self.standard]
        if late:
            raise ValueError(
                f"AutoHierarchicalFlow: path_gradient=True needs the latents of {group.label!r} before those of "
                f"{inner.label!r}, but site(s) {late} come later. Move them up in the model, or set it to False."
            )
        return torch.cat([self.standard[name][0] for name in group.sites], -1)


def _joined(contexts: list[Tensor], batch: torch.Size) -> Tensor | None:
    """One context ``(*batch, c)``, or none."""
    if not contexts:
        return None
    return torch.cat([c.expand(*batch, c.shape[-1]) for c in contexts], -1)


def _with_prior(loc: Tensor, log_scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and log-scale of a latent with its prior and pseudo-observation."""
    log_s = -0.5 * torch.logaddexp(-2 * log_scale, -2 * prior_scale.log())
    return prior_loc + (2 * (log_s - log_scale)).exp() * (loc - prior_loc), log_s


def _posterior(
    loc: Tensor, log_scale: Tensor, tril: Tensor, prior_loc: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Centre of an element's latents and the lower Cholesky factor of their precision matrix."""
    dim = loc.shape[-1]
    rows, columns = torch.tril_indices(dim, dim, -1, device=tril.device)
    factor = torch.eye(dim, dtype=tril.dtype, device=tril.device).repeat(*tril.shape[:-1], 1, 1)
    factor[..., rows, columns] = tril
    factor = (-log_scale).exp()[..., None] * factor
    observed = factor.mT @ factor
    cholesky, failed = torch.linalg.cholesky_ex(precision + observed)
    cholesky = torch.where((failed > 0)[..., None, None], math.nan, cholesky)  # as where a log-density is not finite
    pull = torch.cholesky_solve(observed @ (loc - prior_loc)[..., None], cholesky)
    return prior_loc + pull[..., 0], cholesky


def _pseudo_observations(
    x: Tensor, gradient: Tensor, curvature: Tensor, prior: Tensor, joint: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Location, log-scale and what stands below the diagonal where ``x`` has a likelihood's gradient and curvature.

    Where it is flat or convex, a hundredth of the prior's precision.
    """
    if not joint:
        curvature = curvature.diagonal(0, -2, -1).diag_embed()
    curvature = curvature.nan_to_num()
    values, vectors = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    least = 1e-2 * prior.diagonal(0, -2, -1).mean(-1) + 1e-3 * values.abs().amax(-1) + 1e-6
    values = torch.maximum(values, least[..., None])
    far = 10 / values.sqrt()  # no further, in standard deviations
    step = ((vectors.mT @ gradient[..., None])[..., 0] / values).clamp(-far, far)
    loc = x + (vectors @ step[..., None])[..., 0]
    precision = (vectors * values[..., None, :]) @ vectors.mT
    factor = torch.linalg.cholesky_ex(precision.flip(-2, -1))[0].flip(-2, -1).mT  # lower, W^T W
    diagonal = factor.diagonal(0, -2, -1)
    rows, columns = torch.tril_indices(x.shape[-1], x.shape[-1], -1, device=x.device)
    return loc, -diagonal.log(), (factor / diagonal[..., None])[..., rows, columns]


def subsamples(here: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Indices that together hold all elements of the plates, as many at a time as in ``here``."""
    each = []
    for index, size in zip(here.values(), sizes, strict=True):
        starts = [min(start, size - len(index)) for start in range(0, size, len(index))]
        each.append([torch.arange(start, start + len(index), device=index.device) for start in starts])
    return [dict(zip(here, some, strict=True)) for some in itertools.product(*each)]


def _differ(some: dict[str, Any], others: dict[str, Any], name: str, missing: bool = False) -> bool:
    """Whether a site's prior is another one; ``missing`` where one is none, or not of location-scale form."""
    one, other = some.get(name), others.get(name)
    if one is None or other is None:
        return missing
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- reading a model -----------------------------------------------------------------------------------------------
def _is_latent(site: dict) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary", False)
    )


def first_value(site: Any, last: bool = False) -> Tensor:
    """The first (or last) value of a discrete site's support."""
    fn = site["fn"]
    return fn.enumerate_support(expand=False)[-1 if last else 0].expand(fn.shape())


def location_and_scale(fn: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Location and scale of an unconstrained value; ``None`` unless the distribution is of that form."""
    fn = unwrapped(fn)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        loc, scale = fn.loc, fn.scale_tril.square().sum(-1).sqrt()
    elif isinstance(fn, LOCATION_SCALE):
        loc, scale = fn.loc, fn.scale
    else:
        return None
    shape = torch.broadcast_shapes(loc.shape, like.shape)
    return loc.expand(shape), scale.expand(shape)


def mask_of(fn: Any) -> Any:
    """The mask that a distribution itself carries; that of handlers stands at the site."""
    mask = None
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return mask


def _frames(site: dict) -> list:
    """The plates of a site, outermost first, without those that are iterated."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda frame: frame.dim)


def _groups(trace: poutine.Trace) -> dict[str, Group]:
    """The groups of latents by their labels, in the order of the model."""
    groups: dict[str, Group] = {}
    for name, site in trace.nodes.items():
        if not _is_latent(site) or site["fn"].support.is_discrete:
            continue
        frames = _frames(site)
        group = Group({f.name: f.dim for f in frames}, tuple(f.full_size or f.size for f in frames))
        known = groups.setdefault(group.label, group)
        if known.plates != group.plates:
            raise ValueError(
                f"AutoHierarchicalFlow: the plates {list(known.plates)} and {list(group.plates)} make one name, "
                f"{group.label!r}. Rename one of them."
            )
        group = known
        batch = site["fn"].batch_shape
        outside = [size for dim, size in enumerate(batch, -len(batch)) if size > 1 and dim not in group.plates.values()]
        if outside:
            raise ValueError(
                f"AutoHierarchicalFlow: site {name!r} has batch shape {tuple(batch)}, of which plates explain only the "
                f"dimension(s) {list(group.plates.values())}. Put the rest into a plate, or declare it by .to_event()."
            )
        shape = biject_to(site["fn"].support).inv(site["value"]).shape
        group.sites[name] = Site(name, tuple(shape[len(batch) :]), site["value"].dim())
    order = sorted(groups, key=lambda label: label != "global")
    groups = {label: groups[label] for label in order}
    for n, label in enumerate(order):
        group = groups[label]
        group.parents = tuple(other for other in order[:n] if set(groups[other].plates) < set(group.plates))
    return groups


def _check_trace(trace: poutine.Trace) -> None:
    latent = {name: site for name, site in trace.nodes.items() if _is_latent(site)}
    discrete = [
        name for name, site in latent.items() if site["fn"].support.is_discrete and not site["infer"].get("enumerate")
    ]
    if discrete:
        raise ValueError(
            f"AutoHierarchicalFlow: site(s) {discrete} are discrete and not enumerated, but a flow is a density of "
            "continuous variables. Wrap the model in pyro.infer.config_enumerate and train with TraceEnum_ELBO, or sum "
            "them out of the model (as a mixture)."
        )
    continuous = {name: site for name, site in latent.items() if not site["fn"].support.is_discrete}
    if not continuous:
        raise ValueError("AutoHierarchicalFlow: the model has no continuous latent sites: there is nothing to infer.")
    if not any(_frames(site) for site in continuous.values()):
        raise ValueError(
            "AutoHierarchicalFlow: no latent of the model lies in a plate, so there are no local latents. Use "
            "AutoFlow, or put the latents that belong to elements into pyro.plate (as a context)."
        )
    for name, site in continuous.items():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"AutoHierarchicalFlow: site {name!r} lies in plate {frame.name!r}, which is iterated and "
                    "subsampled. Enter it as a context, 'with pyro.plate(...)'."
                )
    check_finite(trace, "AutoHierarchicalFlow")


def _check_arguments(global_flow: Any, local_flow: Any, amortise: Any, data: Any, init_scale: Any) -> None:
    for argument, flow in (("global_flow", global_flow), ("local_flow", local_flow)):
        if not callable(flow) or isinstance(flow, TransformModule):
            raise TypeError(
                f"AutoHierarchicalFlow: {argument} must be a factory 'dim -> TransformModule', but got "
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
