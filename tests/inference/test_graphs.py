"""Recorded log-densities in torch: simplified, and still the same functions."""

import copy
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
from torch import fx  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from pyroflows import AmortisedFlowVI, FlowVI, fit_density, flows, inference, log_density, training  # noqa: E402
from pyroflows.distributions import MixtureBase  # noqa: E402
from pyroflows.encoders import MLPEncoder  # noqa: E402
from pyroflows.graphs import compiled, recorded_step, simplified  # noqa: E402
from pyroflows.guides import AutoFlow  # noqa: E402
from tests.inference.models_pyro import eight_schools  # noqa: E402

SCALE = torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64)


def recorded(function, x):
    return make_fx(torch.func.functionalize(function))(x)


def operations(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def result_sizes(graph, x):
    """Numbers in the result of each kind of operation, the last of its kind."""
    run = fx.Interpreter(graph)
    run.garbage_collect_values = False
    run.run(x)
    return {node.target: value.numel() for node, value in run.env.items() if node.op == "call_function"}


def density(x):
    """As distributions write it: normalisers of data alone, zeros to add to, in-place changes, results nobody needs."""
    total = torch.zeros_like(x[..., 0])
    value = -((x - 1.0) ** 2) / (2 * SCALE**2) - SCALE.log()
    value[..., 0].masked_fill_(x[..., 0] < 0, -3.0)
    x.exp().sum()
    return total + value.unsqueeze(-1).sum(-1).sum(-1).view(-1) * 1.0


def test_a_recorded_density_is_simplified_and_the_same():
    x, other = torch.randn(2, 5, 3, dtype=torch.float64)
    graph = recorded(density, x)
    before = operations(graph)
    expected = torch.func.vmap(torch.func.grad(lambda row: density(row[None])[0]))(other)
    graph = simplified(graph, x)
    assert operations(graph) <= before - 8
    torch.testing.assert_close(graph(other), density(other), rtol=1e-14, atol=1e-14)
    point = other.clone().requires_grad_()
    found = torch.autograd.grad(graph(point).sum(), point)[0]
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_what_may_change_is_no_constant():
    x, weight = torch.randn(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64, requires_grad=True)
    graph = simplified(recorded(lambda x: x * weight.exp() + torch.randn_like(SCALE).sum(), x), x)
    noise = {round(float((graph(x) - x * weight.exp()).detach()[0]), 12) for _ in range(5)}
    assert len(noise) == 5
    with torch.no_grad():
        weight.add_(1.0)
    difference = graph(x) - x * weight.exp()
    torch.testing.assert_close(difference, difference[:1].expand(4))


def test_constants_take_no_more_memory_than_the_data():
    x, data = torch.randn(50, 1, dtype=torch.float64), torch.rand(20_000, dtype=torch.float64)

    def wide(x):
        return (x * data.exp() + (x + data).new_full((50, 20_000), 2.0).log()).sum(-1)

    graph = simplified(recorded(wide, x), x)
    torch.testing.assert_close(graph(2 * x), wide(2 * x))
    sizes = [buffer.numel() for name, buffer in graph.named_buffers() if name.startswith("_folded")]
    assert sizes == [20_000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_become_tensors_once(dtype):
    """Of the same type: results keep theirs, and so do those of integers."""
    x, count = torch.randn(5, dtype=dtype), torch.arange(5)

    def function(x):
        y = torch.rsub(x, 0.3, alpha=2.0) * 3 - 1.7 + x / 7 + torch.sub(1, x)
        return y + (count * 2 + x.long() * 3) + (x.long() * 0.1).to(y)

    graph = simplified(make_fx(function)(x), x)
    numbers = [n for n in graph.graph.nodes if any(isinstance(a, float) for a in n.args)]
    assert len(numbers) == 1  # of the integers, whose product is of another type
    for run in (graph, compiled(graph)):
        assert run(2 * x).dtype == dtype
        torch.testing.assert_close(run(2 * x), function(2 * x), rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("sizes, joined", [([2, 3], 1), ([3, 2], 2)], ids=["where joined", "elsewhere once"])
def test_what_is_joined_and_split_again_stays_apart(sizes, joined):
    x = torch.randn(4, 5, dtype=torch.float64)

    def function(x):
        a, b = x.split([2, 3], -1)
        for _ in range(3):
            y = torch.cat([a.tanh(), b.cos()], -1)
            a, b = y.split(sizes, 1)
        rows = torch.cat([a, a + 1])
        return rows[:4] + rows[4:] * rows[2:6], b, y[:, : sizes[0]]

    graph = simplified(make_fx(function)(x), x)
    assert sum(node.target is torch.ops.aten.cat.default for node in graph.graph.nodes) == joined
    for found, wanted in zip(compiled(graph)(2 * x), function(2 * x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rows, columns", [(1, 6), (2, 6), (6, 1), (6, 2)])
@pytest.mark.parametrize("shared", ["left", "right", "changing"])
def test_products_with_one_matrix_are_one_product(rows, columns, shared):
    x = torch.randn(5, 3, max(rows, columns), dtype=torch.float64)
    data = torch.randn(3, columns if shared == "right" else rows, dtype=torch.float64)
    weight = data.clone().requires_grad_()

    def function(x):
        if shared == "right":
            return torch.bmm(x[:, :, :rows].mT, data.expand(5, -1, -1)) + 1
        matrix = weight if shared == "changing" else data
        return torch.bmm(matrix.t().expand(5, -1, -1), x[:, :, :columns]).view(5, -1) + 1

    graph = simplified(make_fx(function)(x), x)
    expected = 0 if shared == "right" or columns == 1 else 1
    assert sum(node.target is torch.ops.aten.bmm.default for node in graph.graph.nodes) == expected
    with torch.no_grad():
        weight.add_(1)
    torch.testing.assert_close(compiled(graph)(2 * x), function(2 * x), rtol=1e-13, atol=1e-13)
    point = x.clone().requires_grad_()
    found, wanted = (torch.autograd.grad(call(point).square().sum(), point)[0] for call in (graph, function))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_what_is_computed_of_a_tensor_is_expanded_not_the_tensor():
    x, data = torch.rand(4, 1, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def function(x):
        scale = x.expand(4, 6)
        kept = scale.sqrt().view(24)  # whose order in memory counts
        return -((data - 1) ** 2) / (2 * scale**2) - scale.log() + kept.sum() + (x.expand(4, 6) * 3).sum(0)

    graph = simplified(make_fx(function)(x), x)
    sizes = result_sizes(graph, x)
    assert sizes[torch.ops.aten.log.default] == 4 and sizes[torch.ops.aten.sqrt.default] == 24
    for call in (graph, compiled(graph)):
        torch.testing.assert_close(call(2 * x), function(2 * x), rtol=1e-14, atol=1e-14)
    point = x.clone().requires_grad_()
    found, wanted = (torch.autograd.grad(call(point).sum(), point)[0] for call in (graph, function))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape, size", [((4, 1, 3), 12), ((3,), 3), ((4, 6, 1), 72), ((1, 1), 3)])
def test_shares_are_normalised_before_they_are_expanded(shape, size):
    """Unless along the very axis: weights of a mixture, for as many data."""
    x, data = torch.randn(shape, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)

    def function(x):
        return (data + x.expand(4, 6, 3).log_softmax(2)).logsumexp(-1) + (data * x.expand(4, 6, 3).softmax(-1)).sum(-1)

    graph = simplified(make_fx(function)(x), x)
    sizes = result_sizes(graph, x)
    for target in (torch.ops.aten._log_softmax.default, torch.ops.aten._softmax.default):
        assert sizes[target] == size
    torch.testing.assert_close(compiled(graph)(2 * x), function(2 * x), rtol=1e-14, atol=1e-14)


def large_operations(graph, x, size):
    run = fx.Interpreter(graph)
    run.garbage_collect_values = False
    run.run(x)
    views = (torch.ops.aten.expand.default, torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default)
    nodes = [n for n in run.env if n.op == "call_function" and n.target not in views]
    return [n.target.overloadpacket.__name__ for n in nodes if run.env[n].numel() >= size]


def normal_likelihood(x, data):
    """As distributions write it, of a location that varies with the data and a scale that does not."""
    loc, scale = x[:, :1] + x[:, 1:2] * data.flip(0), x[:, 2:].exp().expand(len(x), len(data))
    return (-((data - loc) ** 2) / (2 * scale**2) - scale.log() - 0.5 * np.log(2 * np.pi)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_the_same_for_all_data_is_applied_to_sums(dtype):
    x, data = torch.randn(20, 3, dtype=dtype), torch.randn(1000, dtype=dtype) + 3.0
    graph = simplified(recorded(partial(normal_likelihood, data=data), x), x)
    assert large_operations(graph, x, 20_000) == ["mul", "add", "sub", "pow"]

    def with_gradient(call):
        point = (x + 0.1).requires_grad_()
        value = call(point)
        return value, torch.autograd.grad(value.square().sum(), point)[0]

    tolerance = {"rtol": 1e-4, "atol": 1e-2} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-9}
    expected = with_gradient(partial(normal_likelihood, data=data))
    for call in (graph, compiled(graph)):
        for found, wanted in zip(with_gradient(call), expected, strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)


def test_sums_that_nothing_needs_are_left_out():
    x, data = torch.randn(20, 1, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)

    def function(x):
        y = (x - data).exp()
        y.sum(-1), (y * x).sum(0)
        z = (x - data).exp() * x
        return z.sum(-1) + y.sum(-1), y.neg().sum() + (-(y * 2)).sum(-1), y.sum((0, 1))

    graph = simplified(recorded(function, x), x)
    assert large_operations(graph, x, 20_000) == ["sub", "exp"]
    for found, wanted in zip(compiled(graph)(2 * x), function(2 * x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_step_passes_few_times_over_draws_times_data():
    data = torch.randn(1000, dtype=torch.float64) + 3.0
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def step():
        x = torch.randn(20, 3, dtype=torch.float64) * 0.1 + weight
        loss = normal_likelihood(x, data).mean()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    graph = simplified(make_fx(step)(), differentiable=False)
    names = [n.target.overloadpacket.__name__ for n in graph.graph.nodes if n.op == "call_function"]
    written_over = [n for n in graph.graph.nodes if "out" in n.kwargs]
    assert len(written_over) >= 3 and names.count("sum") <= 8
    call = compiled(graph)
    for value in (0.0, 0.3):
        with torch.no_grad():
            weight.fill_(value)
        torch.manual_seed(0)
        expected = step()
        for _ in range(2):  # nothing that is needed again is written over
            torch.manual_seed(0)
            with torch.no_grad():
                found = call()
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_differences_from_a_mean_are_summed_as_they_are():
    """The sum of the data, less as many means, would have lost its digits."""
    x, data = torch.full((4, 1), 1e4), 1e4 + torch.linspace(-1.0, 1.5, 5001)
    graph = simplified(recorded(lambda x: ((data - x.expand(4, 5001)) * 2).sum(-1), x), x)
    expected = 2 * (data.double() - 1e4).sum().expand(4)
    torch.testing.assert_close(graph(x).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_product_is_scaled_once(sign):
    x, data = torch.rand(8, 1, dtype=torch.float64) + 1, torch.randn(1000, dtype=torch.float64)

    def function(x):
        scaled = (data * x).exp() * 2.0 / 0.25
        return -(scaled * x.expand(8, 1000) if sign > 0 else scaled / x.expand(8, 1000)).sin() + x * 0.0

    graph = simplified(recorded(function, x), x)
    names = large_operations(graph, x, 8000)
    assert sum(name in ("mul", "div", "neg") for name in names) == 2  # data * x and the scale; the sine is subtracted
    torch.testing.assert_close(compiled(graph)(2 * x), function(2 * x), rtol=1e-13, atol=0)


def test_a_mixture_takes_few_passes_along_long_rows():
    """One shift of its log-densities, factors applied to sums, and components apart in memory."""
    data, x = torch.randn(1000, dtype=torch.float64), torch.rand(20, 4, dtype=torch.float64) + 0.5

    def mixture(x):
        loc, scale = x[:, None, :2].expand(20, 1000, 2), x[:, None, 2:].expand(20, 1000, 2)
        terms = -((data[:, None] - loc) ** 2) / (2 * scale**2) - scale.log() - 0.9
        return (terms + x[:, None, 2:].log_softmax(-1)).logsumexp(-1).sum(-1)

    graph = simplified(recorded(mixture, x), x)
    assert large_operations(graph, x, 40_000) == ["transpose", "sub", "transpose", "pow", "div", "add"]
    run = fx.Interpreter(graph)
    run.garbage_collect_values = False
    run.run(x)
    power = next(value for node, value in run.env.items() if node.target is torch.ops.aten.pow.Tensor_Scalar)
    assert power.shape == (20, 1000, 2) and power.stride() == (2000, 1, 1000)

    def with_gradient(call, x):
        x = x.detach().requires_grad_()
        value = call(x)
        return value.detach(), torch.autograd.grad(value.square().sum(), x)[0]

    recorded_gradient = make_fx(partial(with_gradient, graph))(x)
    step = simplified(recorded_gradient, x, differentiable=False)
    names = large_operations(step, x, 40_000)
    backward = ["sub", "exp", "mul", "mul", "mul", "mul"]
    assert [n for n in names if n != "transpose"] == ["sub", "pow", "div", "add", *backward]
    for found, wanted in zip(compiled(step)(1.5 * x), with_gradient(mixture, 1.5 * x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("last", [slice(None), (slice(None), slice(None), 0)], ids=["a view of it", "a part of it"])
def test_what_is_not_reduced_keeps_its_order_in_memory(last):
    x, data = torch.randn(30, 1, 2, dtype=torch.float64), torch.randn(200, 1, dtype=torch.float64)

    def function(x):
        y = (data - x).exp()
        return y[last].sum(-1), y.sum(-1), y.view(-1)

    graph = simplified(make_fx(function)(x), x)
    assert torch.ops.aten.transpose.int not in [node.target for node in graph.graph.nodes]
    for found, wanted in zip(compiled(graph)(2 * x), function(2 * x), strict=True):
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_multiples_are_added_in_one_operation():
    x = torch.rand(5, dtype=torch.float64)

    def function(x):
        kept = x.exp() * 0.5
        moved = x + x.sin() * 0.25 - x.cos() / 4 + -x.sigmoid() + kept
        return moved, kept, (-x.tanh()) - x.log1p(), x + x.float() * 0.1

    graph = simplified(make_fx(function)(x), x)
    names = [n.target.overloadpacket.__name__ for n in graph.graph.nodes if n.op == "call_function"]
    # what is returned stays, and so do what is subtracted from and a product that is rounded to fewer digits
    assert names.count("mul") == 2 and names.count("neg") == 1 and names.count("div") == 0
    for found, wanted in zip(compiled(graph)(2 * x), function(2 * x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_only_what_nothing_needs_any_more_is_written_over():
    """Neither what is returned, nor what a view shows that is read later, nor parameters or data."""
    data, weight = torch.rand(5000, dtype=torch.float64), torch.ones(5000, dtype=torch.float64, requires_grad=True)

    def step():
        a = torch.randn(5000, dtype=torch.float64).exp() * weight.detach()
        rows, returned = a.view(50, 100), a + data
        b = a.sqrt()  # its operand is read by way of rows
        c = (b + rows.sum(0).repeat(50)).exp()
        square = torch.randn(80, 80, dtype=torch.float64).exp()
        return returned, data.neg().neg(), c.neg(), (weight * 2).detach(), square - square.t()

    graph = simplified(make_fx(step)(), differentiable=False)
    assert any("out" in n.kwargs for n in graph.graph.nodes)
    call, before = compiled(graph), (data.clone(), weight.detach().clone())
    for _ in range(2):
        torch.manual_seed(1)
        expected = step()
        torch.manual_seed(1)
        with torch.no_grad():
            found = call()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close((data, weight.detach()), before, rtol=0, atol=0)


def test_a_compiled_graph_calls_what_its_operations_are():
    """Those with torch's own bindings too, by all of their arguments."""
    x = torch.randn(3, 4, dtype=torch.float64)

    def function(x):
        a, b = torch.split_with_sizes(x, [1, 3], -1)
        c = torch.cat([a, b.flip(-1)], -1).sum(0, keepdim=True) + torch.stack([x, x.sigmoid()], 1).sum([0, 1])
        d = torch.addcmul(c, x, x.tanh(), value=0.5).masked_fill(x > 0.2, 2.0).unbind(1)[0]
        e = (
            torch.where(x > 0, x.exp(), x.abs().log1p()).transpose(0, 1) @ x.tril(-1)
            + torch.addmm(c[0], x, x.t() @ x)[0]
        )
        return d.sum() + torch.add(e, c, alpha=3).relu().sqrt().view(2, 8).sum(1, dtype=torch.float64)

    graph = simplified(make_fx(function)(x), x)
    torch.testing.assert_close(compiled(graph)(2 * x), function(2 * x), rtol=0, atol=0)


def test_what_is_changed_in_place_and_used_nowhere_else_is_simplified_too():
    x = torch.randn(4, dtype=torch.float64)
    graph = simplified(make_fx(lambda x: ((2 * x).sigmoid_() + 0.0).masked_fill_(x < 0, 1.0))(x), x)
    assert operations(graph) == 4
    torch.testing.assert_close(graph(2 * x), torch.where(x < 0, 1.0, (4 * x).sigmoid()))


def test_a_graph_that_changes_tensors_in_place_is_left_as_it_is():
    x = torch.randn(4, dtype=torch.float64)

    def twice(x):
        y = SCALE.new_zeros(4) + 1
        y[:2].add_(x[:2])
        return y + x

    graph = make_fx(twice)(x)
    before = operations(graph)
    graph = simplified(graph, x)
    assert operations(graph) == before
    torch.testing.assert_close(graph(2 * x), twice(2 * x))


class Counting(TorchFunctionMode):
    """As ``torch.set_default_device`` puts itself before every operation."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_compiled_graph_runs_past_modes_of_torch_functions():
    x = torch.randn(5, 3, dtype=torch.float64)
    graph = simplified(recorded(density, x), x)
    with Counting() as plain:
        expected = graph(x)
    with Counting() as mode:
        found = compiled(graph)(x)
    assert plain.calls > 5 and mode.calls == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def gradient_step(weight, function=torch.tanh):
    """A gradient by what may change, at random draws."""

    def step():
        x = torch.randn(5, 4, dtype=weight.dtype)
        loss = (function(x * weight.exp()) - weight.view(2, 2).t().reshape(-1)).square().sum()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    return step


def test_a_recorded_step_sees_changed_parameters_and_draws_anew():
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    step = gradient_step(weight)
    torch.manual_seed(0)
    expected = step()
    torch.manual_seed(0)
    graph = recorded_step(step, weight.device)
    assert graph is not step
    for draws in range(3):  # recording has drawn nothing
        for found, wanted in zip(graph(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
        assert not graph()[0].requires_grad
        with torch.no_grad():
            weight.add_(0.1)
        torch.manual_seed(draws + 1)
        expected = step()
        torch.manual_seed(draws + 1)


def test_a_recorded_step_takes_what_it_is_given():
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    data, rows = torch.randn(9, 4, dtype=torch.float64), torch.tensor([[0, 1, 5], [2, 8, 8], [3, 3, 4]])

    def step(at):
        loss = (data[at] * weight.exp() + torch.randn(4, dtype=weight.dtype)).square().sum()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    graph = recorded_step(step, weight.device, [rows[0]], [rows[1]])
    assert graph is not step
    for at in rows:
        torch.manual_seed(0)
        expected = step(at)
        torch.manual_seed(0)
        for found, wanted in zip(graph(at), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    looks = lambda at: step(at if int(at[0]) == 0 else 8 - at)  # noqa: E731
    assert recorded_step(looks, weight.device, [rows[0]], [rows[1]]) is looks
    repeats = lambda at: step(at if at.data_ptr() != rows[1].data_ptr() else 8 - at)  # noqa: E731
    assert recorded_step(repeats, weight.device, [rows[0]], [rows[1]]) is repeats


def test_a_step_that_a_graph_cannot_hold_is_left_as_it_is():
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    step = gradient_step(weight, lambda x: x.tanh() if x.sum() > 0 else x)  # control flow by values
    assert recorded_step(step, weight.device) is step
    calls = []
    step = gradient_step(weight, lambda x: (calls.append(0), x * len(calls))[1])  # and by what is outside
    assert recorded_step(step, weight.device) is step


@pytest.mark.parametrize("failure", ["raises", "is wrong for large batches"])
def test_a_density_is_recorded_as_it_is_where_simplifying_it_fails(monkeypatch, failure):
    def broken(graph, u, **options):
        if failure == "raises":
            raise TypeError("an operation that no rule has foreseen")
        if len(u) < 100:
            return simplified(graph, u, **options)
        return make_fx(lambda u: u.sum(-1))(u)

    expected = AutoFlow(eight_schools).log_density()
    monkeypatch.setattr(log_density, "simplified", broken)
    density = AutoFlow(eight_schools).log_density()
    u = torch.randn(200, expected.dim)
    assert density.mode == "traced"
    torch.testing.assert_close(density(u), expected(u), rtol=1e-5, atol=1e-5)


def minibatches():
    """Its log-density is evaluated by a run of the model a batch, for it draws data anew each time."""
    data, mu = torch.linspace(-1, 3, 10), pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", 10, subsample_size=2) as index:
        pyro.sample("x", dist.Normal(mu.sum(-1), 1.0), obs=data[index])


@pytest.mark.parametrize(
    "model, options",
    [
        (eight_schools, {}),
        (eight_schools, {"base": MixtureBase}),
        (eight_schools, {"base_df": 5.0}),
        (eight_schools, {"path_gradient": False}),
        (minibatches, {}),
    ],
    ids=["default", "mixture", "student", "plain gradient", "minibatches"],
)
def test_recorded_steps_fit_as_plain_ones(monkeypatch, model, options):
    graphs = []

    def spied(function, device):
        graphs.append(recorded_step(function, device))
        assert graphs[-1] is not function
        return graphs[-1]

    monkeypatch.setattr(inference, "recorded_step", spied)
    vi = FlowVI(
        model,
        partial(flows.realnvp, num_layers=2),
        num_steps=20,
        num_particles=8,
        progress_bar=False,
        **options,
    )
    guide = vi._guide(vi.base_df, vi.base, (), {})
    log_density = guide.log_density()
    assert log_density.mode == ("plates" if model is minibatches else "traced")

    def elbo(record_from):
        monkeypatch.setattr(inference, "RECORD_FROM", record_from)
        pyro.set_rng_seed(0)
        return vi._ascend(copy.deepcopy(guide), log_density).elbo

    recorded, plain = elbo(0), elbo(100)
    assert len(graphs) == 1
    np.testing.assert_allclose(recorded, plain, rtol=1e-8)


def normal_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 2.0)), 1.0), obs=x)


def fit_amortised(objective):
    vi = AmortisedFlowVI(
        normal_mean,
        partial(flows.realnvp, num_layers=2, hidden_dims=(8,)),
        encoder=MLPEncoder(5, 2, hidden_dims=(8,)),
        objective=objective,
        num_steps=20,
        batch_size=16,
        progress_bar=False,
    )
    return vi.fit(torch.zeros(5)).history


def fit_mixture(context):
    flow = flows.maf(2, num_layers=2, context_dim=1 if context else 0)
    data = torch.randn(100, 2)
    options = {"context": data[:, :1] + 1} if context else {"base": MixtureBase(2, 3)}
    return fit_density(flow, data, num_steps=20, batch_size=16, progress_bar=False, **options)[1]


@pytest.mark.parametrize(
    "fit",
    [partial(fit_amortised, "forward_kl"), partial(fit_amortised, "elbo"), *(partial(fit_mixture, c) for c in (0, 1))],
    ids=["simulations", "amortised ELBO", "learned base", "context"],
)
def test_recorded_trainings_fit_as_plain_ones(monkeypatch, fit):
    graphs = []

    def spied(function, *args):
        graphs.append(recorded_step(function, *args))
        assert graphs[-1] is not function
        return graphs[-1]

    monkeypatch.setattr(training, "recorded_step", spied)

    def losses(record_from):
        monkeypatch.setattr(training, "RECORD_FROM", record_from)
        pyro.set_rng_seed(0)
        return fit().losses

    recorded, plain = losses(0), losses(100)
    assert len(graphs) == 1
    np.testing.assert_allclose(recorded, plain, rtol=1e-6)


def test_a_batch_of_another_kind_is_not_run_by_the_graph():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    gradient = training.Gradient(lambda batch: (batch["x"] * weight).sum() * batch["times"], training.Ascent([weight]))
    batches = [{"x": torch.ones(n), "times": times} for n, times in ((3, 1), (3, 1), (4, 1), (3, 2))]
    gradient.record(batches[:2])
    assert gradient.graph is not None
    assert [float(gradient(batch)[1]) for batch in batches] == [3, 3, 4, 6]
    of_any_size = training.Gradient(gradient.loss, gradient.ascent)
    of_any_size.record(batches)
    assert of_any_size.graph is None
