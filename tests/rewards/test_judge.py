"""Judges: the programmatic one, its refusals, the registry; a missing score never becomes a number."""

import numpy as np
import pytest

from cocoedit_jax.data import scenes
from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards import judge as judging
from cocoedit_jax.rewards.judge import JUDGES, JudgeRequest, JudgeScore, judge_scores, make_judge


@pytest.fixture(scope="module")
def batch():
    return scenes.sample_batch(np.random.default_rng(0), 6)


def request(batch, number, edited, **changes):
    fields = {
        "source": batch.source[number],
        "edited": edited,
        "instruction": batch.instructions[number],
        "record_id": f"r{number}",
        "extra": {"scene": batch.specs[number].to_json()},
    }
    return JudgeRequest(**(fields | changes))


def test_scene_judge(batch):
    judge = make_judge("scenes")
    good, good_valid = judge_scores(judge, [request(batch, n, batch.target[n]) for n in range(6)])
    bad, bad_valid = judge_scores(judge, [request(batch, n, batch.source[n]) for n in range(6)])
    assert good_valid.all() and (good > 0.99).all() and bad_valid.all() and (bad < 0.1).all()
    assert judge([]) == []


def test_mixed_sizes_and_types_keep_their_order(batch):
    _, large, _ = scenes.render(batch.specs[1], 64)
    eight_bit = np.rint(batch.target[2] * 255).astype(np.uint8)
    requests = [request(batch, 0, batch.source[0]), request(batch, 1, large), request(batch, 2, eight_bit)]
    scores, _ = judge_scores(make_judge("scenes"), requests)
    assert scores[0] < 0.1 and scores[1:].min() > 0.95


def test_one_bad_request_does_not_fail_the_others(batch):
    broken = batch.target[1].copy()
    broken[0, 0, 0] = np.nan
    requests = [
        request(batch, 0, batch.target[0], extra={}),
        request(batch, 1, broken),
        request(batch, 2, batch.target[2][:, :40]),
        request(batch, 3, batch.target[3], extra={"scene": {"operation": "remove"}}),
        request(batch, 4, batch.target[4][:8, :8]),
        request(batch, 5, batch.target[5]),
    ]
    answers = make_judge("scenes")(requests)
    assert [answer.score is None for answer in answers] == [True] * 5 + [False]
    expected = ["'scene' is missing", "NaN", "shape", "'background' is missing", "at least 16"]
    for number, text in enumerate(expected):
        reason = answers[number].error
        assert reason is not None and text in reason and f"'r{number}'" in reason
    scores, valid = judge_scores(make_judge("scenes"), requests)
    assert valid.tolist() == [False] * 5 + [True] and np.isnan(scores[:5]).all() and scores[5] > 0.99


@pytest.mark.parametrize(("score", "error"), [(None, None), (0.5, "why"), (1.5, None), (float("nan"), None)])
def test_a_score_is_a_number_or_a_reason(score, error):
    with pytest.raises(ValueError, match="JudgeScore"):
        JudgeScore(score, error)


def test_registry(monkeypatch):
    monkeypatch.setattr(judging, "JUDGES", dict(JUDGES))

    @judging.register_judge("constant")
    def constant(value):
        return lambda requests: [JudgeScore(value) for _ in requests]

    assert constant is judging.JUDGES["constant"]
    assert judging.make_judge("constant", value=0.25)([JudgeRequest(np.zeros(3), np.zeros(3), "")])[0].score == 0.25
    with pytest.raises(UserError, match="judge: 'gpt' given, expected MODULE:NAME or one of constant, scenes"):
        judging.make_judge("gpt")
    with pytest.raises(UserError, match=r"'constant': options \['x'\]"):
        judging.make_judge("constant", x=1)
    with pytest.raises(ValueError, match="registered already"):
        judging.register_judge("scenes")(constant)


def test_a_judge_that_loses_answers_is_refused(batch):
    with pytest.raises(ValueError, match="0 answers to 1 requests"):
        judge_scores(lambda requests: [], [request(batch, 0, batch.target[0])])
