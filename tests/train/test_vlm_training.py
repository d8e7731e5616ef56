"""Training with the judge "vlm" whose server fails: every sample is accounted for, and nothing earned is lost."""

import json
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import read_metrics
from cocoedit_jax.rewards.chat_protocol import encode_image
from cocoedit_jax.rewards.judge_prompt import load_prompt
from cocoedit_jax.rewards.vlm_judge import VlmJudge
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.setup import build
from tests.rewards.fake_judge import TRANSIENT, FakeJudge, parts_of, true_score
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("kept_programs")

# What is scored before a server dies must not depend on how busy this machine is.
PATIENT = {"timeout_s": 4.0, "connect_timeout_s": 4.0, "step_deadline_s": 6.0, "start_deadline_s": 6.0}


def vlm_config(base, data, url: str, options: dict | None = None, **overrides):
    config = tiny_config(
        base, data, **{"judge.name": "vlm", "evaluation.every": 100, "checkpoint.every": 100}, **overrides
    )
    config.judge.vlm = {
        "endpoints": url, "timeout_s": 0.4, "connect_timeout_s": 0.4, "step_deadline_s": 1.0, "start_deadline_s": 1.0,
        "backoff_s": (0.01, 0.05), "breaker": (20, 0.05), "canary_margin": -1.0, "cache_dir": "", **(options or {}),
    }  # fmt: skip
    return config


def expected(request) -> float:
    prompt = load_prompt("cocoedit")
    files = encode_image(request.source), encode_image(request.edited)
    text = prompt.ask("score", request.instruction, {})
    return true_score({"messages": prompt.messages(*files, text, "png")})


@pytest.mark.slow
def test_a_judge_that_dies_stops_the_run_and_nothing_is_lost(tiny_base, tiny_data, tmp_path):
    """One step is done and a third of the next one's samples are scored when the server dies; the run then goes on with
    another server, does not ask for those again, and ends as a run without the fault.
    """
    small = {"evaluation.scenes": 4, "train.steps": 2}
    start = 1 + 1 + 4 + 16  # probe, token ids, evaluation of the base, the first step
    with FakeJudge() as server:
        train(build(vlm_config(tiny_base, tiny_data, server.url, PATIENT, **small)), tmp_path / "straight")
        assert len(server.bodies) == start + 16 + 4
    run, options = tmp_path / "stopped", PATIENT | {"cache_dir": str(tmp_path / "cache")}
    with FakeJudge() as dying:
        dying.faults = [""] * (start + 5) + ["503"] * 100_000
        with pytest.raises(UserError) as error:
            train(build(vlm_config(tiny_base, tiny_data, dying.url, options, **small)), run)
        asked = {parts_of(body) for body in dying.bodies}
    for said in ("step 2: 69% of the samples have no reward (deadline x 11)", "config.max_unscored=50%",
                 f"step 1 is saved, continue with --resume --run={run}"):  # fmt: skip
        assert said in str(error.value)
    assert (run / "checkpoints" / "1").is_dir() and [row["step"] for row in read_metrics(run)] == [1]
    assert (run / "lora" / "step_000001").is_dir() and "Judge" in (run / "report.html").read_text()
    with FakeJudge() as back:
        options["canary_every"] = 7  # where the judge is and how it is watched may change
        result = train(build(vlm_config(tiny_base, tiny_data, back.url, options, **small)), run, resume=True)
        # The base's evaluation and the five scores of the failed step are not paid for twice.
        assert len(back.bodies) == 1 + 1 + 16 - 5 + 4 and len(asked) >= 16
    assert result == json.loads((tmp_path / "straight" / "evaluation.json").read_text())
    states = []
    for folder in (tmp_path / "straight", run):
        with ocp.StandardCheckpointer() as checkpointer:
            states.append(jax.tree.leaves(checkpointer.restore((folder / "checkpoints" / "2" / "state").resolve())))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    metrics = read_metrics(run)
    assert metrics[1]["judge/from_cache"] == 5 and metrics[1]["judge/scored"] == 11
    assert metrics[0]["judge/scored"] == 16 and metrics[0]["seconds/waiting_for_rewards"] > 0


def test_a_judge_that_is_dead_past_the_deadline_stops_the_run(tiny_base, tiny_data, tmp_path):
    run = tmp_path / "run"
    with FakeJudge() as server:
        server.faults = [""] * (1 + 1 + 4 + 5) + ["hang"] * 1000
        config = vlm_config(tiny_base, tiny_data, server.url, {"cache_dir": str(tmp_path)}, **{"evaluation.scenes": 4})
        with pytest.raises(UserError) as error:
            train(build(config), run)
    for said in ("step 1: 69% of the samples have no reward (deadline x 11)", "config.max_unscored=50%",
                 f"step 0 is saved, continue with --resume --run={run}"):  # fmt: skip
        assert said in str(error.value)
    assert (run / "checkpoints" / "0").is_dir()
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4 + 5  # for the run that continues


def test_a_refusal_in_the_middle_stops_the_run_with_its_state(tiny_base, tiny_data, tmp_path):
    with FakeJudge() as server:
        server.faults = [""] * (1 + 1 + 4 + 3) + ["401"]
        config = vlm_config(tiny_base, tiny_data, server.url, **{"evaluation.scenes": 4})
        with pytest.raises(UserError, match=r"judge 'vlm'.*status 401[\s\S]*step 0 is saved, continue with --resume"):
            train(build(config), tmp_path / "run")


def test_a_server_that_cannot_judge_is_refused_before_the_model_is_loaded(tiny_base, tiny_data, monkeypatch):
    from cocoedit_jax.train import setup

    def not_yet():
        raise AssertionError("loaded")

    kind = setup.EDITORS["quickstart"]
    monkeypatch.setitem(setup.EDITORS, "quickstart", lambda *a: (kind(*a)[0], not_yet))
    with FakeJudge() as server:
        server.always = "no_logprobs"
        with pytest.raises(UserError, match="ignores logprobs"):
            build(vlm_config(tiny_base, tiny_data, server.url))
    with pytest.raises(UserError, match="config.judge.vlm.canary_every=-1"):
        build(vlm_config(tiny_base, tiny_data, "http://127.0.0.1:9", {"canary_every": -1}))


@pytest.mark.slow
def test_fifty_steps_under_random_faults(tiny_base, tiny_data, tmp_path, monkeypatch):
    judged = []
    judge = VlmJudge.__call__

    def spy(self, requests):
        answers = judge(self, requests)
        judged.extend(zip(requests, answers, strict=True))
        return answers

    monkeypatch.setattr(VlmJudge, "__call__", spy)
    run = tmp_path / "run"
    with FakeJudge() as server:
        overrides = {"train.steps": 50, "evaluation.scenes": 4, "rollout.steps": 2, "algorithm.ban": False}
        options = {"canary_margin": 0.05, "canary_every": 10, "step_deadline_s": 5.0, "timeout_s": 0.3}
        setup = build(vlm_config(tiny_base, tiny_data, server.url, options, **overrides))
        server.random_faults, server.share = (*TRANSIENT, "low_mass", "no_logprobs"), 0.25
        train(setup, run)
    metrics = read_metrics(run)
    assert [row["step"] for row in metrics] == list(range(1, 51))
    total = lambda start: sum(v for row in metrics for k, v in row.items() if k.startswith(start))  # noqa: E731
    for row in metrics:
        invalid = sum(v for k, v in row.items() if k.startswith("judge/invalid/"))
        assert row["samples/drawn"] == 16 == row.get("judge/scored", 0) + row.get("judge/from_cache", 0) + invalid
        assert row["samples/unscored"] == invalid and math.isfinite(row["seconds/waiting_for_rewards"])
    assert total("samples/drawn") == 800 and total("judge/invalid/") > 0 and total("judge/retry/") > 50
    assert {k for row in metrics for k in row if k.startswith("judge/invalid/")} == {
        "judge/invalid/low_mass", "judge/invalid/no_logprobs",
    }  # fmt: skip
    # Every score, of evaluations too, is the one that a server without faults gives.
    assert len(judged) == 800 + 2 * 8  # an evaluation fills its batch of 8
    for request, answer in judged:
        assert not answer.valid or answer.score == pytest.approx(expected(request), abs=1e-9)
    page = (run / "report.html").read_text()
    assert "invalid: low_mass" in page and "<td>all samples</td><td>800</td>" in page
