"""A run on photographs of several shapes, in aspect-preserving buckets, on a mesh with two axes."""

import json

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.reporting.telemetry import read_metrics
from cocoedit_jax.rewards import judge as judges
from cocoedit_jax.rewards.judge import JudgeScore
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.setup import build
from tests.train.tiny import tiny_config


@pytest.fixture
def photos(tmp_path):
    """A folder in the CoCoEdit-40K layout: landscape and square crops of photos, masks white where to keep."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path / "photos"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    lines = []
    for number in range(24):
        photo = (data.astronaut(), data.coffee(), data.chelsea())[number % 3]
        height, width = (96, 192) if number % 2 else (96, 96)
        photo = photo[number : number + height, number : number + width]
        mask = np.full(photo.shape[:2], 255, np.uint8)
        mask[24:72, 24:72] = 0
        Image.fromarray(photo).save(folder / f"images/{number}.jpg", quality=95)
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
        lines.append({"prompt": "make it red", "image": f"images/{number}.jpg", "mask": f"masks/{number}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# Sampling with the base whole on two pairs of devices, training with it split; the base moves between the two.
PHASES = {"rollout.layout": "tensor:data=2,tensor=2", "train.layout": "fsdp_tensor:fsdp=2,tensor=2"}


def test_buckets_and_phases_of_different_layouts(tiny_base, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(
        judges.JUDGES, "red", lambda: lambda rs: [JudgeScore(float(r.edited[..., 0].mean())) for r in rs]
    )
    settings = {
        "data.resolution": 48, "data.crop": "buckets", "data.held_out": 0.25, "rollout.groups": 2, "judge.name": "red",
        "train.steps": 4, "evaluation.scenes": 6, "evaluation.batch_size": 4, "evaluation.every": 4,
        "checkpoint.every": 4,
    }  # fmt: skip
    runs = {}
    for name, mesh in (("one", {}), ("four", PHASES)):
        setup = build(tiny_config(tiny_base, photos, **settings, **mesh))
        assert {setup.framing.sizes[r.bucket] for r in setup.train_records} == {(48, 48), (32, 64)}
        result = train(setup, tmp_path / name)
        runs[name] = read_metrics(tmp_path / name), result
    # Noise and data do not depend on the devices, so the numbers agree to rounding.
    for one, four in zip(runs["one"][0], runs["four"][0], strict=True):
        for key in ("reward/total", "train/loss", "train/gradient_norm", "samples/used"):
            assert four[key] == pytest.approx(one[key], rel=1e-3), key
        assert one["mfu/train"] > 0
        assert four["seconds/reshard"] > 0 and "seconds/reshard" not in one
    for name, value in runs["one"][1]["trained"].items():
        assert runs["four"][1]["trained"][name]["mean"] == pytest.approx(value["mean"], rel=1e-3, abs=1e-4)
    # Records without a scene description are judged to be unedited by how little changed inside the mask.
    assert 0 <= runs["one"][1]["base"]["no_edit"]["mean"] <= 1
