"""Photographs through the whole annotation with tiny random models: Qwen2.5-VL behind the server, SAM 2."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation import engine, stages
from cocoedit_jax.annotation.fake import FakeModel
from cocoedit_jax.annotation.record import read_annotations
from cocoedit_jax.annotation.segmenters import make_segmenter
from cocoedit_jax.annotation.settings import check
from cocoedit_jax.rewards.chat import ChatClient
from configs.annotate import get_config
from tests.annotation.helpers import finish, lines
from tests.torch_bridge.judge_server.helpers import metric, running
from tests.torch_bridge.judge_server.tiny_qwen import save_tiny_qwen
from tests.torch_bridge.tiny_sam2 import save_tiny_sam2
from torch_bridge import require_torch
from torch_bridge.judge_server.app import AppSettings

pytest.importorskip("torch", reason="needs the [bridge] extra")
require_torch()  # before transformers, which imports torchvision where it is installed
pytest.importorskip("transformers", reason="needs the [bridge] extra")


class Mixed(ChatClient):
    """A random model writes no JSON: boxes and sentences are the stand-in's, kinds and scores the server's."""

    def complete_all(self, requests, *arguments, **options):
        made_up = [request.request_id.startswith(("box", "rewrite")) for request in requests]
        theirs = iter(FakeModel().complete_all([r for r, fake in zip(requests, made_up, strict=True) if fake]))
        asked = [r for r, fake in zip(requests, made_up, strict=True) if not fake]
        ours = iter(super().complete_all(asked, *arguments, **options))
        return [next(theirs if fake else ours) for fake in made_up]


def test_nothing_is_lost_or_made_up(tmp_path, monkeypatch):
    from torch_bridge.judge_server.qwen import QwenModel

    data = pytest.importorskip("skimage.data")
    for name in ("in", "qwen", "sam2"):
        (tmp_path / name).mkdir()
    given = []
    for name in ("coffee", "chelsea", "astronaut"):
        Image.fromarray(getattr(data, name)()).reduce(2).save(tmp_path / f"in/{name}.jpg", quality=95)
        given.append({"id": name, "image": f"{name}.jpg", "prompt": "make it red", "edit_type": "color"})
    given[2]["edit_type"] = None  # for the random model to say
    (tmp_path / "in/prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    save_tiny_qwen(tmp_path / "qwen")
    save_tiny_sam2(tmp_path / "sam2")
    config = get_config()
    config.models.name, config.models.max_pixels = "tiny", 112 * 112
    config.box.convention, config.box.probe = "pixels", False
    config.mask.segmenter = "sam2-transformers"
    config.mask.options = {"model": str(tmp_path / "sam2"), "device": "cpu"}
    config.classify.max_tokens = 4
    with running(QwenModel(tmp_path / "qwen", device="cpu"), AppSettings("tiny")) as client:
        config.models.endpoints = (f"{client.base_url}/v1",)
        settings = check(config.to_dict())
        monkeypatch.setattr(engine, "make_model", lambda settings: Mixed(settings.models.endpoints, "tiny"))
        outcome = finish(settings, tmp_path / "out", source=str(tmp_path / "in"))
        assert metric(client, "judge_images_total") == 2 * 5 and metric(client, "judge_covered_mass_count") == 2 * 3
    # What a random model says is no kind of edit and no digit: dead letters with the reason, no scores.
    assert outcome.by_reason == {"dead: no_score": 2, "dead: unparsed_reply": 1} and outcome.dead == 3
    found = {annotation.item.id: annotation for annotation in read_annotations(tmp_path / "out/scores.jsonl")}
    assert found["astronaut"].stage == "load"
    segmenter = make_segmenter("sam2-transformers", settings.mask.options)
    for name in ("coffee", "chelsea"):
        assert set(found[name].scores.values()) == {None} and max(found[name].attributes["digit_mass"].values()) < 0.5
        with Image.open(tmp_path / f"in/{name}.jpg") as image:
            boxed = replace(found[name], status="pending", mask_file=None)
            _, mask = stages.segment(boxed, image.convert("RGB"), segmenter, settings)
        assert mask is not None and 0 < mask.mean() < 1
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / found[name].mask_file)) == 0, mask)
    # The masks are there for a filter that asks for no scores and takes any shape.
    anything = {f"min_{name}": None for name in ("clarity", "mask_accuracy", "prominence")}
    anything |= {"min_area": 0.0, "max_area": 1.0, "min_crop_area": 0.0, "max_crop_area": 1.0, "min_box_iou": 0.0}
    anything |= {"max_components": 10**6, "max_border": 1.0}
    free = replace(settings, filter=replace(settings.filter, **anything))
    assert finish(free, tmp_path / "out", refilter=True).kept == 2
    rows = lines(tmp_path / "out/metadata.jsonl")
    assert [row["id"] for row in rows] == ["coffee", "chelsea"] and set(rows[0]["scores"].values()) == {None}
