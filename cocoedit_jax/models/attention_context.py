"""Attention over sequences that are split over a mesh axis. Both run inside ``jax.shard_map``, manual in that axis, on
one device's share: ``q``, ``k``, ``v`` ``[B, S / n, H, D]`` and ``key_mask`` ``[B, S / n]`` or None.

Ulysses (arXiv 2309.14509) trades tokens for heads, attends with any kernel to whole sequences, and trades back: two
all-to-alls of ``S H D / n`` each way per tensor. Ring (arXiv 2310.01889) keeps queries where they are and passes keys
and values round: it needs no heads to spare, and moves more.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cocoedit_jax.models import attention_blocked
from cocoedit_jax.models.attention_blocked import ATTENTION_NAME

Array = jax.Array
Local = Callable[[Array, Array, Array, Array | None], Array]


def ulysses(q: Array, k: Array, v: Array, key_mask: Array | None, *, axis: str, local: Local) -> Array:
    """By all-to-all; the size of ``axis`` must divide the heads of one device. ``local`` attends on one device."""
    size = jax.lax.axis_size(axis)
    if q.shape[2] % size:
        raise ValueError(f"ulysses: {q.shape[2]} heads are not a multiple of {size} devices; expected 'ring' there")
    q, k, v = (jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    if key_mask is not None:
        key_mask = jax.lax.all_gather(key_mask, axis, axis=1, tiled=True)
    return jax.lax.all_to_all(local(q, k, v, key_mask), axis, split_axis=1, concat_axis=2, tiled=True)


def _pass_on(tree: Any, axis: str) -> Any:
    """Every device's arrays, moved to the next one round ``axis``."""
    size = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(q: Array, k: Array, v: Array, key_mask: Array | None, axis: str) -> Array:
    """By passing keys, values and their mask round ``axis``; softmax statistics and sums are float32."""
    return _ring_fwd(q, k, v, key_mask, axis)[0]


def _ring_fwd(q: Array, k: Array, v: Array, key_mask: Array | None, axis: str) -> tuple[Array, tuple]:
    def add(total: tuple[Array, Array], share: tuple) -> tuple[Array, Array]:
        out, lse = total
        more, more_lse = attention_blocked.forward(q, *share)
        new = jnp.logaddexp(lse, more_lse)
        return out * jnp.exp(lse - new)[..., None] + more * jnp.exp(more_lse - new)[..., None], new

    def one_step(carry: tuple, _: None) -> tuple[tuple, None]:
        total, share = carry
        share = _pass_on(share, axis)
        return (add(total, share), share), None

    share = (k, v, key_mask)
    total = attention_blocked.forward(q, *share)
    ((out, lse), _), _ = jax.lax.scan(one_step, (total, share), length=jax.lax.axis_size(axis) - 1)
    out, lse = checkpoint_name(out.astype(v.dtype), ATTENTION_NAME), checkpoint_name(lse, ATTENTION_NAME)
    return out, (q, k, v, key_mask, out, lse)


def _ring_bwd(axis: str, residuals: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Given lse and delta of whole rows, every share of keys adds its own part; its gradients travel with it."""
    q, k, v, key_mask, out, lse = residuals
    delta = attention_blocked.output_delta(out, d_out)

    def one_step(carry: tuple, _: None) -> tuple[tuple, None]:
        d_q, share, (d_k, d_v) = carry
        k, v, key_mask = share
        more_q, more_k, more_v = attention_blocked.backward(q, k, v, key_mask, lse, delta, d_out)
        share, grads = _pass_on((share, (d_k + more_k, d_v + more_v)), axis)
        return (d_q + more_q, share, grads), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    carry = (zeros[0], (k, v, key_mask), zeros[1:])
    (d_q, _, (d_k, d_v)), _ = jax.lax.scan(one_step, carry, length=jax.lax.axis_size(axis))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


ring.defvjp(_ring_fwd, _ring_bwd)
