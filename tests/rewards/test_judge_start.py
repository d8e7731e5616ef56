"""The judge "vlm" at the start and every so many steps: servers that cannot judge are refused, in words that help."""

import json
import math
import re

import pytest

from cocoedit_jax.errors import UserError
from tests.rewards.fake_judge import MODEL, STATUS_BODY, FakeJudge, completion, true_score
from tests.rewards.judging import REPLIES, Fixed


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("transformers_serve.json", "ignores logprobs .transformers serve does this.*launch.serve_judge"),
        ("vllm_tokens_as_ids.json", "without --return-tokens-as-token-ids"),
        ("vllm_low_mass.json", "did not judge the test pictures .low_mass: 0.059"),
    ],
)
def test_a_server_that_cannot_judge_is_refused(judge, reply, said):
    with Fixed((REPLIES / reply).read_bytes()) as fixed:
        j = judge(fixed.url, canary_margin=0.05)
        with pytest.raises(UserError, match=said):
            j.start()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("400", "field 'messages': too many images.*--limit-mm-per-prompt"),
        ("401", "key_env or key_file"),
        ("404", "field 'model'.*/v1/models"),
        ("422", "field 'top_logprobs'.*--max-logprobs 20"),
    ],
)
def test_a_refusal_at_the_start_says_what_to_change(server, judge, status, said):
    server.always = status
    j = judge(server.url)
    with pytest.raises(UserError, match=said):
        j.start()
    assert len(server.bodies) == 1


def test_a_context_that_is_too_short_is_told_from_too_many_images(server, judge, monkeypatch):
    """What vLLM says of a long prompt speaks of images as well."""
    for name, said in [("vllm_error_length.json", "--max-model-len"), ("vllm_error_400.json", "'logprobs'.*20")]:
        monkeypatch.setitem(STATUS_BODY, 400, json.loads((REPLIES / name).read_bytes()))
        server.always = "400"
        j = judge(server.url)
        with pytest.raises(UserError, match=said) as error:
            j.start()
        assert "limit-mm-per-prompt" not in str(error.value)


def test_a_model_that_thinks_first_is_refused(server, judge):
    entries = [("<think>", 0.99), *((letter, 0.0005) for letter in "ABCDEFG")]
    places = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in entries]
    server.reply = lambda body: completion(0.5, logprobs={"content": [{**places[0], "top_logprobs": places}]})
    j = judge(server.url)
    with pytest.raises(UserError, match=r"no digit among .*<think>.*enable_thinking"):
        j.start()


def test_models_are_checked_at_the_start(server, judge):
    with FakeJudge() as other:
        other.models = ["another"]
        for options, said in [
            ({"model": "Qwen"}, f"serves {MODEL}; expected Qwen"),
            ({}, "different models: another, fake-vl"),
        ]:
            j = judge(server.url, other.url, **options)
            with pytest.raises(UserError, match=said):
                j.start()
    server.models = ["a", "b"]
    j = judge(server.url)
    with pytest.raises(UserError, match="serves a, b; name one of them as model"):
        j.start()
    j = judge("http://127.0.0.1:9", start_deadline_s=0.3)  # nobody listens there
    with pytest.raises(UserError, match="127.0.0.1:9/v1/models.*python -m launch.serve_judge"):
        j.start()


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (lambda body: 0.7, "good 0.700, bad 0.700, swapped 0.700.*does not see them"),
        (lambda body: {0.9: 0.2, 0.2: 0.9}.get(true_score(body), 0.1), "good 0.200, bad 0.100, swapped 0.900"),
        (lambda body: {0.1: 0.95}.get(true_score(body), 0.9), "bad 0.950"),
    ],
    ids=["blind", "swapped", "fond of no edit"],
)
def test_canaries_catch_a_server_that_judges_wrongly(server, judge, scorer, said):
    server.scorer = scorer
    j = judge(server.url, canary_margin=0.05)
    with pytest.raises(UserError, match=f"cannot tell test pictures apart.*{said}"):
        j.start()


def test_canaries_are_repeated_and_never_cached(server, judge):
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


def test_one_replica_that_is_down_does_not_stop_the_checks(server, judge):
    with FakeJudge() as other:
        j = judge(server.url, other.url, canary_every=1, canary_margin=0.05, timeout_s=0.8)
        j.start()
        other.always = "500"
        j.check(1)
        server.scorer = lambda body: 0.5
        with pytest.raises(UserError, match=re.escape(server.url)):
            j.check(2)
