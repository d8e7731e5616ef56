"""Layers of convolutional autoencoders, named as in diffusers. Everything is ``[B, H, W, C]``.

Norms differ between models: blocks take one as ``norm``, called with ``name=`` inside of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.models.layers import partitioned

Array = jax.Array
Dtype = Any
Factory = Callable[..., Callable[[Array], Array]]


class Conv(nn.Module):
    """Convolution with a square kernel and a bias; ``padding`` is (before, after) on both axes."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # Replicated: the whole autoencoder is smaller than one block of the transformer.
        kernel = self.param(
            "kernel",
            partitioned(nn.initializers.lecun_normal(), (None,) * 4),
            (self.kernel_size, self.kernel_size, x.shape[-1], self.features),
            self.dtype,
        )
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None,)), (self.features,), self.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)


def pointwise(features: int, dtype: Dtype, name: str | None = None) -> Conv:
    """A 1x1 convolution."""
    return Conv(features, 1, padding=(0, 0), dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut."""

    features: int
    norm: Factory
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(self.norm(name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(self.norm(name="norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = pointwise(self.features, self.dtype, name="conv_shortcut")(x)
        return x + h


class MidBlock(nn.Module):
    """Two residual blocks, with ``attention`` between them if the model has it."""

    norm: Factory
    attention: Factory | None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResnetBlock(x.shape[-1], self.norm, self.dtype, name="resnets.0")(x)
        if self.attention is not None:
            x = self.attention(name="attentions.0")(x)
        return ResnetBlock(x.shape[-1], self.norm, self.dtype, name="resnets.1")(x)


class Downsample(nn.Module):
    """Half the size by a strided convolution called ``conv``; the padding is on the right and below only."""

    dtype: Dtype = jnp.float32
    conv: str = "conv"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(x.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name=self.conv)(x)


class Upsample(nn.Module):
    """Twice the size by repeating every pixel, then a convolution called ``conv`` to channels / ``divisor``."""

    dtype: Dtype = jnp.float32
    conv: str = "conv"
    divisor: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv(x.shape[-1] // self.divisor, dtype=self.dtype, name=self.conv)(x)


class ResampleBlock(nn.Module):
    """Residual blocks, then a change of size unless ``resample`` is None; ``resample`` brings its own name."""

    features: int
    num_layers: int
    norm: Factory
    resample: Factory | None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.norm, self.dtype, name=f"resnets.{i}")(x)
        return x if self.resample is None else self.resample()(x)
