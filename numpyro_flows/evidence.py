"""Evidence from draws of a guide and of the posterior, and the comparison of models by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from numpyro_flows import _arviz


class Estimate(NamedTuple):
    """A Monte-Carlo estimate and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.standard_error:.3f}"


def importance(log_ratios: np.ndarray) -> Estimate:
    """Log evidence from draws of a guide: the log of the mean importance ratio.

    :param log_ratios: ``log p(data, u) - log q(u)`` at draws of ``q``, ``(n,)``.
    """
    n = len(log_ratios)
    value = float(logsumexp(log_ratios) - math.log(n))
    relative = np.exp(log_ratios - value)
    return Estimate(value, float(relative.std() / n**0.5))


def bridge(of_guide: np.ndarray, of_posterior: np.ndarray, *, tolerance: float = 1e-8) -> Estimate:
    """Log evidence by bridge sampling with the optimal bridge (Meng & Wong 1996, eq. 4.1).

    The error is that of Fruehwirth-Schnatter (2004, eq. 16), with autocorrelated draws of the posterior counted by
    their effective number.

    :param of_guide: ``log p(data, u) - log q(u)`` at draws of the guide ``q``, ``(n,)``.
    :param of_posterior: the same at draws of the posterior, ``(chains, draws)``.
    :param tolerance: of the iteration's log evidence.
    :raises RuntimeError: if the iteration does not settle: guide and posterior hardly overlap.
    """
    n2 = len(of_guide)
    l2, l1 = of_guide, of_posterior.ravel()
    centre = float(np.median(l1))
    n1 = min(len(l1), _arviz.ess(of_posterior - centre))
    log_s1, log_s2 = math.log(n1 / (n1 + n2)), math.log(n2 / (n1 + n2))
    log_r = 0.0
    for _ in range(1000):
        log_top = _log_mean(l2 - centre - np.logaddexp(log_s1 + l2 - centre, log_s2 + log_r))
        log_bottom = _log_mean(-np.logaddexp(log_s1 + l1 - centre, log_s2 + log_r))
        new = log_top - log_bottom
        if not math.isfinite(new):
            break
        log_r, moved = new, abs(new - log_r)
        if moved < tolerance:
            f1 = np.exp(l2 - centre - log_r - np.logaddexp(log_s1 + l2 - centre - log_r, log_s2))
            f2 = np.exp(-np.logaddexp(log_s1 + of_posterior - centre - log_r, log_s2))
            variance = _relative_variance(f1) / n2 + _relative_variance(f2) / _arviz.ess(f2)
            return Estimate(centre + log_r, math.sqrt(variance))
    raise RuntimeError(
        "log_evidence: the bridge between guide and posterior did not settle, for their draws hardly overlap. Fit a "
        "richer flow=, or reparametrise."
    )


def harmonic(log_ratios: np.ndarray) -> Estimate:
    """Log evidence as the negative log of the mean of ``phi / p`` over the posterior (McEwen et al. 2021, eq. 8).

    :param log_ratios: ``log phi(u) - log p(data, u)`` at draws of the posterior, ``(chains, draws)``, with a
        normalised density ``phi`` that is concentrated in the posterior.
    """
    log_mean = _log_mean(log_ratios.ravel())
    relative = np.exp(log_ratios - log_mean)
    return Estimate(-log_mean, float(relative.std() / _arviz.ess(relative) ** 0.5))


def compare(
    posteriors: Mapping[str, Any], prior: Mapping[str, float] | Sequence[float] | None = None, *, loo: bool = True
) -> Any:
    """Models side by side: evidence, Bayes factors, posterior probabilities, and ArviZ's cross-validation.

    ::

        compare({"linear": posterior, "quadratic": other.refine(...)})

    Log evidences are those of each posterior's ``log_evidence()``: by importance sampling of a ``FlowPosterior``, by
    bridge sampling of a refined one. Errors of the probabilities are by the delta method. LOO stands for the expected
    log predictive density of a new data point, by Pareto-smoothed leave-one-out cross-validation (Vehtari et al.
    2017); WAIC beside it, where ArviZ has it.

    :param posteriors: of models of the same data, ``{name: FlowPosterior or RefinedPosterior}``.
    :param prior: probabilities of the models before the data, equal unless given; any positive scale.
    :param loo: whether to compute ``elpd_loo``, which needs observed sites with a density. ``NaN`` for models whose
        likelihood is in factors.
    :returns: a pandas ``DataFrame``, the most probable model first, with columns ``log_evidence``,
        ``log_evidence_se``, ``log_bayes_factor`` (against the first row), ``log_bayes_factor_se``, ``probability``,
        ``probability_se``, ``pareto_k`` (of the guide), ``elpd_loo``, ``elpd_loo_se``, ``loo_warning`` and, where there
        is one, ``elpd_waic``.
    :raises TypeError: for anything but a dict of posteriors.
    :raises ValueError: for no posteriors, and priors that are not positive or of other models.
    """
    import pandas as pd

    if not isinstance(posteriors, Mapping):
        raise TypeError(f"compare: posteriors must be a dict {{name: posterior}}, but got {type(posteriors).__name__}.")
    if other := {name: type(p).__name__ for name, p in posteriors.items() if not hasattr(p, "log_evidence")}:
        raise TypeError(f"compare: posteriors must be of FlowPosterior or RefinedPosterior, but {other} are not.")
    names = list(posteriors)
    if not names:
        raise ValueError("compare: posteriors is empty: pass {name: posterior}.")
    log_prior = _log_prior(names, prior)
    evidences = [posteriors[name].log_evidence() for name in names]
    value, error = (np.array(column) for column in zip(*evidences, strict=True))
    log_joint = value + log_prior
    probability = np.exp(log_joint - logsumexp(log_joint))
    slopes = np.diag(probability) - np.outer(probability, probability)
    best = int(np.argmax(log_joint))
    table: dict[str, Any] = {
        "log_evidence": value,
        "log_evidence_se": error,
        "log_bayes_factor": value - value[best],
        "log_bayes_factor_se": np.where(np.arange(len(names)) == best, 0.0, np.hypot(error, error[best])),
        "probability": probability,
        "probability_se": np.sqrt(np.square(slopes) @ np.square(error)),
        "pareto_k": [posteriors[name].pareto_k for name in names],
    }
    if loo:
        for column, values in _predictive({name: posteriors[name] for name in names}).items():
            table[column] = values
    order = np.argsort(-log_joint, kind="stable")
    return pd.DataFrame(table, index=pd.Index(names, name="model")).iloc[order]


def _log_prior(names: list[str], prior: Mapping[str, float] | Sequence[float] | None) -> np.ndarray:
    if prior is None:
        return np.zeros(len(names))
    if isinstance(prior, Mapping):
        if set(prior) != set(names):
            raise ValueError(f"compare: prior must name the models {names}, but names {list(prior)}.")
        prior = [prior[name] for name in names]
    if len(prior) != len(names) or not all(p > 0 for p in prior):
        raise ValueError(f"compare: prior must give each of {names} a positive probability, but got {list(prior)}.")
    return np.log(np.asarray(prior, float) / sum(prior))


def _predictive(posteriors: dict[str, Any]) -> dict[str, list]:
    """Columns of ArviZ's estimates of predictive density."""
    columns: dict[str, list] = {"elpd_loo": [], "elpd_loo_se": [], "loo_warning": []}
    if _arviz.HAS_WAIC:
        columns["elpd_waic"] = []
    for posterior in posteriors.values():
        row = _arviz.predictive(posterior._weighted().to_arviz(log_likelihood=True))
        for column, values in columns.items():
            values.append(row[column])
    return columns


def _log_mean(x: np.ndarray) -> float:
    return float(logsumexp(x) - math.log(len(x)))


def _relative_variance(x: np.ndarray) -> float:
    return float(x.var() / x.mean() ** 2)
