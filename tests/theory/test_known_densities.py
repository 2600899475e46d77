"""The benchmark's densities are densities, and their samplers draw from them."""

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import known_densities as targets


@pytest.mark.parametrize("name", ["two_moons", "rings", "checkerboard", "eight_gaussians"])
def test_a_density_of_the_plane_integrates_to_one_and_is_that_of_the_draws(name):
    target = targets.TARGETS[name]
    edge, n = 6.4, 400
    axis = (np.arange(n) + 0.5) / n * 2 * edge - edge  # no node on an edge of the board
    log_density = np.concatenate([target.log_prob(np.stack(np.meshgrid([a], axis), -1)[..., 0, :]) for a in axis])
    density, area = np.exp(log_density), (2 * edge / n) ** 2
    assert density.sum() * area == pytest.approx(1, abs=1e-4)
    entropy = -np.where(density > 0, density * np.where(density > 0, log_density, 0), 0).sum() * area
    draws = target.sample(np.random.default_rng(0), 40_000)
    scores = -target.log_prob(draws)
    assert scores.mean() == pytest.approx(entropy, abs=4 * scores.std() / len(draws) ** 0.5 + 1e-3)
    points = np.stack(np.meshgrid(axis, axis), -1)
    grid = density.reshape(n, n).T
    for moment in (lambda x: x[..., 0], lambda x: x[..., 0] ** 2, lambda x: x[..., 0] * x[..., 1], lambda x: x[..., 1]):
        drawn = moment(draws)
        assert drawn.mean() == pytest.approx((moment(points) * grid).sum() * area, abs=4 * drawn.std() / 200 + 1e-3)


@pytest.mark.parametrize("make", [targets.funnel, targets.banana])
def test_a_triangular_density_integrates_to_one_and_is_that_of_the_draws(make):
    """In the coordinates of its own standard normals, where the grid is fine everywhere."""
    target, n = make(2), 400
    axis, step = np.linspace(-8, 8, n, retstep=True)
    u = np.stack(np.meshgrid(axis, axis), -1)
    if make is targets.funnel:
        x = np.stack([1.5 * u[..., 0], np.exp(0.75 * u[..., 0]) * u[..., 1]], -1)
        volume = 1.5 * np.exp(0.75 * u[..., 0])
    else:
        x = np.stack([u[..., 0], u[..., 0] ** 2 - 1 + 0.5 * u[..., 1]], -1)
        volume = np.full(u.shape[:-1], 0.5)
    assert (np.exp(target.log_prob(x)) * volume).sum() * step**2 == pytest.approx(1, abs=1e-6)
    for dim in (2, 4, 20):  # entropy: of the standard normals, and the mean of the log-volume
        target = make(dim)
        scores = -target.log_prob(target.sample(np.random.default_rng(0), 20_000))
        entropy = dim * stats.norm().entropy()
        entropy += np.log(1.5) if make is targets.funnel else dim / 2 * np.log(0.5)
        assert scores.mean() == pytest.approx(entropy, abs=4 * scores.std() / len(scores) ** 0.5)
