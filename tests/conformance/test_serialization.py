"""Arguments of a model, through a file and back."""

import numpy as np
import pytest

from tests import backends


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return backends.get(request.param)


def through_a_file(backend, value, path):
    files, tensors = backend.serialization, {}
    description = files.pack(value, tensors, "model")
    files.save(path, tensors, {"arguments": description})
    tensors, metadata = files.load(path)
    return files.unpack(metadata["arguments"], tensors)


def test_arguments_come_back_as_they_were(backend, tmp_path):
    one, two = backend.array(np.float32(2.0)), np.arange(3)
    value = {"a": {"b": one}, "a.b": two, "sizes": (np.int64(3), np.float64(0.5), np.bool_(True)), "rest": [None, "x"]}
    read = through_a_file(backend, value, tmp_path / "file")
    assert type(read["a"]["b"]) is type(one) and read["a"]["b"].shape == ()
    assert isinstance(read["a.b"], np.ndarray) and (read["a.b"] == two).all()
    assert read["sizes"] == value["sizes"] and list(map(type, read["sizes"])) == list(map(type, value["sizes"]))
    assert len(range(read["sizes"][0])) == 3 and read["rest"] == value["rest"]


@pytest.mark.parametrize(
    "value, message",
    [
        (np.array(["a"]), "model.x is a ndarray of dtype <U1"),
        (np.array([1j]), "of dtype complex128"),
        ({1: 2.0}, "model.x is a dict whose keys are not all strings"),
    ],
)
def test_what_a_file_cannot_hold_is_named(backend, value, message):
    with pytest.raises(ValueError, match=message):
        backend.serialization.pack({"x": value}, {}, "model")


def test_a_key_is_no_array_of_a_file():
    backend = backends.get("jax")
    with pytest.raises(ValueError, match="of dtype key"):
        backend.serialization.pack(backend.jax.random.key(0), {}, "model")


def test_names_of_earlier_files(backend):
    """They had no numbers."""
    description = {"dict": {"x": {"array": "model.x", "numpy": False}}}
    assert float(backend.serialization.unpack(description, {"model.x": backend.array(np.ones(()))})["x"]) == 1
