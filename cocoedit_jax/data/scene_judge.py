"""Programmatic judge for procedural editing scenes: was the instruction followed? A score in [0, 1].

Like a multimodal judge it looks at objects, not at the background: only pixels covered by an object before or after
the edit count, so background drift elsewhere leaves the score unchanged. That blindness is what makes a policy trained
on it alone drift.

Score = likelihood * fidelity * survival, with Euclidean RGB distances d_source, d_target of a pixel to the rendered
source and target and gap = |target - source| at that pixel:
- likelihood: mean of sigmoid(SHARPNESS * (d_source - d_target) / gap) over the changed pixels, divided by
  sigmoid(SHARPNESS), so that the ideal target gives 1;
- fidelity: FLOOR + (1 - FLOOR) * exp(-mean d_target / FIDELITY_SCALE) over the whole of the changed shapes: ragged half
  edits and over-saturated blobs are closer to the target than to the source, but not good;
- survival: product over the other objects of the mean of sigmoid(SURVIVAL_SHARPNESS * (1/2 - d_source / contrast)),
  normalised to 1 at d_source = 0, where contrast is the object's distance to the background behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cocoedit_jax.data.scene_render import render_layers
from cocoedit_jax.data.scene_spec import SceneSpec

SHARPNESS = 2.3
FLOOR = 0.5
FIDELITY_SCALE = 0.2
SURVIVAL_SHARPNESS = 10.0
MIN_GAP = 0.08  # Euclidean RGB distance below which a pixel says nothing about source or target
MIN_CONTRAST = 0.3
NO_EDIT_SHARE = 0.25


@dataclass(frozen=True)
class SceneScore:
    """Parts of the score, each float64 [n] in [0, 1]; `score` is the product of the other three. `change_share` [n]:
    mean absolute change of the edited image over the changed pixels, divided by the target's.
    """

    score: np.ndarray
    likelihood: np.ndarray
    fidelity: np.ndarray
    survival: np.ndarray
    change_share: np.ndarray

    @property
    def no_edit(self) -> np.ndarray:
        """Bool [n]: the image changed by less than NO_EDIT_SHARE (25 %) of what the target changes, measured as mean
        absolute difference to the source over the changed pixels. A wrong edit is not "no edit".
        """
        return self.change_share < NO_EDIT_SHARE


def judge_batch(specs: Sequence[SceneSpec], edited: np.ndarray) -> SceneScore:
    """Judge `edited` [n, s, s, 3] (float in [0, 1], or uint8) against the scenes; ValueError on another shape."""
    images = _as_float(edited)
    if images.ndim != 4 or images.shape[0] != len(specs) or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"edited: shape {tuple(np.shape(edited))}, expected ({len(specs)}, size, size, 3)")
    size = images.shape[1]
    layers = render_layers(specs, size)
    before, after = layers.source_coverage > 0.5, layers.target_coverage > 0.5
    touched = layers.changed_pixels
    shapes = touched & (before | after)
    d_source, d_target = _distance(images, layers.source), _distance(images, layers.target)
    gap = _distance(layers.target, layers.source)
    changed = shapes & (gap > MIN_GAP)

    lean = _sigmoid(SHARPNESS * (d_source - d_target) / np.maximum(gap, MIN_GAP)) / _sigmoid(SHARPNESS)
    likelihood = _masked_mean(lean, changed)
    fidelity = FLOOR + (1.0 - FLOOR) * np.exp(-_masked_mean(d_target, shapes) / FIDELITY_SCALE)

    contrast = np.maximum(_distance(layers.source, layers.background), MIN_CONTRAST)
    alive = _sigmoid(SURVIVAL_SHARPNESS * (0.5 - d_source / contrast)) / _sigmoid(SURVIVAL_SHARPNESS / 2)
    others = before & ~touched
    half = size // 2
    quarters = (len(specs), 2, half, 2, half)
    total = np.where(others, alive, 0.0).reshape(quarters).sum(axis=(2, 4))
    count = others.reshape(quarters).sum(axis=(2, 4))
    survival = np.where(count > 0, total / np.maximum(count, 1), 1.0).prod(axis=(1, 2))

    moved = np.abs(images - layers.source).mean(axis=-1)
    asked = np.abs(layers.target - layers.source).mean(axis=-1)
    share = _masked_mean(moved, changed) / np.maximum(_masked_mean(asked, changed), 1e-6)
    return SceneScore(likelihood * fidelity * survival, likelihood, fidelity, survival, share)


def _as_float(image: np.ndarray) -> np.ndarray:
    array = np.asarray(image)
    return array.astype(np.float64) / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = a.astype(np.float64) - b
    return np.sqrt(np.einsum("nhwc,nhwc->nhw", difference, difference))


def _masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, values, 0.0).sum(axis=(1, 2)) / np.maximum(mask.sum(axis=(1, 2)), 1)


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))
