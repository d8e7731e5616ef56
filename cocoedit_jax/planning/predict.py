"""Time and memory by formula: the roofline of a step, and the memory plan of devices that no compiler here plans for.

A prediction. The roofline is the least time that arithmetic, memory traffic or exchange alone would take, as if the
other two were hidden behind it and every unit ran at its data-sheet peak; real steps take longer.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.quantize import FORMATS
from cocoedit_jax.planning.held import abstract_of, adapter_bytes, held, planned_editor, weights
from cocoedit_jax.planning.topology import Topology
from cocoedit_jax.planning.workload import Candidate, Workload
from cocoedit_jax.sharding.chips import Chip
from cocoedit_jax.sharding.flops import forward_flops, lora_gradient_flops
from cocoedit_jax.sharding.mesh import AXES, CONTEXT, DATA, FSDP, TENSOR

# Values of width d that a block reads and writes per token: q, k, v, attention and its output (1+3, 3+1, 1+1), MLP
# (1+4, 4+1), and norms, modulation and residuals around the two (6).
TRAFFIC_WIDTHS = 26
# Values of width d per token that the backward pass of one block holds at once: its recomputed activations (17: what
# the list above writes) and their gradients in flight (about half of them).
BLOCK_WIDTHS = 25
# Values of width d per token and block that a remat policy keeps, beside the block's input.
KEPT_WIDTHS = {"none": 17, "dots": 13, "attention": 1, "full": 0, "offload": 0}
DECODE_BYTES = 2.7e3  # temporaries of one decoded picture in float32 per pixel (benchmarks/RESULTS.md: 2560 MiB, 1 MP)


def tokens(workload: Workload, editor: Editor) -> int:
    """Of one joint sequence: target, source, text."""
    size = workload.config.data.resolution
    return 2 * editor.grid(size, size).tokens + workload.text_tokens()


def model_flops(workload: Workload, editor: Editor) -> dict[str, float]:
    """Of one optimizer step by phase, over all devices, as the trainer counts them for MFU: nothing recomputed."""
    cfg, steps = workload.algorithm, workload.config.rollout.steps
    shape, length, samples = editor.transformer.config, tokens(workload, editor), workload.samples
    forwards = cfg.forwards_without_gradient
    gradient = lora_gradient_flops(shape, length, samples) + forwards * forward_flops(shape, length, samples)
    return {"rollout": steps * forward_flops(shape, length, samples), "train": cfg.num_timesteps(steps) * gradient}


def executed_flops(workload: Workload, editor: Editor, remat: str) -> dict[str, float]:
    """``model_flops`` and what ``remat`` computes again."""
    flops = model_flops(workload, editor)
    shape, length = editor.transformer.config, tokens(workload, editor)
    forward = forward_flops(shape, length, workload.samples)
    attention = shape.num_blocks * 4.0 * length * length * shape.hidden * workload.samples
    again = {"none": 0.0, "dots": attention, "attention": forward - attention, "full": forward, "offload": forward}
    flops["train"] += workload.algorithm.num_timesteps(workload.config.rollout.steps) * again[remat]
    return flops


def rounded_flops(workload: Workload, editor: Editor, remat: str) -> dict[str, float]:
    """Those of ``executed_flops`` that multiply 8-bit numbers with one another: forward passes through the linear
    layers of the blocks, where the base's format rounds activations. Attention, adapters and the backward pass do not
    (``models.quantize``)."""
    if not editor.quantize or not FORMATS[editor.quantize].activations:
        return {"rollout": 0.0, "train": 0.0}
    steps, shape, length = workload.config.rollout.steps, editor.transformer.config, tokens(workload, editor)
    linear = forward_flops(shape, length, workload.samples)
    linear -= shape.num_blocks * 4.0 * length * length * shape.hidden * workload.samples
    passes = 1 + workload.algorithm.forwards_without_gradient + (remat in ("full", "attention", "offload"))
    return {"rollout": steps * linear, "train": workload.algorithm.num_timesteps(steps) * passes * linear}


def rounded_peak(chip: Chip, form: str) -> float:
    """Products per second of numbers of the format ``form`` with one another, or 0: they are multiplied as bf16."""
    if not form or not FORMATS[form].activations:
        return 0.0
    return chip.int8 if FORMATS[form].dtype == jax.numpy.int8 else chip.fp8


def hbm_traffic(workload: Workload, editor: Editor, candidate: Candidate, phase: str) -> float:
    """Bytes that one device reads and writes per step, by formula: the weights of every pass (a share that was fetched
    is also written), and the activations of its own samples."""
    cfg, steps, sizes = workload.algorithm, workload.config.rollout.steps, dict(candidate.sizes)
    shape = editor.transformer.config
    whole, _ = weights(abstract_of(editor)["transformer"], candidate)
    fetched = whole / sizes["tensor"] * (2 if sizes["fsdp"] > 1 else 1)
    if phase == "rollout":
        passes = steps
    else:
        recompute = candidate.remat in ("full", "attention", "offload")
        forwards = 1 + recompute + cfg.forwards_without_gradient
        passes = cfg.num_timesteps(steps) * (forwards + 2)  # the backward pass reads and writes about twice a forward's
    local = tokens(workload, editor) / sizes["context"] / sizes["tensor"]
    width = 2 if editor.transformer.dtype == jax.numpy.bfloat16 else 4
    activations = candidate.per_shard * local * shape.num_blocks * TRAFFIC_WIDTHS * shape.hidden * width
    batches = math.ceil(workload.samples / candidate.batch)
    return batches * passes * (fetched + activations)


def roofline(
    chip: Chip, devices: int, flops: float, traffic: float, exchange: float, rounded: float = 0.0, form: str = ""
) -> dict[str, float | str]:
    """Seconds of one phase of a step.

    Args:
        flops: executed, over all devices.
        traffic: bytes of one device.
        exchange: seconds (``exchange_seconds``).
        rounded: those of ``flops`` that multiply numbers of the format ``form`` with one another. They run at the
            chip's peak for it, which is told as ``rounded_peak``; where it has none, at that of bf16.
    """
    peak = rounded_peak(chip, form) if rounded else 0.0
    told = {"rounded_peak": peak} if peak else {}
    parts = {
        "compute": ((flops - rounded) / chip.flops + rounded / (peak or chip.flops)) / devices,
        "memory": traffic / chip.hbm_bandwidth,
        "exchange": exchange,
    }
    bound = max(parts, key=lambda name: parts[name])
    return {**parts, **told, "seconds": parts[bound], "bound": bound}


def formula_memory(workload: Workload, editor: Editor, candidate: Candidate, phase: str) -> dict[str, float]:
    """``arguments``, ``temporaries`` and ``total`` in bytes on one device, by formula.

    Arguments are those of ``held``. Temporaries: the inputs that remat keeps of every block, one block's backward pass,
    two layers of fetched weights, one gradient; for the rollout one block's forward pass and one decoded picture.
    """
    sizes, shape = dict(candidate.sizes), editor.transformer.config
    whole, _ = weights(abstract_of(editor)["transformer"], candidate)
    arguments = sum(held(workload, candidate, phase)[0].values())
    width = 2 if editor.transformer.dtype == jax.numpy.bfloat16 else 4
    length = tokens(workload, editor)
    per_width = candidate.per_shard * length / sizes["context"] * shape.hidden * width
    fetched = 2 * whole / shape.num_blocks / sizes["tensor"] if sizes["fsdp"] > 1 else 0.0
    if phase == "rollout":
        pixels = workload.config.data.resolution**2
        block = per_width * TRAFFIC_WIDTHS / 2 / sizes["tensor"]
        return _summed(arguments, max(block + fetched, DECODE_BYTES * pixels))
    kept = shape.num_blocks * per_width * (1 + KEPT_WIDTHS[candidate.remat] / sizes["tensor"])
    if candidate.remat == "offload":
        kept = 2 * per_width
    gradient = adapter_bytes(workload, editor, candidate)
    return _summed(arguments, kept + BLOCK_WIDTHS * per_width / sizes["tensor"] + fetched + gradient)


def _summed(arguments: float, temporaries: float) -> dict[str, float]:
    return {"arguments": arguments, "temporaries": temporaries, "total": arguments + temporaries}


def exchange_seconds(topology: Topology, sizes: Mapping[str, int], exchanged: Mapping[str, float]) -> float:
    """Seconds of what one device sends over each mesh axis, one after another; the last axis is that of neighbours."""
    stride, total = 1, 0.0
    for axis in reversed(AXES):
        total += exchanged.get(axis, 0.0) / topology.bandwidth(stride, sizes[axis])
        stride *= sizes[axis]
    return total


def formula_exchange(workload: Workload, editor: Editor, candidate: Candidate, phase: str) -> dict[str, float]:
    """Bytes that one device sends per step over each mesh axis, by formula: layers fetched for every pass over an fsdp
    axis, four sums of activations per block and pass over a tensor axis, keys, values and outputs over a context axis,
    one reduction of adapter gradients over all axes that split samples or tokens."""
    cfg, steps, sizes = workload.algorithm, workload.config.rollout.steps, dict(candidate.sizes)
    shape = editor.transformer.config
    whole, _ = weights(abstract_of(editor)["transformer"], candidate)
    width = 2 if editor.transformer.dtype == jax.numpy.bfloat16 else 4
    passes = steps
    if phase == "train":
        # The backward pass fetches a layer once, for what it recomputes too.
        forwards = 2 + cfg.forwards_without_gradient
        passes = cfg.num_timesteps(steps) * forwards
    others = {axis: (size - 1) / size for axis, size in sizes.items()}
    states = candidate.per_shard * tokens(workload, editor) / sizes[CONTEXT] * shape.hidden * width * shape.num_blocks
    per_pass = {
        FSDP: whole / sizes[TENSOR] * others[FSDP],
        TENSOR: states * 2 * 2 * others[TENSOR],
        CONTEXT: states * 4 * others[CONTEXT],
    }
    runs = math.ceil(workload.samples / candidate.batch) * passes
    out = {axis: runs * size for axis, size in per_pass.items()} | {DATA: 0.0}
    if phase == "train":
        for axis in (DATA, FSDP):
            out[axis] += 2 * adapter_bytes(workload, editor, candidate) * others[axis]
    return out


def by_formula(workload: Workload, candidate: Candidate, topology: Topology, phase: str) -> dict[str, Any]:
    """A phase of a row, without a compiler."""
    editor = planned_editor(workload, candidate, phase)
    used = formula_memory(workload, editor, candidate, phase)
    exchanged = formula_exchange(workload, editor, candidate, phase)
    return {
        "fits": used["total"] <= topology.chip.hbm,
        "memory": used,
        "need": used["total"],
        "exchanged": sum(exchanged.values()),
        "exchange_seconds": exchange_seconds(topology, dict(candidate.sizes), exchanged),
    }
