"""Maximum likelihood: a flow fitted to data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyroflows.checks import check_counts
from pyroflows.distributions import (
    Base,
    ConditionalFlowDistribution,
    FlowDistribution,
    distribution_of,
    standard_base,
)
from pyroflows.elbo import flow_matching, velocity_of
from pyroflows.training import FitHistory, train
from pyroflows.transform_module import Compose, TransformModule
from pyroflows.transforms import ElementwiseAffine

NOTHING_TO_TRAIN = "fit_density: flow and base have no parameters to train; such a flow is used as it is."
_PIECE = 4096  # held-out points scored at a time


def fit_density(
    flow: TransformModule,
    data: Any,
    *,
    base: dist.TorchDistribution | Base | None = None,
    context: Any = None,
    objective: str = "likelihood",
    num_steps: int = 5000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    validation: float = 0.1,
    patience: int = 1000,
    standardize: bool = True,
    progress_bar: bool = True,
) -> tuple[FlowDistribution | ConditionalFlowDistribution, FitHistory]:
    """Fits ``flow`` to ``data`` by maximum likelihood: Adam, whose step size falls to zero along a cosine.

    A share of the data is held out. The parameters of the best held-out likelihood are kept, and the fit ends when it
    has not improved for ``patience`` steps. Steps whose gradient is not finite are skipped and counted. Ctrl-C ends the
    fit and keeps the best so far. Torch trains ``flow`` and ``base`` in place; jax leaves them as they are. Costs an
    inverse pass a step: take a flow whose inverse is cheap. The first of 250 steps or more is recorded as a graph which
    the others run: what flow and base hold besides their parameters is taken as it was then.

    :param flow: the transform from the base to the data.
    :param data: points ``(n, dim)``, an array or nested lists. They and their contexts are taken in the dtype of the
        flow's parameters, and on their device.
    :param base: distribution of vectors ``(dim,)``, or a :class:`Base`, learned too; standard normal unless given.
    :param context: their contexts ``(n, context_dim)``, for a flow that takes one.
    :param objective: ``"likelihood"``, or ``"flow_matching"`` for a continuous flow (see ``elbo.flow_matching``). The
        held-out data are scored by their likelihood in both.
    :param num_steps: gradient steps at most.
    :param batch_size: points a step, drawn with replacement.
    :param learning_rate: Adam's first step size.
    :param validation: share of the data that is held out; with 0 the last parameters are kept.
    :param patience: steps without a better held-out likelihood after which the fit ends.
    :param standardize: fits the data at zero mean and unit variance, and adds that affine map to the flow.
    :param progress_bar: shows a bar with the losses and the time left.
    :returns: the density (a :class:`ConditionalFlowDistribution` with a context), and the course of the fit.
    :raises TypeError: for a factory in place of a flow or a base.
    :raises ValueError: for data that are no finite matrix, options with which nothing can be fitted, a flow, a base or
        contexts of another size, and if there are no parameters to train.
    :raises RuntimeError: if no step had a finite gradient, and under ``torch.inference_mode``.
    """
    begin = time.perf_counter()
    check_fit(flow, base, objective, num_steps, batch_size, learning_rate, patience)
    learned = [*flow.parameters(), *(base.parameters() if isinstance(base, Base) else ())]
    parameters = [p for p in learned if p.requires_grad]
    if not parameters:
        raise ValueError(NOTHING_TO_TRAIN)
    like = learned[0]
    data = torch.as_tensor(data, dtype=like.dtype, device=like.device)
    context = None if context is None else torch.as_tensor(context, dtype=like.dtype, device=like.device)
    check_data(data, context, base, validation)
    n, dim = data.shape
    outer = None
    if standardize:
        outer = ElementwiseAffine(dim, *_standardization(data)).requires_grad_(False)
        data = outer.inverse_and_log_det(data)[0]
    offset = 0.0 if outer is None else float(outer.log_scale.sum())
    if base is None:
        base = standard_base(dim, like=data)
    held = round(n * validation)
    order = torch.randperm(n, device=data.device)
    held_out, training = order[:held], order[held:]

    def log_prob(rows: Tensor) -> Tensor:
        x, log_det = flow.inverse_and_log_det(data[rows], None if context is None else context[rows])
        return distribution_of(base).log_prob(x) + log_det

    def loss(rows: Tensor) -> Tensor:
        if objective == "flow_matching":
            return flow_matching(flow, distribution_of(base), data[rows], None if context is None else context[rows])
        return offset - log_prob(rows).mean()

    @torch.no_grad()
    def score() -> float:
        return offset - float(torch.cat([log_prob(rows) for rows in held_out.split(_PIECE)]).mean())

    if objective == "flow_matching":
        velocity_of(flow)

    def batches(n: int) -> Iterator[Tensor]:
        return (training[torch.randint(len(training), (batch_size,), device=data.device)] for _ in range(n))

    history = train(
        parameters,
        batches,
        loss,
        score if held else None,
        num_steps=num_steps,
        learning_rate=learning_rate,
        patience=patience,
        owner="fit_density",
        hint="Is the flow finite at the data?",
        progress_bar=progress_bar,
        begin=begin,
    )
    whole = flow if outer is None else Compose([flow, outer])
    density: Callable = FlowDistribution if context is None else ConditionalFlowDistribution
    return density(base, whole), history


def _standardization(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(dim,)``; 1 for a constant element."""
    scale = data.std(0, correction=0)
    return data.mean(0), torch.where(scale > 0, scale, torch.ones_like(scale))


def check_fit(
    flow: Any,
    base: Any,
    objective: str,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    patience: int,
) -> None:
    """Raises an error that names the argument with which nothing can be fitted."""
    for name, value, kind, wanted in (
        ("flow", flow, TransformModule, "a TransformModule"),
        ("base", base, torch.distributions.Distribution | Base | None, "a distribution or a Base"),
    ):
        if not isinstance(value, kind):
            raise TypeError(
                f"fit_density: {name} must be {wanted}, but got {getattr(value, '__name__', type(value).__name__)}. "
                "A class or factory must be called with a dimension."
            )
    if objective not in ("likelihood", "flow_matching"):
        raise ValueError(f'fit_density: objective must be "likelihood" or "flow_matching", but got {objective!r}.')
    check_counts("fit_density", num_steps=num_steps, batch_size=batch_size, patience=patience)
    if not learning_rate > 0:
        raise ValueError(f"fit_density: learning_rate must be positive, but got {learning_rate}.")


def check_data(data: Tensor, context: Tensor | None, base: Any, validation: float) -> None:
    """Raises a ``ValueError`` that names what does not go with what."""
    shape = tuple(data.shape)
    if len(shape) != 2 or shape[0] < 2 or not torch.isfinite(data).all():
        raise ValueError(f"fit_density: data must be finite, of shape (n >= 2, dim), but have shape {shape}.")
    if context is not None and (tuple(context.shape[:-1]) != shape[:1] or not torch.isfinite(context).all()):
        raise ValueError(
            f"fit_density: context must be finite, of shape (n, context_dim) with n = {shape[0]} as in data, "
            f"but has shape {tuple(context.shape)}."
        )
    event_shape = shape[1:] if base is None else tuple(distribution_of(base).event_shape)
    if event_shape != shape[1:]:
        raise ValueError(
            f"fit_density: base must be of vectors as the data are, of event shape {shape[1:]}, but has {event_shape}. "
            "Build it with their dim; independent elements are made a vector by .to_event(1)."
        )
    if not 0 <= validation < 1 or round(shape[0] * validation) >= shape[0]:
        raise ValueError(
            f"fit_density: validation must be a share in [0, 1) which leaves data to train on, but got {validation}."
        )
