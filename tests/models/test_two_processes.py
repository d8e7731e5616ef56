"""Two processes with four devices each load one model: every process reads and holds its own part."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import pytest

from cocoedit_jax.models.orbax_weights import save_orbax
from cocoedit_jax.models.sharded_weights import save_sharded
from tests.models.tiny_flux import CONFIG_JSON, random_params

ROOT = Path(__file__).parents[2]
PROCESS = """
import json, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from cocoedit_jax.models import safetensors_folder, weights
from cocoedit_jax.models.orbax_weights import load_params
from pathlib import Path
from tests.models.tiny_flux import random_params, target
read, original = [], safetensors_folder.StoredTensor.read
def counted(self, *rows):
    read.append(original(self, *rows))
    return read[-1]
safetensors_folder.StoredTensor.read = counted
expected, devices = weights.flatten(random_params(np.dtype("bfloat16"))), 0
for folder in sys.argv[3:]:
    loaded = weights.flatten(load_params(Path(folder), target({"tensor": 2, "fsdp": 4}, "bfloat16"), dtype="stored"))
    for path, leaf in loaded.items():
        devices = len(leaf.addressable_shards)
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[path][shard.index].tobytes(), path
print(json.dumps({"read": sum(x.nbytes for x in read), "shards": devices}))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes(tmp_path):
    params = random_params(ml_dtypes.bfloat16)
    folders = [tmp_path / "diffusers", tmp_path / "orbax"]
    for folder in folders:
        folder.mkdir()
    save_sharded(folders[0], params)
    save_orbax(folders[1], jax.device_put(params), CONFIG_JSON)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(rank), *map(str, folders)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr[-3000:]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for stdout, _ in outputs:
        found = json.loads(stdout.splitlines()[-1])
        assert found["shards"] == 4
        # Kernels with their output features on the "fsdp" axis are read by halves, the others whole.
        assert 0.5 * total < found["read"] < 0.8 * total
