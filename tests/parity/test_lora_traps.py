"""Files that are nearly right: what diffusers makes of them, that ours are not like them, and how we read them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files
from tests.parity.lora_cases import (
    adapter_effects,
    assert_same_adapter,
    assert_same_effects,
    build_pipeline,
    effects,
    random_adapter,
    write,
)


def rename(tensors, change):
    return {change(name): tensor for name, tensor in tensors.items()}


def peft_names(tensors):
    return rename(tensors, lambda name: name.replace("transformer.", "base_model.model.", 1))


def add_alphas(tensors):
    stems = {name.rpartition(".lora_")[0] for name in tensors}
    return tensors | {f"{stem}.alpha": np.asarray(8, np.float32) for stem in stems}


def kohya_names(tensors):
    def change(name):
        stem, _, half = name.removeprefix("transformer.").rpartition(".lora_")
        return f"lora_unet_{stem.replace('.', '_')}.lora_{half.replace('A', 'down').replace('B', 'up')}"

    return rename(tensors, change)


def without_prefix(tensors):
    return rename(tensors, lambda name: name.removeprefix("transformer."))


def under_diffusion_model(tensors):
    return rename(tensors, lambda name: name.replace("transformer.", "diffusion_model.", 1))


def keep(tensors):
    return tensors


# How a file is spoilt, its metadata key; what diffusers does with it (an error, nothing, or the scale it applies; None:
# depends on its version and PEFT's); what our reader does (an error's words, or the scale).
TRAPS = {
    "raw PEFT keys": (peft_names, None, KeyError, "not readable"),
    "alpha beside A and B": (add_alphas, None, None, 2),
    "diffusers' names in kohya's dress": (kohya_names, None, ValueError, 1),
    "no prefix": (without_prefix, None, "nothing", 1),
    "ComfyUI's prefix, diffusers' names": (under_diffusion_model, None, "nothing", 1),
    "alpha lost": (keep, None, 1, 1),
    "header key with an underscore": (keep, "_lora_adapter_metadata", 1, 1),
    "header fields without prefix": (keep, "lora_adapter_metadata", KeyError, "starts with 'transformer.'"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(double_blocks, trap, tmp_path, log):
    """What diffusers makes of files that are nearly right, and that ours are read at full strength."""
    spoil, key, theirs, ours = TRAPS[trap]
    config = lora.LoraConfig(rank=4, alpha=8)
    adapter = random_adapter(double_blocks, config)
    lora_files.save_lora(tmp_path / "good", adapter, config)
    good = tmp_path / "good" / lora_files.DIFFUSERS_FILE
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    name = key and ("transformer." if key.startswith("_") else "")
    header = {key: json.dumps({name + field: value for field, value in fields.items()})} if key else {}
    bad = tmp_path / "bad.safetensors"
    save_file(spoil(load_file(good)), bad, {"format": "pt", **header})

    pipe = build_pipeline(double_blocks.reference)
    if isinstance(theirs, type):
        with pytest.raises(theirs):
            pipe.load_lora_weights(bad)
        pipe = build_pipeline(double_blocks.fresh_reference())
    elif theirs == "nothing":
        pipe.load_lora_weights(bad)
        assert not adapter_effects(pipe.transformer, "default_0") and len(log()) == 1
    elif theirs is not None:
        pipe.load_lora_weights(bad, adapter_name="bad")
        spoilt = adapter_effects(pipe.transformer, "bad")
        assert_same_effects({k: v * config.scale / theirs for k, v in spoilt.items()}, effects(adapter, config))
        pipe.delete_adapters("bad")

    if isinstance(ours, str):
        with pytest.raises(UserError, match=ours):
            lora_files.load_lora(bad)
    else:
        loaded, loaded_config = lora_files.load_lora(bad)
        assert loaded_config.scale == ours
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)

    pipe.load_lora_weights(tmp_path / "good", adapter_name="good")
    assert_same_effects(adapter_effects(pipe.transformer, "good"), effects(adapter, config))


def test_diffusers_takes_its_own_file_from_a_folder_of_several(double_blocks, tmp_path, log):
    config = lora.LoraConfig(rank=4, alpha=8)
    adapter = random_adapter(double_blocks, config)
    lora_files.save_lora(tmp_path, adapter, config)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [lora_files.DIFFUSERS_FILE]
    other = jax.tree.map(np.zeros_like, adapter)
    for format in ("comfyui", "diffusers-baked", "kohya"):  # a user's conversions beside it
        write(tmp_path / f"{format}.safetensors", other, config, format)
    pipe = build_pipeline(double_blocks.reference)
    pipe.load_lora_weights(tmp_path)
    assert not log()
    assert_same_adapter(pipe.transformer, "default_0", adapter, config)
