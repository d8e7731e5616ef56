"""FLUX's autoencoder: a convolutional network with one attention layer at its narrowest place.

Module and parameter names follow diffusers' ``AutoencoderKL``, so ``weights.from_diffusers`` reads its files into
``params``. Everything is ``[B, H, W, C]``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.attention import attention
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig, is_count, refuse
from cocoedit_jax.models.layers import Linear, partitioned
from cocoedit_jax.models.tiling import OVERLAP_DIVISOR, tiled_decode

Array = jax.Array
Dtype = Any


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


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut (diffusers ResnetBlock2D without time embedding)."""

    features: int
    num_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, padding=(0, 0), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


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


class MidBlock(nn.Module):
    """Two residual blocks, with attention between them if the model has it (diffusers UNetMidBlock2D)."""

    config: AutoencoderKLConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, groups = x.shape[-1], self.config.norm_num_groups
        x = ResnetBlock(channels, groups, self.dtype, name="resnets.0")(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(groups, self.dtype, self.attention_backend, name="attentions.0")(x)
        return ResnetBlock(channels, groups, self.dtype, name="resnets.1")(x)


class Downsample(nn.Module):
    """Half the size by a strided convolution; the padding is on the right and below only."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(x.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Twice the size by repeating every pixel, then a convolution."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)


class ResampleBlock(nn.Module):
    """Residual blocks, then a change of size unless ``resample`` is None (DownEncoderBlock2D, UpDecoderBlock2D)."""

    features: int
    num_layers: int
    num_groups: int
    resample: type[Downsample] | type[Upsample] | None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.num_groups, self.dtype, name=f"resnets.{i}")(x)
        if self.resample is not None:
            name = "downsamplers.0" if self.resample is Downsample else "upsamplers.0"
            x = self.resample(self.dtype, name=name)(x)
        return x


class Encoder(nn.Module):
    """Pixels in [-1, 1] ``[B, H, W, 3]`` -> moments ``[B, H / factor, W / factor, 2 latent_channels]``, means first."""

    config: AutoencoderKLConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, channels = self.config, self.config.block_out_channels
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, features in enumerate(channels):
            resample = Downsample if i + 1 < len(channels) else None
            x = ResampleBlock(
                features, cfg.layers_per_block, cfg.norm_num_groups, resample, self.dtype, name=f"down_blocks.{i}"
            )(x)
        x = MidBlock(cfg, self.dtype, self.attention_backend, name="mid_block")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, self.dtype, name="conv_norm_out")(x))
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Unscaled latents ``[B, h, w, latent_channels]`` -> pixels, about [-1, 1], ``[B, h factor, w factor, 3]``."""

    config: AutoencoderKLConfig
    dtype: Dtype = jnp.float32
    attention_backend: str = "auto"

    @nn.compact
    def __call__(self, z: Array) -> Array:
        cfg, channels = self.config, self.config.block_out_channels[::-1]
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(z)
        x = MidBlock(cfg, self.dtype, self.attention_backend, name="mid_block")(x)
        for i, features in enumerate(channels):
            resample = Upsample if i + 1 < len(channels) else None
            x = ResampleBlock(
                features, cfg.layers_per_block + 1, cfg.norm_num_groups, resample, self.dtype, name=f"up_blocks.{i}"
            )(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, self.dtype, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)


@dataclasses.dataclass(frozen=True)
class AutoencoderKL:
    """The ``Autoencoder`` of FLUX. Latents are ``(mean - shift_factor) * scaling_factor``: encoding is deterministic.

    Attributes:
        config: shape of the network.
        dtype: of parameters and activations. Results are float32 in any case.
        slice_size: most images that a device works on at once; activations take gigabytes per image of 1024 px.
        shards: number of devices among which callers split the batch. Each then goes through its own images; a loop
            over a split axis would make every device compute all of them. A batch that it does not divide cannot be
            split evenly, and is taken as whole.
        tile_size: side in pixels of the tiles that larger pictures are decoded in, or None to decode exactly.
        attention_backend: as in ``models.attention``.

    Raises:
        UserError: a setting that is not usable.
    """

    config: AutoencoderKLConfig = AutoencoderKLConfig()
    dtype: Dtype = jnp.float32
    slice_size: int = 1
    shards: int = 1
    tile_size: int | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r}; expected a whole number, at least 1"
            for name, value in (("slice_size", self.slice_size), ("shards", self.shards))
            if not is_count(value)
        ]
        unit = self.factor * OVERLAP_DIVISOR
        if self.tile_size is not None and not (is_count(self.tile_size) and self.tile_size % unit == 0):
            problems.append(f"tile_size={self.tile_size!r}; expected a multiple of {unit} px, or None")
        refuse("AutoencoderKL", problems)

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    def init(self, key: Array) -> Any:
        """Freshly initialised parameters, with logical axis names boxed into every leaf (``flax.linen.unbox``)."""
        cfg, keys = self.config, jax.random.split(key, 4)
        z = jnp.zeros((1, 1, 1, cfg.latent_channels))
        image = jnp.zeros((1, self.factor, self.factor, cfg.in_channels))
        parts: dict[str, tuple[nn.Module, Array]] = {"encoder": (self._encoder, image), "decoder": (self._decoder, z)}
        if cfg.use_quant_conv:
            parts["quant_conv"] = self._pointwise(2 * cfg.latent_channels), jnp.concatenate([z, z], axis=-1)
        if cfg.use_post_quant_conv:
            parts["post_quant_conv"] = self._pointwise(cfg.latent_channels), z
        return {
            name: module.init(key, x)["params"] for (name, (module, x)), key in zip(parts.items(), keys, strict=False)
        }

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters, for ``weights.from_diffusers``."""
        return nn.unbox(jax.eval_shape(self.init, jax.random.key(0)))

    def encode(self, params: Any, images: Array) -> Array:
        """Latents ``[B, H / factor, W / factor, channels]`` of ``images`` ``[B, H, W, 3]`` in [0, 1].

        Raises:
            UserError: an image size that is not a multiple of ``factor``.
        """
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise UserError(f"image size {height}x{width} px: both sides must be multiples of {self.factor}")

        def one_slice(x: Array) -> Array:
            moments: Any = self._encoder.apply({"params": params["encoder"]}, x * 2.0 - 1.0)
            if self.config.use_quant_conv:
                moments = self._pointwise(2 * self.channels).apply({"params": params["quant_conv"]}, moments)
            return moments[..., : self.channels].astype(jnp.float32)

        means = self._in_slices(one_slice, images.astype(jnp.float32))
        return (means - self._shift) * self.config.scaling_factor

    def decode(self, params: Any, latents: Array) -> Array:
        """Images ``[B, H factor, W factor, 3]`` in [0, 1] of ``latents`` ``[B, H, W, channels]``."""

        def raw(z: Any) -> Array:
            if self.config.use_post_quant_conv:
                z = self._pointwise(self.channels).apply({"params": params["post_quant_conv"]}, z)
            out: Any = self._decoder.apply({"params": params["decoder"]}, z)
            return out.astype(jnp.float32)

        def one_slice(z: Array) -> Array:
            if self.tile_size is None or max(z.shape[1:3]) * self.factor <= self.tile_size:
                return raw(z)
            return tiled_decode(raw, z, self.tile_size // self.factor, self.factor)

        images = self._in_slices(one_slice, latents.astype(jnp.float32) / self.config.scaling_factor + self._shift)
        return (images * 0.5 + 0.5).clip(0.0, 1.0)

    @property
    def _encoder(self) -> Encoder:
        return Encoder(self.config, self.dtype, self.attention_backend)

    @property
    def _decoder(self) -> Decoder:
        return Decoder(self.config, self.dtype, self.attention_backend)

    def _pointwise(self, features: int) -> Conv:
        return Conv(features, 1, padding=(0, 0), dtype=self.dtype)

    @property
    def _shift(self) -> float:
        return self.config.shift_factor or 0.0

    def _in_slices(self, function: Callable[[Array], Array], x: Array) -> Array:
        """``function(x)``, ``slice_size`` rows of each shard at a time."""
        batch = x.shape[0]
        shards = self.shards if batch % self.shards == 0 else 1
        local = batch // shards
        # Equal slices: a remainder would be compiled as a second network.
        size = next((n for n in range(min(self.slice_size, local), 0, -1) if local % n == 0), local)
        if size == local:
            return function(x)
        x = x.reshape(shards, -1, size, *x.shape[1:]).swapaxes(0, 1)
        out = jax.lax.map(function, x.reshape(-1, shards * size, *x.shape[3:]))
        out = out.reshape(-1, shards, size, *out.shape[2:]).swapaxes(0, 1)
        return out.reshape(batch, *out.shape[3:])
