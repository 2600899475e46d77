"""Torch: a result is reused for the tensor that was produced, and never stale (Pyro's cache is keyed on the input)."""

import copy
import gc
import pickle

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("pyro.distributions")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from pyroflows import FlowDistribution, conditioners, flows  # noqa: E402
from tests.registry import CASES  # noqa: E402


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def trained(make=flows.realnvp, dim=3, **kwargs):
    flow = make(dim, 2, (8, 8), **kwargs)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def count_calls(flow):
    calls = []
    for module in flow.modules():
        if isinstance(module, conditioners.MLP):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def base(dim=3):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


@pytest.mark.parametrize("distribution", [FlowDistribution, dist.TransformedDistribution])
def test_scoring_an_own_sample_costs_nothing_more(distribution):
    flow = trained()
    q = distribution(base(), flow)
    calls = count_calls(flow)
    y = q.rsample((5,))
    assert len(calls) == 2
    log_q = q.log_prob(y)
    assert len(calls) == 2
    flow.clear_cache()
    torch.testing.assert_close(log_q, q.log_prob(y))
    assert len(calls) > 2


@pytest.mark.parametrize("distribution", [FlowDistribution, dist.TransformedDistribution])
def test_two_steps_on_the_same_data(distribution):
    flow, data = trained(), torch.randn(20, 3)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -distribution(base(), flow).log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_a_step_between_sampling_and_scoring():
    flow = trained()
    q = FlowDistribution(base(), flow)
    y = q.rsample((5,))
    before = q.log_prob(y)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1)
    after = q.log_prob(y)
    expected = FlowDistribution(base(), copy.deepcopy(flow)).log_prob(y.clone())
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after)


def test_functional_call_and_vmap_over_parameters():
    flow, x = trained(), torch.randn(4, 3)
    y = flow(x)
    other = {name: p.detach() + 0.1 for name, p in flow.named_parameters()}
    y_other = torch.func.functional_call(flow, other, (x,))
    assert not torch.allclose(y, y_other)
    torch.testing.assert_close(flow(x), y)
    assert not torch.allclose(flow.inv(y_other), x)  # produced under other parameters
    stacked = {name: torch.stack([p.detach(), other[name]]) for name, p in flow.named_parameters()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(flow, p, (x,)))(stacked)
    torch.testing.assert_close(both, torch.stack([y, y_other]))
    torch.testing.assert_close(flow(x), y)


def test_no_grad_results_are_not_used_for_gradients():
    flow, x = trained(), torch.randn(4, 3)
    with torch.no_grad():
        y = flow(x)
    log_det = flow.log_abs_det_jacobian(x, y)
    assert log_det.requires_grad


def test_an_input_changed_in_place():
    flow, x = trained(), torch.randn(4, 3)
    first = flow(x)
    x += 1
    assert not torch.allclose(flow(x), first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_carry_no_record(copied):
    flow = trained()
    y = flow(torch.randn(4, 3))
    other = copied(flow)
    assert "_produced" in flow.__dict__ and "_produced" not in other.__dict__
    torch.testing.assert_close(other.inv(y), flow.inv(y))


def test_the_record_goes_with_the_output():
    flow = trained()
    y = flow(torch.randn(4, 3))
    assert "_produced" in flow.__dict__
    del y
    gc.collect()
    assert "_produced" not in flow.__dict__


def test_inverse_view_reuses_and_agrees():
    flow = trained(flows.maf)
    calls = count_calls(flow)
    y = torch.randn(4, 3)
    x = flow.inv(y)
    used = len(calls)
    log_det = flow.inv.log_abs_det_jacobian(y, x)
    assert flow(x) is y and len(calls) == used
    torch.testing.assert_close(log_det, flow.inverse_and_log_det(y)[1])
    flow.clear_cache()
    calls.clear()
    flow.log_abs_det_jacobian(x, y)
    assert len(calls) == 2  # the cheap direction of a MAF is the inverse


def test_context_is_part_of_the_key():
    flow, x, context = trained(context_dim=2), torch.randn(4, 3), torch.randn(4, 2)
    with torch.no_grad():
        bound = flow.condition(context)
        y = bound(x)
        context += 1
        back = bound.inv(y)
    assert not torch.allclose(back, x)


def test_pyro_composition_and_conditional_distributions():
    flow = trained()
    both = dist.ComposeTransformModule([flow, trained()])
    q = dist.TransformedDistribution(base(), both)
    y = q.rsample((5,))
    log_q = q.log_prob(y)
    torch.testing.assert_close(log_q, q.log_prob(y.clone()))
    assert len(list(both.parameters())) == 2 * len(list(flow.parameters()))
    conditional = dist.ConditionalTransformedDistribution(base(), [trained(context_dim=2)])
    context = torch.randn(5, 2)
    given = conditional.condition(context)
    y = given.sample((5,))
    assert given.log_prob(y).shape == (5,)


@pytest.mark.parametrize("make", [flows.realnvp, flows.nsf, flows.iaf])
def test_compiles_without_a_graph_break(make):
    flow, x = trained(make), torch.randn(6, 3)
    compiled = torch.compile(flow.forward_and_log_det, fullgraph=True, backend="eager")
    for a, b in zip(compiled(x), flow.forward_and_log_det(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_read_on_the_host_inside_a_pass(case):
    """Fake tensors have no values to read: any transfer to the host raises."""
    import pyroflows

    with FakeTensorMode():
        flow, x = case.make(pyroflows, case.dim), torch.randn(6, case.dim)
        y, log_det = flow.forward_and_log_det(x)
        assert y.shape == (6, case.dim) and log_det.shape == (6,)
        if not case.numerical:
            assert flow.inverse_and_log_det(y)[0].shape == (6, case.dim)
