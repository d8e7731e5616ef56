"""How the old policy and the evaluation average follow the trained adapter."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from cocoedit_jax.errors import UserError

Tree = TypeVar("Tree")


def old_policy_decay(step: int, decay_type: int) -> float:
    """Share of itself that the old policy keeps after optimizer step ``step`` (counted from 1).

    Type 0: 0, the old policy is always the trained one. Type 1: ``min(0.001 n, 0.5)``. Type 2: 0 before ``n = 75``,
    then ``min(0.0075 (n - 75), 0.999)``. Schedules of DiffusionNFT's released code (arXiv 2509.16117).

    Raises:
        UserError: for an unknown ``decay_type``.
    """
    if decay_type == 0:
        return 0.0
    if decay_type == 1:
        return min(0.001 * step, 0.5)
    if decay_type == 2:
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise UserError(f"old_decay_type is {decay_type!r}; expected 0, 1 or 2")


def blend(old: Tree, theta: Tree, decay: jax.Array | float) -> Tree:
    """``decay * old + (1 - decay) * theta`` on every leaf, computed in float32, in ``old``'s dtypes."""
    d = jnp.asarray(decay, jnp.float32)

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        mixed = d * a.astype(jnp.float32) + (1.0 - d) * b.astype(jnp.float32)
        return mixed.astype(a.dtype)

    return jax.tree.map(leaf, old, theta)


def ema_decay(step: int, cap: float = 0.9) -> float:
    """Decay of the evaluation average after step ``n``, counted from 1: ``min((1 + n) / (10 + n), cap)``."""
    return min((1 + step) / (10 + step), cap)
