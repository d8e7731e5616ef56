"""A server that fails on command, a judge that has started on it, and the scores without faults."""

import pytest

from cocoedit_jax.rewards.chat_protocol import encode_image
from cocoedit_jax.rewards.judge_prompt import load_prompt
from tests.rewards.fake_judge import FakeJudge, true_score
from tests.rewards.judging import judge, requests, scores


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
