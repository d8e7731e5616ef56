"""The tree of a Qwen-Image transformer as shapes, blocks stacked; nothing is computed."""

import functools
from typing import Any

from flax import linen as nn

from cocoedit_jax.models.qwen import QwenConfig, abstract_params


@functools.cache
def qwen_shapes(layers: int = 60, heads: int = 24, head_size: int = 128, text: int = 3584, channels: int = 64) -> Any:
    """By default those of the published checkpoint."""
    return nn.unbox(abstract_params(QwenConfig(channels, layers, head_size, heads, text, (head_size - 4, 2, 2))))
