"""CoCoEdit-40K as released, unpacked to the folder that training reads.

The release holds metadata.jsonl, images_part1.zip_aa, images_part1.zip_ab, ... and masks_part1.zip, ...; the zips of
images are cut into pieces. Where inside the zips the files lie is not documented: they are found by the ends of their
paths.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from cocoedit_jax.data.archives import Archive, Member, find_archives, find_by_suffix, open_archive, unpack
from cocoedit_jax.data.prepare import resume_folder
from cocoedit_jax.data.records import METADATA, Record, metadata_lines, read_metadata, summarize
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

LAYOUT = "metadata.jsonl beside images_part*.zip and masks_part*.zip, whole or in pieces (.zip_aa, .zip_ab, ...)"


def is_release(folder: Path) -> bool:
    return (folder / METADATA).is_file() and any(_is_of_release(path.name) for path in folder.iterdir())


def _is_of_release(name: str) -> bool:
    return name.startswith(("images", "masks")) and ".zip" in name


def unpack_cocoedit(source: Path | str, out: Path | str, *, partial: bool = False, overwrite: bool = False) -> str:
    """Unpacks the images and masks that `source`/metadata.jsonl names into `out`; returns a summary.

    Everything that can be known beforehand is checked before the first file is written: pieces, the zips' directories,
    that they hold what the metadata name, room on the disk. CRCs are checked while unpacking. Until it is complete the
    work lies in `.NAME.partial` beside `out`; the same call continues there.

    Args:
        partial: leave out records whose image or mask is in no zip, instead of refusing.
        overwrite: replace a data folder at `out`.

    Raises:
        UserError: any of that is wrong.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir() or not is_release(source):
        raise UserError(f"{source}: not CoCoEdit-40K as released, expected {LAYOUT}")
    records, faults = read_metadata(source)
    if not records:
        raise UserError(summarize(source, 0, faults))
    wanted = {
        "images": {str(record.image.relative_to(source)) for record in records},
        "masks": {str(record.mask.relative_to(source)) for record in records},
    }
    plan, sizes = _plan(source, wanted)
    missing = sorted((wanted["images"] | wanted["masks"]) - set(sizes))
    complete = [record for record in records if not _needs(record, source) & set(missing)]
    if missing and not (partial and complete):
        raise UserError(
            f"{source}: {len(missing)} files that {METADATA} names are in none of the zips"
            f" {', '.join(archive.name for archive, _ in plan) or '(there are none)'}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; download the missing zips, or leave out the"
            f" {len(records) - len(complete)} records concerned with --partial"
        )
    needed = {name for record in complete for name in _needs(record, source)}

    def fill(folder: Path) -> None:
        there = {name for name in needed if _has(folder / name, sizes[name])}
        _check_room(folder, sum(sizes[name] for name in needed - there))
        with progress(len(needed), "unpack", "file", initial=len(there)) as bar:
            for archive, find in plan:
                names = {name for name in map(find, _names(archive)) if name in needed and name not in there}
                if not names:
                    continue

                def target(member: Member, find=find) -> Path | None:
                    name = find(member.name)
                    return folder / name if name in needed else None

                def done(member: Member, fresh: bool) -> None:
                    bar.update(int(fresh))

                unpack(archive, target, done=done)
        keep = {record.line for record in complete} | {fault.line for fault in faults}
        chosen = [line for number, line in enumerate(metadata_lines(source), start=1) if number in keep]
        (folder / METADATA).write_bytes(b"".join(chosen))

    resume_folder(out, fill, overwrite=overwrite)
    text = f"{len(complete)} records, {len(needed)} files in {out}"
    if len(complete) < len(records):
        text += f"\n{len(records) - len(complete)} records left out: their images or masks are in none of the zips"
    return text if not faults else f"{text}\n{summarize(source, len(records), faults)}"


def _needs(record: Record, root: Path) -> set[str]:
    return {str(record.image.relative_to(root)), str(record.mask.relative_to(root))}


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _directory(archive: Archive) -> list[zipfile.ZipInfo]:
    try:
        with open_archive(archive) as file, zipfile.ZipFile(file) as packed:
            return [entry for entry in packed.infolist() if not entry.is_dir()]
    except zipfile.BadZipFile as error:
        last = archive.pieces[-1]
        raise UserError(
            f"{archive.name}: its directory, which lies at the end, cannot be read ({error}): {last} is incomplete, or"
            " pieces after it are missing"
        ) from error


def _names(archive: Archive) -> list[str]:
    return [entry.filename for entry in _directory(archive)]


def _plan(
    source: Path, wanted: Mapping[str, set[str]]
) -> tuple[list[tuple[Archive, Callable[[str], str | None]]], dict[str, int]]:
    """The zips with the functions that name their files, and the size of every file that one of them holds."""
    plan, sizes, problems = [], {}, []
    for archive in find_archives(source, "zip"):
        kind = next((kind for kind in wanted if archive.name.startswith(kind)), None)
        if kind is None:
            continue
        find = find_by_suffix(sorted(wanted[kind]))
        try:
            entries = _directory(archive)
        except UserError as error:
            problems.append(str(error))
            continue
        for entry in entries:
            name = find(entry.filename)
            if name is not None and sizes.setdefault(name, entry.file_size) != entry.file_size:
                problems.append(f"{archive.name}: {entry.filename!r} is in another zip too, with another size")
        plan.append((archive, find))
    if problems:
        raise UserError("\n".join(problems))
    return plan, sizes


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on that disk")
