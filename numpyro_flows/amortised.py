"""``AmortisedFlowVI``: one posterior for all data sets of a model, trained once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer.initialization import init_to_value

from numpyro_flows import flows, serialization
from numpyro_flows.checks import check_counts
from numpyro_flows.distributions import Base, distribution_of
from numpyro_flows.encoders import StandardizedEncoder, location_and_scale
from numpyro_flows.guides import AutoFlow
from numpyro_flows.guides.auto_flow import check_base, check_encoding, check_encoding_shape
from numpyro_flows.inference import FlowVI
from numpyro_flows.log_density import LogDensity
from numpyro_flows.posterior import FlowPosterior, History
from numpyro_flows.prior_predictive import PriorPredictive, Simulations
from numpyro_flows.programs import checked_key
from numpyro_flows.training import FitHistory, train
from numpyro_flows.transform_module import TransformModule, flow_module, parameters

_OWNER = "AmortisedFlowVI"
_NUM_HELD_OUT = 2000  # simulations that score the guide, where there are fresh ones for every step
_NUM_PILOTS = 2000  # and those by which data and latents are standardised
_NUM_EXAMPLES = 20  # simulations at most, until one is finite by which the guide can be set up
_PIECE = 1000  # data sets at a time, where many are scored or inferred from
_CURVES = ("losses", "validation")  # of a FitHistory: what is an array
_NOTHING_FINITE = (
    "AmortisedFlowVI: none of {} simulations of the model was finite. Check its priors: very wide ones overflow."
)
OBJECTIVES = ("forward_kl", "elbo")


class AmortisedFlowVI:
    """Trains one guide for all data sets of a model: then a posterior costs one pass through its networks.

    :meth:`fit` trains an :class:`AutoFlow` with an encoder, on data sets simulated from the model:

    - ``objective="forward_kl"``: neural posterior estimation (Papamakarios & Murray 2016; Greenberg et al. 2019). The
      mean of ``-log q(latents | data)`` over the model's joint distribution, whose minimum is the posterior of every
      data set, if flow and encoder can give it. The model is only drawn from; its density is not needed.
    - ``objective="elbo"``: the mean ELBO over data sets, simulated or given, by reparameterised draws of the guide.

    :meth:`run` gives the :class:`FlowPosterior` of a data set: with exact densities, and all the diagnostics that tell
    whether the guide is good for this one. ``refine_steps`` trains it further on that data set alone (semi-amortised,
    Kim et al. 2018). The instance may be passed to ``simulation_based_calibration(..., infer=)``.

    Adam, whose step size falls to zero along a cosine; the parameters of the best score on held-out simulations are
    kept. Latents are trained on the unconstrained space, at the location and scale of their prior, data standardised
    by simulations (:class:`encoders.StandardizedEncoder`), whatever their units. Steps whose gradient is not finite are
    skipped and counted; simulations that are not finite are left out. Ctrl-C ends the training and keeps the best.

    :param model: NumPyro model with proper priors, whose data are arguments which it passes to ``sample(..., obs=)``.
    :param flow: factory ``flow(dim, context_dim=c, key=key) -> TransformModule``. One pass in both directions is best;
        the density of given points is what ``"forward_kl"`` needs.
    :param encoder: network from data sets ``(batch, *shape)`` to contexts ``(batch, c)``: see :class:`AutoFlow`.
    :param data: function of the model's arguments that gives what the encoder sees: see :class:`AutoFlow`.
    :param arguments: function ``arguments(key)`` that draws anew, for every simulation, the arguments that are no data
        (covariates, sizes, masks): see :class:`PriorPredictive`. Unless given they are those of :meth:`fit`.
    :param objective: one of the above.
    :param num_simulations: data sets that are simulated once, to be gone through again and again; ``None`` for fresh
        ones at every step, which cannot be overfitted: best where simulating is cheap.
    :param data_sets: given data sets for ``objective="elbo"``, in place of simulated ones: the tuple of the model's
        positional arguments, arrays with an axis of data sets in front (others as they are).
    :param num_steps: gradient steps at most.
    :param batch_size: data sets a step.
    :param num_particles: draws of the guide for each data set and step of ``"elbo"``.
    :param learning_rate: Adam's first step size.
    :param validation: share of ``num_simulations``, or of ``data_sets``, that is held out.
    :param patience: steps without a better score on what is held out after which the training ends.
    :param base: factory ``base(dim, key=key) -> Base`` of a base that is learned along; standard normal unless given.
    :param refine_steps: gradient steps of :meth:`run` on the ELBO of its data set, from the amortised start.
    :param progress_bar: shows a bar with loss, score and the time left.
    :ivar params: the guide's parameters, as ``SVI`` returns them.
    :ivar history: the course of the training (:class:`FitHistory`), in nats a data set: negative log-densities, or
        negative ELBOs.
    :raises TypeError: for flows, encoders and bases that cannot be called.
    :raises ValueError: for options with which nothing can be trained.
    """

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., TransformModule] = flows.nsf,
        *,
        encoder: Callable[..., Array],
        data: Callable | None = None,
        arguments: Callable | None = None,
        objective: str = "forward_kl",
        num_simulations: int | None = None,
        data_sets: tuple | None = None,
        num_steps: int = 5000,
        batch_size: int = 256,
        num_particles: int = 4,
        learning_rate: float = 5e-3,
        validation: float = 0.1,
        patience: int = 2000,
        base: Callable[..., Base] | None = None,
        refine_steps: int = 0,
        progress_bar: bool = True,
    ):
        check_base(base, None, _OWNER)
        if encoder is None:
            raise TypeError(f"{_OWNER}: encoder must be callable, but got None. Pass one such as encoders.MLPEncoder.")
        check_encoding(encoder, data, False, _OWNER)
        numbers = {
            "num_steps": num_steps,
            "batch_size": batch_size,
            "num_particles": num_particles,
            "patience": patience,
        }
        check_training(numbers, objective, num_simulations, data_sets, learning_rate, validation, refine_steps)
        self.model, self.flow, self.encoder, self.data, self.arguments = model, flow, encoder, data, arguments
        self.objective, self.num_simulations, self.data_sets = objective, num_simulations, data_sets
        self.num_steps, self.batch_size, self.num_particles = num_steps, batch_size, num_particles
        self.learning_rate, self.validation, self.patience = learning_rate, validation, patience
        self.base, self.refine_steps = base, refine_steps
        self.progress_bar = progress_bar
        self.params: dict[str, Any] = {}
        self.history: FitHistory | None = None
        self._trained: tuple[AutoFlow, PriorPredictive] | None = None

    @property
    def guide(self) -> AutoFlow:
        """The guide, once trained: of all data sets; :meth:`run` has that of one."""
        return self._fitted()[0]

    # -- training --------------------------------------------------------------------------------------------------
    def fit(self, rng_key: Array, *args: Any, **kwargs: Any) -> AmortisedFlowVI:
        """Trains the guide, and returns this instance.

        :param rng_key: random key; the same one gives the same guide.
        :param args: the model's arguments: of the data only the shapes matter.
        :raises ValueError: for a model which a joint flow cannot serve (see :class:`AutoFlow`), which cannot be
            simulated (see :class:`PriorPredictive`), or with param sites.
        :raises RuntimeError: if no simulation, or no step's gradient, was finite.
        """
        begin = time.perf_counter()
        setup_key, set_key, fit_key = jax.random.split(checked_key(rng_key, _OWNER), 3)
        source = self._source(args, kwargs)
        guide = self._guide(setup_key, source)
        if self.data_sets is not None:
            stored = self._given(source)
        else:
            stored = self._simulated(source, set_key, self.num_simulations or _NUM_HELD_OUT)
            guide.start_at(*location_and_scale(stored.unconstrained[:_NUM_PILOTS]))
        guide.standardized_encoder = guide.standardized_encoder_of(source, _rows(stored, slice(_NUM_PILOTS)))
        held_out, training = self._split(stored, set_key)
        (transform, base, encoder), self.history = self._train(guide, source, training, held_out, fit_key, begin)
        params = {f"{guide.prefix}_flow$params": transform, f"{guide.prefix}_encoder$params": encoder}
        if base is not None:
            params[f"{guide.prefix}_base$params"] = base
        self.params = {name: parameters(module) for name, module in params.items()}
        self._trained = guide, source
        self.__dict__.pop("_compiled", None)
        return self

    def _guide(self, key: Array, source: PriorPredictive) -> AutoFlow:
        """The guide, set up by a simulation: where latents and data go together, the density is finite."""
        for k in jax.random.split(key, _NUM_EXAMPLES):
            latents, args, kwargs = source.example(k)
            if all(np.isfinite(np.asarray(x)).all() for x in (*latents.values(), *source.data_of(args, kwargs))):
                break
        else:
            raise RuntimeError(_NOTHING_FINITE.format(_NUM_EXAMPLES))
        guide = AutoFlow(
            self.model,
            self.flow,
            init_loc_fn=init_to_value(values=latents),
            init_scale=1.0,
            base=self.base,
            encoder=self.encoder,
            data=self.data,
        )
        guide._num_pilots = 0  # there are other simulations
        with handlers.seed(rng_seed=key):
            guide._setup_prototype(*args, **kwargs)
        learned = [name for name, site in guide.prototype_trace.items() if site["type"] == "param"]
        if learned:
            raise ValueError(
                f"{_OWNER}: the model has param site(s) {learned}, which a posterior does not cover. Give them priors, "
                "or train them together with an AutoFlow guide by numpyro.infer.SVI."
            )
        source.site_names = guide.log_density(*args, **kwargs).site_names
        return guide

    def _source(self, args: tuple, kwargs: dict) -> PriorPredictive:
        arguments = self.arguments
        if self.data_sets is not None:  # every array of theirs varies
            first = jax.tree.map(lambda a: a[0] if isinstance(a, jax.Array | np.ndarray) else a, tuple(self.data_sets))
            arguments = lambda _: first  # noqa: E731
        return PriorPredictive(self.model, args, kwargs, arguments=arguments, owner=_OWNER)

    def _simulated(self, source: PriorPredictive, key: Array, n: int) -> Simulations:
        found = jax.jit(partial(source.draw, n=n))(key)
        keep = np.asarray(found.finite)
        if not keep.any():
            raise RuntimeError(_NOTHING_FINITE.format(n))
        return _rows(found, keep)

    def _given(self, source: PriorPredictive) -> Simulations:
        leaves = jax.tree.leaves((tuple(self.data_sets or ()), source._fixed[1]))
        data = tuple(jnp.asarray(leaves[i]) for i in source.varying)
        sizes = sorted({len(a) for a in data})
        if len(sizes) != 1:
            raise ValueError(f"{_OWNER}: data_sets must be as many in every array, but there are {sizes}.")
        return Simulations(jnp.zeros((*sizes, 0)), data, jnp.ones(sizes, bool))

    def _split(self, stored: Simulations, key: Array) -> tuple[Simulations, Simulations | None]:
        """What is held out, and the rest: none, where there are fresh simulations for every step."""
        if self.num_simulations is None and self.data_sets is None:
            return stored, None
        n = len(stored.finite)
        held = num_held_out(n, self.validation)
        order = jax.random.permutation(jax.random.fold_in(key, 1), n)
        return _rows(stored, order[:held]), _rows(stored, order[held:])

    def _train(
        self,
        guide: AutoFlow,
        source: PriorPredictive,
        stored: Simulations | None,
        held_out: Simulations,
        key: Array,
        begin: float,
    ) -> tuple[tuple, FitHistory]:
        modules = guide.transform, guide.learned_base, guide.standardized_encoder
        params, static = eqx.partition(modules, eqx.is_inexact_array)
        fixed_base, shapes = guide.get_base_dist(), guide.latent_shapes
        held_key, key = jax.random.split(key)

        def log_joint(u: Array, data: tuple[Array, ...]) -> Array:
            return LogDensity(self.model, *source.call(data), shapes)(u)

        def terms(params: Any, batch: Simulations, key: Array) -> Array:
            """The loss of every data set ``(n,)``."""
            transform, learned, encoder = eqx.combine(params, static)
            base = fixed_base if learned is None else distribution_of(learned)
            context = self._contexts(guide, source, encoder, batch.data)
            if self.objective == "forward_kl":
                x, log_det = transform.inverse_and_log_det(batch.unconstrained, context)
                return -base.log_prob(x) - log_det
            x = base.sample(key, (self.num_particles, len(context)))
            u, log_det = transform.forward_and_log_det(x, context)
            log_model = jax.vmap(jax.vmap(log_joint), (0, None))(u, batch.data)
            return (base.log_prob(x) - log_det - log_model).mean(0)

        def loss(params: Any, key: Array, stored: Simulations | None) -> Array:
            batch_key, loss_key = jax.random.split(key)
            if stored is None:
                batch = source.draw(batch_key, self.batch_size)
            else:
                batch = _rows(stored, jax.random.randint(batch_key, (self.batch_size,), 0, len(stored.finite)))
            each = terms(params, batch, loss_key)
            return jnp.where(batch.finite, each, 0).sum() / jnp.maximum(batch.finite.sum(), 1)

        scored = jax.jit(terms)

        def score(params: Any) -> float:
            pieces = [_rows(held_out, slice(i, i + _PIECE)) for i in range(0, len(held_out.finite), _PIECE)]
            values = jnp.concatenate([scored(params, piece, held_key) for piece in pieces])
            return float(jnp.where(jnp.isnan(values), jnp.inf, values).mean())

        best, history = train(
            params,
            loss,
            score,
            stored,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            patience=self.patience,
            key=key,
            dtype=guide.init_loc.dtype,
            owner=_OWNER,
            hint='Are flow and encoder finite at the data, and, for objective="elbo", the model\'s density at draws of '
            "the guide?",
            progress_bar=self.progress_bar,
            begin=begin,
        )
        return eqx.combine(best, static), history

    def _contexts(
        self, guide: AutoFlow, source: PriorPredictive, encoder: StandardizedEncoder, data: tuple[Array, ...]
    ) -> Array:
        """Contexts ``(n, c)`` of data sets."""
        seen = jax.vmap(partial(_seen, guide, source))(data)
        contexts = encoder(*seen)
        check_encoding_shape(jnp.shape(contexts), [a.shape[1:] for a in seen], len(seen[0]))
        return contexts

    # -- posteriors ------------------------------------------------------------------------------------------------
    def _fitted(self) -> tuple[AutoFlow, PriorPredictive]:
        if self._trained is None:
            raise RuntimeError(f"{_OWNER}: the guide has not been trained: call fit(...) first.")
        return self._trained

    def run(self, rng_key: Array, *args: Any, **kwargs: Any) -> FlowPosterior:
        """The posterior of a data set, given as the model's arguments.

        With ``refine_steps`` the better of the amortised guide and the one trained further is returned, by their ELBO.

        :param rng_key: key of the draws of its diagnostics, and of the refinement.
        :raises ValueError: for data from which the encoder makes nothing finite.
        :raises RuntimeError: before :meth:`fit`.
        """
        begin = time.perf_counter()
        guide, _ = self._fitted()
        draw_key, refine_key = jax.random.split(checked_key(rng_key, _OWNER))
        own, params = guide.at_data(self.params, *args, **kwargs)
        if not jnp.isfinite(own.transform.layers[0].context).all():  # type: ignore[union-attr]
            raise ValueError(
                f"{_OWNER}: the encoder's context of these data is not finite. Check that the data are; missing values "
                "go into a mask that data= gives to the encoder along with them."
            )
        log_density = own.log_density(*args, **kwargs)
        history = History(np.zeros(0), stationary=True, seconds=time.perf_counter() - begin)
        posterior = FlowPosterior(own, params, log_density, history, rng_key=draw_key)
        if not self.refine_steps:
            return posterior
        own.learned_base = own.get_base(params)
        vi = FlowVI(
            self.model, self.flow, num_steps=self.refine_steps, learning_rate=0.2 * self.learning_rate,
            progress_bar=self.progress_bar,
        )  # fmt: skip
        try:
            transform, base, history = vi._ascend(own, log_density, refine_key)
        except RuntimeError as error:
            warnings.warn(f"{_OWNER}: the refinement failed, the amortised guide stands: {error}", stacklevel=2)
            return posterior
        history = history._replace(gradients=vi.num_particles * len(history.elbo), seconds=time.perf_counter() - begin)
        params = {**params, f"{own.prefix}_flow$params": parameters(transform)}
        if base is not None:
            params[f"{own.prefix}_base$params"] = parameters(base)
        refined = FlowPosterior(own, params, log_density, history, rng_key=draw_key)
        if refined._elbo_inside.value >= posterior._elbo_inside.value:
            return refined
        posterior.history = history
        return posterior

    def sample_posteriors(self, rng_key: Array, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws for many data sets at once of the latent and deterministic sites, ``(n, num_samples, *site_shape)``.

        Of the amortised guide, without refinement.

        :param rng_key: random key.
        :param num_samples: draws for each data set.
        :param args: the model's arguments as in :meth:`fit`, with an axis of ``n`` data sets in front of those which
            are data, or which ``arguments`` draws.
        :raises ValueError: for data without that axis, or not as many in every argument.
        :raises RuntimeError: before :meth:`fit`.
        """
        rng_key = checked_key(rng_key, _OWNER)
        check_counts(_OWNER, num_samples=num_samples)
        _, source = self._fitted()
        data = source.data_of(args, kwargs)
        for a, i in zip(data, source.varying, strict=True):
            one = np.shape(source.leaves[i])
            if a.ndim != 1 + len(one):
                raise ValueError(
                    f"{_OWNER}: data sets have an axis in front of the data that fit was given, {('n', *one)}, but got "
                    f"shape {tuple(a.shape)}. For a single data set: x[None]."
                )
        n = {len(a) for a in data}
        if len(n) != 1:
            raise ValueError(
                f"{_OWNER}: data sets must be as many in every argument that holds data, but their first axes are "
                f"{sorted(n)}."
            )
        return self._draws(jax.random.split(rng_key, n.pop()), data, num_samples)

    def _draws(self, keys: Array, data: tuple[Array, ...], num_samples: int) -> dict[str, Array]:
        pieces = [slice(i, i + _PIECE) for i in range(0, len(keys), _PIECE)]
        parts = [self._compiled(keys[i], tuple(a[i] for a in data), num_samples, self.params) for i in pieces]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

    @cached_property
    def _compiled(self) -> Callable:
        """Draws for data sets ``(n, ...)``, compiled once for all of one size."""
        guide, source = self._fitted()
        shapes = guide.latent_shapes

        @partial(jax.jit, static_argnums=2)
        def many(keys: Array, data: tuple[Array, ...], num_samples: int, params: dict) -> dict[str, Array]:
            transform, base, encoder = handlers.substitute(guide._registered, params)()
            contexts = self._contexts(guide, source, encoder, data)

            def one(key: Array, context: Array, data: tuple[Array, ...]) -> dict[str, Array]:
                u = transform.forward_and_log_det(base.sample(key, (num_samples,)), context)[0]
                args, kwargs = source.call(data)
                return jax.vmap(LogDensity(self.model, args, kwargs, shapes).constrain)(u)

            return jax.vmap(one)(keys, contexts, data)

        return many

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Writes the trained guide's weights, and the course of its training, to one safetensors file. No pickle."""
        guide, _ = self._fitted()
        assert self.history is not None
        tensors: dict[str, Any] = {f"history.{name}": getattr(self.history, name) for name in _CURVES}
        for part, module in _modules(guide, self.params).items():
            tensors.update({f"{part}.{name}": x for name, x in serialization.state_dict(module).items()})
        numbers = {name: value for name, value in self.history._asdict().items() if name not in _CURVES}
        serialization.save(path, tensors, {"amortised": numbers})

    def load(self, path: str | Path, *args: Any, **kwargs: Any) -> AmortisedFlowVI:
        """Reads back what :meth:`save` wrote, in place of :meth:`fit`, and returns this instance.

        It must have been made with the model, flow, encoder and base of the one that was saved.

        :param path: the file.
        :param args: the model's arguments, as for :meth:`fit`.
        :raises ValueError: if the file is not of a trained guide, or does not fit this one.
        """
        tensors, metadata = serialization.load(path)
        if "amortised" not in metadata:
            raise ValueError(f"load: {str(path)!r} holds no amortised guide.")
        source = self._source(args, kwargs)
        guide = self._guide(jax.random.key(0), source)
        for part, module in _modules(guide, {}).items():
            weights = {n.removeprefix(f"{part}."): x for n, x in tensors.items() if n.startswith(f"{part}.")}
            self.params[f"{guide.prefix}_{part}$params"] = parameters(serialization.load_state_dict(module, weights))
        curves: dict[str, Any] = {name: np.asarray(tensors[f"history.{name}"]) for name in _CURVES}
        self.history = FitHistory(**curves, **metadata["amortised"])
        self._trained = guide, source
        self.__dict__.pop("_compiled", None)
        return self

    # -- simulation-based calibration ------------------------------------------------------------------------------
    def __call__(self, model: Any, args: tuple, kwargs: dict, rng_key: Array, num_draws: int) -> dict[str, Array]:
        """Draws of the posterior, as the ``infer`` of ``simulation_based_calibration``."""
        values = {name: jnp.asarray(value)[None] for name, value in model.data.items()}
        return {name: x[0] for name, x in self.infer_many(rng_key[None], values, args, kwargs, num_draws).items()}

    def infer_many(
        self, rng_keys: Array, values: dict[str, Array], args: tuple, kwargs: dict, num_draws: int
    ) -> dict[str, Array]:
        """Draws ``(n, num_draws, *site_shape)`` for ``n`` data sets, as ``simulation_based_calibration`` asks for them.

        :param rng_keys: a key for each.
        :param values: of the observed sites, ``(n, *site_shape)``.
        :param args: the model's arguments, whose data are overridden.
        :param kwargs: its keyword arguments.
        """
        _, source = self._fitted()
        n = len(rng_keys)
        data = [jnp.broadcast_to(a, (n, *a.shape)) for a in source.data_of(args, kwargs)]
        for name, i in source.observed.items():
            data[source.varying.index(i)] = jnp.asarray(values[name], data[source.varying.index(i)].dtype)
        if not self.refine_steps:
            return self._draws(rng_keys, tuple(data), num_draws)
        rows = []
        for i, key in enumerate(rng_keys):
            run_key, draw_key = jax.random.split(key)
            one = tuple(a[i : i + 1] for a in data)
            if not all(jnp.isfinite(a).all() for a in one):  # a failure of its own
                rows.append(jax.tree.map(lambda x: x[0], self._draws(key[None], one, num_draws)))
                continue
            own_args, own_kwargs = source.call(tuple(a[0] for a in one))
            rows.append(self.run(run_key, *own_args, **own_kwargs).sample(draw_key, (num_draws,)))
        return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


def _modules(guide: AutoFlow, params: dict[str, Any]) -> dict[str, Any]:
    """What is trained of a guide, by its name in files, at ``params`` (at its first ones for none)."""
    found = {"flow": guide.transform, "encoder": guide.standardized_encoder, "base": guide.learned_base}
    with handlers.block(), handlers.seed(rng_seed=0), handlers.substitute(data=params):
        return {
            part: flow_module(f"{guide.prefix}_{part}", module) for part, module in found.items() if module is not None
        }


def _rows(simulations: Simulations, rows: Any) -> Simulations:
    return jax.tree.map(lambda a: a[rows], simulations)


def _seen(guide: AutoFlow, source: PriorPredictive, data: tuple[Array, ...]) -> tuple[Array, ...]:
    """What the encoder sees of one data set."""
    return guide.encoder_data(*source.call(data))


def num_held_out(n: int, validation: float) -> int:
    """How many of ``n`` data sets are held out; a ``ValueError`` unless some are, and some are not."""
    held = round(n * validation)
    if not 1 <= held < n:
        raise ValueError(f"{_OWNER}: validation={validation} of {n} data sets holds out {held} of them.")
    return held


def check_training(
    numbers: dict[str, int],
    objective: str,
    num_simulations: int | None,
    data_sets: tuple | None,
    learning_rate: float,
    validation: float,
    refine_steps: int,
) -> None:
    """Raises a ``ValueError`` that names the option with which nothing can be trained."""
    check_counts(_OWNER, **numbers)
    if objective not in OBJECTIVES:
        raise ValueError(f"{_OWNER}: objective must be one of {OBJECTIVES}, but got {objective!r}.")
    if num_simulations is not None and num_simulations < 2:
        raise ValueError(f"{_OWNER}: num_simulations must be at least 2, or None, but got {num_simulations}.")
    if not learning_rate > 0:
        raise ValueError(f"{_OWNER}: learning_rate must be positive, but got {learning_rate}.")
    if not 0 < validation < 1:
        raise ValueError(f"{_OWNER}: validation must be a share between 0 and 1, but got {validation}.")
    if num_simulations is not None:
        num_held_out(num_simulations, validation)
    if refine_steps < 0:
        raise ValueError(f"{_OWNER}: refine_steps must not be negative, but got {refine_steps}.")
    if data_sets is not None and (objective != "elbo" or num_simulations is not None):
        raise ValueError(
            f'{_OWNER}: data_sets= are data without their latents, which only objective="elbo" can use, and stand in '
            "place of num_simulations=. Leave one out."
        )
    if data_sets is not None and not isinstance(data_sets, tuple):
        raise ValueError(
            f"{_OWNER}: data_sets must be the tuple of the model's positional arguments, but got "
            f"{type(data_sets).__name__}. For a single argument: (x,)."
        )
