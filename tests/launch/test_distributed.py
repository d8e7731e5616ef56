"""What flags and environments say of the processes of a run; real processes that join, or cannot."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Reads flags and environment in a process of its own per case: flags are global, and commands define the same names.
RESOLVE = """
import dataclasses, json, os, sys
from absl import flags
from launch import distributed
for arguments, environment in json.loads(sys.stdin.read()):
    if "TPU_WORKER_ID" not in environment:
        import jax  # once, instead of in every child; it looks for TPUs when it is imported, so theirs come first
    child = os.fork()
    if not child:
        os.environ.update(environment)
        flags.FLAGS(["test", *arguments])
        try:
            found = distributed.resolve()
            out = found and dataclasses.asdict(found)
        except ValueError as error:
            out = str(error)
        print(json.dumps(out), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
EXPLICIT = ["--coordinator_address=10.0.0.1:8476", "--num_processes=4", "--process_id=2"]
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.9,10.1.0.9:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def processes(coordinator, count, index, devices=None):
    return {"coordinator": coordinator, "count": count, "index": index, "devices": devices}


FOURTH = processes("10.0.0.1:8476", 4, 2)
NODE07 = "node07:61441"  # jax: the job's number in the highest 4096 ports
SHELL = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"}  # an interactive step of one task
CASES = {
    "nothing": ([], {}, None),
    "off in a cluster": (["--distributed=off"], SLURM, None),
    "flags": (EXPLICIT, {}, FOURTH),
    "variables": ([], VARIABLES, FOURTH),
    "flags before variables": (["--process_id=3"], VARIABLES, FOURTH | {"index": 3}),
    "flags before a cluster": (EXPLICIT, SLURM, FOURTH),
    "slurm, all GPUs": ([], SLURM, processes(NODE07, 2, 1)),
    "slurm, a GPU each": (
        [], SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
        processes(NODE07, 4, 1, [1]),
    ),
    "slurm, port": ([], SLURM | {"JAX_COORDINATOR_PORT": "9000"}, processes("node07:9000", 2, 1)),
    "slurm, one task": ([], SHELL | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
    "slurm, shell in a larger allocation": ([], SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    "slurm, batch script": ([], {k: v for k, v in SLURM.items() if "STEP" not in k}, None),
    "open mpi": ([], OPEN_MPI, processes("10.0.0.9:61442", 4, 3, [1])),
    "tpu slice": (
        [], {"TPU_WORKER_HOSTNAMES": "localhost,t1,t2,t3", "TPU_WORKER_ID": "3", "JAX_FORCE_TPU_INIT": "1"},
        processes("localhost:8482", 4, 3),
    ),
    "second of two tpu slices": (
        [], {
            "TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "3", "JAX_FORCE_TPU_INIT": "1",
            "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8081",
        },
        processes("localhost:8482", 8, 7),
    ),
    "one tpu host": ([], {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "JAX_FORCE_TPU_INIT": "1"}, None),
    "a pod that is told": ([], VARIABLES | {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "2"}, FOURTH),
    "a pod of no job": ([], {"KUBERNETES_SERVICE_HOST": "x"}, None),
}  # fmt: skip
FAULTS = {
    "on, nothing known": (["--distributed=on"], {}, "--distributed=on"),
    "no port": (["--coordinator_address=head", *EXPLICIT[1:]], {}, "--coordinator_address=head: expected HOST:PORT"),
    "port too large": (["--coordinator_address=head:70000", *EXPLICIT[1:]], {}, "head:70000"),
    "beyond the last": ([*EXPLICIT[:2], "--process_id=4"], {}, "--process_id=4: with --num_processes=4"),
    "half": (["--num_processes=4"], {}, "needs --coordinator_address, --process_id"),
    "half in variables": ([], {"JAX_PROCESS_ID": "1"}, "needs --coordinator_address, --num_processes"),
    "no number": ([], VARIABLES | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
    "off with flags": (["--distributed=off", *EXPLICIT], {}, "--distributed=off"),
    "an untold pod": (
        [], {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX=1: this is a pod",
    ),
}  # fmt: skip


def clean_environment():
    prefixes = ("SLURM_", "OMPI_", "TPU_", "JAX_", "MEGASCALE_", "KUBERNETES_", "JOB_", "XLA_FLAGS")
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and "proxy" not in k.lower()} | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's server of metadata, which knows nothing of further slices."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def resolved():
    cases = dict(sorted((CASES | FAULTS).items(), key=lambda case: "TPU_WORKER_ID" not in case[1][1]))
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", RESOLVE],
            input=json.dumps([case[:2] for case in cases.values()]),
            env=clean_environment() | {"GCE_METADATA_IP": f"localhost:{server.server_port}"},
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        server.shutdown()
    assert found.returncode == 0, found.stderr
    return dict(zip(cases, map(json.loads, found.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_processes(resolved, name):
    assert resolved[name] == CASES[name][2]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_flag_and_value(resolved, name):
    assert isinstance(resolved[name], str) and FAULTS[name][2] in resolved[name], resolved[name]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.launch.recipes.add_up", "--add=10", *arguments],
        env=clean_environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"} | environment,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_add_up():
    address = f"localhost:{free_port()}"
    by_flags = start(f"--coordinator_address={address}", "--num_processes=2", "--process_id=0", "--xla_cache=off")
    by_variables = start("--xla_cache=off", JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    for process in (by_flags, by_variables):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "sum 42 of 2 processes" in out  # 10 + 10 + 11 + 11


@pytest.mark.parametrize(
    "index, busy, text",
    [
        (0, True, "process 0 cannot listen"),
        (0, False, "process 1 of 2 did not come"),  # JAX by itself would abort the program
        (1, False, "nothing answers"),
    ],
)
def test_a_process_that_stays_alone_ends_with_one_line(index, busy, text):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1] if busy else free_port()
        flags = [f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={index}"]
        process = start(*flags, "--initialization_timeout=2")
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert err.startswith("error: ") and text in err and flags[0] in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("name, instead", [("compare", ""), ("bench_sharding", "planned with --topology")])
def test_a_comparison_runs_in_one_process(tmp_path, name, instead):
    flags = ["--config=configs/quickstart.py", f"--out={tmp_path / 'out'}", *EXPLICIT]
    command = [sys.executable, "-m", f"launch.{name}", *flags]
    found = subprocess.run(
        command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert found.returncode == 1 and found.stdout == "" and not (tmp_path / "out").exists()
    assert found.stderr.startswith("error: process 2 of 4: this command runs in one process"), found.stderr
    assert instead in found.stderr and len(found.stderr.splitlines()) == 1
