import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import safetensors_folder, sharded_weights, weights
from cocoedit_jax.models.sharded_weights import load_sharded, save_sharded
from cocoedit_jax.sharding.mesh import make_mesh
from tests.models.tiny_flux import (
    assert_placed_as,
    assert_same_bits,
    normal_params,
    random_params,
    target,
)

BF16 = ml_dtypes.bfloat16
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def stored(request, tmp_path):
    """Random parameters and a folder with them in several shards."""
    params = random_params(request.param)
    save_sharded(tmp_path, params, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return params, tmp_path


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "tensor": 2}], ids=str
)
def test_bits_arrive_on_any_mesh(stored, sizes):
    params, folder = stored
    abstract = target(sizes, params["proj_out"]["bias"].dtype)
    loaded = load_sharded(folder, abstract)
    assert_same_bits(loaded, params)
    assert_placed_as(loaded, abstract)


def test_equals_the_plain_reader(tmp_path):
    params = normal_params(BF16)
    save_sharded(tmp_path, params)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, metadata = weights.load_safetensors(file)
    assert metadata == {"format": "pt"}
    for name, tensor in weights.to_diffusers(params).items():
        np.testing.assert_array_equal(tensors[name], tensor)
    expected = weights.from_diffusers(tensors, target({"fsdp": 1}), "file")
    assert_same_bits(load_sharded(file, target({"fsdp": 2})), expected)


def test_saving_leaves_no_copy_with_sharded_arrays(tmp_path):
    """A sharded array holds on to the NumPy array it was once made into: all of them are a second model."""
    params = random_params(BF16)
    sharded = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, target({"fsdp": 4, "tensor": 2}, BF16))
    for tree in (sharded, sharded_weights.unstacked(sharded)):
        folder = tmp_path / str(len(tree))
        folder.mkdir()
        save_sharded(folder, tree)
        assert all(leaf._npy_value is None for leaf in jax.tree.leaves(tree))
        assert_same_bits(load_sharded(folder, target({"fsdp": 2}), dtype="stored"), params)


def test_unstacked_tree_names_the_same_tensors():
    params = random_params(BF16)
    apart = sharded_weights.unstacked(params)
    assert weights.tensor_shapes(apart) == weights.tensor_shapes(params)
    layer = apart["transformer_blocks.1"]["attn"]["to_q"]["kernel"]
    assert_same_bits(layer, params["transformer_blocks"]["attn"]["to_q"]["kernel"][1])


@pytest.mark.parametrize("kept, wanted", [(np.float32, jnp.bfloat16), (BF16, jnp.float32), (np.float16, jnp.float32)])
def test_casts(tmp_path, kept, wanted):
    params = normal_params(kept)
    save_sharded(tmp_path, params)
    loaded = load_sharded(tmp_path, target({"fsdp": 4, "tensor": 2}), dtype=wanted)
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype(wanted), params))


def test_stored_dtype_is_kept_per_array(tmp_path):
    params = random_params(BF16)
    params["norm_out.linear"] = random_params(np.float32)["norm_out.linear"]
    save_sharded(tmp_path, params)
    assert_same_bits(load_sharded(tmp_path, target({"fsdp": 2}), dtype="stored"), params)


def test_stack_of_mixed_dtypes_needs_one(tmp_path):
    params = random_params(BF16)
    tensors = weights.to_diffusers(params)
    name = "single_transformer_blocks.1.norm.linear.weight"
    tensors[name] = tensors[name].astype(np.float32)
    weights.save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"single_transformer_blocks\.norm\.linear\.kernel.*'bfloat16', 'float32'"):
        load_sharded(tmp_path, target({"fsdp": 1}), dtype="stored")
    load_sharded(tmp_path, target({"fsdp": 1}), dtype=jnp.float32)


def test_arrays_and_shapes_without_sharding_are_targets_too(tmp_path):
    params = random_params()
    save_sharded(tmp_path, params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    loaded = load_sharded(tmp_path, shapes)
    assert_same_bits(loaded, params)
    assert loaded["proj_out"]["bias"].devices() == {jax.devices()[0]}
    on_third = jax.device_put(params, jax.devices()[3])
    assert load_sharded(tmp_path, on_third)["proj_out"]["kernel"].devices() == {jax.devices()[3]}


def test_layers_and_convolutions_may_be_sharded(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "transformer_blocks": {"proj": {"kernel": rng.standard_normal((4, 6, 8)).astype(BF16)}},
        "conv": {"kernel": rng.standard_normal((3, 3, 4, 8), np.float32), "bias": np.asarray(3, np.float32)},
    }
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    specs = {
        "transformer_blocks": {"proj": {"kernel": PartitionSpec("fsdp", None, "tensor")}},
        "conv": {"kernel": PartitionSpec(None, None, "fsdp", "tensor"), "bias": PartitionSpec()},
    }
    abstract = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )
    save_sharded(tmp_path, tree)
    loaded = load_sharded(tmp_path, abstract)
    assert_same_bits(loaded, tree)
    assert_placed_as(loaded, abstract)


def test_only_rows_that_are_needed_are_read(tmp_path, monkeypatch):
    """A process that holds part of the output features reads that part. The devices of others are left out."""
    tree = {"linear": {"kernel": np.arange(6 * 8, dtype=np.float32).reshape(6, 8)}}
    save_sharded(tmp_path, tree)
    mesh = make_mesh({"tensor": 4}, jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    tensor = safetensors_folder.scan(tmp_path).tensors["linear.weight"]
    piece = sharded_weights._Piece(tensor, ("linear", "kernel"), None, sharding, (1, 0))
    assert piece.nbytes == 6 * 8 * 4
    whole = sharding.addressable_devices_indices_map((6, 8))
    some = {device: whole[device] for device in jax.devices()[1:3]}
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: some)
    half = sharded_weights._Piece(tensor, ("linear", "kernel"), None, sharding, (1, 0))
    assert half.nbytes == 6 * 4 * 4
    assert sorted(half.parts()) == [(2, 4), (4, 6)]


def test_reading_ahead_is_bounded(tmp_path):
    """Threads hold at most the budget, or one tensor."""
    params = random_params()
    save_sharded(tmp_path, params)
    assert_same_bits(load_sharded(tmp_path, target({"fsdp": 2}), read_ahead=1), params)
    pieces = [
        sharded_weights._Piece(
            t, (name,), None, jax.sharding.SingleDeviceSharding(jax.devices()[0]), (*range(len(t.shape)),)
        )
        for name, t in safetensors_folder.scan(tmp_path).tensors.items()
    ]
    started = []
    original = sharded_weights._Piece.load
    budget = 10_000
    try:
        sharded_weights._Piece.load = lambda self: started.append(self.nbytes) or original(self)
        done = 0
        for piece, _ in sharded_weights._read_ahead(pieces, budget):
            assert sum(started) - done <= max(budget, piece.nbytes)
            done += piece.nbytes
    finally:
        sharded_weights._Piece.load = original
    assert done == sum(piece.nbytes for piece in pieces)


def test_all_faults_are_named_together(tmp_path):
    tensors = weights.to_diffusers(random_params(BF16))
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("transformer_blocks.0.")}
    second = {name: tensor for name, tensor in tensors.items() if name.startswith("transformer_blocks.1.")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in {**first, **second}}
    del rest["proj_out.bias"]
    rest["extra"] = np.zeros(3, np.float32)
    rest["x_embedder.weight"] = np.zeros((2, 2), np.float32)
    rest["context_embedder.weight"] = rest["context_embedder.weight"].view(ml_dtypes.float8_e4m3fn)
    weights.save_safetensors(tmp_path / "a.safetensors", first)
    weights.save_safetensors(tmp_path / "c.safetensors", rest)
    cut = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(cut[:-10])
    listed = [(first, "a"), (second, "b"), (rest, "c")]
    weight_map = {name: f"{file}.safetensors" for part, file in listed for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UserError) as error:
        load_sharded(tmp_path, target({"fsdp": 2}))
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines == [
        f"{tmp_path}: 6 problem(s) with the weights:",
        f"absent: b.safetensors, which the index names for {len(second)} tensor(s)",
        "missing: proj_out.bias (4,)",
        "unexpected: extra (3,)",
        f"unreadable: a.safetensors (truncated: {len(cut) - 10} bytes, its header describes {len(cut)})",
        "unsupported dtype: context_embedder.weight is F8_E4M3, expected one of ['BF16', 'F16', 'F32']",
        "wrong shape: x_embedder.weight (2, 2), expected (12, 4)",
    ]


def test_file_cut_while_it_is_read(tmp_path):
    save_sharded(tmp_path, random_params())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensor = max(safetensors_folder.scan(file).tensors.values(), key=lambda t: t.offset)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="inside a tensor"):
        tensor.read()


def test_progress_counts_bytes(tmp_path, capsys):
    params = random_params()
    save_sharded(tmp_path, params)
    load_sharded(tmp_path, target({"fsdp": 2}))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1000
    last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("load")][-1]
    assert f" {total:.0f}k/{total:.0f}k " in last and "B/s" in last
