"""A batch of edits that devices share is the batch of one device. Results that cannot be written."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.inference.edit import EditOptions, PictureEditor, edit_all
from cocoedit_jax.inference.requests import EditRequest
from cocoedit_jax.models import lora
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import parameter_shardings
from tests.train.layout_cases import LORA, SIZE, TEXT, editor
from tests.train.tiny import random_params

PROMPTS = ("make it red", "remove it", "turn it")
NEGATIVE = "ugly"


def text_of(model):
    """Random states of every prompt; some of Qwen's are padding."""
    rng, shape = np.random.default_rng(1), model.transformer.config
    table = {}
    for number, prompt in enumerate((*PROMPTS, NEGATIVE)):
        row = {"text": rng.standard_normal((TEXT, shape.joint_attention_dim)).astype(np.float32)}
        if shape.pooled_features:
            row["pooled"] = rng.standard_normal(shape.pooled_features).astype(np.float32)
        else:
            row["mask"] = np.arange(TEXT) < TEXT - number % 2
        table[prompt] = row
    return PrecomputedText.of(table)


@pytest.mark.parametrize(
    "name, sizes, true_cfg",
    [
        ("flux", {"fsdp": 2, "tensor": 2}, 1.0),  # two shares: a last row is repeated
        ("qwen", {"data": 2, "fsdp": 2}, 2.0),  # four shares of three edits, with a negative prompt each
    ],
)
def test_edits_of_several_devices_are_those_of_one(name, sizes, true_cfg):
    model = editor(name)
    model = dataclasses.replace(model, text=text_of(model), quantize="")
    params = random_params(model)
    adapter = lora.fold_scale(lora.init_adapter(jax.random.key(2), params["transformer"], LORA), LORA)
    adapter = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), adapter)
    side = SIZE * model.autoencoder.factor
    options = EditOptions(2, "euler", (side, side), "target", len(PROMPTS), true_cfg, NEGATIVE)
    rng = np.random.default_rng(0)
    pictures = [[Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))] for _ in PROMPTS]
    edits = []
    for axes in ({"fsdp": 1}, sizes):
        devices = int(np.prod(list(axes.values())))
        mesh = make_mesh(axes, jax.devices()[:devices])
        placed = jax.device_put(params, parameter_shardings(model.abstract(), mesh))
        program = PictureEditor(model, placed, adapter, options)
        noise = np.stack([program.noise(seed, (side, side)) for seed in range(len(PROMPTS))])
        edits.append(program(pictures, PROMPTS, noise, options.sizes(model, [(side, side)])))
        assert program.batch_size == (3 if devices == 1 else 4)
    one, several = edits
    assert one.shape == several.shape == (3, side, side, 3) and np.ptp(one) > 0.5
    assert min(np.abs(one[i] - one[i - 1]).max() for i in range(3)) > 0.1
    np.testing.assert_allclose(several, one, rtol=0, atol=1e-5)


class White:
    """A ``PictureEditor`` that makes white pictures."""

    editor, batch_size = None, 1
    options = types.SimpleNamespace(sizes=lambda editor, own: ((8, 8), tuple(own)))

    def noise(self, seed, target):
        return np.zeros((1, 4), np.float32)

    def __call__(self, pictures, prompts, noise, sizes, names):
        return np.ones((len(prompts), 8, 8, 3), np.float32)


def test_a_result_that_cannot_be_written_ends_in_one_message(tmp_path):
    """Also where the folder was fine when it was checked, and earlier results stay."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "in.png")
    (tmp_path / "taken.png").mkdir()
    program: Any = White()
    for out in ("in.png/out.png", "taken.png"):
        requests = [EditRequest((tmp_path / "in.png",), "x", tmp_path / name) for name in ("first.png", out)]
        with pytest.raises(UserError, match=f"{out}: cannot be written"):
            edit_all(program, requests, [[(8, 8)]] * 2)
        with Image.open(tmp_path / "first.png") as file:
            assert file.size == (8, 8)
        (tmp_path / "first.png").unlink()
    edit_all(program, [EditRequest((tmp_path / "in.png",), "x", tmp_path / "new" / "out.png")], [[(8, 8)]])
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["in.png", "out.png", "taken.png"]
