"""Qwen-Image-Edit as a user runs it, on tiny random models in the real file layout: cache, training, LoRA, edit."""

from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.layers import MODULATION
from cocoedit_jax.models.lora_files import load_lora
from cocoedit_jax.reporting.telemetry import read_metrics
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.setup import build
from configs import qwen_image_edit, qwen_image_edit_2511
from tests.parity.tiny_qwen import save_tiny_qwen
from tests.train.whole import SIZE, edit_noise, launch_edit, shrunk, strengthened

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    return save_tiny_qwen(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    from torch_bridge.qwen_text import encode_folder

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 16, SIZE, seed=3)
    encode_folder(folder, model, Framing(SIZE, "center", divisor=16))
    return folder


def config(model, data, configs=qwen_image_edit, **overrides):
    return shrunk(configs.get_config("cocoedit"), model, data, **overrides)


@pytest.mark.slow
def test_one_step_resume_and_export(model, data, tmp_path, monkeypatch):
    import torch

    from tests.parity.test_qwen_edit import reference

    run = tmp_path / "run"
    setup = build(config(model, data))
    assert MODULATION in setup.params and "time_text_embed" not in setup.params["transformer"]
    assert train(setup, run)["step"] == 1
    assert train(build(config(model, data, **{"train.steps": 2})), run, resume=True)["step"] == 2
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    for key in ("reward/judge", "reward/pixel", "train/kl", "train/gradient_norm", "mfu/rollout"):
        assert np.isfinite(rows[-1][key]), key
    assert rows[-1]["train/gradient_norm"] > 0

    folder = run / "lora" / "step_000002"
    adapter, cfg = load_lora(folder)
    assert cfg.scale == 2 and len(jax.tree.leaves(adapter)) == 16
    assert f"| Base model | {model} |" in (folder / "README.md").read_text()

    # The LoRA changes the pipeline's edit, and ours, in the same way.
    pipe: Any = reference(model, "QwenImageEditPlusPipeline", monkeypatch, {1024**2: SIZE**2})
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    picture = tmp_path / "in.png"
    source.save(picture)
    stronger = strengthened(folder, tmp_path / "stronger")
    edits = {}
    for name, lora in (("base", None), ("trained", stronger)):
        if lora is not None:
            pipe.load_lora_weights(lora)
        more = [f"--lora={lora}"] if lora else ["--true_cfg=1.0"]
        edits[name] = launch_edit(model, picture, tmp_path / f"{name}.png", *more)
        theirs = pipe(
            image=[source], prompt="make it red", height=SIZE, width=SIZE, num_inference_steps=3, true_cfg_scale=1.0,
            latents=torch.from_numpy(edit_noise()),
        ).images[0]  # fmt: skip
        assert np.abs(edits[name] - np.asarray(theirs, np.int32)).max() <= 1  # of 255: a rounding apart
    assert np.abs(edits["base"] - edits["trained"]).max() > 3


def losses(setup, run):
    train(setup, run)
    return read_metrics(run)[-1]


@pytest.mark.slow
def test_options_of_training(model, data, tmp_path):
    """Precomputed modulation changes nothing; the released text handling and the 2511 variant do."""
    base = losses(build(config(model, data)), tmp_path / "base")
    whole = build(config(model, data, **{"model.precompute_modulation": False}))
    assert MODULATION not in whole.params
    kept = losses(whole, tmp_path / "whole")
    for name in ("train/loss", "train/gradient_norm", "reward/total"):
        np.testing.assert_allclose(kept[name], base[name], rtol=1e-4, err_msg=name)
    released = losses(
        build(config(model, data, **{"model.text_mask": False, "model.text_tokens": 256})), tmp_path / "released"
    )
    assert abs(released["train/loss"] - base["train/loss"]) > 1e-6 * abs(base["train/loss"])


@pytest.mark.slow
def test_the_2511_variant_trains(tmp_path):
    from torch_bridge.qwen_text import encode_folder

    model = save_tiny_qwen(tmp_path / "model", seed=2, zero_cond_t=True)
    write_scenes(tmp_path / "data", 16, SIZE, seed=3)
    encode_folder(tmp_path / "data", model, Framing(SIZE, "center", divisor=16))
    row = losses(build(config(model, tmp_path / "data", qwen_image_edit_2511)), tmp_path / "run")
    assert np.isfinite(row["train/loss"]) and row["train/gradient_norm"] > 0


def test_what_does_not_fit_is_refused(model, data):
    with pytest.raises(UserError, match="no text cache.*--encode=qwen.*--resolution=48"):
        build(config(model, data, **{"data.resolution": 48}))
    with pytest.raises(UserError, match="text_tokens=-1"):
        build(config(model, data, **{"model.text_tokens": -1}))
    with pytest.raises(UserError, match=r"no text cache.*--crop=buckets --groups=2"):
        build(config(model, data, **{"data.crop": "buckets"}))


def test_a_length_that_leaves_no_instruction_is_refused(data, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="text_tokens=256; expected 0 for .*behind it"):
        build(config(tmp_path, data, **{"model.text_tokens": 256}))


def test_released_hyperparameters():
    official = qwen_image_edit.get_config("cocoedit-official")
    assert (official.algorithm.lambda_ner, official.algorithm.lambda_er) == (0.8, 0.5)
    assert official.algorithm.reward_weights.to_dict() == {"judge": 0.8, "pixel": 0.2}
    assert (official.lora.rank, official.lora.alpha, official.train.learning_rate) == (32, 64, 3e-4)
    assert (official.rollout.steps, official.rollout.solver, official.rollout.group_size) == (10, "dpm2", 12)
    assert qwen_image_edit.get_config("edit-r1").algorithm.reward_weights.to_dict() == {"judge": 1.0}
    newer = qwen_image_edit_2511.get_config("cocoedit-official")
    assert newer.model.path != official.model.path
    newer.model.path = official.model.path
    assert newer == official
