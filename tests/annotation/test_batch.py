"""All model stages by batch files, answered as vllm run-batch does."""

import json
import math
from dataclasses import replace

import pytest

from cocoedit_jax.annotation import run
from cocoedit_jax.annotation.store import Store
from cocoedit_jax.errors import UserError
from tests.annotation import helpers
from tests.annotation.helpers import answer, contents


def failed(line, status=None, body=None):
    """As vllm run-batch tells of a request that failed: the message beside the response, which has no body."""
    response = None if status is None else {"status_code": status, "request_id": "r", "body": body}
    return {"id": "vllm-1", "custom_id": line["custom_id"], "response": response, "error": {"message": "too long"}}


def requests_of(folder, stage):
    files = sorted((folder / "batches").glob(f"{stage}-*.jsonl"))
    return files, [json.loads(line) for file in files for line in file.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_stage(done, settings, photos, tmp_path):
    out = tmp_path / "out"
    outcome = None
    for stage in ("classify", "box", "rewrite", "score"):
        source = str(photos) if stage == "classify" else None
        assert run.annotate(settings, out, source=source, emit_batch=stage) is None
        files, asked = requests_of(out, stage)
        assert len({line["custom_id"] for line in asked}) == len(asked)
        assert {line["url"] for line in asked} == {"/v1/chat/completions"}
        assert all(line["body"]["model"] == "fake" and math.isclose(line["body"]["temperature"], 0) for line in asked)
        # Records whose kind of edit is known are not asked for it; the test picture travels with the boxes.
        assert len(asked) == {"classify": 7, "box": 9 + 1, "rewrite": 9, "score": 27}[stage]
        if stage == "score":  # one reply is lost: its record waits, the others go on
            replies = [answer(line) for line in asked]
            missing = write(tmp_path / "missing.jsonl", replies[1:])
            assert run.annotate(settings, out, accept_batch=[missing]) is None
            run.annotate(settings, out, emit_batch=stage)
            assert len(requests_of(out, stage)[1]) == 3
        reply = write(tmp_path / f"{stage}.jsonl", [answer(line) for line in requests_of(out, stage)[1]])
        outcome = run.annotate(settings, out, accept_batch=[reply])
    assert outcome == done[1] and contents(out) == contents(done[0])
    assert run.annotate(settings, out, accept_batch=[reply]) == outcome, "twice the same replies"


def test_failed_and_foreign_replies(settings, photos, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--emit_batch=box: 11 records wait for classify; that comes first"):
        run.annotate(settings, out, source=str(photos), emit_batch="box")
    run.annotate(settings, out, emit_batch="classify")
    _, asked = requests_of(out, "classify")
    rows = [failed(asked[0]), failed(asked[1], 503), failed(asked[2], 400)] + [answer(line) for line in asked[3:]]
    run.annotate(settings, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
    assert "4 records taken on, 3 without a usable reply" in capsys.readouterr().out
    waiting = [a for n in range(6) for a in Store.open(out).read(n) if a.stage == "load" and a.status == "pending"]
    assert [a.reason for a in waiting] == ["no_reply", "no_reply", "refused_request"]
    assert "too long" in waiting[0].detail and waiting[2].detail == "bad_request: status 400, too long"
    for rows, message in (
        (asked, "file of requests"),
        ([{**answer(asked[0]), "custom_id": "mine"}], "none of --emit_batch"),
        ([{**answer(asked[0]), "response": {"status_code": "OK"}}], "status_code 'OK', expected a number"),
        ([{**answer(asked[0]), "custom_id": asked[0]["custom_id"][:-8] + "00000000"}], "other settings"),
        ([], "expected those of one stage"),
    ):
        with pytest.raises(UserError, match=message):
            run.annotate(settings, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
    (tmp_path / "cut.jsonl").write_text(json.dumps(answer(asked[0]))[:50])
    with pytest.raises(UserError, match="cut.jsonl line 1: no JSON"):
        run.annotate(settings, out, accept_batch=[str(tmp_path / "cut.jsonl")])


def classified(settings, photos, out):
    run.annotate(settings, out, source=str(photos), emit_batch="classify")
    replies = write(out.parent / "c.jsonl", [answer(line) for line in requests_of(out, "classify")[1]])
    run.annotate(settings, out, accept_batch=[replies])


def test_a_request_that_is_always_refused_does_not_hold_up_the_others(settings, photos, tmp_path, capsys):
    out = tmp_path / "out"
    patient = replace(settings, models=replace(settings.models, max_unanswered=0.2))
    classified(patient, photos, out)
    outcome = None
    for stage in ("box", "rewrite", "score"):
        run.annotate(patient, out, emit_batch=stage)
        asked = requests_of(out, stage)[1]
        rows = [answer(line) for line in asked]
        if stage == "box":
            openai = {"error": {"message": "too many pixels", "param": "messages"}}
            rows[-1] = failed(asked[-1], 400, openai)
        outcome = run.annotate(patient, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
    assert outcome is not None and outcome.by_reason["dead: refused_request"] == 1
    (dead,) = [row for row in helpers.lines(out / "dead.jsonl") if row["reason"] == "refused_request"]
    assert dead["detail"] == "bad_request: status 400, field 'messages': too many pixels"
    assert "9 records taken on, 0 without" in capsys.readouterr().out


def test_an_answer_that_was_cut_off_is_a_dead_letter(settings, photos, tmp_path):
    out = tmp_path / "out"
    classified(settings, photos, out)
    run.annotate(settings, out, emit_batch="box")
    rows = [answer(line) for line in requests_of(out, "box")[1]]
    rows[-1]["response"]["body"]["choices"][0]["finish_reason"] = "length"
    run.annotate(settings, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
    dead = [a for n in range(6) for a in Store.open(out).read(n) if a.reason == "unparsed_reply"]
    assert len(dead) == 1 and "cut off after config.box.max_tokens=512" in dead[0].detail


@pytest.mark.parametrize("kind", ["status 503", "garbled", "refused"])
def test_a_request_that_always_fails_does_not_hold_up_the_others(settings, photos, tmp_path, kind):
    """More fail than may be at first; the one that still does is all that is emitted in the end."""
    out = tmp_path / "out"
    patient = replace(settings, models=replace(settings.models, max_unanswered=0.12))  # 1 of 9
    fail = {
        "status 503": lambda line: failed(line, 503), "refused": lambda line: failed(line, 400),
        "garbled": lambda line: {**failed(line, 200, {"choices": []}), "error": None},
    }[kind]  # fmt: skip
    classified(patient, photos, out)
    accepted = lambda rows: run.annotate(patient, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])  # noqa: E731
    run.annotate(patient, out, emit_batch="box")
    probe, *asked = requests_of(out, "box")[1]
    assert "|probe|" in probe["custom_id"] and len(asked) == 9
    assert accepted([answer(probe), *map(fail, asked[:1])]) is None  # nothing was ever answered: the server's fault
    assert not [a for n in range(6) for a in Store.open(out).read(n) if a.status == "dead" and a.stage == "classify"]
    accepted([*map(fail, asked[:3]), *map(answer, asked[3:])])
    run.annotate(patient, out, emit_batch="box")
    again = requests_of(out, "box")[1][1:]
    assert [line["custom_id"] for line in again] == [line["custom_id"] for line in asked[:3]], "3 of 9 are too many"
    accepted(list(map(answer, again[1:])))
    run.annotate(patient, out, emit_batch="box")
    (last,) = requests_of(out, "box")[1][1:]
    for _ in range(2):  # the same file twice
        accepted([fail(last)])
        (dead,) = [a for n in range(6) for a in Store.open(out).read(n) if a.status == "dead" and a.stage == "classify"]
        assert dead.reason == ("refused_request" if kind == "refused" else "no_reply") and dead.detail
    outcome = None
    for stage in ("rewrite", "score"):
        run.annotate(patient, out, emit_batch=stage)
        rows = [answer(line) for line in requests_of(out, stage)[1]]
        if stage == "rewrite":  # what was buried before, in another stage, is not counted here
            rows[0] = fail(requests_of(out, stage)[1][0])
            assert accepted(rows) is None
            run.annotate(patient, out, emit_batch=stage)
            assert len(requests_of(out, stage)[1]) == 1, "1 of 8"
            rows = [answer(line) for line in requests_of(out, stage)[1]]
        outcome = accepted(rows)
    assert outcome is not None and outcome.dead == 2 and outcome.by_reason[f"dead: {dead.reason}"] == 1


def test_what_is_buried_is_counted_over_all_files(settings, photos, tmp_path):
    """Of a server that fails often, no file has too many."""
    out = tmp_path / "out"
    patient = replace(settings, models=replace(settings.models, max_unanswered=0.25))  # 2 of 9
    classified(patient, photos, out)
    run.annotate(patient, out, emit_batch="box")
    probe, *asked = requests_of(out, "box")[1]
    for start in (0, 3, 6):
        rows = [failed(asked[start], 503), *map(answer, asked[start + 1 : start + 3])]
        run.annotate(patient, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
    run.annotate(patient, out, emit_batch="box")
    assert [line["custom_id"] for line in requests_of(out, "box")[1][1:]] == [asked[6]["custom_id"]]


def test_what_was_left_out_is_not_buried_with_what_was_refused(settings, photos, tmp_path):
    """Two records of one shard: one is refused as it is, the other one's reply is not there yet."""
    out = tmp_path / "out"
    patient = replace(settings, models=replace(settings.models, max_unanswered=0.2))
    classified(patient, photos, out)
    run.annotate(patient, out, emit_batch="box")
    *others, missing, refused, last = requests_of(out, "box")[1]
    rows = [*map(answer, others), failed(refused, 400), answer(last)]
    assert run.annotate(patient, out, accept_batch=[write(tmp_path / "r.jsonl", rows)]) is None
    shard = Store.open(out).read(4)
    assert [(a.status, a.reason) for a in shard] == [("pending", "no_reply"), ("dead", "refused_request")]
    run.annotate(patient, out, emit_batch="box")
    again = [line["custom_id"] for line in requests_of(out, "box")[1] if "|probe|" not in line["custom_id"]]
    assert again == [missing["custom_id"]]


def test_replies_beside_the_requests_are_left_alone(settings, photos, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        run.annotate(settings, out, source=str(photos), emit_batch="classify")
        (out / "batches/classify-000000-00001.jsonl").touch()  # of an earlier time, when there were more
        (out / "batches/classify-000000-00000-replies.jsonl").write_text("paid for")
    assert run.annotate(settings, out, emit_batch="classify") is None
    left = sorted(path.name for path in (out / "batches").iterdir())
    assert left == ["classify-000000-00000-replies.jsonl", "classify-000000-00000.jsonl"]


def test_files_have_a_size(settings, photos, tmp_path):
    out = tmp_path / "out"
    small = replace(settings, engine=replace(settings.engine, batch_mib=0.3))
    classified(small, photos, out)
    run.annotate(small, out, emit_batch="box")
    files, asked = requests_of(out, "box")
    assert len(asked) == 9 + 1 and len(files) > 1
    assert all(path.stat().st_size <= 0.3 * 2**20 or path.read_bytes().count(b"\n") == 1 for path in files)
    few = replace(settings, engine=replace(settings.engine, batch_requests=4))
    run.annotate(few, out, emit_batch="box")
    assert [len(path.read_bytes().splitlines()) for path in requests_of(out, "box")[0]] == [4, 4, 2]


def test_log_probabilities_are_missed_also_where_a_reply_failed(settings, photos, tmp_path):
    out = tmp_path / "out"
    classified(settings, photos, out)
    for stage in ("box", "rewrite", "score"):
        run.annotate(settings, out, emit_batch=stage)
        asked = requests_of(out, stage)[1]
        rows = [answer(line) for line in asked]
        if stage == "score":
            for row in rows:
                row["response"]["body"]["choices"][0]["logprobs"] = None
            rows[0] = failed(asked[0], 503)
            with pytest.raises(UserError, match="no log-probabilities"):
                run.annotate(settings, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
        else:
            run.annotate(settings, out, accept_batch=[write(tmp_path / "r.jsonl", rows)])
    assert all(a.status != "dead" or a.reason == "unreadable_image" for n in range(6) for a in Store.open(out).read(n))


def test_the_test_picture_comes_back_wrong(settings, photos, tmp_path):
    out = tmp_path / "out"
    classified(settings, photos, out)
    run.annotate(settings, out, emit_batch="box")
    _, asked = requests_of(out, "box")
    rows = [answer(line) for line in asked]
    probe = next(row for row in rows if "|probe|" in row["custom_id"])
    probe["response"]["body"]["choices"][0]["message"]["content"] = '[{"bbox_2d": [567, 550, 733, 800]}]'
    with pytest.raises(UserError, match="wrong as 'pixels'.*fits 'relative-1000'"):
        run.annotate(settings, out, accept_batch=[write(tmp_path / "b.jsonl", rows)])
