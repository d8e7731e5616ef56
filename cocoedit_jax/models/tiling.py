"""Decoding a large picture in overlapping tiles, blended linearly, as diffusers' ``AutoencoderKL.tiled_decode`` does.

Memory then depends on the tile and not on the picture. The picture changes a little: normalisation and attention see a
tile where they saw the whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

# Share of a tile that it has in common with the next one, as in diffusers. Fixed: tiles must be whole latent cells.
OVERLAP_DIVISOR = 4


def _blend(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """``tile`` whose first cells along ``axis`` fade over from the last ones of ``before``."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    ramp = (jnp.arange(extent, dtype=tile.dtype) / extent).reshape(-1, *[1] * (tile.ndim - axis - 1))
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    new, rest = jnp.split(tile, [extent], axis=axis)
    return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)


def _decode_tiles(decode: Callable[[Array], Array], tiles: list[Array]) -> list[Array]:
    """``decode`` of every tile, one at a time; compiled once for each distinct shape."""
    out: dict[int, Array] = {}
    for shape in sorted({tile.shape for tile in tiles}):
        members = [i for i, tile in enumerate(tiles) if tile.shape == shape]
        decoded = jax.lax.map(decode, jnp.stack([tiles[i] for i in members]))
        out |= dict(zip(members, decoded, strict=True))
    return [out[i] for i in range(len(tiles))]


def tiled_decode(decode: Callable[[Array], Array], latents: Array, tile: int, factor: int) -> Array:
    """``decode(latents)`` in tiles of ``tile`` latent cells a side, each overlapping the next by a quarter.

    Args:
        decode: ``[B, h, w, c] -> [B, h factor, w factor, 3]`` for any ``h``, ``w``.
        latents: ``[B, H, W, c]``.
        tile: latent cells, a multiple of ``OVERLAP_DIVISOR``.
        factor: pixels per latent cell.

    Returns:
        ``[B, H factor, W factor, 3]``.
    """
    height, width = latents.shape[1:3]
    stride, extent = tile - tile // OVERLAP_DIVISOR, tile // OVERLAP_DIVISOR * factor
    rows, columns = range(0, height, stride), range(0, width, stride)
    tiles = [latents[:, y : y + tile, x : x + tile] for y in rows for x in columns]
    decoded = iter(_decode_tiles(decode, tiles))
    out, above = [], []
    for _ in rows:
        line: list[Array] = []
        for column in range(len(columns)):
            # A tile fades over from its neighbours as they are after their own blending.
            piece = next(decoded)
            if above:
                piece = _blend(above[column], piece, extent, axis=1)
            if line:
                piece = _blend(line[-1], piece, extent, axis=2)
            line.append(piece)
        keep = stride * factor
        out.append(jnp.concatenate([piece[:, :keep, :keep] for piece in line], axis=2))
        above = line
    return jnp.concatenate(out, axis=1)
