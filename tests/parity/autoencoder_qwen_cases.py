"""Tiny random Qwen-Image autoencoders in PyTorch, drawn from ``PARITY_SEED``, and their weights loaded from disk."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.autoencoder_qwen_weights import load_params
from tests.parity.autoencoder_cases import from_torch, to_torch
from tests.parity.transformer_cases import SEED, randomise

QWEN_LIKE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16}


@dataclasses.dataclass
class QwenAutoencoderCase:
    """One model: ``reference`` is the PyTorch module, ``folder`` holds it, ``params`` are its weights here."""

    config: AutoencoderQwenConfig
    reference: Any
    folder: Path
    params: Any
    rng: np.random.Generator

    @property
    def ours(self) -> AutoencoderQwen:
        return AutoencoderQwen(self.config)

    def images(self, batch: int, height: int, width: int) -> np.ndarray:
        return self.rng.random((batch, height, width, 3), np.float32)

    def latents(self, batch: int, height: int, width: int) -> np.ndarray:
        return self.rng.standard_normal((batch, height, width, self.config.z_dim), np.float32)

    def encode_reference(self, images: np.ndarray) -> np.ndarray:
        """As diffusers' pipelines encode: mode of the posterior of one frame, normalised per channel."""
        mode = self.reference.encode(to_torch(images * 2 - 1)[:, :, None]).latent_dist.mode()
        return (from_torch(mode[:, :, 0]) - self._row("latents_mean")) / self._row("latents_std")

    def decode_reference(self, latents: np.ndarray) -> np.ndarray:
        """As diffusers' pipelines decode."""
        z = to_torch(latents * self._row("latents_std") + self._row("latents_mean"))
        return from_torch((self.reference.decode(z[:, :, None]).sample[:, :, 0] / 2 + 0.5).clamp(0, 1))

    def _row(self, name: str) -> np.ndarray:
        return np.asarray(self.reference.config[name], np.float32)


def draw_qwen_autoencoder(index: int, folder: Path, **overrides: Any) -> QwenAutoencoderCase:
    """Case ``index`` of this run's seed, saved into ``folder``. Case 0 has Qwen-Image's blocks with few channels."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    rng = np.random.default_rng([SEED, index, 2])
    levels = int(rng.integers(2, 4))
    options: dict[str, Any] = {
        "base_dim": int(rng.integers(3, 9)),
        "z_dim": int(rng.integers(1, 9)),
        "dim_mult": rng.integers(1, 5, levels).tolist(),
        "num_res_blocks": int(rng.integers(1, 3)),
        "temperal_downsample": rng.integers(0, 2, levels - 1).astype(bool).tolist(),
    }
    options |= (QWEN_LIKE if index == 0 else {}) | overrides
    options["latents_mean"] = rng.standard_normal(options["z_dim"]).tolist()
    options["latents_std"] = rng.uniform(0.5, 3, options["z_dim"]).tolist()
    torch.manual_seed(0)
    reference = AutoencoderKLQwenImage(**options).eval()
    reference.requires_grad_(False)
    randomise(reference, rng)
    reference.save_pretrained(folder)
    config = AutoencoderQwenConfig.from_dict(dict(reference.config), "PyTorch model")
    params = load_params(folder, AutoencoderQwen(config).abstract_params())
    return QwenAutoencoderCase(config, reference, folder, params, rng)
