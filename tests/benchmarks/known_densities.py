"""Densities of which everything is known: exact log-density and sampler, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

LOG_2PI = math.log(2 * math.pi)


class Target(NamedTuple):
    dim: int
    sample: Callable[[np.random.Generator, int], np.ndarray]  # n draws (n, dim)
    log_prob: Callable[[np.ndarray], np.ndarray]  # (..., dim) -> (...)


def _normal(x: np.ndarray, loc: np.ndarray | float = 0.0, scale: np.ndarray | float = 1.0) -> np.ndarray:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * LOG_2PI


def _mixture_of_normals(centres: np.ndarray, sd: float) -> Target:
    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        return centres[rng.integers(len(centres), size=n)] + sd * rng.standard_normal((n, centres.shape[1]))

    def log_prob(x: np.ndarray) -> np.ndarray:
        squares = ((x[..., None, :] - centres) ** 2).sum(-1)
        constant = centres.shape[1] * (math.log(sd) + 0.5 * LOG_2PI) + math.log(len(centres))
        return logsumexp(-0.5 * squares / sd**2, axis=-1) - constant

    return Target(centres.shape[1], sample, log_prob)


def eight_gaussians(radius: float = 4.0, sd: float = 0.4) -> Target:
    """Equal normals on a circle."""
    angles = 2 * np.pi * np.arange(8) / 8
    return _mixture_of_normals(radius * np.stack([np.cos(angles), np.sin(angles)], -1), sd)


def two_moons(sd: float = 0.1, num_nodes: int = 128) -> Target:
    """Two half circles under normal noise.

    The angle is drawn among ``num_nodes`` evenly spaced ones, a quarter of ``sd`` apart: as good as continuous, and the
    density is a finite sum, exact.
    """
    angles = np.pi * (np.arange(num_nodes) + 0.5) / num_nodes
    upper = np.stack([np.cos(angles), np.sin(angles)], -1)
    lower = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], -1)
    return _mixture_of_normals(np.concatenate([upper, lower]) - [0.5, 0.25], sd)


def rings(radii: tuple[float, ...] = (1.0, 2.0, 3.0), sd: float = 0.1) -> Target:
    """Concentric rings of equal mass: uniform angles, normal radii (whose mass below zero is 1e-23)."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        radius = np.abs(np.asarray(radii)[rng.integers(len(radii), size=n)] + sd * rng.standard_normal(n))
        angle = rng.uniform(0, 2 * np.pi, n)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)

    def log_prob(x: np.ndarray) -> np.ndarray:
        radius = np.sqrt((x**2).sum(-1))
        terms = logsumexp(_normal(radius[..., None], np.asarray(radii), sd), axis=-1) - math.log(len(radii))
        return terms - LOG_2PI - np.log(np.maximum(radius, 1e-300))

    return Target(2, sample, log_prob)


def checkerboard(half_width: float = 4.0) -> Target:
    """Uniform on every other square of a board of four by four."""
    size = half_width / 2

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        row, column = rng.integers(4, size=n), rng.integers(2, size=n)
        corner = np.stack([2 * column + row % 2, row], -1)
        return size * (corner + rng.uniform(size=(n, 2))) - half_width

    def log_prob(x: np.ndarray) -> np.ndarray:
        square = np.floor((x + half_width) / size)
        on = ((square >= 0) & (square < 4)).all(-1) & (square.sum(-1) % 2 == 0)
        return np.where(on, -math.log(8 * size**2), -np.inf)

    return Target(2, sample, log_prob)


def funnel(dim: int = 5, sd: float = 1.5) -> Target:
    """Neal's funnel: the log-variance of all other elements is the first one, a normal."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        x = rng.standard_normal((n, dim))
        return np.concatenate([sd * x[:, :1], np.exp(0.5 * sd * x[:, :1]) * x[:, 1:]], -1)

    def log_prob(x: np.ndarray) -> np.ndarray:
        return _normal(x[..., 0], 0.0, sd) + _normal(x[..., 1:], 0.0, np.exp(0.5 * x[..., :1])).sum(-1)

    return Target(dim, sample, log_prob)


def banana(dim: int = 20, bend: float = 1.0, sd: float = 0.5) -> Target:
    """Pairs of a standard normal and a normal about its square."""

    def sample(rng: np.random.Generator, n: int) -> np.ndarray:
        x = rng.standard_normal((n, dim // 2, 2))
        return np.stack([x[..., 0], bend * (x[..., 0] ** 2 - 1) + sd * x[..., 1]], -1).reshape(n, dim)

    def log_prob(x: np.ndarray) -> np.ndarray:
        first, second = x[..., ::2], x[..., 1::2]
        return (_normal(first) + _normal(second, bend * (first**2 - 1), sd)).sum(-1)

    return Target(dim, sample, log_prob)


TARGETS: dict[str, Target] = {
    "two_moons": two_moons(),
    "rings": rings(),
    "checkerboard": checkerboard(),
    "eight_gaussians": eight_gaussians(),
    "funnel": funnel(),
    "banana": banana(),
}
