"""Pictures as the models get to see them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from cocoedit_jax.data.images import KEEP_THRESHOLD
from cocoedit_jax.reporting.pictures import draw_outline

_MIN_CELLS = 4  # per side; the Qwen models enlarge what is smaller, and boxes in pixels would no longer fit
_TINT = np.array([255, 0, 0], np.float32)


def fitted_size(size: tuple[int, int], cell: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) near `size`: multiples of `cell` with at most `max_pixels` in all (and at least 4 cells a side),
    so that a server which cuts pictures into such cells has no reason to resize again.
    """
    scale = min(1.0, math.sqrt(max_pixels / (size[0] * size[1])))
    width, height = (max(round(side * scale / cell), _MIN_CELLS) for side in size)
    while width * height * cell * cell > max_pixels and max(width, height) > _MIN_CELLS:
        if width >= height:
            width -= 1
        else:
            height -= 1
    return width * cell, height * cell


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def marked(image: Image.Image, edit_mask: np.ndarray) -> Image.Image:
    """`image` with the region of `edit_mask` (bool [H, W], of any size) tinted red inside a white line."""
    mask = np.asarray(Image.fromarray(edit_mask).resize(image.size, Image.Resampling.NEAREST)).astype(bool)
    pixels = np.asarray(image, np.float32)
    tinted = np.where(mask[..., None], 0.55 * pixels + 0.45 * _TINT, pixels)
    width = max(1, round(min(image.size) / 300))
    return Image.fromarray(draw_outline(np.rint(tinted).astype(np.uint8), mask, width))


def read_edit_mask(path: Path) -> np.ndarray:
    """Bool [H, W], true where the picture may change, of a mask file (white = keep)."""
    with Image.open(path) as file:
        return np.asarray(file.convert("L")) < KEEP_THRESHOLD


def keep_image(edit_mask: np.ndarray) -> Image.Image:
    """The mask as it is stored: white = keep."""
    return Image.fromarray(np.where(edit_mask, 0, 255).astype(np.uint8))
