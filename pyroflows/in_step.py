"""Searches in threads of their own that wait for each other, so that points are evaluated in batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

_BATCHES = 16, 4, 1  # points evaluated together: few sizes, for a density is recorded for each


class _Stopped(Exception):
    """No more points are evaluated."""


class InStep:
    """Evaluates the points that several searches ask for once all of them wait, as few batches.

    A small operation takes torch about as long for sixteen points as for one. The model runs in the calling thread
    alone, and which points share a batch does not depend on the threads' speed. What ends an evaluation (an error of
    the model, or Ctrl-C) ends all searches.

    :param target: an ``initialization.Target`` with ``values_and_grads``.
    """

    def __init__(self, target: Any):
        self.target, self.searching, self.stopped = target, 0, False
        self.asked: dict[int, tuple[str, np.ndarray]] = {}
        self.answers: dict[int, Any] = {}
        self.change = threading.Condition()

    def run(self, search: Callable[[Any, np.ndarray], Any], starts: Sequence[np.ndarray]) -> list[Any]:
        """``search(target, start)`` of every start, at least one."""
        self.searching = len(starts)
        with ThreadPoolExecutor(len(starts)) as threads:
            searches = [threads.submit(self._search, search, number, start) for number, start in enumerate(starts)]
            try:
                while asked := self._all_asked():
                    answers = self._answer(asked)
                    with self.change:
                        self.answers = answers
                        self.change.notify_all()
            finally:
                with self.change:
                    self.stopped = True
                    self.change.notify_all()
        return [each.result() for each in searches]

    # -- in the searches' threads ----------------------------------------------------------------------------------
    def _search(self, search: Callable[[Any, np.ndarray], Any], number: int, start: np.ndarray) -> Any:
        ask = partial(partial, self._ask, number)
        try:
            return search(self.target._replace(value_and_grad=ask("slope"), hessian=ask("hessian")), start)
        finally:
            with self.change:
                self.searching -= 1
                self.change.notify_all()

    def _ask(self, number: int, what: str, point: np.ndarray) -> Any:
        with self.change:
            self.asked[number] = what, point
            self.change.notify_all()
            self.change.wait_for(lambda: number in self.answers or self.stopped)
            if number not in self.answers:
                raise _Stopped
            return self.answers.pop(number)

    # -- in the calling thread -------------------------------------------------------------------------------------
    def _all_asked(self) -> dict[int, tuple[str, np.ndarray]]:
        with self.change:
            self.change.wait_for(lambda: len(self.asked) == self.searching)
            asked, self.asked = dict(sorted(self.asked.items())), {}
            return asked

    def _answer(self, asked: dict[int, tuple[str, np.ndarray]]) -> dict[int, Any]:
        answers: dict[int, Any] = {n: self.target.hessian(x) for n, (what, x) in asked.items() if what == "hessian"}
        left = [n for n in asked if n not in answers]
        while left:
            size = next(size for size in _BATCHES if 2 * len(left) > size)
            chunk, left = left[:size], left[size:]
            if size == 1:
                answers[chunk[0]] = self.target.value_and_grad(asked[chunk[0]][1])
                continue
            points = np.stack([asked[n][1] for n in chunk])
            filled = np.concatenate([points, np.repeat(points[-1:], size - len(points), 0)])
            answers |= zip(chunk, zip(*self.target.values_and_grads(filled), strict=True), strict=False)
        return answers
