import io

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.pictures import curves, draw_outline, matching, outline, png_bytes, sample_grid, series


def size_of(png):
    return Image.open(io.BytesIO(png)).size


def test_outline_is_the_inner_edge():
    mask = np.zeros((7, 7))
    mask[1:6, 1:6] = 1
    edge = outline(mask)
    assert edge.sum() == 16 and not edge[2:5, 2:5].any() and not edge[0].any()
    assert not outline(np.ones((4, 4))).any()  # the picture's border is no edge
    drawn = draw_outline(np.full((7, 7, 3), 99, np.uint8), mask, 1)
    assert (drawn[1, 1] == 255).all() and (drawn[2, 2] == 0).all() and (drawn[3, 3] == 99).all()


def test_grid_holds_the_enlarged_pictures():
    rng = np.random.default_rng(0)
    source, edited = rng.random((2, 3, 8, 8, 3))
    masks = np.zeros((3, 8, 8))
    masks[:, 2:6, 2:6] = 1
    grid = sample_grid(
        [("Source", source), ("Edited", edited)],
        masks=masks,
        instructions=["make it red", "a long sentence " * 20, ""],
        notes=[None, ["judge 0.71", "judge 0.10", "no edit"]],
        scale=10,
    )
    assert grid.dtype == np.uint8 and grid.ndim == 3 and grid.shape[2] == 3
    assert grid.shape[1] == 2 * 14 + 80 + 8 + 80
    pixel = np.rint(edited[0, 0, 0] * 255).astype(np.uint8)
    block = np.all(grid == pixel, axis=2)
    assert block.sum() >= 100  # one pixel of the picture, ten times ten
    assert png_bytes(grid)[:8] == b"\x89PNG\r\n\x1a\n"


def test_grid_enlarges_tiny_pictures_by_itself():
    assert sample_grid([("a", np.zeros((1, 48, 48, 3)))]).shape[1] == 2 * 14 + 48 * 4
    assert sample_grid([("a", np.zeros((1, 512, 300, 3)))]).shape[1] == 2 * 14 + 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": []}, "no columns"),
        ({"columns": [("a", np.zeros((2, 4, 4, 3))), ("b", np.zeros((1, 4, 4, 3)))]}, "column 'b'"),
        ({"columns": [("a", np.zeros((2, 4, 4, 3)))], "masks": np.zeros((1, 4, 4))}, "masks"),
        ({"columns": [("a", np.zeros((2, 4, 4, 3)))], "instructions": ["x"]}, "1 instructions; expected 2"),
        ({"columns": [("a", np.zeros((2, 4, 4, 3)))], "notes": [None, None]}, "notes for 2 columns"),
    ],
)
def test_grid_names_what_does_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        sample_grid(**arguments)


def test_matching_and_series():
    names = ["reward/judge", "eval/judge", "judge", "seconds/train"]
    assert matching(names, "judge") == ["reward/judge", "eval/judge", "judge"]
    assert matching(names, "seconds/*") == ["seconds/train"]
    steps, values = series([{"step": 1, "a": 2.0}, {"step": 2, "a": float("nan")}, {"step": 3}], "a")
    assert steps.tolist() == [1] and values.tolist() == [2.0]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_curves(theme):
    metrics = [{"step": s, "reward/total": s / 40, "loss": 1.0, "seconds/train": 2.0} for s in range(40)]
    metrics[3]["loss"] = float("inf")
    three = curves(metrics, theme=theme)
    one = curves(metrics[:1], theme=theme, panels=[("Loss", ["loss"])])
    assert three is not None and one is not None and size_of(three)[0] > 2 * size_of(one)[0]


def test_no_curves_without_metrics():
    assert curves([]) is None
    assert curves([{"step": 1, "something": 1.0}]) is None
    assert curves([{"step": 1, "loss": float("nan")}]) is None
