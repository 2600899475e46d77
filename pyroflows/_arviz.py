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
    """Pareto-smoothed, normalised log-weights of log-ratios ``(n,)``, and Pareto k (Vehtari et al. 2024)."""
    log_ratios = np.asarray(log_ratios, float)
    with np.errstate(over="ignore"):  # of inverse weights of hopeless shapes, where the tail is that of an exact fit
        if _HAS_DATA_TREE:
            from arviz_stats.base import array_stats

            log_weights, k = array_stats.psislw(-log_ratios, axis=0)  # as of log-likelihoods
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


def plot(posterior: Any, var_names: list[str] | None, num_samples: int) -> Any:
    """The figure of ``FlowPosterior.plot``: ELBO by step, importance ratios, marginals of guide and resampled draws."""
    import matplotlib.pyplot as plt

    n = min(num_samples, posterior.num_draws)
    data = posterior.to_arviz(n)["posterior"]
    names = list(data.data_vars) if var_names is None else var_names
    unknown = [name for name in names if name not in data]
    if unknown:
        raise ValueError(f"plot: var_names {unknown} are not among {list(data.data_vars)}.")
    panels = [
        (f"{name}[{','.join(map(str, index))}]" if index else name, np.asarray(data[name])[(0, slice(None), *index)])
        for name in names
        for index in np.ndindex(*data[name].shape[2:])
    ][:34]
    weights = np.exp(np.asarray(posterior._psis[0][:n]))
    columns = 4
    rows = -(-(len(panels) + 2) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False, layout="constrained")
    elbo, ratios, *rest = axes.ravel()
    trace = posterior.history.elbo
    elbo.plot(trace, lw=0.5)
    elbo.set(title="ELBO", xlabel="step", ylim=np.nanquantile(trace, [0.05, 1.0]) if len(trace) else None)
    centred = posterior._log_ratios - np.median(posterior._log_ratios)
    ratios.hist(centred, bins=60)
    ratios.set(title=f"log weights, Pareto k {posterior.pareto_k:.2f}", yscale="log")
    for axis, (label, values) in zip(rest, panels, strict=False):
        low, high = np.quantile(values, [0.002, 0.998])
        bins = np.linspace(low, high if high > low else low + 1, 40)
        axis.hist(values, bins, density=True, alpha=0.5, label="guide")
        axis.hist(values, bins, weights=weights, density=True, histtype="step", label="importance-weighted")
        axis.set(title=label, yticks=[])
    for axis in rest[len(panels) :]:
        axis.set_axis_off()
    if panels:
        rest[0].legend(fontsize="x-small")
    return figure
