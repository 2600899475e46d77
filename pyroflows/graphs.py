"""Recorded graphs of tensor operations, without what need not be computed anew at every call."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_BY_SHAPE = {  # constants, for a graph's shapes are fixed
    *(_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
}
_VIEWS = {
    *(_aten.view.default, _aten.expand.default, _aten.alias.default, _aten._to_copy.default),
    *(_aten.clone.default, _aten.lift_fresh_copy.default),
}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}
_PRODUCTS = {_aten.mul.Tensor, _aten.div.Tensor}


def simplified(recorded: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """The same function, without operations on constants, those that change nothing, and those that nothing needs.

    What a model computes of its data alone (logarithms of scales, normalisers) is computed once. Tensors that require a
    gradient may change between calls, and count as no constants; nor do random draws. A graph that changes tensors in
    place, which might be constants, is left as it is.

    :param recorded: a graph of ``make_fx`` of one tensor, functionalised.
    :param x: an input of the graph.
    """
    graph = recorded.graph
    if any(_schema(node) is not None and _schema(node).is_mutable for node in graph.nodes):
        return recorded
    values = _Values(recorded)
    with torch.no_grad():
        values.run(x)
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            value = values.of[node]
            if isinstance(value, Tensor) and not value.requires_grad:
                constants.add(node)
        elif node.op == "call_function" and _is_pure(node):
            if node.target in _BY_SHAPE or all(source in constants for source in node.all_input_nodes):
                constants.add(node)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in constants:
            continue
        same = _unchanged(node, values.of, constants)
        if same is not None:
            node.replace_all_uses_with(same)
    number = 0
    for node in list(graph.nodes):
        used = [user for user in node.users if user not in constants]
        if node not in constants or node.op == "get_attr" or not used or not isinstance(values.of[node], Tensor):
            continue
        name, number = f"_folded{number}", number + 1
        recorded.register_buffer(name, values.of[node].clone(), persistent=False)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()
    graph.lint()
    recorded.recompile()
    return recorded


class _Values(fx.Interpreter):
    """Remembers the value of every node."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _unchanged(node: fx.Node, values: dict[fx.Node, Any], constants: set[fx.Node]) -> fx.Node | None:
    """The input that the operation returns as it is, if there is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(values[node], Tensor):
        return None
    if node.target is _aten.sum.dim_IntList and source.target is _aten.unsqueeze.default and len(node.args) == 2:
        inner = source.args[0]
        summed = math.prod(values[source].shape[dim] for dim in node.args[1])  # type: ignore[union-attr, misc]
        return inner if summed == 1 and _alike(values[node], values[inner]) else None  # type: ignore[index, return-value]
    if node.target in _VIEWS:
        return source if _alike(values[node], values[source]) else None
    neutral = 0 if node.target in _SUMS else 1 if node.target in _PRODUCTS else None
    if neutral is None or len(node.args) != 2 or node.kwargs:
        return None
    pairs = [(node.args[0], node.args[1])]
    if node.target in (_aten.add.Tensor, _aten.mul.Tensor):
        pairs.append((node.args[1], node.args[0]))
    for kept, other in pairs:
        is_constant = not isinstance(other, fx.Node) or other in constants
        value = values[other] if isinstance(other, fx.Node) else other
        if isinstance(kept, fx.Node) and is_constant and _all(value, neutral) and _alike(values[node], values[kept]):
            return kept
    return None


def _all(value: Any, number: int) -> bool:
    return bool((value == number).all()) if isinstance(value, Tensor) else value == number


def _alike(a: Any, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
