"""The comparison as a table of text: for a terminal, for Markdown, and the cells of the HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from cocoedit_jax.planning.rows import Row, collective_names

GIB = 2**30
_GROUPS = {"all-gather": "AG", "all-reduce": "AR", "reduce-scatter": "RS", "all-to-all": "A2A",
           "collective-permute": "CP", "collective-broadcast": "CB"}  # fmt: skip
LEGEND = (
    "GiB per device of each phase: arguments of its program + what is beyond them + what the run holds beside them "
    "(adapters' training state while it samples, encoders, the step's samples, a base of another format); against what "
    "a program may use. Exchange: GiB that one device sends per step, and how often (AG all-gather, AR all-reduce, RS "
    "reduce-scatter, A2A all-to-all, CP collective-permute)."
)
MEASURED = (
    "Seconds per step: median and quartiles of rounds in which all rows take turns; random weights. A step's rollout "
    "is timed by one of its batches, its training by at most {micro_batches} micro-batches, in proportion. GiB per "
    "device: arguments + what is beyond them, by the compiler's plan, + what a run holds beside them, by formula; "
    "peak: of the program alone, as the device says, where no row before needed more. Compile (kept): read from "
    "--xla_cache. MFU by formula, of {peak_source}."
)
PREDICTED = (
    "Seconds are predictions: the roofline of data-sheet peaks, the largest of arithmetic, memory traffic and "
    "exchange, as if the other two were hidden behind it. Real steps take longer."
)
QUANTIZED = (
    "Base: its format in rollout/optimizer step. Linear layers of forward passes multiply int8 or fp8 numbers, "
    "predicted at that format's data-sheet peak ({peaks}); all else, and int8_weights, at bfloat16's."
)
BY_FORMULA = "Memory and exchanges of these rows are by formula: no compiler was asked."


def base_text(row: Row) -> str:
    """Formats of the frozen base: ``int8``, or ``int8/full`` for rollout and optimizer step."""
    return "/".join(dict.fromkeys(form or "full" for form in row["quantize"]))


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f}" if value >= 0.1 * GIB else f"{value / GIB:.2g}"


def seconds_text(phase: Mapping[str, object] | None) -> str:
    """Median and quartiles where measured, the roofline and what bounds it where predicted."""
    if not phase:
        return "-"
    measured, roofline = phase.get("measured"), phase.get("roofline")
    if isinstance(measured, Mapping):
        return f"{measured['median']:.3g} ({measured['q1']:.3g}..{measured['q3']:.3g})"
    if isinstance(roofline, Mapping):
        return f"{roofline['seconds']:.3g} {roofline['bound']}"
    return "-"


def verdict(row: Row) -> str:
    """``fits``, or why not and by how much."""
    if row["fits"]:
        return "fits"
    words = []
    for name, phase in row["phases"].items():
        if phase["fits"]:
            continue
        if phase.get("error"):
            words.append(f"{name}: {str(phase['error']).splitlines()[0][:80]}")
        elif phase.get("over"):
            words.append(f"{name}: {phase['over'] / GIB:.2f} GiB too much")
        else:
            words.append(f"{name}: out of memory")
    return "; ".join(words)


def memory_text(phase: Mapping[str, object] | None) -> str:
    """``arguments + temporaries + beside`` or the need, in GiB."""
    if not phase:
        return "-"
    used, need = phase.get("memory"), phase.get("need")
    if isinstance(used, Mapping):
        beside = used.get("beside", 0.0)
        beyond = used["total"] - used["arguments"] - beside
        return " + ".join(map(_gib, (used["arguments"], beyond, beside)))
    return f"needs {_gib(need)}" if isinstance(need, float | int) else "-"


def compile_text(phase: Mapping[str, Any] | None) -> str:
    """Seconds, and whether they are those of reading a program that was on disk."""
    if not phase or "compile_seconds" not in phase:
        return "-"
    return f"{phase['compile_seconds']:.1f}" + (" (kept)" if phase.get("kept") else "")


def exchange_text(row: Row) -> str:
    """GiB sent by one device per step, and counts by kind."""
    totals: dict[str, float] = {}
    size, known = 0.0, False
    for phase in row["phases"].values():
        known |= "exchanged" in phase
        size += phase.get("exchanged", 0.0)
        for kind, c in phase.get("collectives", {}).items():
            totals[kind] = totals.get(kind, 0.0) + c["count"]
    if not known:
        return "-"
    return " ".join([f"{size / GIB:,.1f}", *(f"{_GROUPS.get(kind, kind)} {n:,.0f}" for kind, n in totals.items())])


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; columns that are the same everywhere, or empty, are left out, except the first ones."""
    measured = any(row["method"] == "measured" for row in rows)
    columns: dict[str, list[str]] = {
        "layout": [row["layout"] for row in rows],
        "where": [row["where"] for row in rows],
        "px": [str(row["resolution"]) for row in rows],
        "per shard": [str(row["per_shard"]) for row in rows],
        "batch": [str(row["micro_batch"]) for row in rows],
        "remat": [row["remat"] for row in rows],
        "attention": [row["attention"] for row in rows],
        "adapters": [row["adapters"] for row in rows],
        "base": [base_text(row) for row in rows],
    }
    optional = ("where", "px", "attention", "adapters", "base")
    columns = {k: v for k, v in columns.items() if k not in optional or len(set(v)) > 1}
    for phase in ("rollout", "train"):
        of = [row["phases"].get(phase) for row in rows]
        if not any(of):
            continue
        columns[f"{phase} GiB"] = [memory_text(p) for p in of]
        if measured:
            columns[f"{phase} peak GiB"] = [_gib((p or {}).get("peak")) for p in of]
            columns[f"{phase} compile s"] = [compile_text(p) for p in of]
        columns[f"{phase} s"] = [seconds_text(p) for p in of]
        if measured:
            columns[f"{phase} MFU"] = [f"{100 * p['mfu']:.1f} %" if p and "mfu" in p else "-" for p in of]
    if not measured:
        columns["of GiB"] = [_gib(next(iter(row["phases"].values()))["available"]) for row in rows]
        columns["exchange GiB"] = [exchange_text(row) for row in rows]
    columns["samples/s"] = [f"{row['samples_per_second']:.3g}" if "samples_per_second" in row else "-" for row in rows]
    columns["verdict"] = [verdict(row) for row in rows]
    kept = {k: v for k, v in columns.items() if k in ("layout", "verdict") or set(v) != {"-"}}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


def _rounded_peaks(rows: Sequence[Row]) -> str:
    """Peaks of 8-bit products that predictions have used, one for each kind of device and format."""
    found = {
        f"{row['where'].partition(':')[0]} {form}: {peak / 1e12:,.0f} T/s"
        for row in rows
        for form, name in zip(row["quantize"], ("rollout", "train"), strict=True)
        if (peak := row["phases"].get(name, {}).get("roofline", {}).get("rounded_peak"))
    }
    return ", ".join(sorted(found)) or "none in the chip table: bfloat16's"


def notes(rows: Sequence[Row]) -> list[str]:
    """What must be said of the numbers."""
    methods = {row["method"] for row in rows}
    said = []
    if methods - {"measured"}:
        said += [LEGEND, PREDICTED]
        said += [QUANTIZED.format(peaks=_rounded_peaks(rows))] if any(any(row["quantize"]) for row in rows) else []
    if "by formula" in methods:
        said.append(BY_FORMULA)
    if "measured" in methods:
        words = {"micro_batches": 0, "peak_source": "?"} | rows[0]
        said.append(MEASURED.format_map(words))
    return said


def text_table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    header, body = cells(rows)
    lines = [header, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*out, "", *notes(rows)])


def markdown_table(rows: Sequence[Row]) -> str:
    """For a document."""
    header, body = cells(rows)
    lines = [header, ["---"] + ["--:"] * (len(header) - 2) + ["---"], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(row: Row) -> str:
    """Collectives of a row in words; empty where there are none."""
    found = collective_names(row)
    return f"{row['layout']}, {row['per_shard']} per shard, {row['remat']}: {found}" if found else ""
