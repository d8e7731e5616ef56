"""Rows of the comparison: one per candidate, for JSON. Bytes, seconds and FLOPs; ``phases`` are those of one step.

A row has ``method``: "compiled" (memory and exchanges are the compiler's, times are predicted), "by formula" or
"measured".
"""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.quantize import phase_formats
from cocoedit_jax.planning import predict
from cocoedit_jax.planning.compiler import PHASES, Cache, compile_phase, load_topology, phase_key
from cocoedit_jax.planning.held import planned_editor, with_beside
from cocoedit_jax.planning.topology import Topology
from cocoedit_jax.planning.workload import Candidate, Workload
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.sharding.collectives import KINDS
from cocoedit_jax.sharding.mesh import AXES

Row = dict[str, Any]


def row_of(candidate: Candidate, workload: Workload, where: str, devices: int, method: str) -> Row:
    """A row without its phases."""
    return {
        "where": where, "devices": devices, "method": method, "model": workload.config.model.kind,
        "resolution": workload.config.data.resolution, "layout": candidate.layout, "mesh": dict(candidate.sizes),
        "per_shard": candidate.per_shard, "micro_batch": candidate.batch, "remat": candidate.remat,
        "attention": candidate.attention, "adapters": candidate.adapters, "quantize": list(candidate.quantize),
        "phases": {}, "fits": True,
    }  # fmt: skip


def _per_step(found: dict[str, Any], batches: int) -> dict[str, dict[str, float]]:
    """Collectives of a whole step from those of one execution of the phase, of which there are ``batches``."""
    return {
        kind: {"count": c["count"] * batches, "bytes": c["bytes"] * batches}
        for kind, c in found.get("collectives", {}).items()
    }


def predicted_phase(
    workload: Workload, candidate: Candidate, topology: Topology, phase: str, found: dict[str, Any]
) -> dict[str, Any]:
    """A phase of a planned row: what was ``found`` of its memory and exchanges, what lies beside it, and the
    roofline."""
    available = found.get("available") or topology.chip.hbm
    out = with_beside(found, workload, candidate, phase, available) | {"available": available}
    if not out["fits"]:
        return out
    executions = math.ceil(workload.samples / candidate.batch) if phase == "rollout" else 1
    out["collectives"] = _per_step(found, executions)
    exchanged = found.get("exchanged", sum(c["bytes"] for c in out["collectives"].values()))
    editor = planned_editor(workload, candidate, phase)
    # Shares of samples that do not fill up: their devices compute all the same.
    filled = math.ceil(workload.samples / candidate.batch) * candidate.batch / workload.samples
    flops = predict.executed_flops(workload, editor, candidate.remat)[phase] * filled
    rounded = predict.rounded_flops(workload, editor, candidate.remat)[phase] * filled
    traffic = predict.hbm_traffic(workload, editor, candidate, phase)
    out["exchanged"] = exchanged
    exchange = out.pop("exchange_seconds", exchanged / topology.chip.link)
    out["roofline"] = predict.roofline(
        topology.chip, topology.devices, flops, traffic, exchange, rounded, candidate.quantize_in(phase)
    )
    return out


def finish(row: Row, workload: Workload) -> Row:
    """Adds what follows from the phases: ``fits``, and of rows that do, ``step_seconds`` and ``samples_per_second`` as
    soon as times are known."""
    for name in ("step_seconds", "samples_per_second"):  # of rounds before one that failed
        row.pop(name, None)
    phases = row["phases"].values()
    row["fits"] = bool(phases) and all(phase["fits"] for phase in phases)
    key = "measured" if row["method"] == "measured" else "roofline"
    if row["fits"] and all(key in phase for phase in phases):
        median = lambda p: p[key]["median"] if key == "measured" else p[key]["seconds"]  # noqa: E731
        row["step_seconds"] = sum(median(phase) for phase in phases)
        row["samples_per_second"] = workload.samples / row["step_seconds"]
    return row


def planned_rows(
    workload: Workload,
    candidates: Sequence[Candidate],
    topology: Topology,
    cache: Cache,
    phases: Sequence[str] = PHASES,
    lower: Any = None,
) -> list[Row]:
    """A row for every candidate on ``topology``; the compiler is asked once for each program, ever (``cache``).

    Raises:
        UserError: a candidate asks for something that cannot be, or there is no compiler.
    """
    by_formula = topology.chip.platform == "gpu"
    rows, devices = [], None
    with progress(len(candidates) * len(phases), f"plan {topology.name}", "program") as bar:
        for candidate in candidates:
            method = "by formula" if by_formula else "compiled"
            row = row_of(candidate, workload, topology.name, topology.devices, method)
            for phase in phases:
                if by_formula:
                    found: dict[str, Any] | None = predict.by_formula(workload, candidate, topology, phase)
                else:
                    key = phase_key(workload, candidate, topology.name, phase)
                    found = cache.get(key)
                    if found is None:
                        devices = load_topology(topology) if devices is None else devices
                        found = compile_phase(
                            workload, candidate, phase, devices, **({"lower": lower} if lower else {})
                        )
                        cache.put(key, found)
                row["phases"][phase] = predicted_phase(workload, candidate, topology, phase, found)
                bar.update(1)
            rows.append(finish(row, workload))
    return rows


def recommend(rows: Sequence[Row]) -> Row:
    """The row with most samples per second of those that fit; of equal ones, the one that needs least memory.

    Predicted times that differ by less than a hundredth are equal: then the one whose other two limits are lowest.

    Raises:
        UserError: none fits.
    """
    usable = [row for row in rows if row["fits"] and "step_seconds" in row]
    if not usable:
        needs = [(max(p.get("over") or math.inf for p in row["phases"].values() if not p["fits"]), row) for row in rows]
        over, closest = min(needs, key=lambda pair: pair[0], default=(math.inf, None))
        hint = ""
        if closest is not None and math.isfinite(over):
            hint = (
                f"; closest: {closest['layout']}, {closest['per_shard']} per shard, remat {closest['remat']}, "
                f"{over / 2**30:.2f} GiB too much"
            )
        raise UserError(
            f"--recommend: none of {len(rows)} fits{hint}; expected fewer samples (--per_shard), more remat (--remat), "
            "more devices, or a smaller config.data.resolution"
        )

    def rank(row: Row) -> tuple[float, float, float]:
        seconds = row["step_seconds"]
        rough = round(math.log(seconds) * 100) if row["method"] != "measured" else seconds
        parts = [p.get("roofline", {}) for p in row["phases"].values()]
        total = sum(part.get(name, 0.0) for part in parts for name in ("compute", "memory", "exchange"))
        return rough, total, max((p.get("need") or 0.0) for p in row["phases"].values())

    return min(usable, key=rank)


def training_command(row: Row, workload: Workload, config_file: str, overrides: Sequence[str] = ()) -> str:
    """The command line that trains as ``row`` says, on devices as many as it has.

    The rollout's batch must divide the samples of a step: it is lowered to the nearest multiple of the shards that
    does.
    """
    shards = row["mesh"]["data"] * row["mesh"]["fsdp"]
    batch = row["micro_batch"]
    while batch > shards and workload.samples % batch:
        batch -= shards
    name, _, sizes = row["layout"].partition(":")
    config = workload.config
    settings: dict[str, Any] = {"mesh.layout": name}
    # What is set otherwise in the configuration would override the layout.
    settings |= {f"mesh.{axis}": 0 for axis in AXES if config.mesh.get(axis, 0)}
    settings |= {f"mesh.{k}": v for k, v in (s.split("=") for s in sizes.split(",") if s)}
    settings |= {f"{phase}.layout": "" for phase in ("rollout", "train") if config[phase].get("layout", "")}
    settings |= {"rollout.batch_size": batch, "train.micro_batch": row["micro_batch"], "model.remat": row["remat"]}
    settings |= {"model.attention": row["attention"]}
    if row["quantize"] != list(phase_formats(config)):
        own = [phase for phase in PHASES if config[phase].get("quantize", "")]
        settings |= {"model.quantize": row["quantize"][0]} | {f"{phase}.quantize": "" for phase in own}
    if row["adapters"] != config.train.get("adapters", "replicated"):
        settings["train.adapters"] = row["adapters"]
    if config.evaluation.batch_size % shards:
        settings["evaluation.batch_size"] = math.ceil(config.evaluation.batch_size / shards) * shards
    given = [text for text in overrides if text.removeprefix("--config.").partition("=")[0] not in settings]
    parts = [f"--config={config_file}", *given, *(f"--config.{key}={value}" for key, value in settings.items())]
    return "python -m launch.train " + shlex.join(parts)


def check_samples(workload: Workload, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those whose rollout batches can divide a step's samples.

    Raises:
        UserError: there is none.
    """
    usable = [c for c in candidates if workload.samples % c.shards == 0]
    if not usable:
        shards = sorted({c.shards for c in candidates})
        raise UserError(
            f"config.rollout.groups x group_size = {workload.samples} samples; expected a multiple of the {shards} "
            "shares that the layouts split samples into"
        )
    return usable


def collective_names(row: Row) -> str:
    """``all-gather 120 (1.2 GiB), ...`` of all phases of a step."""
    totals = {kind: [0.0, 0.0] for kind in KINDS}
    for phase in row["phases"].values():
        for kind, c in phase.get("collectives", {}).items():
            totals[kind][0] += c["count"]
            totals[kind][1] += c["bytes"]
    return ", ".join(f"{kind} {n:,.0f} ({size / 2**30:.1f} GiB)" for kind, (n, size) in totals.items() if n)
