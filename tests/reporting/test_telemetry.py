import io
import json
import math
import time

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import PhaseTimer, Telemetry, progress, read_metrics


def strict(line):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_metrics_are_strict_json_and_read_back(tmp_path):
    with Telemetry(tmp_path / "run") as telemetry:
        telemetry.log(1, {"loss": np.float32(0.5), "reward/judge": float("nan")})
        telemetry.log(2, {"loss": float("-inf")})
        telemetry.log(2, {"eval/judge": 1})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert strict(lines[0]) == {"step": 1, "loss": 0.5, "reward/judge": "nan"}
    assert strict(lines[1]) == {"step": 2, "loss": "-inf"}
    first, second = read_metrics(tmp_path / "run")
    assert math.isnan(first["reward/judge"])
    assert second == {"step": 2, "loss": -math.inf, "eval/judge": 1.0}
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_values_that_are_no_numbers_are_named(tmp_path):
    with Telemetry(tmp_path) as telemetry, pytest.raises(UserError, match="metric 'loss' is 'high' at step 3"):
        telemetry.log(3, {"loss": "high"})


def test_images(tmp_path):
    picture = np.zeros((6, 8, 3))
    picture[..., 0] = 2.0  # clipped
    picture[0, 0, 1] = np.nan
    with Telemetry(tmp_path) as telemetry:
        telemetry.image(12, "step", picture)
        with pytest.raises(UserError, match=r"shape \(6, 8\)"):
            telemetry.image(12, "step", picture[..., 0])
    saved = np.asarray(Image.open(tmp_path / "samples/step_000012.png"))
    assert saved.shape == (6, 8, 3) and (saved[..., 0] == 255).all() and saved[0, 0, 1] == 0


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path):
    with Telemetry(tmp_path) as telemetry:
        for step in (1, 2, 3):
            telemetry.log(step, {"loss": float(step)})
            telemetry.image(step, "step", np.zeros((2, 2, 3)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Telemetry(tmp_path) as telemetry:
        telemetry.truncate(2)
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
        assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_000001.png", "step_000002.png"]
        telemetry.log(3, {"loss": 30.0})
        with pytest.raises(UserError, match="truncate"):
            telemetry.truncate(2)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]


def test_appending_after_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert len(read_metrics(tmp_path)) == 1
    with Telemetry(tmp_path) as telemetry:
        telemetry.log(2, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1.0}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "nowhere") == []


def test_phase_times_add_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer = PhaseTimer()
    with timer("rollout"):
        clock[0] += 2
        with timer("judge"):
            clock[0] += 3
        clock[0] += 1
    clock[0] += 100  # in no phase
    with pytest.raises(RuntimeError), timer("train"):
        clock[0] += 4
        raise RuntimeError
    with timer("rollout"):
        clock[0] += 1
    assert timer.pop() == {"seconds/rollout": 4.0, "seconds/judge": 3.0, "seconds/train": 4.0}
    assert timer.pop() == {}


def test_progress_in_a_log_file():
    out = io.StringIO()
    with progress(10, "training", "step", initial=4, file=out, every=0) as bar:
        bar.update(6)
    text = out.getvalue()
    assert "\r" not in text and "\n\n" not in text
    assert text.splitlines()[-1].startswith("training: 10/10 [")
    assert "step" in text.splitlines()[-1]


def test_progress_over_an_iterable():
    out = io.StringIO()
    assert list(progress([1, 2, 3], "loading", initial=2, file=out)) == [1, 2, 3]
    assert "5/5" in out.getvalue()


def test_all_processes_but_one_write_nothing(tmp_path):
    with Telemetry(tmp_path / "run", active=False) as telemetry:
        telemetry.truncate(0)
        telemetry.log(1, {"loss": 1.0})
        telemetry.image(1, "rollout", np.zeros((4, 4, 3)))
    assert not list(tmp_path.iterdir())
