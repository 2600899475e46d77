"""Gradients without stored activations: those of the plain chain, in memory which depth does not move."""

import numpy as np
import pytest

from tests import backends
from tests.registry import BY_NAME, CONTEXT_DIM

DIM = 4
CASES = ["realnvp", "nsf", "iaf", "maf", "coupling-spline", "planar"]


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def trained(backend, name, context=False, sd=0.3):
    case = BY_NAME[name]
    flow = backend.build(case, DIM, context)
    return backend.with_state(flow, backends.perturbed(backend.state(flow), sd, case.deep))


def gradients(backend, flow, x, context, inverse):
    """Of ``sum(y^2 + ...)`` with weights of its own for value and log-det: by parameters, input and context."""
    w = np.random.default_rng(9).normal(size=3)

    def loss(y, log_det):
        return (w[0] * y + w[1] * y**2).sum() + (w[2] * log_det**2).sum()

    if backend.name == "torch":
        inputs = [backend.array(a).requires_grad_() for a in (x, context) if a is not None]
        parameters = list(flow.parameters())
        out = (flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(*inputs)
        found = backend.torch.autograd.grad(
            loss(*out), [*parameters, *inputs], allow_unused=True, materialize_grads=True
        )
        return [backend.numpy(g) for g in found]
    jax, eqx = backend.jax, backend.eqx
    params, static = eqx.partition(flow, eqx.is_inexact_array)

    def of(params, inputs):
        flow = eqx.combine(params, static)
        return loss(*(flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(*inputs))

    inputs = [backend.array(a) for a in (x, context) if a is not None]
    return [np.asarray(g) for g in jax.tree.leaves(jax.jit(jax.grad(of, argnums=(0, 1)))(params, inputs))]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("nsf", "maf"))) for n in CASES])
def test_gradients_are_those_of_the_plain_chain(backend, name, inverse):
    flow = trained(backend, name, context=True)
    rng = np.random.default_rng(0)
    # the context has a batch axis that the input lacks, the input one that the context lacks
    x, context = rng.normal(size=(1, 5, DIM)), rng.normal(size=(3, 1, CONTEXT_DIM))
    wrapped = backend.pkg.Reversible(flow)
    for a, b in zip(backend.run(flow, x, context, inverse), backend.run(wrapped, x, context, inverse), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    plain, found = (gradients(backend, f, x, context, inverse) for f in (flow, wrapped))
    assert len(plain) == len(found) > 2
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-8 * (1 + np.abs(a).max(initial=0)))


def test_memory_does_not_grow_with_depth(backend):
    x = np.random.default_rng(0).normal(size=(2000, DIM))

    def held(layers, wrap):
        key = {} if backend.name == "torch" else {"key": backend.jax.random.key(0)}
        flow = backend.pkg.flows.realnvp(DIM, layers, (64, 64), **key)
        return backend.held_for_gradient(backend.pkg.Reversible(flow) if wrap else flow, x)

    plain, wrapped = ({n: held(n, wrap) for n in (8, 64)} for wrap in (False, True))
    assert plain[64] > 4 * plain[8]
    assert wrapped[64] < 1.1 * wrapped[8]
    assert wrapped[64] < 0.2 * plain[64]


def test_what_rounding_loses_is_an_error(backend):
    flow = trained(backend, "realnvp", sd=8.0)
    x = np.random.default_rng(0).normal(size=(20, DIM)).astype("float32")
    if backend.name == "torch":
        flow = flow.float()
    else:
        single = lambda a: a.astype("float32") if backend.eqx.is_inexact_array(a) else a  # noqa: E731
        flow = backend.jax.tree.map(single, flow)
    y = backend.run(flow, x)[0]
    assert np.abs(backend.run(flow, y, inverse=True)[0] - x).max() > 0.1  # the case is one
    with pytest.raises(Exception, match="loses the layers' inputs"):
        gradients(backend, backend.pkg.Reversible(flow), x, None, False)


def test_estimated_log_determinants_are_refused(backend):
    key = {} if backend.name == "torch" else {"key": backend.jax.random.key(0)}
    flow = backend.pkg.flows.residual(DIM, 2, (8,), log_det="unbiased", **key)
    assert not flow.log_det_is_exact
    with pytest.raises(ValueError, match="estimated"):
        backend.pkg.Reversible(flow)


def test_second_derivatives(backend):
    flow = trained(backend, "realnvp")
    wrapped = backend.pkg.Reversible(flow)
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(3, DIM)), rng.normal(size=(3, DIM))
    if backend.name == "torch":
        plain, found = (backend.log_det_derivatives(f, x, v, None, False) for f in (flow, wrapped))
    else:
        jax = backend.jax

        def product(f):  # reverse over reverse mode
            gradient = jax.grad(lambda x: f.forward_and_log_det(x)[1].sum())
            return gradient(x), jax.grad(lambda x: (gradient(x) * v).sum())(x)

        plain, found = product(flow), product(wrapped)
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(lambda x: wrapped(x), (x,), (v,))
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-10)


def test_copies_inverse_and_layers_that_are_shared(backend):
    x = np.random.default_rng(0).normal(size=(7, DIM))
    layer = trained(backend, "coupling-affine")
    flow = backend.pkg.Compose([layer, layer])
    wrapped = backend.pkg.Reversible(flow)
    assert wrapped.passes == flow.passes
    for other in backend.copies(wrapped):
        for a, b in zip(backend.run(other, x), backend.run(flow, x), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(gradients(backend, wrapped, x, None, False), gradients(backend, flow, x, None, False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
