"""The command, by formula: no compiler, no accelerator. What it recommends is what training takes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cocoedit_jax.planning import rows
from cocoedit_jax.planning.workload import Workload, choose_candidates
from configs import flux_kontext
from tests.train.tiny import tiny_quickstart

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.bench_sharding", "--config=configs/flux_kontext.py", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# What launch.train does with its command line before it reads data: the mesh, and everything that is refused.
PARSED = """
import json, sys
from launch import command, train
command._parse(sys.argv)
from cocoedit_jax.train.config_checks import check_config
from cocoedit_jax.train.editors import EDITORS
from cocoedit_jax.train.setup import phase_meshes
config = train._CONFIG.value
meshes = phase_meshes(config)
check_config(config, *meshes, tuple(EDITORS))
print(json.dumps([[dict(mesh.shape) for mesh in meshes], config.to_json_best_effort()]))
"""


def parsed(line: str, devices: int) -> tuple[list[dict], dict]:
    """Meshes of rollout and training, and the configuration, that launch.train takes a command line to mean."""
    python, module, train, *arguments = shlex.split(line)
    assert (python, module, train) == ("python", "-m", "launch.train")
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", PARSED, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    meshes, config = json.loads(done.stdout)
    return meshes, json.loads(config)


def test_the_recommended_command_is_one_that_training_takes():
    config = flux_kontext.get_config("edit-r1")
    config.mesh.data, config.train.layout, config.evaluation.batch_size = 4, "fsdp", 6
    workload = Workload.of(config)
    (candidate,) = choose_candidates(
        workload, 16, layouts=["fsdp_context:context=4"], per_shard=[5], remat=["offload"], attention=["ring"],
        adapters="sharded",
    )  # fmt: skip
    row = rows.row_of(candidate, workload, "v5e:4x4", 16, "compiled")
    given = ["--config.mesh.data=4", "--config.train.layout=fsdp", "--config.evaluation.batch_size=6",
             "--config.data.path=data/my edits"]  # fmt: skip
    meshes, found = parsed(rows.training_command(row, workload, "configs/flux_kontext.py:edit-r1", given), 16)
    assert meshes == [{"data": 1, "fsdp": 4, "context": 4, "tensor": 1}] * 2
    assert found["preset"] == "edit-r1" and found["data"]["path"] == "data/my edits"
    assert found["model"]["remat"] == "offload" and found["model"]["attention"] == "ring"
    assert found["train"]["micro_batch"] == 20 and found["train"]["adapters"] == "sharded"
    assert found["rollout"]["batch_size"] == 16  # divides 288, and is a multiple of four


def test_a_gpu_cluster_is_planned_and_a_layout_recommended(tmp_path):
    done = run(
        "--topology=h100:8,h100:16", "--layouts=fsdp_context:context=2,tensor=2,replicated,fsdp", f"--out={tmp_path}",
        "--recommend", "--config.data.resolution=1024",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "by formula" in done.stdout and "recommended: " in done.stdout
    written = json.loads((tmp_path / "sharding.json").read_text())
    layouts = ["fsdp_context:context=2,tensor=2", "replicated", "fsdp"]
    assert [(row["devices"], row["layout"]) for row in written["rows"]] == [(n, x) for n in (8, 16) for x in layouts]
    assert written["recommended"] in done.stdout and "--config.data.resolution=1024" in written["recommended"]
    page = (tmp_path / "sharding.html").read_text()
    assert page.count("<img") == 3 and "python -m launch.train" in page  # memory, time, scaling


CONFIG = """
from pathlib import Path
from tests.train.tiny import tiny_config

def get_config(name="cocoedit"):
    return tiny_config(Path(%r), Path("data"), name, **{"rollout.steps": 2, "rollout.solver": "euler"})
"""


@pytest.mark.slow
def test_the_devices_present_are_measured_and_a_layout_recommended(tmp_path):
    """The whole command on four CPU devices: table, JSON, page, and a command line for training."""
    (tmp_path / "config.json").write_text(tiny_quickstart().to_json())
    config = tmp_path / "config.py"
    config.write_text(CONFIG % str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench_sharding", f"--config={config}:edit-r1", "--layouts=fsdp,data_fsdp",
         "--per_shard=1", "--repeats=2", "--recommend", f"--out={tmp_path}", f"--xla_cache={tmp_path / 'xla'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "true",
             "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
             "--xla_cpu_use_fusion_emitters=false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "sharding.json").read_text())
    assert [row["mesh"]["fsdp"] for row in written["rows"]] == [4, 2] and all(row["fits"] for row in written["rows"])
    for row in written["rows"]:
        for phase in row["phases"].values():
            assert phase["measured"]["samples"] == 2 and phase["mfu"] > 0 and phase["memory"]["temporaries"] > 0
    best = max(written["rows"], key=lambda row: row["samples_per_second"])
    assert f"recommended: {best['layout']} on cpu" in done.stdout and "rollout MFU" in done.stdout
    assert (tmp_path / "sharding.html").read_text().count("<img") == 2  # memory, time
    meshes, found = parsed(written["recommended"], 4)
    assert meshes == [best["mesh"]] * 2 and found["preset"] == "edit-r1" and found["train"]["micro_batch"] == 4
