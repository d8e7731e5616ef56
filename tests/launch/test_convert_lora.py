import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cocoedit_jax.models import lora, lora_files, model_card, weights
from cocoedit_jax.models.lora_bfl import LowRank

ROOT = Path(__file__).resolve().parents[2]
CONFIG = lora.LoraConfig(2, 4)


@pytest.fixture
def layers():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [f"transformer_blocks.{i}.attn.{name}" for i in range(2) for name in double]
    names += [f"single_transformer_blocks.{i}.attn.{name}" for i in range(3) for name in double[:3]]
    return {name: LowRank(draw(2, 6), draw(6, 2), 4) for name in names}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.convert_lora", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def convert(source, to, format, *extra):
    return run(f"--from={source}", f"--to={to}", f"--format={format}", *extra)


def test_there_and_back(layers, tmp_path):
    source = lora_files.write_lora(tmp_path / "start", layers, CONFIG, "diffusers", info={"step": "80"})
    start = lora_files.load_lora(source)
    for place, format in (("kohya.safetensors", "kohya"), ("peft", "peft")):
        target = tmp_path / place
        done = convert(source, target, format)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert " of FLUX, 25 layers, rank 2, alpha 4 (scale 2), 600 parameters, float32" in done.stdout
        assert "transformer_blocks.*.attn.to_q x 2" in done.stdout
        assert "single_transformer_blocks.*.attn.to_v x 3" in done.stdout
        found = lora_files.read_lora(target)
        assert found.format == format and found.header == {"step": "80"}
        assert f"wrote {found.path}: {format}, float32" in done.stdout
        source = target
    loaded, config = lora_files.load_lora(source)
    assert config.scale == 2
    jax.tree.map(np.testing.assert_array_equal, loaded, start[0])


def test_the_command_of_the_model_card(layers, tmp_path):
    lora_files.write_lora(tmp_path, layers, CONFIG, "diffusers")
    command = re.search(r"```bash\npython -m launch.convert_lora (.*)\n```", model_card.write(CONFIG, len(layers), {}))
    assert command is not None
    words = command[1].replace("FOLDER", str(tmp_path)).replace("comfyui.saf", f"{tmp_path}/comfyui.saf")
    assert run(*shlex.split(words)).returncode == 0
    assert lora_files.read_lora(tmp_path / "comfyui.safetensors").format == "comfyui"
    # Beside diffusers' file it is not what a folder stands for.
    assert lora_files.read_lora(tmp_path).format == "diffusers"


def test_alpha_dtype_and_notes(layers, tmp_path):
    tensors, _ = weights.load_safetensors(lora_files.write_lora(tmp_path, layers, CONFIG, "diffusers-baked"))
    released = tmp_path / "adapter_model_converted.safetensors"
    weights.save_safetensors(released, tensors)
    done = convert(released, tmp_path / "half.safetensors", "kohya", "--dtype=bfloat16")
    assert done.returncode == 0 and "note:" in done.stderr and "give alpha=4" in done.stderr
    done = convert(released, tmp_path / "full.safetensors", "kohya", "--alpha=4")
    assert done.returncode == 0 and not done.stderr
    half, full = (lora_files.read_lora(tmp_path / f"{name}.safetensors") for name in ("half", "full"))
    assert (half.config.scale, half.dtype, full.config.scale, full.dtype) == (1, "bfloat16", 2, "float32")


def test_qwen(layers, tmp_path):
    """Attention of the first blocks may be either model's; one layer more tells."""
    attention = {name: x for name, x in layers.items() if name.startswith("transformer_blocks")}
    source = lora_files.write_lora(tmp_path / "a", attention, CONFIG, "peft").parent
    done = convert(source, tmp_path / "b.safetensors", "kohya", "--model=qwen")
    assert done.returncode == 0 and "peft of Qwen-Image, 16 layers" in done.stdout
    tensors, _ = weights.load_safetensors(tmp_path / "b.safetensors")
    assert "lora_unet_transformer_blocks_1_attn_to_out_0.alpha" in tensors and len(tensors) == 3 * 16

    attention["img_in"] = layers["single_transformer_blocks.0.attn.to_q"]
    source = lora_files.write_lora(tmp_path / "c", attention, CONFIG, "diffusers")
    done = convert(source, tmp_path / "d.safetensors", "comfyui")
    assert done.returncode == 0 and not done.stderr and "diffusers of Qwen-Image, 17 layers" in done.stdout
    found = lora_files.read_lora(tmp_path / "d.safetensors")
    assert found.model == "qwen" and found.layers.keys() == attention.keys()


def test_nothing_is_replaced_unasked(layers, tmp_path):
    source = lora_files.write_lora(tmp_path / "a", layers, CONFIG, "diffusers")
    before = source.read_bytes()
    done = convert(source, source, "kohya")
    assert done.returncode == 1 and "exists; add --overwrite" in done.stderr and "Traceback" not in done.stderr
    assert source.read_bytes() == before
    assert convert(source, source, "kohya", "--overwrite").returncode == 0
    assert lora_files.read_lora(source).format == "kohya"


def test_what_did_not_match_is_printed_and_nothing_written(layers, tmp_path):
    tensors, _ = weights.load_safetensors(lora_files.write_lora(tmp_path / "a", layers, CONFIG, "kohya"))
    tensors["lora_unet_double_blocks_0_x.alpha"] = np.ones((), np.float32)
    tensors["lora_unet_y.lora_up.weight"] = np.ones((2, 2), np.float32)
    weights.save_safetensors(tmp_path / "b.safetensors", tensors)
    done = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for part in ("error: ", "2 tensor(s)", "lora_unet_double_blocks_0_x.alpha", "lora_unet_y.lora_up.weight"):
        assert part in done.stderr
    assert not (tmp_path / "c.safetensors").exists()


def test_layers_that_diffusers_would_leave_out_are_named(layers, tmp_path):
    layers["x_embedder"] = layers["single_transformer_blocks.0.attn.to_q"]
    source = lora_files.write_lora(tmp_path / "a", layers, CONFIG, "diffusers")
    done = convert(source, tmp_path / "b.safetensors", "comfyui")
    assert done.returncode == 0 and "note: diffusers leaves these out of comfyui files: x_embedder" in done.stderr
