"""Pictures out of data URLs, checked before anything of them is decoded."""

from __future__ import annotations

import binascii
import io
import re

from PIL import Image, ImageOps, UnidentifiedImageError

from cocoedit_jax.data.images import as_rgb
from cocoedit_jax.data.jpeg_scans import TooManyScans, check_scans

_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg);base64,")
MAX_ASPECT = 200  # the most that Qwen2.5-VL resizes
MAX_PNG_CHUNKS = 1000  # besides those of pixels
MAX_EXIF_BYTES = 2**16  # what a JPEG segment holds
_PNG = b"\x89PNG\r\n\x1a\n"


class PictureError(ValueError):
    """A picture that is refused; the text says why."""


def decode_data_url(url: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The upright RGB picture in a data URL of a PNG or JPEG file; transparency is put on white.

    Size and shape are read from the header, and what a small file can make expensive is counted (scans of a JPEG,
    chunks of a PNG), so a decompression bomb is refused without being decoded. Addresses of other kinds are refused:
    the server opens neither files nor connections.

    Raises:
        PictureError: any of it cannot be used.
    """
    head = _DATA_URL.match(url[:32])
    if not head:
        shown = url if len(url) <= 40 else url[:40] + "..."
        raise PictureError(f"{shown!r} given, expected data:image/png;base64,... or data:image/jpeg;base64,...")
    if (len(url) - head.end()) * 3 // 4 > max_bytes + 2:
        raise PictureError(f"a file of {(len(url) - head.end()) * 3 // 4} bytes, expected at most {max_bytes}")
    try:
        data = binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise PictureError(f"not base64 ({error})") from error
    try:
        _check_chunks(data)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise PictureError(f"{width}x{height} px, expected at most {max_pixels} pixels")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise PictureError(f"{width}x{height} px, expected an aspect ratio of at most {MAX_ASPECT}")
            check_scans(file)
            file.load()  # a PNG may have its EXIF at the end
            # Tags may all point at the same bytes, of which Pillow (12.0) keeps a copy for each.
            if len(file.info.get("exif", b"")) + len(file.info.get("Raw profile type exif", "")) // 2 > MAX_EXIF_BYTES:
                raise PictureError(f"more than {MAX_EXIF_BYTES} bytes of EXIF")
            return as_rgb(ImageOps.exif_transpose(file))
    except PictureError:
        raise
    except TooManyScans as error:
        raise PictureError(str(error)) from error
    except UnidentifiedImageError as error:  # its words are the address of an object
        raise PictureError("not a PNG or JPEG file") from error
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise PictureError(f"not a PNG or JPEG file that can be read ({error})") from error


def _check_chunks(data: bytes) -> None:
    """Raises PictureError for a PNG file with more than `MAX_PNG_CHUNKS` chunks besides IDAT, or several colour
    profiles: Pillow expands every iCCP, a kilobyte to a megabyte, when it opens the file.
    """
    if not data.startswith(_PNG):
        return
    place, others, profiles = len(_PNG), 0, 0
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        others += kind != b"IDAT"
        profiles += kind == b"iCCP"
        if others > MAX_PNG_CHUNKS:
            raise PictureError(f"a PNG file of more than {MAX_PNG_CHUNKS} chunks besides those of pixels")
        if profiles > 1:
            raise PictureError("a PNG file with several colour profiles (iCCP), expected at most one")
        place += 12 + int.from_bytes(data[place : place + 4], "big")
