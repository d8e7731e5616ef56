"""The load on a judge that fails or goes away while it is measured."""

import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatClient
from cocoedit_jax.rewards.judge_bench import FAILURES_BEYOND, Load, describe, make_requests, run_load
from tests.rewards.fake_judge import MODEL


class Recording(ChatClient):
    """Remembers the deadlines it was given."""

    deadlines: list[float | None]

    def complete_all(self, requests, deadline_s=None, **options):
        self.__dict__.setdefault("deadlines", []).append(deadline_s)
        return super().complete_all(requests, deadline_s, **options)


@pytest.fixture
def bench(server):
    """Measures `count` requests on a server with these faults; the first, which is not counted, has none."""

    def run(faults, count, concurrency=1):
        server.faults, server.retry_after = ["", *faults], "0"
        load = Load(count, concurrency, size=8)
        with Recording([server.url], MODEL, concurrency=concurrency, timeout_s=120, max_attempts=1) as client:
            return run_load(client, load, make_requests(load), 100.0), client

    return run


def test_a_judge_that_dies_ends_the_load(bench, server):
    most = 1 + FAILURES_BEYOND
    result, client = bench([""] * 10 + ["drop"] * 90, 100)
    assert (result["answered"], result["failed"]) == (10, {"connect": most})
    assert f"{most} requests in a row failed, when 10 of 100 had been answered; the last: " in result["stopped"]
    assert len(server.bodies) == 1 + 10 + most
    assert result["latency_ms"]["p50"] > 0 and "p50" in describe(result)
    assert client.deadlines[1:] == [100.0] * (10 + most)


def test_single_failures_do_not(bench):
    """Nor a full queue, which a judge that is well has."""
    few, full = ["drop"] * FAILURES_BEYOND, ["429"] * 2 * FAILURES_BEYOND
    faults = [*few, "", *few, "", "drop", *full, *few[1:], ""]
    result, _ = bench([*faults], len(faults))
    assert result["stopped"] is None and result["answered"] == 3
    assert result["failed"] == {"connect": 3 * FAILURES_BEYOND, "status_429": 2 * FAILURES_BEYOND}


def test_those_under_way_are_not_waited_for(bench, server):
    result, _ = bench(["", "", "hang"] + ["drop"] * 50, 50, concurrency=2)
    assert result["failed"] == {"connect": 2 + FAILURES_BEYOND} and result["answered"] == 2
    assert server.under_way == 1  # one hangs, for a minute


def test_none_answered(bench):
    with pytest.raises(UserError, match="none of 5 requests was answered"):
        bench(["drop"] * 90, 90)
