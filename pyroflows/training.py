"""What trainings share: Adam that passes by wild gradients, and the loop that keeps the best held-out score."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from pyroflows.graphs import recorded_step

MEMORY, LONGEST = 25, 10.0  # gradients are at most so many times as long as the median of so many before
RECORD_FROM = 250  # steps: to record one takes as long as is gained on 110 to 250
CHUNK = 50  # steps between two looks at the held-out data, the keyboard and the progress bar


class FitHistory(NamedTuple):
    """The course of a fit, in nats a data point, or a data set."""

    losses: np.ndarray  # of each step
    validation: np.ndarray  # (checks, 2): steps done, loss of what is held out
    best_step: int  # whose parameters were kept
    skipped: int  # steps whose gradient was not finite
    interrupted: bool
    seconds: float


class Ascent:
    """Adam on all parameters as one vector, which a step of many small ones would wait for; skips what is not finite.

    :param parameters: what is trained, in place, and changed by nothing else meanwhile.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = list(parameters)
        self.places = [p.detach() for p in self.parameters]  # their memory
        self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        parts = self.vector.split([p.numel() for p in self.parameters])
        self.parts = [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]
        self.adam = torch.optim.Adam([self.vector], fused=True)
        self.norms = torch.full_like(self.vector[:1], torch.nan).repeat(MEMORY)  # of the last gradients

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient of a loss, as one vector."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients])

    @torch.no_grad()
    def update(self, gradient: Tensor, step_size: float) -> Tensor:
        """Makes a step down the gradient, and returns whether it was skipped: the gradient not finite.

        One that is far longer than the last ones were is shortened: a single draw far out would end the training, for
        Adam divides by the root of the mean square of thousands of steps. Of the first, the length alone is noted.
        """
        norm, typical = torch.linalg.vector_norm(gradient), self.norms.nanmedian()
        skip = ~(norm < torch.inf)
        limit = (LONGEST * typical / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
        self.vector.grad = gradient * limit
        self.adam.param_groups[0]["lr"] = step_size
        # as gradient scalers do it: Adam skips the step, and nothing waits for a GPU
        self.adam.found_inf = (skip | torch.isnan(typical)).float()  # type: ignore[attr-defined]
        self.adam.step()
        self.norms = torch.where(skip, self.norms, torch.cat([self.norms[1:], norm[None]]))
        torch._foreach_copy_(self.places, self.parts)
        return skip


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The values of parameters."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def settle(parameters: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
    """Puts ``values``, if any, into the places of parameters, and forgets their gradients."""
    for parameter in parameters:
        parameter.grad = None
    for parameter, value in zip(parameters, values or (), strict=bool(values)):
        parameter.copy_(value)


class Gradient:
    """Loss of a batch and its gradient: by a graph, if it can be recorded, where that has been of the same shapes.

    :param loss: ``loss(batch)``, of a batch that may be a tree of tensors and of what never changes.
    :param ascent: whose parameters the gradient is of.
    """

    def __init__(self, loss: Callable[[Any], Tensor], ascent: Ascent):
        self.loss, self.ascent = loss, ascent
        self.graph: Callable[..., tuple[Tensor, ...]] | None = None
        self.kind: Any = None  # of the batches which it takes

    def __call__(self, batch: Any) -> tuple[Tensor, ...]:
        if self.graph is not None:
            tensors, rest = _parts(batch)
            if self.kind == _kind(tensors, rest):
                return self.graph(*tensors)
        return self._plain(batch)

    def _plain(self, batch: Any) -> tuple[Tensor, Tensor]:
        value = self.loss(batch)
        return value.detach(), self.ascent.gradient(value)

    def record(self, batches: Sequence[Any]) -> None:
        """Records the first of several batches, and compares at the last."""
        (tensors, rest), (others, last) = _parts(batches[0]), _parts(batches[-1])
        if _kind(tensors, rest) != _kind(others, last):
            return

        def of(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            given = iter(tensors)
            return self._plain(
                pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, batches[0])
            )

        self.graph = recorded_step(of, self.ascent.vector.device, tensors, others)
        self.kind = _kind(tensors, rest)


def _parts(batch: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a batch, and what else it consists of."""
    leaves, tree = pytree.tree_flatten(batch)
    return [a for a in leaves if isinstance(a, Tensor)], (tree, [a for a in leaves if not isinstance(a, Tensor)])


def _kind(tensors: Sequence[Tensor], rest: Any) -> Any:
    return [(a.shape, a.stride(), a.dtype, a.device) for a in tensors], rest


@torch.enable_grad()
def train(
    parameters: Sequence[Tensor],
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any], Tensor],
    score: Callable[[], float] | None,
    *,
    num_steps: int,
    learning_rate: float,
    patience: int,
    owner: str,
    hint: str,
    progress_bar: bool,
    begin: float,
) -> FitHistory:
    """Trains by Adam, whose step size falls to zero along a cosine, and keeps the parameters of the best score.

    Ctrl-C ends the training and keeps what it has reached.

    :param parameters: what is trained, in place.
    :param batches: ``batches(n)`` gives what the loss takes in each of ``n`` steps.
    :param loss: ``loss(batch)`` of one step.
    :param score: of what is held out; ``None`` if nothing is: then the last parameters are kept.
    :param patience: steps without a better score after which the training ends.
    :param hint: what to ask oneself where no gradient is finite.
    :param begin: when the fit began, by ``time.perf_counter``.
    :raises RuntimeError: if no step had a finite gradient, and under ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{owner}: torch.inference_mode() allows for no gradients: call it outside.")
    ascent = Ascent(parameters)
    gradient = Gradient(loss, ascent)

    def step(batch: Any, step_size: float) -> Tensor:
        """Loss, and whether the step was skipped."""
        value, slope = gradient(batch)
        return torch.stack([value, ascent.update(slope, step_size).to(value)])

    losses: list[float] = []
    checks: list[tuple[int, float]] = []
    skipped, interrupted = 0, False
    best = np.inf, 0, copies(parameters)
    step_sizes = 0.5 * learning_rate * (1 + np.cos(np.pi * np.arange(num_steps) / num_steps))
    with tqdm(total=num_steps, desc=owner, disable=not progress_bar) as bar:
        try:
            while len(losses) < num_steps and (score is None or len(losses) - best[1] < patience):
                sizes = step_sizes[len(losses) : len(losses) + CHUNK]
                given = list(batches(len(sizes)))
                if not losses and num_steps >= RECORD_FROM:
                    gradient.record(given)
                done = [step(batch, float(size)) for batch, size in zip(given, sizes, strict=True)]
                values, skips = torch.stack(done).T.tolist()
                losses += values
                skipped += int(sum(skips))
                if skipped == len(losses):
                    raise RuntimeError(f"{owner}: no step had a finite gradient. {hint}")
                if score is not None:
                    checks.append((len(losses), score()))
                    if checks[-1][1] < best[0]:
                        best = checks[-1][1], len(losses), copies(parameters)
                shown = {"held_out": f"{checks[-1][1]:.3f}"} if checks else {}
                bar.set_postfix(loss=f"{np.nanmean(losses[-CHUNK:]):.3f}", **shown, refresh=False)
                bar.update(len(sizes))
        except KeyboardInterrupt:
            interrupted = True
    found = bool(np.isfinite(best[0]))
    settle(parameters, best[2] if found else None)
    return FitHistory(
        np.asarray(losses),
        np.asarray(checks, float).reshape(-1, 2),
        best[1] if found else len(losses),
        skipped,
        interrupted,
        time.perf_counter() - begin,
    )
