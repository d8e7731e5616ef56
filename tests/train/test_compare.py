"""The comparison of presets: finished runs are kept, other configurations refused, the base evaluated once."""

import json

import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.train import compare as comparison
from cocoedit_jax.train.compare import compare
from cocoedit_jax.train.evaluate import Evaluation, mean_se

pytestmark = pytest.mark.usefixtures("kept_programs")

CONFIG = """
from pathlib import Path
from tests.train.tiny import tiny_config

def get_config(name="cocoedit"):
    small = {{"rollout.groups": 2, "train.steps": 1, "evaluation.scenes": 8}}
    return tiny_config(Path({base!r}), Path({data!r}), name, **small)
"""


@pytest.mark.slow
def test_compare(tiny_base, tiny_data, tmp_path, monkeypatch):
    config, out = tmp_path / "config.py", tmp_path / "out"
    config.write_text(CONFIG.format(base=str(tiny_base), data=str(tiny_data)))

    def run(presets=("edit-r1",), seeds=(0,), overrides=None):
        return compare(config, overrides or {}, presets, seeds, out, scenes=8, scene_seed=5)

    result = run()
    assert set(result["presets"]) == {"edit-r1", "edit-r1 + source pasted by mask"}
    pasted = result["presets"]["edit-r1 + source pasted by mask"]["seeds"]["0"]
    assert pasted["trained"]["psnr_outside"]["mean"] == 80  # the cap: nothing outside the mask differs
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(result))
    table = (out / "table.md").read_text()
    assert "edit-r1" in table and "than the base" in table
    assert (out / "report.html").is_file() and (out / "edit-r1_seed_0.png").is_file()

    # Differences are paired: the trained metrics of each scene minus the base's.
    base, trained = (json.loads(p.read_text())["trained"] for p in
                     (out / "fresh_5_8.json", out / "edit-r1/seed_0/fresh_5_8.json"))  # fmt: skip
    difference = np.mean(np.subtract(trained["psnr_outside"], base["psnr_outside"]))
    assert result["presets"]["edit-r1"]["seeds"]["0"]["difference"]["psnr_outside"]["mean"] == pytest.approx(difference)

    with monkeypatch.context() as patch:  # everything is there: nothing is built or trained again
        patch.setattr(comparison, "build", None)
        assert run() == result

    with pytest.raises(UserError, match=r"another configuration(.|\n)*train.learning_rate: 0.\d+ then, 1.0 now"):
        run(overrides={"train.learning_rate": 1.0})

    other_base = json.loads((out / "fresh_5_8.json").read_text())
    other_base["trained"]["change_inside"][0] += 0.5
    (out / "fresh_5_8.json").write_text(json.dumps(other_base))
    with pytest.raises(UserError, match="change_inside of another base"):
        run(seeds=(1,))


def test_standard_errors():
    values = np.array([1.0, 2.0, 4.0, np.nan])
    assert mean_se(values) == {"mean": pytest.approx(7 / 3), "se": pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)}
    assert np.isnan(mean_se(np.array([1.0]))["se"]) and np.isnan(mean_se(np.array([]))["mean"])
    base = Evaluation({"judge": np.array([1.0, 5.0, 3.0])}, [], [])
    after = Evaluation({"judge": np.array([2.0, 7.0, 3.0])}, [], [])
    paired = after.difference(base)["judge"]  # 1, 2, 0: the spread between records does not enter
    assert paired == {"mean": pytest.approx(1), "se": pytest.approx(1 / 3**0.5)}


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.py: no such configuration file"):
        compare(tmp_path / "nowhere.py", {}, ("edit-r1",), (0,), tmp_path / "out", 8, 5)
    assert not (tmp_path / "out").exists()
