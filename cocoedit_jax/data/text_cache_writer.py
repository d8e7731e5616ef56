"""Writing the text cache: in parts, so that a killed job goes on where it stopped (`text_cache` has the format)."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cocoedit_jax.data.text_cache import HEADER, KEY_BYTES, Header, Part, pack_record, prompt_key
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

Embeddings = tuple[np.ndarray, np.ndarray]  # text [B, S, D], pooled [B, P]


class TextCacheWriter:
    """Adds embeddings to a cache, one process at a time; a context manager. Leaving it keeps all that was added, also
    after an exception.

    Args:
        dtype: a key of `DTYPES`; None is the cache's own, or that of the first embeddings.
        part_prompts, part_seconds: a part is closed when it has as many prompts or is as old; a killed job loses the
            part it was writing.

    Attributes:
        notes: what was found and repaired on opening, for the log: damaged parts, whose prompts are missing again.

    Raises:
        UserError: the cache was made by other encoders, with another length or dtype, or another process writes it.
    """

    def __init__(
        self,
        folder: Path | str,
        identity: Mapping[str, Any],
        max_length: int,
        dtype: str | None = None,
        *,
        part_prompts: int = 512,
        part_seconds: float = 300.0,
    ):
        self._folder = Path(folder)
        self._identity, self._max_length, self._dtype = identity, max_length, dtype
        self._part_prompts, self._part_seconds = part_prompts, part_seconds
        self._header: Header | None = None
        self._cached: set[bytes] = set()
        self._writer: Any = None
        self._new: list[bytes] = []
        self._since = 0.0
        self.notes: list[str] = []

    def __enter__(self) -> TextCacheWriter:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written: {error}") from error
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

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Distinct `prompts` that are not in the cache, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt_key(prompt) not in self._cached]

    def add(self, prompts: Sequence[str], text: np.ndarray, pooled: np.ndarray) -> None:
        """Adds distinct new `prompts` with `text` [B, S, D] and `pooled` [B, P], both of the cache's dtype.

        Raises:
            UserError: values are not finite, or the disk is full.
            ValueError: shapes or dtype do not fit.
        """
        self._check(prompts, text, pooled)
        for prompt, states, vector in zip(prompts, text, pooled, strict=True):
            key = prompt_key(prompt)
            if key in self._cached:
                continue
            self._append(key, pack_record(key, states, vector))
            if len(self._new) >= self._part_prompts or time.monotonic() - self._since > self._part_seconds:
                self._close_part()

    def _take_over(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self._folder}: another process is writing this text cache; wait for it") from error
        for leftover in self._folder.glob("part-*.tmp"):
            leftover.unlink()
        header = Header.read(self._folder)
        if header is None:
            if len(list(self._folder.glob("part-*.array_record"))) > 1:  # a first run can leave one
                raise UserError(f"{self._folder}: has parts but no {HEADER}; restore it or delete the folder")
            return
        header.refuse_other(self._folder, self._identity, self._max_length, self._dtype)
        whole, damaged = [], []
        for part in header.parts:
            if damage := part.damage(self._folder):
                damaged.append(part)
                self.notes.append(f"{damage}; its {part.count} prompts are encoded again")
            else:
                whole.append(part)
                self._cached.update(part.read_keys(self._folder))
        self._header = replace(header, parts=tuple(whole))
        if damaged:
            self._header.write(self._folder)
            for part in damaged:
                part.records(self._folder).unlink(missing_ok=True)
                part.keys(self._folder).unlink(missing_ok=True)

    def _check(self, prompts: Sequence[str], text: np.ndarray, pooled: np.ndarray) -> None:
        if self._header is None:
            dtype = self._dtype or text.dtype.name
            self._header = Header(self._identity, self._max_length, text.shape[-1], pooled.shape[-1], dtype)
        header, batch = self._header, len(prompts)
        expected = {
            "text": (text, (batch, header.max_length, header.features)),
            "pooled": (pooled, (batch, header.pooled_features)),
        }
        for name, (array, shape) in expected.items():
            if array.shape != shape or array.dtype.name != header.dtype:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, expected {header.dtype} {shape}")
            bad = [prompt for prompt, row in zip(prompts, array, strict=True) if not np.isfinite(row).all()]
            if bad:
                raise UserError(f"{name} embedding of {bad[0]!r} is not finite in {header.dtype}; try another dtype")

    @property
    def _part_path(self) -> Path:
        """The part being written. Its number follows the listed ones: an unlisted file of that name is a leftover."""
        parts = self._header.parts if self._header else ()
        number = 1 + max((int(part.name.removeprefix("part-")) for part in parts), default=-1)
        return self._folder / f"part-{number:05d}.array_record"

    def _append(self, key: bytes, record: bytes) -> None:
        try:
            if self._writer is None:
                # group_size:1 is what random access needs; floats hardly compress.
                self._writer = ArrayRecordWriter(f"{self._part_path}.tmp", "group_size:1,uncompressed")
                self._since = time.monotonic()
            self._writer.write(record)
        except (OSError, RuntimeError) as error:
            self._cached.difference_update(self._new)
            self._writer, self._new = None, []
            raise UserError(f"{self._part_path}.tmp: cannot be written: {error}") from error
        self._new.append(key)
        self._cached.add(key)

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
            keys_draft = part.keys(self._folder).with_suffix(".tmp")
            with keys_draft.open("wb") as file:
                np.save(file, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES), allow_pickle=False)
            for source, target in ((keys_draft, part.keys(self._folder)), (draft, path)):
                with source.open("rb") as file:
                    os.fsync(file.fileno())
                source.replace(target)
            header = replace(self._header, parts=(*self._header.parts, part))
            header.write(self._folder)
        except (OSError, RuntimeError) as error:
            self._cached.difference_update(keys)
            raise UserError(f"{draft}: cannot be written: {error}") from error
        self._header = header


def fill(
    writer: TextCacheWriter, prompts: Iterable[str], encode: Callable[[list[str]], Embeddings], batch_size: int
) -> int:
    """Encodes the distinct `prompts` that are not cached, `batch_size` at a time, with a progress bar; returns their
    number."""
    distinct = list(dict.fromkeys(prompts))
    missing = writer.missing(distinct)
    with progress(len(distinct), "encoding prompts", unit=" prompts", initial=len(distinct) - len(missing)) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            writer.add(batch, *encode(batch))
            bar.update(len(batch))
    return len(missing)
