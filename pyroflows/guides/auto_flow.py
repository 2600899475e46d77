"""A normalizing flow over all latents of a model jointly, as an automatic guide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.utils.weak import WeakTensorKeyDictionary

from pyroflows import flows, serialization
from pyroflows.centering import COORDINATES, Centering
from pyroflows.distributions import Base, FlowDistribution, standard_base
from pyroflows.encoders import StandardizedEncoder
from pyroflows.log_density import LogDensity, NotRaising, check_finite, check_latents, prototype_trace, start_of
from pyroflows.noncentering import Noncentering, noncentering_of
from pyroflows.prior_predictive import PriorPredictive, Simulations, batched
from pyroflows.supports import Supported
from pyroflows.transform_module import Compose, TransformModule
from pyroflows.transforms import Elementwise, ElementwiseAffine, TriangularAffine
from pyroflows.univariate import Affine

_MAX_LOG_SCALE = 12.0  # of an amortised guide: posteriors may be so much narrower than the first scale, or wider
_NUM_PILOTS = 500  # simulations by which an encoder's data are standardised
_NUM_TRIALS = 100  # of a start, as NumPyro takes
_REGISTERED = WeakTensorKeyDictionary()  # the parameters that a guide of this process has put into the param store


class AutoFlow(AutoContinuous):
    """Guide ``z ~ N(0, I) -> flow -> location and scale -> latents``, with an exact density.

    A drop-in ``AutoContinuous``: it works in Pyro's ``SVI``, ``Predictive``, ``NeuTraReparam``, with any support that
    ``biject_to`` knows, and from one latent dimension on. The flow starts at the identity, so the guide starts as the
    normal of ``init_loc_fn`` and ``init_scale``. Dtype and device are those of the model's latents.

    Every guide owns its parameters. In the param store they stand under the guide's name; a guide made later under the
    same name takes that place with parameters of its own, and parameters read by ``ParamStoreDict.load`` are taken over
    by the guide that is called next.

    :param model: Pyro model with continuous latents.
    :param flow: factory ``flow(dim) -> TransformModule``, such as ``flows.nsf`` or
        ``functools.partial(flows.nsf, num_layers=4)``. The default stands the noise of the plain ELBO of a single draw,
        where ``flows.realnvp`` may run off to NaN.
    :param init_loc_fn: Pyro's initialisation strategy, which gives the first location.
    :param init_scale: first scale on the unconstrained space: a positive number, a vector ``(latent_dim,)``, or a lower
        Cholesky factor ``(latent_dim, latent_dim)`` (then the scale map is of full rank).
    :param base_df: degrees of freedom of a Student-t base, for heavier tails; ``None`` for a normal base.
    :param base: factory ``base(dim) -> Base`` of a base that is learned along with the flow, such as
        ``functools.partial(distributions.MixtureBase, num_components=4)`` for several modes; in place of ``base_df``.
    :param full_rank: puts a trainable full-rank affine map between the flow and the location and scale.
    :param noncentered: puts a :class:`Noncentering` layer last, where the model has latents whose prior depends on
        other latents, or is a Laplace. The location and scale are then those of the non-centred vector.
    :param encoder: network that makes one guide of all data sets of a model (amortisation): it takes data sets
        ``(batch, *shape)`` to contexts ``(batch, c)``, such as :class:`encoders.MLPEncoder` or
        :class:`encoders.SetEncoder`. ``flow`` is then called with ``context_dim=c``, and a location and scale that
        depend on the context follow it. Trained along with the flow, in place, if it is a module; any other function,
        such as of summary statistics, stays as it is. What it sees is standardised
        (:class:`encoders.StandardizedEncoder`) by data simulated from the model, where they can be, and else by those
        of the first call; these statistics are buffers of the guide.
    :param data: function of the model's arguments that gives what the encoder sees of one data set: a tensor, or a
        tuple of tensors, which are the encoder's arguments (``lambda x, mask: (x, mask)``). The model's first argument
        unless given.
    :raises ValueError: at the first call, for a model with discrete latents, none, latents in a subsampled plate, or
        a log-density that is not finite at the start (naming the sites).
    """

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., TransformModule] = flows.iaf,
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float | Tensor = 0.1,
        base_df: float | None = None,
        base: Callable[..., Base] | None = None,
        full_rank: bool = False,
        noncentered: bool = False,
        encoder: Callable[..., Tensor] | None = None,
        data: Callable | None = None,
    ):
        check_flow(flow, "AutoFlow")
        check_guide_scale(init_scale, base_df)
        check_base(base, base_df, "AutoFlow")
        check_encoding(encoder, data, noncentered, "AutoFlow")
        super().__init__(Supported()(model), init_loc_fn=partial(start_of, init_loc_fn))
        self._raw_model, self._init_loc_fn = (model,), init_loc_fn
        self.flow, self._init_scale, self.base_df, self.full_rank = flow, init_scale, base_df, full_rank
        self.base, self.noncentered, self.data = base, noncentered, data
        self._encoder = (encoder,)  # a submodule of the standardised one
        self._prototype_call: tuple[tuple, dict[str, Any]] = (), {}
        self.transform: Compose | None = None
        self.learned_base: Base | None = None
        self.standardized_encoder: StandardizedEncoder | None = None
        self._num_pilots = _NUM_PILOTS
        self._owner = type(self).__name__  # whom its errors name

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._find_start(args, kwargs)
        loc = self._init_loc()
        if self.encoder is None:
            flow = self.flow(self.latent_dim)
            whole = [flow, TriangularAffine(self.latent_dim)] if self.full_rank else [flow]
        else:
            self._prototype_call = args, kwargs
            self.standardized_encoder = self._standardized(args, kwargs)
            with torch.no_grad():
                context_dim = self._encode(args, kwargs).shape[-1]
            whole = [conditional_flow(self.flow, self.latent_dim, context_dim, self.full_rank)]
        density = self._log_density(args, kwargs, mode="vmap")  # which makes no trial of modes
        layer = noncentering_of(density, self.prototype_trace, loc) if self.noncentered else None
        coordinates = Compose([] if layer is None else [layer])
        start = coordinates.inverse_and_log_det(loc)[0]
        self.transform = Compose([*whole, self._location_and_scale(start, self._init_scale), coordinates]).to(loc)
        if self.base is not None:
            self.learned_base = check_built_base(self.base(self.latent_dim), self._owner).to(loc)
        with pyro.poutine.block():
            self._create_plates(*args, **kwargs)  # which NeuTraReparam asks a guide for that FlowVI has trained

    def _find_start(self, args: tuple, kwargs: dict) -> None:
        """Sets up the prototype at the first values of ``init_loc_fn`` where the log-density is finite."""
        owner = self._owner
        with pyro.validation_enabled(False), NotRaising(), torch.no_grad():
            trace = prototype_trace(self._raw_model[0], args, kwargs, self._init_loc_fn)
            check_latents(trace, owner)
            self.model_params = list(trace.param_nodes)
            for _ in range(_NUM_TRIALS):
                super()._setup_prototype(*args, **kwargs)
                with pyro.poutine.block(), torch.random.fork_rng(devices=[]):
                    value = self._log_density(args, kwargs, mode="loop")(self._init_loc()[None])
                if value.isfinite():
                    return
            check_finite(prototype_trace(self._raw_model[0], args, kwargs, self._init_loc_fn), owner)
            raise ValueError(f"{owner}: no finite log-density in {_NUM_TRIALS} tries: give init_loc_fn= another.")

    def _location_and_scale(self, loc: Tensor, scale: float | Tensor) -> TransformModule:
        like = self._init_loc()
        loc, scale = (torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in (loc, scale))
        outer = TriangularAffine if scale.dim() == 2 else ElementwiseAffine
        return outer(self.latent_dim, loc, scale)

    @property
    def outer_layers(self) -> list[TransformModule]:
        """The location and scale, and the coordinates after them: the last layers, once set up."""
        transform = self._modules.get("transform")
        layers = [] if transform is None else list(transform.layers)  # type: ignore[arg-type]
        count = sum(isinstance(layer, COORDINATES) for layer in layers)
        return layers[-count - 1 :]

    @property
    def coordinates(self) -> Compose:
        """From the vector which the location and scale give to the latent one: centring and non-centring, if any."""
        return Compose(self.outer_layers[1:])

    @property
    def noncentering(self) -> Noncentering | None:
        """The last layer, where the guide is non-centred."""
        return next((layer for layer in self.outer_layers if isinstance(layer, Noncentering)), None)

    @property
    def centering(self) -> Centering | None:
        """The layer after the location and scale, where the guide is centred."""
        return next((layer for layer in self.outer_layers if isinstance(layer, Centering)), None)

    @property
    def encoder(self) -> Callable[..., Tensor] | None:
        """The encoder, where the guide is one of all data sets."""
        return self._encoder[0]

    @property
    def init_loc(self) -> Tensor:
        """The first location ``(latent_dim,)`` on the unconstrained space, by ``init_loc_fn``."""
        return self._init_loc()

    def start_at(self, loc: Tensor, scale: float | Tensor) -> None:
        """Moves the guide's first location and scale, given on the unconstrained space, before it is trained.

        :param loc: location ``(latent_dim,)``, for example that of a fitted ``AutoMultivariateNormal``. Of the
            non-centred vector, where the guide is ``noncentered``.
        :param scale: as ``init_scale``.
        """
        transform = self._modules.get("transform")
        if transform is None:
            raise RuntimeError("AutoFlow: start_at needs the model's structure: call the guide (or log_density) first.")
        check_guide_scale(scale, self.base_df)
        inner = transform.layers[: -len(self.outer_layers)]  # type: ignore[index]
        self.transform = Compose([*inner, self._location_and_scale(loc, scale), self.coordinates])

    def set_noncentering(self, noncentering: Noncentering | None) -> None:
        """Replaces the last layer of a ``noncentered`` guide, before it is trained; ``None`` takes it away."""
        if self._modules.get("transform") is None or not self.noncentered:
            raise RuntimeError("AutoFlow: set_noncentering needs a guide that is noncentered, and has been set up.")
        self._set_last(self.centering, noncentering)

    def set_centering(self, centering: Centering | None) -> None:
        """Puts a layer after the location and scale, before the guide is trained; ``None`` takes it away."""
        if self._modules.get("transform") is None:
            raise RuntimeError("AutoFlow: set_centering needs the model's structure: call the guide first.")
        self._set_last(centering, self.noncentering)

    def _set_last(self, *layers: TransformModule | None) -> None:
        """The layers after the location and scale."""
        transform: Any = self._modules["transform"]
        place = len(transform.layers) - len(self.outer_layers) + 1
        self.transform = Compose([*transform.layers[:place], *(layer for layer in layers if layer is not None)])

    def log_density(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The model's log-density over the guide's latent vector, given the model's arguments."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self._log_density(args, kwargs)

    def _log_density(self, args: tuple, kwargs: dict, mode: str | None = None) -> LogDensity:
        return LogDensity(self._raw_model[0], args, kwargs, self._unconstrained_shapes, self._init_loc(), mode=mode)

    def get_base_dist(self) -> dist.TorchDistribution:
        """The flow's base ``(latent_dim,)``: standard normal, Student-t of ``base_df`` degrees of freedom, or learned.

        A learned one is held fixed at its present parameters, as :meth:`get_transform` is.
        """
        learned = self.get_base()
        if learned is not None:
            return learned.distribution()
        return standard_base(self.latent_dim, self.base_df, like=self._init_loc())

    def get_base(self) -> Base | None:
        """The learned base, as a copy with its parameters held fixed; ``None`` if the base is not learned."""
        learned = self._modules.get("learned_base")
        return None if learned is None else copy.deepcopy(learned).requires_grad_(False)  # type: ignore[return-value]

    def get_transform(self, *args: Any, **kwargs: Any) -> TransformModule:
        """The map from the base to the unconstrained latents, as a copy with its parameters held fixed.

        Being fixed it can stand in a potential that is compiled (``NUTS(jit_compile=True)``).

        :param args: of a guide with an encoder, here and below: the model's arguments; those of the guide's first call
            unless given.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        transform: Any = copy.deepcopy(self._modules["transform"])
        if self.encoder is not None:
            with torch.no_grad():
                transform = BoundContext(transform, self._encode(args, kwargs))
        return transform.requires_grad_(False)

    def get_base_space(self, *args: Any, **kwargs: Any) -> tuple[TransformModule, dist.TorchDistribution]:
        """Map to the unconstrained latents, and its base, for MCMC: a base learned from normals is part of the map.

        Held fixed at their present parameters, as by :meth:`get_transform`.
        """
        transform, base = self.get_transform(*args, **kwargs), self.get_base_dist()
        if isinstance(base, FlowDistribution):
            return Compose([base.transform, transform]), base.base_dist  # type: ignore[list-item]
        return transform, base

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The guide's distribution of the unconstrained latents, with trainable parameters."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        modules = {name: self._modules.get(name) for name in ("transform", "learned_base", "standardized_encoder")}
        modules = {name: module for name, module in modules.items() if module is not None}
        if not pyro.settings.get("module_local_params"):
            for name, module in modules.items():
                self._register(name, module)  # type: ignore[arg-type]
        base: Any = modules["learned_base"] if "learned_base" in modules else self.get_base_dist()
        transform: Any = modules["transform"]
        if self.encoder is not None:
            transform = transform.condition(self._encode(args, kwargs))
        return FlowDistribution(base, transform)

    def _register(self, attribute: str, module: nn.Module) -> None:
        """Puts this guide's own parameters into the param store."""
        store, prefix = pyro.get_param_store(), f"{self._pyro_name}.{attribute}"
        for name, parameter in module.named_parameters():
            full_name = pyro.params.param_with_module_name(prefix, name)
            stored = store._params.get(full_name)
            if stored is None or stored is parameter:
                continue
            if stored not in _REGISTERED:  # read from a file
                if stored.shape != parameter.shape:
                    raise ValueError(
                        f"AutoFlow: the param store holds {full_name!r} of shape {tuple(stored.shape)}, but this "
                        f"guide's is {tuple(parameter.shape)}. Call pyro.clear_param_store(), or build it alike."
                    )
                with torch.no_grad():
                    parameter.copy_(stored)
            del store[full_name]
        pyro.module(prefix, module)
        for parameter in module.parameters():
            _REGISTERED[parameter] = True

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent site, from draws (a flow's marginals have no closed form).

        :returns: dict of tensors ``(len(quantiles), *site_shape)``, or ``site_shape`` for a single number.
        """
        latent = self.get_posterior(*args, **kwargs).sample((num_samples,))
        q = torch.as_tensor(quantiles, dtype=latent.dtype, device=latent.device)
        parts = latent.split([shape.numel() for shape in self._unconstrained_shapes.values()], -1)
        result = {}
        for part, (name, shape) in zip(parts, self._unconstrained_shapes.items(), strict=True):
            value = biject_to(self.prototype_trace.nodes[name]["fn"].support)(part.reshape(num_samples, *shape))
            result[name] = torch.quantile(value, q, dim=0)
        return result

    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each latent site, from draws."""
        return self.quantiles(0.5, *args, num_samples=num_samples, **kwargs)

    # -- amortisation ----------------------------------------------------------------------------------------------
    def encoder_data(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """What the encoder sees of the model's arguments: tensors ``(*shape)``, without an axis of data sets."""
        if self.data is None and not args:
            raise ValueError(
                "AutoFlow: the model has no positional argument which the encoder's data could be. Pass data=, a "
                "function of the model's arguments."
            )
        found = args[0] if self.data is None else self.data(*args, **kwargs)
        return tuple(torch.as_tensor(a) for a in (found if isinstance(found, tuple) else (found,)))

    def _encode(self, args: tuple, kwargs: dict) -> Tensor:
        """The context ``(c,)`` of one data set.

        :param args: the model's arguments; with no ``kwargs`` either, those of the guide's first call.
        :param kwargs: the model's keyword arguments.
        """
        if not args and not kwargs:
            args, kwargs = self._prototype_call
        encoder: Any = self._modules["standardized_encoder"]
        data = self.encoder_data(args, kwargs)
        context = encoder(*(a.unsqueeze(0) for a in data))
        check_encoding_shape(tuple(context.shape), [tuple(a.shape) for a in data], 1)
        return context[0]

    def _standardized(self, args: tuple, kwargs: dict) -> StandardizedEncoder:
        """The encoder, with statistics of simulated data, or of the given ones where the model cannot be simulated."""
        names = list(self._unconstrained_shapes)
        try:
            if not self._num_pilots:
                raise ValueError("no simulations")
            simulator = PriorPredictive(self._raw_model[0], args, kwargs, names, owner="AutoFlow")
            return self.standardized_encoder_of(simulator, simulator.draw(self._num_pilots))
        except Exception:  # whatever a model, or its data, do that cannot be simulated
            return self._encoder_of(tuple(a.unsqueeze(0) for a in self.encoder_data(args, kwargs)))

    @torch.no_grad()
    def standardized_encoder_of(self, simulator: PriorPredictive, simulations: Simulations) -> StandardizedEncoder:
        """The encoder with the statistics of simulated data sets."""
        seen = batched(lambda *data: self.encoder_data(*simulator.call(data)), *simulations.data)
        return self._encoder_of(tuple(a[simulations.finite] for a in seen))

    def _encoder_of(self, data: tuple[Tensor, ...]) -> StandardizedEncoder:
        assert self.encoder is not None
        like = self._init_loc()
        return StandardizedEncoder(self.encoder, data, like.dtype).to(like)

    def at_data(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """The guide of one data set: an ``AutoFlow`` without an encoder, at one network pass.

        The context is one of its parameters, so that it can be trained further on that data set alone.

        :param args: the model's arguments.
        """
        if self.encoder is None:
            raise ValueError("AutoFlow: at_data needs a guide with an encoder=; this one is of one data set already.")
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with torch.no_grad():
            context = self._encode(args, kwargs)
        guide = copy.copy(self)
        *inner, outer = guide._modules["transform"].layers  # type: ignore[union-attr, misc]
        del guide._modules["standardized_encoder"]
        guide._encoder, guide.data, guide.standardized_encoder = (None,), None, None
        guide.flow, guide.full_rank = _described(self.flow, context.shape[-1], self.full_rank), False
        guide.transform = Compose([BoundContext(Compose(inner), context), outer])
        return guide

    def __getstate__(self) -> dict[str, Any]:
        # unlike the base class's, leaves this guide as it is; the copied parameters are free of Pyro's weak references
        return {**self.__dict__, "master": None, "_modules": copy.deepcopy(self._modules)}


class BoundContext(TransformModule):
    """``transform`` at a context which is a parameter of its own; :class:`Conditioned` owns none.

    :param transform: a transform that takes a context.
    :param context: the context ``(context_dim,)``.
    """

    def __init__(self, transform: TransformModule, context: Tensor):
        super().__init__()
        self.transform = transform
        self.context = nn.Parameter(context.detach().clone())

    @property
    def passes(self) -> tuple[int, int]:
        return self.transform.passes

    @property
    def log_det_is_exact(self) -> bool:  # type: ignore[override]
        return self.transform.log_det_is_exact

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(y, self.context)


def conditional_flow(
    flow: Callable[..., TransformModule], dim: int, context_dim: int, full_rank: bool = False
) -> Compose:
    """A flow of a context, then a location and scale that depend on it too: an amortised guide's inner part.

    Starts at the identity, whatever the context.
    """
    between = [TriangularAffine(dim)] if full_rank else []
    head = Elementwise(dim, Affine(_MAX_LOG_SCALE), context_dim=context_dim)
    return Compose([flow(dim, context_dim=context_dim), *between, head])


def conditioned(
    dim: int, flow: str = "nsf", context_dim: int = 1, full_rank: bool = False, **keywords: Any
) -> BoundContext:
    """A :func:`conditional_flow` at a context which is a parameter: an amortised guide's flow for one data set.

    :param dim: size of the latent vector.
    :param flow: name of a flow in ``flows.FLOWS``.
    :param context_dim: size of the context.
    :param keywords: of the flow.
    """
    factory = partial(flows.FLOWS[flow], **keywords)
    return BoundContext(conditional_flow(factory, dim, context_dim, full_rank), torch.zeros(context_dim))


FACTORIES = {**flows.FLOWS, "conditioned": conditioned}  # factories that a file can describe


def _described(flow: Callable[..., TransformModule], context_dim: int, full_rank: bool) -> Callable:
    """The factory of the flow for one data set, by its name where it has one."""
    known = serialization.describe(flow, flows.FLOWS)
    if known is not None:
        return partial(
            conditioned, flow=known["name"], context_dim=context_dim, full_rank=full_rank, **known["keywords"]
        )

    def factory(dim: int) -> BoundContext:
        return BoundContext(conditional_flow(flow, dim, context_dim, full_rank), torch.zeros(context_dim))

    return factory


def check_guide_scale(init_scale: Any, base_df: float | None) -> None:
    """Raises a ``ValueError`` unless the first scale is positive and the base's degrees of freedom are."""
    scale = torch.as_tensor(init_scale)
    diagonal = scale.diagonal() if scale.dim() == 2 else scale
    if scale.dim() > 2 or not bool((diagonal > 0).all()):
        raise ValueError(
            "AutoFlow: init_scale must be a positive number, a vector of them or a lower Cholesky factor, "
            f"but got {init_scale!r}."
        )
    if base_df is not None and not base_df > 0:
        raise ValueError(f"AutoFlow: base_df must be positive, or None for a normal base, but got {base_df}.")


def check_flow(flow: Any, owner: str, name: str = "flow") -> None:
    """Raises an error unless ``flow`` is a factory."""
    if not callable(flow) or isinstance(flow, TransformModule):
        raise TypeError(
            f"{owner}: {name} must be a factory 'dim -> TransformModule', but got {type(flow).__name__}. "
            "Pass flows.realnvp, or functools.partial(flows.realnvp, num_layers=4), not a name or a built flow."
        )


def check_base(base: Any, base_df: float | None, owner: str) -> None:
    """Raises an error unless ``base`` is a factory, or none."""
    if base is None:
        return
    if not callable(base) or isinstance(base, Base):
        raise TypeError(
            f"{owner}: base must be a factory 'dim -> Base', but got {type(base).__name__}. "
            "Pass MixtureBase, or functools.partial(MixtureBase, num_components=4), not a built base."
        )
    if base_df is not None:
        raise ValueError(f"{owner}: base and base_df={base_df} both give the flow's base: pass one of them.")


def check_encoding(encoder: Any, data: Any, noncentered: bool, owner: str) -> None:
    """Raises an error unless ``encoder`` and ``data`` are functions, or none, and go with the other arguments."""
    for name, value in (("encoder", encoder), ("data", data)):
        if value is not None and not callable(value):
            raise TypeError(f"{owner}: {name} must be callable, but got {type(value).__name__}.")
    if data is not None and encoder is None:
        raise ValueError(f"{owner}: data= is what an encoder sees: pass encoder= as well, or leave it out.")
    if noncentered and encoder is not None:
        raise ValueError(
            f"{owner}: noncentered=True reads the model's priors at one set of arguments, but encoder= makes the guide "
            "one of all data sets. Leave one of them out, or write the model non-centred."
        )


def check_encoding_shape(context: tuple[int, ...], data: list[tuple[int, ...]], n: int) -> None:
    """Raises a ``ValueError`` unless the encoder gave one vector for each of ``n`` data sets."""
    if len(context) != 2 or context[0] != n:
        shapes = ", ".join(str((n, *shape)) for shape in data)
        raise ValueError(
            f"AutoFlow: the encoder returned shape {tuple(context)} for data of shape {shapes}, but expected "
            f"({n}, c). encoder= takes a batch of data sets to one vector for each (take "
            "encoders.SetEncoder for sets)."
        )


def check_built_base(base: Any, owner: str) -> Base:
    """Raises an error unless what a factory built is a :class:`Base` whose draws carry gradients."""
    if not isinstance(base, Base):
        raise TypeError(f"{owner}: base must be a factory of a distributions.Base, but it built {type(base).__name__}.")
    if not base.distribution().has_rsample:
        raise ValueError(
            f"{owner}: draws of {type(base).__name__} are not reparameterised, so a guide cannot be trained with it: "
            "it serves maximum likelihood (fit_density). Use MixtureBase or LocScaleBase."
        )
    return base
