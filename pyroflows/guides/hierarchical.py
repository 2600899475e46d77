"""A guide that follows the plates of a model: a flow of the global latents, conditional flows of the local ones."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from tqdm import tqdm

from pyroflows import flows
from pyroflows.guides.auto_flow import AutoFlow, check_flow
from pyroflows.guides.guide_run import Done, GroupFlow, GuideRun, Subsamples, pseudo_observations
from pyroflows.guides.plates import (
    Group,
    check_trace,
    differ,
    first_value,
    groups_of,
    is_latent,
    location_and_scale,
    subsamples,
)
from pyroflows.log_density import start_of
from pyroflows.supports import Supported
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
        check_trace(trace)
        groups = groups_of(trace)
        self._check_keys(groups)
        priors = partial(self._priors, seed, args, kwargs, trace)
        here = priors(set()) if self.noncentered else {}
        there, after = (priors(set(trace.nodes)), priors(set(), last=True)) if self.noncentered else ({}, {})
        # of location-scale form, and depending on other continuous latents, and on no discrete
        informed = {x for x in here if differ(here, there, x) and not differ(here, after, x, missing=True)}
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
            with Subsamples(indices or {}):
                return poutine.trace(InitMessenger(value)(Supported()(self.model))).get_trace(*args, **kwargs)

    def _initial_value(self, site: dict) -> Tensor:
        return first_value(site) if site["fn"].support.is_discrete else start_of(self.init_loc_fn, site)

    def _priors(
        self, seed: int, args: tuple, kwargs: dict, trace: poutine.Trace, moved: set[str], last: bool = False
    ) -> dict[str, tuple[Tensor, Tensor] | None]:
        """Locations and scales of the sites' priors where the latents ``moved`` are not as in ``trace``.

        :param last: whether the discrete latents have the last of their values, not the first.
        """
        generator, values = torch.Generator().manual_seed(0), {}
        for name, site in trace.nodes.items():
            if is_latent(site) and not site["fn"].support.is_discrete:
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
        latent = [name for name, site in trace.nodes.items() if is_latent(site)]
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
        if inner or any(is_latent(site) and site["fn"].support.is_discrete for site in nodes.values()):
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
            found = pseudo_observations(start, gradient, -torch.stack(rows, -2), prior.detach(), group.joint)
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
        run = GuideRun(self, modules, args, kwargs)  # type: ignore[arg-type]
        for group in self.groups.values():
            if group.joint and group.informed and len(group.sites) > 1:
                run.ahead = group
                with contextlib.suppress(Done), run:
                    Supported()(self.model)(*args, **kwargs)
        run.ahead = None
        with contextlib.suppress(Done), run:
            Supported()(self.model)(*args, **kwargs)
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
        return self._draws(args, kwargs, sample_shape)[0]

    @torch.no_grad()
    def _draws(
        self, args: tuple, kwargs: dict[str, Any], sample_shape: tuple[int, ...]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Draws, and the plates that are subsampled at random."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        if not sample_shape:
            with poutine.block():
                return self(*args, **kwargs), []
        nesting = max(-dim for group in self.groups.values() for dim in group.plates.values())
        with poutine.block(), pyro.plate("_draws", math.prod(sample_shape), dim=-1 - nesting), poutine.trace() as trace:
            draws = self(*args, **kwargs)
        plates = {name: site["fn"] for name, site in trace.trace.nodes.items() if site_is_subsample(site)}
        random = [name for name, fn in plates.items() if fn.subsample_size not in (None, fn.size)]
        depths = {name: site.dim for group in self.groups.values() for name, site in group.sites.items()}
        result = {}
        for name, value in draws.items():
            inner = value.shape[value.dim() - depths[name] :]
            result[name] = value.reshape(*sample_shape, *inner)
        return result, random

    def quantiles(self, quantiles: Any, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent site, from draws.

        :param args: as for :meth:`sample_posterior`.
        :returns: dict of tensors ``(len(quantiles), *site_shape)``, or ``site_shape`` for a single number.
        :raises ValueError: where plates of the model are subsampled at random.
        """
        draws, random = self._draws(args, kwargs, (num_samples,))
        if random:
            raise ValueError(
                f"AutoHierarchicalFlow: plate(s) {random} are subsampled at random, so that nobody knows of which "
                "elements these draws would be. Pass the full data, without a subsample."
            )
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
