"""The one attention function of the project, with interchangeable backends.

One device: ``xla`` (anywhere, writes all scores), ``blocked`` (anywhere, ``attention_blocked.py``), ``cudnn`` (NVIDIA
GPUs, 16-bit), ``splash`` (TPUs). With ``sharded=True`` a batch is split over the ambient mesh (``parallel.py``), and
every device attends to its own samples and heads; a context axis splits the tokens too, and ``ulysses`` or ``ring``
(``attention_context.py``) fetch what is missing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from cocoedit_jax.models import attention_blocked, attention_context, attention_splash, parallel
from cocoedit_jax.models.attention_blocked import ATTENTION_NAME
from cocoedit_jax.models.parallel import BATCH, CONTEXT, HEADS

Array = jax.Array
Backend = Callable[[Array, Array, Array, Array | None], Array]

CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def _pad(x: Array, number: int) -> Array:
    """``x`` ``[B, S, ...]`` with ``number`` tokens of zeros, or False, behind."""
    return jnp.pad(x, [(0, 0), (0, number)] + [(0, 0)] * (x.ndim - 2)) if number else x


def _xla(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
    # Softmax statistics are float32 whatever the activation dtype.
    weights = jax.nn.softmax(attention_blocked.scores(q, k, key_mask), axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bhqk,bkhd->bqhd", weights, v), ATTENTION_NAME)


def _cudnn(q: Array, k: Array, v: Array, key_mask: Array | None, *, implementation: Any = "cudnn") -> Array:
    """JAX gives cuDNN a mask as a bias of the full [Q, K] that it also differentiates, and refuses one of [1, K]; a
    number of keys costs nothing. So the keys that are not masked come first: attention does not mind their order. Nor
    does it differentiate attention of odd lengths: those are padded."""
    num_queries = q.shape[1]
    if key_mask is None and k.shape[1] % 2:
        key_mask = jnp.ones(k.shape[:2], jnp.bool_)
    q, k, v = (_pad(x, x.shape[1] % 2) for x in (q, k, v))
    key_mask = None if key_mask is None else _pad(key_mask, key_mask.shape[1] % 2)
    return _cudnn_even(q, k, v, key_mask, implementation)[:, :num_queries]


def _cudnn_even(q: Array, k: Array, v: Array, key_mask: Array | None, implementation: Any) -> Array:
    if key_mask is None:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    order = jnp.argsort(~key_mask, axis=1, stable=True)
    count = jnp.sum(key_mask, axis=1, dtype=jnp.int32)
    present = jnp.arange(k.shape[1]) < count[:, None]
    # Zeroed, so that neither values nor gradients depend on what the kernel does past the count.
    k, v = (jnp.take_along_axis(x, order[..., None, None], axis=1) for x in (k, v))
    k, v = (jnp.where(present[..., None, None], x, jnp.zeros((), x.dtype)) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=count, implementation=implementation)


BACKENDS: dict[str, Backend] = {
    "xla": _xla,
    "blocked": attention_blocked.blocked,
    "cudnn": _cudnn,
    "splash": attention_splash.splash,
}
CONTEXT_BACKENDS = ("ulysses", "ring")


def select_backend(dtype: Any, head_dim: int) -> str:
    """The fastest backend of one device known to support this dtype and head size (``parallel.platform``)."""
    platform = parallel.platform()
    if platform == "cpu":
        return "blocked"
    if platform == "gpu" and dtype in CUDNN_DTYPES and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    if platform == "tpu" and head_dim % attention_splash.LANES == 0:
        return "splash"
    return "xla"


def token_axes(mesh: Mesh, backend: str, lengths: Sequence[int]) -> tuple[str, ...]:
    """The context axis of ``mesh``, where every device can work on its share of each of ``lengths`` (text, images) by
    itself: whoever is manual in the axes of samples can be manual in this one too. Elsewhere it must stay automatic:
    the lengths do not divide, or ``backend`` wants whole sequences."""
    size = mesh.shape[CONTEXT]
    usable = size > 1 and backend not in BACKENDS and not any(length % size for length in lengths)
    return (CONTEXT,) if usable else ()


def _local(backend: str, q: Array) -> Backend:
    return BACKENDS[backend if backend in BACKENDS else select_backend(q.dtype, q.shape[-1])]


def _context_backend(backend: str, heads: int) -> str | None:
    """Which of ``CONTEXT_BACKENDS`` to use for ``heads`` on each device; None: every device has whole sequences."""
    size = parallel.context_size()
    if size == 1:
        return None
    if backend in BACKENDS:
        if parallel.tokens_are_shares():
            raise ValueError(f"attention backend {backend!r} on shares of tokens; expected one of {CONTEXT_BACKENDS}")
        return None
    if backend == "auto":
        return "ring" if heads % size else "ulysses"
    return backend


def _sharded(q: Array, k: Array, v: Array, key_mask: Array | None, backend: str) -> Array:
    """``attention`` on the automatic axes of the ambient mesh, each of them manual inside."""
    batch, _, heads, _ = parallel.activation_spec((BATCH, None, HEADS, None), q.shape)
    axes = parallel.automatic_axes()
    by_context = _context_backend(backend, q.shape[2] // parallel.shards(heads))
    local = _local(backend, q)
    length = q.shape[1]
    if by_context and CONTEXT in axes:  # else the caller has cut the sequence
        if k.shape[1] != length:
            raise ValueError(f"{length} queries and {k.shape[1]} keys on a context axis; expected self-attention")
        padding = -length % parallel.context_size()
        if padding:
            key_mask = jnp.ones(k.shape[:2], jnp.bool_) if key_mask is None else key_mask
            q, k, v, key_mask = (_pad(x, padding) for x in (q, k, v, key_mask))

    def on_one_device(q: Array, k: Array, v: Array, key_mask: Array | None) -> Array:
        if by_context == "ring":
            return attention_context.ring(q, k, v, key_mask, CONTEXT)
        if by_context == "ulysses":
            return attention_context.ulysses(q, k, v, key_mask, axis=CONTEXT, local=local)
        return local(q, k, v, key_mask)

    # Every axis that can be named is, those of one device too: over the others gradients would be summed.
    tokens = CONTEXT if CONTEXT in axes and (by_context or axes[CONTEXT] == 1) else None
    spec = PartitionSpec(batch, tokens, heads, None)
    out = jax.shard_map(
        on_one_device,
        in_specs=(spec, spec, spec, PartitionSpec(batch, tokens)),
        out_specs=spec,
        axis_names=frozenset(axes),
        check_vma=False,  # Pallas kernels do not say what they vary over
    )(q, k, v, key_mask)
    return out[:, :length]


def attention(
    q: Array, k: Array, v: Array, *, key_mask: Array | None = None, backend: str = "auto", sharded: bool = False
) -> Array:
    """Bidirectional scaled dot-product attention.

    Args:
        q: queries ``[B, Q, H, D]``.
        k: keys ``[B, K, H, D]``.
        v: values ``[B, K, H, D]``.
        key_mask: optional boolean ``[B, K]``; False keys receive no weight. A sample needs one that is True.
        backend: a name in ``BACKENDS`` or ``CONTEXT_BACKENDS``, or "auto": on a context axis ``ulysses`` where that
            divides the heads of a device, else ``ring``; otherwise, and on each device, ``select_backend``. Without a
            context axis the names in ``CONTEXT_BACKENDS`` mean "auto".
        sharded: split batch, tokens and heads over the ambient mesh, if there is one. Any length is padded to what the
            context axis divides; batch and heads that their axes do not divide are computed on each device.

    Returns:
        ``[B, Q, H, D]`` in the dtype of ``v``.

    Raises:
        KeyError: unknown backend.
        ValueError: ``ulysses`` with heads that do not divide; on a context axis, not as many keys as queries.
    """
    if backend not in ("auto", *BACKENDS, *CONTEXT_BACKENDS):
        names = sorted((*BACKENDS, *CONTEXT_BACKENDS))
        raise KeyError(f"attention backend {backend!r} is unknown; expected 'auto' or one of {names}")
    # On axes of one device too: a Pallas kernel may not be left to the partitioner while any axis is automatic.
    if sharded and parallel.automatic_axes() and jax.sharding.get_abstract_mesh().size > 1:
        return _sharded(q, k, v, key_mask, backend)
    return _local(backend, q)(q, k, v, key_mask)
