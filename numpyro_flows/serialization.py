"""Files of weights: tensors in safetensors, everything else as JSON in the header. No pickle.

Names and shapes of the weights are those of the torch twin, so that a file written by one package is read by the other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from numpyro_flows.transform_module import Repeat

_FORMAT = "pyroflows-1"
_DTYPE = re.compile(r"(torch\.)?(bool|u?int(8|16|32|64)|b?float(16|32|64)|complex64)")  # which a file holds
_Module = TypeVar("_Module", bound=eqx.Module)


def state_dict(module: eqx.Module) -> dict[str, np.ndarray]:
    """All parameters by their dotted names; those of repeated layers one by one, as ``layers.{i}. ...``."""
    return {name: np.asarray(read(module)) for name, read, _ in _walk(module)}


def load_state_dict(module: _Module, state: dict[str, Any]) -> _Module:
    """Returns ``module`` with the parameters of ``state`` (a :func:`state_dict`), in its own dtype.

    :raises ValueError: listing the names that are missing, unknown or of another shape.
    """
    entries = {name: (read, write) for name, read, write in _walk(module)}
    shapes = {name: np.shape(read(module)) for name, (read, _) in entries.items()}
    check_state(shapes, {name: np.shape(value) for name, value in state.items()})
    for name, (_, write) in entries.items():
        module = write(module, state[name])
    return module


def _walk(module: Any) -> Iterator[tuple[str, Callable[[Any], Any], Callable[[Any, Any], Any]]]:
    """Yields each parameter's name, how to read it, and how to write it into a copy of the module."""
    if eqx.is_inexact_array(module):
        yield "", lambda m: m, lambda m, value: jnp.asarray(value, m.dtype)
        return
    if isinstance(module, tuple | list):
        children: list[tuple[str, Callable]] = [
            (str(i), functools.partial(lambda i, m: m[i], i)) for i in range(len(module))
        ]
    elif dataclasses.is_dataclass(module):
        children = [
            (field.name, functools.partial(lambda name, m: getattr(m, name), field.name))
            for field in dataclasses.fields(module)
            if not field.metadata.get("static", False)
        ]
    else:
        return
    for name, get in children:
        for inner_name, read, write in _walk(get(module)):
            dotted = f"{name}.{inner_name}" if inner_name else name

            def read_child(m, get=get, read=read):
                return read(get(m))

            def write_child(m, value, get=get, write=write):
                return eqx.tree_at(get, m, write(get(m), value))

            if isinstance(module, Repeat):  # stacked along the leading axis
                for i in range(module.num_layers):

                    def read_one(m, i=i, read_child=read_child):
                        return read_child(m)[i]

                    def write_one(m, value, i=i, read_child=read_child, write_child=write_child):
                        stacked = read_child(m)
                        return write_child(m, stacked.at[i].set(jnp.asarray(value, stacked.dtype)))

                    yield f"layers.{i}.{inner_name}", read_one, write_one
            else:
                yield dotted, read_child, write_child


def save(path: str | Path, tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON-able metadata to one file, which appears only once it is whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    save_file(arrays, part, metadata={"format": _FORMAT, "metadata": json.dumps(metadata)})
    os.replace(part, path)


def load(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what :func:`save` wrote: tensors and metadata."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: there is no file {str(path)!r}.")
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"load: {str(path)!r} is not a file of this library ({header.get('format')!r}).")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["metadata"])
    except SafetensorError as error:
        raise ValueError(f"load: {str(path)!r} is not a safetensors file: {error}") from error


def check_state(expected: dict[str, tuple], given: dict[str, tuple]) -> None:
    """Raises a ``ValueError`` unless names and shapes agree."""
    problems = [f"missing {sorted(expected.keys() - given.keys())}"] if expected.keys() - given.keys() else []
    if given.keys() - expected.keys():
        problems.append(f"unknown {sorted(given.keys() - expected.keys())}")
    for name in sorted(expected.keys() & given.keys()):
        if tuple(expected[name]) != tuple(given[name]):
            problems.append(f"{name} of shape {tuple(given[name])}, expected {tuple(expected[name])}")
    if problems:
        raise ValueError("state: the weights do not fit this module: " + "; ".join(problems) + ".")


# -- what a posterior's file holds besides weights ---------------------------------------------------------------------
def describe(factory: Callable, known: Mapping[str, Callable]) -> dict[str, Any] | None:
    """Name and keyword arguments of a factory out of ``known`` (or a ``partial`` of one); ``None`` for any other."""
    keywords: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        if factory.args:
            return None
        keywords, factory = {**factory.keywords, **keywords}, factory.func
    name = getattr(factory, "__name__", None)
    if known.get(str(name)) is not factory:
        return None
    try:
        json.dumps(keywords)
    except TypeError:
        return None
    return {"name": name, "keywords": keywords}


def build(description: dict[str, Any], known: Mapping[str, Callable]) -> Callable:
    """The factory that :func:`describe` described."""
    return functools.partial(known[description["name"]], **description["keywords"])


def pack(value: Any, tensors: dict[str, Any], prefix: str) -> Any:
    """A JSON-able description of nested lists, tuples, dicts, scalars and arrays; arrays go into ``tensors``.

    :raises ValueError: for anything else, for dicts whose keys are not strings and arrays that do not hold numbers.
    """
    if isinstance(value, np.number | np.bool_ | np.ndarray | jax.Array) and _DTYPE.fullmatch(str(value.dtype)):
        name = f"{prefix}#{len(tensors)}"  # a number, for keys may hold dots
        tensors[name] = np.asarray(value)
        return {"scalar" if isinstance(value, np.generic) else "array": name, "numpy": not isinstance(value, jax.Array)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{prefix}.{i}") for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: pack(item, tensors, f"{prefix}.{key}") for key, item in value.items()}}
    what = f" of dtype {value.dtype}" if hasattr(value, "dtype") else ""
    what += " whose keys are not all strings" if isinstance(value, dict) else ""
    raise ValueError(
        f"save: {prefix} is a {type(value).__name__}{what}, which a file cannot hold. Arguments of the model must be "
        "arrays of numbers, numbers, strings, None, or lists, tuples and dicts of them; close over anything else."
    )


def unpack(description: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The value that :func:`pack` described."""
    if not isinstance(description, dict):
        return description
    kind, value = next(iter(description.items()))
    if kind == "array":
        array = tensors[value]
        return array if description["numpy"] else jnp.asarray(array)
    if kind == "scalar":
        return tensors[value][()]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in value.items()}
    items = [unpack(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)
