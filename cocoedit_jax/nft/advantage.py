"""From rewards to optimality: group statistics, advantages, which samples count, and the map r in [0, 1].

Host code, float64. A group holds the samples of one record; its members may lie anywhere in the arrays, and groups may
differ in size. ``valid`` marks samples whose reward is known: the others enter no statistic and get advantage 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cocoedit_jax.errors import UserError

Array = np.ndarray


class GroupStatistics(NamedTuple):
    """Float64 ``[N]``, each sample's own group; deviation with ddof 0. NaN where a group has no valid sample."""

    mean: Array
    std: Array


@dataclasses.dataclass(frozen=True)
class _Groups:
    index: Array  # [N] number of each sample's group
    valid: Array  # [N] float64, 1 or 0
    count: Array  # [N] valid members of each sample's group

    def mean(self, values: Array) -> Array:
        """Mean over the valid members of each sample's group; ``values`` is ``[N, ...]``; NaN for none."""
        shape = (-1,) + (1,) * (values.ndim - 1)
        kept = np.where(self.valid.reshape(shape) > 0, values, 0.0)
        total = np.zeros((int(self.index.max(initial=-1)) + 1, *values.shape[1:]))
        np.add.at(total, self.index, kept)
        count = self.count.reshape(shape)
        return np.where(count > 0, total[self.index] / np.maximum(count, 1.0), np.nan)


def _groups(group: Any, size: int, valid: Any) -> _Groups:
    ids = np.asarray(group)
    if ids.shape != (size,):
        raise UserError(f"group has shape {ids.shape}; expected one id for each of {size} rewards")
    mask = np.ones(size) if valid is None else np.asarray(valid).astype(np.float64)
    if mask.shape != (size,):
        raise UserError(f"valid has shape {mask.shape}; expected one flag for each of {size} rewards")
    _, index = np.unique(ids, return_inverse=True)
    return _Groups(index, mask, np.bincount(index, weights=mask)[index] if size else mask)


def _rewards(reward: Any, valid: Any) -> Array:
    values = np.asarray(reward, np.float64)
    if values.ndim != 1:
        raise UserError(f"reward has shape {values.shape}; expected one number per sample")
    used = np.ones(values.shape, bool) if valid is None else np.asarray(valid).astype(bool)
    if used.shape == values.shape and not np.all(np.isfinite(values[used])):
        raise UserError("reward holds a number that is not finite; expected such samples to be marked invalid")
    return values


def group_statistics(reward: Any, group: Any, *, valid: Any = None) -> GroupStatistics:
    """Mean and deviation of each sample's group.

    Raises:
        UserError: for shapes that do not fit, or a valid reward that is not finite.
    """
    values = _rewards(reward, valid)
    groups = _groups(group, len(values), valid)
    mean = groups.mean(values)
    return GroupStatistics(mean, np.sqrt(groups.mean(np.square(values - mean))))


def advantages(reward: Any, group: Any, *, std: str = "global", eps: float = 1e-4, valid: Any = None) -> Array:
    """Group-relative advantage ``(R - group mean) / (deviation + eps)``.

    Args:
        reward: ``[N]``.
        group: ``[N]`` ids of any comparable kind.
        std: "global", the deviation of all rewards of the step (ddof 0), or "group", that of the sample's own group.
        eps: added to the deviation, in reward units.
        valid: ``[N]`` flags; None = all.

    Returns:
        float64 ``[N]``; 0 for invalid samples.

    Raises:
        UserError: for shapes that do not fit, an unknown ``std``, or a valid reward that is not finite.
    """
    values = _rewards(reward, valid)
    mean, group_std = group_statistics(values, group, valid=valid)
    used = np.ones(len(values), bool) if valid is None else np.asarray(valid).astype(bool)
    if std == "global":
        deviation: Array | float = float(values[used].std()) if used.any() else 0.0
    elif std == "group":
        deviation = group_std
    else:
        raise UserError(f"advantage_std is {std!r}; expected 'global' or 'group'")
    return np.where(used, (values - mean) / (deviation + eps), 0.0)


def combined_advantages(
    rewards: Mapping[str, Any],
    weights: Mapping[str, float],
    group: Any,
    *,
    std: str = "global",
    eps: float = 1e-4,
    valid: Any = None,
) -> Array:
    """``reward_normalise = per_reward``: an advantage for each reward alone, then their weighted mean.

    A reward with a small spread then counts by its weight, not by its spread.

    Raises:
        UserError: when a weighted reward is missing, and as ``advantages``.
    """
    used = {name: weight for name, weight in weights.items() if weight}
    missing = sorted(set(used) - set(rewards))
    if missing or not used:
        raise UserError(f"rewards are {sorted(rewards)}; expected also {missing} named in reward_weights")
    parts = [w * advantages(rewards[n], group, std=std, eps=eps, valid=valid) for n, w in used.items()]
    return np.sum(parts, axis=0) / sum(used.values())


def clip_advantage(advantage: Any, clip: float, mode: str = "all") -> Array:
    """Advantages as the objective uses them: clipped to ``+-clip``, then filtered by ``adv_mode``.

    Raises:
        UserError: for an unknown ``mode``.
    """
    a = np.clip(np.asarray(advantage, np.float64), -clip, clip)
    if mode == "all":
        return a
    if mode == "positive_only":
        return np.maximum(a, 0.0)
    if mode == "negative_only":
        return np.minimum(a, 0.0)
    if mode == "one_only":
        return np.where(a > 0, 1.0, 0.0)
    if mode == "binary":
        return np.sign(a)
    raise UserError(f"adv_mode is {mode!r}; expected all, positive_only, negative_only, one_only or binary")


def optimality(advantage: Any, clip: float, mode: str = "all") -> Array:
    """Probability-like ``r = clip(A / (2 clip) + 1/2, 0, 1)`` of arXiv 2509.16117; same shape as ``advantage``."""
    return np.clip(clip_advantage(advantage, clip, mode) / (2.0 * clip) + 0.5, 0.0, 1.0)


def validity(statistics: GroupStatistics, *, ban: bool, ban_std: float, ban_mean: float) -> Array:
    """Bool ``[N]``: whether the sample's group can teach anything; all true with ``ban`` off.

    A group counts when its deviation is above ``ban_std`` and its mean below ``ban_mean`` (released code).
    """
    if not ban:
        return np.ones(len(statistics.mean), bool)
    return (statistics.std > ban_std) & (statistics.mean < ban_mean)


def banned(group: Any, statistics: GroupStatistics, *, ban_std: float, ban_mean: float) -> Array:
    """Ids, sorted and distinct, of the groups to leave out from now on: low deviation and a mean above ``ban_mean``."""
    return np.unique(np.asarray(group)[(statistics.std < ban_std) & (statistics.mean > ban_mean)])


def token_optimality(
    x0: Any,
    source: Any,
    group: Any,
    judge_advantage: Any,
    inside_share: Any,
    *,
    clip: float,
    inside_weight: float = 4.0,
    eps: float = 1e-3,
    mode: str = "all",
    valid: Any = None,
) -> tuple[Array, Array]:
    """Region-routed optimality: the judge's advantage inside the edit mask, closeness to the source outside.

    Outside, a token's raw value is minus its mean squared distance to the source latent; the mean over the group at the
    same token is taken off, and all are divided by one root mean square (over all valid samples and tokens, weighted by
    the share that lies outside) plus ``eps``. A token on the border mixes the two by its share.

    Args:
        x0: sampled latents ``[N, n, c]``.
        source: source latents ``[N, n, c]``.
        group: ``[N]`` ids; members share source and mask.
        judge_advantage: ``[N]``, group mean taken off, divided by the pooled deviation.
        inside_share: ``[N, n]`` share in [0, 1] of each token that may change (``flow.packing.token_share``).
        clip: advantages are clipped to ``+-clip``.
        inside_weight: policy-loss weight of a token fully inside; outside it is 1.
        eps: in squared latent units.
        mode: as in ``optimality``.
        valid: ``[N]`` flags; None = all.

    Returns:
        ``(r, token_weight)``, float32 ``[N, n]``.

    Raises:
        UserError: for shapes that do not fit.
    """
    sampled, kept, share = (np.asarray(a, np.float32) for a in (x0, source, inside_share))
    judged = np.asarray(judge_advantage, np.float64)
    if sampled.ndim != 3 or sampled.shape != kept.shape:
        raise UserError(f"x0 and source have shapes {sampled.shape}, {kept.shape}; expected the same [N, n, c]")
    if share.shape != sampled.shape[:2] or judged.shape != sampled.shape[:1]:
        raise UserError(
            f"inside_share and judge_advantage have shapes {share.shape}, {judged.shape}; expected "
            f"{sampled.shape[:2]} and {sampled.shape[:1]}"
        )
    groups = _groups(group, len(sampled), valid)
    used = groups.valid[:, None] > 0
    closeness = -np.square(sampled - kept).mean(axis=2, dtype=np.float64)
    centred = np.where(used, closeness - groups.mean(closeness), 0.0)
    outside = (1.0 - share) * used
    rms = np.sqrt((outside * np.square(centred)).sum() / max(float(outside.sum()), 1e-12))
    mixed = share * np.where(used, judged[:, None], 0.0) + (1.0 - share) * centred / (rms + eps)
    weight = 1.0 + (inside_weight - 1.0) * share
    return optimality(mixed, clip, mode).astype(np.float32), weight.astype(np.float32)
