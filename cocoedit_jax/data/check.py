"""Checks a data folder as training would, and says what is wrong and what is odd, line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cocoedit_jax.data.duplicates import find_duplicates, fingerprints, normalized
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import METADATA, Record, RecordSet, examine_records, source_key
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

SMALL, LARGE = 0.01, 0.6  # share of the framed picture that may change; outside of it a line is worth a look


@dataclass(frozen=True)
class Finding:
    """Something about a line: `kind` is one of a few words to count by."""

    line: int
    kind: str
    what: str


def check_folder(
    root: Path | str, resolution: int, crop: str = "center", *, rows: int = 20, near: int | None = None
) -> str:
    """A report in plain text: problems (records that training cannot use), notes (that it uses, but perhaps should
    not), and counts by edit type.

    Args:
        rows: of each table; 0 for all.
        near: also find pictures that look the same, whose hashes differ in at most so many bits; see duplicates.py.

    Raises:
        UserError: the report, if there is a problem or no record.
    """
    with progress(0, "check", "record") as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        found = examine_records(root, Framing(resolution, crop), progress=done)
    problems = [Finding(fault.line, fault.kind, str(fault.message)) for fault in found.faults]
    notes = sorted([*_odd_regions(found.records), *_repeats(found.records, near)], key=lambda note: note.line)
    text = "\n\n".join(
        [
            _headline(found),
            *([_table("problem", problems, rows)] if problems else []),
            *([_table("note", notes, rows)] if notes else []),
            *([_by_type(found), _sizes(found)] if found.records else []),
        ]
    )
    if problems or not found.records:
        raise UserError(text)
    return text


def _headline(found: RecordSet) -> str:
    lines = len({fault.line for fault in found.faults})
    total = len(found.records) + lines
    where = found.root / METADATA
    if not total:
        return f"{where}: empty file, expected one JSON object per line"
    if not lines:
        return f"{where}: all {total} records are usable"
    return f"{where}: {lines} of {total} records cannot be used"


def _odd_regions(records: Sequence[Record]) -> list[Finding]:
    notes = []
    for record in records:
        if not SMALL <= record.edit_area <= LARGE:
            kind = "small region" if record.edit_area < SMALL else "large region"
            hint = "; is the mask white where to keep?" if record.edit_area > LARGE else ""
            notes.append(Finding(record.line, kind, f"{100 * record.edit_area:.2g} % of the picture may change{hint}"))
    return notes


def _repeats(records: Sequence[Record], near: int | None) -> list[Finding]:
    if near is None:
        first: dict[tuple[str, str], int] = {}
        notes = []
        for record in records:
            line = first.setdefault((source_key(record), normalized(record.prompt)), record.line)
            if line != record.line:
                notes.append(Finding(record.line, "duplicate", f"image and instruction of line {line}"))
        return notes
    with progress(len(records), "compare", "picture") as bar:
        prints = fingerprints([record.files()[0] for record in records], done=lambda: bar.update(1))
    duplicates = find_duplicates(prints, [record.prompt for record in records], threshold=near)
    return [
        Finding(
            records[d.index].line,
            "duplicate" if d.exact else "near duplicate",
            f"{'image' if d.exact else 'looks as the image'} and instruction of line {records[d.of].line}",
        )
        for d in duplicates
    ]


def _table(name: str, findings: Sequence[Finding], rows: int) -> str:
    counts = Counter(finding.kind for finding in findings)
    shown = findings if rows == 0 else findings[:rows]
    width = max(len(name), *(len(finding.kind) for finding in shown))
    lines = [f"{len(findings)} {name}s: {', '.join(f'{count} x {kind}' for kind, count in counts.most_common())}"]
    lines.append(f"  {'line':>7}  {name:<{width}}  what")
    lines += [f"  {finding.line:>7}  {finding.kind:<{width}}  {finding.what}" for finding in shown]
    if len(shown) < len(findings):
        lines.append(f"  ... and {len(findings) - len(shown)} more (--rows=0 lists all)")
    return "\n".join(lines)


def _by_type(found: RecordSet) -> str:
    groups: dict[str, list[Record]] = {}
    for record in found.records:
        groups.setdefault(record.edit_type or "(none)", []).append(record)
    groups = dict(sorted(groups.items(), key=lambda group: -len(group[1])))
    groups["all"] = list(found.records)
    width = max(9, *(len(name) for name in groups))
    lines = [f"  {'edit type':<{width}}  records  pictures  region (median)"]
    for name, records in groups.items():
        pictures = len({source_key(record) for record in records})
        area = f"{100 * median(record.edit_area for record in records):.1f} %"
        lines.append(f"  {name:<{width}}  {len(records):>7}  {pictures:>8}  {area:>15}")
    return "\n".join(lines)


def _sizes(found: RecordSet) -> str:
    counts = Counter(record.bucket for record in found.records)
    sizes = [found.framing.sizes[bucket] for bucket in sorted(counts)]
    return "\n".join(
        f"  {width}x{height} px: {counts[bucket]} records"
        for bucket, (height, width) in zip(sorted(counts), sizes, strict=True)
    )
