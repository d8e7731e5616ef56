"""The state of an annotation run on disk, safe against a kill at any point.

shards/NUMBER.jsonl holds the annotations of `shard_size` items in input order, each with the stage that it has reached.
A file is only ever replaced as a whole: written beside it, synced, renamed. So a record is never lost or there twice,
and what a killed process had not yet written is done again. shards/layout.json comes into being before the shards and
says what the work is, shards/manifest.json after them, with the same content, says that all of it is there. Several
processes may start and work in one folder, on different shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.annotation.pictures import keep_image, read_edit_mask
from cocoedit_jax.annotation.record import MANIFEST, SHARDS, Annotation, Item, item_to_json, read_annotations, to_line
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import dotted

MASKS, IMAGES, LAYOUT = "masks", "images", "layout.json"
ASIDE = f"{SHARDS}/{IMAGES}"  # pictures of which no other copy is left, and which the present filter does not keep


_ANEW = "delete that folder, in which nothing is done yet, or give another --output"
_ELSEWHERE = "continue without --input, or give another --output"


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Writes `path` whole or not at all, on the disk when this returns: a rename alone may overtake the data.

    replace=False leaves a file alone that is there already.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if replace:
        draft.replace(path)
    else:
        try:
            os.link(draft, path)  # unlike a rename, fails where the name is taken
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_stem(name: str) -> str:
    """A file name for an id or path: its last part, readable, and a hash that tells it from all others."""
    tail = re.split(r"[/\\]", name)[-1].rpartition(".")[0] or re.split(r"[/\\]", name)[-1]
    slug = re.sub(r"[^a-z0-9]+", "-", tail.lower()).strip("-")[:40]
    return "-".join(filter(None, (slug, hashlib.sha256(name.encode()).hexdigest()[:12])))


def parse_range(text: str) -> tuple[int, int]:
    """`i/n` of --shard. Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={text!r}; expected i/n with 0 <= i < n, as in --shard=0/8")
    return int(match[1]), int(match[2])


class Store:
    """An output folder with its shards. `manifest`: what `create` was given, and what `finish` adds."""

    def __init__(self, root: Path, manifest: Mapping[str, Any]):
        self.root, self.manifest = root, dict(manifest)
        self.size: int = manifest["shard_size"]
        self.total: int = manifest["records"]

    @classmethod
    def create(cls, root: Path, items: Sequence[Item], plan: Mapping[str, Any], shard_size: int) -> Store:
        """Lays out the work, or opens the folder where the same work is under way.

        plan: settings (plain JSON values) that must stay the same until the end.

        Raises:
            UserError: no items, ids that are not unique, or a folder that holds other work.
        """
        check_items(items)
        lines = [json.dumps(item_to_json(item), ensure_ascii=False, sort_keys=True) for item in items]
        manifest = {
            "version": 1,
            "records": len(items),
            "input": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "items": items_hash(items),
            "shard_size": shard_size,
            "plan": json.loads(json.dumps(plan)),
        }
        folder = root / SHARDS
        if cls.exists(root):
            return cls.open(root)._of(manifest, _ELSEWHERE)
        foreign = [] if not root.exists() else sorted({p.name for p in root.iterdir()} - {SHARDS, MASKS, IMAGES})
        if foreign:
            raise UserError(
                f"{root}: holds {', '.join(foreign[:3])}, but no annotation; expected a new or empty folder"
            )
        for name in (SHARDS, MASKS, IMAGES):
            (root / name).mkdir(parents=True, exist_ok=True)
        if not (folder / LAYOUT).exists() and any(folder.glob("*.jsonl")):
            raise UserError(f"{folder}: holds shards, but no {LAYOUT} that says of what input; {_ANEW}")
        write_whole(folder / LAYOUT, _json(manifest), replace=False)
        # Shards that are there already stay, so they must be of this input and as large.
        store = cls._read(root, folder / LAYOUT)._of(manifest, f"it was not laid out to the end: {_ANEW}")
        for number in range(store.count):
            part = items[number * shard_size : (number + 1) * shard_size]
            # Another process may have come first and be past this already.
            write_whole(store.path(number), _lines(Annotation(item) for item in part), replace=False)
        write_whole(folder / MANIFEST, _json(manifest), replace=False)
        return cls.open(root)._of(manifest, _ELSEWHERE)

    def _of(self, manifest: Mapping[str, Any], advice: str) -> Store:
        """This store. Raises UserError if its work is not that of `manifest`."""
        self.check_plan(manifest["plan"])
        if self.manifest["input"] != manifest["input"]:
            raise UserError(
                f"{self.root}: holds the annotation of another input ({self.total} records, this one has"
                f" {manifest['records']}); {advice}"
            )
        if self.size != manifest["shard_size"]:
            raise UserError(f"{self.root}: has shards of {self.size} records, not {manifest['shard_size']}; {advice}")
        return self

    @staticmethod
    def exists(root: Path) -> bool:
        """Whether work was laid out there."""
        return (root / SHARDS / MANIFEST).is_file()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time, for gathering; where the file system knows no locks, nothing is kept out."""
        with (self.root / SHARDS / ".lock").open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except (ImportError, OSError):
                pass
            yield

    @classmethod
    def open(cls, root: Path) -> Store:
        """Raises UserError where no annotation was begun."""
        path = root / SHARDS / MANIFEST
        if not path.is_file():
            raise UserError(f"{path}: no such file; give --input=FOLDER_OR_JSONL to begin an annotation in {root}")
        return cls._read(root, path)

    @classmethod
    def _read(cls, root: Path, path: Path) -> Store:
        try:
            return cls(root, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error!r})") from error

    def check_plan(self, plan: Mapping[str, Any]) -> None:
        """Raises UserError naming every setting that differs from those the work was begun with."""
        before, now = dotted(self.manifest["plan"]), dotted(json.loads(json.dumps(plan)))
        changed = [f"  {k}: {before.get(k)!r}, now {now.get(k)!r}" for k in sorted({*before, *now}) if
                   before.get(k) != now.get(k)]  # fmt: skip
        if changed:
            raise UserError(
                f"{self.root}: was begun with other settings; use the same, or another --output:\n" + "\n".join(changed)
            )

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.total // self.size)

    def numbers(self, part: tuple[int, int] = (0, 1)) -> range:
        """The shards of the part i of n: contiguous, all parts together every shard once."""
        i, n = part
        return range(i * self.count // n, (i + 1) * self.count // n)

    def path(self, number: int) -> Path:
        return self.root / SHARDS / f"{number:06d}.jsonl"

    def read(self, number: int) -> list[Annotation]:
        """Raises UserError for a shard that something else than this program has changed."""
        found = list(read_annotations(self.path(number)))
        expected = min(self.size, self.total - number * self.size)
        if len(found) != expected:
            raise UserError(f"{self.path(number)}: {len(found)} records, expected {expected}; the file was damaged")
        return found

    def write(self, number: int, annotations: Sequence[Annotation]) -> None:
        write_whole(self.path(number), _lines(annotations))

    def update(self, number: int, change: Callable[[Annotation], Annotation]) -> int:
        """Applies `change` to every annotation of a shard; returns how many it changed."""
        before = self.read(number)
        after = [change(annotation) for annotation in before]
        changed = sum(old is not new for old, new in zip(before, after, strict=True))
        if changed:
            self.write(number, after)
        return changed

    def write_mask(self, annotation: Annotation, edit_mask: np.ndarray) -> str:
        """Stores a mask (bool, true = may change); returns its name relative to the root."""
        buffer = io.BytesIO()
        keep_image(edit_mask).save(buffer, "PNG")
        name = f"{MASKS}/{file_stem(annotation.item.id)}.png"
        write_whole(self.root / name, buffer.getvalue())
        return name

    def read_mask(self, annotation: Annotation) -> np.ndarray | None:
        return None if annotation.mask_file is None else read_edit_mask(self.root / annotation.mask_file)

    def seal(self, facts: Mapping[str, Any]) -> None:
        """Adds facts and the hashes of the shards to the manifest."""
        hashes = {self.path(n).name: hashlib.sha256(self.path(n).read_bytes()).hexdigest() for n in range(self.count)}
        self.manifest |= {**facts, "shards": hashes}
        write_whole(self.root / SHARDS / MANIFEST, _json(self.manifest))

    def sweep(self) -> None:
        """Removes what killed processes left half-written. Only when nobody works in the folder any more."""
        for folder in (self.root, self.root / SHARDS, self.root / MASKS, self.root / IMAGES):
            for draft in folder.glob(".*.tmp"):
                draft.unlink(missing_ok=True)


def items_hash(items: Iterable[Item]) -> str:
    """Of the items in their order, by what no stage changes."""
    digest = hashlib.sha256()
    for item in items:
        digest.update((json.dumps([item.id, item.image, item.prompt]) + "\n").encode())
    return digest.hexdigest()


def check_items(items: Sequence[Item]) -> None:
    """Raises UserError for no items at all, for an id that is there twice, and for texts that no file can hold."""
    if not items:
        raise UserError("--input: no items in it; expected at least one picture with an instruction")
    seen: dict[str, int] = {}
    for number, item in enumerate(items, start=1):
        if item.id in seen:
            raise UserError(f"--input: id {item.id!r} of item {number} is that of item {seen[item.id]} too")
        seen[item.id] = number
        try:
            to_line(Annotation(item)).encode()
        except ValueError as error:  # half a surrogate pair, as in names of files that are not UTF-8; NaN
            raise UserError(f"--input: item {number}, {ascii(item.id)}, cannot be written: {error}") from error


def _lines(annotations: Iterable[Annotation]) -> bytes:
    return "".join(to_line(annotation) for annotation in annotations).encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
