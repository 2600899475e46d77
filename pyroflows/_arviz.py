"""The few calls of ArviZ, the same on 0.x (InferenceData) and 1.x (DataTree)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

with warnings.catch_warnings():  # 0.23 announces 1.x on import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

_HAS_DATA_TREE = int(az.__version__.split(".")[0]) >= 1
HAS_WAIC = hasattr(az, "waic")  # not in 1.x


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


def from_groups(
    groups: dict[str, dict[str, np.ndarray]],
    attrs: dict[str, Any],
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
) -> Any:
    """InferenceData (0.x) or DataTree (1.x) of ``{group: {name: values}}``, with ``attrs`` on the posterior.

    Values have axes ``(chain, draw, ...)``, but for ``observed_data``, which has none of them. Empty groups are left
    out.
    """
    groups = {name: group for name, group in groups.items() if group}
    if unknown := [name for name in dims or {} if not any(name in group for group in groups.values())]:
        raise ValueError(f"to_arviz: dims names {unknown}, but the sites are {list(groups['posterior'])}.")
    if _HAS_DATA_TREE:
        data = az.from_dict(groups, coords=coords, dims=dims)
    else:
        data = az.from_dict(**groups, coords=coords, dims=dims)
    data["posterior"].attrs.update(attrs)
    return data


def from_datasets(groups: dict[str, dict[str, np.ndarray]]) -> Any:
    """The same, of groups of any name."""
    if _HAS_DATA_TREE:
        return az.from_dict(groups)
    datasets = {name: az.dict_to_dataset(group) for name, group in groups.items()}
    return az.InferenceData(**datasets, warn_on_custom_groups=False)


def summary(data: Any, kind: str = "stats") -> Any:
    """ArviZ's table of the posterior."""
    return az.summary(data, kind=kind)


def diagnostics(draws: np.ndarray) -> dict[str, float]:
    """The worst R-hat, bulk and tail ESS over the elements of ``(chains, draws, dim)``."""
    table = az.summary(from_groups({"posterior": {"u": draws}}, {}), kind="diagnostics", round_to="none")
    columns = {"r_hat": table["r_hat"].max(), "ess_bulk": table["ess_bulk"].min(), "ess_tail": table["ess_tail"].min()}
    return {name: float(value) for name, value in columns.items()}


def ess(draws: np.ndarray) -> float:
    """Effective sample size for the mean of ``(chains, draws)``; all of them, where it is not defined."""
    if draws.shape[1] < 4 or not np.ptp(draws) > 0:
        return float(draws.size)
    if _HAS_DATA_TREE:
        from arviz_stats.base import array_stats

        found = array_stats.ess(draws, method="mean", chain_axis=0, draw_axis=1)
    else:
        found = az.ess(np.asarray(draws, float), method="mean")
    return float(found) if np.isfinite(found) else float(draws.size)


def predictive(data: Any) -> dict[str, Any]:
    """ArviZ's estimates of the expected log predictive density: LOO, and WAIC where there is one.

    The observed sites count as one, each observation for itself. ``NaN`` where there is none.
    """
    row: dict[str, Any] = {"elpd_loo": np.nan, "elpd_loo_se": np.nan, "loo_warning": False, "elpd_waic": np.nan}
    if "log_likelihood" not in _groups(data):
        return row
    sites = [np.asarray(x) for x in data["log_likelihood"].data_vars.values()]
    pointwise = np.concatenate([x.reshape(*x.shape[:2], -1) for x in sites], -1)
    one = from_groups({"posterior": {"lp": pointwise.sum(-1)}, "log_likelihood": {"y": pointwise}}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told in the table
        loo = az.loo(one)
        row["elpd_loo"], row["elpd_loo_se"] = _elpd(loo, "loo")
        row["loo_warning"] = bool(loo.warning)
        if HAS_WAIC:
            row["elpd_waic"] = _elpd(az.waic(one), "waic")[0]
    return row


def _elpd(found: Any, kind: str) -> tuple[float, float]:
    if _HAS_DATA_TREE:
        return float(found.elpd), float(found.se)
    return float(found[f"elpd_{kind}"]), float(found["se"])


def _groups(data: Any) -> list[str]:
    return list(data.children) if _HAS_DATA_TREE else list(data.groups())


def plot_chains(data: Any, var_names: str | list[str] | None) -> Any:
    """The figure of ``RefinedPosterior.plot``: marginals by chain, and draws in their order."""
    import matplotlib.pyplot as plt

    panels = _panels(data["posterior"], var_names)[:17]
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(10, 1.6 * len(panels)), squeeze=False, layout="constrained", width_ratios=(1, 2)
    )
    for (density, trace), (label, values) in zip(axes, panels, strict=True):
        bins = np.histogram_bin_edges(values, 40)
        for chain in values:
            density.hist(chain, bins, density=True, histtype="step")
            trace.plot(chain, lw=0.4)
        density.set(title=label, yticks=[])
        trace.set(title=label)
    return figure


def _panels(data: Any, var_names: str | list[str] | None) -> list[tuple[str, np.ndarray]]:
    """Label and draws ``(chains, draws)`` of every element of the variables."""
    names = list(data.data_vars) if var_names is None else [var_names] if isinstance(var_names, str) else var_names
    unknown = [name for name in names if name not in data]
    if unknown:
        raise ValueError(f"plot: var_names {unknown} are not among {list(data.data_vars)}.")
    return [
        (f"{name}[{','.join(map(str, index))}]" if index else name, np.asarray(data[name], float)[(..., *index)])
        for name in names
        for index in np.ndindex(*data[name].shape[2:])
    ]


def plot(posterior: Any, var_names: str | list[str] | None, num_samples: int) -> Any:
    """The figure of ``FlowPosterior.plot``: ELBO by step, importance ratios, marginals of guide and resampled draws."""
    import matplotlib.pyplot as plt

    n = min(num_samples, posterior.num_draws)
    panels = [(label, x[0]) for label, x in _panels(posterior.to_arviz(n)["posterior"], var_names)][:34]
    weights = np.exp(np.asarray(posterior._psis[0][:n]))
    columns = 4
    rows = -(-(len(panels) + 2) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False, layout="constrained")
    elbo, ratios, *rest = axes.ravel()
    trace = posterior.history.elbo
    known = trace[np.isfinite(trace)]
    elbo.plot(trace, lw=0.5)
    elbo.set(title="ELBO", xlabel="step", ylim=np.quantile(known, [0.05, 1.0]) if len(known) else None)
    inside = posterior._log_ratios[np.isfinite(posterior._log_ratios)]
    ratios.hist(inside - (np.median(inside) if len(inside) else 0.0), bins=60)
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


def plot_pair(data: Any, var_names: str | list[str] | None) -> Any:
    """The figure of ``plot(kind="pair")``: ArviZ's, of every element of the variables against every other."""
    import matplotlib.pyplot as plt

    labels = dict(_panels(data["posterior"], var_names))
    if len(labels) < 2:
        raise ValueError(f"plot: a pair takes two elements at least, but there is {list(labels)}: use kind='summary'.")
    one = from_groups({"posterior": labels}, {})
    if _HAS_DATA_TREE:
        import arviz_plots

        return arviz_plots.plot_pair(one, marginal=True, backend="matplotlib").viz["figure"].item()
    axes = az.plot_pair(one, kind="scatter", marginals=True, scatter_kwargs={"alpha": 0.2, "s": 4})
    return plt.gcf() if axes is None else np.ravel(axes)[0].figure
