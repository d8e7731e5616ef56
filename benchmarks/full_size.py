"""The optimizer step of a published model at its real size, compiled ahead of time: memory per device, no weights.

    JAX_PLATFORMS=cpu python -m benchmarks.full_size [--model=qwen_image_edit]            # for the CPU backend
    JAX_PLATFORMS=cpu python -m benchmarks.full_size --topology=v5p:2x2x1 --fsdp=4        # for TPUs that are not there

For a topology install the extra [tpu] (libtpu) and set TPU_SKIP_MDS_QUERY=1. Nothing is executed.
"""

import argparse
import json
import os
import re
import time
from collections import Counter
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies

from cocoedit_jax.models import lora
from cocoedit_jax.models.blocks import REMAT_POLICIES
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.train.plan import StepShape, lower_step, memory, published_editor

GIB = 2**30


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles and returns the figures."""
    devices = jax.devices()[:1]
    if args.topology:
        devices = list(np.asarray(topologies.get_topology_desc(args.topology, "tpu").devices).flat)
    mesh = make_mesh({"data": -1, "fsdp": args.fsdp, "tensor": args.tensor}, devices)
    editor = published_editor(args.model, remat=args.remat, attention_backend=args.attention)
    data = mesh.shape["data"]
    shape = StepShape(
        args.resolution, args.resolution, args.text_tokens, args.text_mask,
        samples=args.samples, micro_batch=args.per_device * data,
    )  # fmt: skip
    start = time.perf_counter()
    lowered = lower_step(editor, preset(args.preset), lora.LoraConfig(32, 64), shape, mesh)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    text = compiled.as_text() or ""
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    return {
        "settings": vars(args),
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "seconds": {"lower": traced - start, "compile": ended - traced},
        "gib": {name: value / GIB for name, value in memory(compiled).items()},
        "collectives_in_text": dict(Counter(found)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="flux_kontext", choices=["flux_kontext", "qwen_image_edit", "qwen_image_edit_2511"]
    )
    parser.add_argument("--topology", default="", help="TPU topology, such as v5p:2x2x1; empty: this machine's device")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--text_mask", action="store_true", help="texts are padded and masked")
    parser.add_argument("--samples", type=int, default=288, help="per optimizer step")
    parser.add_argument("--per_device", type=int, default=3, help="samples per micro-batch and data shard")
    parser.add_argument("--remat", default="full", choices=sorted(REMAT_POLICIES))
    parser.add_argument("--attention", default="xla")
    parser.add_argument("--preset", default="cocoedit")
    print(json.dumps(report(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
