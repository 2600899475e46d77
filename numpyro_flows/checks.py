"""Checks of arguments, the same wherever they are given."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_counts(owner: str, least: int = 1, **counts: Any) -> None:
    """Raises a ``ValueError`` that names the argument which is no integer of at least ``least``."""
    for name, value in counts.items():
        if not (isinstance(value, int | np.integer) and value >= least):
            raise ValueError(f"{owner}: {name} must be an integer of at least {least}, but got {value!r}.")
