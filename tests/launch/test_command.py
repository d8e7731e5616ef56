"""What every command does before its own work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

THREADS = """
from pathlib import Path
from launch import command

def main(argv):
    import jax
    jax.devices()
    print([path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")].count("tf_XLAEigen"))

command.run(main)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
@pytest.mark.parametrize("devices, chosen, threads", [(16, None, 128), (16, "20", 20), (1, None, None)])
def test_simulated_devices_have_eight_threads_each(devices, chosen, threads):
    environment = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC")}
    environment |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""}
    environment |= {"PJRT_NPROC": chosen} if chosen else {}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, "--xla_cache=off"], capture_output=True, text=True, check=False,
        env=environment, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = int(re.findall(r"\d+", done.stdout)[-1])
    assert found == (threads or os.cpu_count() or 1)
