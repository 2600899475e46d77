"""Files of weights: tensors in safetensors, everything else as JSON in the header. No pickle.

Names and shapes of the weights are those of the jax twin, so that a file written by one package is read by the other.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_FORMAT = "pyroflows-1"
_DTYPE = re.compile(r"(torch\.)?(bool|u?int(8|16|32|64)|b?float(16|32|64)|complex64)")  # which a file holds


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All parameters by their dotted names."""
    return {name: value.detach() for name, value in module.state_dict().items()}


def load_state_dict(module: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Copies the parameters of ``state`` (a :func:`state_dict`) into ``module``, in its own dtype, and returns it.

    :raises ValueError: listing the names that are missing, unknown or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_state(expected, {name: tuple(value.shape) for name, value in state.items()})
    module.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    return module


def save(path: str | Path, tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON-able metadata to one file, which appears only once it is whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    arrays = {name: torch.as_tensor(value).detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(arrays, part, metadata={"format": _FORMAT, "metadata": json.dumps(metadata)})
    os.replace(part, path)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`save` wrote: tensors and metadata."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: there is no file {str(path)!r}.")
    try:
        with safe_open(path, "pt") as file:
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
    if isinstance(value, np.number | np.bool_ | np.ndarray | Tensor) and _DTYPE.fullmatch(str(value.dtype)):
        name = f"{prefix}#{len(tensors)}"  # a number, for keys may hold dots
        tensors[name] = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        return {"scalar" if isinstance(value, np.generic) else "array": name, "numpy": not isinstance(value, Tensor)}
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


def unpack(description: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that :func:`pack` described."""
    if not isinstance(description, dict):
        return description
    kind, value = next(iter(description.items()))
    if kind == "array":
        array = tensors[value]
        return array.numpy() if description["numpy"] else array
    if kind == "scalar":
        return tensors[value].numpy()[()]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in value.items()}
    items = [unpack(item, tensors) for item in value]
    return items if kind == "list" else tuple(items)
