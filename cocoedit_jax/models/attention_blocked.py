"""Attention by blocks of queries, one sample at a time, scores recomputed in the backward pass.

XLA's CPU backend writes the whole [B, H, Q, K] score tensor to memory three times over; kept in cache, the same
arithmetic is about twice as fast there (benchmarks/RESULTS.md), and nothing quadratic is saved for backward. Partial
results carry the logarithm of their softmax denominators (``lse``), by which ring attention adds them up.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Most queries in a block. 512 x 2560 float32 scores of one head are 5 MB, a core's cache.
QUERY_BLOCK = 512
# Under this name a remat policy can save attention's output, and what its backward pass needs beside q, k and v.
ATTENTION_NAME = "attention"


def scores(q: Array, k: Array, key_mask: Array | None) -> Array:
    """Scaled, masked scores ``[..., H, Q, K]`` in float32 from ``[..., Q, H, D]`` and ``[..., K, H, D]``."""
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    scores = jnp.einsum("...qhd,...khd->...hqk", q * scale, k, preferred_element_type=jnp.float32)
    if key_mask is None:
        return scores
    return jnp.where(key_mask[..., None, None, :], scores, jnp.finfo(jnp.float32).min)


def _query_blocks(x: Array) -> Array:
    """``[Q, ...] -> [blocks, size, ...]`` of equal size up to QUERY_BLOCK, the last one zero-padded."""
    blocks = -(-x.shape[0] // QUERY_BLOCK)
    size = -(-x.shape[0] // blocks)
    padding = -x.shape[0] % size
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _block_forward(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array]:
    logits = scores(q, k, key_mask)  # [H, Q, K]
    maximum = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("hqk,khd->hqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.transpose(1, 0, 2), (maximum + jnp.log(total))[..., 0].T


def forward(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array]:
    """Attention ``[B, Q, H, D]`` and its lse ``[B, Q, H]``, both float32."""

    def one_sample(args: tuple) -> tuple[Array, Array]:
        q, k, v, key_mask = args
        out, lse = jax.lax.map(lambda block: _block_forward(block, k, v, key_mask), _query_blocks(q))
        return out.reshape(-1, *out.shape[2:])[: q.shape[0]], lse.reshape(-1, lse.shape[-1])[: q.shape[0]]

    return jax.lax.map(one_sample, (q, k, v, key_mask))


def backward(
    q: Array, k: Array, v: Array, key_mask: Array | None, lse: Array, delta: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    """Float32 gradients of q, k and v (FlashAttention, arXiv 2205.14135, algorithm 4), whole rows of keys at a time.

    Args:
        lse: of all keys, of which ``k`` may be some ``[B, Q, H]``.
        delta: sum of ``d_out`` times the output of all keys, over features ``[B, Q, H]``.
    """

    def one_sample(args: tuple) -> tuple[Array, Array, Array]:
        q, k, v, key_mask, lse, delta, d_out = args
        scale = q.shape[-1] ** -0.5

        def one_block(carry: tuple[Array, Array], block: tuple) -> tuple[tuple[Array, Array], Array]:
            d_k, d_v = carry
            q, d_out, lse, delta = block
            weights = jnp.exp(scores(q, k, key_mask) - lse.T[..., None])  # [H, Q, K]
            d_v += jnp.einsum("hqk,qhd->khd", weights.astype(d_out.dtype), d_out, preferred_element_type=jnp.float32)
            d_weights = jnp.einsum("qhd,khd->hqk", d_out, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta.T[..., None]) * scale).astype(q.dtype)
            d_k += jnp.einsum("hqk,qhd->khd", d_scores, q, preferred_element_type=jnp.float32)
            return (d_k, d_v), jnp.einsum("hqk,khd->qhd", d_scores, k, preferred_element_type=jnp.float32)

        zeros = jnp.zeros(k.shape, jnp.float32)
        blocks = tuple(_query_blocks(x) for x in (q, d_out, lse, delta))
        (d_k, d_v), d_q = jax.lax.scan(one_block, (zeros, zeros), blocks)
        return d_q.reshape(-1, *q.shape[1:])[: q.shape[0]], d_k, d_v

    return jax.lax.map(one_sample, (q, k, v, key_mask, lse, delta, d_out))


def output_delta(out: Array, d_out: Array) -> Array:
    """``backward``'s delta."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


@jax.custom_vjp
def blocked(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    """As ``attention``, of ``[B, S, H, D]``."""
    return _blocked_fwd(q, k, v, key_mask)[0]


def _blocked_fwd(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, tuple]:
    out, lse = forward(q, k, v, key_mask)
    out, lse = checkpoint_name(out.astype(v.dtype), ATTENTION_NAME), checkpoint_name(lse, ATTENTION_NAME)
    return out, (q, k, v, key_mask, out, lse)


def _blocked_bwd(residuals: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, key_mask, out, lse = residuals
    d_q, d_k, d_v = backward(q, k, v, key_mask, lse, output_delta(out, d_out), d_out)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


blocked.defvjp(_blocked_fwd, _blocked_bwd)
