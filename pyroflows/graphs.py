"""Recorded graphs of tensor operations, without what need not be computed anew at every call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.graph_rules import (
    Run,
    add_scaled,
    expand_results,
    lay_out_for_reductions,
    merge_equal,
    numbers_to_tensors,
    reuse_memory,
    scale_once,
    schema_of,
    share_matrices,
    shift_once,
    sum_first,
    take_for_functional,
    transpose_results,
    unchanged,
)

_aten = torch.ops.aten
_SMALL = 2**14  # numbers, which a constant may always take
_BOUND = {  # operations with a binding that takes the same arguments, and reads them faster
    *("add", "sub", "mul", "div", "neg", "exp", "log", "log1p", "expm1", "sigmoid", "tanh", "relu", "sqrt", "addcmul"),
    *("mm", "addmm", "bmm", "t", "transpose", "sum", "cat", "stack", "unbind", "split_with_sizes", "where", "flip"),
    *("tril", "masked_fill"),
}


def record(function: Callable[..., Any], *inputs: Tensor, decompositions: Any = None) -> fx.GraphModule:
    """The graph of ``make_fx``, which notes the shapes of all results in one mode here, not in a new one for each: that
    takes more than half of the time."""
    with _one_mode():
        return make_fx(function, decompositions)(*inputs)


def _one_mode() -> AbstractContextManager:
    try:  # of torch's own, from where a later version may take it
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode

        return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    except (ImportError, TypeError):
        return nullcontext()


def recorded_step(
    function: Callable[..., tuple[Tensor, ...]],
    device: torch.device,
    inputs: Sequence[Tensor] = (),
    others: Sequence[Tensor] = (),
) -> Callable[..., tuple[Tensor, ...]]:
    """A function that takes gradients of what it closes over, as one graph: autograd runs once, while it is recorded.

    Its inputs may change between calls, and in place the tensors that require a gradient; all others, and the course of
    the function, may not. It is returned as it is where it cannot be recorded, or does something else than its graph
    for the same random numbers.

    :param function: returns tensors without gradients.
    :param device: on which it draws its random numbers.
    :param inputs: such as it will be given, of the shapes to come.
    :param others: as many, at which the graph is compared with it.
    """

    def with_same_draws(call: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
            return call()

    expected = with_same_draws(lambda: function(*others))  # first, for it may record graphs itself
    try:
        graph = with_same_draws(lambda: simplified(record(function, *inputs), *inputs, differentiable=False))
        call = torch.no_grad()(compiled(graph))
        found = with_same_draws(lambda: call(*others))
    except Exception:  # whatever a flow or a base does that a graph cannot
        return function
    return call if all(map(close, found, expected)) else function


def simplified(recorded: fx.GraphModule, *inputs: Tensor, differentiable: bool = True) -> fx.GraphModule:
    """The same function, without operations on constants, those that change nothing, and those that nothing needs.

    What a model computes of its data alone (logarithms of scales, normalisers) is computed once, and so are repeated
    operations, and views of parameters. What it computes of a scale, of shares, or of a product with the data is
    computed for each draw, not for each draw and datum; what is the same for all data is applied to sums over them, and
    a tensor of draws times data is scaled and shifted once. Results agree to rounding. Tensors that require a gradient
    may change between calls, in place, and count as no constants; nor do random draws. A graph that changes tensors in
    place, which might be constants, is left as it is.

    :param recorded: a graph of :func:`record`.
    :param inputs: of the graph.
    :param differentiable: whether gradients are taken through the graph; they flow past ``detach`` otherwise, and large
        results are written over what is needed no more.
    """
    graph = recorded.graph
    for node in graph.nodes:
        take_for_functional(node)
    if any(schema_of(node) is not None and schema_of(node).is_mutable for node in graph.nodes):
        return recorded
    if not differentiable:
        for node in graph.nodes:
            if node.target is _aten.detach.default:
                node.replace_all_uses_with(node.args[0])
    merge_equal(graph)
    graph.eliminate_dead_code()
    run = _followed(recorded, inputs)
    transpose_results(graph, run)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in run.constants:
            continue
        same = unchanged(node, run)
        if same is not None:
            node.replace_all_uses_with(same)
    expand_results(graph, run)
    sum_first(graph, run)
    scale_once(graph, run)
    shift_once(graph, run)
    add_scaled(graph, run)
    merge_equal(graph)
    if lay_out_for_reductions(graph, run):
        graph.eliminate_dead_code()
        run = _followed(recorded, inputs)
    values, constants = run.values, run.constants
    share_matrices(recorded, run)
    # a batch of draws times the data may be large: no more is kept than the model's own constants take
    largest = max([_SMALL, *(_size(values[node]) for node in constants if node.op == "get_attr")])
    kept = {n for n in constants if not isinstance(values[n], Tensor) or _size(values[n]) <= largest}
    if not differentiable:  # else they would be constants to autograd
        values.update(run.views)
        kept.update(run.views)
    for number, node in enumerate(list(graph.nodes)):
        used = any(user not in kept for user in node.users)
        if node in kept and node.op != "get_attr" and used and isinstance(values[node], Tensor):
            recorded.register_buffer(f"_folded{number}", values[node], persistent=False)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded{number}"))
    numbers_to_tensors(recorded, values)
    graph.eliminate_dead_code()
    if not differentiable:
        reuse_memory(graph, run)
    graph.lint()
    recorded.recompile()
    return recorded


@torch.no_grad()
def _followed(recorded: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Run:
    run = Run(recorded)
    run.run(*inputs)
    return run


def compiled(recorded: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a plain function: what it calls and what it holds are looked up once, not at every call.

    Graph modules spend as long on looking up and wrapping operations as these take on small tensors. Modes of
    torch functions, as ``torch.set_default_device`` is one, are passed by: a graph knows its devices.
    """
    scope: dict[str, Any] = {}
    names: dict[Any, str] = {}

    def bound(key: Any, value: Any) -> str:
        if key not in names:
            names[key] = f"__{len(names)}"
            scope[names[key]] = value
        return names[key]

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(written, value)) + "]"
        plain = value is None or isinstance(value, bool | int | str)
        return repr(value) if plain else bound((type(value), repr(value)), value)

    last_user = {source: node for node in recorded.graph.nodes for source in node.all_input_nodes}
    inputs, lines = [], ["pass"]
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.name)
        elif node.op == "get_attr":
            scope[node.name] = operator.attrgetter(node.target)(recorded)
        elif node.op == "output":
            lines.append(f"return {written(node.args[0])}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {written(node.args[0])}[{written(node.args[1])}]")
        else:
            function = bound(node.target, _function(node.target))
            arguments = [written(a) for a in node.args] + [f"{k}={written(a)}" for k, a in node.kwargs.items()]
            lines.append(f"{node.name} = {function}({', '.join(arguments)})")
        done = [n.name for n in node.all_input_nodes if last_user[n] is node and n.op == "call_function"]
        if done and node.op != "output":
            lines.append("del " + ", ".join(done))
    exec(f"def run({', '.join(inputs)}):\n    " + "\n    ".join(lines), scope)
    run = scope["run"]

    def call(*args: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return run(*args)

    return call


def _function(target: Any) -> Any:
    """What runs an operation: torch's binding, or else of an overload the function beneath."""
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None and str(packet).startswith("aten.") else ""
    if name == "view":
        return torch._C.TensorBase.view
    return getattr(torch._C._VariableFunctions, name) if name in _BOUND else getattr(target, "_op", target)


def _size(x: Tensor) -> int:
    """Numbers in memory."""
    return x.untyped_storage().nbytes() // x.element_size()


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same to half of their digits."""
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
