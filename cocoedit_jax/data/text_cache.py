"""Text embeddings of a data folder: computed once, read back without the encoders.

DIR/text_cache/flux-128/ (`text_kind` has the names) holds `header.json` (format, kind, encoder identity, sizes, list of
parts) and for each part `part-00000.array_record` (per entry the bytes of a safetensors file with `text` [L, D],
`key`, and `pooled` [P] where the encoder makes one) and `part-00000.keys.npy` (per entry in order its key, a hash of
the picture that the encoder saw, and L). A part counts from the moment header.json names it, so a job killed at
any time leaves a whole cache, and what else it left is overwritten by the next one. Of two entries with one key the
later one counts.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import grain
import numpy as np

from cocoedit_jax.data.text_identity import checked_identity, describe_difference
from cocoedit_jax.data.text_kind import TextKind
from cocoedit_jax.data.text_record import (
    DTYPES,
    ENTRY_BYTES,
    LENGTH_MULTIPLE,
    Asked,
    Entry,
    Row,
    describe,
    entry_key,
    picture_digest,
    stack_rows,
    unpack_record,
)
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import write_json

HEADER = "header.json"
FORMAT_VERSION = 2
_PART_NAME = re.compile(r"part-(\d{5,})")


@dataclass(frozen=True)
class Part:
    """One file of embeddings: its name without suffix, entries in it, and its size in bytes."""

    name: str
    count: int
    bytes: int

    def records(self, folder: Path) -> Path:
        return folder / f"{self.name}.array_record"

    def keys(self, folder: Path) -> Path:
        return folder / f"{self.name}.keys.npy"

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the files as far as their sizes tell; records are checked when they are read."""
        path = self.records(folder)
        if not path.is_file():
            return f"{path}: no such file, though {HEADER} names it"
        if (size := path.stat().st_size) != self.bytes:
            return f"{path}: damaged: {size} bytes, expected {self.bytes}"
        try:
            self.read_keys(folder)
        except UserError as error:
            return str(error)
        return None

    def read_keys(self, folder: Path) -> list[Entry]:
        """What is known of each entry in order. Raises UserError when the file is damaged."""
        path, shape = self.keys(folder), (self.count, ENTRY_BYTES)
        try:
            keys = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged: {error}") from error
        if keys.dtype != np.uint8 or keys.shape != shape:
            raise UserError(f"{path}: damaged: {keys.dtype} {keys.shape}, expected uint8 {shape}")
        return [Entry.unpack(row.tobytes()) for row in keys]


@dataclass(frozen=True)
class Header:
    """What header.json says. `features` is D, `pooled_features` P (0: none); `dtype` is a key of `DTYPES`."""

    kind: TextKind
    identity: Mapping[str, Any]
    features: int
    pooled_features: int
    dtype: str
    parts: tuple[Part, ...] = ()

    def write(self, folder: Path) -> None:
        count = sum(part.count for part in self.parts)
        write_json(folder / HEADER, {"format_version": FORMAT_VERSION, "count": count, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Header | None:
        """None where there is no header. Raises UserError when it is not one of this format."""
        path = folder / HEADER
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format_version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format_version {value['format_version']!r}, expected {FORMAT_VERSION}; "
                    f"delete {folder} and encode again"
                )
            sizes = {name: value[name] for name in ("features", "pooled_features")}
            parts = tuple(Part(**part) for part in value["parts"])
            numbers = [sizes["features"], *(number for part in parts for number in (part.count, part.bytes))]
            numbers.append(sizes["pooled_features"] or 1)
            names = [part.name for part in parts]
            if not all(type(number) is int and number > 0 for number in numbers) or value["dtype"] not in DTYPES:
                raise ValueError("sizes or dtype")
            if len(set(names)) < len(names) or not all(_PART_NAME.fullmatch(name) for name in names):
                raise ValueError("names of parts")
            kind = TextKind(**value["kind"])
            identity = checked_identity(value["identity"], f"{path}: identity")
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the header of a text cache ({error!r})") from error
        return cls(kind, identity, dtype=value["dtype"], parts=parts, **sizes)

    def check_row(self, row: Row) -> None:
        """Raises ValueError when shapes or dtypes of an entry are not those of this cache."""
        shapes: dict[str, tuple[int, ...]] = {"text": (self.kind.max_length or len(row["text"]), self.features)}
        if self.pooled_features:
            shapes["pooled"] = (self.pooled_features,)
        for name, shape in shapes.items():
            array = row[name]
            if array.shape != shape or array.dtype.name != self.dtype or not array.size:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, expected {self.dtype} {shape}")

    def refuse_other(self, folder: Path, kind: TextKind, identity: Mapping[str, Any] | None, dtype: str | None) -> None:
        """Raises UserError naming everything in which this cache differs from what is expected (None: anything)."""
        problems = []
        if identity is not None and (difference := describe_difference(self.identity, identity)):
            problems.append(f"made by text encoder {difference}")
        for name in (field.name for field in fields(kind)):
            found, expected = getattr(self.kind, name), getattr(kind, name)
            if found != expected:
                problems.append(f"{name} {found}, expected {expected}")
        if dtype not in (None, self.dtype):
            problems.append(f"dtype {self.dtype}, expected {dtype}")
        if problems:
            raise UserError(f"{folder}: {'; '.join(problems)}")


class TextCache:
    """Embeddings of instructions; safe to share between threads.

    Args:
        data_dir: the data folder.
        kind: which of its caches.
        expected_identity: of the model's text encoders (`text_identity`); None accepts any.
        length_multiple, fixed_length: see `pad_states`; for kinds whose entries differ in length.
        min_bucket_records: see `TextKind.command`, which messages name.

    Raises:
        UserError: there is no cache, it was made by other encoders or is of another kind, or parts are damaged.
    """

    def __init__(
        self,
        data_dir: Path | str,
        kind: TextKind,
        expected_identity: Mapping[str, Any] | None = None,
        *,
        length_multiple: int = LENGTH_MULTIPLE,
        fixed_length: int | None = None,
        min_bucket_records: int = 1,
    ):
        self.folder = kind.folder(data_dir)
        self.kind = kind
        self.command = kind.command(data_dir, min_bucket_records)
        self._length_multiple, self._fixed_length = length_multiple, fixed_length
        header = Header.read(self.folder)
        if header is None or not header.parts:
            raise UserError(f"{self.folder}: no text cache; make it with: {self.command}")
        header.refuse_other(self.folder, kind, expected_identity, None)
        self.header = header
        damaged = [damage for part in header.parts if (damage := part.damage(self.folder))]
        if damaged:
            raise UserError("\n".join([*damaged, f"make them again with: {self.command}"]))
        entries = [entry for part in header.parts for entry in part.read_keys(self.folder)]
        self._index = {entry.key: position for position, entry in enumerate(entries)}
        self._entries = entries
        self._ends = list(itertools.accumulate(part.count for part in header.parts))
        # With the counts given, files are opened when they are first read.
        self._source = grain.sources.ArrayRecordDataSource(
            [f"{part.records(self.folder)}[0:{part.count}]" for part in header.parts]
        )

    def check_encoders(self, identity: Mapping[str, Any]) -> None:
        """Raises UserError when it was made by other encoders than those of `identity` (`text_identity`)."""
        self.header.refuse_other(self.folder, self.kind, identity, None)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, asked: Asked) -> bool:
        """Whether there is an entry; pictures are not compared."""
        return entry_key(self.kind, asked) in self._index

    def describe_cuts(self) -> str | None:
        """How many entries `fixed_length` cuts; None if none."""
        lengths = [self._entries[position].length for position in self._index.values()]
        limit = self._fixed_length
        if limit is None or max(lengths) <= limit:
            return None
        cut = sum(length > limit for length in lengths)
        return f"{self.folder}: {cut} of {len(lengths)} are cut to {limit} states; the longest has {max(lengths)}"

    def lengths(self, instructions: Iterable[Asked]) -> list[int]:
        """States of each of `instructions` before they are padded or cut. Raises UserError, see `check`."""
        asked = list(instructions)
        self.check(asked)
        return [self._entries[self._index[entry_key(self.kind, one)]].length for one in asked]

    def check(self, instructions: Iterable[Asked]) -> None:
        """Raises UserError when any of `instructions` is not in the cache, or, as far as pixels are given, was encoded
        with another picture: how many, the first few, and what to do."""
        missing, changed = {}, {}
        for key, asked in self._distinct(instructions).items():
            if key not in self._index:
                missing[describe(self.kind, asked)] = None
            elif self.kind.sees_pictures and asked.pixels is not None:
                if picture_digest(self.kind, asked) != self._entries[self._index[key]].picture:
                    changed[asked.image] = None
        problems = []
        for names, what in (
            (missing, "instruction(s) not in the text cache"),
            (changed, "picture(s) changed, or are framed otherwise, since the text was encoded"),
        ):
            if names:
                problems.append(f"{len(names)} {what}: {', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''}")
        if problems:
            raise UserError(f"{self.folder}: {'; '.join(problems)}; encode them with: {self.command}")

    def __call__(self, instructions: Sequence[Asked]) -> dict[str, np.ndarray]:
        """A batch of entries in the cache's dtype, see `stack_rows`. Raises UserError, see `check`."""
        if not instructions:
            raise UserError("instructions: none given, expected at least one")
        self.check(instructions)
        read = {key: self._read(key) for key in self._distinct(instructions)}
        rows = [read[entry_key(self.kind, asked)] for asked in instructions]
        return stack_rows(self.kind, rows, self._length_multiple, self._fixed_length)

    def _distinct(self, instructions: Iterable[Asked]) -> dict[bytes, Asked]:
        return {entry_key(self.kind, asked): asked for asked in instructions}

    def _read(self, key: bytes) -> dict[str, np.ndarray]:
        position, header = self._index[key], self.header
        try:
            row = unpack_record(self._source[position])
            if row["key"].tobytes() != key:
                raise ValueError("record of another instruction")
            header.check_row(row)
        except Exception as error:  # the readers' own errors are bare RuntimeErrors and the like
            path = header.parts[bisect.bisect_right(self._ends, position)].records(self.folder)
            raise UserError(f"{path}: damaged ({error}); delete it, then run: {self.command}") from error
        return row
