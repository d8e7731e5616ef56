"""Editing records in the CoCoEdit-40K layout, checked as a whole before training.

DIR/metadata.jsonl holds one JSON object per line: `prompt`, `image`, `mask` (paths relative to DIR; mask white = keep),
optionally `id`, `edit_type` and `source_group` (see `split_records`); all other fields pass through as `extra`. The
files may also lie packed in DIR/packed/, see packed.py.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from cocoedit_jax.data.images import DataFault, Framing, ImageFile, load_pair, nearest_bucket
from cocoedit_jax.data.packed import Pack, is_packed
from cocoedit_jax.errors import UserError

METADATA = "metadata.jsonl"
TEXT_CACHE = "text_cache"  # folder beside it, see text_cache.py
_KNOWN_FIELDS = ("id", "prompt", "image", "mask", "edit_type")


@dataclass(frozen=True)
class Record:
    """One editing task. `bucket` indexes `Framing.sizes`; `line` counts from 1 in the metadata file.

    image, mask: where the files lie, or lay before they were packed; read them through `files`.
    image_sha256, edit_area: set by `read_records`: hash of the image file, and the share of the framed picture that
        may change.
    """

    id: str
    prompt: str
    image: Path
    mask: Path
    edit_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    line: int = 0
    bucket: int = 0
    image_name: str = ""  # path relative to the folder, POSIX
    image_sha256: str = ""
    edit_area: float = 0.0
    pack: Pack | None = field(default=None, repr=False, compare=False)

    def files(self) -> tuple[ImageFile, ImageFile]:
        """Image and mask, to be read."""
        if self.pack is None:
            return self.image, self.mask
        entry = self.pack.entry(self.line - 1)
        return entry.file("image", self.image.name), entry.file("mask", self.mask.name)


@dataclass(frozen=True)
class Fault:
    """Why a line cannot be used. `kind` is one of a small set of words to count by."""

    line: int
    kind: str
    message: str


@dataclass(frozen=True)
class RecordSet:
    """The usable records of a folder, in file order, and the faults of the others."""

    root: Path
    framing: Framing
    records: tuple[Record, ...]
    faults: tuple[Fault, ...]

    def summary(self, limit: int = 20) -> str:
        """Counts by kind, then up to `limit` faults with their line numbers."""
        return summarize(self.root, len(self.records), self.faults, limit)


def summarize(root: Path, usable: int, faults: Sequence[Fault], limit: int = 20) -> str:
    """What is said of the records of `root`: counts by kind, then up to `limit` faults with their line numbers."""
    lines = len({fault.line for fault in faults})
    total = usable + lines
    if not faults:
        return f"{root / METADATA}: all {total} records are usable"
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(f.kind for f in faults).most_common())
    text = [f"{root / METADATA}: {lines} of {total} records cannot be used: {kinds}"]
    text += [f"  line {fault.line}: {fault.kind}: {fault.message}" for fault in faults[:limit]]
    if len(faults) > limit:
        text.append(f"  ... and {len(faults) - limit} more")
    return "\n".join(text)


def read_metadata(root: Path | str) -> tuple[list[Record], list[Fault]]:
    """Records and faults of DIR/metadata.jsonl alone, in file order; images and masks are not opened.

    Raises:
        UserError: there is no such file.
    """
    root = Path(root)
    path = root / METADATA
    if not path.is_file():
        raise UserError(f"{path}: no such file; a data folder holds {METADATA} and the images and masks it names")
    return _parse(root, path)


def metadata_lines(root: Path) -> Iterator[bytes]:
    """The lines of DIR/metadata.jsonl with their ends, as `Record.line` counts them from 1. Only a newline ends a line:
    JSON may hold lone carriage returns, which `bytes.splitlines` and text files also end lines at.
    """
    with (root / METADATA).open("rb") as file:
        yield from file


def bare_line(line: bytes) -> bytes:
    """What stands on a line of `metadata_lines`, without byte order mark and white space."""
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def read_records(
    root: Path | str,
    framing: Framing,
    *,
    strict: bool = True,
    limit: int = 20,
    min_bucket_records: int = 1,
    num_threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> RecordSet:
    """Read and check every record of the folder `root`, decoding every image and mask once.

    strict: any fault raises UserError with the summary (`limit` faults listed); otherwise faulty records are left out
    and can be counted in `faults`. A folder without metadata or without one usable record raises UserError in any case.
    With crop="buckets", buckets of fewer than `min_bucket_records` records are given up and their records take the
    nearest other bucket. `progress(done, total)` is called as records are checked.
    """
    found = examine_records(
        root, framing, min_bucket_records=min_bucket_records, num_threads=num_threads, progress=progress
    )
    if found.faults and (strict or not found.records):
        raise UserError(found.summary(limit))
    if not found.records:
        raise UserError(f"{found.root / METADATA}: empty file, expected one JSON object per line")
    return found


def examine_records(
    root: Path | str,
    framing: Framing,
    *,
    min_bucket_records: int = 1,
    num_threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> RecordSet:
    """As `read_records`, but faults are only told, also where no record is usable."""
    root = Path(root)
    candidates, faults = read_metadata(root)
    usable: list[Record] = []

    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, num_threads)) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # report such files instead of reading them
        results = pool.map(lambda record: _check_images(record, framing), candidates)
        for done, result in enumerate(results, start=1):
            if isinstance(result, Record):
                usable.append(result)
            else:
                faults.append(result)
            if progress is not None:
                progress(done, len(candidates))
    if framing.crop == "buckets" and min_bucket_records > 1:
        moved = _merge_buckets([record.bucket for record in usable], framing, min_bucket_records)
        checked = [
            record if record.bucket == bucket else _check_images(record, framing, bucket)
            for record, bucket in zip(usable, moved, strict=True)
        ]
        usable = [result for result in checked if isinstance(result, Record)]
        faults += [result for result in checked if isinstance(result, Fault)]
    faults.sort(key=lambda fault: fault.line)
    return RecordSet(root, framing, tuple(usable), tuple(faults))


def record_id(image: str, prompt: str) -> str:
    """The id of a record that states none: the same in every run and on every machine."""
    return hashlib.sha256(f"{image}\0{prompt}".encode()).hexdigest()[:16]


def fingerprint(records: Iterable[Record]) -> str:
    """A hash of the records' ids, instructions and order: two sequences that agree in it train the same."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.id, record.prompt, record.bucket]).encode())
    return digest.hexdigest()[:16]


def source_key(record: Record) -> str:
    """What records made from one picture have in common: the field `source_group`, which states it, or else the hash
    of the image file.
    """
    stated = record.extra.get("source_group")
    return f"={stated}" if isinstance(stated, str) and stated else record.image_sha256 or hash_file(record.files()[0])


def hash_file(file: ImageFile) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_held_out(record: Record, fraction: float) -> bool:
    """Whether a record belongs to the held-out part: a hash of its `source_key`, so other records do not change the
    answer, and neither do names of files.
    """
    digest = hashlib.sha256(f"held-out\0{source_key(record)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def split_records(records: Iterable[Record], held_out_fraction: float) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(training, held-out) records; about `held_out_fraction` in [0, 1) of the source pictures are held out, each with
    all of its records, so that no held-out picture was seen in training.
    """
    if not 0.0 <= held_out_fraction < 1.0:
        raise UserError(f"held_out_fraction: {held_out_fraction} given, expected a number in [0, 1)")
    train: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        (held_out if is_held_out(record, held_out_fraction) else train).append(record)
    return tuple(train), tuple(held_out)


def _parse(root: Path, path: Path) -> tuple[list[Record], list[Fault]]:
    records: list[Record] = []
    faults: list[Fault] = []
    first_line: dict[str, int] = {}
    resolved = root.resolve()
    pack = Pack(root, path) if is_packed(root) else None
    for number, raw in enumerate(metadata_lines(root), start=1):
        try:
            # The first line may carry a byte order mark; blank lines (a trailing newline) are no records.
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            record = _parse_line(root, resolved, text, number)
        except UnicodeDecodeError as error:
            faults.append(Fault(number, "broken JSON", f"not UTF-8 text ({error.reason} at byte {error.start})"))
            continue
        except DataFault as fault:
            faults.append(Fault(number, fault.kind, str(fault)))
            continue
        if record.id in first_line:
            where = first_line[record.id]
            faults.append(Fault(number, "duplicate id", f"id {record.id!r} was used on line {where}"))
            continue
        first_line[record.id] = number
        records.append(replace(record, pack=pack) if pack is not None else record)
    return records, faults


def _parse_line(root: Path, resolved: Path, text: str, number: int) -> Record:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataFault("broken JSON", str(error)) from error
    if not isinstance(data, dict):
        raise DataFault("wrong type", f"a JSON {type(data).__name__}, expected an object with fields")
    missing = [name for name in ("prompt", "image", "mask") if name not in data]
    if missing:
        raise DataFault("missing field", ", ".join(missing))
    for name in ("prompt", "image", "mask"):
        if not isinstance(data[name], str) or not data[name].strip():
            raise DataFault("wrong type", f"field {name!r} is {data[name]!r}, expected a non-empty string")
        if any("\ud800" <= letter <= "\udfff" for letter in data[name]):  # half a pair: JSON may hold it, UTF-8 cannot
            raise DataFault("wrong type", f"field {name!r} is {ascii(data[name])}, expected Unicode text")
    identity = data.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int | None) or identity == "":
        raise DataFault("wrong type", f"field 'id' is {identity!r}, expected a string or a whole number")
    edit_type = data.get("edit_type")
    if not isinstance(edit_type, str | None):
        raise DataFault("wrong type", f"field 'edit_type' is {edit_type!r}, expected a string")
    image = _inside(root, resolved, data["image"], "image")
    return Record(
        id=record_id(data["image"], data["prompt"]) if identity is None else str(identity),
        prompt=data["prompt"],
        image=image,
        mask=_inside(root, resolved, data["mask"], "mask"),
        edit_type=edit_type,
        extra={name: value for name, value in data.items() if name not in _KNOWN_FIELDS},
        line=number,
        image_name=image.relative_to(root).as_posix(),
    )


def _inside(root: Path, resolved: Path, name: str, role: str) -> Path:
    """Path below `root`; refuses absolute paths, "..", and links that lead out of the folder."""
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
    try:
        outside = absolute or ".." in parts or not (root / name).resolve().is_relative_to(resolved)
    except (OSError, ValueError) as error:  # a loop of links, a null byte
        raise DataFault("path outside", f"{role} {name!r}: {error}") from error
    if outside:
        raise DataFault("path outside", f"{role} {name!r} leads out of the data folder")
    return root / name


def _check_images(record: Record, framing: Framing, bucket: int | None = None) -> Record | Fault:
    """The record with its bucket, or what is wrong with its image or mask."""
    image, mask = record.files()
    try:
        _, edit_mask, bucket = load_pair(image, mask, framing, bucket)
        digest = hash_file(image)
    except DataFault as fault:
        return Fault(record.line, fault.kind, str(fault))
    except OSError as error:  # removed, or the disk failed, since it was decoded
        return Fault(record.line, "unreadable image", f"image {record.image}: {error}")
    share = float(edit_mask.mean())
    if 0.0 < share < 1.0:
        return replace(record, bucket=bucket, image_sha256=digest, edit_area=share)
    what = "no pixel may change" if share == 0.0 else "every pixel may change"
    height, width = framing.sizes[bucket]
    message = f"mask {record.mask.name!r}: {what} (white = keep; after the crop to {width}x{height} px)"
    return Fault(record.line, "degenerate mask", message)


def _merge_buckets(buckets: Sequence[int], framing: Framing, minimum: int) -> list[int]:
    """Empty the smallest bucket into its nearest neighbour until every bucket has `minimum` records or one is left."""
    counts, place = Counter(buckets), {bucket: bucket for bucket in buckets}
    while len(counts) > 1:
        smallest = min(counts, key=lambda bucket: (counts[bucket], bucket))
        if counts[smallest] >= minimum:
            break
        count = counts.pop(smallest)
        others = sorted(counts)
        into = others[nearest_bucket(*framing.sizes[smallest], [framing.sizes[other] for other in others])]
        counts[into] += count
        place = {bucket: into if current == smallest else current for bucket, current in place.items()}
    return [place[bucket] for bucket in buckets]
