"""Whole runs on photographs, with the fake model: accounting, resuming, faults, job arrays."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation import engine, run
from cocoedit_jax.annotation.fake import FakeModel
from cocoedit_jax.annotation.record import read_annotations
from cocoedit_jax.annotation.settings import check
from cocoedit_jax.annotation.store import Store, file_stem, parse_range
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import read_records, source_key
from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatReply, Failure
from configs.annotate import get_config
from tests.annotation.helpers import contents, finish, lines

ROOT = Path(__file__).resolve().parents[2]


def test_everything_goes_somewhere(done, photos):
    folder, outcome = done
    assert outcome.kept + outcome.rejected + outcome.dead == 12
    assert outcome.by_reason["dead: unreadable_image"] == 1 and outcome.by_reason["rejected: global_edit"] == 2
    assert outcome.kept >= 5
    given = [json.loads(line)["prompt"] for line in (photos / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in lines(folder / "scores.jsonl")] == given, "in the order of the input"
    for row in lines(folder / "metadata.jsonl"):
        keep = np.asarray(Image.open(folder / row["mask"]))
        assert set(np.unique(keep)) == {0, 255} and row["mask_semantics"] == "keep"
        assert row["mask_area"] == pytest.approx((keep == 0).mean())
        x0, y0, x1, y1 = row["box"]
        assert keep[round((y0 + y1) / 2), round((x0 + x1) / 2)] == 0, "black, to be edited, inside the box"
        assert row["prompt"].startswith(row["original_prompt"]) and "(" in row["prompt"]
        assert (folder / row["image"]).read_bytes() == Path(row["original_image"]).read_bytes()
        assert row["licence"] == "CC0" and row["annotated_by"] == "fake" and min(row["scores"].values()) >= 0.5
    assert len(read_records(folder, Framing(64)).records) == outcome.kept
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert f"12 in = {outcome.kept} kept + {outcome.rejected} rejected + 1 dead." in report
    manifest = json.loads((folder / "shards/manifest.json").read_text())
    assert (manifest["kept"], manifest["records"], len(manifest["shards"])) == (outcome.kept, 12, 6)


def test_killed_at_many_points(done, photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.annotation.kill_driver", str(photos), str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    kills = int(ran.stdout.splitlines()[-1].removeprefix("killed ").partition(" times")[0])
    assert kills > 8, ran.stdout
    assert contents(out) == contents(done[0])
    assert not list(out.rglob("*.tmp"))


def test_repeats_leave_the_best(settings, photos, tmp_path):
    """The same picture as another file, once with the same instruction, once with another."""
    folder = tmp_path / "in"
    folder.mkdir()
    with Image.open(photos / "coffee.jpg") as picture:
        picture.save(folder / "a.png")
        picture.resize((picture.width // 2, picture.height // 2)).save(folder / "b.jpg", quality=90)
    with Image.open(photos / "chelsea.jpg") as picture:
        picture.save(folder / "c.jpg")
    for name, text in (("a", "make it red"), ("b", "Make it red.\nmake it blue"), ("c", "make it red")):
        (folder / f"{name}.txt").write_text(text)
    low = replace(settings, filter=replace(settings.filter, min_mask_accuracy=0.0, min_clarity=0.0))
    outcome = finish(low, tmp_path / "out", source=str(folder))
    assert outcome.kept == 3 and outcome.by_reason == {"rejected: duplicate": 1}
    rows = lines(tmp_path / "out/scores.jsonl")
    pair = [row for row in rows if Path(row["image"]).stem in "ab" and row["prompt"].lower().startswith("make it red")]
    total = [sum(row["scores"].values()) for row in pair]
    assert [row["status"] for row in pair] == [
        "kept" if value == max(total) else "rejected" for value in total
    ] and total[0] != total[1]
    kept = lines(tmp_path / "out/metadata.jsonl")
    groups = [row.get("source_group") for row in kept]
    assert len(set(groups)) == 2 and groups.count(None) == 1
    sources = [source_key(record) for record in read_records(tmp_path / "out", Framing(64)).records]
    assert len(set(sources)) == 2, "what looks the same stays on one side of training's split"
    # How near is near is a setting.
    strict = replace(low, filter=replace(low.filter, near_colour=0.0))
    assert finish(strict, tmp_path / "out", refilter=True).kept == 4
    with pytest.raises(UserError, match="near_bits=17; expected a whole number from 0 to 16"):
        wide = get_config()
        wide.filter.near_bits = 17
        check(wide.to_dict())
    # Equal files only: these are not.
    exact = replace(low, filter=replace(low.filter, duplicates="exact"))
    assert finish(exact, tmp_path / "out", refilter=True).kept == 4


def test_how_near_is_near_is_a_setting(settings, photos, tmp_path):
    """A copy that was cut at two sides has 9 other bits of 64; another photo of the same instruction is never near."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        shutil.copy(photos / f"{name}.jpg", folder)
    with Image.open(photos / "chelsea.jpg") as picture:
        cut = (picture.width // 32, picture.height // 32, picture.width, picture.height)
        picture.crop(cut).save(folder / "cut.jpg", quality=90)
    low = replace(settings, filter=replace(settings.filter, min_mask_accuracy=0.0, min_clarity=0.0))
    assert finish(low, out, source=str(folder), prompt="make it red").kept == 3
    for bits, duplicates in ((16, 1), (8, 0), (0, 0)):
        near = replace(low, filter=replace(low.filter, near_bits=bits))
        assert finish(near, out, refilter=True).by_reason == ({"rejected: duplicate": 1} if duplicates else {}), bits
        left = {Path(row["original_image"]).stem for row in lines(out / "metadata.jsonl")}
        assert "coffee" in left and len(left) == 3 - duplicates


def test_lines_that_repeat_are_duplicates(settings, photos, tmp_path):
    """Without an id of their own, they are no reason to refuse the whole input."""
    folder = tmp_path / "in"
    folder.mkdir()
    os.link(photos / "coffee.jpg", folder / "a.jpg")
    line = json.dumps({"image": "a.jpg", "prompt": "make it red"}) + "\n"
    (folder / "prompts.jsonl").write_text(line * 3)
    low = replace(settings, filter=replace(settings.filter, min_mask_accuracy=0.0, min_clarity=0.0))
    outcome = finish(low, tmp_path / "out", source=str(folder))
    assert outcome.kept == 1 and outcome.by_reason == {"rejected: duplicate": 2}
    (folder / "prompts.jsonl").write_text(line.replace("{", '{"id": "mine", ') * 2)
    with pytest.raises(UserError, match="line 2: id 'mine' was used on line 1"):
        run.annotate(low, tmp_path / "other", source=str(folder))


def test_output_inside_of_what_is_searched_for_pictures(settings, photos, tmp_path):
    for name in ("coffee.jpg", "prompts.jsonl"):
        shutil.copy(photos / name, tmp_path)
    with pytest.raises(UserError, match="lies in --input"):
        run.annotate(settings, tmp_path / "out", source=str(tmp_path), prompt="make it red")
    run.annotate(settings, tmp_path / "out", source=str(tmp_path), emit_batch="classify")  # a list, nothing searched
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match="lies in --input"):
        run.annotate(settings, tmp_path / "out", source=str(tmp_path))


def test_job_arrays(done, settings, photos, tmp_path, capsys):
    out = tmp_path / "out"
    for part in ("2/3", "0/3"):
        assert run.annotate(settings, out, source=str(photos), part=part) is None
    assert "4 for load" in capsys.readouterr().out and not (out / "metadata.jsonl").exists()
    assert run.annotate(settings, out, part="1/3") == done[1], "the last one gathers"
    assert contents(out) == contents(done[0])
    store = Store.open(out)
    for n in (1, 3, 4, 7, 100):
        assert [x for i in range(n) for x in store.numbers((i, n))] == list(range(6))
    for text in ("3/3", "1", "-1/2", "a/b", "1/0"):
        with pytest.raises(UserError, match="--shard="):
            parse_range(text)


class Flaky(FakeModel):
    """Fails requests that `fails` names: with the deadline, or as refused."""

    fails = staticmethod(lambda request_id: None)
    asked: list = []

    def complete_all(self, requests, deadline_s=None):
        replies = super().complete_all(requests, deadline_s)
        self.asked.extend(request.request_id for request in requests)
        out = []
        for reply in replies:
            reason = type(self).fails(reply.request_id)
            failure = reason and Failure(reason, "as told", fatal=reason in ("bad_request", "unauthorized"))
            out.append(ChatReply(reply.request_id, failure=failure) if failure else reply)
        return out


@pytest.fixture
def flaky(monkeypatch):
    class Mine(Flaky):
        asked = []

    monkeypatch.setattr(engine, "FakeModel", Mine)
    return Mine


def test_servers_that_fail_stop_the_run_and_lose_nothing(done, settings, photos, tmp_path, flaky):
    out = tmp_path / "out"
    unlucky = lambda name: name.startswith("rewrite") and int(name[-4:], 16) % 2  # noqa: E731
    flaky.fails = lambda name: "deadline" if unlucky(name) else None
    with pytest.raises(UserError, match=r"rewrite: \d of \d records got no answer, more than .*max_unanswered=0.02"):
        run.annotate(settings, out, source=str(photos))
    assert not (out / "metadata.jsonl").exists()
    first = set(flaky.asked)
    flaky.asked.clear()
    flaky.fails = lambda name: None
    assert run.annotate(settings, out) == done[1]
    assert contents(out) == contents(done[0])
    again = {name for name in flaky.asked if name in first and "probe" not in name}
    assert again == {name for name in first if "probe" not in name and unlucky(name)} != set()


def test_what_fails_again_when_the_others_were_answered_is_a_share_of_all(done, settings, photos, tmp_path, flaky):
    out = tmp_path / "out"
    patient = replace(settings, models=replace(settings.models, max_unanswered=0.12))  # 1 of 9
    names = [file_stem(row["id"]) for row in lines(done[0] / "metadata.jsonl")]
    asked = [f"rewrite|rewrite|{name}" for name in names[:2]]
    flaky.fails = lambda name: "deadline" if name in asked else None
    with pytest.raises(UserError, match="rewrite: 2 of .* records got no answer"):
        run.annotate(patient, out, source=str(photos))
    del asked[1]  # the other one is answered now
    outcome = finish(patient, out)
    assert outcome.by_reason["dead: no_reply"] == 1 and outcome.kept == done[1].kept - 1
    asked[:] = [f"score|clarity|{name}" for name in names[1:3]]  # another stage counts its own
    with pytest.raises(UserError, match="score: 2 of .* records got no answer"):
        run.annotate(patient, tmp_path / "other", source=str(photos))


def test_few_failures_become_dead_letters(done, settings, photos, tmp_path, flaky):
    out = tmp_path / "out"
    patient = replace(settings, models=replace(settings.models, max_unanswered=0.25))
    names = [row["id"] for row in lines(done[0] / "metadata.jsonl")]
    lost, refused = (file_stem(name) for name in names[:2])
    cases = {f"box|box|{lost}": "deadline", f"score|clarity|{refused}": "bad_request"}
    flaky.fails = cases.get
    outcome = finish(patient, out, source=str(photos))
    assert outcome.by_reason["dead: no_reply"] == outcome.by_reason["dead: refused_request"] == 1
    assert outcome.dead == done[1].dead + 2 and outcome.kept == done[1].kept - 2
    assert {a.detail for a in read_annotations(out / "dead.jsonl")} >= {"deadline: as told", "bad_request: as told"}
    flaky.fails = lambda name: None
    flaky.asked.clear()
    assert run.annotate(patient, out, retry_dead=True) == done[1]
    assert not [name for name in flaky.asked if lost not in name and refused not in name and "probe" not in name]
    assert contents(out) == contents(done[0])


def test_the_sampled_digit_alone_is_no_answer(done, settings, photos, tmp_path, flaky, monkeypatch):
    """As vLLM sends it while a training run's judge asks the same server: asked again, not scored and not buried."""
    out, whole = tmp_path / "out", FakeModel._digit
    lost = file_stem(lines(done[0] / "metadata.jsonl")[0]["id"])

    def cut(name, *rest):
        reply = whole(name, *rest)
        if name != f"score|clarity|{lost}" or reply.logprobs is None:
            return reply
        return replace(reply, logprobs=((reply.logprobs[0][0],),))

    monkeypatch.setattr(flaky, "_digit", staticmethod(cut))
    with pytest.raises(UserError, match=r"score: 1 of \d records got no answer.*few_candidates: .*server of its own"):
        run.annotate(settings, out, source=str(photos))
    monkeypatch.setattr(flaky, "_digit", staticmethod(whole))
    flaky.asked.clear()
    assert run.annotate(settings, out) == done[1] and contents(out) == contents(done[0])
    assert f"score|clarity|{lost}" in flaky.asked


def test_a_server_that_cannot_be_used_is_found_first(settings, photos, tmp_path, flaky, monkeypatch):
    flaky.fails = lambda name: "unauthorized"
    with pytest.raises(UserError, match="fake cannot be asked: unauthorized"):
        run.annotate(settings, tmp_path / "out", source=str(photos))
    flaky.fails = lambda name: None
    monkeypatch.setattr(flaky, "_digit", staticmethod(lambda name, *rest: ChatReply(name, "4")))
    with pytest.raises(UserError, match="sends no log-probabilities"):
        run.annotate(settings, tmp_path / "out", source=str(photos))
    wrong = replace(settings, box=replace(settings.box, convention="relative-1000"))
    with pytest.raises(UserError, match="fits 'pixels'"):
        monkeypatch.undo()
        run.annotate(wrong, tmp_path / "out", source=str(photos))
    unmade = replace(settings, mask=replace(settings.mask, segmenter="sam2", options={}))
    with pytest.raises(UserError, match="checkpoint '' is no file"):
        run.annotate(unmade, tmp_path / "out", source=str(photos))
    assert not (tmp_path / "out").exists()


def test_the_command(photos, tmp_path):
    """A newcomer's first run: a folder of photographs, nothing else."""
    out = tmp_path / "out"
    (tmp_path / "photos").mkdir()
    for name in ("coffee.jpg", "chelsea.jpg"):
        os.link(photos / name, tmp_path / "photos" / name)

    def command(*arguments, module="annotate"):
        line = [sys.executable, "-m", f"launch.{module}", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)

    ran = command(f"--input={tmp_path / 'photos'}", "--prompt=make it red", f"--output={out}", "--fake")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("2 in = 2 kept + 0 rejected + 0 dead\n")
    for stage in ("load", "classify", "box", "mask", "rewrite", "score"):
        assert re.search(rf"{stage}: 2/2 \[00:\d\d gone, 00:00 left", ran.stderr), ran.stderr
    checked = command(f"--check={out}", "--resolution=128", module="prepare_data")
    assert checked.returncode == 0 and "all 2 records are usable" in checked.stdout
    ran = command(f"--output={out}", "--refilter", "--emit_batch=box")
    assert ran.returncode == 1 and ran.stderr == "error: --refilter, --emit_batch and --accept_batch: one at a time\n"
