"""The one attention function of the project, with interchangeable backends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Backend = Callable[[Array, Array, Array, Array | None], Array]

# Most queries in a block of the "blocked" backend. 512 x 2560 float32 scores of one head are 5 MB, a core's cache.
QUERY_BLOCK = 512


def _scores(q: Array, k: Array, key_mask: Array | None) -> Array:
    """Scaled, masked scores ``[..., H, Q, K]`` in float32 from ``[..., Q, H, D]`` and ``[..., K, H, D]``."""
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    scores = jnp.einsum("...qhd,...khd->...hqk", q * scale, k, preferred_element_type=jnp.float32)
    if key_mask is None:
        return scores
    return jnp.where(key_mask[..., None, None, :], scores, jnp.finfo(jnp.float32).min)


def _xla(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    # Softmax statistics are float32 whatever the activation dtype.
    weights = jax.nn.softmax(_scores(q, k, key_mask), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _cudnn(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


# --- blocked: one sample and one block of queries at a time, scores recomputed in the backward pass -------------------
# XLA's CPU backend writes the whole [B, H, Q, K] score tensor to memory three times over; kept in cache, the same
# arithmetic is about twice as fast there (benchmarks/RESULTS.md), and nothing quadratic is saved for backward.


def _query_blocks(x: Array) -> Array:
    """``[Q, ...] -> [blocks, size, ...]`` of equal size up to QUERY_BLOCK, the last one zero-padded."""
    blocks = -(-x.shape[0] // QUERY_BLOCK)
    size = -(-x.shape[0] // blocks)
    padding = -x.shape[0] % size
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _block_forward(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array]:
    scores = _scores(q, k, key_mask)  # [H, Q, K]
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("hqk,khd->hqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.transpose(1, 0, 2).astype(v.dtype), (maximum + jnp.log(total))[..., 0].T


def _blocked_forward(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array]:
    def one_sample(args: tuple) -> tuple[Array, Array]:
        q, k, v, key_mask = args
        out, lse = jax.lax.map(lambda block: _block_forward(block, k, v, key_mask), _query_blocks(q))
        return out.reshape(-1, *out.shape[2:])[: q.shape[0]], lse.reshape(-1, lse.shape[-1])[: q.shape[0]]

    return jax.lax.map(one_sample, (q, k, v, key_mask))


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    return _blocked_forward(q, k, v, key_mask)[0]


def _blocked_fwd(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, tuple]:
    out, lse = _blocked_forward(q, k, v, key_mask)
    return out, (q, k, v, key_mask, out, lse)


def _blocked_bwd(residuals: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    """FlashAttention's backward pass (arXiv 2205.14135, algorithm 4), whole rows of keys at a time."""

    def one_sample(args: tuple) -> tuple[Array, Array, Array]:
        q, k, v, key_mask, out, lse, d_out = args
        scale = q.shape[-1] ** -0.5
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [Q, H]

        def one_block(carry: tuple[Array, Array], block: tuple) -> tuple[tuple[Array, Array], Array]:
            d_k, d_v = carry
            q, d_out, lse, delta = block
            weights = jnp.exp(_scores(q, k, key_mask) - lse.T[..., None])  # [H, Q, K]
            d_v += jnp.einsum("hqk,qhd->khd", weights.astype(d_out.dtype), d_out, preferred_element_type=jnp.float32)
            d_weights = jnp.einsum("qhd,khd->hqk", d_out, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta.T[..., None]) * scale).astype(q.dtype)
            d_k += jnp.einsum("hqk,qhd->khd", d_scores, q, preferred_element_type=jnp.float32)
            return (d_k, d_v), jnp.einsum("hqk,khd->qhd", d_scores, k)

        zeros = jnp.zeros(k.shape, jnp.float32)
        blocks = tuple(_query_blocks(x) for x in (q, d_out, lse, delta))
        (d_k, d_v), d_q = jax.lax.scan(one_block, (zeros, zeros), blocks)
        return d_q.reshape(-1, *q.shape[1:])[: q.shape[0]], d_k.astype(k.dtype), d_v.astype(v.dtype)

    return *jax.lax.map(one_sample, (*residuals, d_out)), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)

BACKENDS: dict[str, Backend] = {"xla": _xla, "blocked": _blocked, "cudnn": _cudnn}


def select_backend(dtype: jnp.dtype, head_dim: int) -> str:
    """The fastest backend known to support this dtype and head size on the default device."""
    platform = jax.default_backend()
    if platform == "cpu":
        return "blocked"
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    return "xla"


def attention(q: Array, k: Array, v: Array, *, key_mask: Array | None = None, backend: str = "auto") -> Array:
    """Bidirectional scaled dot-product attention.

    Args:
        q: queries ``[B, Q, H, D]``.
        k: keys ``[B, K, H, D]``.
        v: values ``[B, K, H, D]``.
        key_mask: optional boolean ``[B, K]``; False keys receive no weight.
        backend: a name in ``BACKENDS``, or "auto".

    Returns:
        ``[B, Q, H, D]`` in the dtype of ``v``.

    Raises:
        KeyError: unknown backend.
    """
    name = select_backend(q.dtype, q.shape[-1]) if backend == "auto" else backend
    if name not in BACKENDS:
        raise KeyError(f"attention backend {name!r} is unknown; expected 'auto' or one of {sorted(BACKENDS)}")
    return BACKENDS[name](q, k, v, key_mask)
