"""Whole runs on photographs, with the fake model: accounting, resuming, faults, job arrays, choosing again."""

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
from cocoedit_jax.annotation import store as store_module
from cocoedit_jax.annotation.fake import FakeModel
from cocoedit_jax.annotation.gather import check_sum
from cocoedit_jax.annotation.record import Item, read_annotations
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


@pytest.mark.parametrize("fault", ["lost", "twice", "other"])
def test_a_sum_that_does_not_come_out_is_an_error(done, tmp_path, fault):
    folder = shutil.copytree(done[0], tmp_path / "out")
    path = folder / "rejected.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = {"lost": rows[1:], "twice": [rows[0], *rows], "other": [rows[1], *rows[1:]]}[fault]
    check_sum(Store.open(folder))
    path.write_text("".join(changed), encoding="utf-8")
    said = f"12 in, {12 + len(changed) - len(rows)} out; lost "
    with pytest.raises(RuntimeError, match=said):
        check_sum(Store.open(folder))


def test_who_comes_second_leaves_the_work_of_the_first(done, photos, tmp_path):
    """Two processes lay out the same folder: one may be past a shard before the other has written the manifest."""
    folder = shutil.copytree(done[0] / "shards", tmp_path / "out/shards").parent
    before = (folder / "shards/000001.jsonl").read_bytes()
    store = Store.open(folder)
    (folder / "shards/manifest.json").unlink()
    again = Store.create(folder, run.find_items(str(photos), None), store.manifest["plan"], store.size)
    assert again.total == store.total and (folder / "shards/000001.jsonl").read_bytes() == before


class Killed(BaseException):
    pass


def laid_out(root, count, monkeypatch, dies_at=None, size=2):
    """`count` items and the folder for them, laid out until `dies_at` is written."""
    items = [Item(f"i{n}", f"/in/{n}.png", "p") for n in range(count)]
    whole = store_module.write_whole

    def write(path, data, **options):
        if path.name == dies_at:
            raise Killed
        whole(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_whole", write)
        return items, Store.create(root, items, {}, size)


@pytest.mark.parametrize("dies_at", ["000000.jsonl", "000002.jsonl", "manifest.json"])
def test_killed_while_the_work_is_laid_out(tmp_path, monkeypatch, dies_at):
    """Shards of one input and shards of another would lose records and hold others twice."""
    with pytest.raises(Killed):
        laid_out(tmp_path, 6, monkeypatch, dies_at)
    with pytest.raises(UserError, match="another input .6 records, this one has 7(?s:.*)delete that folder"):
        laid_out(tmp_path, 7, monkeypatch)
    with pytest.raises(UserError, match="shards of 2 records, not 3(?s:.*)delete that folder"):
        laid_out(tmp_path, 6, monkeypatch, size=3)
    items, store = laid_out(tmp_path, 6, monkeypatch)
    assert [a.item for n in range(store.count) for a in store.read(n)] == items
    (tmp_path / "shards/layout.json").unlink()
    (tmp_path / "shards/manifest.json").unlink()
    with pytest.raises(UserError, match="holds shards, but no layout.json"):
        laid_out(tmp_path, 6, monkeypatch)


def test_of_two_inputs_at_once_one_is_refused(tmp_path, monkeypatch):
    """Another process writes its manifest first."""
    whole = store_module.write_whole

    def overtaken(path, data, **options):
        if path.name == "manifest.json":
            whole(path, json.dumps(json.loads(data) | {"input": "other"}).encode())
        whole(path, data, **options)

    monkeypatch.setattr(store_module, "write_whole", overtaken)
    with pytest.raises(UserError, match="another input"):
        laid_out(tmp_path, 6, monkeypatch)


def test_shards_of_another_input_are_found_by_the_sum(done, tmp_path):
    """Shards and output agree: one record twice, another one lost."""
    folder = shutil.copytree(done[0], tmp_path / "out")
    store = Store.open(folder)
    first, second = store.read(0)
    store.write(0, [first, replace(second, item=replace(second.item, id=second.item.id + "x"))])
    for name in ("metadata.jsonl", "rejected.jsonl", "dead.jsonl"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(f'"{second.item.id}"', f'"{second.item.id}x"'), encoding="utf-8")
    with pytest.raises(RuntimeError, match="other records than the input"):
        check_sum(store)


def test_killed_at_many_points(done, photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.annotation.kill_driver", str(photos), str(out)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    kills = int(ran.stdout.splitlines()[-1].removeprefix("killed ").partition(" times")[0])
    assert kills > 8, ran.stdout
    assert contents(out) == contents(done[0])
    assert not list(out.rglob("*.tmp"))


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


def test_other_work_in_a_folder_is_refused(done, settings, photos, tmp_path, monkeypatch):
    folder, outcome = done
    other = replace(settings, mask=replace(settings.mask, fill_holes=False))
    with pytest.raises(UserError, match="mask.fill_holes: True, now False"):
        run.annotate(other, folder)
    with pytest.raises(UserError, match="another input"):
        run.annotate(settings, folder, source=str(photos), prompt="make it blue")
    with pytest.raises(UserError, match="give --input="):
        run.annotate(settings, tmp_path / "new")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").touch()
    with pytest.raises(UserError, match="holds thesis.tex, but no annotation"):
        run.annotate(settings, tmp_path / "foreign", source=str(photos))
    # What is finished is gathered again; no model is asked.
    monkeypatch.setattr(engine, "make_model", None)
    before = contents(folder)
    assert run.annotate(settings, folder, source=str(photos)) == outcome and contents(folder) == before
    shard = folder / "shards/000001.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(UserError, match="000001.jsonl: 1 records, expected 2"):
        run.annotate(settings, folder)
    shard.write_bytes(whole)


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
