import json
import math
import re

import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.comparison import comparison_report, over_seeds
from cocoedit_jax.reporting.measures import MEASURES, difference_cell, judged, number, with_error
from cocoedit_jax.reporting.report import write_report
from cocoedit_jax.reporting.telemetry import Telemetry

JUDGE, PSNR, _, CHANGE, NO_EDIT = MEASURES
NAMES = [measure.name for measure in MEASURES]


def summary(**means):
    return {name: {"mean": means.get(name, 0.5), "se": 0.01} for name in NAMES}


def make_run(run, steps=3):
    run.mkdir()
    model = {"kind": "flux", "path": "bases/kontext"}
    config = {"preset": "cocoedit", "seed": 7, "model": model, "train": {"steps": 3}}
    (run / "config.json").write_text(json.dumps(config | {"note": "<script>alert(1)</script>"}))
    with Telemetry(run) as telemetry:
        for step in range(1, steps + 1):
            seconds = {"seconds/train": 30.0 if step == 1 else 3.0, "seconds/rollout": 1.0}
            waiting = {"seconds/waiting_for_rewards": 0.5, "samples_per_second": 12.0, "mfu/train": 0.25}
            telemetry.log(step, {"loss": 1 / step, "reward/total": 0.5} | seconds | waiting)
            telemetry.image(step, "rollout", np.zeros((4, 4, 3)))


def test_a_finished_run(tmp_path):
    run = tmp_path / "first"
    make_run(run)
    with Telemetry(run) as telemetry:
        telemetry.image(3, "held_out", np.zeros((4, 4, 3)))
    (run / "lora/step_000002").mkdir(parents=True)
    (run / "lora/step_000003").mkdir()
    (run / "checkpoints/3").mkdir(parents=True)
    difference = summary(judge=0.1, psnr_outside=-2.5)
    evaluation = {"scenes": 64, "step": 3, "base": summary(judge=0.53), "trained": summary(judge=0.63)}
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"difference": difference}))
    page = write_report(run).read_text()
    assert "Run first" in page and "Preset cocoedit, 3 of 3 steps, seed 7" in page and "Missing" not in page
    assert '<span class="good">+0.100 ± 0.010</span>' in page and '<span class="bad">−2.50 ± 0.01</span>' in page
    assert "64 held-out records, step 3" in page
    assert "lora/step_000003" in page and 'from_pretrained("bases/kontext")' in page
    assert f"--config=FILE.py:cocoedit --run={run} --resume" in page and "from step 3" in page
    assert "<td>train</td><td>3.000</td><td>75.0 %</td>" in page and "took 31.0 s" in page
    assert "within the above" in page and "<td>all phases</td><td>4.000</td>" in page
    assert "<td>MFU train</td><td>25.0%</td>" in page
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_page_holds_everything_itself(tmp_path):
    make_run(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    assert "http" not in page and not re.search(r'(src|href|srcset)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 2 + 2  # curves in two themes, first and last picture
    assert "prefers-color-scheme: dark" in page and "viewport" in page


def test_an_interrupted_run_says_what_is_missing(tmp_path):
    make_run(tmp_path / "run", steps=2)
    (tmp_path / "run/evaluation.json").write_text('{"scenes": 6')
    page = write_report(tmp_path / "run").read_text()
    assert "2 of 3 steps (not finished)" in page
    for part in ("evaluation.json", "held-out pictures", "LoRA files"):
        assert f"Missing: {part}" in page or f"Missing: the {part}" in page


def test_an_empty_folder(tmp_path):
    page = write_report(tmp_path / "none").read_text()
    assert page.count("Missing:") == 6


def test_what_became_of_the_samples(tmp_path):
    make_run(tmp_path / "run", steps=0)
    with Telemetry(tmp_path / "run") as telemetry:
        for step in (1, 2):
            counts = {"samples/drawn": 10, "judge/scored": 9, "judge/invalid/low_mass": 1, "judge/retry/timeout": 3}
            telemetry.log(step, counts | {"judge/mass": 0.9})
    page = write_report(tmp_path / "run").read_text()
    assert "<td>scored</td><td>18</td><td>90.00 %</td>" in page
    assert "<td>invalid: low_mass</td><td>2</td><td>10.00 %</td>" in page and "<td>all samples</td><td>20</td>" in page
    assert "repeated: timeout 6." in page and "from the cache" not in page
    make_run(tmp_path / "other")
    assert "<h2>Judge" not in write_report(tmp_path / "other").read_text()


def test_one_step_only(tmp_path):
    make_run(tmp_path / "run", steps=1)
    assert "One step only" in write_report(tmp_path / "run").read_text()


def test_numbers_as_tables_show_them():
    assert number(0.12345, JUDGE) == "0.123" and number(math.nan, JUDGE) == "–" and number(math.inf, PSNR) == "∞"
    assert with_error(-0.05, 0.01, NO_EDIT, signed=True) == "−5.0 ± 1.0 %"
    assert with_error(0.5, math.nan, JUDGE) == "0.500"
    assert difference_cell(0.1, 0.06, JUDGE) == "+0.100 ± 0.060"
    assert [judged(d, 0.1, m) for d, m in ((1, JUDGE), (-1, JUDGE), (1, NO_EDIT), (1, CHANGE), (0.2, JUDGE))] == [
        "good", "bad", "bad", "", "",
    ]  # fmt: skip


@pytest.fixture
def result():
    def seed(judge, psnr):
        difference = summary(judge=judge - 0.53, psnr_outside=psnr - 29.3)
        return {"trained": summary(judge=judge, psnr_outside=psnr), "difference": difference}

    presets = {
        "edit-r1": {"seeds": {"0": seed(0.74, 26.7), "1": seed(0.76, 26.1)}},
        "cocoedit": {"seeds": {"0": seed(0.63, 32.0), "1": seed(0.65, 31.6)}},
    }
    return {"scenes": 512, "base": summary(judge=0.53, psnr_outside=29.3), "presets": presets}


def test_over_seeds(result):
    mean, spread, error = over_seeds(result["presets"]["edit-r1"]["seeds"], "trained", "judge")
    np.testing.assert_allclose([mean, spread, error], [0.75, 0.02 / math.sqrt(2), 0.01])
    assert math.isnan(over_seeds({"0": {"trained": summary()}}, "trained", "judge")[1])
    assert all(math.isnan(value) for value in over_seeds({}, "trained", "judge"))


def test_comparison(tmp_path, result):
    (tmp_path / "cocoedit_seed_1.png").write_bytes(b"\x89PNG")
    path = comparison_report(result, tmp_path / "report.html")
    table, page = (tmp_path / "table.md").read_text(), path.read_text()
    assert (tmp_path / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    assert "| base | 0.530 | 29.30 |" in table and "| edit-r1 | 0.750 ± 0.014 | 26.40 ± 0.42 |" in table
    assert "| cocoedit | +0.110 ± 0.010 | +2.50 ± 0.01 |" in table and "Mean over 2 training seeds" in table
    assert '<span class="good">+0.110 ± 0.010</span>' in page and '<span class="bad">−2.90 ± 0.01</span>' in page
    assert "Edits of cocoedit" in page and "http" not in page and "Missing" not in page


def test_comparison_before_everything_is_there(tmp_path, result):
    result["presets"]["edit-r1"]["seeds"] = {}
    result["presets"]["cocoedit"]["seeds"]["0"]["trained"]["psnr_outside"]["mean"] = "inf"
    page = comparison_report(result, tmp_path / "sub/report.html").read_text()
    assert "Missing: edit-r1" in page and "∞" in page
    with pytest.raises(UserError, match="'base' is None"):
        comparison_report({"presets": {}}, tmp_path / "x.html")
