"""Soft region weights at latent resolution: erosion, the ring between the regions, weighted distances.

The erosion-and-ring construction is the released code's; with radius 0 the weights are the plain down-sampled mask of
the paper (arXiv 2602.14068).
"""

import jax
import jax.numpy as jnp

from cocoedit_jax.errors import UserError

Array = jax.Array


def erode(mask: Array, radius: int) -> Array:
    """Minimum over a ``(2 radius + 1)``-wide square; the image border does not erode.

    Args:
        mask: float32 ``[B, h, w]`` in [0, 1].
        radius: in latent cells; 0 returns the mask unchanged.

    Raises:
        UserError: for a negative radius or a mask that is not three-dimensional.
    """
    if mask.ndim != 3:
        raise UserError(f"mask has shape {mask.shape}; expected [batch, height, width]")
    if radius < 0:
        raise UserError(f"erosion radius is {radius}; expected 0 or more latent cells")
    if radius == 0:
        return mask
    size = 2 * radius + 1
    padding = ((0, 0), (radius, radius), (radius, radius))
    return jax.lax.reduce_window(mask, jnp.array(jnp.inf, mask.dtype), jax.lax.min, (1, size, size), (1, 1, 1), padding)


def region_weights(
    preserve_latent: Array, erode_preserve: int, erode_edit: int, ring_weight: float
) -> tuple[Array, Array]:
    """Weights of the region to keep and of the edit region.

    Both masks are eroded; the cells that belong to neither eroded mask form the ring, which enters both weights with
    ``ring_weight``.

    Args:
        preserve_latent: ``[B, h, w]``, 1 = keep, 0 = edit, soft values allowed.
        erode_preserve: erosion radius of the region to keep, latent cells.
        erode_edit: erosion radius of the edit region, latent cells.
        ring_weight: in [0, 1].

    Returns:
        ``(w_preserve, w_edit)``, float32 ``[B, h, w]`` in [0, 1].
    """
    keep = preserve_latent.astype(jnp.float32)
    kept = erode(keep, erode_preserve)
    edited = erode(1.0 - keep, erode_edit)
    ring = 1.0 - jnp.clip(kept + edited, 0.0, 1.0)
    return jnp.clip(kept + ring_weight * ring, 0.0, 1.0), jnp.clip(edited + ring_weight * ring, 0.0, 1.0)


def weighted_mse(a: Array, b: Array, w: Array) -> Array:
    """Mean square of ``a - b`` with weights, per sample; 0 where all weights are 0.

    Args:
        a: ``[B, ..., C]``.
        b: ``[B, ..., C]``.
        w: ``[B, ...]``, one weight for all channels of a cell.

    Returns:
        float32 ``[B]``.
    """
    axes = tuple(range(1, w.ndim))
    squares = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(axis=-1)
    total = a.shape[-1] * w.sum(axis=axes)
    return (squares * w).sum(axis=axes) / jnp.maximum(total, 1e-6)
