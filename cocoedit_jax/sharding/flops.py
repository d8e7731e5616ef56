"""Floating-point operations by formula, and the peak of a device, for model FLOPs utilisation (MFU).

Compilers do not count custom kernels and count a scanned block once, so the figures come from shapes.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from cocoedit_jax.models.editor import TransformerShape

# Dense bf16 peak of one device, FLOP/s, from the vendors' data sheets; matched against the start of ``device_kind``.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def forward_flops(config: TransformerShape, tokens: int, samples: int = 1) -> float:
    """One forward pass over ``samples`` sequences of ``tokens`` joint tokens: 2 per multiply-add.

    Linear layers of the blocks (24 d^2 per token and block at mlp_ratio 4) and attention (4 S^2 d per block);
    modulation and embedders, linear in neither tokens nor depth, are left out (under 1 % at real size).
    """
    d = config.hidden
    blocks = config.num_blocks
    linear = blocks * 2 * (4 * d * d + 2 * d * config.mlp_hidden) * tokens
    attention = blocks * 4 * tokens * tokens * d
    return float(samples * (linear + attention))


def lora_gradient_flops(config: TransformerShape, tokens: int, samples: int = 1) -> float:
    """Forward and backward of a frozen base with adapters: twice the linear part (no weight gradients), and three
    times attention."""
    d = config.hidden
    attention = config.num_blocks * 4 * tokens * tokens * d * samples
    return 2 * forward_flops(config, tokens, samples) + attention


def peak_flops(device: Any = None) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure is from: the data sheet, or for others a timed float32 matmul."""
    device = device or jax.local_devices()[0]
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if device.device_kind.startswith(name):
            return PEAK_FLOPS[name], f"{name} data sheet"
    size, best = 1536, float("inf")
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    for _ in range(5):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best, f"measured {size}x{size} float32 matmul"
