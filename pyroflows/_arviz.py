"""The few calls of ArviZ, the same on 0.x (InferenceData) and 1.x (DataTree)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

with warnings.catch_warnings():  # 0.23 announces 1.x on import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

_HAS_DATA_TREE = int(az.__version__.split(".")[0]) >= 1


def psis(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log-weights (normalised to sum to one) of log-ratios ``(n,)``, and Pareto k (Vehtari et al. 2024)."""
    log_ratios = np.asarray(log_ratios, float)
    if _HAS_DATA_TREE:
        from arviz_stats.base import array_stats

        log_weights, k = array_stats.psislw(log_ratios, axis=0)
    else:
        log_weights, k = az.psislw(log_ratios)
    return np.asarray(log_weights), float(k)


def from_groups(groups: dict[str, dict[str, np.ndarray]], attrs: dict[str, Any]) -> Any:
    """InferenceData (0.x) or DataTree (1.x) of ``{group: {name: values}}``, with ``attrs`` on the posterior.

    Values have axes ``(chain, draw, ...)``, but for ``observed_data``, which has none of them.
    """
    if _HAS_DATA_TREE:
        data = az.from_dict(groups)
        data["posterior"].attrs.update(attrs)
    else:
        data = az.from_dict(**groups)
        data["posterior"].attrs.update(attrs)
    return data


def summary(data: Any, **kwargs: Any) -> Any:
    """ArviZ's table of the posterior."""
    return az.summary(data, kind="stats", **kwargs)
