"""From a picture and a box to the pixels of the thing in it. Those that need PyTorch live in torch_bridge/masks.py."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cocoedit_jax.annotation.boxes import Box
from cocoedit_jax.annotation.mask_ops import box_mask
from cocoedit_jax.errors import UserError


class Segmenter(Protocol):
    """RGB picture and box in its pixels -> bool [H, W], true on the thing. One call at a time."""

    def __call__(self, image: Image.Image, box: Box) -> np.ndarray: ...


class BoxSegmenter:
    """All of the box. No model; for a first look and for tests."""

    def __call__(self, image: Image.Image, box: Box) -> np.ndarray:
        return box_mask(box, image.size)


class RandomWalkerSegmenter:
    """Separates what looks like the centre of the box from what looks like its surroundings, by scikit-image's random
    walker (Grady, 2006). No weights; good for things that stand out from a plain background.

    side: the picture is worked on with its longer side this long, in pixels. beta: how hard it is to cross an edge.
    core: share of the box, around its centre, that is taken to be the thing.
    """

    def __init__(self, side: int = 256, beta: float = 130.0, core: float = 0.3):
        try:
            self._walk = importlib.import_module("skimage.segmentation").random_walker
        except ModuleNotFoundError as error:
            raise UserError(
                "segmenter random-walker needs scikit-image; install with: pip install 'cocoedit-jax[annotate]'"
            ) from error
        self._side, self._beta, self._core = side, beta, core

    def __call__(self, image: Image.Image, box: Box) -> np.ndarray:
        scale = min(1.0, self._side / max(image.size))
        width, height = (max(round(side * scale), 3) for side in image.size)
        small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float64) / 255
        near = (box[0] * width / image.width, box[1] * height / image.height)
        far = (box[2] * width / image.width, box[3] * height / image.height)
        inside = box_mask((*near, *far), (width, height))
        center = [(a + b) / 2 for a, b in zip(near, far, strict=True)]
        reach = [(b - a) / 2 * self._core for a, b in zip(near, far, strict=True)]
        core = box_mask((center[0] - reach[0], center[1] - reach[1], center[0] + reach[0], center[1] + reach[1]),
                        (width, height))  # fmt: skip
        if inside.all():
            return box_mask(box, image.size)  # nothing outside to tell it from
        labels = np.where(inside, np.where(core, 1, 0), 2)
        found = self._walk(small, labels, beta=self._beta, mode="cg_j", tol=1e-5, channel_axis=-1) == 1
        return np.asarray(Image.fromarray(found).resize(image.size, Image.Resampling.NEAREST)).astype(bool)


SEGMENTERS: dict[str, Any] = {
    "box": BoxSegmenter,
    "random-walker": RandomWalkerSegmenter,
    "sam2": "torch_bridge.masks:Sam2Segmenter",
    "sam2-transformers": "torch_bridge.masks:TransformersSam2Segmenter",
}


WITHOUT_GPU = ("box", "random-walker")


def make_segmenter(name: str, options: Mapping[str, Any]) -> Segmenter:
    """The segmenter `name`, built with `options`; `MODULE:CLASS` takes one that is not listed.

    Raises:
        UserError: an unknown name or option, or one that cannot be imported.
    """
    factory = SEGMENTERS.get(name, name)
    if isinstance(factory, str):
        if ":" not in factory:
            raise UserError(f"segmenter: {name!r} given, expected MODULE:CLASS or one of {', '.join(SEGMENTERS)}")
        module, _, attribute = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"segmenter: {name!r} given, but it cannot be imported ({error})") from error
    try:
        return factory(**options)
    except TypeError as error:
        raise UserError(f"segmenter {name!r}: options {sorted(options)} do not fit ({error})") from error
