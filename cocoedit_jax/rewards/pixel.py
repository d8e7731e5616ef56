"""Pixel consistency: PSNR and SSIM against the source image over the pixels to keep.

Variant "correct" follows the definitions. Variant "official" repeats the released code of arXiv 2602.14068: its mean
square sums three channels but divides by pixels (PSNR 4.77 dB low), and its SSIM divides Gaussian sums by the number of
pixels in the window, which makes it nearly constant. Use "official" only to reproduce that code's reward.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.presets import NFTConfig

Array = jax.Array

WINDOW = 11  # pixels
SIGMA = 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # stabilisers for a data range of 1
MIN_MSE = 1e-8  # PSNR stops at 80 dB
MIN_SUPPORT = 0.5  # share of the Gaussian window that must lie on pixels to keep


class PixelReward(struct.PyTreeNode):
    """Per-sample results ``[B]``. ``mse``, ``psnr`` (dB) and ``ssim`` are NaN where there is no pixel to keep."""

    score: Array  # [0, 1]; 0 where there is no pixel to keep
    valid: Array  # bool; the official variant calls every sample valid
    mse: Array
    psnr: Array
    ssim: Array


def _check(image: Array, reference: Array, preserve_mask: Array, variant: str) -> tuple[Array, Array, Array]:
    if variant not in ("correct", "official"):
        raise UserError(f"pixel_variant is {variant!r}; expected 'correct' or 'official'")
    if image.ndim != 4 or image.shape != reference.shape or preserve_mask.shape != image.shape[:3]:
        raise UserError(
            f"image, reference and preserve_mask have shapes {image.shape}, {reference.shape}, {preserve_mask.shape}; "
            "expected [B, H, W, C] twice and [B, H, W]"
        )
    mask = (preserve_mask >= 0.5).astype(jnp.float32)
    return image.astype(jnp.float32), reference.astype(jnp.float32), mask


def masked_mse(image: Array, reference: Array, preserve_mask: Array, variant: str = "correct") -> Array:
    """Mean square difference over the pixels to keep, ``[B]``; NaN where there are none.

    Args:
        image: ``[B, H, W, C]`` in [0, 1].
        reference: ``[B, H, W, C]`` in [0, 1].
        preserve_mask: ``[B, H, W]``, values from 0.5 on mean keep.
        variant: "official" divides by pixels instead of pixels times channels.

    Raises:
        UserError: for an unknown variant or shapes that do not fit.
    """
    image, reference, mask = _check(image, reference, preserve_mask, variant)
    squares = (jnp.square(image - reference) * mask[..., None]).sum(axis=(1, 2, 3))
    pixels = mask.sum(axis=(1, 2))
    divisor = pixels if variant == "official" else pixels * image.shape[-1]
    return jnp.where(pixels > 0, squares / jnp.maximum(divisor, 1.0), jnp.nan)


def masked_psnr(image: Array, reference: Array, preserve_mask: Array, variant: str = "correct") -> Array:
    """PSNR in dB over the pixels to keep, at most 80, ``[B]``; NaN where there are none. Arguments: ``masked_mse``."""
    mse = masked_mse(image, reference, preserve_mask, variant)
    return -10.0 * jnp.log10(jnp.maximum(mse, MIN_MSE))


def _filter(stack: Array, taps: np.ndarray) -> Array:
    """Separable filter of every channel of ``[B, H, W, C]``; zeros beyond the image, same size."""
    channels = stack.shape[-1]
    for axis in (0, 1):
        shape = (len(taps), 1, 1, 1) if axis == 0 else (1, len(taps), 1, 1)
        kernel = jnp.tile(jnp.asarray(taps, jnp.float32).reshape(shape), (1, 1, 1, channels))
        stack = jax.lax.conv_general_dilated(
            stack,
            kernel,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
            precision=jax.lax.Precision.HIGHEST,
        )
    return stack


def masked_ssim(image: Array, reference: Array, preserve_mask: Array, variant: str = "correct") -> Array:
    """SSIM (11x11 Gaussian, sigma 1.5) over the pixels to keep, clipped to [0, 1], ``[B]``; NaN where there are none.

    The correct variant takes local statistics over the kept pixels of the window alone (Gaussian weights renormalised;
    beyond the image counts as not kept, so images under 11 pixels work too) and averages over kept pixels whose window
    holds at least half of its weight; if no pixel has that much, over all kept pixels. Arguments and errors:
    ``masked_mse``.
    """
    x, y, mask = _check(image, reference, preserve_mask, variant)
    offsets = np.arange(WINDOW) - WINDOW // 2
    gaussian = np.exp(-0.5 * np.square(offsets / SIGMA))
    gaussian /= gaussian.sum()
    m = mask[..., None]

    moments = _filter(jnp.concatenate([x * m, y * m, x * x * m, y * y * m, x * y * m], axis=-1), gaussian)
    support = _filter(m, gaussian)
    if variant == "official":
        moments = moments / (_filter(m, np.ones(WINDOW)) + 1e-8)
    else:
        moments = moments / jnp.maximum(support, 1e-6)
    mean_x, mean_y, square_x, square_y, product = jnp.split(moments, 5, axis=-1)
    var_x, var_y = square_x - jnp.square(mean_x), square_y - jnp.square(mean_y)
    covariance = product - mean_x * mean_y
    if variant == "correct":
        # Rounding can leave a flat patch with a variance just below 0.
        var_x, var_y = jnp.maximum(var_x, 0.0), jnp.maximum(var_y, 0.0)
    numerator = (2.0 * mean_x * mean_y + C1) * (2.0 * covariance + C2)
    denominator = (jnp.square(mean_x) + jnp.square(mean_y) + C1) * (var_x + var_y + C2)
    ssim = (numerator / denominator).mean(axis=-1)

    weight = mask
    if variant == "correct":
        supported = jnp.where(support[..., 0] >= MIN_SUPPORT, mask, 0.0)
        weight = jnp.where(supported.sum(axis=(1, 2), keepdims=True) > 0, supported, mask)
    total = weight.sum(axis=(1, 2))
    mean = (ssim * weight).sum(axis=(1, 2)) / jnp.maximum(total, 1.0)
    return jnp.where(total > 0, jnp.clip(mean, 0.0, 1.0), jnp.nan)


def pixel_reward(image: Array, reference: Array, preserve_mask: Array, cfg: NFTConfig) -> PixelReward:
    """``w ssim + (1 - w) clip(psnr / psnr_max, 0, 1)`` with ``w = pixel_ssim_weight``.

    Args:
        image: edited image ``[B, H, W, 3]`` in [0, 1].
        reference: source image, same shape.
        preserve_mask: ``[B, H, W]``, 1 = keep.
        cfg: uses ``pixel_variant``, ``pixel_ssim_weight``, ``pixel_psnr_max_db``.

    Returns:
        ``PixelReward``; a sample without pixels to keep scores 0 and is invalid (official: scores 0, valid).

    Raises:
        UserError: for shapes that do not fit.
    """
    mse = masked_mse(image, reference, preserve_mask, cfg.pixel_variant)
    psnr = masked_psnr(image, reference, preserve_mask, cfg.pixel_variant)
    ssim = masked_ssim(image, reference, preserve_mask, cfg.pixel_variant)
    known = jnp.isfinite(psnr)
    closeness = jnp.clip(psnr / cfg.pixel_psnr_max_db, 0.0, 1.0)
    mixed = cfg.pixel_ssim_weight * ssim + (1.0 - cfg.pixel_ssim_weight) * closeness
    valid = jnp.ones_like(known) if cfg.pixel_variant == "official" else known
    # A picture that is not finite must not pass as "nothing to keep, score 0".
    nothing_to_keep = jnp.logical_not((preserve_mask >= 0.5).any(axis=(1, 2)))
    valid = valid & (known | nothing_to_keep)
    return PixelReward(jnp.where(known, mixed, 0.0), valid, mse, psnr, ssim)
