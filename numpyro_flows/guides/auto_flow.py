"""A normalizing flow over all latents of a model jointly, as an automatic guide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import constrain_fn

from numpyro_flows import flows, serialization
from numpyro_flows.centering import COORDINATES, Centering
from numpyro_flows.distributions import Base, FlowDistribution, standard_base
from numpyro_flows.encoders import StandardizedEncoder
from numpyro_flows.log_density import LogDensity, check_finite, check_latents, prototype_trace
from numpyro_flows.noncentering import Noncentering, inverse, noncentering_of
from numpyro_flows.prior_predictive import PriorPredictive, Simulations
from numpyro_flows.programs import Programs
from numpyro_flows.supports import Supported
from numpyro_flows.transform_module import Compose, Conditioned, TransformModule, flow_module, parameters
from numpyro_flows.transforms import Elementwise, ElementwiseAffine, TriangularAffine
from numpyro_flows.univariate import Affine

_REBUILT = ("prototype_trace", "_potential_fn_gen", "_potential_fn", "_postprocess_fn", "_unpack_latent")
_MAX_LOG_SCALE = 12.0  # of an amortised guide: posteriors may be so much narrower than the first scale, or wider
_NUM_PILOTS = 500  # simulations by which an encoder's data are standardised


class AutoFlow(AutoContinuous):
    """Guide ``z ~ N(0, I) -> flow -> location and scale -> latents``, with an exact density.

    A drop-in ``AutoContinuous``: it works in NumPyro's ``SVI``, ``Predictive``, ``NeuTraReparam``, with any support
    that ``biject_to`` knows, and from one latent dimension on. The flow starts at the identity, so the guide
    starts as the normal of ``init_loc_fn`` and ``init_scale``. Its parameters are the one param site
    ``{prefix}_flow$params``; those of a learned base are ``{prefix}_base$params``.

    :param model: NumPyro model with continuous latents.
    :param flow: factory ``flow(dim, key=key) -> TransformModule``, such as ``flows.nsf`` or
        ``functools.partial(flows.nsf, num_layers=4)``. The default stands the noise of the plain ELBO of a single draw,
        where ``flows.realnvp`` may run off to NaN.
    :param prefix: prefix of the guide's sites.
    :param init_loc_fn: NumPyro's initialisation strategy, which gives the first location.
    :param init_scale: first scale on the unconstrained space: a positive number, a vector ``(latent_dim,)``, or a lower
        Cholesky factor ``(latent_dim, latent_dim)`` (then the scale map is of full rank).
    :param base_df: degrees of freedom of a Student-t base, for heavier tails; ``None`` for a normal base.
    :param base: factory ``base(dim, key=key) -> Base`` of a base that is learned along with the flow, such as
        ``functools.partial(distributions.MixtureBase, num_components=4)`` for several modes; in place of ``base_df``.
    :param full_rank: puts a trainable full-rank affine map between the flow and the location and scale.
    :param noncentered: puts a :class:`Noncentering` layer last, where the model has latents whose prior depends on
        other latents, or is a Laplace. The location and scale are then those of the non-centred vector.
    :param encoder: network that makes one guide of all data sets of a model (amortisation): it takes data sets
        ``(batch, *shape)`` to contexts ``(batch, c)``, such as :class:`encoders.MLPEncoder` or
        :class:`encoders.SetEncoder`. ``flow`` is then called with ``context_dim=c``, and a location and scale that
        depend on the context follow it. Trained along with the flow, as param site ``{prefix}_encoder$params``, if it
        is an equinox module (``equinox.filter_vmap`` makes one of a network of single data sets); any other function,
        such as of summary statistics, stays as it is. What it sees is standardised
        (:class:`encoders.StandardizedEncoder`) by data simulated from the model, where they can be, and else by those
        of the first call; these statistics are kept with the parameters.
    :param data: function of the model's arguments that gives what the encoder sees of one data set: an array, or a
        tuple of arrays, which are the encoder's arguments (``lambda x, mask: (x, mask)``). The model's first argument
        unless given.
    :raises ValueError: at the first call, for a model with discrete latents, none, latents in a subsampled plate, or
        a log-density that is not finite at the start (naming the sites).
    """

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., TransformModule] = flows.iaf,
        *,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_uniform,
        init_scale: float | Array = 0.1,
        base_df: float | None = None,
        base: Callable[..., Base] | None = None,
        full_rank: bool = False,
        noncentered: bool = False,
        encoder: Callable[..., Array] | None = None,
        data: Callable | None = None,
    ):
        check_flow(flow, "AutoFlow")
        check_guide_scale(init_scale, base_df)
        check_base(base, base_df, "AutoFlow")
        check_encoding(encoder, data, noncentered, "AutoFlow")
        super().__init__(Supported(model), prefix=prefix, init_loc_fn=init_loc_fn)
        self._raw_model = model  # the same for all guides of a fit, whose programs go by it
        self.flow, self._init_scale, self.base_df, self.full_rank = flow, init_scale, base_df, full_rank
        self.base, self.noncentered, self.encoder, self.data = base, noncentered, encoder, data
        self.transform: Compose | None = None
        self.learned_base: Base | None = None
        self.standardized_encoder: StandardizedEncoder | None = None
        self._num_pilots = _NUM_PILOTS
        self._owner = type(self).__name__  # whom its errors name
        self._programs = Programs()
        self._held: bool | None = None  # whether the model's arguments are a part of programs, once it is known

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        owner = self._owner
        key = numpyro.prng_key()
        key = jax.random.key(0) if key is None else key
        self._prototype_call = key, args, kwargs
        seeded = handlers.seed(self.model, key)
        trace = prototype_trace(seeded, args, kwargs, self.init_loc_fn)
        check_latents(trace, owner)
        for site in trace.values():  # plates within a scan are in no trace, but NumPyro asks for their sizes
            for frame in site.get("cond_indep_stack", ()):
                self._prototype_frame_full_sizes.setdefault(frame.name, frame.size)
        try:
            with handlers.seed(rng_seed=key), numpyro.validation_enabled(False):
                super()._setup_prototype(*args, **kwargs)
        except RuntimeError as error:
            if "initial parameters" not in str(error):
                raise
            check_finite(prototype_trace(seeded, args, kwargs, self.init_loc_fn), owner)
            raise ValueError(
                f"{owner}: the model's log-density is not finite at the start: its gradient. Give init_loc_fn= another."
            ) from error
        if self.transform is None:  # kept when a pickled guide sets itself up again
            dtype = self._init_latent.dtype
            flow_key = jax.random.fold_in(key, 1)
            if self.encoder is None:
                flow = _built(self.flow, self.latent_dim, key=flow_key)
                whole = [flow, eqx.filter_jit(TriangularAffine)(self.latent_dim)] if self.full_rank else [flow]
            else:
                self.standardized_encoder = self._standardized(key, args, kwargs)
                context_dim = self._encode(None, args, kwargs).shape[-1]
                conditional = partial(conditional_flow, self.flow, context_dim=context_dim, full_rank=self.full_rank)
                whole = [_built(conditional, self.latent_dim, key=flow_key)]
            start, layer = self._init_latent, None
            if self.noncentered:
                density = self._log_density(args, kwargs)
                layer = noncentering_of(density, trace, start, self._programs)
                if layer is not None:
                    start = self._programs(inverse, layer.with_density(None), density, start)[0]
            coordinates = Compose([] if layer is None else [layer])
            whole = _cast(whole, dtype)
            self.transform = Compose([*whole, self._location_and_scale(start, self._init_scale), coordinates])
            if self.base is not None:
                base = _built(self.base, self.latent_dim, key=jax.random.fold_in(key, 2))
                base = check_built_base(base, self._owner)
                self.learned_base = _cast(base, dtype)

    def _location_and_scale(self, loc: Array, scale: float | Array) -> TransformModule:
        loc, scale = (jnp.asarray(a, self._init_latent.dtype) for a in (loc, scale))
        outer = TriangularAffine if scale.ndim == 2 else ElementwiseAffine
        return eqx.filter_jit(outer)(self.latent_dim, loc, scale)

    @property
    def outer_layers(self) -> list[TransformModule]:
        """The location and scale, and the coordinates after them: the last layers, once set up."""
        layers = [] if self.transform is None else list(self.transform.layers)
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
    def init_loc(self) -> Array:
        """The first location ``(latent_dim,)`` on the unconstrained space, by ``init_loc_fn``."""
        return self._init_latent

    def start_at(self, loc: Array, scale: float | Array) -> None:
        """Moves the guide's first location and scale, given on the unconstrained space, before it is trained.

        :param loc: location ``(latent_dim,)``, for example that of a fitted ``AutoMultivariateNormal``. Of the
            non-centred vector, where the guide is ``noncentered``.
        :param scale: as ``init_scale``.
        """
        if self.transform is None:
            raise RuntimeError("AutoFlow: start_at needs the model's structure: call the guide (or log_density) first.")
        check_guide_scale(scale, self.base_df)
        inner = self.transform.layers[: -len(self.outer_layers)]
        self.transform = Compose([*inner, self._location_and_scale(loc, scale), self.coordinates])

    def set_noncentering(self, noncentering: Noncentering | None) -> None:
        """Replaces the last layer of a ``noncentered`` guide, before it is trained; ``None`` takes it away."""
        if self.transform is None or not self.noncentered:
            raise RuntimeError("AutoFlow: set_noncentering needs a guide that is noncentered, and has been set up.")
        self._set_last(self.centering, noncentering)

    def set_centering(self, centering: Centering | None) -> None:
        """Puts a layer after the location and scale, before the guide is trained; ``None`` takes it away."""
        if self.transform is None:
            raise RuntimeError("AutoFlow: set_centering needs the model's structure: call the guide first.")
        self._set_last(centering, self.noncentering)

    def _set_last(self, *layers: TransformModule | None) -> None:
        """The layers after the location and scale."""
        assert self.transform is not None
        place = len(self.transform.layers) - len(self.outer_layers) + 1
        self.transform = Compose([*self.transform.layers[:place], *(layer for layer in layers if layer is not None)])

    def log_density(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The model's log-density over the guide's latent vector, given the model's arguments."""
        if self.prototype_trace is None:
            with handlers.seed(rng_seed=0):
                self._setup_prototype(*args, **kwargs)
        return self._log_density(args, kwargs)

    def _log_density(self, args: tuple, kwargs: dict) -> LogDensity:
        if self._held is None:
            self._held = not LogDensity(self._raw_model, args, kwargs, self.latent_shapes).takes_inputs()
        return LogDensity(self._raw_model, args, kwargs, self.latent_shapes, held=self._held)

    @property
    def latent_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Shapes of the sites' unconstrained values, in the order of the latent vector."""
        shapes: list[tuple[str, tuple[int, ...]]] = []
        jax.eval_shape(lambda u: shapes.extend((n, v.shape) for n, v in self._unpack_latent(u).items()), self.init_loc)
        return shapes

    def get_base_dist(self, params: dict[str, Any] | None = None) -> dist.Distribution:
        """The flow's base ``(latent_dim,)``: standard normal, Student-t of ``base_df`` degrees of freedom, or learned.

        :param params: as ``SVI`` returns them. A learned base stands at its first parameters without them, which is
            what ``NeuTraReparam`` does: it masks the base's density, and takes no more than a start from it.
        """
        learned = self.get_base(params)
        if learned is not None:
            return learned.distribution()
        return standard_base(self.latent_dim, self.base_df, like=self._init_latent)

    def get_base(self, params: dict[str, Any] | None = None) -> Base | None:
        """The learned base at ``params``, or at its first ones; ``None`` if the base is not learned."""
        if self.learned_base is None or params is None:
            return self.learned_base
        with handlers.block(), handlers.substitute(data=params):
            return self._registered_base()

    def _registered_base(self) -> Base:
        assert self.learned_base is not None
        return flow_module(f"{self.prefix}_base", self.learned_base)

    def _registered(self) -> tuple[Compose, Any, StandardizedEncoder | None]:
        """Flow, base and encoder at their present parameters."""
        assert self.transform is not None
        transform = flow_module(f"{self.prefix}_flow", self.transform)
        base = self.get_base_dist() if self.learned_base is None else self._registered_base()
        encoder = self.standardized_encoder
        return transform, base, None if encoder is None else flow_module(f"{self.prefix}_encoder", encoder)

    def _get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        transform, base, encoder = self._registered()
        if encoder is None:
            return FlowDistribution(base, transform)
        return FlowDistribution(base, transform.condition(self._encode(encoder, args, kwargs)))

    def _sample_latent(self, *args: Any, **kwargs: Any) -> Array:
        sample_shape = kwargs.pop("sample_shape", ())
        posterior = self._get_posterior(*args, **kwargs).expand_by(sample_shape)
        return numpyro.sample(f"_{self.prefix}_latent", posterior, infer={"is_auxiliary": True})

    def get_transform(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> TransformModule:
        """The map from the base to the unconstrained latents at ``params``.

        :param args: of a guide with an encoder, here and below: the model's arguments; those of the guide's first call
            unless given.
        """
        return handlers.substitute(self._get_posterior, params)(*args, **kwargs).transform

    def get_base_space(
        self, params: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[TransformModule, dist.Distribution]:
        """Map to the unconstrained latents, and its base, for MCMC: a base learned from normals is part of the map."""
        transform, base = self.get_transform(params, *args, **kwargs), self.get_base_dist(params)
        if isinstance(base, FlowDistribution):
            return Compose([base.transform, transform]), base.base_dist
        return transform, base

    def get_posterior(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> FlowDistribution:
        """The guide's distribution of the unconstrained latents at ``params``."""
        return handlers.substitute(self._get_posterior, params)(*args, **kwargs)

    def sample_posterior(
        self, rng_key: Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of the latent and deterministic sites, each ``(*sample_shape, *site_shape)``.

        :param params: as ``SVI`` returns them.
        """
        if self.encoder is None:
            return super().sample_posterior(rng_key, params, *args, sample_shape=sample_shape, **kwargs)
        if not args and not kwargs:
            _, args, kwargs = self._prototype_call
        u = self.get_posterior(params, *args, **kwargs).sample(rng_key, sample_shape)
        model = handlers.substitute(self.model, data={n: v for n, v in params.items() if n in self.prototype_trace})  # type: ignore[attr-defined]
        density = LogDensity(model, args, kwargs, self.latent_shapes)
        draws = jax.lax.map(density.constrain, u.reshape(-1, self.latent_dim))
        return jax.tree.map(lambda x: x.reshape(*sample_shape, *x.shape[1:]), draws)

    def quantiles(
        self,
        params: dict[str, Any],
        quantiles: Any,
        *args: Any,
        rng_key: Array | None = None,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Quantiles of each latent site, from draws (a flow's marginals have no closed form).

        :returns: dict of arrays ``(len(quantiles), *site_shape)``, or ``site_shape`` for a single number.
        """
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        samples = self.sample_posterior(rng_key, params, *args, sample_shape=(num_samples,), **kwargs)
        latent = {name: samples[name] for name in self._init_locs}
        return jax.tree.map(lambda x: jnp.quantile(x, jnp.asarray(quantiles), axis=0), latent)

    def median(
        self,
        params: dict[str, Any],
        *args: Any,
        rng_key: Array | None = None,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Median of each latent site, from draws."""
        return self.quantiles(params, 0.5, *args, rng_key=rng_key, num_samples=num_samples, **kwargs)

    # -- amortisation ----------------------------------------------------------------------------------------------
    def encoder_data(self, args: tuple, kwargs: dict) -> tuple[Array, ...]:
        """What the encoder sees of the model's arguments: arrays ``(*shape)``, without an axis of data sets."""
        if self.data is None and not args:
            raise ValueError(
                "AutoFlow: the model has no positional argument which the encoder's data could be. Pass data=, a "
                "function of the model's arguments."
            )
        found = args[0] if self.data is None else self.data(*args, **kwargs)
        return tuple(jnp.asarray(a) for a in (found if isinstance(found, tuple) else (found,)))

    def _encode(self, encoder: StandardizedEncoder | None, args: tuple, kwargs: dict) -> Array:
        """The context ``(c,)`` of one data set.

        :param encoder: the encoder at its present parameters; at its first ones unless given.
        :param args: the model's arguments; with no ``kwargs`` either, those of the guide's first call.
        :param kwargs: the model's keyword arguments.
        """
        if not args and not kwargs:
            _, args, kwargs = self._prototype_call
        encoder = self.standardized_encoder if encoder is None else encoder
        assert encoder is not None
        data = self.encoder_data(args, kwargs)
        context = encoder(*(a[None] for a in data))
        check_encoding_shape(jnp.shape(context), [a.shape for a in data], 1)
        return context[0]

    def _standardized(self, key: Array, args: tuple, kwargs: dict) -> StandardizedEncoder:
        """The encoder, with statistics of simulated data, or of the given ones where the model cannot be simulated."""
        try:
            if not self._num_pilots:
                raise ValueError("no simulations")
            simulator = PriorPredictive(self._raw_model, args, kwargs, list(self._init_locs), owner="AutoFlow")
            draw = jax.jit(partial(simulator.draw, n=self._num_pilots))
            return self.standardized_encoder_of(simulator, draw(jax.random.fold_in(key, 3)))
        except Exception:  # whatever a model, or its data, do that cannot be simulated
            return self._encoder_of(tuple(a[None] for a in self.encoder_data(args, kwargs)))

    def standardized_encoder_of(self, simulator: PriorPredictive, simulations: Simulations) -> StandardizedEncoder:
        """The encoder at its first parameters, with the statistics of simulated data sets."""

        @eqx.filter_jit
        def build(simulations: Simulations) -> StandardizedEncoder:
            seen = jax.vmap(lambda data: self.encoder_data(*simulator.call(data)))(simulations.data)
            return self._encoder_of(tuple(_without(a, ~simulations.finite) for a in seen))

        return build(simulations)

    def _encoder_of(self, data: tuple[Array, ...]) -> StandardizedEncoder:
        assert self.encoder is not None
        dtype = self._init_latent.dtype
        return StandardizedEncoder(_cast(self.encoder, dtype), data, dtype)

    def at_data(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[AutoFlow, dict[str, Any]]:
        """The guide of one data set, and its parameters: an ``AutoFlow`` without an encoder, at one network pass.

        The context is one of its parameters, so that it can be trained further on that data set alone.

        :param params: of this guide, as ``SVI`` returns them.
        :param args: the model's arguments.
        """
        if self.encoder is None:
            raise ValueError("AutoFlow: at_data needs a guide with an encoder=; this one is of one data set already.")
        conditioned = self.get_transform(params, *args, **kwargs)
        assert isinstance(conditioned, Conditioned) and isinstance(conditioned.transform, Compose)
        *inner, outer = conditioned.transform.layers
        guide = copy.copy(self)
        guide.encoder = guide.data = guide.standardized_encoder = None
        guide.flow = _described(self.flow, conditioned.context.shape[-1], self.full_rank)
        guide.full_rank = False
        guide.transform = Compose([Conditioned(Compose(inner), conditioned.context), outer])
        if args or kwargs:
            guide._prototype_call = self._prototype_call[0], args, kwargs
            model = handlers.seed(self.model, rng_seed=0)
            guide._postprocess_fn = partial(constrain_fn, model, args, kwargs, return_deterministic=True)
        own = f"{self.prefix}_flow$params", f"{self.prefix}_encoder$params"
        rest = {name: value for name, value in params.items() if name not in own}
        return guide, {**rest, own[0]: parameters(guide.transform)}

    # closures of NumPyro's set-up cannot be pickled: a copy sets itself up again from the same key and arguments
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: None if name in _REBUILT else value for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_prototype_call" in state:
            key, args, kwargs = state["_prototype_call"]
            with handlers.seed(rng_seed=key):
                self._setup_prototype(*args, **kwargs)


def conditional_flow(
    flow: Callable[..., TransformModule], dim: int, context_dim: int, full_rank: bool = False, *, key: Array
) -> Compose:
    """A flow of a context, then a location and scale that depend on it too: an amortised guide's inner part.

    Starts at the identity, whatever the context.
    """
    flow_key, head_key = jax.random.split(key)
    head = Elementwise(dim, Affine(_MAX_LOG_SCALE), context_dim=context_dim, key=head_key)
    between = [TriangularAffine(dim)] if full_rank else []
    return Compose([flow(dim, context_dim=context_dim, key=flow_key), *between, head])


def conditioned(
    dim: int, flow: str = "nsf", context_dim: int = 1, full_rank: bool = False, *, key: Array, **keywords: Any
) -> Conditioned:
    """A :func:`conditional_flow` at a context which is a parameter: an amortised guide's flow for one data set.

    :param dim: size of the latent vector.
    :param flow: name of a flow in ``flows.FLOWS``.
    :param context_dim: size of the context.
    :param keywords: of the flow.
    """
    factory = partial(flows.FLOWS[flow], **keywords)
    return Conditioned(conditional_flow(factory, dim, context_dim, full_rank, key=key), jnp.zeros(context_dim))


FACTORIES = {**flows.FLOWS, "conditioned": conditioned}  # factories that a file can describe


def _described(flow: Callable[..., TransformModule], context_dim: int, full_rank: bool) -> Callable:
    """The factory of the flow for one data set, by its name where it has one."""
    known = serialization.describe(flow, flows.FLOWS)
    if known is not None:
        return partial(
            conditioned, flow=known["name"], context_dim=context_dim, full_rank=full_rank, **known["keywords"]
        )

    def factory(dim: int, *, key: Array) -> Conditioned:
        return Conditioned(conditional_flow(flow, dim, context_dim, full_rank, key=key), jnp.zeros(context_dim))

    return factory


def check_guide_scale(init_scale: Any, base_df: float | None) -> None:
    """Raises a ``ValueError`` unless the first scale is positive and the base's degrees of freedom are."""
    scale = np.asarray(init_scale)
    diagonal = np.diagonal(scale) if scale.ndim == 2 else scale
    if scale.ndim > 2 or not (diagonal > 0).all():
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
            f"{owner}: {name} must be a factory 'dim, *, key -> TransformModule', but got {type(flow).__name__}. "
            "Pass flows.realnvp, or functools.partial(flows.realnvp, num_layers=4), not a name or a built flow."
        )


def check_base(base: Any, base_df: float | None, owner: str) -> None:
    """Raises an error unless ``base`` is a factory, or none."""
    if base is None:
        return
    if not callable(base) or isinstance(base, Base):
        raise TypeError(
            f"{owner}: base must be a factory 'dim, *, key -> Base', but got {type(base).__name__}. "
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
            f"({n}, c). encoder= takes a batch of data sets to one vector for each (wrap a network of single data sets "
            "in equinox.filter_vmap; take encoders.SetEncoder for sets)."
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


def _without(data: Array, out: Array) -> Array:
    """Data sets ``(n, ...)``, of which some ``(n,)`` are marked by NaN, where there is one."""
    if data.dtype == bool:
        return data
    data = data.astype(jnp.result_type(data, jnp.float32))
    return jnp.where(out.reshape(-1, *[1] * (data.ndim - 1)), jnp.nan, data)


def _built(factory: Callable, dim: int, *, key: Array) -> Any:
    """What a factory builds, compiled as a whole where it can be: operation by operation it takes seconds."""
    try:
        return eqx.filter_jit(factory)(dim, key=key)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):  # a factory that looks at values
        return factory(dim, key=key)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, tree)
