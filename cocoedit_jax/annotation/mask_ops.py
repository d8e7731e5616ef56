"""From a segmenter's mask to the region that may change. Masks are bool [H, W], true where the picture may change."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from cocoedit_jax.annotation.boxes import Box, iou

_EIGHT = np.ones((3, 3), bool)  # pieces that touch at a corner are one


def drop_pieces(mask: np.ndarray, min_piece: float) -> np.ndarray:
    """Without the connected pieces smaller than `min_piece` times the largest one."""
    labels = _pieces(mask)
    if labels.max(initial=0) < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= min_piece * sizes.max())[labels] & mask


def _pieces(mask: np.ndarray) -> np.ndarray:
    """Numbers from 1 on the connected pieces, 0 elsewhere."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, _EIGHT, output=labels)
    return labels


def dilate(mask: np.ndarray, radius: float) -> np.ndarray:
    """All pixels whose distance from the mask is at most `radius` px (Euclidean)."""
    if radius < 1 or not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask)) <= radius


def refine(mask: np.ndarray, *, min_piece: float, fill_holes: bool) -> np.ndarray:
    """Pieces dropped, holes filled."""
    mask = drop_pieces(mask, min_piece)
    return np.asarray(ndimage.binary_fill_holes(mask)) if fill_holes else mask


def box_mask(box: Box, size: tuple[int, int]) -> np.ndarray:
    """The pixels inside a box; at least one. size: (width, height)."""
    x0, y0 = min(round(box[0]), size[0] - 1), min(round(box[1]), size[1] - 1)
    mask = np.zeros((size[1], size[0]), bool)
    mask[y0 : max(round(box[3]), y0 + 1), x0 : max(round(box[2]), x0 + 1)] = True
    return mask


def bounding_box(mask: np.ndarray) -> Box:
    """Of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def measures(grown: np.ndarray, raw: np.ndarray, box: Box) -> dict[str, float | int]:
    """What the filter decides by: `grown` is the final mask, `raw` the one before the growth, `box` the target's box.

    area and crop_area are shares of the picture and of its centred square; border is a share of the border pixels.
    """
    height, width = grown.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    border = np.concatenate([grown[0], grown[-1], grown[1:-1, 0], grown[1:-1, -1]])
    return {
        "area": float(grown.mean()),
        "crop_area": float(grown[top : top + side, left : left + side].mean()),
        "components": int(_pieces(grown).max(initial=0)),
        "box_iou": iou(bounding_box(raw), box),
        "border": float(border.mean()),
    }
