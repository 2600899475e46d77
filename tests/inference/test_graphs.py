"""Recorded log-densities in torch: simplified, and still the same functions."""

import pytest

torch = pytest.importorskip("torch")

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from pyroflows.graphs import simplified  # noqa: E402

SCALE = torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64)


def recorded(function, x):
    return make_fx(torch.func.functionalize(function))(x)


def operations(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


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
    x, data = torch.randn(50, 1, dtype=torch.float64), torch.rand(2000, dtype=torch.float64)

    def wide(x):
        return (x * data.exp() + (x + data).new_full((50, 2000), 2.0).log()).sum(-1)

    graph = simplified(recorded(wide, x), x)
    torch.testing.assert_close(graph(2 * x), wide(2 * x))
    sizes = [buffer.numel() for name, buffer in graph.named_buffers() if name.startswith("_folded")]
    assert sizes == [2000]


def test_a_graph_that_changes_tensors_in_place_is_left_as_it_is():
    x = torch.randn(4, dtype=torch.float64)
    graph = make_fx(lambda x: (SCALE.new_zeros(4) + 1).add_(x))(x)
    before = operations(graph)
    graph = simplified(graph, x)
    assert operations(graph) == before
    torch.testing.assert_close(graph(2 * x), 1 + 2 * x)
