"""What convolutional autoencoders have in common around their networks: slices of the batch, tiles, pixel ranges."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.config_checks import is_count, refuse
from cocoedit_jax.models.tiling import OVERLAP_DIVISOR, tiled_decode

Array = jax.Array
Dtype = Any


@dataclasses.dataclass(frozen=True)
class ConvAutoencoder:
    """An ``Autoencoder`` of ``encoder``, ``decoder`` and, between them, optional 1x1 convolutions ``quant_conv`` and
    ``post_quant_conv``. Encoding is deterministic: the mean of the posterior. Subclasses give what raises below.

    Attributes:
        config: shape of the network.
        dtype: of parameters and activations. Results are float32 in any case.
        slice_size: most images that are worked on at once; activations take gigabytes per image of 1024 px. A batch
            that is split over devices belongs into ``jax.shard_map``, where each goes through its own images; a loop
            over an axis that is split automatically would make every device compute all of them.
        tile_size: side in pixels of the tiles that larger pictures are decoded in, or None to decode exactly.
        attention_backend: as in ``models.attention``.

    Raises:
        UserError: a setting that is not usable.
    """

    config: Any
    dtype: Dtype = jnp.float32
    slice_size: int = 1
    tile_size: int | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        problems = []
        if not is_count(self.slice_size):
            problems.append(f"slice_size={self.slice_size!r}; expected a whole number, at least 1")
        unit = self.factor * OVERLAP_DIVISOR
        if self.tile_size is not None and not (is_count(self.tile_size) and self.tile_size % unit == 0):
            problems.append(f"tile_size={self.tile_size!r}; expected a multiple of {unit} px, or None")
        refuse(type(self).__name__, problems)

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Of a latent cell."""
        raise NotImplementedError

    def _parts(self) -> Mapping[str, nn.Module]:
        """The networks by name. The encoder gives moments, ``2 channels``, means first; pixels are in [-1, 1]."""
        raise NotImplementedError

    def _normalise(self, means: Array) -> Array:
        raise NotImplementedError

    def _denormalise(self, latents: Array) -> Array:
        """Inverse of ``_normalise``."""
        raise NotImplementedError

    def init(self, key: Array) -> Any:
        """Freshly initialised parameters, with logical axis names boxed into every leaf (``flax.linen.unbox``)."""
        z = jnp.zeros((1, 1, 1, self.channels))
        inputs = {
            "encoder": jnp.zeros((1, self.factor, self.factor, 3)),
            "decoder": z,
            "quant_conv": jnp.concatenate([z, z], axis=-1),
            "post_quant_conv": z,
        }
        keys = jax.random.split(key, len(inputs))
        return {
            name: module.init(key, inputs[name])["params"]
            for (name, module), key in zip(self._parts().items(), keys, strict=False)
        }

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters, for the weight loaders."""
        return nn.unbox(jax.eval_shape(lambda: self.init(jax.random.key(0))))

    def encode(self, params: Any, images: Array) -> Array:
        """Latents ``[B, H / factor, W / factor, channels]`` of ``images`` ``[B, H, W, 3]`` in [0, 1].

        Raises:
            UserError: an image size that is not a multiple of ``factor``.
        """
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise UserError(f"image size {height}x{width} px: both sides must be multiples of {self.factor}")
        moments = self._chain(params, "encoder", "quant_conv")

        def means(x: Array) -> Array:
            return moments(x * 2.0 - 1.0)[..., : self.channels].astype(jnp.float32)

        return self._normalise(self._in_slices(means, images.astype(jnp.float32)))

    def decode(self, params: Any, latents: Array) -> Array:
        """Images ``[B, H factor, W factor, 3]`` in [0, 1] of ``latents`` ``[B, H, W, channels]``."""
        pixels = self._chain(params, "post_quant_conv", "decoder")

        def raw(z: Array) -> Array:
            return pixels(z).astype(jnp.float32)

        def one_slice(z: Array) -> Array:
            if self.tile_size is None or max(z.shape[1:3]) * self.factor <= self.tile_size:
                return raw(z)
            return tiled_decode(raw, z, self.tile_size // self.factor, self.factor)

        images = self._in_slices(one_slice, self._denormalise(latents.astype(jnp.float32)))
        return (images * 0.5 + 0.5).clip(0.0, 1.0)

    def _chain(self, params: Any, *names: str) -> Callable[[Array], Array]:
        """The parts called ``names``, those that the model has, one after the other."""
        parts = self._parts()

        def run(x: Any) -> Array:
            for name in names:
                if name in parts:
                    x = parts[name].apply({"params": params[name]}, x)
            return x

        return run

    def _in_slices(self, function: Callable[[Array], Array], x: Array) -> Array:
        """``function(x)``, ``slice_size`` rows at a time."""
        batch = x.shape[0]
        # Equal slices: a remainder would be compiled as a second network.
        size = next((n for n in range(min(self.slice_size, batch), 0, -1) if batch % n == 0), batch)
        if size == batch:
            return function(x)
        out = jax.lax.map(function, x.reshape(-1, size, *x.shape[1:]))
        return out.reshape(batch, *out.shape[2:])
