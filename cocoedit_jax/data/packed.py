"""Packed data folders: the files that metadata.jsonl names lie in a few large ArrayRecord files.

DIR/metadata.jsonl is as in any data folder, one record on each line. DIR/packed/ holds `header.json` (format, parts,
hash of metadata.jsonl) and `part-00000.array_record`, ...; entry n, counted over all parts, belongs to line n + 1 and
is the bytes of a safetensors file with `image` and `mask` (the files as they were, byte by byte) and `record` (the
line).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import write_json

PACK = "packed"  # folder beside metadata.jsonl
HEADER = "header.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackPart:
    """One file: its name without suffix, entries in it, and its size in bytes."""

    name: str
    count: int
    bytes: int

    def path(self, root: Path) -> Path:
        return root / PACK / f"{self.name}.array_record"


class Pack:
    """The files of a packed folder; safe to share between threads.

    Raises:
        UserError: header or parts are damaged, or metadata.jsonl is not the one that was packed.
    """

    def __init__(self, root: Path, metadata: Path):
        path = root / PACK / HEADER
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["format_version"] != FORMAT_VERSION:
                raise UserError(f"{path}: format_version {header['format_version']!r}, expected {FORMAT_VERSION}")
            self.parts = tuple(PackPart(**part) for part in header["parts"])
            expected = header["metadata_sha256"]
            if not all(type(n) is int and n > 0 for part in self.parts for n in (part.count, part.bytes)):
                raise ValueError("sizes of parts")
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the header of a packed folder ({error!r}); pack it again") from error
        problems = []
        for part in self.parts:
            file = part.path(root)
            size = file.stat().st_size if file.is_file() else None
            if size != part.bytes:
                problems.append(f"{file}: {'no such file' if size is None else f'{size} bytes'}, expected {part.bytes}")
        if hashlib.sha256(metadata.read_bytes()).hexdigest() != expected:
            problems.append(f"{metadata}: changed since it was packed; its lines no longer fit {root / PACK}")
        if problems:
            raise UserError("\n".join(problems))
        import grain  # takes seconds to load, and few commands need it

        self._root = root
        self._ends = list(itertools.accumulate(part.count for part in self.parts))
        # With the counts given, files are opened when they are first read.
        self._source = grain.sources.ArrayRecordDataSource(
            [f"{part.path(root)}[0:{part.count}]" for part in self.parts]
        )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, position: int) -> dict[str, bytes]:
        """`image`, `mask` and `record` of an entry. Raises UserError when it is damaged."""
        try:
            return unpack_entry(self._source[position])
        except Exception as error:  # the readers' own errors are bare RuntimeErrors and the like
            part = self.parts[bisect_right(self._ends, position)]
            raise UserError(f"{part.path(self._root)}: damaged ({error}); pack the folder again") from error

    def entry(self, position: int) -> PackedEntry:
        return PackedEntry(self, position)


@dataclass(frozen=True)
class PackedEntry:
    """One entry, read once, when it is needed."""

    pack: Pack
    position: int

    @cached_property
    def content(self) -> dict[str, bytes]:
        return self.pack.read(self.position)

    def file(self, role: str, name: str) -> PackedFile:
        return PackedFile(self, role, name)


@dataclass(frozen=True)
class PackedFile:
    """An `images.ImageFile`; `role` is "image" or "mask", `name` that of the file it was."""

    entry: PackedEntry
    role: str
    name: str

    def is_file(self) -> bool:
        return True

    def read_bytes(self) -> bytes:
        return self.entry.content[self.role]

    def __str__(self) -> str:
        return f"{self.name} (packed)"


def is_packed(root: Path) -> bool:
    return (root / PACK / HEADER).is_file()


def write_header(root: Path, parts: Sequence[PackPart], metadata: bytes) -> None:
    header = {"format_version": FORMAT_VERSION, "count": sum(part.count for part in parts)}
    digest = hashlib.sha256(metadata).hexdigest()
    write_json(root / PACK / HEADER, header | {"metadata_sha256": digest, "parts": [asdict(part) for part in parts]})


def pack_entry(image: bytes, mask: bytes, record: bytes) -> bytes:
    fields: dict[str, bytes] = {"image": image, "mask": mask, "record": record}
    return save({name: np.frombuffer(data, np.uint8) for name, data in fields.items()})


def unpack_entry(entry: bytes) -> dict[str, bytes]:
    """Inverse of `pack_entry`. Raises anything when the bytes are damaged."""
    stored: dict[str, Any] = dict(safetensors.deserialize(entry))
    return {name: bytes(stored[name]["data"]) for name in ("image", "mask", "record")}
