"""Packing a data folder into ArrayRecord files (`packed` has the format)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from cocoedit_jax.data.packed import PACK, Pack, PackPart, is_packed, pack_entry, write_header
from cocoedit_jax.data.prepare import write_folder
from cocoedit_jax.data.records import (
    METADATA,
    TEXT_CACHE,
    Fault,
    Record,
    bare_line,
    metadata_lines,
    read_metadata,
    summarize,
)
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

PART_BYTES = 2**30


def pack_folder(source: Path | str, out: Path | str, *, part_bytes: int = PART_BYTES, overwrite: bool = False) -> str:
    """Packs images, masks and, where there are any, cached text embeddings of `source` into the folder `out`; returns
    a summary. Training reads either folder, with the same result.

    Files go in as they are; every entry is read back and compared before the folder appears. Lines that cannot be used
    and those whose files are missing are left out.

    Raises:
        UserError: nothing to pack, or `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    records, faults = read_metadata(source)
    if is_packed(source):
        raise UserError(f"{source}: is packed already")
    usable: list[Record] = []
    for record in records:
        gone = [
            str(path) for path in (record.image, record.mask) if not os.path.isfile(path)
        ]  # false also for names that no disk takes
        if gone:
            faults.append(Fault(record.line, "missing file", f"{' and '.join(gone)} does not exist"))
        else:
            usable.append(record)
    faults.sort(key=lambda fault: fault.line)
    if not usable:
        raise UserError(summarize(source, 0, faults) if faults else f"{source / METADATA}: empty file")
    lines = list(metadata_lines(source))
    kept = [bare_line(lines[record.line - 1]) for record in usable]

    def fill(folder: Path) -> None:
        (folder / PACK).mkdir()
        (folder / METADATA).write_bytes(b"".join(line + b"\n" for line in kept))
        with progress(2 * len(usable), "pack and compare", "record") as bar:
            parts = _write_parts(folder, usable, kept, part_bytes, bar)
            write_header(folder, parts, (folder / METADATA).read_bytes())
            pack = Pack(folder, folder / METADATA)
            for position, (record, line) in enumerate(zip(usable, kept, strict=True)):
                expected = {"image": record.image.read_bytes(), "mask": record.mask.read_bytes(), "record": line}
                if pack.read(position) != expected:
                    raise UserError(f"{source}: line {record.line} changed while it was packed; try again")
                bar.update(1)
        written, _ = read_metadata(folder)
        if [record.id for record in written] != [record.id for record in usable]:
            raise UserError(f"{source / METADATA}: the packed lines are read as other records; try again")
        if (source / TEXT_CACHE).is_dir():
            shutil.copytree(source / TEXT_CACHE, folder / TEXT_CACHE)

    write_folder(out, fill, overwrite=overwrite)
    size = sum(path.stat().st_size for path in (out / PACK).iterdir())
    text = f"{len(usable)} records packed in {out} ({size / 2**20:.1f} MiB), each compared with its files"
    if not (out / TEXT_CACHE).is_dir():
        text += f"\nno cached text embeddings in {source}; --encode works on {out} too"
    return text if not faults else f"{text}\nleft out: {summarize(source, len(usable), faults)}"


def _write_parts(folder: Path, records: list[Record], lines: list[bytes], part_bytes: int, bar: Any) -> list[PackPart]:
    parts: list[PackPart] = []
    writer: Any = None
    count = size = 0

    def close() -> None:
        nonlocal writer, count, size
        writer.close()
        part = PackPart(f"part-{len(parts):05d}", count, 0)
        parts.append(PackPart(part.name, count, part.path(folder).stat().st_size))
        writer, count, size = None, 0, 0

    for record, line in zip(records, lines, strict=True):
        if writer is None:
            path = PackPart(f"part-{len(parts):05d}", 0, 0).path(folder)
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # pictures are compressed already
        entry = pack_entry(record.image.read_bytes(), record.mask.read_bytes(), line)
        writer.write(entry)
        count, size = count + 1, size + len(entry)
        bar.update(1)
        if size >= part_bytes:
            close()
    if writer is not None:
        close()
    return parts
