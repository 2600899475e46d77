"""Maximum likelihood: a flow fitted to data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from pyroflows.distributions import Base, ConditionalFlowDistribution, FlowDistribution, distribution_of
from pyroflows.elbo import flow_matching, velocity_of
from pyroflows.transform_module import Compose, TransformModule
from pyroflows.transforms import ElementwiseAffine

_CHUNK = 50  # steps between two looks at the held-out data, the keyboard and the progress bar
_PIECE = 4096  # held-out points scored at a time


class FitHistory(NamedTuple):
    """The course of a fit, in nats a data point."""

    losses: np.ndarray  # of each step: negative log-likelihood of its batch, or the loss of flow matching
    validation: np.ndarray  # (checks, 2): steps done, negative log-likelihood of the held-out data
    best_step: int  # whose parameters were kept
    skipped: int  # steps whose gradient was not finite
    interrupted: bool
    seconds: float


def fit_density(
    flow: TransformModule,
    data: Tensor,
    *,
    base: dist.TorchDistribution | Base | None = None,
    context: Tensor | None = None,
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
    inverse pass a step: take a flow whose inverse is cheap.

    :param flow: the transform from the base to the data.
    :param data: points ``(n, dim)``.
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
    :raises ValueError: for data that are no finite matrix, or options with which nothing can be fitted.
    :raises RuntimeError: if no step had a finite gradient.
    """
    begin = time.perf_counter()
    check_fit(tuple(data.shape), bool(torch.isfinite(data).all()), objective, num_steps, batch_size, validation)
    n, dim = data.shape
    outer = None
    if standardize:
        outer = ElementwiseAffine(dim, *_standardization(data)).requires_grad_(False)
        data = outer.inverse_and_log_det(data)[0]
    offset = 0.0 if outer is None else float(outer.log_scale.sum())
    if base is None:
        base = dist.Normal(torch.zeros_like(data[0]), 1.0).to_event(1)
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
    learned = [*flow.parameters(), *(base.parameters() if isinstance(base, Base) else ())]
    parameters = [p for p in learned if p.requires_grad]
    adam = torch.optim.Adam(parameters, fused=True)

    def step(step_size: float) -> tuple[Tensor, bool]:
        rows = training[torch.randint(len(training), (batch_size,), device=data.device)]
        value = loss(rows)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        finite = bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        if finite:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.param_groups[0]["lr"] = step_size
            adam.step()
        return value.detach(), finite

    losses: list[float] = []
    checks: list[tuple[int, float]] = []
    skipped, interrupted = 0, False
    best = np.inf, 0, [p.detach().clone() for p in parameters]
    step_sizes = 0.5 * learning_rate * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))
    with tqdm(total=num_steps, desc="fit_density", disable=not progress_bar) as bar:
        try:
            while len(losses) < num_steps and (not held or len(losses) - best[1] < patience):
                done = [step(float(size)) for size in step_sizes[len(losses) : len(losses) + _CHUNK]]
                values, finite = zip(*done, strict=True)
                losses += torch.stack(values).tolist()
                skipped += finite.count(False)
                if skipped == len(losses):
                    raise RuntimeError("fit_density: no step had a finite gradient. Is the flow finite at the data?")
                if held:
                    checks.append((len(losses), score()))
                    if checks[-1][1] < best[0]:
                        best = checks[-1][1], len(losses), [p.detach().clone() for p in parameters]
                shown = {"held_out": f"{checks[-1][1]:.3f}"} if held else {}
                bar.set_postfix(loss=f"{np.nanmean(losses[-_CHUNK:]):.3f}", **shown, refresh=False)
                bar.update(len(done))
        except KeyboardInterrupt:
            interrupted = True
    if np.isfinite(best[0]):
        with torch.no_grad():
            for parameter, value in zip(parameters, best[2], strict=True):
                parameter.copy_(value)
    for parameter in parameters:
        parameter.grad = None
    kept = best[1] if np.isfinite(best[0]) else len(losses)
    history = FitHistory(
        np.asarray(losses),
        np.asarray(checks, float).reshape(-1, 2),
        kept,
        skipped,
        interrupted,
        time.perf_counter() - begin,
    )
    whole = flow if outer is None else Compose([flow, outer])
    density: Callable = FlowDistribution if context is None else ConditionalFlowDistribution
    return density(base, whole), history


def _standardization(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(dim,)``; 1 for a constant element."""
    scale = data.std(0, correction=0)
    return data.mean(0), torch.where(scale > 0, scale, torch.ones_like(scale))


def check_fit(
    shape: tuple[int, ...], finite: bool, objective: str, num_steps: int, batch_size: int, validation: float
) -> None:
    """Raises a ``ValueError`` that names the argument with which nothing can be fitted."""
    if len(shape) != 2 or shape[0] < 2 or not finite:
        raise ValueError(f"fit_density: data must be finite, of shape (n >= 2, dim), but have shape {shape}.")
    if objective not in ("likelihood", "flow_matching"):
        raise ValueError(f'fit_density: objective must be "likelihood" or "flow_matching", but got {objective!r}.')
    if num_steps < 1 or batch_size < 1:
        raise ValueError(
            f"fit_density: num_steps and batch_size must be at least 1, but got {num_steps} and {batch_size}."
        )
    if not 0 <= validation < 1 or round(shape[0] * validation) >= shape[0]:
        raise ValueError(f"fit_density: validation must be a share in [0, 1), but got {validation}.")
