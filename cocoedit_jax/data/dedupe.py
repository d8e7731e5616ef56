"""A data folder without repeated records, whose pictures that look the same say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cocoedit_jax.data.duplicates import THRESHOLD, find_duplicates, fingerprints, same_picture
from cocoedit_jax.data.prepare import place_file, write_folder
from cocoedit_jax.data.records import METADATA, TEXT_CACHE, bare_line, metadata_lines, read_metadata, summarize
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

DUPLICATES = "duplicates.jsonl"


def dedupe_folder(
    source: Path | str, out: Path | str, *, threshold: int | None = THRESHOLD, overwrite: bool = False
) -> str:
    """Writes the data folder `source` to `out` without records that repeat an earlier picture and instruction (see
    `duplicates.find_duplicates`), and returns a summary.

    Records of pictures that look the same, but whose files differ, get the field `source_group`, so that a split keeps
    them on one side. duplicates.jsonl lists what was left out. Files are hard links where the file system has them.

    Raises:
        UserError: `source` has lines that cannot be used (check it first), or `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    records, faults = read_metadata(source)
    if faults or not records:
        raise UserError(summarize(source, len(records), faults) if faults else f"{source / METADATA}: empty file")
    with progress(len(records), "compare", "picture") as bar:
        prints = fingerprints([record.files()[0] for record in records], done=lambda: bar.update(1))
    unread = [record.line for record, found in zip(records, prints, strict=True) if found is None]
    if unread:
        raise UserError(
            f"{source / METADATA}: {len(unread)} pictures cannot be read, on lines {', '.join(map(str, unread[:10]))}"
            f"{', ...' if len(unread) > 10 else ''}; --check={source} says why"
        )
    repeated = {d.index: d for d in find_duplicates(prints, [r.prompt for r in records], threshold=threshold)}
    first = same_picture(prints, threshold)
    hashes = [found.sha256 for found in prints if found is not None]
    # Only where bytes differ: equal files are known to be one source anyway.
    several = {root for index, root in enumerate(first) if hashes[index] != hashes[root]}
    lines = list(metadata_lines(source))

    def fill(folder: Path) -> None:
        with (folder / METADATA).open("wb") as metadata, (folder / DUPLICATES).open("w") as left:
            for index, record in enumerate(records):
                if index in repeated:
                    other = repeated[index]
                    gone = {"line": record.line, "id": record.id, "of_line": records[other.of].line}
                    left.write(json.dumps(gone | {"of_id": records[other.of].id, "exact": other.exact}) + "\n")
                    continue
                line = bare_line(lines[record.line - 1])
                if first[index] in several and "source_group" not in record.extra:
                    fields = json.loads(line) | {"source_group": hashes[first[index]]}
                    line = json.dumps(fields, ensure_ascii=True).encode()
                metadata.write(line + b"\n")
                for file, path in zip(record.files(), (record.image, record.mask), strict=True):
                    place_file(file, folder / path.relative_to(source))
        if (source / TEXT_CACHE).is_dir():
            shutil.copytree(source / TEXT_CACHE, folder / TEXT_CACHE)

    write_folder(out, fill, overwrite=overwrite)
    exact = sum(duplicate.exact for duplicate in repeated.values())
    return (
        f"{len(records) - len(repeated)} of {len(records)} records in {out}; left out {exact} exact and"
        f" {len(repeated) - exact} near duplicates; {len(set(first))} distinct pictures"
    )
