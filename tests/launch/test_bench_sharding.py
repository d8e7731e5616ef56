"""The command, by formula: no compiler, no accelerator."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.bench_sharding", "--config=configs/flux_kontext.py", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_gpu_cluster_is_planned_and_a_layout_recommended(tmp_path):
    done = run(
        "--topology=h100:8,h100:16",
        "--layouts=replicated,fsdp_tensor:fsdp=4,tensor=2,replicated:data=8",
        "--phases=train",
    )
    assert done.returncode == 1 and "does not fit 16 devices" in done.stderr and "Traceback" not in done.stderr
    done = run(
        "--topology=h100:8,h100:16", "--layouts=replicated,fsdp", "--per_shard=1,2", f"--out={tmp_path}", "--recommend",
        "--config.data.resolution=1024",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "by formula" in done.stdout and "recommended: " in done.stdout
    written = json.loads((tmp_path / "sharding.json").read_text())
    assert len(written["rows"]) == 8 and {row["devices"] for row in written["rows"]} == {8, 16}
    assert written["recommended"] in done.stdout and "--config.data.resolution=1024" in written["recommended"]
    page = (tmp_path / "sharding.html").read_text()
    assert page.count("<img") == 3 and "python -m launch.train" in page  # memory, time, scaling
