"""Choosing again among finished annotations: no model, the same instructions, no picture lost."""

import shutil
from dataclasses import replace

import pytest
from PIL import Image

from cocoedit_jax.annotation import engine, run
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import read_records
from tests.annotation.helpers import contents, finish, lines


def test_choosing_again_needs_no_model(done, settings, monkeypatch, tmp_path, photos):
    folder, outcome = done
    out = tmp_path / "out"
    before = finish(settings, out, source=str(photos))
    monkeypatch.setattr(engine, "make_model", None)
    scores = [row["scores"]["clarity"] for row in lines(out / "metadata.jsonl")]
    middle = sorted(scores)[len(scores) // 2]
    strict = replace(settings, filter=replace(settings.filter, min_clarity=middle))
    after = finish(strict, out, refilter=True)
    assert 0 < after.kept < before.kept and after.dead == before.dead
    assert after.kept == sum(score >= middle for score in scores)
    assert after.by_reason["rejected: clarity"] >= before.kept - after.kept, "it comes before other reasons"
    used = {row["image"] for row in lines(out / "metadata.jsonl")}
    assert {f"images/{path.name}" for path in (out / "images").iterdir()} == used
    assert run.annotate(settings, out, refilter=True) == before and contents(out) == contents(folder)


def test_choosing_again_publishes_what_was_scored(settings, photos, tmp_path):
    """Whatever is set now: the scores are those of the instruction that the run chose."""
    (tmp_path / "in").mkdir()
    shutil.copy(photos / "coffee.jpg", tmp_path / "in")
    for use, published in ((False, "make it red"), (True, "make it red (")):
        run_with, now = (replace(settings, rewrite=replace(settings.rewrite, use=on)) for on in (use, not use))
        out = tmp_path / f"out-{use}"
        finish(run_with, out, source=str(tmp_path / "in"), prompt="make it red")
        before = lines(out / "metadata.jsonl")
        assert finish(now, out, refilter=True).kept == 1
        assert lines(out / "metadata.jsonl") == before
        assert before[0]["prompt"].startswith(published) and ("(" in before[0]["prompt"]) == use


def test_originals_may_go_once_they_are_copied(settings, photos, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copy(photos / "coffee.jpg", folder)
    before = finish(settings, out, source=str(folder), prompt="make it red")
    shutil.rmtree(folder)
    assert before.kept == 1 and run.annotate(settings, out, refilter=True) == before
    assert len(read_records(out, Framing(64)).records) == 1


@pytest.mark.parametrize("original", ["there", "linked", "gone", "changed", "changed in place"])
def test_choosing_again_deletes_no_last_copy(settings, photos, tmp_path, original):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("coffee.jpg", "chelsea.jpg"):
        shutil.copy(photos / name, folder)
    images = "hardlink" if original == "linked" else "copy"
    settings = replace(settings, engine=replace(settings.engine, images=images))
    before = finish(settings, out, source=str(folder), prompt="make it red")
    published = contents(out)
    assert before.kept == 2
    if original == "gone":
        shutil.rmtree(folder)
    elif original == "changed":
        for path in folder.iterdir():
            Image.new("RGB", (400, 300)).save(path)
    elif original == "changed in place":  # as many bytes
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    strict = replace(settings, filter=replace(settings.filter, min_clarity=1.0))
    for rules in (strict, strict, settings):
        after = finish(rules, out, refilter=True)
        assert after.kept + after.rejected == 2
        used = {row["image"] for row in lines(out / "metadata.jsonl")}
        assert {f"images/{path.name}" for path in (out / "images").iterdir()} == used and len(used) == after.kept
        aside = len(list((out / "shards/images").iterdir())) if (out / "shards/images").exists() else 0
        assert aside == (0 if original in ("there", "linked") else 2 - after.kept)
    assert after == before and contents(out) == published


def test_a_picture_that_was_annotated_is_not_replaced_by_what_became_of_its_original(settings, photos, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copy(photos / "coffee.jpg", folder)
    finish(settings, out, source=str(folder), prompt="make it red")
    published = contents(out)
    Image.new("RGB", (400, 300)).save(folder / "coffee.jpg")
    finish(settings, out, refilter=True)
    assert contents(out) == published
