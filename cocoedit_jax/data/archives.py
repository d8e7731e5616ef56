"""Zip and tar archives that arrive in pieces: read as one file without joining them on disk, unpacked file by file.

Only files that are asked for are unpacked, each under a name that the caller chose; so no name inside an archive ever
becomes a path. A file appears complete or not at all, and one that is there already is not written again: an
interrupted call continues where it stopped.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from cocoedit_jax.errors import UserError

MAX_FILE_BYTES = 256 * 2**20  # of one unpacked file; far above any picture that training can use
MAX_RATIO = 200  # unpacked over packed size of a file above 1 MiB: pictures are compressed already
_RATIO_FROM = 2**20
_CHUNK = 2**20
# name.zip_aa (split -), name.tar.split.000, name.zip.001 (7z), name.tar.part0, name.tar.partaa
_PIECE = re.compile(r"(?P<name>.+\.(?:zip|tar))(?:_|\.|\.split\.|\.split|\.part)(?P<piece>[a-z]{2,4}|\d{1,5})")
_WHOLE = re.compile(r".+\.(?:zip|tar)")


@dataclass(frozen=True)
class Archive:
    """An archive by its name when whole, and the files that hold it, in order."""

    name: str
    pieces: tuple[Path, ...]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def size(self) -> int:
        return sum(piece.stat().st_size for piece in self.pieces)


def find_archives(folder: Path, kind: str) -> list[Archive]:
    """All archives of `kind` ("zip" or "tar") directly in `folder`, by name; one that is there whole and in pieces is
    taken whole.

    Raises:
        UserError: a piece is missing in the middle, or is shorter than those before it (an incomplete download); all
            such archives are named. A missing last piece shows when the archive is opened.
    """
    whole: dict[str, Path] = {}
    pieces: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_file():
            continue
        if _WHOLE.fullmatch(path.name):
            whole[path.name] = path
        elif match := _PIECE.fullmatch(path.name):
            pieces.setdefault(match["name"], {})[match["piece"]] = path
    found, problems = [], []
    for name in sorted({*whole, *pieces}):
        if not name.endswith(f".{kind}"):
            continue
        if name in whole:
            found.append(Archive(name, (whole[name],)))
            continue
        parts = pieces[name]
        order = sorted(parts, key=_piece_number)
        problems += _gaps(name, [parts[label] for label in order], order)
        found.append(Archive(name, tuple(parts[label] for label in order)))
    if problems:
        raise UserError("\n".join(f"{folder}: {problem}" for problem in problems))
    return found


def _piece_number(label: str) -> int:
    if label.isdigit():
        return int(label)
    number = 0
    for letter in label:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _gaps(name: str, paths: Sequence[Path], labels: Sequence[str]) -> list[str]:
    numbers = [_piece_number(label) for label in labels]
    first = 0 if not labels[0].isdigit() or numbers[0] == 0 else 1
    problems = []
    expected = list(range(first, first + len(numbers)))
    if numbers != expected:
        gap = next(want for want, have in zip(expected, numbers, strict=True) if want != have)
        after = labels[gap - first - 1] if gap > first else "the start"
        problems.append(f"{name}: a piece is missing after {after}; there are {', '.join(labels)}")
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths[1:-1], sizes[1:-1], strict=True):
        if size != sizes[0]:
            problems.append(f"{path.name}: {size} bytes, expected {sizes[0]} as the first piece; download it again")
    if len(sizes) > 1 and (sizes[-1] > sizes[0] or sizes[-1] == 0):
        problems.append(f"{paths[-1].name}: {sizes[-1]} bytes, expected 1 to {sizes[0]}; download the pieces again")
    return problems


class JoinedFile(io.RawIOBase):
    """Several files read as one, seekable; close it, or use it as a context manager."""

    def __init__(self, paths: Sequence[Path]):
        super().__init__()
        self._paths = tuple(paths)
        self._ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        self._position = 0
        self._open: tuple[int, IO[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        number = bisect_right(self._ends, self._position)
        if number == len(self._paths):
            return 0
        if self._open is None or self._open[0] != number:
            self._close_piece()
            self._open = (number, self._paths[number].open("rb"))
        file = self._open[1]
        start = self._ends[number - 1] if number else 0
        file.seek(self._position - start)
        view = memoryview(buffer)[: self._ends[number] - self._position]
        data = file.read(len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _close_piece(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        self._close_piece()
        super().close()


def open_archive(archive: Archive) -> io.BufferedReader:
    return io.BufferedReader(JoinedFile(archive.pieces), 2**16)


@dataclass(frozen=True)
class Member:
    """A regular file inside an archive. `packed` is 0 where the format does not compress."""

    name: str
    size: int
    packed: int = 0


def unpack(
    archive: Archive,
    target: Callable[[Member], Path | None],
    *,
    max_bytes: int = MAX_FILE_BYTES,
    done: Callable[[Member, bool], object] | None = None,
) -> int:
    """Writes the members for which `target` gives a path; returns how many were written anew.

    All of a zip's members are judged before the first is written; a tar is read once, in order. CRCs of zips are
    verified. `done(member, fresh)` is called for each member that is then there.

    Raises:
        UserError: the archive is damaged or incomplete, holds absolute names, "..", links or devices, or a wanted file
            is over `max_bytes` or expands more than `MAX_RATIO` times. What was written before stays.
    """
    reader = _zip_members if archive.kind == "zip" else _tar_members
    fresh = 0
    try:
        with open_archive(archive) as file:
            for member, stream in reader(archive, file, target, max_bytes):
                path = target(member)
                if path is None:
                    continue
                new = not (path.is_file() and path.stat().st_size == member.size)
                if new:
                    _write(path, stream, member, archive)
                    fresh += 1
                if done is not None:
                    done(member, new)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError: a password; NotImplementedError: a compression that Python has not.
        raise UserError(
            f"{archive.name} in {archive.pieces[0].parent}: damaged or incomplete ({error}); it was read from"
            f" {', '.join(piece.name for piece in archive.pieces)}; compare their sizes with the source's, and download"
            " what differs again"
        ) from error
    return fresh


Opened = Iterator[tuple[Member, Callable[[], IO[bytes]]]]


def _zip_members(archive: Archive, file: IO[bytes], target: Callable[[Member], Path | None], max_bytes: int) -> Opened:
    with zipfile.ZipFile(file) as packed:
        entries = [entry for entry in packed.infolist() if not entry.is_dir()]
        members = [Member(entry.filename, entry.file_size, entry.compress_size) for entry in entries]
        for entry, member in zip(entries, members, strict=True):
            link = entry.external_attr >> 16 & 0o170000 == 0o120000  # as Unix zips note symbolic links
            _refuse_hostile(archive, member, "a link" if link else None)
            if target(member) is not None:
                _refuse_large(archive, member, max_bytes)
        for entry, member in zip(entries, members, strict=True):
            yield member, lambda entry=entry: packed.open(entry)


def _tar_members(archive: Archive, file: IO[bytes], target: Callable[[Member], Path | None], max_bytes: int) -> Opened:
    with tarfile.open(fileobj=file, mode="r:") as packed:  # "r:": not compressed, so nothing expands
        for entry in packed:
            member = Member(entry.name, entry.size)
            odd = None if entry.isreg() or entry.isdir() else "a link or device"
            _refuse_hostile(archive, member, odd)
            packed.members = []  # pyright: ignore[reportAttributeAccessIssue]  # millions of them would fill the memory
            if not entry.isreg():
                continue
            if target(member) is not None:
                _refuse_large(archive, member, max_bytes)
            yield member, lambda entry=entry: _opened(packed, entry)


def _opened(packed: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    stream = packed.extractfile(entry)
    assert stream is not None  # it is a regular file
    return stream


def _refuse_hostile(archive: Archive, member: Member, odd: str | None) -> None:
    name = member.name
    windows = PureWindowsPath(name)
    parts = (*PurePosixPath(name).parts, *windows.parts)
    if name.startswith(("/", "\\")) or windows.drive or ".." in parts or "\0" in name:
        odd = "a name that leads out of the folder"
    if odd:
        raise UserError(
            f"{archive.name} in {archive.pieces[0].parent}: {name!r} is {odd}; no data set has such entries, so nothing"
            " more of this archive is unpacked"
        )


def _refuse_large(archive: Archive, member: Member, max_bytes: int) -> None:
    where = f"{archive.name} in {archive.pieces[0].parent}: {member.name!r}"
    if member.size > max_bytes:
        raise UserError(f"{where} has {member.size} bytes, expected at most {max_bytes} for a picture")
    if member.packed and member.size > _RATIO_FROM and member.size > MAX_RATIO * member.packed:
        raise UserError(
            f"{where} expands from {member.packed} to {member.size} bytes, more than {MAX_RATIO} times: refused as a"
            " decompression bomb"
        )


def _write(path: Path, opened: Callable[[], IO[bytes]], member: Member, archive: Archive) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with opened() as stream, draft.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)
        if (size := draft.stat().st_size) != member.size:
            raise EOFError(f"{member.name!r} ends after {size} of {member.size} bytes")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def find_by_suffix(names: Mapping[str, Any] | Sequence[str]) -> Callable[[str], str | None]:
    """A function from a path inside an archive to the one of `names` it stands for: the same path, or the only one
    that agrees with it in the most trailing parts (archives add or drop leading folders). None where there is none;
    a name that fits several equally well fits none.
    """
    exact = set(names)
    by_base: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        by_base.setdefault(parts[-1], []).append(parts)

    def find(member: str) -> str | None:
        clean = member.removeprefix("./")
        if clean in exact:
            return clean
        parts = PurePosixPath(clean).parts
        # One must be the tail of the other: masks/1.png is not images/1.png.
        fits = [n for n in by_base.get(parts[-1], []) if n[-len(parts) :] == parts or parts[-len(n) :] == n]
        return str(PurePosixPath(*fits[0])) if len(fits) == 1 else None

    return find
