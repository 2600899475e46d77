"""Posteriors with reference draws and targets with a known evidence, as twins in Pyro and in NumPyro.

This module is free of backends: where the data are, how they become the arguments of a model, and the reference draws.
``pyro_models`` and ``numpyro_models`` hold one model per density, each with the accessors ``get``, ``get_target``,
``available`` and ``available_targets``. Twins have the same latent sites, supports, arguments and normalising
constants, and no site's support depends on another site's value.

The data lie in the folder named by the environment variable ``PYROFLOWS_DATA`` (sub-folders ``posteriordb`` and
``targets``), or else in ``shared`` beside the repository.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Sites = list[tuple[str, str, tuple[int, ...]]]  # (site, name in Stan, shape)


@dataclass(frozen=True)
class Reference:
    """Gold-standard posterior draws.

    :param names: Stan's name of each scalar, such as ``theta[1]``.
    :param draws: ``(draws, scalars)``.
    :param mean: means ``(scalars,)`` over the full reference run, of which ``draws`` is a part.
    :param sd: standard deviations ``(scalars,)`` over the full reference run.
    """

    names: list[str]
    draws: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


@dataclass(frozen=True)
class Posterior:
    """A model with its data.

    :param model: the model, called as ``model(*args, **kwargs)``.
    :param args: constants and covariates.
    :param kwargs: observed data.
    :param mapping: which sites (sample or deterministic) make up the reference's scalars, in their order.
    :param dimension: number of unconstrained latents.
    :param reference: reference draws, or ``None``.
    :param log_evidence: log evidence of the model, or ``None`` where unknown.
    """

    name: str
    model: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    mapping: Sites
    dimension: int
    reference: Reference | None = None
    log_evidence: float | None = None


def flatten(samples: Mapping[str, Any], mapping: Sites) -> tuple[list[str], np.ndarray]:
    """Names of the scalars, and draws as a matrix ``(draws, scalars)``.

    :param samples: dict from site to array or tensor ``(draws, *shape)``; size-one axes between them are dropped.
    :raises ValueError: if a site's shape is not the mapping's.
    """
    names: list[str] = []
    columns = []
    for site, name, shape in mapping:
        value = samples[site]
        value = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if value.size != len(value) * math.prod(shape):
            raise ValueError(f"flatten: site {site!r} has shape {value.shape}, but (draws, *{shape}) is needed.")
        names += [f"{name}[{','.join(str(i + 1) for i in index)}]" if shape else name for index in np.ndindex(*shape)]
        columns.append(value.reshape(len(value), -1))
    return names, np.concatenate(columns, axis=1)


def data_path() -> Path:
    """The folder that holds ``posteriordb`` and ``targets``."""
    return Path(os.environ.get("PYROFLOWS_DATA") or Path(__file__).parents[3] / ".." / "shared").resolve()


def available() -> list[str]:
    """Names of the posteriors whose data are present."""
    return [name for name in POSTERIORS if (data_path() / "posteriordb" / name / "data.json").is_file()]


def available_targets() -> list[str]:
    """Names of the targets whose data are present, or that need none."""
    return [
        name for name, target in TARGETS.items() if not target.file or (data_path() / "targets" / target.file).is_file()
    ]


def load(name: str, models: Mapping[str, Callable], array: Callable[[np.ndarray], Any]) -> Posterior:
    """A posterior with reference draws.

    :param name: one of ``POSTERIORS``.
    :param models: the backend's models by name.
    :param array: makes an array of the backend, in its default floating-point type.
    :raises KeyError: for an unknown name.
    :raises FileNotFoundError: if the data are absent.
    """
    if name not in POSTERIORS:
        raise KeyError(f"unknown posterior {name!r}; known are {list(POSTERIORS)}")
    folder = data_path() / "posteriordb" / name
    data = json.loads(_present(folder / "data.json").read_text())
    info = json.loads(_present(folder / "info.json").read_text())
    with np.load(_present(folder / "reference.npz")) as file:
        moments = (np.asarray(info["reference"][key]) for key in ("mean", "sd"))
        reference = Reference(file["names"].tolist(), file["draws"], *moments)
    dimension = info["dimension_unconstrained"]
    return _build(name, POSTERIORS[name](data), models, array, dimension=dimension, reference=reference)


def load_target(name: str, models: Mapping[str, Callable], array: Callable[[np.ndarray], Any]) -> Posterior:
    """A target with a known log evidence; as ``load``, with a name of ``TARGETS``."""
    if name not in TARGETS:
        raise KeyError(f"unknown target {name!r}; known are {list(TARGETS)}")
    target = TARGETS[name]
    problem = target.prepare(_present(data_path() / "targets" / target.file) if target.file else Path())
    dimension = sum(math.prod(shape) for shape in problem.sites.values())
    return _build(name, problem, models, array, dimension=dimension, log_evidence=target.log_evidence)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is absent: set PYROFLOWS_DATA to the folder that holds the data (posteriordb and targets)."
        )
    return path


@dataclass(frozen=True)
class _Problem:
    """What a backend needs to build a posterior: the model's name, its data, and the sites to report."""

    model: str
    args: tuple
    sites: Mapping[str, tuple[int, ...]]
    observed: dict[str, np.ndarray]


def _problem(model: str, args: Sequence, sites: Mapping[str, tuple[int, ...]], **observed: np.ndarray) -> _Problem:
    return _Problem(model, tuple(args), sites, observed)


def _build(name: str, problem: _Problem, models: Mapping, array: Callable, **fields: Any) -> Posterior:
    return Posterior(
        name=name,
        model=models[problem.model],
        args=tuple(array(value) if isinstance(value, np.ndarray) else value for value in problem.args),
        kwargs={key: array(value) for key, value in problem.observed.items()},
        mapping=[(site, site, shape) for site, shape in problem.sites.items()],
        **fields,
    )


# -- posteriors: the contents of data.json -> arguments of the model --------------------------------------------------
def _floats(*columns: Any) -> np.ndarray:
    """A vector, or a matrix from several columns."""
    arrays = [np.asarray(column, dtype=float) for column in columns]
    return arrays[0] if len(arrays) == 1 else np.stack(np.broadcast_arrays(*arrays), axis=-1)


def _kilpisjarvi(data: dict) -> _Problem:
    args = _floats(data["x"]), data["pmualpha"], data["psalpha"], data["pmubeta"], data["psbeta"]
    return _problem("kilpisjarvi", args, {"alpha": (), "beta": (), "sigma": ()}, y=_floats(data["y"]))


def _nes(data: dict) -> _Problem:
    age = np.asarray(data["age_discrete"])
    predictors = [data["real_ideo"], data["race_adj"], age == 2, age == 3, age == 4]
    predictors += [data[key] for key in ("educ1", "gender", "income")]
    X = _floats(1.0, *predictors)
    return _problem("nes", [X], {"beta": (9,), "sigma": ()}, y=_floats(data["partyid7"]))


def _kidscore(data: dict) -> _Problem:
    hs, iq = _floats(data["mom_hs"]), _floats(data["mom_iq"])
    X = _floats(1.0, hs, iq, hs * iq)
    return _problem("kidscore_interaction", [X], {"beta": (4,), "sigma": ()}, y=_floats(data["kid_score"]))


def _eight_schools(model: str) -> Callable[[dict], _Problem]:
    def prepare(data: dict) -> _Problem:
        sites = {"theta": (data["J"],), "mu": (), "tau": ()}
        return _problem(model, (data["J"], _floats(data["sigma"])), sites, y=_floats(data["y"]))

    return prepare


def _ar(data: dict) -> _Problem:
    y, order = _floats(data["y"]), data["K"]
    lags = _floats(*(y[order - k : len(y) - k] for k in range(1, order + 1)))  # lags[t, k - 1] = y[t - k]
    return _problem("autoregression", [lags], {"alpha": (), "beta": (order,), "sigma": ()}, y=y[order:])


def _garch(data: dict) -> _Problem:
    sites = {"mu": (), "alpha0": (), "alpha1": (), "beta1": ()}
    return _problem("garch11", [float(data["sigma1"])], sites, y=_floats(data["y"]))


def _gp_poisson(data: dict) -> _Problem:
    sites = {"rho": (), "alpha": (), "f": (data["N"],)}
    return _problem("gp_poisson", [_floats(data["x"])], sites, k=_floats(data["k"]))


def _lotka_volterra(data: dict) -> _Problem:
    times = np.concatenate([[0.0], _floats(data["ts"])])
    y = np.concatenate([_floats(data["y_init"])[None], _floats(data["y"])])
    return _problem("lotka_volterra", [times], {"theta": (4,), "z_init": (2,), "sigma": (2,)}, y=y)


def _hmm(data: dict) -> _Problem:
    return _problem("hmm", [], {"theta1": (2,), "theta2": (2,), "mu": (2,)}, y=_floats(data["y"]))


def _gauss_mix(data: dict) -> _Problem:
    return _problem("gauss_mix", [data["N"]], {"mu": (2,), "sigma": (2,), "theta": ()}, y=_floats(data["y"]))


def _diamonds(data: dict) -> _Problem:
    X = _floats(data["X"])[:, 1:]
    sites = {"b": (X.shape[1],), "Intercept": (), "sigma": ()}
    return _problem("diamonds", [X - X.mean(0)], sites, y=_floats(data["Y"]))


POSTERIORS: dict[str, Callable[[dict], _Problem]] = {
    "arK-arK": _ar,
    "diamonds-diamonds": _diamonds,
    "eight_schools-eight_schools_centered": _eight_schools("eight_schools_centered"),
    "eight_schools-eight_schools_noncentered": _eight_schools("eight_schools_noncentered"),
    "garch-garch11": _garch,
    "gp_pois_regr-gp_pois_regr": _gp_poisson,
    "hmm_example-hmm_example": _hmm,
    "hudson_lynx_hare-lotka_volterra": _lotka_volterra,
    "kidiq-kidscore_interaction": _kidscore,
    "kilpisjarvi_mod-kilpisjarvi": _kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": _gauss_mix,
    "nes2000-nes": _nes,
}


# -- targets with a known evidence ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Target:
    log_evidence: float
    prepare: Callable[[Path], _Problem]
    file: str = ""


def _logistic(X: np.ndarray, y: np.ndarray, scale: float) -> _Problem:
    X = np.insert(X, 0, 1.0, axis=1)
    return _problem("logistic_regression", (X, scale), {"w": (X.shape[1],)}, y=_floats(y))


def _credit(path: Path) -> _Problem:
    with np.load(path) as data:
        return _logistic(data["X"] / data["X"].std(0), data["y"], scale=10.0)


def _sonar(path: Path) -> _Problem:
    with np.load(path) as data:
        X, y = data["X"], data["y"]
    sd = X.std(0)
    return _logistic((X - X.mean(0)) / np.where(sd > 0, sd, 1.0), y, scale=1.0)


def _seeds(path: Path) -> _Problem:
    data = json.loads(path.read_text())
    sites = {"a0": (), "a1": (), "a2": (), "a12": (), "tau": (), "b": (len(data["r"]),)}
    return _problem("seeds", [_floats(data[key]) for key in ("x1", "x2", "n")], sites, r=_floats(data["r"]))


def _radiata_pine(column: int) -> Callable[[Path], _Problem]:
    def prepare(path: Path) -> _Problem:
        table = np.loadtxt(path)
        X = _floats(1.0, table[:, column] - table[:, column].mean())
        prior = np.array([3000.0, 185.0]), np.array([0.06, 6.0]), 3.0, 2 * 300.0**2
        return _problem("conjugate_regression", (X, *prior), {"tau": (), "beta": (2,)}, y=table[:, 1])

    return prepare


def _pima(columns: list[int], precision: float) -> Callable[[Path], _Problem]:
    def prepare(path: Path) -> _Problem:
        table = np.loadtxt(path)
        return _logistic(table[:, columns], table[:, 0], precision**-0.5)

    return prepare


_PIMA_1, _PIMA_2 = [1, 2, 5, 6], [1, 2, 5, 6, 7]

TARGETS: dict[str, _Target] = {
    "funnel": _Target(0.0, lambda _: _problem("funnel", [10], {"v": (), "x": (9,)})),
    "credit": _Target(-585.098, _credit, "credit.npz"),
    "seeds": _Target(-73.406, _seeds, "seeds.json"),
    "sonar": _Target(-108.384, _sonar, "sonar.npz"),
    "radiata_pine-1": _Target(-310.12829, _radiata_pine(2), "radiata_pine.dat"),
    "radiata_pine-2": _Target(-301.70460, _radiata_pine(3), "radiata_pine.dat"),
    "pima-1-precision_0.01": _Target(-257.2326, _pima(_PIMA_1, 0.01), "pima_indian.dat"),
    "pima-2-precision_0.01": _Target(-259.8574, _pima(_PIMA_2, 0.01), "pima_indian.dat"),
    "pima-1-precision_1": _Target(-247.3035, _pima(_PIMA_1, 1.0), "pima_indian.dat"),
    "pima-2-precision_1": _Target(-247.5621, _pima(_PIMA_2, 1.0), "pima_indian.dat"),
}
