"""What a recorded graph need not compute, and what it can compute of less: the rules of ``graphs.simplified``."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

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
_QUOTIENTS = {_aten.div.Tensor, _aten.div.Scalar}
_SHORT = 16  # numbers in a row, of which loops do not make use
_LARGE = 2**12  # numbers, from which fewer passes over them are worth some operations on few
_POINTWISE = {  # operations on each number by itself
    *(getattr(_aten, name).default for name in ("neg", "exp", "log", "log1p", "sqrt", "reciprocal", "sigmoid", "tanh")),
    *(getattr(_aten, name).default for name in ("abs", "lgamma", "digamma", "softplus")),
    *(_SUMS | _PRODUCTS | {_aten.rsub.Scalar}),
}
_ALONG_AN_AXIS = {_aten._log_softmax.default, _aten._softmax.default}
_FRESH = {  # results with memory of their own
    *(getattr(_aten, name).default for name in ("mm", "addmm", "bmm", "cat", "stack", "addcmul", "logsumexp")),
    *(getattr(_aten, name).default for name in ("silu", "silu_backward", "relu", "threshold_backward")),
    *(getattr(_aten, name).default for name in ("sigmoid_backward", "tanh_backward")),
    *(_POINTWISE | _ALONG_AN_AXIS | {_aten.sum.dim_IntList, _aten.where.self}),
}
_BY_NUMBER = {  # the like operations between tensors
    **{op: op for op in (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)},
    **{_aten.add.Scalar: _aten.add.Tensor, _aten.sub.Scalar: _aten.sub.Tensor},
    **{_aten.mul.Scalar: _aten.mul.Tensor, _aten.div.Scalar: _aten.div.Tensor, _aten.rsub.Scalar: _aten.sub.Tensor},
}


class Run(fx.Interpreter):
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
            constant = n.op == "call_function" and is_pure(n) and known
        if constant:
            self.constants.add(n)
            self.note(n, value)
            return value
        if n.op == "get_attr" or (is_view(n) and all(source in self.views for source in n.all_input_nodes)):
            self.views[n] = value
        self.note(n, value)
        return value

    def add(self, graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operation where the graph takes them, with what is known of its result."""
        node = graph.call_function(target, args, kwargs)
        inputs = node.all_input_nodes
        constant = all(x in self.constants for x in inputs)

        def operand(x: Any) -> Tensor:
            like = self.values[x]
            return (
                like if constant else torch.empty_strided(like.shape, self.strides[x], dtype=like.dtype, device="meta")
            )

        with torch.no_grad():
            value = target(*fx.map_arg(node.args, operand), **fx.map_arg(node.kwargs, operand))
        if constant:
            self.constants.add(node)
        self.note(node, value, self.values[inputs[0]].device)
        return node

    def note(self, n: fx.Node, value: Any, device: torch.device | None = None) -> None:
        """Remembers a constant, or the shape of another value, and its order in memory."""
        tensor = isinstance(value, Tensor)
        self.strides[n], self.contiguous[n] = (value.stride(), value.is_contiguous()) if tensor else (None, False)
        if n not in self.constants:
            value = value.new_empty((), device=device).expand(value.shape) if tensor else None
        self.values[n] = value


def take_for_functional(node: fx.Node) -> None:
    """Turns a change in place of a value that nothing else uses, nor shares memory with, into the like operation."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable or not schema.name.endswith("_"):
        return
    changed = node.args[0]
    if not isinstance(changed, fx.Node) or list(changed.users) != [node] or not is_pure(changed) or is_view(changed):
        return
    namespace, name = schema.name.split("::")
    packet, overload = getattr(getattr(torch.ops, namespace), name[:-1], None), schema.overload_name or "default"
    if packet is not None and overload in packet.overloads():
        node.target = getattr(packet, overload)


def merge_equal(graph: fx.Graph) -> None:
    """Takes one of operations that are the same on the same.

    (torch's ``CSEPass`` keeps every ``get_attr``, and a list of random operations which is not all of them.)
    """
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            key: Any = node.target
        elif node.op == "call_function" and is_pure(node):
            # numbers by type as well, for 1 == 1.0 == True
            key = node.target, repr(node.args), repr(node.kwargs)
        else:
            continue
        if key in seen:
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node


def unchanged(node: fx.Node, run: Run) -> fx.Node | None:
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
    if node.target in (_aten.t.default, _aten.transpose.int) and source.target is node.target:
        return source.args[0] if source.args[1:] == node.args[1:] else None  # type: ignore[return-value]
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


def _part_of_cat(node: fx.Node, run: Run) -> fx.Node | None:
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


def transpose_results(graph: fx.Graph, run: Run) -> None:
    """Transposes the results of operations on one tensor, not the tensor, so that transpositions meet and cancel."""
    for node in list(graph.nodes):
        args: Any = node.args
        if node.target not in _POINTWISE or len(node.all_input_nodes) != 1 or node.kwargs or node in run.constants:
            continue
        if isinstance(args[0], fx.Node) and args[0].target is _aten.transpose.int:
            of, *axes = args[0].args
            with graph.inserting_before(node):
                new = run.add(graph, _aten.transpose.int, run.add(graph, node.target, of, *args[1:]), *axes)
            node.replace_all_uses_with(new)


def lay_out_for_reductions(graph: fx.Graph, run: Run) -> bool:
    """Keeps apart in memory what is summed over a short last axis, as of a mixture's components; whether there is any.

    Loops over two or three neighbours take several times as long as those over a long row. Results are the same, in
    another order in memory: what is known of them has to be found out anew.
    """
    found = False
    for node in list(graph.nodes):
        if node.target not in _POINTWISE or node.kwargs or node in run.constants:
            continue
        result, operands = run.values[node], node.all_input_nodes
        if result.dim() < 2 or result.numel() < _LARGE:
            continue
        if not 1 < result.shape[-1] <= min(_SHORT, result.shape[-2] // 4):
            continue
        if any(
            x not in run.values or (run.values[x].shape == result.shape and 0 not in run.strides[x]) for x in operands
        ):
            continue  # the result has the order of such an operand in memory
        if not _is_reduced(node, run):
            continue
        with graph.inserting_before(node):
            turned = {x: _transposed(x, run) for x in operands}
            new = graph.call_function(node.target, tuple(turned.get(x, x) for x in node.args))
            back = graph.call_function(_aten.transpose.int, (new, -2, -1))
        node.replace_all_uses_with(back)
        found = True
    return found


def _transposed(x: fx.Node, run: Run) -> fx.Node:
    dim = run.values[x].dim()
    if dim == 0:
        return x
    target, args = (_aten.transpose.int, (x, -2, -1)) if dim > 1 else (_aten.unsqueeze.default, (x, -1))
    return x.graph.call_function(target, args)


def _is_reduced(node: fx.Node, run: Run) -> bool:
    """Whether all that is computed of a result, number by number, ends in reductions, and one along the last axis."""
    shape, seen, to_do, along_last = run.values[node].shape, {node}, [node], False
    while to_do:
        for user in to_do.pop().users:
            if user.target in _POINTWISE and run.values[user].shape == shape:
                to_do += [user] if user not in seen else []
                seen.add(user)
            elif user.target in (_aten.logsumexp.default, _aten.sum.dim_IntList):
                axes: Any = user.args[1]
                along_last |= any(_from_the_end(axis, run.values[node]) == -1 for axis in axes)
            else:
                return False
    return along_last


def expand_results(graph: fx.Graph, run: Run) -> None:
    """Expands what is computed of tensors, not the tensors: a scale's logarithm is one, however many data there are."""
    for node in list(graph.nodes):
        if node.target not in _POINTWISE | _ALONG_AN_AXIS:
            continue
        dims, args = _dims_of_copies(node, run), list(node.args)
        if node.target in _ALONG_AN_AXIS:
            args[1] = _from_the_end(args[1], run.values[node])  # type: ignore[arg-type]
            dims.discard(args[1])
        if not dims or not _of_one_kind(node, run) or not _takes_any_order(node, run):
            continue
        with graph.inserting_before(node):
            args = [_one_of_copies(x, dims, run) if isinstance(x, fx.Node) else x for x in args]
            small = run.add(graph, node.target, *args, **node.kwargs)
            expanded = run.add(graph, _aten.expand.default, small, list(run.values[node].shape))
        node.replace_all_uses_with(expanded)


def _dims_of_copies(node: fx.Node, run: Run) -> set[int]:
    """The dimensions of a result, from the end, along which each of its operands has copies of one number."""
    shape = run.values[node].shape
    dims = {dim for dim in range(-len(shape), 0) if shape[dim] > 1}
    for x in node.all_input_nodes:
        dims = {dim for dim in dims if _has_copies(x, dim, run)}
    return dims


def _has_copies(x: fx.Node, dim: int, run: Run) -> bool:
    """Whether an operand is the same along a dimension: one that it lacks, of size one, or expanded."""
    value = run.values[x]
    return value.dim() < -dim or value.shape[dim] == 1 or run.strides[x][dim] == 0


def _one_of_copies(x: fx.Node, dims: set[int], run: Run) -> fx.Node:
    """An operand with size one along dimensions where it has copies."""
    value = run.values[x]
    while x.target is _aten.expand.default:
        base: Any = x.args[0]
        shape = run.values[base].shape
        if len(shape) < value.dim() or any(shape[d] != n for d, n in _sizes(value) if d not in dims):
            break
        x = base
    for dim in dims:
        if value.dim() >= -dim and run.values[x].shape[dim] > 1:
            x = run.add(x.graph, _aten.slice.Tensor, x, value.dim() + dim, 0, 1)
    return x


def _from_the_end(dim: int, of: Tensor) -> int:
    return dim - of.dim() if dim >= 0 else dim


def _of_one_kind(node: fx.Node, run: Run) -> bool:
    return all(run.values[x].dtype == run.values[node].dtype for x in node.all_input_nodes)


def sum_first(graph: fx.Graph, run: Run) -> None:
    """Sums over the data before it scales or shifts: what is the same for all of them is applied to the sums."""
    sums = _Sums(run)
    for node in list(graph.nodes):
        if node.target not in (_aten.sum.default, _aten.sum.dim_IntList) or node.kwargs or node in run.constants:
            continue
        of = run.values[node.args[0]]
        axes: Any = node.args[1] if len(node.args) > 1 and node.args[1] else range(of.dim())
        if of.numel() < _LARGE or not of.dtype.is_floating_point:
            continue
        total = sums.of(node.args[0], sorted(_from_the_end(axis, of) for axis in axes))
        if run.values[total].shape != run.values[node].shape:
            with graph.inserting_before(node):
                total = run.add(graph, _aten.view.default, total, list(run.values[node].shape))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    merge_equal(graph)
    graph.eliminate_dead_code()  # lest it count among the users of what it is made of
    sums.known = {key: total for key, total in sums.known.items() if total.users}
    changed = True
    while changed:
        changed = False
        for total in [total for total in sums.known.values() if total.users]:
            with graph.inserting_before(total):
                replacement = _of_a_sum(total, run, sums)
            if replacement is not None:
                total.replace_all_uses_with(replacement)
                sums.forget(total)
                changed = True


class _Sums:
    """Sums which keep their dimensions, each made once."""

    def __init__(self, run: Run):
        self.run, self.known = run, dict[Any, fx.Node]()

    def of(self, x: fx.Node, dims: list[int]) -> fx.Node:
        key = x, tuple(dims)
        if key not in self.known:
            with x.graph.inserting_after(x):
                self.known[key] = self.run.add(x.graph, _aten.sum.dim_IntList, x, dims, True)
        return self.known[key]

    def forget(self, node: fx.Node) -> None:
        """Erases what nothing uses any more."""
        if node.users or node.op != "call_function" or not is_pure(node):
            return
        if node.target is _aten.sum.dim_IntList:
            self.known.pop((node.args[0], tuple(node.args[1])), None)  # type: ignore[arg-type]
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        for operand in operands:
            self.forget(operand)


def _of_a_sum(total: fx.Node, run: Run, sums: _Sums) -> fx.Node | None:
    """A sum in terms of another one; ``None`` where there is no sum of less."""
    x: Any = total.args[0]
    dims: Any = total.args[1]
    graph, args = total.graph, x.args
    if x.target is _aten.neg.default:
        return run.add(graph, x.target, sums.of(args[0], dims))
    if list(x.users) != [total] or x.kwargs or not _of_one_kind(x, run):
        return None
    if x.target not in _SUMS | _PRODUCTS - {_aten.pow.Tensor_Scalar} | {_aten.rsub.Scalar} or len(args) != 2:
        return None
    shape = run.values[x].shape
    same = [not isinstance(a, fx.Node) or all(_has_copies(a, d, run) for d in dims) for a in args]
    if x.target is _aten.mul.Tensor and not any(same):
        return _of_a_sum_of_products(total, run, sums)
    varying, other = args if same[1] else args[::-1]
    if all(same) or not any(same) or (x.target in _QUOTIENTS and same[0]):
        return None
    if any(run.values[varying].dim() < -d or run.values[varying].shape[d] != shape[d] for d in dims):
        return None
    if x.target not in _PRODUCTS and not _is_a_term(varying, dims, run):
        return None
    inner = sums.of(varying, dims)
    if isinstance(other, fx.Node):
        other = _one_of_copies(other, set(dims), run)
    if x.target not in _PRODUCTS:
        n = math.prod(shape[d] for d in dims)
        other = run.add(graph, _aten.mul.Scalar, other, n) if isinstance(other, fx.Node) else other * n
    return run.add(graph, x.target, *((inner, other) if same[1] else (other, inner)))


def _of_a_sum_of_products(total: fx.Node, run: Run, sums: _Sums) -> fx.Node | None:
    """A sum of products with a number that has a factor of its own, in terms of the sum without that factor."""
    x: Any = total.args[0]
    dims: Any = total.args[1]
    for a, b in (x.args, x.args[::-1]):
        found = _scaled(a, run) if list(a.users) == [x] else None
        if found is None:
            continue
        core, power, by = found
        if isinstance(by, fx.Node) and not all(_has_copies(by, dim, run) for dim in dims):
            continue
        with x.graph.inserting_before(x):
            plain = run.add(x.graph, _aten.mul.Tensor, core, b)
        inner = sums.of(plain, dims)
        if not isinstance(by, fx.Node):
            return run.add(x.graph, _aten.mul.Scalar, inner, by**power)
        by = _one_of_copies(by, set(dims), run)
        return run.add(x.graph, _aten.mul.Tensor if power == 1 else _aten.div.Tensor, inner, by)
    return None


def _is_a_term(x: fx.Node, dims: list[int], run: Run) -> bool:
    """Whether a number is computed as a log-density is, not as the data or a mean is, most of which a shift takes away.

    A sum of data less so many means would keep fewer digits than a sum of differences.
    """
    if x in run.constants or x.target not in _POINTWISE:
        return False
    if x.target not in _SUMS | {_aten.rsub.Scalar}:
        return True
    varying = [y for y in x.all_input_nodes if not all(_has_copies(y, dim, run) for dim in dims)]
    return all(_is_a_term(y, dims, run) for y in varying)


def scale_once(graph: fx.Graph, run: Run) -> None:
    """Multiplies many numbers by one factor, not by several and a sign one after the other."""
    for node in reversed(list(graph.nodes)):
        if not node.users or node in run.constants:
            continue
        core, number, factor, steps = node, 1.0, None, 0
        while (found := _scaled(core, run)) is not None and (steps == 0 or len(core.users) == 1):
            inner, power, by = found
            if isinstance(by, fx.Node):
                if factor is not None:
                    break
                factor = by, power
            else:
                number *= by**power
            core, steps = inner, steps + 1
        if steps < 2:
            continue
        with graph.inserting_before(node):
            if factor is None:
                scaled = run.add(graph, _aten.mul.Scalar, core, number)
            else:
                by, power = factor
                by = _one_of_copies(by, {d for d, _ in _sizes(run.values[node]) if _has_copies(by, d, run)}, run)
                by = by if number == 1 else run.add(graph, _aten.mul.Scalar, by, number**power)
                scaled = run.add(graph, _aten.mul.Tensor if power == 1 else _aten.div.Tensor, core, by)
        node.replace_all_uses_with(scaled)


def shift_once(graph: fx.Graph, run: Run) -> None:
    """Adds one shift to many numbers, not several one after the other."""
    for node in reversed(list(graph.nodes)):
        if not node.users or node in run.constants:
            continue
        dims = {dim for dim, n in _sizes(run.values[node]) if n > 1} if node.target in _SUMS else set()
        core, shifts = node, list[tuple[int, Any]]()
        while (found := _shifted(core, run)) is not None and (not shifts or len(core.users) == 1):
            inner, sign, by = found
            common = {dim for dim in dims if not isinstance(by, fx.Node) or _has_copies(by, dim, run)}
            if not common:
                break
            core, dims = inner, common
            shifts.append((sign, by))
        if len(shifts) < 2:
            continue
        with graph.inserting_before(node):
            number = sum(sign * by for sign, by in shifts if not isinstance(by, fx.Node))
            total = None
            for sign, by in shifts:
                if isinstance(by, fx.Node):
                    by = _one_of_copies(by, dims, run)
                    by = by if sign == 1 else run.add(graph, _aten.neg.default, by)
                    total = by if total is None else run.add(graph, _aten.add.Tensor, total, by)
            if total is not None and number != 0:
                total = run.add(graph, _aten.add.Scalar, total, number)
            by = number if total is None else total
            shifted = run.add(graph, _aten.add.Scalar if total is None else _aten.add.Tensor, core, by)
        node.replace_all_uses_with(shifted)


def _shifted(node: fx.Node, run: Run) -> tuple[fx.Node, int, Any] | None:
    """What a large tensor differs from by a shift, 1 or -1, its sign, and the shift."""
    if node.target not in _SUMS or node.kwargs or len(node.args) != 2 or not _of_one_kind(node, run):
        return None
    size = run.values[node].numel()
    pairs: Any = [node.args, node.args[::-1]] if node.target is _aten.add.Tensor else [node.args]
    for core, by in pairs:
        if size < _LARGE or not isinstance(core, fx.Node) or core in run.constants or run.values[core].numel() != size:
            continue
        number = _number(by, run)
        return core, -1 if node.target in (_aten.sub.Tensor, _aten.sub.Scalar) else 1, by if number is None else number
    return None


def add_scaled(graph: fx.Graph, run: Run) -> None:
    """Adds a multiple of a tensor in one operation."""
    for node in list(graph.nodes):
        if node.target not in (_aten.add.Tensor, _aten.sub.Tensor) or node.kwargs or node in run.constants:
            continue
        if len(node.args) != 2 or not all(isinstance(x, fx.Node) for x in node.args) or not _of_one_kind(node, run):
            continue
        pairs: Any = [node.args, node.args[::-1]] if node.target is _aten.add.Tensor else [node.args]
        for x, y in pairs:
            found = _multiple(y, run) if len(y.users) == 1 and run.values[y].dim() else None
            if found is None or not _of_one_kind(y, run) or not run.values[y].dtype.is_floating_point:
                continue
            of, number = found
            opposite = _aten.sub.Tensor if node.target is _aten.add.Tensor else _aten.add.Tensor
            with graph.inserting_before(node):
                if number == -1:
                    new = run.add(graph, opposite, x, of)
                else:
                    new = run.add(graph, node.target, x, of, alpha=number)
            node.replace_all_uses_with(new)
            break


def _multiple(node: fx.Node, run: Run) -> tuple[fx.Node, float] | None:
    """The tensor of which another one is a multiple by a number, and the number."""
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target is _aten.neg.default:
        return node.args[0], -1.0  # type: ignore[return-value]
    if node.target in _PRODUCTS - {_aten.pow.Tensor_Scalar} and isinstance(node.args[0], fx.Node):
        number = _number(node.args[1], run)
        if number:
            return node.args[0], 1 / number if node.target in _QUOTIENTS else number
    return None


def _scaled(node: fx.Node, run: Run) -> tuple[fx.Node, int, fx.Node | float] | None:
    """What a large tensor is a multiple of, the factor, and 1 or -1, its power; the factor is much smaller."""
    if node.target not in _POINTWISE or node.kwargs:
        return None
    size = run.values[node].numel()
    if size < _LARGE or not _of_one_kind(node, run):
        return None
    if node.target is _aten.neg.default:
        return node.args[0], 1, -1.0  # type: ignore[return-value]
    if node.target not in _PRODUCTS - {_aten.pow.Tensor_Scalar}:
        return None
    power = -1 if node.target in _QUOTIENTS else 1
    pairs: Any = [node.args] if power < 0 else [node.args, node.args[::-1]]
    for core, factor in pairs:
        if not isinstance(core, fx.Node) or core in run.constants or run.values[core].numel() != size:
            continue
        number = _number(factor, run)
        if number is not None and number != 0:
            return core, power, number
        if number is None and any(s > 1 and _has_copies(factor, d, run) for d, s in _sizes(run.values[node])):
            return core, power, factor
    return None


def _sizes(x: Tensor) -> Iterator[tuple[int, int]]:
    return zip(range(-x.dim(), 0), x.shape, strict=True)


def _number(x: Any, run: Run) -> float | None:
    """The number that an operand is, if it is a constant one."""
    if not isinstance(x, fx.Node):
        return float(x)
    return float(run.values[x]) if x in run.constants and run.values[x].dim() == 0 else None


def _takes_any_order(node: fx.Node, run: Run) -> bool:
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


def share_matrices(recorded: fx.GraphModule, run: Run) -> None:
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


def reuse_memory(graph: fx.Graph, run: Run) -> None:
    """Writes a large result over an operand of which nothing is needed any more: fresh memory costs as much as a pass.

    For graphs without gradients, and the last rule: the others take an operand for what it was.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        result = run.values.get(node)
        if node.target not in _POINTWISE or not isinstance(result, Tensor) or result.numel() < _LARGE:
            continue
        overload = node.target._overloadname
        into = getattr(
            node.target.overloadpacket, "out" if overload in ("default", "Tensor") else f"{overload}_out", None
        )
        if into is None:
            continue
        for x in node.all_input_nodes:
            owner = _owner(x)
            free = owner.target in _FRESH and owner not in run.constants
            in_place = run.strides.get(x) == run.strides[node] and _alike(result, run.values[x])
            if not free or not in_place or any(n > 1 and _has_copies(x, dim, run) for dim, n in _sizes(result)):
                continue
            others = [y for y in node.all_input_nodes if y is not x]
            if all(place[user] <= place[node] for user in _readers(owner)) and owner not in map(_owner, others):
                node.target, node.kwargs = into, {**node.kwargs, "out": x}
                break


def _owner(node: fx.Node) -> fx.Node:
    """The operation whose memory a result may share, or is written to."""
    while (source := _may_share(node)) is not None:
        node = source
    return node


def _readers(owner: fx.Node) -> Iterator[fx.Node]:
    """All that reads a result, or what may share its memory."""
    seen, to_do = {owner}, [owner]
    while to_do:
        for user in to_do.pop().users:
            yield user
            if user not in seen and _may_share(user) is not None:
                seen.add(user)
                to_do.append(user)


def _may_share(node: fx.Node) -> fx.Node | None:
    """The operand with which a result may share memory: an operation does unless it is known not to."""
    if node.op != "call_function" or node.target in _FRESH:
        return None
    source: Any = node.kwargs.get("out", node.args[0] if node.args else None)
    return source if isinstance(source, fx.Node) else None


def numbers_to_tensors(recorded: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
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


def schema_of(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def is_view(node: fx.Node) -> bool:
    """Whether the result shares memory with the inputs, or may (an element of a result)."""
    if node.target is operator.getitem:
        return True
    schema = schema_of(node)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None


def is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _all(value: Any, number: int) -> bool:
    return bool((value == number).all()) if isinstance(value, Tensor) else value == number


def _alike(a: Any, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
