"""A run as several processes: the numbers of one, each with its own samples; killed, and resumed with others."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from cocoedit_jax.models.weights import load_safetensors
from cocoedit_jax.reporting.telemetry import read_metrics
from tests.train import hosts

pytestmark = pytest.mark.slow
DEVICES, STEPS, GROUPS, GROUP_SIZE = 4, 3, 4, 4
# Two processes split the data axis, four also the fsdp axis, over which adapters and optimizer state are sharded.
CONFIG = {"mesh.layout": "data_fsdp", "mesh.data": 2, "train.adapters": "sharded", "train.steps": STEPS}
CONFIG |= {"evaluation.every": 100}  # before and after alone
# The devices of each sample are in all processes.
CONTEXT = {"mesh.layout": "fsdp_context", "mesh.data": 0, "mesh.context": 4, "train.adapters": "replicated"}
SECONDS = 900  # most for one run; compiling on a busy machine


@pytest.fixture(scope="module")
def options(tiny_base, tiny_data, tmp_path_factory):
    """Of a run in a folder."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("cache"))

    def of(folder: Path, config: dict | None = None, **more) -> dict:
        paths = {"base": str(tiny_base), "data": str(tiny_data), "run": str(folder), "cache": cache}
        return paths | {"config": CONFIG | (config or {})} | more

    return of


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    """One process, never stopped."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    hosts.run(1, DEVICES, options(folder), SECONDS)
    return folder


def assert_same(run: Path, alone: Path, rtol: float = 1e-5) -> None:
    """Rewards and losses of all steps, the LoRA, and the evaluation."""
    found, expected = read_metrics(run), read_metrics(alone)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [1, 2, 3]
    for row, other in zip(found, expected, strict=True):
        # Between equal policies there is nothing but rounding.
        names = [n for n in other if n.startswith(("reward/", "train/", "optimality/", "samples/", "groups/"))]
        names = [n for n in names if not n.startswith("train/deviation")]
        assert {"reward/judge", "reward/pixel", "train/loss", "train/gradient_norm"} <= set(names)
        for name in names:
            np.testing.assert_allclose(row[name], other[name], rtol=rtol, atol=1e-7, err_msg=name)
    file = f"lora/step_{STEPS:06d}/pytorch_lora_weights.safetensors"
    (tensors, _), (others, _) = load_safetensors(run / file), load_safetensors(alone / file)
    assert tensors.keys() == others.keys()
    distance = sum(float(np.square(tensors[n] - others[n]).sum()) for n in others)
    assert distance**0.5 <= rtol * sum(float(np.square(x).sum()) for x in others.values()) ** 0.5
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (run, alone)]
    assert results[0]["scenes"] == results[1]["scenes"] == 8
    for name, value in results[1]["trained"].items():
        np.testing.assert_allclose(results[0]["trained"][name]["mean"], value["mean"], rtol=10 * rtol, err_msg=name)


def seen(run: Path, processes: int) -> list[dict]:
    return [json.loads((run / f"process_{index}.json").read_text()) for index in range(processes)]


def test_two_processes_train_as_one_does_each_with_its_own_records(options, alone, tmp_path):
    outputs = hosts.run(2, DEVICES, options(tmp_path / "run"), SECONDS)
    assert_same(tmp_path / "run", alone)
    assert "train: 3/3" in outputs[0] and "evaluate" not in outputs[1] and "records" not in outputs[1]
    (whole,), parts = seen(alone, 1), seen(tmp_path / "run", 2)
    for step in (1, 2):  # what follows the last one is the evaluation
        judged = [sorted(each[1:] for each in part["judged"] if each[0] == step) for part in parts]
        loaded = [[name for s, name in part["loaded"] if s == step] for part in parts]
        expected = sorted(each[1:] for each in whole["judged"] if each[0] == step)
        assert [len(own) for own in judged] == [GROUPS * GROUP_SIZE // 2] * 2
        assert not {r for r, _ in judged[0]} & {r for r, _ in judged[1]}  # whole groups
        for (record, mean), (other, other_mean) in zip(sorted(judged[0] + judged[1]), expected, strict=True):
            assert record == other and abs(mean - other_mean) < 1e-5
        assert [len(files) for files in loaded] == [GROUPS // 2] * 2
        assert sorted(loaded[0] + loaded[1]) == sorted(name for s, name in whole["loaded"] if s == step)


def test_a_process_that_is_killed_ends_the_others_and_fewer_go_on(options, alone, tmp_path):
    run = tmp_path / "run"
    started = hosts.start(4, DEVICES, options(run, hit=[3, 3, "kill"]))
    try:
        started[3].wait(SECONDS)
        killed = time.monotonic()
    finally:
        ended = hosts.finish(started, 150)
    assert time.monotonic() - killed < 150
    assert ended[3][0] == -9, "\n\n".join(output[-3000:] for _, output in ended)
    for code, output in ended[:3]:
        assert code not in (0, -9) and "process 3 is gone" in output, output[-3000:]
    assert (run / "checkpoints" / "2").is_dir() and not (run / "evaluation.json").exists()
    hosts.run(2, DEVICES, options(run, resume=True), SECONDS)
    assert_same(run, alone)


def test_a_judge_that_fails_in_one_process_ends_all_and_more_go_on_in_another_layout(options, alone, tmp_path):
    run = tmp_path / "run"
    ended = hosts.finish(hosts.start(2, DEVICES, options(run, hit=[1, 2, "raise"])), SECONDS)
    for code, output in ended:
        assert code == 1, output[-3000:]
        assert "error: process 1: the judge is out of order\nstep 1 is saved, continue with --resume" in output
    hosts.run(4, DEVICES, options(run, CONTEXT, resume=True), SECONDS)
    assert_same(run, alone, 1e-4)
    judged = [[tuple(each) for each in part["judged"] if each[0] == 2] for part in seen(run, 4)]
    assert [len(own) for own in judged] == [GROUPS * GROUP_SIZE // 4] * 4
    assert len({each for own in judged for each in own}) == GROUPS * GROUP_SIZE
