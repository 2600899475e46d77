"""Structured linear maps against the dense one and numpy; their cost; normalisation layers; images."""

import itertools

import numpy as np
import pytest

from tests import backends
from tests.registry import BY_NAME, Case

LINEAR = ["lu", "plu", "triangular", "qr", "householder-map", "orthogonal-exp", "orthogonal-cayley", "low-rank"]
LINEAR += ["dense", "act-norm", "conv1x1", "permutation", "squeeze"]


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def trained(backend, case, dim, sd=0.5):
    flow = backend.build(case, dim)
    return backend.with_state(flow, backends.perturbed(backend.state(flow), sd, case.deep))


def matrix_and_shift(backend, flow, dim):
    y, log_det = backend.run(flow, np.concatenate([np.zeros((1, dim)), np.eye(dim)]))
    return (y[1:] - y[0]).T, y[0], log_det


@pytest.mark.parametrize("name", LINEAR)
def test_structured_maps_agree_with_the_dense_one_of_their_matrix(backend, name):
    case = BY_NAME[name]
    dim = case.dim
    flow = trained(backend, case, dim)
    matrix, shift, log_det = matrix_and_shift(backend, flow, dim)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(matrix)[1], atol=1e-10)
    dense = backend.with_state(backend.build(BY_NAME["dense"], dim), {"weight": matrix, "bias": shift})
    x = np.random.default_rng(0).normal(size=(7, dim))
    for inverse, (value, expected) in itertools.product((False, True), enumerate(("values", "log-dets"))):
        ours, reference = (backend.run(f, x, inverse=inverse)[value] for f in (flow, dense))
        np.testing.assert_allclose(ours, reference, atol=1e-10 * max(1, np.abs(reference).max()), err_msg=expected)
    np.testing.assert_allclose(backend.run(flow, x, inverse=True)[0], np.linalg.solve(matrix, (x - shift).T).T)


@pytest.mark.parametrize("name", ["householder-map", "orthogonal-exp", "orthogonal-cayley"])
@pytest.mark.parametrize("sd", [0.3, 3.0, 1000.0])
def test_rotations_are_orthogonal_and_keep_the_orientation(backend, name, sd):
    matrix, _, log_det = matrix_and_shift(backend, trained(backend, BY_NAME[name], 6, sd), 6)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(6), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1) and (log_det == 0).all()


def test_orthogonal_maps_are_those_of_their_skew_matrix(backend):
    linalg = pytest.importorskip("scipy.linalg")
    for sd in (0.1, 1.0, 10.0):
        flow = trained(backend, BY_NAME["orthogonal-exp"], 6, sd)
        lower = np.tril(backend.state(flow)["skew"], -1)
        np.testing.assert_allclose(
            matrix_and_shift(backend, flow, 6)[0], linalg.expm(lower - lower.T), atol=1e-13 * max(1, 10 * sd)
        )
        cayley = backend.with_state(backend.build(BY_NAME["orthogonal-cayley"], 6), backend.state(flow))
        expected = np.linalg.solve(np.eye(6) + lower - lower.T, np.eye(6) - lower + lower.T)
        np.testing.assert_allclose(matrix_and_shift(backend, cayley, 6)[0], expected, atol=1e-12)


def test_householder_is_the_product_of_its_reflections(backend):
    flow = trained(backend, BY_NAME["householder-map"], 5)
    expected = np.eye(5)
    for v in backend.state(flow)["vectors"]:
        expected = expected @ (np.eye(5) - 2 * np.outer(v, v) / (v @ v))
    np.testing.assert_allclose(matrix_and_shift(backend, flow, 5)[0], expected, atol=1e-14)


def test_a_low_rank_map_is_a_diagonal_and_a_matrix_of_that_rank(backend):
    case = Case("low-rank", lambda p, dim, **k: p.transforms.LowRankLinear(dim, 3))
    flow = trained(backend, case, 8, sd=1.0)
    matrix = matrix_and_shift(backend, flow, 8)[0]
    rest = np.exp(-backend.state(flow)["log_diag"])[:, None] * matrix - np.eye(8)
    sizes = np.linalg.svd(rest, compute_uv=False)
    assert (sizes[:3] > 1e-3).all() and (sizes[3:] < 1e-12).all()


def test_a_zero_reflection_is_finite(backend):
    for name in ("householder-map", "qr", "low-rank"):
        flow = backend.build(BY_NAME[name], 5)
        state = backend.state(flow)
        flow = backend.with_state(flow, {**state, "vectors": np.zeros_like(state["vectors"])})
        y, _ = backend.run(flow, np.ones((2, 5)))
        np.testing.assert_allclose(y, 1)
        assert all(np.isfinite(g).all() for g in backend.gradients(flow, np.ones((2, 5)), None, True)[0].values())


# -- costs -------------------------------------------------------------------------------------------------------------
def multiplications(backend, flow, x, inverse):
    """Of matrix products, triangular solves (``k^2`` a column) and LU factorisations (``d^3 / 3``)."""
    return (_count_torch if backend.name == "torch" else _count_jax)(backend, flow, x, inverse)


def _count_torch(backend, flow, x, inverse):
    from torch.utils.flop_counter import FlopCounterMode

    ops = backend.torch.ops.aten
    counts = {
        ops.linalg_solve_triangular: lambda a, b, *_, **__: 2 * a[-1] ** 2 * b[-1],
        ops._linalg_slogdet: lambda a, *_, **__: 2 * (a[-1] ** 3 // 3),
        ops._linalg_solve_ex: lambda a, b, *_, **__: 2 * (a[-1] ** 3 // 3 + 2 * a[-1] ** 2 * b[-1]),
    }
    with FlopCounterMode(display=False, custom_mapping=counts) as counter, backend.torch.no_grad():
        backend.run(flow, x, inverse=inverse)
    return counter.get_total_flops() // 2


def _count_jax(backend, flow, x, inverse):
    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            a = eqn.invars[0].aval.shape if eqn.invars else ()
            if eqn.primitive.name == "dot_general":
                contracted = eqn.params["dimension_numbers"][0][0]
                total += int(np.prod(eqn.outvars[0].aval.shape)) * int(np.prod([a[i] for i in contracted]))
            elif eqn.primitive.name == "triangular_solve":
                total += a[-1] * int(np.prod(eqn.invars[1].aval.shape))
            elif eqn.primitive.name == "lu":
                total += a[-1] ** 3 // 3
            inner = [p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
            inner += [eqn.params["jaxprs"].solve] if eqn.primitive.name == "custom_linear_solve" else []
            total += sum(count(getattr(p, "jaxpr", p)) for p in inner)
        return total

    method = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
    return count(backend.jax.make_jaxpr(method)(x).jaxpr)


@pytest.mark.parametrize(
    "name, per_vector, per_call",
    [
        ("act-norm-vector", None, None),
        ("householder", 1, 1),
        ("low-rank", 1, 1),
        ("triangular", 2, None),
        ("lu", 2, None),
        ("qr", 2, 3),
        ("orthogonal-exp", 2, 3),
        ("orthogonal-cayley", 2, 3),
        ("dense", 2, 3),
    ],
)
def test_costs_grow_as_stated(backend, name, per_vector, per_call):
    """Powers of ``dim`` with which the multiplications grow: for one vector more, and for a call (``None``: none)."""
    fixed = {
        "householder": Case("", lambda p, dim, **k: p.transforms.Householder(dim, 4)),
        "low-rank": Case("", lambda p, dim, **k: p.transforms.LowRankLinear(dim, 4)),
        "act-norm-vector": Case("", lambda p, dim, **k: p.transforms.ActNorm(dim)),
    }
    for inverse in (False, True):
        each, once = [], []
        for dim in (64, 128):
            flow = backend.build(fixed.get(name) or BY_NAME[name], dim)
            few, many = (multiplications(backend, flow, np.ones((n, dim)), inverse) for n in (2, 10))
            each.append((many - few) / 8)
            once.append(few - 2 * each[-1])
        for counts, power in ((each, per_vector), (once, per_call)):
            if power is None:
                assert counts == [0, 0]
            else:
                assert counts[1] / counts[0] == pytest.approx(2**power, rel=0.1), (name, inverse, counts)


# -- normalisation -----------------------------------------------------------------------------------------------------
def data(dim, n=200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) * rng.uniform(0.2, 5, dim) + rng.normal(size=dim) * 3


def is_standard(x, shape=None):
    x = x if shape is None else np.moveaxis(x.reshape(-1, *shape), 1, -1).reshape(-1, shape[0])
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-8)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-8)


@pytest.mark.parametrize("shape", [4, (2, 2, 2)])
def test_act_norm_starts_at_the_statistics_of_data(backend, shape):
    y = data(int(np.prod(shape)))
    for turned in (False, True):
        flow = backend.build(Case("", lambda p, dim, **k: p.transforms.ActNorm(shape)), 0)
        flow = backend.pkg.Inverse(flow) if turned else flow
        flow = backend.pkg.transforms.initialised(flow, backend.array(y))
        x, log_det = backend.run(flow, y, inverse=True)
        is_standard(x, shape if isinstance(shape, tuple) else None)
        np.testing.assert_allclose(backend.run(flow, x)[0], y)
        assert (np.abs(log_det) > 0.1).all()


def test_act_norms_are_set_one_after_the_other_in_stacks(backend):
    """In Compose, Repeat, Inverse and Leading: each sees what those before it hand on."""

    def make(p, dim, **k):
        key = {"key": k["key"]} if k else {}

        def layer(key=None):
            mixed = p.transforms.Coupling(dim, p.univariate.Affine(), (8,), **({} if key is None else {"key": key}))
            return p.Compose([p.transforms.ActNorm(dim), mixed])

        leading = p.transforms.Leading(p.transforms.ActNorm(2), 2)
        return p.Compose([p.Repeat(layer, 3, **key), p.Inverse(p.transforms.ActNorm(dim)), leading])

    flow = trained(backend, Case("", make), 4, sd=0.5)
    before = backend.state(flow)
    y = data(4)
    flow = backend.pkg.transforms.initialised(flow, backend.array(y))
    is_standard(backend.run(flow, y, inverse=True)[0])  # the ActNorm of the first layer is the last on the way
    after = backend.state(flow)
    for name, value in after.items():
        assert (name.endswith(("loc", "log_scale"))) == (not np.array_equal(value, before[name])), name
    back, opposite = backend.run(flow, *backend.run(flow, y, inverse=True)[:1])
    np.testing.assert_allclose(back, y, atol=1e-8)
    again = backend.state(backend.pkg.transforms.initialised(flow, backend.array(y)))
    for name, value in again.items():  # what is set already stays
        np.testing.assert_allclose(value, after[name], atol=1e-6, err_msg=name)


def test_the_twins_start_alike():
    twins = [backends.get(name) for name in ("torch", "jax")]
    case = BY_NAME["glow"]
    state = backends.perturbed(twins[0].state(twins[0].build(case, 16)), 0.3, True)
    y = data(16, 50)
    flows = [b.with_state(b.build(case, 16), state) for b in twins]
    started = [b.state(b.pkg.transforms.initialised(f, b.array(y))) for b, f in zip(twins, flows, strict=True)]
    for name, value in started[0].items():
        np.testing.assert_allclose(started[1][name], value, atol=1e-9, err_msg=name)


def batch_norm(p, dim, **k):
    return p.Compose([p.transforms.BatchNorm(dim, momentum=0.25), p.transforms.LULinear(dim)])


def test_batch_norm_trains_on_the_batch_and_evaluates_on_running_statistics(backend):
    flow = trained(backend, Case("", batch_norm), 3)
    state = backend.state(flow)
    y = data(3)
    seen, _ = backend.run(backend.build(Case("", batch_norm), 3), y)
    lu = backend.pkg.Compose([flow.layers[1]])
    seen, inner = backend.run(lu, y, inverse=True)
    flow, x, log_det = backend.pkg.transforms.with_batch_statistics(flow, backend.array(y))
    loc, log_scale = state["layers.0.loc"], state["layers.0.log_scale"]
    expected = loc + np.exp(log_scale) * (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
    np.testing.assert_allclose(backend.numpy(x), expected)
    scale = (log_scale - 0.5 * np.log(seen.var(0) + 1e-5)).sum()
    np.testing.assert_allclose(backend.numpy(log_det), inner + scale)
    after = backend.state(flow)
    mean = 0.75 * state["layers.0.running_mean"] + 0.25 * seen.mean(0)
    var = 0.75 * np.exp(state["layers.0.running_log_var"]) + 0.25 * (seen.var(0) + 1e-5)
    np.testing.assert_allclose(after["layers.0.running_mean"], mean)
    np.testing.assert_allclose(np.exp(after["layers.0.running_log_var"]), var)
    evaluated, _ = backend.run(flow, y, inverse=True)
    np.testing.assert_allclose(evaluated, loc + np.exp(log_scale) * (seen - mean) / np.sqrt(var))
    np.testing.assert_allclose(backend.run(flow, evaluated)[0], y)
    # a batch in the place of the running statistics
    flow = backend.pkg.transforms.initialised(flow, backend.array(y))
    np.testing.assert_allclose(backend.state(flow)["layers.0.running_mean"], seen.mean(0))


def test_gradients_flow_through_the_batch_statistics(backend):
    """A shift and a scale of the whole batch change nothing that comes out."""
    flow, y = trained(backend, Case("", lambda p, dim, **k: p.transforms.BatchNorm(dim, eps=1e-12)), 3), data(3)
    weights = np.random.default_rng(5).normal(size=y.shape)
    run = backend.pkg.transforms.with_batch_statistics
    if backend.name == "torch":
        along = backend.torch.zeros((), dtype=backend.torch.float64, requires_grad=True)
        x = run(flow, backend.array(y) * (1 + along) + along)[1]
        (slope,) = backend.torch.autograd.grad((x * backend.array(weights)).sum(), along)
    else:
        slope = backend.jax.grad(lambda t: (run(flow, backend.array(y) * (1 + t) + t)[1] * weights).sum())(0.0)
    assert abs(float(slope)) < 1e-8


def test_jax_batch_norm_under_jit_and_scan():
    backend = backends.get("jax")

    def make(p, dim, key):
        return p.Repeat(lambda key: p.Compose([p.transforms.BatchNorm(dim), p.transforms.LULinear(dim)]), 3, key=key)

    flow, y = trained(backend, Case("", make), 3), data(3)
    run = backend.pkg.transforms.with_batch_statistics
    plain, jitted = run(flow, backend.array(y)), backend.eqx.filter_jit(run)(flow, backend.array(y))
    for a, b in zip(backend.jax.tree.leaves(plain), backend.jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    assert backend.jax.tree.structure(plain[0]) == backend.jax.tree.structure(flow)


# -- structures and images ---------------------------------------------------------------------------------------------
def test_masked_and_block_couplings_have_the_jacobians_stated(backend):
    x = np.random.default_rng(0).normal(size=(3, 5))
    masked = backend.jacobian(trained(backend, BY_NAME["coupling-mask"], 5), x, None, False)
    np.testing.assert_array_equal(masked[:, 1::2], np.broadcast_to(np.eye(5)[1::2], (3, 2, 5)))
    moved = masked[:, ::2, ::2]
    assert (moved * (1 - np.eye(3)) == 0).all() and (masked[:, ::2, 1::2] != 0).all()
    blocks = backend.jacobian(trained(backend, BY_NAME["block-coupling-spline"], 5), x, None, False)
    blocks = blocks[:, [2, 3, 4, 1, 0]][:, :, [2, 3, 4, 1, 0]]
    np.testing.assert_array_equal(blocks[:, :3], np.broadcast_to(np.eye(5)[:3], (3, 3, 5)))
    assert (np.triu(blocks, 1) == 0).all() and (blocks[:, 3:, :3] != 0).all() and (blocks[:, 4, 3] != 0).all()


def test_an_ordering_is_a_permuted_triangle(backend):
    flow = trained(backend, BY_NAME["autoregressive-ordering"], 5)
    jacobian = backend.jacobian(flow, np.random.default_rng(0).normal(size=(3, 5)), None, False)
    order = [2, 3, 4, 0, 1]
    jacobian = jacobian[:, order][:, :, order]
    assert (np.triu(jacobian, 1) == 0).all() and (np.abs(jacobian).max(0)[np.tril_indices(5)] > 0).all()


def test_squeeze_gathers_neighbouring_pixels(backend):
    image = np.arange(16.0).reshape(1, 16)
    y, _ = backend.run(backend.build(BY_NAME["squeeze"], 16), image)
    assert y.reshape(4, 2, 2)[:, 0, 0].tolist() == [0, 1, 4, 5] and y.reshape(4, 2, 2)[0].tolist() == [[0, 2], [8, 10]]


def test_the_log_det_of_a_convolution_counts_the_pixels(backend):
    flow = trained(backend, BY_NAME["conv1x1"], 8)
    x = np.random.default_rng(0).normal(size=(3, 8))
    _, log_det = backend.run(flow, x)
    weight = matrix_and_shift(backend, flow, 8)[0].reshape(2, 4, 2, 4)[:, 0, :, 0]
    np.testing.assert_allclose(log_det, 4 * np.linalg.slogdet(weight)[1])
    expected = np.linalg.slogdet(backend.jacobian(flow, x, None, False))[1]
    np.testing.assert_allclose(log_det, expected, atol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p, d, **k: p.transforms.Coupling(d, p.univariate.Affine(), mask=[True] * 3, **k), "mask"),
        (lambda p, d, **k: p.transforms.Coupling(d, p.univariate.Affine(), mask=[True, False], **k), "mask"),
        (lambda p, d, **k: p.transforms.Coupling(d, p.univariate.Affine(), mask=[1, 0, 1], split=1, **k), "split"),
        (lambda p, d, **k: p.transforms.Coupling(d, p.univariate.Affine(), mask=[1, 0, 1], swap=True, **k), "swap"),
        (lambda p, d, **k: p.transforms.BlockCoupling(d, p.univariate.Affine(), blocks=1, **k), "blocks"),
        (lambda p, d, **k: p.transforms.BlockCoupling(d, p.univariate.Affine(), blocks=[[0], [1]], **k), "blocks"),
        (lambda p, d, **k: p.transforms.Autoregressive(d, p.univariate.Affine(), ordering=[0, 1], **k), "ordering"),
        (lambda p, d, **k: p.transforms.LULinear(d, [0, 0, 1]), "permutation"),
        (lambda p, d, **k: p.transforms.Householder(d, 3), "num_reflections"),
        (lambda p, d, **k: p.transforms.Orthogonal(d, "qr"), "method"),
        (lambda p, d, **k: p.transforms.LowRankLinear(d, 4), "rank"),
        (lambda p, d, **k: p.transforms.Squeeze((1, 3, 1)), "Squeeze: shape"),
        (lambda p, d, **k: p.transforms.ActNorm((1, 3)), "shape"),
        (lambda p, d, **k: p.transforms.BatchNorm(d, momentum=0.0), "momentum"),
        (lambda p, d, **k: p.transforms.BatchNorm(d, eps=0.0), "eps"),
        (lambda p, d, **k: p.transforms.Leading(p.transforms.LULinear(d), 0), "size"),
        (lambda p, d, **k: p.flows.glow(d, shape=(1, 2, 2), **k), "glow: shape"),
        (lambda p, d, **k: p.flows.glow(d, shape=(1, 3, 1), **k), "one channel"),
        (lambda p, d, **k: p.flows.glow(d, num_layers=0, **k), "num_layers"),
        (lambda p, d, **k: p.flows.householder(d, 0, **k), "num_layers"),
    ],
)
def test_bad_arguments_are_named(backend, make, message):
    with pytest.raises(ValueError, match=message):
        backend.build(Case("bad", make), 3)


def test_batches_that_cannot_be_used_are_named(backend):
    p = backend.pkg
    flow = backend.build(BY_NAME["batch-norm"], 2)
    with pytest.raises(ValueError, match="at least two vectors"):
        p.transforms.initialised(flow, backend.array(np.ones((1, 2))))
    with pytest.raises(ValueError, match="Inverse"):
        p.transforms.with_batch_statistics(p.Inverse(flow), backend.array(np.ones((4, 2))))


@pytest.mark.parametrize(
    "name",
    ["triangular", "lu", "plu", "qr", "householder-map", "orthogonal-exp", "low-rank", "dense", "conv1x1"],
)
def test_a_matrix_that_is_the_map_is_not_rounded(name):
    """On GPUs jax multiplies in TF32 by default, which has three digits: the inverse would not be one."""
    backend = backends.get("jax")
    flow = backend.build(BY_NAME[name], 8)
    for direction in (flow.forward_and_log_det, flow.inverse_and_log_det):
        products = list(_products(backend.jax.make_jaxpr(direction)(np.ones((3, 8))).jaxpr))
        assert all(p == (backend.jax.lax.Precision.HIGHEST,) * 2 for p in products)
        assert products or direction == flow.inverse_and_log_det


def _products(jaxpr):
    """The precisions of all matrix products in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)
