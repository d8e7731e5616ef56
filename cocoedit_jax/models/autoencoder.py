"""What the trainer needs of an autoencoder, and the identity that stands in for one in the quickstart."""

import dataclasses
from typing import Any, Protocol

import jax

Array = jax.Array


class Autoencoder(Protocol):
    """Images ``[B, H, W, 3]`` in [0, 1] <-> latents ``[B, H / factor, W / factor, channels]``."""

    @property
    def factor(self) -> int: ...
    @property
    def channels(self) -> int: ...
    def init(self, key: Array) -> Any:
        """Fresh parameters, boxed with logical axis names; ``{}`` if there are none."""
        ...

    def encode(self, params: Any, images: Array) -> Array: ...
    def decode(self, params: Any, latents: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class IdentityAutoencoder:
    """Latents are the pixels, scaled to [-1, 1]; it has no parameters."""

    factor: int = 1
    channels: int = 3

    def init(self, key: Array) -> Any:
        return {}

    def encode(self, params: Any, images: Array) -> Array:
        return images * 2.0 - 1.0

    def decode(self, params: Any, latents: Array) -> Array:
        return (latents * 0.5 + 0.5).clip(0.0, 1.0)
