"""FLUX's autoencoder: a convolutional network with one attention layer at its narrowest place.

Module and parameter names follow diffusers' ``AutoencoderKL``, so ``weights.from_diffusers`` reads its files into
``params``. Everything is ``[B, H, W, C]``.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.models.attention import attention
from cocoedit_jax.models.autoencoder_base import ConvAutoencoder
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig
from cocoedit_jax.models.autoencoder_layers import (
    Conv,
    Downsample,
    Factory,
    MidBlock,
    ResampleBlock,
    Upsample,
    pointwise,
)
from cocoedit_jax.models.layers import Linear, partitioned

Array = jax.Array
Dtype = Any


class GroupNorm(nn.Module):
    """Group norm over space and the channels of a group; statistics in float32."""

    num_groups: int
    dtype: Dtype = jnp.float32
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, channels = x.shape[0], x.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones, (None,)), (channels,), self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None,)), (channels,), self.dtype)

        def group_mean(y: Array) -> Array:
            # Over space first: splitting the channels of the whole array would break its layout on accelerators.
            y = jnp.mean(y, axis=(1, 2)).reshape(batch, self.num_groups, -1)
            y = jnp.broadcast_to(jnp.mean(y, axis=-1, keepdims=True), y.shape)
            return y.reshape(batch, 1, 1, channels)

        x32 = x.astype(jnp.float32)
        centred = x32 - group_mean(x32)
        normed = centred * jax.lax.rsqrt(group_mean(jnp.square(centred)) + self.eps)
        return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class AttentionBlock(nn.Module):
    """Self-attention over all positions with a single head, around a shortcut."""

    num_groups: int
    dtype: Dtype = jnp.float32
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]

        def linear(name: str, x: Array) -> Array:
            return Linear(channels, (None, None), dtype=self.dtype, name=name)(x)

        h = GroupNorm(self.num_groups, self.dtype, name="group_norm")(x).reshape(x.shape[0], -1, channels)
        q, k, v = (linear(name, h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        h = linear("to_out.0", attention(q, k, v, backend=self.backend)[:, :, 0])
        return x + h.reshape(x.shape)


def group_norm(config: AutoencoderKLConfig, dtype: Dtype) -> Factory:
    """The model's norm, as ``autoencoder_layers`` takes it."""
    return partial(GroupNorm, config.norm_num_groups, dtype)


def mid_block(config: AutoencoderKLConfig, dtype: Dtype = jnp.float32, backend: str = "auto") -> MidBlock:
    """Of both halves; to be called inside a module."""
    attention_block = partial(AttentionBlock, config.norm_num_groups, dtype, backend)
    return MidBlock(
        group_norm(config, dtype),
        attention_block if config.mid_block_add_attention else None,
        dtype,
        name="mid_block",
    )


class Encoder(nn.Module):
    """Pixels in [-1, 1] ``[B, H, W, 3]`` -> moments ``[B, H / factor, W / factor, 2 latent_channels]``, means first."""

    config: AutoencoderKLConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, channels, norm = self.config, self.config.block_out_channels, group_norm(self.config, self.dtype)
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, features in enumerate(channels):
            resample = partial(Downsample, self.dtype, name="downsamplers.0") if i + 1 < len(channels) else None
            x = ResampleBlock(features, cfg.layers_per_block, norm, resample, self.dtype, name=f"down_blocks.{i}")(x)
        x = mid_block(cfg, self.dtype, self.attention_backend)(x)
        x = nn.silu(norm(name="conv_norm_out")(x))
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Unscaled latents ``[B, h, w, latent_channels]`` -> pixels, about [-1, 1], ``[B, h factor, w factor, 3]``."""

    config: AutoencoderKLConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, z: Array) -> Array:
        cfg, channels, norm = self.config, self.config.block_out_channels[::-1], group_norm(self.config, self.dtype)
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(z)
        x = mid_block(cfg, self.dtype, self.attention_backend)(x)
        for i, features in enumerate(channels):
            resample = partial(Upsample, self.dtype, name="upsamplers.0") if i + 1 < len(channels) else None
            x = ResampleBlock(features, cfg.layers_per_block + 1, norm, resample, self.dtype, name=f"up_blocks.{i}")(x)
        x = nn.silu(norm(name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)


@dataclasses.dataclass(frozen=True)
class AutoencoderKL(ConvAutoencoder):
    """The ``Autoencoder`` of FLUX. Latents are ``(mean - shift_factor) * scaling_factor``."""

    config: AutoencoderKLConfig = AutoencoderKLConfig()

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    def _parts(self) -> dict[str, nn.Module]:
        settings = self.config, self.dtype, self.attention_backend
        parts: dict[str, nn.Module] = {"encoder": Encoder(*settings), "decoder": Decoder(*settings)}
        if self.config.use_quant_conv:
            parts["quant_conv"] = pointwise(2 * self.channels, self.dtype)
        if self.config.use_post_quant_conv:
            parts["post_quant_conv"] = pointwise(self.channels, self.dtype)
        return parts

    def _normalise(self, means: Array) -> Array:
        return (means - self._shift) * self.config.scaling_factor

    def _denormalise(self, latents: Array) -> Array:
        return latents / self.config.scaling_factor + self._shift

    @property
    def _shift(self) -> float:
        return self.config.shift_factor or 0.0
