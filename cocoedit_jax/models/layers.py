"""Layers that every transformer here shares: linear with LoRA, AdaLN modulation, RMSNorm, RoPE, MLP, joint attention.

Kernels are ``[in, out]``. The second entry of each ``axes`` tuple names the output dimension. Logical axis names are
mapped to mesh axes by the one table in ``cocoedit_jax.sharding.rules``.

A LoRA adapter is not part of a module's parameters: it is a second variable collection, ``lora``, with the same module
paths. Applying a model without that collection gives the base model, so the reference policy costs no second copy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models import parallel, quantize
from cocoedit_jax.models.attention import attention
from cocoedit_jax.models.parallel import join_streams, split_streams

Array = jax.Array
Dtype = Any

LORA = "lora"
MODULATION = "modulation"  # tables of modulation vectors, computed beforehand for the timesteps that are used


def partitioned(init: Any, axes: tuple[str | None, ...]) -> Any:
    """``init`` with logical axis names. Typed ``Any``: flax takes the box off again before a module sees the array."""
    return nn.with_logical_partitioning(init, axes)


class Linear(nn.Module):
    """``y = x W + b (+ x A B when an adapter is present)``; the adapter's alpha/rank is folded into B by the caller.

    The kernel may be quantised (``quantize.Kernel``): the parameters say so, not the module.
    """

    features: int
    axes: tuple[str | None, str | None]
    dtype: Dtype = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    def _weight(self, name: str, init: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
        if parallel.holds_shards():
            return parallel.whole(self.get_variable("params", name), axes, shape)
        return self.param(name, partitioned(init, axes), shape, self.dtype)

    def _product(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        """``x W``; ``axes``: of the result's features."""
        shape = (x.shape[-1], self.features)
        kernel: Any = self.get_variable("params", "kernel")
        if not quantize.is_kernel(kernel):
            return x @ self._weight("kernel", self.kernel_init, self.axes, shape).astype(self.dtype)
        whole = parallel.whole if parallel.holds_shards() else lambda x, *_: x
        values, scale = whole(kernel.values, self.axes, shape), whole(kernel.scale, axes, shape[1:])
        return quantize.matmul(x, kernel.replace(values=values, scale=scale))

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = quantize.result_axes(self.axes)
        x = x.astype(self.dtype)
        y = self._product(x, axes)
        y = y + self._weight("bias", nn.initializers.zeros, axes, (self.features,)).astype(self.dtype)
        if self.has_variable(LORA, "lora_A"):
            lora_a = self.get_variable(LORA, "lora_A").astype(self.dtype)
            lora_b = self.get_variable(LORA, "lora_B").astype(self.dtype)
            y = y + (x @ lora_a) @ lora_b
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned weight; statistics in float32."""

    eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("scale", partitioned(nn.initializers.ones, (None,)), (x.shape[-1],), self.dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Layer norm without affine parameters; statistics in float32."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """``x (1 + scale) + shift`` for tokens ``[B, S, D]``; ``shift``, ``scale`` ``[B, 1, D]`` or per token."""
    return x * (1 + scale) + shift


class Modulation(Linear):
    """``num_chunks`` modulation vectors ``[B, 1, D]`` from the conditioning vector: ``split(Linear(SiLU(temb)))``.

    Where the timestep alone decides ``temb``, they may be computed beforehand: with a table ``[rows, num_chunks D]`` in
    the ``modulation`` collection there is no kernel, and ``temb`` is the row of every sample, an integer ``[B]``.
    """

    axes: tuple[str | None, str | None] = ("embed", "modulation")
    # Zero start (AdaLN-Zero): every block is the identity before training.
    kernel_init: Any = nn.initializers.zeros
    num_chunks: int = 6

    @nn.compact
    def __call__(self, temb: Array) -> list[Array]:
        if self.has_variable(MODULATION, "table"):
            out = self.get_variable(MODULATION, "table")[temb].astype(self.dtype)
        else:
            out = super().__call__(nn.silu(temb))
        # Fetched whole where features are split; or the tokens that they modulate would be split, and fetched.
        out = parallel.constrain(out[:, None], (parallel.BATCH, None, None))
        return jnp.split(out, self.num_chunks, axis=-1)


def sinusoidal_embedding(
    t: Array, dim: int, max_period: float = 10_000.0, scale: float = 1.0, rounded_to: Dtype = jnp.float32
) -> Array:
    """Sinusoidal features ``[B, dim]`` of ``scale`` times a scalar ``[B]``, cosines first, in float32.

    The scale multiplies the angles, not ``t``: at float32 the order of the two roundings shows.

    float32 because bf16 has 8 significant bits: t * 1000 would collapse neighbouring timesteps onto one another.

    Args:
        rounded_to: dtype to which ``t`` and the frequencies are rounded before they are multiplied. At angles of 1000
            rad bfloat16's rounding changes the high frequencies altogether, so it is part of a model that ran with it.
    """
    half = dim // 2
    # The exponent is rounded to float32 where these models were trained; at angles of 1000 rad the rounding shows.
    exponent = np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32).astype(rounded_to).astype(np.float32)
    bits = jnp.finfo(rounded_to)  # reduce_precision, because compilers may leave out a cast there and back
    t = jax.lax.reduce_precision(t.astype(jnp.float32), bits.nexp, bits.nmant)
    angles = scale * (t[:, None] * jnp.asarray(frequencies)[None, :])
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class EmbedMLP(nn.Module):
    """Linear -> SiLU -> Linear, as diffusers' TimestepEmbedding and PixArtAlphaTextProjection."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Linear(self.features, (None, "embed"), dtype=self.dtype, name="linear_1")(x)
        return Linear(self.features, ("embed", None), dtype=self.dtype, name="linear_2")(nn.silu(h))


class FeedForward(nn.Module):
    """Linear to ``hidden`` -> tanh-GELU -> Linear back."""

    features: int
    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="net.0.proj")(x)
        return Linear(self.features, ("mlp", "embed"), dtype=self.dtype, name="net.2")(nn.gelu(h, approximate=True))


def rope_table(ids: np.ndarray, axes_dims: tuple[int, ...], theta: float) -> tuple[Array, Array]:
    """Rotary cosines and sines, ``[S, sum(axes_dims) / 2]`` each, of integer positions ``ids`` ``[S, axes]``.

    Computed on the host in float64 (positions are static), returned as float32.
    """
    ids = np.asarray(ids, np.float64)
    angles = [
        ids[:, i : i + 1] * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)[None, :]
        for i, dim in enumerate(axes_dims)
    ]
    table = np.concatenate(angles, axis=-1)
    return jnp.asarray(np.cos(table), jnp.float32), jnp.asarray(np.sin(table), jnp.float32)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates adjacent feature pairs of ``x`` ``[B, S, H, D]`` by the angles of ``cos``, ``sin`` ``[S, D / 2]``."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class JointAttention(nn.Module):
    """Self-attention over one stream, or over [text, image] with separate projections for the text stream.

    With ``context=None`` (FLUX single blocks) there is one set of projections and no output projection; otherwise the
    text stream has its own ``add_*`` projections and both outputs are projected (MMDiT double blocks). ``rope`` and
    ``key_mask``, bool and False for keys that none attends to, are of the joint sequence (``parallel.join_streams``).
    """

    num_heads: int
    head_dim: int
    dtype: Dtype = jnp.float32
    backend: str = "auto"

    def _project(self, x: Array, names: tuple[str, str, str], norms: tuple[str, str]) -> tuple[Array, Array, Array]:
        features = self.num_heads * self.head_dim
        q, k, v = (
            Linear(features, ("embed", "heads"), dtype=self.dtype, name=name)(x).reshape(
                *x.shape[:-1], self.num_heads, self.head_dim
            )
            for name in names
        )
        return RMSNorm(dtype=self.dtype, name=norms[0])(q), RMSNorm(dtype=self.dtype, name=norms[1])(k), v

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None, rope: tuple[Array, Array], key_mask: Array | None = None
    ) -> tuple[Array, Array | None]:
        features = self.num_heads * self.head_dim
        q, k, v = self._project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if context is not None:
            cq, ck, cv = self._project(
                context, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            )
            q, k, v = (join_streams(*pair) for pair in ((cq, q), (ck, k), (cv, v)))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        out = attention(q, k, v, key_mask=key_mask, backend=self.backend, sharded=True)
        out = out.reshape(*out.shape[:2], features)
        if context is None:
            return out, None
        out_context, out_x = split_streams(out, context.shape[1])
        out_x = Linear(features, ("heads", "embed"), dtype=self.dtype, name="to_out.0")(out_x)
        out_context = Linear(features, ("heads", "embed"), dtype=self.dtype, name="to_add_out")(out_context)
        return out_x, out_context
