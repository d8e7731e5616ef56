"""Reading image and mask files: orientation, alpha, framing to a training size, mask polarity."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from cocoedit_jax.data.jpeg_scans import TooManyScans, check_scans
from cocoedit_jax.errors import UserError

__all__ = [
    "DataFault",
    "Framing",
    "ImageFile",
    "as_rgb",
    "crop_box",
    "load_image",
    "load_pair",
    "make_buckets",
    "nearest_bucket",
]

KEEP_THRESHOLD = 128  # mask values from here on (of 255) mean "keep"
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataFault(ValueError):
    """A record, image or mask that cannot be used; `kind` is the class of the fault, the message the particulars."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class ImageFile(Protocol):
    """What is read of an image or mask file: a `Path`, or a file inside a packed folder (packed.py)."""

    @property
    def name(self) -> str: ...

    def is_file(self) -> bool: ...

    def read_bytes(self) -> bytes: ...


def make_buckets(resolution: int, divisor: int = 16, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width), multiples of `divisor` pixels, with an area near resolution^2 and aspect ratios up to
    `max_aspect` in both directions; sorted by height, mirrored pairs included. Raises UserError on impossible values.
    """
    if divisor < 1 or resolution < divisor or resolution % divisor:
        raise UserError(f"resolution: {resolution} px given, expected a positive multiple of the divisor {divisor}")
    if not 1.0 <= max_aspect <= 8.0:
        raise UserError(f"max_aspect: {max_aspect} given, expected a number in [1, 8]")
    sizes = set()
    for cells in range(1, resolution // divisor + 1):
        short = cells * divisor
        long = round(resolution * resolution / short / divisor) * divisor
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> int:
    """Index of the (height, width) in `buckets` whose aspect ratio is nearest on a log scale; the first of equals."""
    aspect = math.log(width / height)
    return min(range(len(buckets)), key=lambda number: abs(math.log(buckets[number][1] / buckets[number][0]) - aspect))


def crop_box(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Largest centred box (left, top, right, bottom; fractional pixels) with the aspect ratio of `size` (h, w)."""
    target_height, target_width = size
    scale = min(width / target_width, height / target_height)
    margin_x, margin_y = (width - scale * target_width) / 2, (height - scale * target_height) / 2
    return margin_x, margin_y, width - margin_x, height - margin_y


@dataclass(frozen=True)
class Framing:
    """How an image of any size becomes a training size.

    crop="center": the centred square, at `resolution`; crop="buckets": the nearest of `make_buckets`, so that little is
    cut off. Then LANCZOS for the image; for the mask the same box, nearest neighbour.
    """

    resolution: int
    crop: str = "center"
    divisor: int = 16
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        if self.crop not in ("center", "buckets"):
            raise UserError(f"crop: {self.crop!r} given, expected 'center' or 'buckets'")
        if self.resolution < 1:
            raise UserError(f"resolution: {self.resolution} px given, expected a positive number")
        _ = self.sizes  # raises on impossible bucket settings

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All training sizes (height, width) in pixels; a record's `bucket` is an index into them."""
        if self.crop == "center":
            return ((self.resolution, self.resolution),)
        return make_buckets(self.resolution, self.divisor, self.max_aspect)

    def bucket(self, height: int, width: int) -> int:
        return nearest_bucket(height, width, self.sizes)


def load_pair(
    image_path: ImageFile, mask_path: ImageFile, framing: Framing, bucket: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Image float32 [h, w, 3] in [0, 1], edit mask float32 [h, w] (exactly 0 or 1; 1 = may change), bucket number.

    The mask file is white where the image must be kept (the polarity of CoCoEdit-40K). EXIF orientation is applied; a
    mask that fits only the unrotated image is turned with it. Transparency is put on white. The mask may have another
    size than the image if its aspect ratio is the same. Raises DataFault.
    """
    image, turn, stored_size = _load_upright(image_path)
    with _opened(mask_path, "mask") as file:
        mask_turn = _UPRIGHT.get(file.getexif().get(_EXIF_ORIENTATION, 1))
        mask = _as_gray(file)
    if mask_turn is not None:
        mask = mask.transpose(mask_turn)
    elif turn is not None and not _same_aspect(mask.size, image.size) and _same_aspect(mask.size, stored_size):
        mask = mask.transpose(turn)
    if not _same_aspect(mask.size, image.size):
        raise DataFault(
            "mask size",
            f"mask {mask_path.name!r} is {mask.width}x{mask.height} px, image {image_path.name!r} is"
            f" {image.width}x{image.height} px; another size is accepted only with the same aspect ratio",
        )
    if bucket is None:
        bucket = framing.bucket(image.height, image.width)
    height, width = size = framing.sizes[bucket]
    pixels = image.resize((width, height), Image.Resampling.LANCZOS, box=crop_box(*image.size, size))
    keep = mask.resize((width, height), Image.Resampling.NEAREST, box=crop_box(*mask.size, size))
    edit_mask = (np.asarray(keep) < KEEP_THRESHOLD).astype(np.float32)
    return np.asarray(pixels, np.float32) / np.float32(255), edit_mask, bucket


def load_image(path: ImageFile) -> Image.Image:
    """The RGB picture as `load_pair` sees it, at its full size. Raises DataFault."""
    return _load_upright(path)[0]


def _load_upright(path: ImageFile) -> tuple[Image.Image, Image.Transpose | None, tuple[int, int]]:
    """The upright RGB picture, how it was turned, and its (width, height) as stored."""
    with _opened(path, "image") as file:
        turn = _UPRIGHT.get(file.getexif().get(_EXIF_ORIENTATION, 1))
        stored_size = file.size
        image = as_rgb(file)
    return image if turn is None else image.transpose(turn), turn, stored_size


@contextmanager
def _opened(path: ImageFile, role: str) -> Iterator[Image.Image]:
    """Open and fully decode. Pillow's decoders raise errors of many types on damaged files, hence the broad clause."""
    try:
        if not path.is_file():  # raises where a folder may not be entered, or no disk takes the name
            raise DataFault("missing file", f"{role} {path} does not exist")
        with Image.open(path if isinstance(path, Path) else io.BytesIO(path.read_bytes())) as file:
            check_scans(file)
            file.load()
            yield file
    except TooManyScans as error:
        raise DataFault("too many scans", f"{role} {path}: {error}") from error
    except DataFault:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataFault("image too large", f"{role} {path}: {error}") from error
    except Exception as error:
        raise DataFault("unreadable image", f"{role} {path}: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits: gray of 16 bits, or of floats in [0, 1], is scaled, transparency put on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _as_gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _as_gray(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)  # Pillow would clip 16-bit values at 255
        highest = values.max(initial=0.0)
        scale = 1 / 255 if image.mode == "F" and highest <= 1 else 257.0 if highest > 255 else 1.0
        return Image.fromarray(np.clip(np.rint(values / scale), 0, 255).astype(np.uint8))
    return image.convert("L")


def _same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """True if scaling one size onto the other is off by at most one pixel."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)
