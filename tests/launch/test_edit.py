"""What the command refuses before anything is loaded; the model folders hold the transformer's class alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# Several command lines in one process: JAX is imported once.
RUN = """
import json
import sys
from absl import flags
from absl.testing import flagsaver
from cocoedit_jax.errors import UserError
from launch import edit

messages = []
for arguments in json.load(sys.stdin):
    with flagsaver.flagsaver():
        flags.FLAGS(["edit", *arguments])
        try:
            edit.main([])
            messages.append("")
        except UserError as error:
            messages.append(str(error))
print(json.dumps([messages, [name for name in sys.modules if "torch_bridge" in name]]))
"""
UNUSED = "not used by this model; see --help"
BUILT = "vae/config.json: not readable"  # what comes after the flags
CASES = {
    "scale without a LoRA": ("qwen", ["--lora_scale=0.5"], ["--lora_scale: given without --lora"]),
    "both": ("qwen", ["--lora_scale=1", "--lora_alpha=3"], ["--lora_scale and --lora_alpha: given without --lora"]),
    "with a LoRA": ("qwen", ["--lora=x", "--lora_scale=0.5", "--lora_alpha=3"], [BUILT]),
    "negative, no guidance": ("qwen", ["--negative=blur"], ["--negative: not used with --true_cfg=1; expected"]),
    "negative, guidance": ("qwen", ["--negative=blur", "--true_cfg=4"], [BUILT]),
    "of FLUX": ("qwen", ["--guidance=2", "--text_tokens=8"], [f"--guidance: {UNUSED}", f"--text_tokens: {UNUSED}"]),
    "of Qwen": ("flux", ["--negative=blur", "--true_cfg=4"], [f"--negative: {UNUSED}"]),
    "FLUX's own": ("flux", ["--guidance=2", "--text_tokens=8"], [BUILT]),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The messages of ``CASES``, and the modules of torch_bridge that were imported for them."""
    folder = tmp_path_factory.mktemp("edit")
    for kind, name in (("qwen", "QwenImageTransformer2DModel"), ("flux", "FluxTransformer2DModel")):
        path = folder / kind / "transformer" / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"_class_name": name, "guidance_embeds": kind == "flux"}))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "in.png")
    shared = [f"--image={folder / 'in.png'}", "--prompt=make it red", f"--out={folder / 'out.png'}"]
    commands = [[*shared, f"--model={folder / kind}", *more] for kind, more, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(commands), capture_output=True, text=True, check=True, cwd=ROOT
    )
    messages, bridge = json.loads(done.stdout)
    return dict(zip(CASES, messages, strict=True)), bridge


@pytest.mark.parametrize("case", CASES)
def test_flags_without_effect_are_refused_before_anything_is_loaded(outcome, case):
    messages, bridge = outcome
    lines, expected = messages[case].splitlines(), CASES[case][2]
    assert len(lines) == len(expected) and all(part in line for line, part in zip(lines, expected, strict=True)), lines
    assert not bridge
