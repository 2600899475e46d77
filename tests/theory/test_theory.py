"""The theory of normalizing flows, as tests that can be read."""

import math

import numpy as np
import pytest

from tests import backends
from tests.registry import BY_NAME, CASES, FLOWS

PIECE = 8192  # points at a time


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def flow_of(backend, case, dim, sd=0.3):
    flow = backend.build(case, dim)
    return backend.with_state(flow, backends.perturbed(backend.state(flow), sd, case.deep))


def log_density(backend, flow, y):
    """Change of variables: log p(y) = log N(x; 0, I) + log |det dx/dy|, x = f^{-1}(y)."""
    if len(y) > PIECE:  # many points in pieces of one size: they stay in the processor's cache, and the memory small
        padded = np.concatenate([y, np.repeat(y[-1:], -len(y) % PIECE, 0)]).reshape(-1, PIECE, y.shape[-1])
        return np.concatenate([log_density(backend, flow, piece) for piece in padded])[: len(y)]
    x, log_det = backend.run(flow, y, inverse=True)
    return -0.5 * (x**2).sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi) + log_det


def far_enough(backend, flow, dim, radius):
    """Half the width of a box that holds the images of all base draws within ``radius``."""
    x = np.random.default_rng(0).uniform(-radius, radius, (4000, dim))
    return 1.05 * np.abs(backend.run(flow, x)[0]).max()


@pytest.mark.parametrize("case", [c for c in CASES if c.min_dim == 1], ids=lambda case: case.name)
def test_mass_is_conserved_in_one_dimension(backend, case):
    flow = flow_of(backend, case, 1)
    edge = far_enough(backend, flow, 1, 7.0)
    y, step = np.linspace(-edge, edge, 40_001, retstep=True)
    assert np.exp(log_density(backend, flow, y[:, None])).sum() * step == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mass_is_conserved_in_two_dimensions(backend, case):
    flow = flow_of(backend, case, 2, sd=0.2)
    edge = far_enough(backend, flow, 2, 5.5)
    axis, step = np.linspace(-edge, edge, 701, retstep=True)
    y = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    assert np.exp(log_density(backend, flow, y)).sum() * step**2 == pytest.approx(1, abs=1e-3)


def test_log_dets_of_a_composition_add(backend):
    first, second = flow_of(backend, BY_NAME["coupling-affine"], 4), flow_of(backend, BY_NAME["lu"], 4)
    x = np.random.default_rng(0).normal(size=(5, 4))
    y, log_det_first = backend.run(first, x)
    z, log_det_second = backend.run(second, y)
    both, log_det = backend.run(backend.pkg.Compose([first, second]), x)
    np.testing.assert_allclose(both, z)
    np.testing.assert_allclose(log_det, log_det_first + log_det_second)


@pytest.mark.parametrize("name", ["autoregressive-spline", "autoregressive-affine", "triangular"])
def test_autoregressive_jacobians_are_triangular(backend, name):
    flow = flow_of(backend, BY_NAME[name], 5)
    jacobian = backend.jacobian(flow, np.random.default_rng(0).normal(size=(3, 5)), None, False)
    if name == "autoregressive-affine":  # hands its elements on in reversed order
        jacobian = jacobian[:, ::-1]
    assert (np.triu(jacobian, 1) == 0).all() and (np.diagonal(jacobian, axis1=1, axis2=2) > 0).all()
    assert (np.abs(np.tril(jacobian, -1)).max(0)[np.tril_indices(5, -1)] > 0).all()


@pytest.mark.parametrize("name", ["coupling-affine", "coupling-spline"])
def test_coupling_jacobians_hold_an_identity_and_a_diagonal_block(backend, name):
    flow = flow_of(backend, BY_NAME[name], 5)
    jacobian = backend.jacobian(flow, np.random.default_rng(0).normal(size=(3, 5)), None, False)
    moved, kept = jacobian[:, :3], jacobian[:, 3:]  # the blocks come out exchanged
    np.testing.assert_array_equal(kept, np.broadcast_to(np.eye(5)[:2], kept.shape))
    within = moved[:, :, 2:]
    assert (within * (1 - np.eye(3)) == 0).all() and (np.diagonal(within, axis1=1, axis2=2) > 0).all()


def test_maf_and_iaf_are_each_others_inverse(backend):
    iaf, maf = (flow_of(backend, BY_NAME[name], 4) for name in ("iaf", "maf"))
    named = {name.removeprefix("transform."): value for name, value in backend.state(maf).items()}
    iaf = backend.with_state(iaf, named)
    x = np.random.default_rng(0).normal(size=(5, 4))
    for a, b in zip(backend.run(maf, x), backend.run(iaf, x, inverse=True), strict=True):
        np.testing.assert_array_equal(a, b)
    assert maf.passes == (12, 3) and iaf.passes == (3, 12)


def test_coupling_log_det_is_the_sum_of_scales_however_deep_the_conditioner(backend):
    affine = backend.pkg.univariate.Affine()
    for hidden in ((8,), (8,) * 6):
        from tests.registry import Case

        case = Case("deep", lambda p, dim, h=hidden, **k: p.transforms.Coupling(dim, affine, h, **k))
        flow = flow_of(backend, case, 4)
        x = np.random.default_rng(0).normal(size=(5, 4))
        y, log_det = backend.run(flow, x)
        scales = np.diagonal(backend.jacobian(flow, x, None, False)[:, :2, 2:], axis1=1, axis2=2)
        np.testing.assert_allclose(log_det, np.log(scales).sum(-1))
        assert flow.passes == (1, 1)


@pytest.mark.parametrize("name", ["nice", "permutation"])
def test_volume_preserving_layers_have_no_log_det(backend, name):
    flow = flow_of(backend, BY_NAME["coupling-additive" if name == "nice" else name], 4, sd=1.0)
    assert (backend.run(flow, np.random.default_rng(0).normal(size=(5, 4)))[1] == 0).all()


@pytest.mark.parametrize("case", FLOWS, ids=lambda case: case.name)
def test_an_elbo_never_exceeds_the_evidence(backend, case):
    """For every flow and any parameters: E_q[log p - log q] = log Z - KL(q || p) <= log Z (here 0: p is a normal)."""
    n = 20_000
    x = np.random.default_rng(1).normal(size=(n, 3))
    for sd in (0.05, 0.3):
        y, log_det = backend.run(flow_of(backend, case, 3, sd), x)
        terms = -0.5 * (y**2).sum(-1) + 0.5 * (x**2).sum(-1) + log_det
        assert terms.mean() < 4 * terms.std() / n**0.5
        # and the evidence is recovered: E_q[p / q] = Z = 1
        ratios = np.exp(terms)
        assert abs(ratios.mean() - 1) < 5 * ratios.std() / n**0.5 + 1e-12 or sd > 0.1
