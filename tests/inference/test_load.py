"""What is decided, and refused, before any weights are read; the model folder holds configurations only."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.inference import load
from cocoedit_jax.inference.edit import EditOptions
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.models.qwen import QwenConfig, abstract_params
from cocoedit_jax.models.text import PrecomputedText

ROOT = Path(__file__).resolve().parents[2]
CONFIG = QwenConfig(64, 1, 6, 2, 8, (2, 2, 2))
SQUARE = (512, 512)


def write_folder(folder, pipeline, zero_cond_t=False):
    parts = {
        "transformer/config.json": {
            "_class_name": "QwenImageTransformer2DModel",
            "attention_head_dim": 6,
            "axes_dims_rope": [2, 2, 2],
            "joint_attention_dim": 8,
            "num_attention_heads": 2,
            "num_layers": 1,
            "zero_cond_t": zero_cond_t,
        },
        "vae/config.json": {"_class_name": "AutoencoderKLQwenImage"},
        "scheduler/scheduler_config.json": {"use_dynamic_shifting": True},
        "model_index.json": {"_class_name": pipeline},
    }
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """``load_for_editing`` on such a folder, without weights: the editor."""
    monkeypatch.setattr(load.qwen_edit, "load_params", lambda folder, editor, place: None)

    def run(pictures, pipeline="QwenImageEditPlusPipeline", options=None, zero_cond_t=False, encoded=None, **more):
        folder = write_folder(tmp_path / "model", pipeline, zero_cond_t)

        def encode(folder, kind):
            if encoded is not None:
                encoded.append(kind)
            return PrecomputedText.of({})

        return load.load_for_editing(str(folder), encode, options or EditOptions(3, size=SQUARE), pictures, **more)[0]

    return run


def test_pictures_that_a_model_does_not_take_are_refused_before_text_is_encoded(loaded):
    encoded = []
    with pytest.raises(UserError, match="2 pictures for one edit; expected at most 1 for the model in .*model"):
        loaded([[SQUARE], [SQUARE, SQUARE]], "QwenImageEditPipeline", encoded=encoded)
    with pytest.raises(UserError, match="4 pictures for one edit; expected at most 3"):
        loaded([[SQUARE] * 4], encoded=encoded)
    with pytest.raises(UserError, match="--size=500x512: image size 512x500 px: both sides must be multiples of 16"):
        loaded([[SQUARE]], options=EditOptions(3, size=(512, 500)), encoded=encoded)
    assert not encoded
    loaded([[SQUARE] * 3], encoded=encoded)
    loaded([[SQUARE]], "QwenImageEditPipeline", encoded=encoded)
    assert encoded == ["qwen", "qwen"]


def test_modulation_is_computed_for_the_sigmas_of_all_edits(loaded):
    pictures = [[(512, 512)], [(300, 900)], [(512, 512), (900, 300)]]
    options = EditOptions(4)
    editor = loaded(pictures, options=options, zero_cond_t=True)
    assert editor.modulation_sigmas[0] == 0.0
    for own in pictures:
        target, _ = options.sizes(editor, own)
        editor.check_sigmas(editor.sigmas(4, editor.grid(*target)))
    assert 0.0 not in loaded(pictures, options=options).modulation_sigmas


def test_modulation_layers_stay_where_they_are_needed(loaded, tmp_path):
    assert len(loaded([[SQUARE]]).modulation_sigmas) == 3
    # Tables of more sigmas than a layer has inputs (12) are no smaller than it.
    assert loaded([[SQUARE]], options=EditOptions(12, size=SQUARE)).modulation_sigmas is not None
    assert loaded([[SQUARE]], options=EditOptions(13, size=SQUARE)).modulation_sigmas is None
    params = nn.unbox(abstract_params(CONFIG))
    for target, kept in (("img_mod.1", True), ("attn.to_q", False)):
        config = lora.LoraConfig(2, 2, (target,))
        adapter = lora.init_adapter(jax.random.key(0), params, config)
        lora_files.save_lora(tmp_path / target, adapter, config, model="qwen")
        editor = loaded([[SQUARE]], lora_path=str(tmp_path / target))
        assert (editor.modulation_sigmas is None) == kept, target


ORDER = """
import sys
import jax
from cocoedit_jax.errors import UserError
from cocoedit_jax.inference import edit, load

compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

def encode(folder, kind):
    print("encoding", jax.live_arrays(), [event for event in compiled if "backend_compile" in event])
    jax.numpy.ones(3).sum()
    print("then", [event for event in compiled if "backend_compile" in event] != [])
    raise SystemExit

try:
    load.load_for_editing(sys.argv[1], encode, edit.EditOptions(3), [[(512, 512)]], lora_path=sys.argv[2])
except UserError as error:
    print("refused", error)
"""


def test_a_lora_is_read_and_checked_before_text_is_encoded_and_both_before_the_first_array(tmp_path):
    """With its first operation JAX takes most of the GPU that the text encoders are to run on."""
    folder = write_folder(tmp_path / "model", "QwenImageEditPlusPipeline")
    for name, heads in (("fits", CONFIG.num_attention_heads), ("foreign", 4)):
        params = nn.unbox(abstract_params(dataclasses.replace(CONFIG, num_attention_heads=heads)))
        config = lora.LoraConfig(2, 2, ("attn.to_q",))
        adapter = lora.init_adapter(jax.random.key(0), params, config)
        lora_files.save_lora(tmp_path / name, adapter, config, model="qwen")

    def start(name):
        command = [sys.executable, "-c", ORDER, str(folder), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return done.stdout.strip()

    assert start("fits") == "encoding [] []\nthen True"
    assert re.match(r"refused .*foreign.*attn\.to_q", start("foreign"), re.DOTALL)
