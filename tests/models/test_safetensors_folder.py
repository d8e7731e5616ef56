import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import safetensors_folder

BF16 = np.dtype(ml_dtypes.bfloat16)


def write(folder, tensors, size=10**9):
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    done = []
    safetensors_folder.write(folder, specs, lambda names: (tensors[n] for n in names), size, done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "blocks.10.w": rng.integers(0, 65536, (3, 5), np.uint16).view(BF16),
        "blocks.2.w": rng.standard_normal((4, 2), np.float32),
        "scalar": np.asarray(3, np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
    }


def test_the_library_reads_what_is_written(tensors, tmp_path):
    write(tmp_path, tensors)
    found = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tobytes() == tensor.tobytes()


def test_what_the_library_writes_is_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = safetensors_folder.scan(tmp_path)
    assert not found.problems and found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].read().tobytes() == tensor.tobytes()
    np.testing.assert_array_equal(found.tensors["blocks.2.w"].read(1, 3), tensors["blocks.2.w"][1:3])


def test_shards(tensors, tmp_path):
    write(tmp_path, tensors, 40)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 30 + 32 + 4 + 14}
    name = "diffusion_pytorch_model-0000{}-of-00003.safetensors".format
    # Layer 2 before layer 10; a new file where the next tensor would make it larger than 40 bytes.
    assert index["weight_map"] == {"blocks.2.w": name(1), "blocks.10.w": name(2), "half": name(3), "scalar": name(3)}
    for number in (1, 2, 3):
        held = load_file(tmp_path / name(number))
        assert held.keys() == {k for k, file in index["weight_map"].items() if file == name(number)}
    found = safetensors_folder.scan(tmp_path)
    for key, tensor in tensors.items():
        assert found.tensors[key].read().tobytes() == tensor.tobytes()


def test_wider_types_come_first_in_a_file(tensors):
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    (names,) = safetensors_folder.split(specs, 10**9)
    assert names == ["blocks.2.w", "scalar", "blocks.10.w", "half"]


def broken(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 bytes, cut off"),
        (b"\xff" * 20, "cut off before the end of its header, or not"),
        (broken(b"not json"), "its header is not"),
        (broken([1, 2]), "its header is not"),
        (broken({"a": {"dtype": "F32", "shape": [1]}}), "its header is not"),
        (broken({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "its header is not"),
        (broken({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "truncated"),
    ],
)
def test_unreadable_file(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        safetensors_folder.scan(path)


def test_tensor_of_a_wrong_length(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    path.write_bytes(broken({"a": entry, "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, bytes(12)))
    found = safetensors_folder.scan(path)
    assert found.problems == ["wrong length: a in model.safetensors, 8 bytes for (3,) float32"]
    assert found.tensors.keys() == {"b"}


def test_pickles_are_refused(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a \.safetensors file.*pickle files"):
        safetensors_folder.scan(tmp_path)
    with pytest.raises(UserError, match=r"a pickle; expected a \.safetensors file"):
        safetensors_folder.scan(tmp_path / "diffusion_pytorch_model.bin")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        safetensors_folder.scan(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no weights that can be read among \['config.json'\]"):
        safetensors_folder.scan(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="not an index"):
        safetensors_folder.scan(tmp_path)


def test_index_may_not_point_elsewhere(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(UserError, match="names of files beside it"):
        safetensors_folder.scan(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    for file in ("x.safetensors", "y.safetensors"):
        save_file({"a": np.zeros(2, np.float32), file: np.zeros(1, np.float32)}, tmp_path / file)
    weight_map = {"x.safetensors": "x.safetensors", "y.safetensors": "y.safetensors", "a": "x.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert safetensors_folder.scan(tmp_path).problems == ["twice: a, in x.safetensors and y.safetensors"]
