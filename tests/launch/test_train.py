"""The command as its user starts it on two hosts: here two processes of this machine, told of each other by flags."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.models.quickstart import build_editor, save_base
from cocoedit_jax.reporting.telemetry import read_metrics
from tests.train.tiny import SIZE, random_params, tiny_quickstart

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "data.resolution": SIZE, "rollout.groups": 2, "rollout.group_size": 4, "rollout.batch_size": 8, "rollout.steps": 3,
    "train.micro_batch": 8, "lora.rank": 2, "lora.alpha": 4, "evaluation.scenes": 4, "evaluation.batch_size": 4,
    "evaluation.steps": 2, "evaluation.every": 1000,
}  # fmt: skip
SECONDS = 900  # most for one command; compiling on a busy machine


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Starts the command as so many processes, over two devices in all; none outlives the test."""
    everything: list[subprocess.Popen] = []
    folder = tmp_path_factory.mktemp("files")
    save_base(folder / "base", tiny_quickstart(), random_params(build_editor(tiny_quickstart())), {})
    write_scenes(folder / "data", 20, SIZE, seed=3)
    settings = SMALL | {"model.path": folder / "base", "data.path": folder / "data"}
    flags = ["--config=configs/quickstart.py", f"--xla_cache={folder / 'xla'}"]
    flags += [f"--config.{name}={value}" for name, value in settings.items()]

    def start(processes: int, run: Path, steps: int, *more: str) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        devices = f"--xla_force_host_platform_device_count={2 // processes} --xla_backend_optimization_level=0"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and "proxy" not in k.lower()}
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
        told = [f"--run={run}", f"--config.train.steps={steps}", *more]
        each: list[list[str]] = [[]]
        if processes > 1:
            told += [f"--coordinator_address={address}", f"--num_processes={processes}"]
            each = [[f"--process_id={index}"] for index in range(processes)]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "launch.train", *flags, *told, *own],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for own in each
        ]  # fmt: skip
        everything.extend(started)
        return started

    yield start
    for process in everything:
        process.kill()
        process.communicate()


def finish(started: list[subprocess.Popen]) -> list[str]:
    """What each printed (exchanges between CPUs add a line of their own); all must end well."""
    ended = [process.communicate(timeout=SECONDS) for process in started]
    for process, (out, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, out[-2000:] + err[-4000:]
    return [re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE) for out, _ in ended]


def test_a_signal_to_one_process_stops_both_and_one_goes_on_as_two_do(command, tmp_path):
    run, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    started, end = command(2, run, 1000, "--config.checkpoint.every=1000"), time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert time.monotonic() < end and all(process.poll() is None for process in started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    first, second = finish(started)
    saved = re.search(r"stopped; step (\d+) is saved, continue with --resume --run=(\S+)\n", first)
    assert saved and saved[2] == str(run) and "2 processes, joined at localhost:" in first, first
    assert second.split("\n") == ["", "SIGTERM: stopping soon; what is done is kept. Once more: at once", ""]
    done = int(saved[1])
    assert (run / f"checkpoints/{done}").is_dir() and not (run / "evaluation.json").exists()

    copy = shutil.copytree(run, tmp_path / "copy")
    first, second = finish(command(2, run, done + 1, "--resume"))
    (alone,) = finish(command(1, copy, done + 1, "--resume"))
    (names, found), (others, wanted) = printed(first), printed(alone)
    assert names == others and {"judge", "psnr_outside"} <= set(names)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert f"report: {run / 'report.html'}" in first and second == ""
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, done + 2)), "one process writes"
    row, other = read_metrics(run)[-1], read_metrics(copy)[-1]
    names = [n for n in other if n.startswith(("reward/", "train/loss", "train/gradient_norm", "samples/"))]
    assert len(names) > 4
    for name in names:
        np.testing.assert_allclose(row[name], other[name], rtol=1e-5, atol=1e-7, err_msg=name)


def printed(out: str) -> tuple[list[str], list[list[float]]]:
    """Names and numbers of the table at the end."""
    rows = re.findall(r"^ *([^:\n]+): base +(\S+) +trained +(\S+) +difference (\S+) \+- (\S+)$", out, re.MULTILINE)
    return [name for name, *_ in rows], [[float(number) for number in numbers] for _, *numbers in rows]
