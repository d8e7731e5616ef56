"""Floating-point operations by formula, and the peak of a device, for model FLOPs utilisation (MFU).

Compilers do not count custom kernels and count a scanned block once, so the figures come from shapes.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from cocoedit_jax.models.editor import TransformerShape
from cocoedit_jax.sharding.chips import chip_of


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
    """Peak FLOP/s of one device (default: one of this process) and where the figure is from: the chip table, or for
    others a timed matmul, in float32 on a CPU and bfloat16 elsewhere."""
    device = device or jax.local_devices()[0]
    if known := chip_of(device.device_kind):
        return known[1].flops, f"{known[0]} data sheet"
    size, dtype = (1536, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    best = float("inf")
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    for _ in range(5):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best, f"measured {size}x{size} {jnp.dtype(dtype).name} matmul"
