"""The Slurm recipes: directives, and what the scripts start."""

import re

import pytest

from tests.launch.recipes.calls import RECIPES, Shell, check_training, command_of, read_flags

# Options of sbatch and what their values look like (its manual page).
OPTIONS = {
    "job-name": r"[\w.-]+", "nodes": r"\d+(-\d+)?", "ntasks": r"\d+", "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+", "cpus-per-task": r"\d+", "mem": r"\d+[KMGT]?", "exclusive": "",
    "time": r"(\d+-)?\d{1,2}:\d\d:\d\d", "signal": r"(?:[RB]{1,2}:)?(\w+)@(\d+)", "requeue": "",
    "open-mode": r"append|truncate", "output": r"[\w./%-]+",
}  # fmt: skip


def directives(name):
    """Options of the lines that sbatch reads: those before the first command."""
    found = {}
    for line in (RECIPES / name).read_text().splitlines():
        if line.startswith("#SBATCH"):
            option = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert option, line
            found[option[1]] = option[2] or ""
        elif line and not line.startswith("#"):
            break
    assert len(found) == (RECIPES / name).read_text().count("#SBATCH"), "one is after a command, or twice"
    return found


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_judge.sbatch"])
def test_directives(name):
    for option, value in directives(name).items():
        assert re.fullmatch(OPTIONS[option], value), (option, value)


def shared(tmp_path):
    (tmp_path / "judges").mkdir()
    for number in range(2):
        (tmp_path / f"judges/{number}.url").write_text(f"http://node{number}:800{number}/v1\n")
    return {"SHARED": str(tmp_path), "VENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_ID": "7"}


def test_it_trains_and_queues_itself_again(tmp_path):
    environment = shared(tmp_path)
    bash = Shell(tmp_path, ["srun", "scontrol"])
    job = directives("slurm.sbatch")
    calls = bash(str(RECIPES / "slurm.sbatch"), **environment)
    assert bash.code == 0, bash.err
    assert [call[0] for call in calls] == ["srun", "scontrol"] and calls[1][1:] == ["requeue", "7"]
    assert {"--cpus-per-task=64", "--kill-on-bad-exit=1"} < set(calls[0])
    module, flags = command_of(calls[0])
    assert module == "launch.train" and job["ntasks-per-node"] == "1"
    found = check_training(flags, int(job["nodes"]) * int(job["gpus-per-node"]))
    assert found["flags"]["resume"] is False and found["flags"]["run"] == f"{tmp_path}/runs/kontext"
    judge = found["config"]["judge"]["vlm"]
    assert judge["endpoints"] == "http://node0:8000/v1,http://node1:8001/v1"
    assert judge["key_file"] == f"{tmp_path}/judge_key"
    assert job["signal"].startswith("TERM@"), "to the tasks, which stop on it; B: would tell the script alone"

    run = tmp_path / "runs/kontext"
    run.mkdir(parents=True)
    (run / "config.json").touch()
    assert "--resume" in bash(str(RECIPES / "slurm.sbatch"), **environment)[0]
    (run / "evaluation.json").touch()
    assert [call[0] for call in bash(str(RECIPES / "slurm.sbatch"), **environment)] == ["srun"], "done"


def test_a_failure_is_not_repeated(tmp_path):
    bash = Shell(tmp_path, ["srun", "scontrol"], failing="srun*")
    assert [call[0] for call in bash(str(RECIPES / "slurm.sbatch"), **shared(tmp_path))] == ["srun"]
    assert bash.code == 1


def test_without_judges_it_does_not_start(tmp_path):
    bash = Shell(tmp_path, ["srun", "scontrol"])
    assert not bash(str(RECIPES / "slurm.sbatch"), SHARED=str(tmp_path), SLURM_CPUS_PER_TASK="1", SLURM_JOB_ID="7")
    assert bash.code != 0 and "judges" in bash.err


def test_judge(tmp_path):
    bash = Shell(tmp_path, ["python", "hostname"])
    calls = bash(str(RECIPES / "slurm_judge.sbatch"), SHARED=str(tmp_path), VENV=str(tmp_path), SLURM_ARRAY_TASK_ID="3")
    assert bash.code == 0, bash.err
    module, flags = command_of(calls[-1])
    assert module == "launch.serve_judge"
    (found,) = read_flags(module, [flags])
    expected = {"port": 8003, "host": "0.0.0.0", "key_file": f"{tmp_path}/judge_key"}
    assert expected.items() <= found["flags"].items() and not found["rest"]
    assert (tmp_path / "judges").is_dir() and not list((tmp_path / "judges").iterdir()), "gone with its judge"
