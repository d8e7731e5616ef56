"""Tiny random autoencoders in PyTorch, drawn from ``PARITY_SEED``, and their weights in our layout."""

import dataclasses
from typing import Any

import numpy as np

from cocoedit_jax.models import weights
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_kl_config import DOWN_BLOCK, UP_BLOCK, AutoencoderKLConfig
from tests.parity.transformer_cases import SEED, randomise, to_numpy


@dataclasses.dataclass
class AutoencoderCase:
    """One model: ``reference`` is the PyTorch module, ``params`` its weights here; ``rng`` draws the inputs."""

    config: AutoencoderKLConfig
    reference: Any
    params: Any
    rng: np.random.Generator

    @property
    def ours(self) -> AutoencoderKL:
        return AutoencoderKL(self.config)

    def images(self, batch: int, height: int, width: int) -> np.ndarray:
        return self.rng.random((batch, height, width, 3), np.float32)

    def latents(self, batch: int, height: int, width: int) -> np.ndarray:
        latents = self.rng.standard_normal((batch, height, width, self.config.latent_channels), np.float32)
        return latents * np.float32(self.config.scaling_factor)

    def encode_reference(self, images: np.ndarray) -> np.ndarray:
        """As diffusers' FLUX pipelines encode: mode of the posterior, shifted and scaled."""
        mode = self.reference.encode(to_torch(images) * 2 - 1).latent_dist.mode()
        return from_torch((mode - (self.config.shift_factor or 0.0)) * self.config.scaling_factor)

    def decode_reference(self, latents: np.ndarray) -> np.ndarray:
        """As diffusers' FLUX pipelines decode."""
        unscaled = to_torch(latents) / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        return from_torch((self.reference.decode(unscaled).sample / 2 + 0.5).clamp(0, 1))


def to_torch(array: Any) -> Any:
    """``[B, H, W, C]`` -> torch's ``[B, C, H, W]``."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


def from_torch(tensor: Any) -> np.ndarray:
    """Torch's ``[B, C, H, W]`` -> ``[B, H, W, C]``."""
    return to_numpy(tensor).transpose(0, 2, 3, 1)


def draw_autoencoder(index: int, **overrides: Any) -> AutoencoderCase:
    """Case ``index`` of this run's seed. Case 0 is built like FLUX's, case 1 has what FLUX's has not and lacks its
    attention.
    """
    import torch
    from diffusers import AutoencoderKL as Reference

    rng = np.random.default_rng([SEED, index, 1])
    groups, blocks = int(rng.integers(1, 5)), int(rng.integers(2, 5))
    options = {
        "down_block_types": (DOWN_BLOCK,) * blocks,
        "up_block_types": (UP_BLOCK,) * blocks,
        "block_out_channels": tuple(groups * int(n) for n in rng.integers(1, 7, blocks)),
        "layers_per_block": int(rng.integers(1, 3)),
        "latent_channels": int(rng.integers(1, 17)),
        "norm_num_groups": groups,
        "scaling_factor": float(rng.uniform(0.2, 2)),
        "shift_factor": None if index == 1 else float(rng.uniform(-1, 1)),
        "use_quant_conv": index == 1,
        "use_post_quant_conv": index == 1,
        "mid_block_add_attention": index != 1,
    } | overrides
    torch.manual_seed(0)
    reference = Reference(**options).eval()
    reference.requires_grad_(False)
    randomise(reference, rng)
    config = AutoencoderKLConfig(**options)
    state = {name: to_numpy(tensor) for name, tensor in reference.state_dict().items()}
    params = weights.from_diffusers(state, AutoencoderKL(config).abstract_params(), "PyTorch model")
    return AutoencoderCase(config, reference, params, rng)
