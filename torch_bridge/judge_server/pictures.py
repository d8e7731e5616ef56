"""Pictures out of data URLs, checked before anything of them is decoded."""

from __future__ import annotations

import binascii
import io
import re

from PIL import Image, ImageOps, UnidentifiedImageError

from cocoedit_jax.data.images import as_rgb

_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg);base64,")
MAX_ASPECT = 200  # the most that Qwen2.5-VL resizes


class PictureError(ValueError):
    """A picture that is refused; the text says why."""


def decode_data_url(url: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """The upright RGB picture in a data URL of a PNG or JPEG file; transparency is put on white.

    Size and shape are read from the header, so a decompression bomb is refused without being decoded. Addresses of
    other kinds are refused: the server opens neither files nor connections.

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
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise PictureError(f"{width}x{height} px, expected at most {max_pixels} pixels")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise PictureError(f"{width}x{height} px, expected an aspect ratio of at most {MAX_ASPECT}")
            file.load()
            return as_rgb(ImageOps.exif_transpose(file))
    except PictureError:
        raise
    except UnidentifiedImageError as error:  # its words are the address of an object
        raise PictureError("not a PNG or JPEG file") from error
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise PictureError(f"not a PNG or JPEG file that can be read ({error})") from error
