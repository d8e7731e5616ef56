"""One configuration per run folder."""

import json
import threading

import pytest
from ml_collections import ConfigDict

from cocoedit_jax.errors import UserError
from cocoedit_jax.train.run_folder import CONFIG, check_seen, claim, differences


def config(steps: int = 2, rate: float = 0.1) -> ConfigDict:
    return ConfigDict({"train": {"steps": steps, "rate": rate}, "tau": {}})


def test_a_longer_run_updates_the_configuration_and_keeps_the_earlier_result(tmp_path):
    claim(tmp_path, config(), resume=False)
    (tmp_path / "evaluation.json").write_text('{"step": 2}')
    claim(tmp_path, config(), resume=True)
    assert (tmp_path / "evaluation.json").exists()
    claim(tmp_path, config(steps=5), resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 5
    assert not (tmp_path / "evaluation.json").exists()
    assert json.loads((tmp_path / "evaluation_000002.json").read_text()) == {"step": 2}


def test_another_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        claim(tmp_path, config(), resume=True)
    claim(tmp_path, config(), resume=False)
    with pytest.raises(UserError, match="holds a run already"):
        claim(tmp_path, config(), resume=False)
    with pytest.raises(UserError, match=r"train.rate: 0.1 then, 0.2 now"):
        claim(tmp_path, config(rate=0.2), resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["rate"] == 0.1


def test_fewer_steps_than_taken_are_refused(tmp_path):
    claim(tmp_path, config(steps=4), resume=False)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match="has taken 4 steps; expected config.train.steps=3"):
        claim(tmp_path, config(steps=3), resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 4


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: cannot be written"):
        claim(tmp_path / "file" / "run", config(), resume=False)


def test_differences():
    assert differences({"a": {"b": 1}, "c": {}}, {"a": {"b": 2}, "d": 3}) == [
        "a.b: 1 then, 2 now", "c: {} then, None now", "d: None then, 3 now",
    ]  # fmt: skip
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}, except_for=("a.",)) == []


def test_a_folder_that_another_process_does_not_see(tmp_path):
    with pytest.raises(UserError, match=f"--run={tmp_path}: made by process 0; expected a disk"):
        check_seen(tmp_path, seconds=0)
    late = threading.Timer(0.3, (tmp_path / CONFIG).touch)
    late.start()
    check_seen(tmp_path)
    late.join()
