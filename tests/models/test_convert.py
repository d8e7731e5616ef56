import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import convert as conversion
from cocoedit_jax.models import safetensors_folder
from cocoedit_jax.models.convert import convert, parse_size, whole_folder
from cocoedit_jax.models.orbax_weights import load_params, read_config
from cocoedit_jax.models.sharded_weights import save_sharded
from tests.models.tiny_flux import CONFIG_JSON, assert_same_bits, normal_params, random_params, target

BF16 = ml_dtypes.bfloat16
ROOT = Path(__file__).parents[2]


def write_model(folder, params, max_shard_size=20_000):
    """A model folder as diffusers' pipelines save it."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    save_sharded(transformer, params, max_shard_size=max_shard_size)
    (transformer / "config.json").write_text(json.dumps(CONFIG_JSON))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    (folder / "flux1-kontext-dev.safetensors").write_bytes(b"the same weights in another layout")
    return folder


def stored(folder):
    found = safetensors_folder.scan(folder)
    assert not found.problems
    return {name: (str(t.dtype), t.shape, t.read().tobytes()) for name, t in found.tensors.items()}


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_there_and_back_is_bit_exact(tmp_path, dtype):
    source = write_model(tmp_path / "source", random_params(dtype))
    size = convert(source, tmp_path / "orbax", "orbax", copy_rest=False)
    assert size == sum(leaf.nbytes for leaf in jax.tree.leaves(random_params(dtype)))
    assert read_config(tmp_path / "orbax" / "transformer") == CONFIG_JSON
    convert(tmp_path / "orbax", tmp_path / "back", "diffusers", max_shard_size=20_000)
    assert stored(tmp_path / "back" / "transformer") == stored(source / "transformer")
    assert read_config(tmp_path / "back" / "transformer") == CONFIG_JSON
    names = [{p.name for p in (tmp_path / folder / "transformer").iterdir()} for folder in ("source", "back")]
    assert names[0] == names[1] and len(names[0]) > 4
    assert {p.name for p in tmp_path.iterdir()} == {"source", "orbax", "back"}
    assert {p.name for p in (tmp_path / "orbax").iterdir()} == {"transformer"}


def test_casts_and_copies_the_rest(tmp_path):
    params = normal_params()
    source = write_model(tmp_path / "source", params)
    convert(source, tmp_path / "new" / "model", "orbax", dtype=BF16)
    model = tmp_path / "new" / "model"
    assert {p.name for p in model.iterdir()} == {"transformer", "vae", "model_index.json"}
    loaded = load_params(model / "transformer", target({"fsdp": 4, "tensor": 2}), dtype="stored")
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype(BF16), params))


def test_refusals(tmp_path, monkeypatch):
    source = write_model(tmp_path / "source", random_params())
    with pytest.raises(UserError, match="exists already"):
        convert(source, source, "orbax")
    with pytest.raises(UserError, match="no folder 'transformer' in it"):
        convert(source / "vae", tmp_path / "out", "orbax")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: conversion.shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(UserError, match=r"0\.0 GB free there"):
        convert(source, tmp_path / "out", "orbax")
    (source / "transformer" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match=r"'UNet2DConditionModel'; expected one of \['FluxTransformer2DModel', "):
        convert(source, tmp_path / "out", "orbax")
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_nothing_is_left_of_a_failure(tmp_path):
    source = write_model(tmp_path / "source", random_params())
    shard = next((source / "transformer").glob("*-00002-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"unreadable: {shard.name}"):
        convert(source, tmp_path / "out", "orbax")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as draft:
        (draft / "half").write_text("")
        raise ZeroDivisionError
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as draft:
        assert not any((tmp_path / "empty").iterdir())
        (draft / "whole").write_text("")
    assert (tmp_path / "empty" / "whole").exists()


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5KB", 1500)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5GiB"])
def test_unusable_sizes(text):
    with pytest.raises(UserError, match=r"--max_shard_size=.*expected a size such as 5GB"):
        parse_size(text)


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "launch.convert_weights", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_command(tmp_path):
    params = random_params(BF16)
    source = write_model(tmp_path / "source", params)
    done = run(f"--from={source}", f"--to={tmp_path / 'orbax'}", "--to_format=orbax")
    assert done.returncode == 0, done.stderr
    assert "GB of weights in" in done.stdout
    assert "load transformer" in done.stderr and "write transformer" in done.stderr and "B/s" in done.stderr
    assert_same_bits(load_params(tmp_path / "orbax" / "transformer", target({"fsdp": 4}), dtype="stored"), params)
    failed = run("--from=someone/nothing", f"--to={tmp_path / 'x'}", "--to_format=orbax")
    assert failed.returncode == 1 and "error: 'someone/nothing'" in failed.stderr and "Traceback" not in failed.stderr
