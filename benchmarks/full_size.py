"""Optimizer step or sampler of a published model at real size, compiled ahead of time: memory per device, no weights.

    JAX_PLATFORMS=cpu python -m benchmarks.full_size [--model=qwen_image_edit]            # for the CPU backend
    JAX_PLATFORMS=cpu python -m benchmarks.full_size --topology=v5p:2x2x1 --layout=fsdp   # for TPUs that are not there
    JAX_PLATFORMS=cpu python -m benchmarks.full_size --program=rollout --layout=fsdp_context:context=4

For a topology install the extra [tpu] (libtpu) and set TPU_SKIP_MDS_QUERY=1. Nothing is executed.
"""

import argparse
import json
import os
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
from cocoedit_jax.sharding.collectives import exchanges
from cocoedit_jax.sharding.layouts import LAYOUTS, layout_mesh
from cocoedit_jax.sharding.mesh import sample_shards
from cocoedit_jax.train.plan import StepShape, lower_rollout, lower_step, memory, published_editor

GIB = 2**30


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles and returns the figures."""
    devices = jax.devices()[:1]
    if args.topology:
        devices = list(np.asarray(topologies.get_topology_desc(args.topology, "tpu").devices).flat)
    mesh = layout_mesh(args.layout, devices=devices, field="--layout")
    editor = published_editor(args.model, remat=args.remat, attention_backend=args.attention)
    batch = args.per_device * sample_shards(mesh)
    shape = StepShape(
        args.resolution, args.resolution, args.text_tokens, args.text_mask,
        samples=args.samples, micro_batch=batch, rollout_batch=batch, sharded_adapters=args.sharded_adapters,
    )  # fmt: skip
    start = time.perf_counter()
    if args.program == "rollout":
        lowered = lower_rollout(editor, lora.LoraConfig(32, 64), shape, mesh)
    else:
        lowered = lower_step(editor, preset(args.preset), lora.LoraConfig(32, 64), shape, mesh)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    found = exchanges(compiled.as_text() or "", mesh.size)
    kinds = Counter(f"{e.kind} over {'+'.join(e.axes(mesh))}{' in a loop' if e.in_loop else ''}" for e in found)
    return {
        "settings": vars(args),
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "seconds": {"lower": traced - start, "compile": ended - traced},
        "gib": {name: value / GIB for name, value in memory(compiled).items()},
        "collectives_in_text": dict(kinds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="flux_kontext", choices=["flux_kontext", "qwen_image_edit", "qwen_image_edit_2511"]
    )
    parser.add_argument("--topology", default="", help="TPU topology, such as v5p:2x2x1; empty: this machine's device")
    parser.add_argument("--layout", default="replicated", help=f"{', '.join(LAYOUTS)}; NAME:AXIS=SIZE,..")
    parser.add_argument("--program", default="step", choices=["step", "rollout"])
    parser.add_argument("--sharded_adapters", action="store_true")
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--text_mask", action="store_true", help="texts are padded and masked")
    parser.add_argument("--samples", type=int, default=288, help="per optimizer step")
    parser.add_argument("--per_device", type=int, default=3, help="samples at once in each share of the batch")
    parser.add_argument("--remat", default="full", choices=sorted(REMAT_POLICIES))
    parser.add_argument("--attention", default="xla")
    parser.add_argument("--preset", default="cocoedit")
    print(json.dumps(report(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
