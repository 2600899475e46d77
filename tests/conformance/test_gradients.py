"""Gradients written by hand in torch, and those of these: against finite differences, and autograd of the plain way."""

import pytest

torch = pytest.importorskip("torch")

from pyroflows import univariate  # noqa: E402
from pyroflows.transforms.continuous import Velocity  # noqa: E402
from pyroflows.transforms.residual import _bound, _LipSwish, spectral_bound  # noqa: E402
from pyroflows.univariate import affine, sigmoidal  # noqa: E402


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


AFFINE, SIGMOIDS = univariate.Affine(2.0), univariate.DeepSigmoidal(4)
VELOCITIES = {name: Velocity(2, (3, 4), 1, name).double() for name in ("tanh", "silu", "softplus")}
NAMES = [name for name, _ in VELOCITIES["tanh"].named_parameters()]


def velocity(name, recompute, with_trace):
    """Of two hidden layers, and its trace, as a function of its input, a context and its parameters."""

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.velocity = VELOCITIES[name]

        def forward(self, x, context):
            constants = self.velocity.constants(context)
            return self.velocity(0.3, x, constants, None, with_trace, recompute)[: 1 + with_trace]

    def call(x, context, *parameters):
        values = {f"velocity.{k}": v for k, v in zip(NAMES, parameters, strict=True)}
        return torch.func.functional_call(Whole(), values, (x, context))

    return call


OF_VELOCITY = tensors((3, 2), (3, 1), *(p.shape for _, p in VELOCITIES["tanh"].named_parameters()))
CASES = {  # function, the same in plain operations, inputs
    "affine": (
        AFFINE.forward_and_log_det,
        lambda x, params: affine._Forward.plain(x, params, 2.0),
        tensors((3, 2), (3, 2, 2)),
    ),
    "affine, inverse": (
        AFFINE.inverse_and_log_det,
        lambda y, params: affine._Inverse.plain(y, params, 2.0),
        tensors((3, 2), (3, 2, 2)),
    ),
    "sigmoids": (SIGMOIDS.forward_and_log_det, SIGMOIDS._plain, tensors((3, 2), (3, 12, 2))),
    "LipSwish": (_LipSwish.apply, _LipSwish.plain, tensors((3, 2), (2,))),
    **{
        f"velocity, {name}, {'with' if trace else 'no'} trace": (
            velocity(name, True, trace),
            velocity(name, False, trace),
            OF_VELOCITY,
        )
        for name, trace in (("tanh", True), ("tanh", False), ("silu", True), ("softplus", True))
    },
    "spectral bound, tall": (spectral_bound, lambda weight: _bound(weight, False)[0], tensors((4, 3))),
    "spectral bound, wide": (spectral_bound, lambda weight: _bound(weight, False)[0], tensors((2, 3))),
    "spectral bound, of equal singular values": (
        spectral_bound,
        lambda weight: _bound(weight, False)[0],
        (2 * torch.eye(3, dtype=torch.float64) + 0.001 * tensors((3, 3))[0],),
    ),
}


@pytest.mark.parametrize("function, plain, inputs", CASES.values(), ids=CASES)
def test_gradients_written_by_hand(function, plain, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs, same = (call(*inputs) for call in (function, plain))
    torch.testing.assert_close(outputs, same, rtol=1e-14, atol=1e-14)
    leaf = torch.utils._pytree.tree_leaves(outputs)[0]
    assert isinstance(leaf.grad_fn, torch.autograd.function.BackwardCFunction)  # not autograd's
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    first, second = (
        torch.autograd.grad(sum(y.square().sum() for y in torch.utils._pytree.tree_leaves(call(*inputs))), inputs)
        for call in (function, plain)
    )
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_gradients_written_by_hand_are_left_out_where_torch_func_is_at_work():
    x, params = tensors((3, 2), (3, 2, 2))
    expected = torch.autograd.functional.jacobian(AFFINE.forward_and_log_det, (x, params))
    found = torch.func.jacrev(AFFINE.forward_and_log_det, argnums=(0, 1))(x, params)
    forward = torch.func.jacfwd(AFFINE.forward_and_log_det, argnums=(0, 1))(x, params)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(forward, expected)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_large_batches_of_sigmoids_are_taken_in_parts(monkeypatch, with_gradient):
    inputs = [x.requires_grad_(with_gradient) for x in tensors((5, 2, 3), (5, 1, 12, 3))]
    with torch.set_grad_enabled(with_gradient):
        whole = SIGMOIDS.forward_and_log_det(*inputs)
        sizes, terms = [], sigmoidal._Sigmoids.terms

        def counted(x, *rest):
            sizes.append(len(x))
            return terms(x, *rest)

        monkeypatch.setattr(sigmoidal, "_AT_ONCE", 50)
        monkeypatch.setattr(sigmoidal._Sigmoids, "terms", counted)
        parts = SIGMOIDS.forward_and_log_det(*inputs)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    if with_gradient:
        found, expected = (torch.autograd.grad(sum(y.sum() for y in outputs), inputs) for outputs in (parts, whole))
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("way", ["forward_and_log_det", "inverse_and_log_det"])
def test_affine_maps_of_large_arrays_write_into_their_own_only(monkeypatch, way):
    function, inputs = getattr(AFFINE, way), tensors((3, 2), (3, 2, 2))
    before = [x.clone() for x in inputs]

    def results():
        with torch.no_grad():
            plain, mapped = function(*inputs), torch.func.vmap(function, (0, None))(inputs[0], inputs[1][0])
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, log_det = function(*leaves)
        return plain, mapped, torch.autograd.grad(y.square().sum() + log_det.exp().sum(), leaves)

    small = results()
    monkeypatch.setattr(affine, "_LARGE", 0)
    torch.testing.assert_close(results(), small, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)
