"""Recorded graphs of tensor operations, without what need not be computed anew at every call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten
_BY_SHAPE = {  # constants, for a graph's shapes are fixed
    *(_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
}
_VIEWS_AND_COPIES = {
    *(_aten.view.default, _aten.expand.default, _aten.slice.Tensor, _aten.alias.default),
    *(_aten._to_copy.default, _aten.clone.default, _aten.lift_fresh_copy.default),
}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor, _aten.add.Scalar, _aten.sub.Scalar}
_PRODUCTS = {_aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar, _aten.pow.Tensor_Scalar}
_SMALL = 2**14  # numbers, which a constant may always take
_POINTWISE = {  # operations on each number by itself
    *(getattr(_aten, name).default for name in ("neg", "exp", "log", "log1p", "sqrt", "reciprocal", "sigmoid", "tanh")),
    *(getattr(_aten, name).default for name in ("abs", "lgamma", "digamma", "softplus")),
    *(_SUMS | _PRODUCTS | {_aten.rsub.Scalar}),
}
_ALONG_AN_AXIS = {_aten._log_softmax.default, _aten._softmax.default}
_BY_NUMBER = {  # the like operations between tensors
    **{op: op for op in (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)},
    **{_aten.add.Scalar: _aten.add.Tensor, _aten.sub.Scalar: _aten.sub.Tensor},
    **{_aten.mul.Scalar: _aten.mul.Tensor, _aten.div.Scalar: _aten.div.Tensor, _aten.rsub.Scalar: _aten.sub.Tensor},
}
_BOUND = {  # operations with a binding that takes the same arguments, and reads them faster
    *("add", "sub", "mul", "div", "neg", "exp", "log", "log1p", "expm1", "sigmoid", "tanh", "relu", "sqrt", "addcmul"),
    *("mm", "addmm", "bmm", "t", "transpose", "sum", "cat", "stack", "unbind", "split_with_sizes", "where", "flip"),
    *("tril", "masked_fill"),
}


def recorded_step(function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """A function that takes gradients of what it closes over, as one graph: autograd runs once, while it is recorded.

    The tensors that require a gradient may change between calls, in place; all others, and the course of the function,
    may not. It is returned as it is where it cannot be recorded, or does something else than its graph for the same
    random numbers.

    :param function: returns tensors without gradients.
    :param device: on which it draws its random numbers.
    """

    def with_same_draws(call: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
            return call()

    expected = with_same_draws(function)  # first, for it may record graphs itself
    try:
        graph = with_same_draws(lambda: simplified(make_fx(function)(), differentiable=False))
        call = torch.no_grad()(compiled(graph))
        found = with_same_draws(call)
    except Exception:  # whatever a flow or a base does that a graph cannot
        return function
    return call if all(map(close, found, expected)) else function


def simplified(recorded: fx.GraphModule, *inputs: Tensor, differentiable: bool = True) -> fx.GraphModule:
    """The same function, without operations on constants, those that change nothing, and those that nothing needs.

    What a model computes of its data alone (logarithms of scales, normalisers) is computed once, and so are repeated
    operations, and views of parameters. What it computes of a scale, of shares, or of a product with the data is
    computed for each draw, not for each draw and datum. Tensors that require a gradient may change between calls, in
    place, and count as no constants; nor do random draws. A graph that changes tensors in place, which might be
    constants, is left as it is.

    :param recorded: a graph of ``make_fx``.
    :param inputs: of the graph.
    :param differentiable: whether gradients are taken through the graph; they flow past ``detach`` otherwise.
    """
    graph = recorded.graph
    for node in graph.nodes:
        _take_for_functional(node)
    if any(_schema(node) is not None and _schema(node).is_mutable for node in graph.nodes):
        return recorded
    if not differentiable:
        for node in graph.nodes:
            if node.target is _aten.detach.default:
                node.replace_all_uses_with(node.args[0])
    _merge_equal(graph)
    graph.eliminate_dead_code()
    run = _Run(recorded)
    with torch.no_grad():
        run.run(*inputs)
    values, constants = run.values, run.constants
    for node in list(graph.nodes):
        if node.op != "call_function" or node in constants:
            continue
        same = _unchanged(node, run)
        if same is not None:
            node.replace_all_uses_with(same)
    _expand_results(graph, run)
    _merge_equal(graph)
    _share_matrices(recorded, run)
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
    _numbers_to_tensors(recorded, values)
    graph.eliminate_dead_code()
    graph.lint()
    recorded.recompile()
    return recorded


def _take_for_functional(node: fx.Node) -> None:
    """Turns a change in place of a value that nothing else uses, nor shares memory with, into the like operation."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable or not schema.name.endswith("_"):
        return
    changed = node.args[0]
    if not isinstance(changed, fx.Node) or list(changed.users) != [node] or not _is_pure(changed) or _is_view(changed):
        return
    namespace, name = schema.name.split("::")
    packet, overload = getattr(getattr(torch.ops, namespace), name[:-1], None), schema.overload_name or "default"
    if packet is not None and overload in packet.overloads():
        node.target = getattr(packet, overload)


def _merge_equal(graph: fx.Graph) -> None:
    """Takes one of operations that are the same on the same.

    (torch's ``CSEPass`` keeps every ``get_attr``, and a list of random operations which is not all of them.)
    """
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            key: Any = node.target
        elif node.op == "call_function" and _is_pure(node):
            # numbers by type as well, for 1 == 1.0 == True
            key = node.target, repr(node.args), repr(node.kwargs)
        else:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node


def _expand_results(graph: fx.Graph, run: _Run) -> None:
    """Expands what is computed of a tensor, not the tensor: a scale's logarithm is one, however many data there are."""
    values = run.values
    for node in list(graph.nodes):
        args: Any = node.args if node.target in _POINTWISE | _ALONG_AN_AXIS else (None,)
        source, *others = args
        if not isinstance(source, fx.Node) or source.target is not _aten.expand.default:
            continue
        base: Any = source.args[0]
        result = values[node]
        alike = [values[base], values[source], *(values[other] for other in others if isinstance(other, fx.Node))]
        if node.target in _ALONG_AN_AXIS:
            others[0] -= result.dim() if others[0] >= 0 else 0  # from the end
            axis, shape = others[0], values[base].shape
            if len(shape) < -axis or shape[axis] != result.shape[axis]:
                continue
        if any(x.dtype != result.dtype for x in alike) or any(x.dim() for x in alike[2:]):
            continue
        if alike[0].numel() >= result.numel() or alike[1].shape != result.shape or not _takes_any_order(node, run):
            continue
        with graph.inserting_before(node):
            of_base = graph.call_function(node.target, (base, *others), node.kwargs)
            expanded = graph.call_function(_aten.expand.default, (of_base, list(result.shape)))
        small = result.new_empty(()).expand(alike[0].shape)
        if node in run.constants:
            run.constants.update((of_base, expanded))
            small = node.target(*(values[x] if isinstance(x, fx.Node) else x for x in of_base.args), **node.kwargs)
        for new, value in ((of_base, small), (expanded, small.expand(result.shape))):
            run.note(new, value)
        node.replace_all_uses_with(expanded)


def _takes_any_order(node: fx.Node, run: _Run) -> bool:
    """Whether nothing depends on the order of a result in memory, as views do, and the results of these."""
    for user in node.users:
        if user.target not in _POINTWISE:
            return False
        others = [x for x in user.all_input_nodes if x is not node and run.values[x].dim()]
        if not others and not _takes_any_order(user, run):
            return False
        if not all(run.contiguous[x] and run.values[x].shape == run.values[user].shape for x in others):
            return False
    return True


def _share_matrices(recorded: fx.GraphModule, run: _Run) -> None:
    """Makes one product of a batch of products with the same matrix, as of many draws of coefficients with the data."""
    graph, values = recorded.graph, run.values
    for number, node in enumerate(list(graph.nodes)):
        if node.target is not _aten.bmm.default:
            continue
        a, b = node.args
        batch, rows, columns = values[node].shape
        left, right = (run.strides[x][0] == 0 for x in (a, b))
        if batch < 2 or not (right or left and columns == 1):
            continue
        shared, other = (b, a) if right else (a, b)
        with graph.inserting_before(node):
            if shared in run.constants:
                recorded.register_buffer(f"_shared{number}", values[shared][0], persistent=False)
                matrix = graph.get_attr(f"_shared{number}")
            else:
                matrix = graph.call_function(_aten.select.int, (shared, 0, 0))
            if not right:
                matrix = graph.call_function(_aten.t.default, (matrix,))
            flat = graph.call_function(_aten.reshape.default, (other, [-1, values[other].shape[2 if right else 1]]))
            product = graph.call_function(_aten.mm.default, (flat, matrix))
            node.replace_all_uses_with(graph.call_function(_aten.view.default, (product, [batch, rows, columns])))


def _numbers_to_tensors(recorded: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Makes the tensors once that torch makes of numbers at every call, which takes as long as a small product."""
    names: dict[tuple[float, torch.dtype], str] = {}
    for node in list(recorded.graph.nodes):
        target = _BY_NUMBER.get(node.target)
        if target is None or len(node.args) < 2 or node.kwargs or not isinstance(node.args[1], float | int):
            continue
        source, number, *factor = node.args  # of the second, in sums
        of, result = values.get(source), values[node]
        if not isinstance(of, Tensor) or of.dtype != result.dtype or not result.dtype.is_floating_point:
            continue
        if result.device.type != "cpu":  # where a number is an argument of the kernel
            continue
        name = names.setdefault((number, result.dtype), f"_number{len(recorded._buffers)}")
        if name not in recorded._buffers:
            recorded.register_buffer(name, torch.tensor(number, dtype=result.dtype, device="cpu"), persistent=False)
        with recorded.graph.inserting_before(node):
            pair = source, recorded.graph.get_attr(name)
            reverse = node.target is _aten.rsub.Scalar
            node.target, node.args = target, pair[::-1] if reverse else pair
            node.kwargs = {"alpha": factor[0]} if factor else {}


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


class _Run(fx.Interpreter):
    """Finds out which nodes are constants; remembers their values, and the shapes of the others'."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.strides: dict[fx.Node, Any] = {}
        self.contiguous: dict[fx.Node, bool] = {}
        self.constants: set[fx.Node] = set()
        self.views: dict[fx.Node, Any] = {}  # of tensors that may change, in place

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            constant = isinstance(value, Tensor) and not value.requires_grad
        else:
            known = n.target in _BY_SHAPE or all(source in self.constants for source in n.all_input_nodes)
            constant = n.op == "call_function" and _is_pure(n) and known
        if constant:
            self.constants.add(n)
            self.note(n, value)
            return value
        if n.op == "get_attr" or (_is_view(n) and all(source in self.views for source in n.all_input_nodes)):
            self.views[n] = value
        self.note(n, value)
        return value

    def note(self, n: fx.Node, value: Any) -> None:
        """Remembers a constant, or the shape of another value, and its order in memory."""
        tensor = isinstance(value, Tensor)
        self.strides[n], self.contiguous[n] = (value.stride(), value.is_contiguous()) if tensor else (None, False)
        if n not in self.constants:
            value = value.new_empty(()).expand(value.shape) if tensor else None
        self.values[n] = value


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _is_view(node: fx.Node) -> bool:
    """Whether the result shares memory with the inputs, or may (an element of a result)."""
    if node.target is operator.getitem:
        return True
    schema = _schema(node)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _unchanged(node: fx.Node, run: _Run) -> fx.Node | None:
    """The input that the operation returns as it is, if there is one."""
    values, constants = run.values, run.constants
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(values[node], Tensor):
        return None
    if node.target is _aten.sum.dim_IntList and source.target is _aten.unsqueeze.default and len(node.args) == 2:
        inner = source.args[0]
        summed = math.prod(values[source].shape[dim] for dim in node.args[1])  # type: ignore[union-attr, misc]
        return inner if summed == 1 and _alike(values[node], values[inner]) else None  # type: ignore[index, return-value]
    part = _part_of_cat(node, run)
    if part is not None:
        return part
    if node.target is _aten.t.default and source.target is _aten.t.default:
        return source.args[0]  # type: ignore[return-value]
    if node.target in _VIEWS_AND_COPIES:  # copies may be made for the sake of their order in memory
        same = run.strides[node] == run.strides[source] and _alike(values[node], values[source])
        return source if same else None
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


def _part_of_cat(node: fx.Node, run: _Run) -> fx.Node | None:
    """The tensor that an operation takes out of joined ones, if it does: layers split what the last one has joined."""
    args: Any = node.args
    joined: Any
    if node.target is operator.getitem and args[0].target is _aten.split_with_sizes.default:
        joined, sizes, dim = (*args[0].args, 0)[:3]
        start, length = sum(sizes[: args[1]]), sizes[args[1]]
    elif node.target is _aten.slice.Tensor and len(args) == 4:
        joined, dim, start, _ = args
        length = run.values[node].shape[dim]
    else:
        return None
    if joined.target is not _aten.cat.default or start < 0:
        return None
    parts, across = (*joined.args, 0)[:2]
    if (across - dim) % run.values[joined].ndim:
        return None
    position = 0
    for part in parts:
        if position == start and run.values[part].shape[dim] == length and _alike(run.values[node], run.values[part]):
            return part if run.contiguous[part] or run.strides[part] == run.strides[node] else None
        position += run.values[part].shape[dim]
    return None


def _size(x: Tensor) -> int:
    """Numbers in memory."""
    return x.untyped_storage().nbytes() // x.element_size()


def _all(value: Any, number: int) -> bool:
    return bool((value == number).all()) if isinstance(value, Tensor) else value == number


def _alike(a: Any, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same to half of their digits."""
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
