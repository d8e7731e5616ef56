"""Requests of edits: JSONL lines, pictures that cannot be read, results that cannot be written."""

import json

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.inference.requests import EditRequest, check_pictures, open_picture, read_requests


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_batch(tmp_path):
    rows = [
        {"image": "a.png", "prompt": "make it red"},
        "",
        {"image": "b.png", "prompt": "x", "out": "c.png", "seed": 3},
    ]
    first, second = read_requests(write(tmp_path / "batch.jsonl", rows), tmp_path / "out", seed=7)
    assert first == EditRequest((tmp_path / "a.png",), "make it red", tmp_path / "out" / "000001.png", 7)
    assert second == EditRequest((tmp_path / "b.png",), "x", tmp_path / "out" / "c.png", 3)


def test_all_faulty_lines_are_named(tmp_path):
    rows = [
        "{", "[]", {"image": "a.png"}, {"image": "a.png", "prompt": "x", "seed": True}, {"image": 1, "prompt": "x"},
        {"image": "a.png", "prompt": "x", "out": "../up.png"}, {"image": "a.png", "prompt": "x", "strength": 1},
        {"image": "a.png", "prompt": "x", "out": "same.png"}, {"image": "a.png", "prompt": "x", "out": "same.png"},
    ]  # fmt: skip
    with pytest.raises(UserError) as error:
        read_requests(write(tmp_path / "batch.jsonl", rows), tmp_path / "out", 0)
    message = str(error.value)
    for line in range(1, 8):
        assert f"line {line}: " in message
    assert "strength" in message and "more than one line" in message and "8 fault(s)" in message
    with pytest.raises(UserError, match="holds no line"):
        read_requests(write(tmp_path / "empty.jsonl", [""]), tmp_path, 0)
    with pytest.raises(UserError, match="no such file"):
        read_requests(tmp_path / "absent.jsonl", tmp_path, 0)


def test_pictures_are_checked_before_anything_runs(tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = EditRequest((tmp_path / "good.png",), "x", tmp_path / "out.png")
    assert check_pictures([good]) == [((20, 30),)]
    others = [
        EditRequest((tmp_path / "bad.png",), "x", tmp_path / "o.png"),
        EditRequest((tmp_path / "absent.png",), "x", tmp_path / "o.png"),
        EditRequest((tmp_path / "good.png",), "x", tmp_path / "o.docx"),
    ]
    with pytest.raises(UserError, match="3 picture.*\n.*bad.png.*\n.*absent.png.*\n.*o.docx"):
        check_pictures([good, *others])


def test_results_that_cannot_be_written_are_named_before_anything_runs(tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    outs = ["good.png/out.png", "good.png/deep/out.png", "folder.png", "new/deep/out.png"]
    with pytest.raises(UserError) as error:
        check_pictures([EditRequest((tmp_path / "good.png",), "x", tmp_path / out) for out in outs])
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert [line.split(": ")[0] for line in lines] == [
        str(tmp_path / name) for name in ("good.png", "good.png/deep", "folder.png")
    ]
    assert "no folder that can be written to" in lines[0] and "expected the name of a file" in lines[2]
    check_pictures([EditRequest((tmp_path / "good.png",), "x", tmp_path / outs[-1])])
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 30)
