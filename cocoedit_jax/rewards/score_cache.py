"""Judgements on disk, by the content of what was judged: a resumed run does not pay for them again."""

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from cocoedit_jax.errors import UserError

_LOG = logging.getLogger(__name__)
FILE = "scores.jsonl"


class ScoreCache:
    """``{key: {name: number}}`` in FOLDER/scores.jsonl; thread-safe. Without a folder, in memory alone.

    One line is appended in one write for every entry, and a line that is cut off or damaged is passed over when the
    file is read, so it may be killed at any time.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, folder: str):
        self._entries: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()
        self._path = Path(folder).expanduser() / FILE if folder else None
        self._file: int | None = None
        try:
            if self._path is not None and self._path.exists():
                self._read(self._path.read_bytes())
        except OSError as error:
            raise UserError(f"cache_dir: {self._path} cannot be read ({error})") from error

    def open(self) -> None:
        """Makes sure that the file can be written. Raises UserError."""
        try:
            with self._lock:
                self._open()
        except OSError as error:
            raise UserError(f"cache_dir: {self._path} cannot be written ({error})") from error

    def _open(self) -> None:
        if self._path is None or self._file is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # the end of a line that a killed process did not write

    def _read(self, content: bytes) -> None:
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
                key, values = entry.pop("key"), {str(name): float(value) for name, value in entry.items()}
            except (AttributeError, KeyError, TypeError, ValueError):
                continue
            if isinstance(key, str) and 0.0 <= values.get("score", -1.0) <= 1.0:
                self._entries[key] = values

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> dict[str, float] | None:
        return self._entries.get(key)

    def put(self, key: str, values: Mapping[str, float]) -> None:
        """Keeps ``values``, numbers of which ``score`` in [0, 1] is one."""
        line = json.dumps({"key": key, **values}, allow_nan=False) + "\n"
        with self._lock:
            self._entries[key] = dict(values)
            try:
                self._open()
                if self._file is not None:
                    os.write(self._file, line.encode())
            except OSError as error:  # a full disk costs the cache, not the judgement
                _LOG.warning("%s: not written (%s)", self._path, error)

    def close(self) -> None:
        """Closes the file; ``put`` opens it again."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
