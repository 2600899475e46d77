"""``AmortisedFlowVI``: one posterior for all data sets of a model, trained once."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.utils import _pytree as pytree

from pyroflows import flows, serialization
from pyroflows.checks import check_counts
from pyroflows.distributions import Base, distribution_of
from pyroflows.encoders import location_and_scale
from pyroflows.guides import AutoFlow
from pyroflows.guides.auto_flow import check_base, check_encoding, check_encoding_shape
from pyroflows.inference import FlowVI, _posterior_of
from pyroflows.posterior import FlowPosterior, History
from pyroflows.prior_predictive import PriorPredictive, Simulations, batched
from pyroflows.training import FitHistory, train
from pyroflows.transform_module import TransformModule

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
    The first of 250 steps or more is recorded as a graph which the others run: what model, flow and encoder hold
    besides their parameters is taken as it was then.
    Random numbers come from torch's generator: ``pyro.set_rng_seed`` makes a training repeatable.

    :param model: Pyro model with proper priors, whose data are arguments which it passes to ``sample(..., obs=)``.
    :param flow: factory ``flow(dim, context_dim=c) -> TransformModule``. One pass in both directions is best;
        the density of given points is what ``"forward_kl"`` needs.
    :param encoder: network from data sets ``(batch, *shape)`` to contexts ``(batch, c)``: see :class:`AutoFlow`.
    :param data: function of the model's arguments that gives what the encoder sees: see :class:`AutoFlow`.
    :param arguments: function ``arguments()`` that draws anew, for every simulation, the arguments that are no data
        (covariates, sizes, masks): see :class:`PriorPredictive`. Unless given they are those of :meth:`fit`.
    :param objective: one of the above.
    :param num_simulations: data sets that are simulated once, to be gone through again and again; ``None`` for fresh
        ones at every step, which cannot be overfitted: best where simulating is cheap.
    :param data_sets: given data sets for ``objective="elbo"``, in place of simulated ones: the tuple of the model's
        positional arguments, tensors with an axis of data sets in front (others as they are).
    :param num_steps: gradient steps at most.
    :param batch_size: data sets a step.
    :param num_particles: draws of the guide for each data set and step of ``"elbo"``.
    :param learning_rate: Adam's first step size.
    :param validation: share of ``num_simulations``, or of ``data_sets``, that is held out.
    :param patience: steps without a better score on what is held out after which the training ends.
    :param base: factory ``base(dim) -> Base`` of a base that is learned along; standard normal unless given.
    :param refine_steps: gradient steps of :meth:`run` on the ELBO of its data set, from the amortised start.
    :param progress_bar: shows a bar with loss, score and the time left.
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
        encoder: Callable[..., Tensor],
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
        self.history: FitHistory | None = None
        self._trained: tuple[AutoFlow, PriorPredictive] | None = None
        self._mode: str | None = None  # of the log-densities of data sets

    @property
    def guide(self) -> AutoFlow:
        """The guide, once trained: of all data sets; :meth:`run` has that of one."""
        return self._fitted()[0]

    # -- training --------------------------------------------------------------------------------------------------
    def fit(self, *args: Any, **kwargs: Any) -> AmortisedFlowVI:
        """Trains the guide, and returns this instance.

        :param args: the model's arguments: of the data only the shapes matter.
        :raises ValueError: for a model which a joint flow cannot serve (see :class:`AutoFlow`), which cannot be
            simulated (see :class:`PriorPredictive`), or with param sites.
        :raises RuntimeError: if no simulation, or no step's gradient, was finite.
        """
        begin = time.perf_counter()
        source = self._source(args, kwargs)
        guide = self._guide(source)
        if self.data_sets is not None:
            stored = self._given(source)
        else:
            stored = self._simulated(source, self.num_simulations or _NUM_HELD_OUT)
            guide.start_at(*location_and_scale(stored.unconstrained[:_NUM_PILOTS]))
        guide.standardized_encoder = guide.standardized_encoder_of(source, _rows(stored, slice(_NUM_PILOTS)))
        held_out, training = self._split(stored)
        self.history = self._train(guide, source, training, held_out, begin)
        self._trained, self._mode = (guide, source), None
        return self

    def _guide(self, source: PriorPredictive) -> AutoFlow:
        """The guide, set up by a simulation: where latents and data go together, the density is finite."""
        for _ in range(_NUM_EXAMPLES):
            latents, args, kwargs = source.example()
            if all(bool(x.isfinite().all()) for x in (*latents.values(), *source.data_of(args, kwargs))):
                break
        else:
            raise RuntimeError(_NOTHING_FINITE.format(_NUM_EXAMPLES))
        guide = AutoFlow(
            self.model,
            self.flow,
            init_loc_fn=init_to_value(values=latents),
            init_scale=1.0,
            base=self.base,
            encoder=copy.deepcopy(self.encoder),  # so that a second training starts from the same
            data=self.data,
        )
        guide._num_pilots = 0  # there are other simulations
        guide._setup_prototype(*args, **kwargs)
        if guide.model_params:
            raise ValueError(
                f"{_OWNER}: the model has param site(s) {guide.model_params}, which a posterior does not cover. Give "
                "them priors, or train them together with an AutoFlow guide by pyro.infer.SVI."
            )
        source.site_names = list(guide._unconstrained_shapes)
        return guide

    def _source(self, args: tuple, kwargs: dict) -> PriorPredictive:
        arguments = self.arguments
        if self.data_sets is not None:  # every tensor of theirs varies
            first = pytree.tree_map(lambda a: a[0] if isinstance(a, Tensor) else a, self.data_sets)
            arguments = lambda: first  # noqa: E731
        return PriorPredictive(self.model, args, kwargs, arguments=arguments, owner=_OWNER)

    def _simulated(self, source: PriorPredictive, n: int) -> Simulations:
        found = source.draw(n)
        if not bool(found.finite.any()):
            raise RuntimeError(_NOTHING_FINITE.format(n))
        return _rows(found, found.finite)

    def _given(self, source: PriorPredictive) -> Simulations:
        leaves = pytree.tree_leaves((self.data_sets, source._fixed[1]))
        data = tuple(torch.as_tensor(leaves[i]) for i in source.varying)
        sizes = sorted({len(a) for a in data})
        if len(sizes) != 1:
            raise ValueError(f"{_OWNER}: data_sets must be as many in every tensor, but there are {sizes}.")
        return Simulations(torch.zeros(*sizes, 0), data, torch.ones(sizes, dtype=torch.bool))

    def _split(self, stored: Simulations) -> tuple[Simulations, Simulations | None]:
        """What is held out, and the rest: none, where there are fresh simulations for every step."""
        if self.num_simulations is None and self.data_sets is None:
            return stored, None
        n = len(stored.finite)
        held = num_held_out(n, self.validation)
        order = torch.randperm(n)
        return _rows(stored, order[:held]), _rows(stored, order[held:])

    def _train(
        self,
        guide: AutoFlow,
        source: PriorPredictive,
        stored: Simulations | None,
        held_out: Simulations,
        begin: float,
    ) -> FitHistory:
        """Trains the guide in place."""
        modules: dict[str, Any] = _modules(guide)
        transform, learned = modules["flow"], modules.get("base")
        fixed_base: Any = guide.get_base_dist() if learned is None else None
        parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]

        def log_joint(u: Tensor, *data: Tensor) -> Tensor:
            args, kwargs = source.call(data)
            return guide._log_density(args, kwargs, mode="loop")._single(u)

        def terms(batch: Simulations) -> Tensor:
            """The loss of every data set ``(n,)``."""
            base = fixed_base if learned is None else distribution_of(learned)
            context = self._contexts(guide, source, batch.data)
            if self.objective == "forward_kl":
                x, log_det = transform.inverse_and_log_det(batch.unconstrained, context)
                return -base.log_prob(x) - log_det
            x = base.rsample((self.num_particles, len(context)))
            u, log_det = transform.forward_and_log_det(x, context)
            repeated = [a.expand(len(u), *a.shape).flatten(0, 1) for a in batch.data]
            log_model = batched(log_joint, u.flatten(0, 1), *repeated).unflatten(0, u.shape[:2])
            return (base.log_prob(x) - log_det - log_model).mean(0)

        def loss(batch: Simulations) -> Tensor:
            return torch.where(batch.finite, terms(batch), 0.0).sum() / batch.finite.sum().clamp_min(1)

        @torch.no_grad()
        def score() -> float:
            pieces = [_rows(held_out, slice(i, i + _PIECE)) for i in range(0, len(held_out.finite), _PIECE)]
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # the same draws at every check
                values = torch.cat([terms(piece) for piece in pieces])
            return float(torch.where(values.isnan(), torch.inf, values).mean())

        seed = int(torch.randint(2**31 - 1, ()))
        return train(
            parameters,
            partial(self._batches, source, stored),
            loss,
            score,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            patience=self.patience,
            owner=_OWNER,
            hint='Are flow and encoder finite at the data, and, for objective="elbo", the model\'s density at draws of '
            "the guide?",
            progress_bar=self.progress_bar,
            begin=begin,
        )

    def _batches(self, source: PriorPredictive, stored: Simulations | None, n: int) -> list[Simulations]:
        """Data sets for ``n`` steps; fresh ones are simulated all together."""
        if stored is None:
            fresh = source.draw(n * self.batch_size)
            return [_rows(fresh, slice(i * self.batch_size, (i + 1) * self.batch_size)) for i in range(n)]
        return [_rows(stored, torch.randint(len(stored.finite), (self.batch_size,))) for _ in range(n)]

    def _contexts(self, guide: AutoFlow, source: PriorPredictive, data: tuple[Tensor, ...]) -> Tensor:
        """Contexts ``(n, c)`` of data sets."""
        seen = batched(lambda *one: _seen(guide, source, one), *data)
        encoder: Any = guide._modules["standardized_encoder"]
        contexts = encoder(*seen)
        check_encoding_shape(tuple(contexts.shape), [tuple(a.shape[1:]) for a in seen], len(seen[0]))
        return contexts

    # -- posteriors ------------------------------------------------------------------------------------------------
    def _fitted(self) -> tuple[AutoFlow, PriorPredictive]:
        if self._trained is None:
            raise RuntimeError(f"{_OWNER}: the guide has not been trained: call fit(...) first.")
        return self._trained

    def run(self, *args: Any, **kwargs: Any) -> FlowPosterior:
        """The posterior of a data set, given as the model's arguments.

        With ``refine_steps`` the better of the amortised guide and the one trained further is returned, by their ELBO.

        :raises ValueError: for data from which the encoder makes nothing finite.
        :raises RuntimeError: before :meth:`fit`.
        """
        begin = time.perf_counter()
        guide, _ = self._fitted()
        own = guide.at_data(*args, **kwargs)
        if not own._modules["transform"].layers[0].context.isfinite().all():
            raise ValueError(
                f"{_OWNER}: the encoder's context of these data is not finite. Check that the data are; missing values "
                "go into a mask that data= gives to the encoder along with them."
            )
        with torch.enable_grad():  # calibration runs without; its trial needs gradients
            log_density = own._log_density(args, kwargs, mode=self._mode)
        self._mode = log_density.mode  # a trial that one data set is enough for
        history = History(np.zeros(0), stationary=True, seconds=time.perf_counter() - begin)
        posterior = _posterior_of(own, log_density, history)
        if not self.refine_steps:
            return posterior
        vi = FlowVI(
            self.model,
            self.flow,
            num_steps=self.refine_steps,
            learning_rate=0.2 * self.learning_rate,
            progress_bar=self.progress_bar,
        )
        try:
            with torch.enable_grad():
                history = vi._ascend(own, log_density)
        except RuntimeError as error:
            warnings.warn(f"{_OWNER}: the refinement failed, the amortised guide stands: {error}", stacklevel=2)
            return posterior
        history = history._replace(gradients=vi.num_particles * len(history.elbo), seconds=time.perf_counter() - begin)
        refined = _posterior_of(own, log_density, history)
        if refined._elbo_inside.value >= posterior._elbo_inside.value:
            return refined
        posterior.history = history
        return posterior

    def sample_posteriors(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws for many data sets at once of the latent and deterministic sites, ``(n, num_samples, *site_shape)``.

        Of the amortised guide, without refinement.

        :param num_samples: draws for each data set.
        :param args: the model's arguments as in :meth:`fit`, with an axis of ``n`` data sets in front of those which
            are data, or which ``arguments`` draws.
        :raises ValueError: for data without that axis, or not as many in every argument.
        :raises RuntimeError: before :meth:`fit`.
        """
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
        return self._draws(data, num_samples)

    @torch.no_grad()
    def _draws(self, data: tuple[Tensor, ...], num_samples: int) -> dict[str, Tensor]:
        guide, source = self._fitted()
        transform: Any = guide._modules["transform"]
        base: Any = guide.get_base_dist()
        step = max(_PIECE // num_samples, 1)

        def constrain(u: Tensor, *data: Tensor) -> dict[str, Tensor]:
            args, kwargs = source.call(data)
            return guide._log_density(args, kwargs, mode="loop")._constrain_one(u)

        parts = []
        for i in range(0, len(data[0]), step):
            piece = tuple(a[i : i + step] for a in data)
            context = self._contexts(guide, source, piece).unsqueeze(1)
            x = base.sample((len(context), num_samples))
            u = transform.forward_and_log_det(x, context)[0].flatten(0, 1)
            found = batched(constrain, u, *(a.repeat_interleave(num_samples, 0) for a in piece))
            parts.append({name: x.unflatten(0, (len(context), num_samples)) for name, x in found.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Writes the trained guide's weights, and the course of its training, to one safetensors file. No pickle."""
        guide, _ = self._fitted()
        assert self.history is not None
        tensors: dict[str, Any] = {f"history.{name}": getattr(self.history, name) for name in _CURVES}
        for part, module in _modules(guide).items():
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
        guide = self._guide(source)
        for part, module in _modules(guide).items():
            weights = {n.removeprefix(f"{part}."): x for n, x in tensors.items() if n.startswith(f"{part}.")}
            serialization.load_state_dict(module, weights)
        curves: dict[str, Any] = {name: tensors[f"history.{name}"].numpy() for name in _CURVES}
        self.history = FitHistory(**curves, **metadata["amortised"])
        self._trained, self._mode = (guide, source), None
        return self

    # -- simulation-based calibration ------------------------------------------------------------------------------
    def __call__(self, model: Any, args: tuple, kwargs: dict, num_draws: int) -> dict[str, Tensor]:
        """Draws of the posterior, as the ``infer`` of ``simulation_based_calibration``."""
        values = {name: torch.as_tensor(value).unsqueeze(0) for name, value in model.data.items()}
        return {name: x[0] for name, x in self.infer_many(values, args, kwargs, num_draws).items()}

    def infer_many(self, values: dict[str, Tensor], args: tuple, kwargs: dict, num_draws: int) -> dict[str, Tensor]:
        """Draws ``(n, num_draws, *site_shape)`` for ``n`` data sets, as ``simulation_based_calibration`` asks for them.

        :param values: of the observed sites, ``(n, *site_shape)``.
        :param args: the model's arguments, whose data are overridden.
        :param kwargs: its keyword arguments.
        """
        _, source = self._fitted()
        n = len(next(iter(values.values())))
        data = [a.expand(n, *a.shape) for a in source.data_of(args, kwargs)]
        for name, i in source.observed.items():
            data[source.varying.index(i)] = values[name].to(data[source.varying.index(i)].dtype)
        if not self.refine_steps:
            return self._draws(tuple(data), num_draws)
        rows = []
        for i in range(n):
            one = tuple(a[i : i + 1] for a in data)
            if not all(a.isfinite().all() for a in one):  # a failure of its own
                rows.append({name: x[0] for name, x in self._draws(one, num_draws).items()})
                continue
            own_args, own_kwargs = source.call(tuple(a[0] for a in one))
            rows.append(self.run(*own_args, **own_kwargs).sample((num_draws,)))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _modules(guide: AutoFlow) -> dict[str, Any]:
    """What is trained of a guide, by its name in files."""
    names = {"flow": "transform", "encoder": "standardized_encoder", "base": "learned_base"}
    found = {part: guide._modules.get(name) for part, name in names.items()}
    return {part: module for part, module in found.items() if module is not None}


def _rows(simulations: Simulations, rows: Any) -> Simulations:
    return pytree.tree_map(lambda a: a[rows], simulations)


def _seen(guide: AutoFlow, source: PriorPredictive, data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
