"""Which pictures are the same: byte by byte, or to the eye.

To the eye means: the 64-bit difference hashes (dHash) of two pictures differ in at most `threshold` bits, and their
thumbnails of 8 x 8 pixels differ by at most `max_colour` in the mean. The hash finds what was scaled or compressed
again; it sees brightness only, and says nothing of plain surfaces, which is what the thumbnails are for.

dHash: the picture in grey, scaled to 9 x 8 pixels; a bit for each pair of horizontal neighbours, set where the left one
is darker; row by row, the first bit is the highest.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cocoedit_jax.data.images import DataFault, ImageFile, load_image
from cocoedit_jax.errors import UserError

THRESHOLD = 4  # bits of 64
MAX_THRESHOLD = 16  # beyond it pictures agree that have nothing in common
MAX_COLOUR = 12.0  # of 255, mean over 8 x 8 pixels and three channels
_BITS = 64
_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Fingerprint:
    """sha256: of the file. dhash: see above, [0, 2^64). thumbnail: uint8 [8, 8, 3]."""

    sha256: str
    dhash: int
    thumbnail: np.ndarray


def dhash(image: Image.Image) -> int:
    """The 64-bit difference hash of a picture."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes(), "big")


def fingerprint(file: ImageFile) -> Fingerprint:
    """Raises DataFault when the picture cannot be decoded."""
    image = load_image(file)
    thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.uint8)
    return Fingerprint(hashlib.sha256(file.read_bytes()).hexdigest(), dhash(image), thumbnail)


def fingerprints(
    files: Sequence[ImageFile], *, num_threads: int = 8, done: Callable[[], object] | None = None
) -> list[Fingerprint | None]:
    """In order; None for pictures that cannot be decoded."""

    def one(file: ImageFile) -> Fingerprint | None:
        try:
            return fingerprint(file)
        except (DataFault, OSError):
            return None
        finally:
            if done is not None:
                done()

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        return list(pool.map(one, files))


def same_picture(
    prints: Sequence[Fingerprint | None], threshold: int | None = THRESHOLD, max_colour: float = MAX_COLOUR
) -> list[int]:
    """For each picture the index of the first one that is the same: its own for the first, and where there is none.

    What is the same as the same picture is the same too. threshold: bits by which hashes may differ, 0 to 16; None
    compares files byte by byte only. Work grows with the number of pairs that agree in one of threshold + 1 parts of
    the hash; every pair within the threshold is among them.
    """
    if threshold is not None and not 0 <= threshold <= MAX_THRESHOLD:
        raise UserError(f"threshold: {threshold} bits, expected 0 to {MAX_THRESHOLD} of the 64 of a difference hash")
    first = list(range(len(prints)))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = first[first[index]]
            index = first[index]
        return index

    def join(a: int, b: int) -> None:
        a, b = root(a), root(b)
        first[max(a, b)] = min(a, b)

    seen: dict[str, int] = {}
    for index, found in enumerate(prints):
        if found is not None:
            join(seen.setdefault(found.sha256, index), index)
    distinct = list(seen.values())
    if threshold is not None and len(distinct) > 1:
        known = [found for index in distinct if (found := prints[index]) is not None]
        hashes = np.array([found.dhash for found in known], np.uint64)
        thumbnails = np.stack([found.thumbnail for found in known]).reshape(len(known), -1).astype(np.int16)
        for a, b in _near(hashes, threshold):
            close = np.abs(thumbnails[a] - thumbnails[b]).mean(axis=1) <= max_colour
            for i, j in zip(a[close], b[close], strict=True):
                join(distinct[i], distinct[j])
    return [root(index) for index in range(len(prints))]


def _near(hashes: np.ndarray, threshold: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of indices whose hashes differ in at most `threshold` bits. Of threshold + 1 parts of the hash, one must
    then be equal, so only hashes that share a part are compared.
    """
    edges = np.linspace(0, _BITS, threshold + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        part = hashes >> np.uint64(low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.r_[True, part[order][1:] != part[order][:-1]])
        for group in np.split(order, starts[1:]):
            if len(group) < 2:
                continue
            rows = max(1, _PAIRS_AT_ONCE // len(group))
            for start in range(0, len(group), rows):
                block = group[start : start + rows]
                differ = np.bitwise_count(hashes[block][:, None] ^ hashes[group][None, :])
                i, j = np.nonzero(differ <= threshold)
                a, b = block[i], group[j]
                once = a < b
                if once.any():
                    yield a[once], b[once]


@dataclass(frozen=True)
class Duplicate:
    """Entry `index` repeats `of`: the same picture (`exact`, or to the eye) with the same instruction."""

    index: int
    of: int
    exact: bool


def find_duplicates(
    prints: Sequence[Fingerprint | None],
    prompts: Sequence[str],
    *,
    threshold: int | None = THRESHOLD,
    max_colour: float = MAX_COLOUR,
    quality: Sequence[float] | None = None,
) -> list[Duplicate]:
    """The entries to leave out, so that every (picture, instruction) is there once; in order.

    Instructions are compared without regard to case, spaces and a full stop. Of several, the one of the highest
    `quality` stays, the first of equals. The same picture with other instructions is no duplicate: keep these on one
    side of a split (`records.split_records`).
    """
    groups: dict[tuple[int, str], list[int]] = {}
    pictures = same_picture(prints, threshold, max_colour)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        groups.setdefault((picture, normalized(prompt)), []).append(index)
    found = []
    for members in groups.values():
        best = members[0] if quality is None else max(members, key=lambda index: (quality[index], -index))
        kept = prints[best]
        for index in members:
            mine = prints[index]
            if index != best and kept is not None and mine is not None:
                found.append(Duplicate(index, best, mine.sha256 == kept.sha256))
    return sorted(found, key=lambda duplicate: duplicate.index)


def normalized(prompt: str) -> str:
    return " ".join(prompt.casefold().split()).rstrip(" .!")
