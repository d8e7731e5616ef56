"""The judge "vlm" against a real server that fails: every score equals the faultless one, and none is invented."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat_protocol import encode_image, parse_completion
from cocoedit_jax.rewards.judge import JudgeRequest, make_judge
from cocoedit_jax.rewards.judge_prompt import load_prompt
from cocoedit_jax.rewards.judge_score import digit_score
from cocoedit_jax.rewards.vlm_judge import VlmJudge
from tests.rewards.fake_judge import MODEL, TRANSIENT, FakeJudge, parts_of, true_score

ROOT = Path(__file__).resolve().parents[2]
REPLIES = Path(__file__).parent / "replies"


def requests(count: int = 12, size: int = 8, seed: int = 0, **fields) -> list[JudgeRequest]:
    """Edits of one group for every four."""
    rng = np.random.default_rng(seed)
    sources = rng.random((-(-count // 4), size, size, 3)).astype(np.float32)
    edited = rng.random((count, size, size, 3)).astype(np.float32)
    return [
        JudgeRequest(sources[n // 4], edited[n], f"do {n // 4}", f"r{seed}-{n // 4}", **fields) for n in range(count)
    ]


def judge(*urls: str, **options) -> VlmJudge:
    fast = {
        "timeout_s": 0.5, "connect_timeout_s": 0.5, "step_deadline_s": 8.0, "start_deadline_s": 1.5,
        "backoff_s": (0.01, 0.03), "breaker": (6, 0.05), "canary_margin": -1.0,
    }  # fmt: skip
    return VlmJudge(list(urls), **(fast | options))


def scores(answers) -> list[float | None]:
    return [answer.score for answer in answers]


@pytest.fixture
def server():
    with FakeJudge() as found:
        yield found


@pytest.fixture
def started(server):
    found = judge(server.url)
    found.start()
    server.bodies.clear()
    yield found
    found.close()


@pytest.fixture(scope="module")
def truth() -> list[float | None]:
    """The scores of ``requests()`` by a server without faults."""
    with FakeJudge() as server:
        j = judge(server.url)
        found = scores(j(requests()))
        j.close()
    prompt, expected = load_prompt("cocoedit"), []
    for r in requests():
        files = encode_image(r.source), encode_image(r.edited)
        text = prompt.ask("score", r.instruction, {})
        expected.append(true_score({"messages": prompt.messages(*files, text, "png")}))
    assert found == pytest.approx(expected, abs=1e-9) and len(set(found)) == 12
    return found


# --- the wire -------------------------------------------------------------------------------------------------------


def test_the_request_is_the_one_of_the_protocol(started, server):
    started.check(7)
    started(requests(1))
    (body,) = server.bodies
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": MODEL, "temperature": 0.0, "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert "do 0" in content[4]["text"] and content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert re.fullmatch(r"[0-9a-f]{6}-7-\d+", server.headers[-1]["x-request-id"])


def test_jpeg_of_high_quality_only(server):
    j = judge(server.url, image_format="jpeg")
    j(requests(1))
    j.close()
    assert parts_of(server.bodies[-1])[0].startswith("data:image/jpeg;base64,")
    with pytest.raises(UserError) as error:
        judge(server.url, jpeg_quality=90, image_format="webp", min_mass=0, canary_every=-1, digit_token_ids=(1, 2))
    for name in ("jpeg_quality=90", "image_format='webp'", "min_mass=0", "canary_every=-1", "digit_token_ids=(1, 2)"):
        assert f"config.judge.vlm.{name}" in str(error.value)


@pytest.mark.parametrize("name", ["vllm_top20.json", "vllm_leading_space.json"])
def test_a_recorded_reply_gives_its_score(server, name):
    raw = (REPLIES / name).read_bytes()
    with Fixed(raw) as fixed:
        j = judge(fixed.url)
        (answer,) = j(requests(1))
        j.close()
    assert answer.score == digit_score(parse_completion(raw)["logprobs"][0]).score


class Fixed(FakeJudge):
    """Always the same reply, for whatever model is asked."""

    def __init__(self, raw: bytes):
        super().__init__()
        self.models = [json.loads(raw)["model"]]
        self.reply = lambda body: json.loads(raw)


def test_exact_digits_are_asked_for_where_the_server_can(server):
    exact = json.loads((REPLIES / "vllm_token_ids.json").read_bytes())
    server.reply = lambda body: exact if body.get("logprob_token_ids") == [15, 16, 17, 18, 19, 20] else None
    j = judge(server.url)
    j.start()
    j(requests(1))
    j.close()
    assert server.bodies[-1]["logprob_token_ids"] == [15, 16, 17, 18, 19, 20]
    j = judge(server.url, digit_token_ids=(1, 2, 3, 4, 5, 6))
    with pytest.raises(UserError, match="digit_token_ids=.*do not answer with the digits"):
        j.start()
    j.close()


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("transformers_serve.json", "ignores logprobs .transformers serve does this.*launch.serve_judge"),
        ("vllm_tokens_as_ids.json", "without --return-tokens-as-token-ids"),
        ("vllm_low_mass.json", "did not judge the test pictures .low_mass: 0.059"),
    ],
)
def test_a_server_that_cannot_judge_is_refused(reply, said):
    with Fixed((REPLIES / reply).read_bytes()) as fixed:
        j = judge(fixed.url, canary_margin=0.05)
        with pytest.raises(UserError, match=said):
            j.start()
        j.close()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("400", "field 'messages': too many images.*--limit-mm-per-prompt"),
        ("401", "key_env or key_file"),
        ("404", "field 'model'.*/v1/models"),
        ("422", "field 'top_logprobs'.*--max-logprobs 20"),
    ],
)
def test_a_refusal_at_the_start_says_what_to_change(server, status, said):
    server.always = status
    j = judge(server.url)
    with pytest.raises(UserError, match=said):
        j.start()
    j.close()
    assert len(server.bodies) == 1


def test_models_are_checked_at_the_start(server):
    with FakeJudge() as other:
        other.models = ["another"]
        for options, said in [
            ({"model": "Qwen"}, f"serves {MODEL}; expected Qwen"),
            ({}, "different models: another, fake-vl"),
        ]:
            j = judge(server.url, other.url, **options)
            with pytest.raises(UserError, match=said):
                j.start()
            j.close()
    server.models = ["a", "b"]
    j = judge(server.url)
    with pytest.raises(UserError, match="serves a, b; name one of them as model"):
        j.start()
    j.close()
    j = judge("http://127.0.0.1:9", start_deadline_s=0.3)  # nobody listens there
    with pytest.raises(UserError, match="127.0.0.1:9/v1/models.*python -m launch.serve_judge"):
        j.start()
    j.close()


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (lambda body: 0.7, "good 0.700, bad 0.700, swapped 0.700.*does not see them"),
        (lambda body: {0.9: 0.2, 0.2: 0.9}.get(true_score(body), 0.1), "good 0.200, bad 0.100, swapped 0.900"),
        (lambda body: {0.1: 0.95}.get(true_score(body), 0.9), "bad 0.950"),
    ],
    ids=["blind", "swapped", "fond of no edit"],
)
def test_canaries_catch_a_server_that_judges_wrongly(server, scorer, said):
    server.scorer = scorer
    j = judge(server.url, canary_margin=0.05)
    with pytest.raises(UserError, match=f"cannot tell test pictures apart.*{said}"):
        j.start()
    j.close()


def test_canaries_are_repeated_and_never_cached(server):
    j = judge(server.url, canary_every=3, canary_margin=0.05)
    j.start()
    counts = []
    for step in range(1, 7):
        before = len(server.bodies)
        j.check(step)
        counts.append(len(server.bodies) - before)
    assert counts == [0, 0, 9, 0, 0, 9]
    server.scorer = lambda body: 0.5
    with pytest.raises(UserError, match="cannot tell test pictures apart"):
        j.check(9)
    server.always = "503"
    j2 = judge(server.url, canary_every=1, canary_margin=0.05, step_deadline_s=0.3)
    j2._started = True
    with pytest.raises(UserError, match="did not judge the test pictures .deadline"):
        j2.check(1)
    j.close()
    j2.close()


def test_one_replica_that_is_down_does_not_stop_the_checks(server):
    with FakeJudge() as other:
        j = judge(server.url, other.url, canary_every=1, canary_margin=0.05, timeout_s=0.2)
        j.start()
        other.always = "500"
        j.check(1)
        server.scorer = lambda body: 0.5
        with pytest.raises(UserError, match=re.escape(server.url)):
            j.check(2)
        j.close()


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", TRANSIENT)
def test_after_a_fault_all_scores_are_the_faultless_ones(started, server, truth, fault):
    server.faults = [fault] * 5
    found = started(requests())
    assert scores(found) == truth
    counters = started.pop_counters()
    assert counters["scored"] == 12 and not any(name.startswith("invalid") for name in counters)
    assert sum(v for name, v in counters.items() if name.startswith("retry/")) == 5


@pytest.mark.parametrize(
    ("fault", "reason", "said"),
    [
        ("low_mass", "low_mass", "low_mass: 0.300 on the digits.*likeliest tokens: '"),
        ("no_logprobs", "no_logprobs", "sent a reply without them"),
    ],
)
def test_an_unusable_answer_is_invalid_and_not_asked_again(started, server, truth, fault, reason, said, caplog):
    server.faults = [fault] * 4
    with caplog.at_level(logging.WARNING):
        found = started(requests())
    missing = [n for n, answer in enumerate(found) if not answer.valid]
    assert len(missing) == 4 and len(server.bodies) == 12
    assert all(re.search(said, found[n].error or "") for n in missing)
    assert [s for n, s in enumerate(scores(found)) if n not in missing] == [
        s for n, s in enumerate(truth) if n not in missing
    ]
    counters = started.pop_counters()
    assert counters["scored"] == 8 and counters[f"invalid/{reason}"] == 4
    assert re.search(said, caplog.text) and "1 more edits" in caplog.text
    # A sample without a score was not kept as if it had one.
    assert scores(started(requests())) == truth


def test_garbled_replies_that_repeat_are_invalid(started, server):
    server.always = "two_choices"
    found = started(requests(4))
    assert scores(found) == [None] * 4 and all("attempts: given up" in (a.error or "") for a in found)
    assert started.pop_counters()["invalid/attempts"] == 4


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "413", "422"])
def test_a_refusal_stops_at_once_and_keeps_what_was_scored(server, truth, tmp_path, status):
    j = judge(server.url, cache_dir=str(tmp_path), concurrency=1)
    j.start()
    server.bodies.clear()
    server.faults = ["", "", "", status]
    with pytest.raises(UserError, match=f"judge 'vlm': .*status {status}"):
        j(requests())
    assert len(server.bodies) == 4
    assert scores(j(requests())) == truth and len(server.bodies) == 4 + 9
    j.close()


def test_dead_past_the_deadline_is_invalid_in_time(server, truth):
    j = judge(server.url, step_deadline_s=1.0, concurrency=2)
    j.start()
    server.faults = [""] * 5 + ["hang"] * 100
    start = time.monotonic()
    found = j(requests())
    assert time.monotonic() - start < 1.5
    valid = [n for n, answer in enumerate(found) if answer.valid]
    assert len(valid) == 5 and [scores(found)[n] for n in valid] == [truth[n] for n in valid]
    assert {a.error.split(": ")[1] for a in found if a.error} == {"deadline"}
    assert j.pop_counters()["invalid/deadline"] == 7
    j.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int, faults: list[str], delay: float = 0.0) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.rewards.fake_judge", str(port), json.dumps(faults), str(delay)], cwd=ROOT,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_server_killed_and_started_again_in_the_middle(truth):
    port = free_port()
    first = serve(port, [], delay=0.1)
    j = judge(f"http://127.0.0.1:{port}", step_deadline_s=30.0, concurrency=2)
    j.start()
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(j(requests())))
    thread.start()
    while len(j._cache) < 3:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert len(j._cache) < 12  # it died in the middle
    second = serve(port, ["500"])
    thread.join(30)
    second.kill()
    second.communicate()
    assert scores(found) == truth
    assert j.pop_counters()["retry/connect"] >= 1
    j.close()


def test_the_edits_of_a_group_stay_on_one_replica(server):
    with FakeJudge() as other:
        server.delay = other.delay = 0.01
        j = judge(server.url, other.url, concurrency=8)
        j.start()
        server.bodies.clear()
        other.bodies.clear()
        j(requests(32))
        j(requests(32, seed=1))
        j.close()
    homes = defaultdict(set)
    for replica in (server, other):
        for body in replica.bodies:
            homes[parts_of(body)[0]].add(replica.url)
    assert len(homes) == 16 and all(len(urls) == 1 for urls in homes.values())
    assert len(server.bodies) >= 16 and len(other.bodies) >= 16


# --- the cache ------------------------------------------------------------------------------------------------------


def test_judgements_are_kept_over_runs_even_if_killed(server, truth, tmp_path):
    first = judge(server.url, cache_dir=str(tmp_path / "new" / "cache"))
    first.start()
    first(requests()[:8])
    first.close()
    file = tmp_path / "new" / "cache" / "scores.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    # As a kill in the middle of a line leaves it, and other damage.
    file.write_bytes(b"".join(lines[:6]) + b'{"key": "x", "score": 7}\nnot json\n' + lines[6][:25])
    second = judge(server.url, cache_dir=str(file.parent))
    second.start()
    server.bodies.clear()
    assert scores(second(requests())) == truth
    assert len(server.bodies) == 6 and second.pop_counters() | {"mass": 0, "entropy": 0} == {
        "from_cache": 6, "scored": 6, "mass": 0, "entropy": 0,
    }  # fmt: skip
    second.close()
    third = judge(server.url, cache_dir=str(file.parent))
    third.start()
    server.bodies.clear()
    assert scores(third(requests())) == truth and not server.bodies
    third.close()


def test_the_cache_tells_models_questions_and_pictures_apart(server, tmp_path):
    options = {"cache_dir": str(tmp_path)}
    base = requests(1)[0]
    variants = [
        ({}, base),
        ({}, JudgeRequest(base.edited, base.source, base.instruction)),
        ({}, JudgeRequest(base.source, base.edited, "do something else")),
        ({"template": "two_question"}, base),
        ({"image_format": "jpeg"}, base),
    ]
    for more, request in variants:
        j = judge(server.url, **(options | more))
        j.start()
        server.bodies.clear()
        j([request])
        assert server.bodies, more
        j.close()
    server.models = ["another"]
    j = judge(server.url, **options)
    j.start()
    server.bodies.clear()
    j([base])
    j.close()
    assert len(server.bodies) == 1


def test_a_cache_that_cannot_be_written_is_refused(server, tmp_path):
    (tmp_path / "file").write_text("")
    j = judge(server.url, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cache_dir: .*cannot be written"):
        j.start()
    j.close()


# --- prompts --------------------------------------------------------------------------------------------------------


def test_two_questions_give_the_lower_score_and_need_both(server):
    server.scorer = lambda body: 0.9 if "does not ask for" in parts_of(body)[2] else 0.25
    j = judge(server.url, template="two_question", concurrency=1)
    j.start()
    assert scores(j(requests(1))) == [pytest.approx(0.25)]
    server.faults = ["", "low_mass"]
    (answer,) = j(requests(1, seed=5))
    assert answer.score is None and "low_mass" in (answer.error or "")
    server.bodies.clear()
    assert scores(j(requests(1, seed=5))) == [pytest.approx(0.25)] and len(server.bodies) == 1
    assert j.pop_counters()["invalid/low_mass"] == 1
    j.close()


def test_a_requirement_is_asked_for_and_its_lack_is_no_score(server):
    j = judge(server.url, template="edit_r1")
    assert "'requirement'" in (j.fault({}) or "") and j.fault({"requirement": "a red hat"}) is None
    j.start()
    server.bodies.clear()
    good, bad = requests(1, extra={"requirement": "a red hat"})[0], requests(1)[0]
    found = j([bad, good])
    assert found[0].score is None and "missing_field" in (found[0].error or "") and found[1].valid
    assert "a red hat" in parts_of(server.bodies[0])[2]
    assert j.pop_counters()["invalid/missing_field"] == 1
    j.close()


def test_the_same_question_is_asked_once(started, server, truth):
    batch = requests()
    assert scores(started([*batch, *batch[:3]])) == truth + truth[:3] and len(server.bodies) == 12
    assert started.pop_counters()["scored"] == 15


def test_a_picture_that_cannot_be_sent_fails_alone(started, truth):
    batch = requests()
    batch[3] = JudgeRequest(batch[3].source, np.full((8, 8, 3), np.nan, np.float32), "x", "r9")
    found = scores(started(batch))
    assert found[3] is None and [s for n, s in enumerate(found) if n != 3] == [s for n, s in enumerate(truth) if n != 3]


def test_it_is_a_judge_by_name(server):
    made = make_judge("vlm", endpoints=f"{server.url}, http://127.0.0.1:9", cache_dir="")
    assert isinstance(made, VlmJudge) and made._client.endpoints == [server.url, "http://127.0.0.1:9/v1"]
    with pytest.raises(UserError, match="judge 'vlm': options .*'colour'"):
        make_judge("vlm", colour=1)
