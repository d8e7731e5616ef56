"""A server that fails on command, a judge that has started on it, and the scores without faults."""

import contextlib

import pytest

from cocoedit_jax.rewards.chat_protocol import encode_image
from cocoedit_jax.rewards.judge_prompt import load_prompt
from tests.rewards.fake_judge import FakeJudge, true_score
from tests.rewards.judging import new_judge, requests, scores


@pytest.fixture
def server():
    with FakeJudge() as found:
        yield found


@pytest.fixture
def judge(server):
    """Makes judges and closes them before the server, where a test fails too: what it left open would fail the next."""
    with contextlib.ExitStack() as opened:
        yield lambda *urls, **options: opened.enter_context(contextlib.closing(new_judge(*urls, **options)))


@pytest.fixture
def started(server, judge):
    found = judge(server.url)
    found.start()
    server.bodies.clear()
    return found


@pytest.fixture(scope="module")
def truth() -> list[float | None]:
    """The scores of ``requests()`` by a server without faults."""
    with FakeJudge() as server, contextlib.closing(new_judge(server.url)) as j:
        found = scores(j(requests()))
    prompt, expected = load_prompt("cocoedit"), []
    for r in requests():
        files = encode_image(r.source), encode_image(r.edited)
        text = prompt.ask("score", r.instruction, {})
        expected.append(true_score({"messages": prompt.messages(*files, text, "png")}))
    assert found == pytest.approx(expected, abs=1e-9) and len(set(found)) == 12
    return found
