"""Writing the text cache: in parts, so that a killed job goes on where it stopped (`text_cache` has the format)."""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cocoedit_jax.data.text_cache import HEADER, Header, Part
from cocoedit_jax.data.text_kind import TextKind
from cocoedit_jax.data.text_record import (
    ENTRY_BYTES,
    Asked,
    Entry,
    Row,
    describe,
    entry_key,
    pack_record,
    picture_digest,
)
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

A = TypeVar("A", bound=Asked)
Load = Callable[[A], A]  # an instruction with its pixels


class TextCacheWriter:
    """Adds embeddings to a cache, one process at a time; a context manager. Leaving it keeps all that was added, also
    after an exception.

    Args:
        data_dir, kind: the data folder, and which of its caches.
        identity: of the encoders, see `text_identity`.
        dtype: a key of `DTYPES`; None is the cache's own, or that of the first embeddings.
        part_entries, part_seconds: a part is closed when it has as many entries or is as old; a killed job loses the
            part it was writing.

    Attributes:
        notes: what was found and repaired on opening, for the log: damaged parts, whose entries are missing again.

    Raises:
        UserError: the cache was made by other encoders, is of another kind or dtype, or another process writes it.
    """

    def __init__(
        self,
        data_dir: Path | str,
        kind: TextKind,
        identity: Mapping[str, Any],
        dtype: str | None = None,
        *,
        part_entries: int = 512,
        part_seconds: float = 300.0,
    ):
        self.folder = kind.folder(data_dir)
        self.kind = kind
        self._identity, self._dtype = identity, dtype
        self._part_entries, self._part_seconds = part_entries, part_seconds
        self._header: Header | None = None
        self._cached: dict[bytes, bytes] = {}  # keys and digests of pictures
        self._writer: Any = None
        self._new: list[Entry] = []
        self._since = 0.0
        self.notes: list[str] = []

    def __enter__(self) -> TextCacheWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error}") from error
        try:
            self._take_over()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._close_part()
        finally:
            self._lock.close()

    @property
    def dtype(self) -> str | None:
        """The cache's dtype; None while that is open."""
        return self._header.dtype if self._header else self._dtype

    def remaining(self, instructions: Iterable[A], load: Load[A] | None = None) -> list[A]:
        """Distinct `instructions` that are not in the cache or, if they can be loaded, were encoded with another
        picture, in order. Pictures are compared in threads, with a progress bar."""
        distinct = {entry_key(self.kind, asked): asked for asked in instructions}
        known = {key: asked for key, asked in distinct.items() if key in self._cached}
        changed = set()
        if known and load is not None:

            def differs(key: bytes) -> bool:
                return picture_digest(self.kind, load(known[key])) != self._cached[key]

            with ThreadPoolExecutor() as pool, progress(len(known), "compare pictures", "picture") as bar:
                for key, other in zip(known, pool.map(differs, known), strict=True):
                    changed.update([key] if other else [])
                    bar.update()
        return [asked for key, asked in distinct.items() if key not in known or key in changed]

    def add(self, instructions: Sequence[Asked], rows: Sequence[Row]) -> None:
        """Adds or replaces the entries of `instructions`, with pixels where the encoder saw them.

        Raises:
            UserError: values are not finite, or the disk is full.
            ValueError: shapes or dtype do not fit.
        """
        self._check(instructions, rows)
        for asked, row in zip(instructions, rows, strict=True):
            entry = Entry(entry_key(self.kind, asked), picture_digest(self.kind, asked), len(row["text"]))
            if self._cached.get(entry.key) != entry.picture:
                self._append(entry, pack_record(entry.key, row))
            if len(self._new) >= self._part_entries or time.monotonic() - self._since > self._part_seconds:
                self._close_part()

    def _take_over(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder}: another process is writing this text cache; wait for it") from error
        for leftover in self.folder.glob("part-*.tmp"):
            leftover.unlink()
        header = Header.read(self.folder)
        if header is None:
            if len(list(self.folder.glob("part-*.array_record"))) > 1:  # a first run can leave one
                raise UserError(f"{self.folder}: has parts but no {HEADER}; restore it or delete the folder")
            return
        header.refuse_other(self.folder, self.kind, self._identity, self._dtype)
        whole, damaged = [], []
        for part in header.parts:
            if damage := part.damage(self.folder):
                damaged.append(part)
                self.notes.append(f"{damage}; its {part.count} entries are encoded again")
            else:
                whole.append(part)
                self._cached.update((entry.key, entry.picture) for entry in part.read_keys(self.folder))
        self._header = replace(header, parts=tuple(whole))
        if damaged:
            self._header.write(self.folder)
            for part in damaged:
                part.records(self.folder).unlink(missing_ok=True)
                part.keys(self.folder).unlink(missing_ok=True)

    def _check(self, instructions: Sequence[Asked], rows: Sequence[Row]) -> None:
        if self._header is None:
            text, pooled = rows[0]["text"], rows[0].get("pooled")
            dtype, width = self._dtype or text.dtype.name, 0 if pooled is None else len(pooled)
            self._header = Header(self.kind, self._identity, text.shape[-1], width, dtype)
        for asked, row in zip(instructions, rows, strict=True):
            self._header.check_row(row)
            bad = [name for name, array in row.items() if not np.isfinite(array).all()]
            if bad:
                what = describe(self.kind, asked)
                dtype = self._header.dtype
                raise UserError(f"{bad[0]} embedding of {what} is not finite in {dtype}; try another dtype")

    @property
    def _part_path(self) -> Path:
        """The part being written. Its number follows the listed ones: an unlisted file of that name is a leftover."""
        parts = self._header.parts if self._header else ()
        number = 1 + max((int(part.name.removeprefix("part-")) for part in parts), default=-1)
        return self.folder / f"part-{number:05d}.array_record"

    def _append(self, entry: Entry, record: bytes) -> None:
        try:
            if self._writer is None:
                # group_size:1 is what random access needs; floats hardly compress.
                self._writer = ArrayRecordWriter(f"{self._part_path}.tmp", "group_size:1,uncompressed")
                self._since = time.monotonic()
            self._writer.write(record)
        except (OSError, RuntimeError) as error:
            self._forget(self._new)
            self._writer, self._new = None, []
            raise UserError(f"{self._part_path}.tmp: cannot be written: {error}") from error
        self._new.append(entry)
        self._cached[entry.key] = entry.picture

    def _forget(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._cached.pop(entry.key, None)

    def _close_part(self) -> None:
        if self._writer is None or self._header is None:
            return
        path, keys, writer = self._part_path, self._new, self._writer
        draft = path.with_name(path.name + ".tmp")
        self._writer, self._new = None, []
        try:
            writer.close()
            if not keys:
                draft.unlink()
                return
            reader = ArrayRecordReader(str(draft))
            written = reader.num_records()  # 0 when the file is not whole
            reader.close()
            # An interrupt between writing a record and noting its key leaves one record too many.
            part = Part(path.name.removesuffix(".array_record"), min(written, len(keys)), draft.stat().st_size)
            if written < len(keys):
                raise OSError(f"{written} of {len(keys)} records arrived")
            keys_draft = part.keys(self.folder).with_suffix(".tmp")
            with keys_draft.open("wb") as file:
                np.save(
                    file,
                    np.frombuffer(b"".join(entry.pack() for entry in keys), np.uint8).reshape(-1, ENTRY_BYTES),
                    allow_pickle=False,
                )
            for source, target in ((keys_draft, part.keys(self.folder)), (draft, path)):
                with source.open("rb") as file:
                    os.fsync(file.fileno())
                source.replace(target)
            header = replace(self._header, parts=(*self._header.parts, part))
            header.write(self.folder)
        except (OSError, RuntimeError) as error:
            self._forget(keys)
            raise UserError(f"{draft}: cannot be written: {error}") from error
        self._header = header


def fill(
    writer: TextCacheWriter,
    instructions: Iterable[A],
    encode: Callable[[list[A]], Sequence[Row]],
    batch_size: int,
    load: Load[A] | None = None,
    *,
    remaining: Sequence[A] | None = None,
) -> int:
    """Encodes the distinct `instructions` that are not cached, `batch_size` at a time, with a progress bar; returns
    their number.

    Args:
        load: gives an instruction its pixels, where the encoder sees them; called in threads, ahead of the encoder.
        remaining: `writer.remaining(instructions, load)`, where the caller has it.
    """
    total = len({entry_key(writer.kind, asked) for asked in instructions})
    todo = writer.remaining(instructions, load) if remaining is None else remaining
    with (
        ThreadPoolExecutor() as pool,
        progress(total, "encode text", unit=" instructions", initial=total - len(todo)) as bar,
    ):
        loaded = iter(todo) if load is None else _ahead(pool, load, todo, 2 * batch_size)
        for start in range(0, len(todo), batch_size):
            batch = [next(loaded) for _ in todo[start : start + batch_size]]
            writer.add(batch, encode(batch))
            bar.update(len(batch))
    return len(todo)


def _ahead(pool: ThreadPoolExecutor, load: Load[A], items: Iterable[A], depth: int) -> Iterator[A]:
    """`load` of each item in order, at most `depth` ahead: pictures of all of them would not fit into memory."""
    waiting: deque[Future[A]] = deque()
    for item in items:
        waiting.append(pool.submit(load, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
