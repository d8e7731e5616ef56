"""Loading and conversion of a transformer's weights: seconds, GB/s, and memory beyond the arrays themselves.

    python -m benchmarks.weights_load                          # real blocks, fewer of them: 6.2 GB on disk twice
    python -m benchmarks.weights_load --size tiny
    python -m benchmarks.weights_load --devices 8 --folder /fast/disk

A checkpoint of FLUX.1's shapes is filled with random bytes, in shards as published, and deleted afterwards. Every
measurement is a process of its own on the CPU backend, where the final arrays are host memory too: "beyond" is the
largest resident memory minus what was resident before and minus the arrays. Files are dropped from the page cache
before a row that says cold.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Keys of config.json that differ from the published model.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
        "axes_dims_rope": [4, 6, 6], "joint_attention_dim": 64, "pooled_projection_dim": 32,
    },
    "part": {"num_layers": 4, "num_single_layers": 12},
    "flux": {},
}  # fmt: skip
MAX_SHARD_SIZE = 5 * 10**9


def _config(size: str) -> dict[str, Any]:
    return {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True} | SIZES[size]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _drop_from_cache(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _write(folder: Path, size: str) -> dict[str, Any]:
    """A checkpoint of random bfloat16 bytes, one tensor in memory at a time."""
    import numpy as np
    from flax import linen as nn

    from cocoedit_jax.models import safetensors_folder, weights
    from cocoedit_jax.models.flux import FluxConfig, abstract_params

    shapes = weights.tensor_shapes(nn.unbox(abstract_params(FluxConfig.from_diffusers(_config(size)))))
    dtype, rng = safetensors_folder.DTYPES["BF16"], np.random.default_rng(0)
    specs = {name: (dtype, shape) for name, shape in shapes.items()}

    def tensors(names: list[str]) -> Any:
        for name in names:
            yield np.frombuffer(rng.bytes(2 * int(np.prod(shapes[name]))), dtype).reshape(shapes[name])

    folder.mkdir(parents=True)
    written: list[int] = []
    start = time.perf_counter()
    safetensors_folder.write(folder, specs, tensors, MAX_SHARD_SIZE, written.append)
    (folder / "config.json").write_text(json.dumps(_config(size)))
    return {"seconds": time.perf_counter() - start, "bytes": sum(written)}


def _load(source: Path, size: str, devices: int, target: Path | None, form: str) -> dict[str, Any]:
    """Loads ``source`` over ``devices``; with ``target``, also writes it there and measures only that."""
    import jax
    import jax.numpy as jnp

    from cocoedit_jax.models.flux import FluxConfig, abstract_params
    from cocoedit_jax.models.orbax_weights import load_params, save_orbax
    from cocoedit_jax.models.sharded_weights import save_sharded, unstacked
    from cocoedit_jax.sharding.mesh import make_mesh
    from cocoedit_jax.sharding.rules import sharded_shapes

    boxed = abstract_params(FluxConfig.from_diffusers(_config(size)))
    abstract = sharded_shapes(boxed, make_mesh({"fsdp": devices}), jnp.bfloat16)
    if target is not None:
        abstract = unstacked(abstract)  # as launch.convert_weights does
    before = _resident()
    start = time.perf_counter()
    params = jax.block_until_ready(load_params(source, abstract))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if target is not None:
        target.mkdir(parents=True)
        start = time.perf_counter()
        if form == "orbax":
            save_orbax(target, params, _config(size))
        else:
            save_sharded(target, params, max_shard_size=MAX_SHARD_SIZE)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "bytes": total, "beyond": peak - before - total, "peak": peak}


def _child(job: str, arguments: argparse.Namespace, *paths: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.weights_load", "--size", arguments.size, "--job", job]
    command += ["--devices", str(arguments.devices), *(["--paths", *map(str, paths)])]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, row: dict[str, Any]) -> None:
    gigabytes = row["bytes"] / 1e9
    cells = [f"{gigabytes:.2f}", f"{row['seconds']:.1f}", f"{gigabytes / row['seconds']:.2f}"]
    cells += [f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("beyond", "peak")]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    import numpy as np

    from cocoedit_jax.models import safetensors_folder

    a, b = (safetensors_folder.scan(folder).tensors for folder in (one, other))
    return a.keys() == b.keys() and all(
        np.array_equal(a[name].read().view(np.uint16), b[name].read().view(np.uint16)) for name in a
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="part", help="part: real block shapes, 4 + 12 blocks")
    parser.add_argument("--devices", type=int, default=1, help="forced CPU devices to shard over")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files (default: the system's)")
    parser.add_argument("--job", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--paths", type=Path, nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        if arguments.job == "write":
            print(json.dumps(_write(arguments.paths[0], arguments.size)))
        else:
            target = arguments.paths[1] if len(arguments.paths) > 1 else None
            print(json.dumps(_load(arguments.paths[0], arguments.size, arguments.devices, target, arguments.job)))
        return
    print(
        f"| {arguments.size}, {arguments.devices} device(s) | GB | seconds | GB/s | beyond the arrays, GB | peak, GB |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source, orbax, back = (Path(scratch) / name for name in ("source", "orbax", "back"))
        _row("write random safetensors", _child("write", arguments, source))
        _drop_from_cache(source)
        _row("load safetensors, cold", _child("load", arguments, source))
        _row("load safetensors, in page cache", _child("load", arguments, source))
        _row("write Orbax", _child("orbax", arguments, source, orbax))
        _drop_from_cache(orbax)
        _row("load Orbax, cold", _child("load", arguments, orbax))
        _row("load Orbax, in page cache", _child("load", arguments, orbax))
        _row("write safetensors from Orbax", _child("diffusers", arguments, orbax, back))
        same = _same(source, back)
    print(f"round trip bit-exact: {same}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
