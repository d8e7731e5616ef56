"""A whole Qwen-Image-Edit pipeline in diffusers' folder layout: the real classes, drawn at random and tiny."""

import json
from pathlib import Path

import numpy as np

from tests.parity.tiny_qwen_text import EDIT_PLUS, save_tiny_qwen_text
from tests.parity.transformer_cases import randomise


def save_tiny_qwen(folder: Path | str, seed: int = 0, pipeline: str = EDIT_PLUS, zero_cond_t: bool = False) -> Path:
    """Writes a random ``pipeline`` to ``folder``; returns the folder.

    ``seed`` draws widths, depths and all weights. As in the real model: 16 latent channels at 1/8 of the image side
    (packed to 64), Qwen-Image's schedule.
    """
    import torch
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    folder = save_tiny_qwen_text(folder, seed, pipeline)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    axes = tuple(int(2 * n) for n in rng.integers(1, 5, 3))
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=int(rng.integers(1, 4)),
        attention_head_dim=sum(axes),
        num_attention_heads=int(rng.integers(1, 4)),
        joint_attention_dim=text.get("text_config", text)["hidden_size"],
        axes_dims_rope=axes,  # type: ignore[arg-type]
        zero_cond_t=zero_cond_t,
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    randomise(transformer, rng)
    randomise(autoencoder, rng)
    transformer.save_pretrained(folder / "transformer")
    autoencoder.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    return folder
