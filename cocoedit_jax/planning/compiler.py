"""Compiles rollout and optimizer step for a topology that is not there, and keeps what the compiler said on disk."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

import cocoedit_jax
from cocoedit_jax.errors import UserError
from cocoedit_jax.planning.topology import Topology
from cocoedit_jax.planning.workload import Candidate, Workload
from cocoedit_jax.reporting.telemetry import write_json
from cocoedit_jax.sharding.collectives import by_kind, exchanges
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.train.plan import lower_rollout, lower_step, memory

PHASES = ("rollout", "train")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"\(?([\d.]+)\s?([KMGT]?)i?B?\)?"
# "the total memory required for HLO temporaries (22.35G) exceeds available HBM (15.75G)": arguments are part of it.
# "Used 20.00G of 15.75G hbm." "... allocate 25769803776 bytes."
_MESSAGES = (
    re.compile(rf"required[^(]*{_AMOUNT} exceeds[^(]*{_AMOUNT}"),
    re.compile(rf"[Uu]sed {_AMOUNT} of {_AMOUNT}"),
    re.compile(r"allocat\w+ ([\d.]+)\s?([KMGT]?)i?B?(?:ytes| bytes)?()()"),
)


def parse_out_of_memory(message: str) -> dict[str, float | None] | None:
    """``need`` and ``available`` bytes (None: not told) of a compiler's or allocator's message; None: another one."""
    if not re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", message):
        return None
    for pattern in _MESSAGES:
        if found := pattern.search(message):
            amount, unit, limit, limit_unit = found.groups()
            need = float(amount) * _UNITS[unit]
            return {"need": need, "available": float(limit) * _UNITS[limit_unit] if limit else None}
    return {"need": None, "available": None}


def load_topology(topology: Topology) -> list[Any]:
    """Devices of a TPU topology, for compiling only.

    Raises:
        UserError: without libtpu, or one that does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        described = topologies.get_topology_desc(topology.name, "tpu")
    except Exception as error:
        message = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"--topology={topology.name}: {message}\nexpected the TPU compiler: pip install 'cocoedit-jax[tpu]', or "
            "its libtpu.so named in TPU_LIBRARY_PATH; one process at a time can use it"
        ) from error
    return list(np.asarray(described.devices).flat)


def versions() -> dict[str, str]:
    """Of what a compilation depends on."""
    out = {"jax": jax.__version__, "cocoedit_jax": cocoedit_jax.__version__}
    library = os.environ.get("TPU_LIBRARY_PATH", "")
    for name in ("libtpu", "jaxlib", "flax"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "none"
    if library:
        found = sorted(Path(library).parent.parent.glob("libtpu-*.dist-info"))
        out["libtpu"] = found[0].name.removeprefix("libtpu-").removesuffix(".dist-info") if found else library
    return out


def phase_key(workload: Workload, candidate: Candidate, topology: str, phase: str) -> dict[str, Any]:
    """All that the compiled program of a phase depends on; that of the rollout does not on what remat keeps."""
    shape = dataclasses.asdict(workload.shape(candidate))
    given = dataclasses.asdict(candidate)
    if phase == "rollout":
        for unused in ("micro_batch", "samples", "sharded_adapters"):
            shape.pop(unused)
        for unused in ("remat", "adapters"):
            given.pop(unused)
    else:
        for unused in ("rollout_batch", "solver"):
            shape.pop(unused)
    given.pop("layout")  # its sizes say it
    given["quantize"] = candidate.quantize_in(phase)
    if not given["quantize"]:  # as it was called before there were formats
        given.pop("quantize")
    unused = ("remat", "attention", "quantize")
    model = {k: v for k, v in workload.config.model.to_dict().items() if k not in unused}
    if workload.config.model.kind == "qwen_image_edit" and workload.qwen[1]:
        model["zero_cond_t"] = True  # of the folder, which the path alone does not tell
    algorithm = dataclasses.asdict(workload.algorithm) if phase == "train" else {}
    return {
        "phase": phase, "topology": topology, "candidate": given, "shape": shape, "model": model,
        "lora": dataclasses.asdict(workload.lora), "algorithm": algorithm, "versions": versions(),
    }  # fmt: skip


class Cache:
    """Results by key, one JSON file each; an interrupted comparison goes on where it was."""

    def __init__(self, folder: Path):
        self._folder = folder

    def _path(self, key: Any) -> Path:
        text = json.dumps(key, sort_keys=True, default=str)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def get(self, key: Any) -> dict[str, Any] | None:
        path = self._path(key)
        try:
            return json.loads(path.read_text())["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Any, result: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(key), {"key": json.loads(json.dumps(key, default=str)), "result": result})


def lower_phase(workload: Workload, candidate: Candidate, phase: str, mesh: Mesh) -> jax.stages.Lowered:
    """The phase, traced for ``mesh``."""
    editor = workload.editor(candidate.remat, candidate.attention, candidate.quantize_in(phase))
    shape = workload.shape(candidate)
    if phase == "rollout":
        return lower_rollout(editor, workload.lora, shape, mesh)
    return lower_step(editor, workload.algorithm, workload.lora, shape, mesh)


def planned_memory(compiled: Any) -> dict[str, float]:
    """``train.plan.memory`` and its ``total``: what is held at once. Bytes per device."""
    used: dict[str, float] = dict(memory(compiled))
    used["total"] = used["arguments"] + used["temporaries"] + used["results"] - used["aliased"]
    return used


def describe_compiled(compiled: Any, devices: int, unknown_trips: float, branch_share: float = 1.0) -> dict[str, Any]:
    """Memory and collectives of one execution, for JSON; bytes per device. Trips and share as in ``exchanges``."""
    used = planned_memory(compiled)
    found = by_kind(exchanges(compiled.as_text() or "", devices, unknown_trips, branch_share))
    return {
        "fits": True,
        "memory": used,
        "need": used["total"],
        "collectives": {kind: dataclasses.asdict(c) for kind, c in found.items()},
    }


def compile_phase(
    workload: Workload,
    candidate: Candidate,
    phase: str,
    devices: list[Any],
    lower: Callable[..., Any] = lower_phase,
) -> dict[str, Any]:
    """What the compiler says of a phase: ``fits``, ``memory`` and ``collectives`` of one execution, or what it
    ``need``s; ``error`` where it fails otherwise.
    """
    mesh = make_mesh(dict(candidate.sizes), devices)
    trips = -(-workload.samples // candidate.batch) if phase == "train" else 1
    # The step has one conditional: the reference forward, of a share of the (micro-batch, timestep) pairs.
    share = workload.algorithm.kl_fraction if phase == "train" else 1.0
    start = time.perf_counter()
    try:
        compiled = lower(workload, candidate, phase, mesh).compile()
        out = describe_compiled(compiled, len(devices), trips, share)
    except jax.errors.JaxRuntimeError as error:
        exhausted = parse_out_of_memory(str(error))
        if exhausted is None:
            out = {"fits": False, "error": str(error).strip()[:2000]}
        else:
            out = {"fits": False, **exhausted, "message": str(error).strip()[:500]}
    except (ValueError, NotImplementedError) as error:
        out = {"fits": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    out["compile_seconds"] = time.perf_counter() - start
    return out
