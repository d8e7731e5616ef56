"""Qwen-Image's autoencoder, a causal video network, as the 2-D one that it is for a single frame.

A causal 3x3x3 convolution sees a first frame behind two frames of zeros, so only the last slice of its kernel counts;
the convolutions along time of the resampling layers start at the second chunk of frames. Both reductions are exact, and
``autoencoder_qwen_weights`` makes them when it loads. Names follow diffusers' ``AutoencoderKLQwenImage``. Everything is
``[B, H, W, C]``.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.models.attention import attention
from cocoedit_jax.models.autoencoder_base import ConvAutoencoder
from cocoedit_jax.models.autoencoder_layers import (
    Conv,
    Downsample,
    MidBlock,
    ResampleBlock,
    ResnetBlock,
    Upsample,
    pointwise,
)
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.layers import partitioned

Array = jax.Array
Dtype = Any


class ChannelNorm(nn.Module):
    """Every pixel's channels scaled to a root mean square of 1, times a weight; computed in float32."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        gamma = self.param("gamma", partitioned(nn.initializers.ones, (None,)), (channels,), self.dtype)
        x32 = x.astype(jnp.float32)
        # torch.nn.functional.normalize divides by the norm, or by 1e-12 where that is more.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x32), axis=-1, keepdims=True), 1e-24))
        return (x32 * inverse * channels**0.5 * gamma.astype(jnp.float32)).astype(x.dtype)


class AttentionBlock(nn.Module):
    """Self-attention over all positions with a single head, around a shortcut."""

    dtype: Dtype = jnp.float32
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = pointwise(3 * channels, self.dtype, name="to_qkv")(ChannelNorm(self.dtype, name="norm")(x))
        q, k, v = jnp.split(h.reshape(batch, height * width, 1, 3 * channels), 3, axis=-1)
        h = attention(q, k, v, backend=self.backend)
        return x + pointwise(channels, self.dtype, name="proj")(h.reshape(x.shape))


def mid_block(dtype: Dtype = jnp.float32, backend: str = "auto") -> MidBlock:
    """Of both halves; to be called inside a module."""
    return MidBlock(partial(ChannelNorm, dtype), partial(AttentionBlock, dtype, backend), dtype, name="mid_block")


class Encoder(nn.Module):
    """Pixels in [-1, 1] ``[B, H, W, 3]`` -> ``[B, H / factor, W / factor, 2 z_dim]``."""

    config: AutoencoderQwenConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, norm = self.config, partial(ChannelNorm, self.dtype)
        x = Conv(cfg.base_dim, dtype=self.dtype, name="conv_in")(x)
        index = 0  # residual blocks and changes of size are numbered through
        for level, multiplier in enumerate(cfg.dim_mult):
            for _ in range(cfg.num_res_blocks):
                x = ResnetBlock(cfg.base_dim * multiplier, norm, self.dtype, name=f"down_blocks.{index}")(x)
                index += 1
            if level + 1 < len(cfg.dim_mult):
                x = Downsample(self.dtype, "resample.1", name=f"down_blocks.{index}")(x)
                index += 1
        x = mid_block(self.dtype, self.attention_backend)(x)
        x = nn.silu(norm(name="norm_out")(x))
        return Conv(2 * cfg.z_dim, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents ``[B, h, w, z_dim]``, not normalised -> pixels, about [-1, 1], ``[B, h factor, w factor, 3]``."""

    config: AutoencoderQwenConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, z: Array) -> Array:
        cfg, norm, multipliers = self.config, partial(ChannelNorm, self.dtype), self.config.dim_mult[::-1]
        x = Conv(cfg.base_dim * multipliers[0], dtype=self.dtype, name="conv_in")(z)
        x = mid_block(self.dtype, self.attention_backend)(x)
        upsample = partial(Upsample, self.dtype, "resample.1", 2, name="upsamplers.0")
        for i, multiplier in enumerate(multipliers):
            x = ResampleBlock(
                cfg.base_dim * multiplier,
                cfg.num_res_blocks + 1,
                norm,
                upsample if i + 1 < len(multipliers) else None,
                self.dtype,
                name=f"up_blocks.{i}",
            )(x)
        x = nn.silu(norm(name="norm_out")(x))
        return Conv(cfg.input_channels, dtype=self.dtype, name="conv_out")(x)


@dataclasses.dataclass(frozen=True)
class AutoencoderQwen(ConvAutoencoder):
    """The ``Autoencoder`` of Qwen-Image. Latents are ``(mean - latents_mean) / latents_std``, per channel."""

    config: AutoencoderQwenConfig = AutoencoderQwenConfig()

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config.dim_mult) - 1)

    @property
    def channels(self) -> int:
        return self.config.z_dim

    def _parts(self) -> dict[str, nn.Module]:
        settings = self.config, self.dtype, self.attention_backend
        return {
            "encoder": Encoder(*settings),
            "decoder": Decoder(*settings),
            "quant_conv": pointwise(2 * self.channels, self.dtype),
            "post_quant_conv": pointwise(self.channels, self.dtype),
        }

    def _normalise(self, means: Array) -> Array:
        return (means - self._statistics("latents_mean")) / self._statistics("latents_std")

    def _denormalise(self, latents: Array) -> Array:
        return latents * self._statistics("latents_std") + self._statistics("latents_mean")

    def _statistics(self, name: str) -> Array:
        return jnp.asarray(getattr(self.config, name), jnp.float32)
