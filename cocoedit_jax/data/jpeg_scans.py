"""A limit on the scans of a JPEG file: each one of a progressive file is a pass over all pixels, however few bytes it
has, so a small file can take hours to decode.
"""

from __future__ import annotations

import re

from PIL import ImageFile

__all__ = ["MAX_SCANS", "TooManyScans", "check_scans", "count_scans"]

MAX_SCANS = 100  # encoders write about 10; spectral selection and successive approximation at their finest, below 100
_SOS, _EOI = 0xDA, 0xD9
# What ends a run of coded data or of filling: no stuffed 0xFF00, and no marker without a segment (RSTn, SOI, TEM).
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")


class TooManyScans(ValueError):
    """A JPEG file with more than `MAX_SCANS` scans."""


def check_scans(file: ImageFile.ImageFile) -> None:
    """Raises TooManyScans; to be called before `file.load()`. Files of other formats pass."""
    if file.format not in ("JPEG", "MPO") or file.fp is None:
        return
    place = file.fp.tell()
    file.fp.seek(0)
    data = file.fp.read()
    file.fp.seek(place)
    if count_scans(data, MAX_SCANS + 1) > MAX_SCANS:
        raise TooManyScans(f"a JPEG file of more than {MAX_SCANS} scans, expected at most {MAX_SCANS}")


def count_scans(data: bytes, enough: int) -> int:
    """SOS markers that a decoder meets in a JPEG file, up to the first picture's end; counting stops at `enough`."""
    count = data.count(b"\xff\xda")
    if count < enough:  # no decoder can meet more; metadata and what is appended (a video) may hold some that none does
        return count
    count, place = 0, 2
    while count < enough and (found := _MARKER.search(data, place)):
        marker = found[1][0]
        if marker == _EOI:
            break
        count += marker == _SOS
        place = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return count
