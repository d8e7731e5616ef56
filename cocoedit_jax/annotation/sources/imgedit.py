"""ImgEdit: manifests with instructions and paths, pictures in tar archives that are cut into pieces.

The release (README of PKU-YuanGroup/ImgEdit) holds Parquet/add_part0.parquet, ... with the columns input_images,
output_images (lists of paths) and prompt, or, for several turns, `data`, a list of such rows; the pictures lie in
Singleturn/NAME.tar.split.000, ... and Multiturn/. The same rows as .json (a list) or .jsonl are read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cocoedit_jax.annotation.sources import release
from cocoedit_jax.data.archives import Archive, Member, find_archives, find_by_suffix, unpack
from cocoedit_jax.data.prepare import place_file, resume_folder
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

LAYOUT = (
    "manifests (*.parquet, *.json, *.jsonl, also in Parquet/) with input_images and prompt, beside pictures or .tar"
    " archives, whole or in pieces (.tar.split.000, ...), also in Singleturn/ and Multiturn/"
)
_FOLDERS = (".", "Singleturn", "Multiturn")
_KINDS = (".parquet", ".json", ".jsonl")
# The rows of hybrid_part*.parquet say results_compose..., the archives results_hybrid...
_RENAMED = ("results_compose", "results_hybrid")


@dataclass(frozen=True)
class Row:
    manifest: str
    number: int
    image: str
    prompt: str

    @property
    def edit_type(self) -> str | None:
        match = re.match(r"([a-z_]+?)_?part\d+", self.manifest)
        return match[1] if match else None


def manifests(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in _KINDS else []
    found = [p for folder in (path, path / "Parquet") if folder.is_dir() for p in folder.iterdir()]
    return sorted(p for p in found if p.suffix in _KINDS and not p.name.startswith((".", "all_dataset")))


def unpack_imgedit(source: Path, out: Path, *, partial: bool = False, overwrite: bool = False) -> str:
    """Writes the source pictures and prompts.jsonl to `out`; returns a summary. Rows with several inputs are left out,
    as are all turns but the first, whose pictures a model made.

    Args:
        partial: leave out rows whose picture is not there, instead of refusing; for downloads of some archives.

    Raises:
        UserError: nothing to read, damaged files, names that lead out of the folder, or pictures are missing.
    """
    root = source if source.is_dir() else source.parent
    paths = manifests(source)
    if not paths:
        raise UserError(f"{source}: no ImgEdit here, expected {LAYOUT}")
    archives = [archive for folder in _FOLDERS for archive in find_archives(root / folder, "tar")]
    rows, left_out, used = [], [], []
    for path in paths:
        before = len(rows) + len(left_out)
        for made in _rows(path):
            (rows if isinstance(made, Row) else left_out).append(made)
        if len(rows) + len(left_out) > before:
            used.append(path.stem)
    if not rows:
        raise UserError(f"{source}: no row that can be used in {', '.join(p.name for p in paths)}; expected {LAYOUT}")
    summary = ""

    def fill(folder: Path) -> None:
        nonlocal summary
        there = _collect(root, archives, sorted({row.image for row in rows}), folder / "images")
        missing = [row for row in rows if row.image not in there]
        if missing and not (partial and len(missing) < len(rows)):
            names = ", ".join(row.image for row in missing[:3])
            raise UserError(
                f"{root}: the pictures of {len(missing)} of {len(rows)} rows are neither there nor in the"
                f" {len(archives)} tar archives: {names}{', ...' if len(missing) > 3 else ''}; download the archives"
                " they are in, or leave these rows out with --partial"
            )
        gone = {id(row) for row in missing}
        for name in used:
            mine = [row for row in rows if row.manifest == name]
            absent = [_left(row.manifest, row.number, "picture not there") for row in mine if id(row) in gone]
            kept = [_line(row) for row in mine if id(row) not in gone]
            release.write_part(folder, name, kept, [r for r in left_out if r["file"] == name] + absent)
        summary = release.join_parts(folder, used)

    resume_folder(out, fill, overwrite=overwrite)
    return f"{summary}\nin {out}"


def _left(manifest: str, number: int, reason: str) -> dict[str, Any]:
    return {"file": manifest, "row": number, "reason": reason}


def _line(row: Row) -> dict[str, Any]:
    return {
        "id": f"{row.manifest}-{row.number:06d}",
        "image": f"images/{row.image}",
        "prompt": row.prompt,
        "edit_type": row.edit_type,
        "source": "ImgEdit",
    }


def _raw_rows(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            file = release.opened(path)
            wanted = [name for name in ("input_images", "prompt", "data") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        else:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            yield from content if isinstance(content, list) else [content]
    except UserError:
        raise
    except Exception as error:  # pyarrow's own, and what json raises
        raise UserError(f"{path}: cannot be read ({error})") from error


def _rows(path: Path) -> Iterator[Row | dict[str, Any]]:
    for number, raw in enumerate(_raw_rows(path)):
        turns = raw.get("data") if isinstance(raw, dict) else None
        row = turns[0] if isinstance(turns, list) and turns else raw
        inputs = row.get("input_images") if isinstance(row, dict) else None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        inputs = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(inputs, list) or not inputs or not all(isinstance(name, str) and name for name in inputs):
            yield _left(path.stem, number, "no input_images")
        elif len(inputs) > 1:
            yield _left(path.stem, number, "several input pictures")
        elif not isinstance(prompt, str) or not prompt.strip():
            yield _left(path.stem, number, "no prompt")
        else:
            yield Row(path.stem, number, _safe(inputs[0], path, number), prompt.strip())


def _safe(name: str, path: Path, number: int) -> str:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts or "\0" in name:
        raise UserError(f"{path} row {number}: input_images {name!r} leads out of the folder")
    return PurePosixPath(name).as_posix()


def _collect(root: Path, archives: list[Archive], wanted: list[str], target: Path) -> set[str]:
    """Brings the pictures into `target`: hard links or copies of those that lie open, the others from archives."""
    there = set()
    for name in wanted:
        found = next((p for f in _FOLDERS for p in _spellings(root / f, name) if p.is_file()), None)
        if (target / name).is_file():
            there.add(name)
        elif found is not None and found.resolve().is_relative_to(root.resolve()):
            place_file(found, target / name)
            there.add(name)
    find = _finder(wanted)
    with progress(len(wanted), "unpack", "picture", initial=len(there)) as bar:
        for archive in archives:
            if len(there) == len(wanted):
                break

            def place(member: Member) -> Path | None:
                name = find(member.name)
                return target / name if name is not None else None

            def done(member: Member, fresh: bool) -> None:
                name = find(member.name)
                if name is not None and name not in there:
                    there.add(name)
                    bar.update(1)

            unpack(archive, place, done=done)
    return there


def _spellings(folder: Path, name: str) -> tuple[Path, ...]:
    return (folder / name, folder / name.replace(*_RENAMED)) if name.startswith(_RENAMED[0]) else (folder / name,)


def _finder(wanted: list[str]) -> Callable[[str], str | None]:
    find = find_by_suffix(wanted)
    renamed = {name.replace(*_RENAMED): name for name in wanted if name.startswith(_RENAMED[0])}
    return lambda member: find(member) or renamed.get(member.removeprefix("./"))
