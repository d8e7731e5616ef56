"""What --check prints."""

import json

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data.check import check_folder
from cocoedit_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / f"{number}.png")
    Image.open(tmp_path / "0.png").save(tmp_path / "0.bmp")  # the same pixels in another file
    for name, rows in (("half", 20), ("most", 32), ("all", 40)):
        mask = np.full((40, 40), 255, np.uint8)
        mask[:rows] = 0
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    dot = np.full((40, 40), 255, np.uint8)
    dot[20:22, 20:22] = 0
    Image.fromarray(dot).save(tmp_path / "dot.png")
    return tmp_path


def write(folder, *rows):
    base = {"prompt": "p", "image": "0.png", "mask": "half.png"}
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(base | {"id": n} | row) + "\n" for n, row in enumerate(rows))
    )


def test_problems_notes_and_counts(folder):
    write(
        folder,
        {"edit_type": "add"},
        {"image": "1.png", "mask": "dot.png", "edit_type": "add"},
        {"image": "gone.png"},
        {"image": "2.png", "mask": "most.png"},
        {"mask": "all.png"},
        {"prompt": " P. "},
        {"image": "0.bmp"},
    )
    with pytest.raises(UserError) as caught:
        check_folder(folder, 40)
    head, problems, notes, types, sizes = str(caught.value).split("\n\n")
    assert head == f"{folder}/metadata.jsonl: 2 of 7 records cannot be used"
    assert problems.splitlines() == [
        "2 problems: 1 x missing file, 1 x degenerate mask",
        "     line  problem          what",
        f"        3  missing file     image {folder}/gone.png does not exist",
        "        5  degenerate mask  mask 'all.png': every pixel may change (white = keep; after the crop to 40x40 px)",
    ]
    assert notes.splitlines() == [
        "3 notes: 1 x small region, 1 x large region, 1 x duplicate",
        "     line  note          what",
        "        2  small region  0.25 % of the picture may change",
        "        4  large region  80 % of the picture may change; is the mask white where to keep?",
        "        6  duplicate     image and instruction of line 1",
    ]
    assert types.splitlines() == [
        "  edit type  records  pictures  region (median)",
        "  (none)           3         3           50.0 %",
        "  add              2         2           25.1 %",
        "  all              5         4           50.0 %",
    ]
    assert sizes == "  40x40 px: 5 records"
    with pytest.raises(UserError, match="        7  near duplicate  looks as the image and instruction of line 1"):
        check_folder(folder, 40, near=4)


def test_rows(folder):
    write(folder, *[{"image": "gone.png"} for _ in range(5)])
    with pytest.raises(UserError) as caught:
        check_folder(folder, 40, rows=2)
    text = str(caught.value)
    assert text.count("missing file ") == 2 and "... and 3 more (--rows=0 lists all)" in text
    assert "5 of 5 records cannot be used" in text and "edit type" not in text
    with pytest.raises(UserError) as caught:
        check_folder(folder, 40, rows=0)
    assert str(caught.value).count("missing file ") == 5


def test_a_good_folder(folder):
    write(folder, {}, {"image": "1.png"})
    text = check_folder(folder, 48, "buckets")
    assert "all 2 records are usable" in text and "problem" not in text and "note" not in text
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="empty file"):
        check_folder(folder, 40)
