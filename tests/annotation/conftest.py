import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation import run
from cocoedit_jax.annotation.prompts import load_prompts
from cocoedit_jax.annotation.record import Annotation, Item
from cocoedit_jax.annotation.settings import check
from cocoedit_jax.annotation.stages import Rules
from configs.annotate import get_config


def small_config():
    """The default settings with the fake model, boxes as masks and small shards."""
    config = get_config()
    config.models.name, config.mask.segmenter, config.box.convention = "fake", "box", "pixels"
    config.engine.shard_size = 2
    return config


@pytest.fixture
def config():
    return small_config()


@pytest.fixture
def settings(config):
    return check(config.to_dict())


@pytest.fixture
def rules(settings):
    return Rules(settings, load_prompts(), "pixels")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Photographs of several shapes with instructions, one file that is no picture, and two global edits."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("photos")
    pictures = {"astronaut": data.astronaut(), "chelsea": data.chelsea(), "coffee": data.coffee()}
    lines = []
    for name, pixels in pictures.items():
        Image.fromarray(pixels).reduce(2).save(folder / f"{name}.jpg", quality=95)
        for prompt, kind in (("make it red", None), ("Remove the thing in front", None), ("add a bird", "addition")):
            lines.append({"image": f"{name}.jpg", "prompt": prompt, "edit_type": kind, "licence": "CC0"})
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    lines.insert(4, {"image": "broken.jpg", "prompt": "make it red"})
    lines.insert(7, {"image": "coffee.jpg", "prompt": "turn it into a night scene", "edit_type": "style_transfer"})
    lines.append({"image": "chelsea.jpg", "prompt": "as an oil painting"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def done(photos, tmp_path_factory):
    """The folder and the outcome of a run without any fault."""
    folder = tmp_path_factory.mktemp("done") / "out"
    return folder, run.annotate(check(small_config().to_dict()), folder, source=str(photos))


@pytest.fixture
def finished():
    """An annotation as it comes out of the last stage."""
    measures = {"area": 0.2, "crop_area": 0.25, "components": 1, "box_iou": 0.9, "border": 0.0}
    return replace(
        Annotation(Item("a", "a.png", "make it red", "color")),
        size=(100, 80), box=(10.0, 10.0, 60.0, 50.0), mask_file="masks/a.png", mask_area=0.2, refined_prompt="the cup",
        scores={"clarity": 0.9, "mask_accuracy": 0.8, "prominence": 0.7},
        attributes={"measures": measures}, stage="score",
    )  # fmt: skip


def blob(size=(80, 100), center=(40, 50), radius=15):
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2
