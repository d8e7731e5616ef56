"""A tiny editor and a configuration that trains it in seconds."""

import functools
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from cocoedit_jax.data.scenes import max_instruction_words, scene_vocabulary
from cocoedit_jax.models.flux import FluxConfig
from cocoedit_jax.models.quickstart import QuickstartConfig
from configs.quickstart import get_config

SIZE = 16  # pixels


def tiny_quickstart() -> QuickstartConfig:
    shape = FluxConfig(
        in_channels=48, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(4, 4, 4), theta=100.0,
    )  # fmt: skip
    return QuickstartConfig(shape, scene_vocabulary(), max_instruction_words(), patch=4, image_size=SIZE)


@functools.cache
def random_params(editor, seed: int = 0):
    """Host parameters without the zero start of modulation and output layers, which would hide most of the network."""
    params = nn.unbox(editor.abstract())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.25 * rng.standard_normal(x.shape)).astype(np.float32), params)


def tiny_config(base: Path, data: Path, preset: str = "cocoedit", **overrides) -> ConfigDict:
    """The quickstart configuration, shrunk; overrides use dotted keys."""
    config = get_config(preset)
    small = {
        "model.path": str(base),
        "data.path": str(data),
        "data.generate": 0,
        "data.resolution": SIZE,
        "rollout.groups": 4,
        "rollout.group_size": 4,
        "rollout.batch_size": 8,
        "rollout.steps": 3,
        "train.steps": 2,
        "train.micro_batch": 8,
        "lora.rank": 2,
        "lora.alpha": 4,
        "evaluation.scenes": 8,
        "evaluation.batch_size": 8,
        "evaluation.every": 2,
        "evaluation.every_scenes": 8,
        "evaluation.steps": 2,
        "checkpoint.every": 1,
        "mesh.data": 1,
        "mesh.fsdp": 1,
        "algorithm.timestep_fraction": 0.7,
    }
    config.update_from_flattened_dict(small | overrides)
    return config
