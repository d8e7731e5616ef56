"""The Ray recipe on a cluster of this machine: its actors' processes join and add up."""

import os
import subprocess
import sys

import pytest

from tests.launch.recipes.calls import ROOT


def ray_train(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "JAX_")) and "proxy" not in k}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    return subprocess.run(
        [sys.executable, "-m", "launch.recipes.ray_train", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_two_actors():
    pytest.importorskip("ray")
    common = ["--hosts=2", "--cpus_per_host=0.1", "--noone_per_node", "--module=tests.launch.recipes.add_up"]
    found = ray_train(*common, "--", "--add=3", "--xla_cache=off")
    assert found.returncode == 0, found.stderr[-3000:]
    assert "sum 14 of 2 processes" in found.stdout + found.stderr  # 3 + 3 + 4 + 4


@pytest.mark.slow
def test_a_host_that_fails_is_said():
    pytest.importorskip("ray")
    found = ray_train("--hosts=1", "--cpus_per_host=0.1", "--module=tests.launch.recipes.add_up", "--", "--nothing")
    assert found.returncode == 1 and "exit codes [1]" in found.stderr


def test_how_many_must_be_said():
    found = ray_train()
    assert found.returncode == 1 and "--hosts" in found.stderr + found.stdout
