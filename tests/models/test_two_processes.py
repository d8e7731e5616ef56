"""Two processes with four devices each load one model: every process reads and holds its own part, whatever the axis
that they share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models import modulation, weights
from cocoedit_jax.models.orbax_weights import save_orbax
from cocoedit_jax.models.qwen import QwenConfig, QwenTransformer
from cocoedit_jax.models.qwen import abstract_params as qwen_params
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


TABLES = """
import json, sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from flax import linen as nn
from pathlib import Path
from cocoedit_jax.models import modulation, weights
from cocoedit_jax.models.qwen import QwenTransformer, abstract_params
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes
from tests.models.test_two_processes import QWEN, SIGMAS, tables
folder, mesh = Path(sys.argv[3]), make_mesh(json.loads(sys.argv[4]))
shapes = sharded_shapes(abstract_params(QWEN), mesh)
abstract = sharded_shapes(jax.eval_shape(tables, abstract_params(QWEN)), mesh)
abstract |= {"sigmas": jax.device_put(SIGMAS, abstract["sigmas"].sharding)}
loaded = weights.flatten(modulation.load_tables(folder, QwenTransformer(QWEN), shapes, abstract))
expected = np.load(folder / "expected.npz")
for path, leaf in loaded.items():
    for shard in leaf.addressable_shards:
        np.testing.assert_allclose(shard.data, expected[".".join(path)][shard.index], rtol=1e-5, atol=1e-5)
print(json.dumps(len(loaded)))
"""
QWEN = QwenConfig(4, 2, 6, 8, 8, (2, 2, 2))
SIGMAS = np.asarray([0.25, 0.5, 1.0], np.float32)


def tables(params):
    return modulation.tables(QwenTransformer(QWEN), modulation.split(nn.unbox(params))[1], SIGMAS.tolist())


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_two(script, *arguments):
    """What two processes with four devices each print last."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(rank), *map(str, arguments)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr[-3000:]
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


@pytest.mark.slow
def test_weights(tmp_path):
    params = random_params(ml_dtypes.bfloat16)
    folders = [tmp_path / "diffusers", tmp_path / "orbax"]
    for folder in folders:
        folder.mkdir()
    save_sharded(folders[0], params)
    save_orbax(folders[1], jax.device_put(params), CONFIG_JSON)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for found in run_two(PROCESS, *folders):
        assert found["shards"] == 4
        # Kernels with their output features on the "fsdp" axis are read by halves, the others whole.
        assert 0.5 * total < found["read"] < 0.8 * total


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"tensor": 2, "fsdp": 4}])
def test_modulation_tables(sizes, tmp_path):
    rng = np.random.default_rng(0)
    shapes = nn.unbox(qwen_params(QWEN))
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    save_sharded(tmp_path, params)
    expected = weights.flatten(nn.unbox(tables(params)))
    np.savez(tmp_path / "expected.npz", **{".".join(path): leaf for path, leaf in expected.items()})
    assert run_two(TABLES, tmp_path, json.dumps(sizes)) == [len(expected)] * 2
