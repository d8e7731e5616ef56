"""Bounding boxes as vision-language models write them, and the test picture that tells how one model does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cocoedit_jax.errors import UserError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1; right and lower edge exclusive

# How long a side is in the model's numbers; None: as many pixels as the picture that was sent has.
CONVENTIONS: dict[str, float | None] = {"pixels": None, "relative-1000": 1000.0, "relative-1": 1.0}
# Part of the model's name -> convention.
_KNOWN = {"qwen2.5-vl": "pixels", "qwen2-vl": "relative-1000", "qwen3-vl": "relative-1000", "internvl": "relative-1000"}
PROBE_INSTRUCTION = "make the red square blue"
_OPEN = re.compile(r"[\[{]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.DOTALL)  # a text of JSON, whose brackets do not count, or a bracket
_MIN_IOU = 0.5  # between the known square and the model's box, for a convention to be taken as right


def convention_of(model: str) -> str | None:
    """The convention known for a model's name."""
    name = model.lower().replace("_", "-")
    return next((convention for part, convention in _KNOWN.items() if part in name), None)


def find_json(text: str) -> Any:
    """The first JSON array or object in a model's answer, whatever stands around it. What lies inside of brackets that
    are no JSON, or are not closed, is only a part of an answer and is not taken for it. Raises ValueError.
    """
    decoder, start = json.JSONDecoder(), 0
    while match := _OPEN.search(text, start):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            start = _closed(text, match.start())
    raise ValueError(f"no JSON in the answer {text[:120]!r}")


def _closed(text: str, start: int) -> int:
    """Where the bracket at `start` is closed again; the end of `text` where it is not."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text)


def parse_boxes(text: str) -> list[tuple[list[float], str]]:
    """(four numbers, label) for each box of an answer; an empty list where the model says that there is none.

    Accepted: a list or one object with "bbox_2d" (or "bbox", "box"), in a code fence or not; lists of four numbers.
    Raises ValueError for anything else.
    """
    found = find_json(text)
    entries = found if isinstance(found, list) and not _is_box(found) else [found]
    boxes = []
    for entry in entries:
        label = ""
        if isinstance(entry, dict):
            label = str(entry.get("label", ""))
            entry = next((entry[name] for name in ("bbox_2d", "bbox", "box") if name in entry), entry)
            if entry is None or entry == []:
                continue
        if not _is_box(entry):
            raise ValueError(f"not a box: {json.dumps(entry)[:120]}")
        boxes.append(([float(number) for number in entry], label))
    return boxes


def _is_box(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 4
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= sys.float_info.max for n in entry)
    )


def to_pixels(numbers: Sequence[float], convention: str, sent: tuple[int, int], full: tuple[int, int]) -> Box | None:
    """The box in pixels of the full picture, cut at its edges; None if nothing is left of it.

    sent, full: (width, height) of the picture as the model saw it and as it is.
    """
    side = CONVENTIONS[convention]
    width, height = sent if side is None else (side, side)
    x0, y0, x1, y1 = numbers
    box = (
        min(max(x0 / width, 0.0), 1.0) * full[0],
        min(max(y0 / height, 0.0), 1.0) * full[1],
        min(max(x1 / width, 0.0), 1.0) * full[0],
        min(max(y1 / height, 0.0), 1.0) * full[1],
    )
    return box if box[2] > box[0] and box[3] > box[1] else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / area if area > 0 else 0.0


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all."""
    columns = list(zip(*boxes, strict=True))
    return min(columns[0]), min(columns[1]), max(columns[2]), max(columns[3])


def probe_picture(cell: int) -> tuple[Image.Image, Box]:
    """A picture of 30 x 20 cells with a red square off its centre, and the square. Not square itself: the conventions
    then give boxes that do not overlap.
    """
    pixels = np.full((20 * cell, 30 * cell, 3), 225, np.uint8)
    x0, y0, side = 17 * cell, 11 * cell, 5 * cell
    pixels[y0 : y0 + side, x0 : x0 + side] = (220, 20, 20)
    return Image.fromarray(pixels), (float(x0), float(y0), float(x0 + side), float(y0 + side))


def settle_convention(wanted: str, model: str, answer: str, cell: int) -> str:
    """The convention to use, from the setting, the model's name and its answer about `probe_picture(cell)`.

    Raises:
        UserError: the model's box does not fit the square in the convention that it should have, or in any.
    """
    image, square = probe_picture(cell)
    try:
        numbers = [entry for entry, _ in parse_boxes(answer)]
    except ValueError as error:
        raise UserError(f"box test: {model} was asked for the red square and gave no box: {error}") from error
    fits = {}
    for name in CONVENTIONS:
        boxes = [to_pixels(entry, name, image.size, image.size) for entry in numbers]
        fits[name] = max((iou(box, square) for box in boxes if box is not None), default=0.0)
    expected = convention_of(model) if wanted == "auto" else wanted
    best = max(fits, key=lambda name: fits[name])
    if expected is None:
        expected = best
    if fits[expected] >= _MIN_IOU:
        return expected
    advice = f"; its answer fits {best!r}: set --config.box.convention={best}" if fits[best] >= _MIN_IOU else ""
    raise UserError(
        f"box test: {model} placed the square {tuple(map(int, square))} of a {image.width}x{image.height} picture at"
        f" {numbers}, which is wrong as {expected!r} (overlap {fits[expected]:.2f}, expected {_MIN_IOU}){advice}"
    )
