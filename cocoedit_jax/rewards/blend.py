"""Weighted sum of named rewards that keeps unknown scores unknown."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cocoedit_jax.errors import UserError


def blend(
    rewards: Mapping[str, Any], weights: Mapping[str, float], valid: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Total reward of every sample.

    Args:
        rewards: name -> ``[N]`` scores. A score that is not finite (or None) makes its sample invalid.
        weights: name -> weight; rewards with weight 0 or without a weight are ignored.
        valid: name -> ``[N]`` flags of rewards that report their own validity.

    Returns:
        ``(total, valid)``: float64 ``[N]``, NaN for invalid samples, and bool ``[N]``.

    Raises:
        UserError: when a weighted reward is missing or lengths differ.
    """
    used = {name: float(weight) for name, weight in weights.items() if weight}
    missing = sorted(set(used) - set(rewards))
    if missing:
        raise UserError(f"no scores for reward {missing} named in reward_weights; expected one of {sorted(rewards)}")
    if not used:
        raise UserError(f"reward_weights is {dict(weights)}; expected at least one weight that is not 0")
    flags = valid or {}
    scores = {name: np.asarray(rewards[name], np.float64) for name in used}
    size = len(next(iter(scores.values())))
    known = np.ones(size, bool)
    total = np.zeros(size)
    for name, weight in used.items():
        flag = np.asarray(flags[name]).astype(bool) if name in flags else np.ones(size, bool)
        if scores[name].shape != (size,) or flag.shape != (size,):
            raise UserError(
                f"reward {name!r} has shape {scores[name].shape}, validity {flag.shape}; expected ({size},) for both"
            )
        known &= flag & np.isfinite(scores[name])
        total += weight * np.where(np.isfinite(scores[name]), scores[name], 0.0)
    return np.where(known, total, np.nan), known
