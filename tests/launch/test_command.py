"""What every command does before its own work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cocoedit_jax.sharding.chips import CHIPS, GPU_SHARE

ROOT = Path(__file__).parents[2]
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
        env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = int(re.findall(r"\d+", done.stdout)[-1])
    assert found == (threads or len(os.sched_getaffinity(0)))


# What jaxlib makes of the environment for GPUs; a process of its own per case, because flags are global.
SHARES = """
import json, os, sys
from jaxlib import xla_client
from launch import command

def main(argv):
    print(json.dumps(xla_client.generate_pjrt_gpu_plugin_options().get("memory_fraction")), flush=True)

for jax_only, environment in json.loads(sys.stdin.read()):
    child = os.fork()
    if not child:
        os.environ.update(environment)
        command.run(main, jax_only=jax_only)
    os.waitpid(child, 0)
"""
SHARE_CASES = [
    (True, {}, GPU_SHARE),
    (False, {}, None),  # JAX's own default
    (True, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
    (True, {"XLA_CLIENT_MEM_FRACTION": "0.6"}, 0.6),
    (True, {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, None),
    (True, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, None),
    (True, {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, GPU_SHARE),
]


def _clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if "MEM_FRACTION" not in k and "XLA_PYTHON_CLIENT" not in k}


def test_jax_may_use_most_of_a_gpu_unless_the_environment_says_otherwise():
    done = subprocess.run(
        [sys.executable, "-c", SHARES, "--xla_cache=off"], capture_output=True, text=True, check=False, cwd=ROOT,
        input=json.dumps([case[:2] for case in SHARE_CASES]), env=_clean_environment(),
    )  # fmt: skip
    assert [json.loads(line) for line in done.stdout.splitlines()] == [share for *_, share in SHARE_CASES], done.stderr
    assert CHIPS["h100"].hbm == pytest.approx(GPU_SHARE * 80e9)  # planned with the same


COMMANDS = """
import os, runpy, sys
from launch import command

command.run = lambda main, setup=None, jax_only=False: print(sys.argv[0], jax_only, flush=True)
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.argv = [name]
        runpy.run_module(f"launch.{name}", run_name="__main__")
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_commands_that_run_pytorch_too_leave_it_memory():
    names = ("train", "bench_sharding", "compare", "pretrain", "edit", "prepare_data", "annotate", "serve_judge")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *names], capture_output=True, text=True, check=False, cwd=ROOT
    )
    found = [line.rpartition(" ")[2] for line in done.stdout.splitlines()]
    assert found == ["True"] * 4 + ["False"] * 4, done.stdout + done.stderr
