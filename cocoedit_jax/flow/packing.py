"""Latent grids to tokens and back, token positions, and masks at latent resolution.

All functions but ``position_ids`` take and return either NumPy or JAX arrays.
"""

from typing import Any

import numpy as np

from cocoedit_jax.errors import UserError

Array = Any


def _check_divisible(name: str, height: int, width: int, factor: int) -> None:
    if factor < 1 or height % factor or width % factor:
        raise UserError(f"{name} is {height}x{width}; expected both sides to be multiples of {factor}")


def pack(latents: Array, p: int) -> Array:
    """Group ``p x p`` cells into one token: ``[B, h, w, C] -> [B, (h/p)(w/p), C*p*p]``.

    Channel index within a token is ``c*p*p + dy*p + dx``, tokens run row by row (FLUX packing has ``p = 2``).

    Raises:
        UserError: when ``h`` or ``w`` is no multiple of ``p``.
    """
    batch, height, width, channels = latents.shape
    _check_divisible("latent grid", height, width, p)
    grid = latents.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 5, 2, 4)
    return grid.reshape(batch, (height // p) * (width // p), channels * p * p)


def unpack(tokens: Array, h: int, w: int, p: int) -> Array:
    """Inverse of ``pack``: ``[B, (h/p)(w/p), C*p*p] -> [B, h, w, C]``; ``h`` and ``w`` are in latent cells.

    Raises:
        UserError: when the number of tokens or channels does not fit ``h``, ``w`` and ``p``.
    """
    _check_divisible("latent grid", h, w, p)
    batch, count, features = tokens.shape
    if count != (h // p) * (w // p) or features % (p * p):
        raise UserError(
            f"tokens have shape {tuple(tokens.shape)}; expected {(h // p) * (w // p)} tokens (a {h}x{w} grid packed "
            f"{p}x{p}) of a multiple of {p * p} channels"
        )
    channels = features // (p * p)
    grid = tokens.reshape(batch, h // p, w // p, channels, p, p).transpose(0, 1, 4, 2, 5, 3)
    return grid.reshape(batch, h, w, channels)


def position_ids(h_tokens: int, w_tokens: int, index: int) -> np.ndarray:
    """Rotary positions ``(index, y, x)`` of a token grid, row by row: int32 ``[h_tokens * w_tokens, 3]``.

    ``index`` tells sequences apart: FLUX.1-Kontext has 0 for the target and 1 for the source image.
    """
    y, x = np.meshgrid(np.arange(h_tokens), np.arange(w_tokens), indexing="ij")
    return np.stack([np.full_like(y, index), y, x], axis=-1).reshape(-1, 3).astype(np.int32)


def downsample_mask_nearest(mask: Array, factor: int) -> Array:
    """``[B, H, W] -> [B, H/factor, W/factor]``: reads pixel ``(factor*i, factor*j)``, values unchanged.

    Raises:
        UserError: when ``H`` or ``W`` is no multiple of ``factor``.
    """
    _check_divisible("mask", mask.shape[1], mask.shape[2], factor)
    return mask[:, ::factor, ::factor]


def token_share(mask_latent: Array, p: int) -> Array:
    """Mean mask value over the ``p x p`` cells of every token: ``[B, h, w] -> [B, (h/p)(w/p)]``.

    Raises:
        UserError: when ``h`` or ``w`` is no multiple of ``p``.
    """
    return pack(mask_latent[..., None], p).mean(axis=-1)
