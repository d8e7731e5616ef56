"""Splash attention, JAX's Pallas kernel for TPUs, without a causal mask."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from cocoedit_jax.models.attention_blocked import ATTENTION_NAME

Array = jax.Array

LANES = 128  # of a vector register: sizes of blocks, and of heads, are its multiples
LARGEST_BLOCK = 512


def block_size(length: int) -> int:
    """The multiple of 128 up to 512 that pads ``length`` least; of several, the largest."""
    sizes = range(LARGEST_BLOCK, 0, -LANES)
    return min(sizes, key=lambda size: (-length % size, -size))


def _pad(x: Array, axis: int, size: int) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding)


def splash(q: Array, k: Array, v: Array, key_mask: Array | None, *, interpret: bool = False) -> Array:
    """As ``attention``, of ``[B, S, H, D]`` on one device.

    Keys that are masked, or pad the sequence to whole blocks, belong to another segment than every query.

    Args:
        interpret: emulate the kernel, anywhere; for tests.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    block_q, block_kv = block_size(num_queries), block_size(num_keys)
    if key_mask is None and num_keys % block_kv:
        key_mask = jnp.ones(k.shape[:2], jnp.bool_)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (_pad(x, 1, size).swapaxes(1, 2) for x, size in ((q, block_q), (k, block_kv), (v, block_kv)))

    sizes = kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    every = masks.FullMask((q.shape[2], k.shape[2]))
    run = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([every] * q.shape[1]),
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION_NAME,
        interpret=interpret,
    )
    if key_mask is None:
        out = jax.vmap(run)(q, k, v)
    else:
        query_segments = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)
        key_segments = _pad(key_mask.astype(jnp.int32), 1, block_kv)
        out = jax.vmap(run)(q, k, v, kernel.SegmentIds(query_segments, key_segments))
    tokens: Any = out
    return tokens.swapaxes(1, 2)[:, :num_queries].astype(v.dtype)
