import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import orbax_weights
from cocoedit_jax.models.orbax_weights import load_orbax, load_params, save_orbax
from cocoedit_jax.models.sharded_weights import save_sharded
from tests.models.tiny_flux import CONFIG_JSON, assert_placed_as, assert_same_bits, normal_params, random_params, target

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module", params=[np.float32, BF16], ids=["float32", "bfloat16"])
def saved(request, tmp_path_factory):
    """Random parameters, saved from one device."""
    params = random_params(request.param)
    folder = tmp_path_factory.mktemp("transformer")
    save_orbax(folder, jax.device_put(params, jax.devices()[0]), CONFIG_JSON)
    return params, folder


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_restores_onto_another_mesh(saved, sizes):
    params, folder = saved
    abstract = target(sizes, params["proj_out"]["bias"].dtype)
    restored = load_params(folder, abstract)
    assert_same_bits(restored, params)
    assert_placed_as(restored, abstract)


def test_saved_from_a_mesh(tmp_path):
    def quiet(x):  # Orbax cuts replicas by compiled programs, which may change what a NaN carries
        raw = x.view(np.uint16)
        return np.where(raw & 0x7FFF > 0x7F80, np.uint16(0x7FC0), raw).view(BF16)

    params = jax.tree.map(quiet, random_params(BF16))
    sharded = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, target({"fsdp": 4, "tensor": 2}))
    save_orbax(tmp_path, sharded, CONFIG_JSON)
    assert_same_bits(load_orbax(tmp_path, target({"fsdp": 2}), dtype="stored"), params)


def test_layers_are_arrays_in_chunks_and_restored_in_batches(tmp_path, monkeypatch):
    """A device reads the chunks that overlap its part; one chunk for a whole array would be read by all of them."""
    params = {"transformer_blocks": {"ff": {"kernel": np.arange(4 * 64 * 64, dtype=np.float32).reshape(4, 64, 64)}}}
    params["proj_out"] = {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}
    monkeypatch.setattr(orbax_weights, "_CHUNK", 4096)
    monkeypatch.setattr(orbax_weights, "_BATCH", 40_000)
    save_orbax(tmp_path, jax.device_put(params), {})
    layout = json.loads((tmp_path / "arrays" / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    chunks = {m["array_metadata"]["param_name"]: m["array_metadata"]["chunk_shape"] for m in layout}
    layers = {f"transformer_blocks.{i}.ff.kernel" for i in range(4)}
    assert chunks.keys() == layers | {"proj_out.kernel"}
    assert all(4 * np.prod(shape) <= 4096 for shape in chunks.values())
    restored, restore = [], orbax_weights._restore
    monkeypatch.setattr(
        orbax_weights, "_restore", lambda c, p, parts: restored.append(len(parts)) or restore(c, p, parts)
    )
    assert_same_bits(load_orbax(tmp_path, params), params)
    assert restored == [3, 2]  # the small one and layers of 16 KB


@pytest.mark.parametrize("stored, wanted", [(np.float32, jnp.bfloat16), (BF16, jnp.float32)])
def test_casts(tmp_path, stored, wanted):
    params = normal_params(stored)
    save_orbax(tmp_path, jax.device_put(params), CONFIG_JSON)
    restored = load_params(tmp_path, target({"fsdp": 4}), dtype=wanted)
    assert_same_bits(restored, jax.tree.map(lambda x: x.astype(wanted), params))


def test_form_is_recognised_and_configuration_kept(saved, tmp_path):
    params, folder = saved
    assert orbax_weights.is_orbax(folder) and not orbax_weights.is_orbax(tmp_path)
    assert orbax_weights.read_config(folder) == CONFIG_JSON
    save_sharded(tmp_path, params)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    assert orbax_weights.read_config(tmp_path) == CONFIG_JSON
    assert_same_bits(load_params(tmp_path, target({"fsdp": 2}), dtype="stored"), params)


def test_all_misfits_are_named_together(saved):
    params, folder = saved
    wanted = jax.tree.map(lambda x: x, params)
    wanted["new"] = {"kernel": np.zeros((2, 2), np.float32)}
    wanted["x_embedder"]["kernel"] = np.zeros((2, 2), np.float32)
    del wanted["proj_out"]["bias"]
    with pytest.raises(UserError) as error:
        load_orbax(folder, wanted)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: new.kernel (2, 2)",
        "unexpected: proj_out.bias (4,)",
        "wrong shape: x_embedder.kernel (4, 12), expected (2, 2)",
    ]


def test_faulty_folders(tmp_path):
    (tmp_path / "cocoedit_weights.json").write_text("{}")
    with pytest.raises(UserError, match="expected what launch.convert_weights writes"):
        load_params(tmp_path, {})
    (tmp_path / "cocoedit_weights.json").write_text('{"format": "orbax", "version": 2, "config": {}}')
    with pytest.raises(UserError, match="'orbax' version 2; expected 'orbax' version 1"):
        load_params(tmp_path, {})
    (tmp_path / "cocoedit_weights.json").write_text('{"format": "orbax", "version": 1, "config": {}}')
    with pytest.raises(UserError, match="not a readable Orbax checkpoint"):
        load_params(tmp_path, {})
    with pytest.raises(UserError, match="expected the model's configuration"):
        orbax_weights.read_config(tmp_path / "absent")


def test_damaged_checkpoint(tmp_path):
    save_orbax(tmp_path, jax.device_put({"a": {"kernel": np.ones((64, 64), np.float32)}}), {})
    largest = max((p for p in (tmp_path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(UserError, match="arrays: cannot be restored .*100"):
        load_orbax(tmp_path, {"a": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}})
