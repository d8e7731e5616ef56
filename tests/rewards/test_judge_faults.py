"""The judge "vlm" against a server that fails: every score equals the faultless one, and none is invented."""

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cocoedit_jax.errors import UserError
from tests.rewards.fake_judge import TRANSIENT, FakeJudge, parts_of
from tests.rewards.judging import requests, scores

ROOT = Path(__file__).resolve().parents[2]


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
def test_a_refusal_stops_at_once_and_keeps_what_was_scored(server, judge, truth, tmp_path, status):
    j = judge(server.url, cache_dir=str(tmp_path), concurrency=1)
    j.start()
    server.bodies.clear()
    server.faults = ["", "", "", status]
    with pytest.raises(UserError, match=f"judge 'vlm': .*status {status}"):
        j(requests())
    assert len(server.bodies) == 4
    assert scores(j(requests())) == truth and len(server.bodies) == 4 + 9


def test_dead_past_the_deadline_is_invalid_in_time(server, judge, truth):
    j = judge(server.url, step_deadline_s=2.0, concurrency=2)
    j.start()
    server.faults = [""] * 5 + ["hang"] * 100  # each of which would last a minute
    start = time.monotonic()
    found = j(requests())
    assert time.monotonic() - start < 20
    valid = [n for n, answer in enumerate(found) if answer.valid]
    assert len(valid) == 5 and [scores(found)[n] for n in valid] == [truth[n] for n in valid]
    assert {a.error.split(": ")[1] for a in found if a.error} == {"deadline"}
    assert j.pop_counters()["invalid/deadline"] == 7


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(port: int, faults: list[str], delay: float = 0.0):
    """The server as a process; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.rewards.fake_judge", str(port), json.dumps(faults), str(delay)], cwd=ROOT,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_a_server_process_with_every_fault(judge, truth):
    port = free_port()
    with served(port, ["", "", *TRANSIENT]):  # the first two answer what is asked at the start
        j = judge(f"http://127.0.0.1:{port}", step_deadline_s=60.0)
        j.start()
        assert scores(j(requests())) == truth
    counters = j.pop_counters()
    assert sum(v for name, v in counters.items() if name.startswith("retry/")) == len(TRANSIENT)
    assert counters["scored"] == 12 and not any(name.startswith("invalid") for name in counters)


def test_a_server_killed_and_started_again_in_the_middle(judge, truth):
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        with served(port, [], delay=0.1):
            j = judge(f"http://127.0.0.1:{port}", step_deadline_s=60.0, concurrency=2)
            j.start()
            found = pool.submit(lambda: j(requests()))
            while len(j._cache) < 3 and not found.done():
                time.sleep(0.01)
        assert len(j._cache) < 12  # it died in the middle
        with served(port, ["500"]):
            assert scores(found.result(60)) == truth
    assert j.pop_counters()["retry/connect"] >= 1


def test_the_edits_of_a_group_stay_on_one_replica(server, judge):
    with FakeJudge() as other:
        server.delay = other.delay = 0.01
        j = judge(server.url, other.url, concurrency=8)
        j.start()
        server.bodies.clear()
        other.bodies.clear()
        j(requests(32))
        j(requests(32, seed=1))
    homes = defaultdict(set)
    for replica in (server, other):
        for body in replica.bodies:
            homes[parts_of(body)[0]].add(replica.url)
    assert len(homes) == 16 and all(len(urls) == 1 for urls in homes.values())
    assert len(server.bodies) >= 16 and len(other.bodies) >= 16
