"""FLUX.1 Kontext as a user runs it, on a tiny random model in the real file layout: cache, training, LoRA, edit."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.lora_files import load_lora
from cocoedit_jax.reporting.telemetry import read_metrics
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.setup import build
from configs.flux_kontext import get_config
from tests.parity.tiny_kontext import save_tiny_kontext
from tests.train.whole import SIZE, STRONGER, edit_noise, launch_edit, shrunk, strengthened

pytestmark = pytest.mark.usefixtures("kept_programs")

TOKENS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    return save_tiny_kontext(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    from torch_bridge.flux_text import encode_folder

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 24, SIZE, seed=3)
    encode_folder(folder, model, TOKENS)
    return folder


def config(model, data, preset="cocoedit", **overrides):
    return shrunk(get_config(preset), model, data, **{"model.text_tokens": TOKENS} | overrides)


@pytest.mark.slow
def test_one_step_resume_and_export(model, data, tmp_path):
    import torch
    from diffusers import FluxKontextPipeline

    run = tmp_path / "run"
    first = train(build(config(model, data)), run)
    assert first["step"] == 1 and np.isfinite(first["base"]["psnr_outside"]["mean"])
    second = train(build(config(model, data, **{"train.steps": 2})), run, resume=True)
    assert second["step"] == 2
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    for key in ("reward/judge", "reward/pixel", "train/kl", "train/gradient_norm", "mfu/rollout"):
        assert np.isfinite(rows[-1][key]), key
    assert rows[-1]["train/ner"] >= 0 and rows[-1]["train/gradient_norm"] > 0

    folder = run / "lora" / "step_000002"
    adapter, cfg = load_lora(folder)
    assert cfg.scale == 2 and all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapter))
    card = (folder / "README.md").read_text()
    for row in (
        f"| Base model | {model} |",
        "| Preset | cocoedit |",
        "| Step | 2 |",
        "| judge | 0.8 | ",
        "| pixel | 0.2 | ",
    ):
        assert row in card, row
    assert "load_lora_weights" in card and "--format=comfyui" in card

    # The LoRA changes the pipeline's edit, and ours, in the same way.
    pipe = FluxKontextPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    picture = tmp_path / "in.png"
    source.save(picture)
    stronger = strengthened(folder, tmp_path / "stronger")
    edits = {}
    for name, lora in (("base", None), ("trained", stronger)):
        if lora is not None:
            pipe.load_lora_weights(lora)
        # Ours is made strong by its alpha, which acts as a larger B does.
        more = [f"--lora={folder}", f"--lora_alpha={STRONGER * cfg.alpha}"] if lora else []
        edits[name] = launch_edit(model, picture, tmp_path / f"{name}.png", f"--text_tokens={TOKENS}", *more)
        result: Any = pipe(
            image=source, prompt="make it red", height=SIZE, width=SIZE, max_area=SIZE**2, _auto_resize=False,
            num_inference_steps=3, guidance_scale=2.5, latents=torch.from_numpy(edit_noise()),
            max_sequence_length=TOKENS,
        )  # fmt: skip
        theirs = result.images[0]
        assert np.abs(edits[name] - np.asarray(theirs, np.int32)).max() <= 1  # of 255: a rounding apart
    assert np.abs(edits["base"] - edits["trained"]).max() > 3


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cocoedit-official", "cocoedit-routed", "edit-r1"])
def test_every_preset_steps(model, data, tmp_path, preset):
    result = train(build(config(model, data, preset)), tmp_path / "run")
    assert np.isfinite(result["trained"]["judge"]["mean"])


def test_what_does_not_fit_is_refused(model, data, tmp_path):
    with pytest.raises(UserError, match="judge: ''"):
        build(config(model, data, **{"judge.name": ""}))
    with pytest.raises(UserError, match="no text cache.*--max_length=64"):
        build(config(model, data, **{"model.text_tokens": 64}))
    with pytest.raises(UserError, match="resolution=40"):
        build(config(model, data, **{"data.resolution": 40}))
    other = save_tiny_kontext(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match="text_cache"):
        build(config(other, data))
    shutil.copytree(data, tmp_path / "more")
    metadata = tmp_path / "more" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    row = json.loads(lines[0]) | {"prompt": "an instruction that was not encoded", "id": "new"}
    metadata.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    with pytest.raises(UserError, match="1 x instruction\n.*'new'.*not encoded.*\n.*--encode=flux"):
        build(config(model, tmp_path / "more", **{"data.strict": True}))
    left = build(config(model, tmp_path / "more"))
    assert "new" not in {record.id for record in (*left.train_records, *left.held_out_records)}
