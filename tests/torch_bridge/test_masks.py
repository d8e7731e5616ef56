"""SAM 2 as a segmenter, with random weights: transformers' at a tiny size, the package's at its smallest real one."""

import importlib.util
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation.segmenters import make_segmenter
from cocoedit_jax.errors import UserError
from tests.launch.recipes.calls import ROOT, read_flags
from tests.torch_bridge.tiny_sam2 import save_tiny_sam2
from torch_bridge import masks, require_torch

torch = pytest.importorskip("torch")
require_torch()  # before transformers, which imports torchvision where it is installed
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(pytest.importorskip("skimage.data").coffee()[:300, 100:500])


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    save_tiny_sam2(folder)
    return folder


def test_transformers_sam2(tiny_folder, photo):
    segmenter = make_segmenter("sam2-transformers", {"model": str(tiny_folder), "device": "cpu"})
    mask = segmenter(photo, (100.0, 60.0, 300.0, 240.0))
    assert mask.shape == (300, 400) and mask.dtype == bool
    # The same by the model's own forward pass from pixels, with the picture resized by Pillow: another resampling,
    # so some pixels near the edge of the mask may differ.
    model = transformers.Sam2Model.from_pretrained(tiny_folder).eval()
    small = np.asarray(photo.resize((128, 128), Image.Resampling.BILINEAR), np.float32) / 255
    small = (small - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.inference_mode():
        found = model(
            pixel_values=torch.from_numpy(small.transpose(2, 0, 1)[None]).float(),
            input_boxes=torch.tensor([[[100 * 128 / 400, 60 * 128 / 300, 300 * 128 / 400, 240 * 128 / 300]]]),
            multimask_output=False,
        )
    logits = found.pred_masks[0, 0, 0].numpy()
    expected = np.asarray(Image.fromarray(logits).resize((400, 300), Image.Resampling.BILINEAR)) > 0
    assert 0.02 < expected.mean() < 0.98, "a mask that is all or nothing tests nothing"
    assert (mask == expected).mean() > 0.98
    # Another box on the same picture uses its embedding; another picture does not.
    other = segmenter(photo, (0.0, 0.0, 60.0, 50.0))
    assert (other != mask).any()
    turned = segmenter(photo.transpose(Image.Transpose.ROTATE_180), (100.0, 60.0, 300.0, 240.0))
    assert (turned != mask).any()
    np.testing.assert_array_equal(segmenter(photo, (100.0, 60.0, 300.0, 240.0)), mask)


def test_what_does_not_load_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        make_segmenter("sam2-transformers", {"model": str(tmp_path / "none")})
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    with pytest.raises(UserError, match="does not load as Sam2Model"):
        make_segmenter("sam2-transformers", {"model": str(tmp_path)})
    with pytest.raises(UserError, match="--config.mask.options=") as error:
        make_segmenter("sam2", {})
    # The flag that it shows, and the README's, are ones that the command takes.
    texts = [str(error.value), (ROOT / "README.md").read_text(encoding="utf-8")]
    lines = [
        [
            "--config=configs/annotate.py",
            "--output=DIR",
            *shlex.split(*re.findall(r'--config\.mask\.options="[^"]*"', text)),
        ]
        for text in texts
    ]
    for found in read_flags("launch.annotate", lines):
        assert found["config"]["mask"]["options"] == {"checkpoint": "sam2.1_hiera_large.pt"}
    (tmp_path / "mine.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no configuration known for mine.pt"):
        make_segmenter("sam2", {"checkpoint": str(tmp_path / "mine.pt")})


def test_a_missing_package_names_the_steps(tmp_path, monkeypatch):
    path = tmp_path / "sam2.1_hiera_tiny.pt"
    path.write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torchvision is missing; .*--no-build-isolation 'sam2>=1.1,<2'") as error:
        make_segmenter("sam2", {"checkpoint": str(path)})
    # The same steps, word for word, in the README and in what continuous integration does.
    steps = re.findall(r"(?:SAM2_BUILD_CUDA=0 )?pip install [^&;]*", str(error.value))[1:]
    assert len(steps) == 4
    for file in ("README.md", ".ci/run"):
        text = (ROOT / file).read_text(encoding="utf-8").replace("python -m pip", "pip")
        assert [step for step in steps if step.strip() not in text] == [], file


@pytest.mark.filterwarnings("default")  # of the package and what it imports
def test_the_package_at_its_smallest_size(photo, tmp_path):
    """hiera-tiny, 39 M random parameters, at its own 1024 px, loaded as a published checkpoint is."""
    try:
        build, _ = masks.import_sam2()
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = build(masks.CONFIGS["sam2.1_hiera_tiny"], None, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == 38_962_498
    path = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    segmenter = make_segmenter("sam2", {"checkpoint": str(path), "device": "cpu"})
    mask = segmenter(photo, (100.0, 60.0, 300.0, 240.0))
    assert mask.shape == (300, 400) and mask.dtype == bool
    assert (segmenter(photo, (0.0, 0.0, 60.0, 50.0)) != mask).any()
    np.testing.assert_array_equal(segmenter(photo, (100.0, 60.0, 300.0, 240.0)), mask)
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="does not load as"):
        make_segmenter("sam2", {"checkpoint": str(path), "device": "cpu"})
