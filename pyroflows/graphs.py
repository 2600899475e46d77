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
_VIEWS_AND_COPIES = {
    *(_aten.view.default, _aten.expand.default, _aten.alias.default, _aten._to_copy.default),
    *(_aten.clone.default, _aten.lift_fresh_copy.default),
}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}
_PRODUCTS = {_aten.mul.Tensor, _aten.div.Tensor}
_SMALL = 1024  # numbers, which a constant may always take


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
    run = _Run(recorded)
    with torch.no_grad():
        run.run(x)
    values, constants = run.values, run.constants
    for node in list(graph.nodes):
        if node.op != "call_function" or node in constants:
            continue
        same = _unchanged(node, values, constants)
        if same is not None:
            node.replace_all_uses_with(same)
    # a batch of draws times the data may be large: no more is kept than the model's own constants take
    largest = max([_SMALL, *(values[node].numel() for node in constants if node.op == "get_attr")])
    kept = {n for n in constants if not isinstance(values[n], Tensor) or values[n].numel() <= largest}
    for number, node in enumerate(list(graph.nodes)):
        used = any(user not in kept for user in node.users)
        if node in kept and node.op != "get_attr" and used and isinstance(values[node], Tensor):
            recorded.register_buffer(f"_folded{number}", values[node], persistent=False)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded{number}"))
    graph.eliminate_dead_code()
    graph.lint()
    recorded.recompile()
    return recorded


class _Run(fx.Interpreter):
    """Finds out which nodes are constants; remembers their values, and the shapes of the others'."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.constants: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            constant = isinstance(value, Tensor) and not value.requires_grad
        else:
            known = n.target in _BY_SHAPE or all(source in self.constants for source in n.all_input_nodes)
            constant = n.op == "call_function" and _is_pure(n) and known
        if constant:
            self.constants.add(n)
            self.values[n] = value
        else:
            self.values[n] = value.new_empty(()).expand(value.shape) if isinstance(value, Tensor) else None
        return value


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
    if node.target in _VIEWS_AND_COPIES:
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
