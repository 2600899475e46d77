"""Property-based: shapes and dtypes of every family for any batch, and what composition must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from tests import backends
from tests.registry import CASES, CONTEXT_DIM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
_built = {}


@pytest.fixture(scope="module", params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def built(backend, case, dim, context, dtype):
    key = backend.name, case.name, dim, context, dtype
    if key not in _built:
        _built[key] = backend.build(case, dim, context, dtype=dtype)
    return _built[key]


@QUICK
@given(
    case=st.sampled_from(CASES),
    data=st.data(),
    batches=mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3),
    with_context=st.booleans(),
    inverse=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_shapes_and_dtypes(backend, case, data, batches, with_context, inverse, dtype):
    with_context &= case.context
    dim = data.draw(st.sampled_from(case.dims))
    flow = built(backend, case, dim, with_context, dtype)
    of_x, of_context = batches.input_shapes
    batch = batches.result_shape if with_context else of_x
    context = (*of_context, CONTEXT_DIM) if with_context else None
    (y, log_det), dtypes = backend.specs(flow, (*of_x, dim), context, inverse, dtype)
    assert y == (*batch, dim) and log_det == batch and set(dtypes) == {dtype}


@QUICK
@given(
    cases=st.lists(st.sampled_from([case for case in CASES if 2 in case.dims]), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_a_composition_is_undone_and_adds_log_dets(cases, seed):
    backend = backends.get("torch")
    layers = []
    for case in cases:
        flow = backend.build(case, 2, seed=seed)
        layers.append(backend.with_state(flow, backends.perturbed(backend.state(flow), 0.1, case.deep, seed)))
    whole = backend.pkg.Compose(layers)
    x = np.random.default_rng(seed).normal(size=(3, 2))
    y, log_det = backend.run(whole, x)
    back, opposite = backend.run(whole, y, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(opposite, -log_det, atol=1e-6, rtol=1e-6)
    total, at = 0, x
    for layer in layers:
        at, part = backend.run(layer, at)
        total = total + part
    np.testing.assert_allclose(log_det, total, atol=1e-9)
