"""The theory of normalizing flows, as tests that can be read."""

import numpy as np
import pytest

from tests import backends
from tests.registry import BY_NAME, CASES, FLOWS, Case, H, param

PIECE = 8192  # points at a time


# the suite of parity has shown its densities to be those of torch
slow_in_jax = pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def flow_of(backend, case, dim, sd=0.3):
    flow = backend.build(case, dim)
    return backend.with_state(flow, backends.perturbed(backend.state(flow), sd, case.deep))


def log_density(backend, case, flow, y):
    """Change of variables: log p(y) = log p_base(x) + log |det dx/dy|, x = f^{-1}(y).

    Where the inverse is numerical and the grid fine, f stands in the place of f^{-1}: the law holds for both.
    """
    if len(y) > PIECE:  # many points in pieces of one size: they stay in the processor's cache, and the memory small
        padded = np.concatenate([y, np.repeat(y[-1:], -len(y) % PIECE, 0)]).reshape(-1, PIECE, y.shape[-1])
        return np.concatenate([log_density(backend, case, flow, piece) for piece in padded])[: len(y)]
    x, log_det = backend.run(flow, y, inverse=not case.numerical)
    return case.log_base(x) + log_det


def axis(backend, case, flow, dim, radius, num):
    """Points along one axis that hold next to all mass, and their weights in a sum."""
    if case.domain == "circle":
        return np.linspace(-np.pi, np.pi, num, endpoint=False), np.full(num, 2 * np.pi / num)
    x = np.random.default_rng(0).uniform(-radius, radius, (4000, dim))
    edge = 1.05 * np.abs(backend.run(flow, x, inverse=case.numerical)[0]).max()  # of a box of all draws in the radius
    t, step = np.linspace(-np.arcsinh(edge), np.arcsinh(edge), num, retstep=True)
    return np.sinh(t), np.cosh(t) * step  # wider apart further out, for heavy tails


def masses(dim):
    """Of the stacks two run by default: what their layers conserve, they do, since log-determinants add (below)."""
    return [param(c, slow=c.deep and c.name not in ("realnvp", "continuous")) for c in CASES if dim in c.dims]


@slow_in_jax
@pytest.mark.parametrize("case", masses(1))
def test_mass_is_conserved_in_one_dimension(backend, case):
    flow = flow_of(backend, case, 1)
    y, weights = axis(backend, case, flow, 1, 7.0, 40_001)
    assert np.exp(log_density(backend, case, flow, y[:, None])) @ weights == pytest.approx(1, abs=1e-4)


@slow_in_jax
@pytest.mark.parametrize("case", masses(2))
def test_mass_is_conserved_in_two_dimensions(backend, case):
    flow = flow_of(backend, case, 2, sd=0.2)
    num = 351
    along, weights = axis(backend, case, flow, 2, 5.5, num)
    y = np.stack(np.meshgrid(along, along), -1)
    density = np.exp(log_density(backend, case, flow, y.reshape(-1, 2))).reshape(num, num)
    assert weights @ density @ weights == pytest.approx(1, abs=1e-3)


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


OF_EVERY_KIND = ("realnvp", "ncsf", "iaf", "sylvester", "residual", "glow")


@pytest.mark.parametrize("case", [param(case, slow=case.name not in OF_EVERY_KIND) for case in FLOWS])
def test_an_elbo_never_exceeds_the_evidence(backend, case):
    """For every flow and any parameters: E_q[log p - log q] = log Z - KL(q || p) <= log Z (here 0: p is the base)."""
    n = 20_000
    x = case.draws(np.random.default_rng(1), (n, 3))
    for sd in (0.05, 0.3):
        y, log_det = backend.run(flow_of(backend, case, 3, sd), x)
        terms = case.log_base(y) - case.log_base(x) + log_det
        assert terms.mean() < 4 * terms.std() / n**0.5
        # and the evidence is recovered: E_q[p / q] = Z = 1
        ratios = np.exp(terms)
        assert abs(ratios.mean() - 1) < 5 * ratios.std() / n**0.5 + 1e-12 or sd > 0.1


@pytest.mark.parametrize("case", [c for c in CASES if c.domain == "circle"], ids=lambda case: case.name)
def test_maps_of_angles_have_no_seam(backend, case):
    """Full turns change nothing, and across the seam value and log-determinant go on without a jump."""
    flow = flow_of(backend, case, 3, sd=1.0)
    x = case.draws(np.random.default_rng(0), (50, 3))
    for inverse in (False, True):
        y, log_det = backend.run(flow, x, inverse=inverse)
        turned, turned_log_det = backend.run(flow, x + 2 * np.pi * np.array([1, -1, 2]), inverse=inverse)
        np.testing.assert_allclose(case.gap(turned, y), 0, atol=1e-10)
        np.testing.assert_allclose(turned_log_det, log_det, atol=1e-10)
        for i in range(3):
            below, above = x.copy(), x.copy()
            below[:, i], above[:, i] = np.pi - 1e-9, -np.pi + 1e-9
            (y, log_det), (there, there_log_det) = (backend.run(flow, side, inverse=inverse) for side in (below, above))
            np.testing.assert_allclose(case.gap(y, there), 0, atol=1e-5)
            np.testing.assert_allclose(log_det, there_log_det, atol=1e-5)


@pytest.mark.parametrize("raw", [0.2, 0.5, 2.0])
def test_tail_weights_are_inverse_tail_indices(backend, raw):
    """Of a normal, the map makes a y of P(|y| > r) ~ r^(-1/h): -dlog P / dlog r approaches 1/h. And -h undoes it."""
    tails = backend.pkg.univariate.TailTransform()
    weight = np.tanh(raw)
    x = np.array([-6.0, -5.9, 5.9, 6.0])[:, None]
    y, log_slope = (
        backend.numpy(part)[:, 0]
        for part in tails.forward_and_log_det(backend.array(x), backend.array(np.full((2, 1), raw)))
    )
    np.testing.assert_allclose(np.abs(y), np.sqrt(np.expm1(weight * x[:, 0] ** 2) / weight), rtol=1e-12)
    # log P(|y| > r) = log P(|x| > q): its slope is -phi(q) / Q(q) dq/dlog r, of which the first factor is nearly q
    from scipy.stats import norm

    slope = np.exp(norm.logpdf(x[:, 0]) - norm.logsf(np.abs(x[:, 0])) - log_slope) * np.abs(y)
    np.testing.assert_allclose(slope, 1 / weight, rtol=1.1 / 5.9**2)
    light, _ = tails.forward_and_log_det(backend.array(y[:, None]), backend.array(np.full((2, 1), -raw)))
    np.testing.assert_allclose(backend.numpy(light), x, rtol=1e-12)


def test_tail_maps_stay_finite_and_invert_far_out_in_float32(backend):
    tails = backend.pkg.univariate.TailTransform()
    rng = np.random.default_rng(0)
    params = backend.array(np.float32(3 * rng.normal(size=(2, 10_000))))
    for edge in (1.0, 100.0, 1e18):
        x = np.float32(rng.uniform(-edge, edge, 10_000))
        for there, back in [("forward", "inverse"), ("inverse", "forward")]:
            y, log_det = getattr(tails, f"{there}_and_log_det")(backend.array(x), params)
            again, opposite = getattr(tails, f"{back}_and_log_det")(y, params)
            assert np.isfinite(backend.numpy(y)).all() and np.isfinite(backend.numpy(log_det)).all()
            if edge <= 100:
                np.testing.assert_allclose(backend.numpy(again), x, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(backend.numpy(log_det), -backend.numpy(opposite), atol=1e-3)


@slow_in_jax
def test_heavy_tails_are_learned_by_a_tail_map_only(backend):
    """Student's t of two degrees of freedom by maximum likelihood: KL(p || q) with and without a tail map."""
    from scipy.stats import t

    # quantiles instead of draws: the same data for both packages, extremes as rare as they are
    data = t(2).ppf((np.arange(1000) + 0.5) / 1000)[:, None]
    entropy = -t(2).logpdf(data).mean()
    heavy, scaled, spline = (
        -backend.fit(backend.build(BY_NAME[name], 1), data, steps=500, rate=0.01) - entropy
        for name in ("ttf", "realnvp", "nsf")
    )
    assert heavy < 0.02 < 0.3 < min(scaled, spline)


UNBIASED = Case("unbiased", lambda p, dim, **k: p.transforms.Residual(dim, H, log_det="unbiased", exact_terms=1, **k))


def residual_twins(backend):
    """The same residual map with its exact log-determinant and with the unbiased one."""
    exact = flow_of(backend, BY_NAME["residual-layer"], 3, sd=1.0)
    # the largest Jacobian that the bound allows, -0.7 along one direction, so that many terms of the series count
    state = {name: np.abs(value) + 5 * ("bias" in name) for name, value in backend.state(exact).items()}
    last = max(name for name in state if name.endswith("weight"))
    exact = backend.with_state(exact, {**state, last: -state[last]})
    unbiased = backend.with_state(backend.build(UNBIASED, 3), backend.state(exact))
    assert exact.log_det_is_exact and not unbiased.log_det_is_exact
    return exact, unbiased


def test_stochastic_log_det_is_unbiased(backend):
    exact, unbiased = residual_twins(backend)
    x = np.random.default_rng(0).normal(size=(4, 3))
    key = {}
    if backend.name == "jax":
        key["key"] = backend.jax.random.key(0)
    else:
        backend.torch.manual_seed(0)
    mean, error = (backend.numpy(a) for a in unbiased.log_det_estimate(backend.array(x), 6000, **key))
    log_det = backend.run(exact, x)[1]
    assert (log_det < -0.5).all() and (error > 0).all() and (error < 0.05).all()
    assert (np.abs(mean - log_det) < 4 * error).all()


def test_stochastic_log_det_has_an_unbiased_gradient(backend):
    """By every parameter and by the input, through the Neumann series of Chen et al. 2019."""
    exact, unbiased = residual_twins(backend)
    x = np.random.default_rng(0).normal(size=(32, 3))

    def gradient(flow):
        by_params, by_x = backend.gradients(flow, x, None, False)
        return np.concatenate([by_x.ravel(), *(by_params[name].ravel() for name in sorted(by_params))])

    if backend.name == "torch":
        backend.torch.manual_seed(0)
    draws = []
    for n in range(300):
        if backend.name == "jax":
            unbiased = unbiased.with_key(backend.jax.random.key(n))
        draws.append(gradient(unbiased))
    error = np.std(draws, 0, ddof=1) / len(draws) ** 0.5
    assert (error > 0).mean() > 0.9
    assert (np.abs(np.mean(draws, 0) - gradient(exact)) < 4.5 * error + 1e-9).all()


def test_noise_of_a_log_det_is_drawn_anew(backend):
    """Torch draws from its generator; jax has a pure function of key and input, whose key can be renewed."""
    _, flow = residual_twins(backend)
    x = np.random.default_rng(0).normal(size=(2, 3))
    if backend.name == "torch":
        backend.torch.manual_seed(0)
    (y, first), (_, second) = backend.run(flow, x), backend.run(flow, x)
    if backend.name == "torch":
        assert (first != second).any()
        backend.torch.manual_seed(0)
        np.testing.assert_array_equal(backend.run(flow, x)[1], first)
    else:
        np.testing.assert_array_equal(first, second)
        assert (np.abs(backend.run(flow, x + 1e-7)[1] - first) > 1e-3).any()  # another input, another noise
        renewed = flow.with_key(backend.jax.random.PRNGKey(1))
        assert (backend.run(renewed, x)[1] != first).any()
        np.testing.assert_array_equal(backend.run(renewed, x)[0], y)


@pytest.mark.parametrize("sd", [0.3, 1.0, 3.0])
def test_block_autoregressive_image_is_the_whole_space(backend, sd):
    """Its tails are linear: with bounded activations the image is nearly a box, which truncates a posterior."""
    flow = flow_of(backend, BY_NAME["block-autoregressive"], 2, sd)
    corners = np.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    near, far = (backend.run(flow, scale * corners)[0] for scale in (1e3, 1e6))
    np.testing.assert_allclose(far / near, 1e3, rtol=0.2)
    back, _ = backend.run(flow, 1e3 * corners, inverse=True)
    np.testing.assert_allclose(backend.run(flow, back)[0], 1e3 * corners, rtol=1e-9)


def test_lipschitz_constant_of_a_residual_map_is_below_its_bound(backend):
    for sd in (1.0, 10.0):
        flow = flow_of(backend, BY_NAME["residual-layer"], 5, sd)
        x = np.random.default_rng(0).normal(size=(200, 5)) * 3
        jacobian = backend.jacobian(flow, x, None, False) - np.eye(5)
        assert np.linalg.norm(jacobian, 2, axis=(1, 2)).max() < 0.9
    weight = np.random.default_rng(0).normal(size=(40, 30))
    module = __import__(f"{backend.pkg.__name__}.transforms.residual", fromlist=["spectral_bound"])
    bound = float(module.spectral_bound(backend.array(weight)))
    assert 1 <= bound / np.linalg.norm(weight, 2) < 1.005
