"""The Qwen-Image transformer: 60 double-stream blocks at real size, any number otherwise.

Module and parameter names follow diffusers' ``QwenImageTransformer2DModel``; the blocks are FLUX's (``blocks.py``),
stacked along a leading layer axis and run by ``lax.scan``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models.blocks import BlockInputs, DoubleStreamBlock, StreamNames, output_layer, stack
from cocoedit_jax.models.layers import MODULATION, EmbedMLP, Linear, RMSNorm, rope_table, sinusoidal_embedding
from cocoedit_jax.models.parallel import join_streams, share_tokens, stream_order
from cocoedit_jax.models.shape import COUNT, FLAG, SIZE, SIZES, Checks, check_rope, exactly, from_diffusers

Array = jax.Array

CLASS_NAME = "QwenImageTransformer2DModel"  # diffusers' name of it
IMAGE, TEXT = StreamNames("img_mod.1", "img_mlp"), StreamNames("txt_mod.1", "txt_mlp")
# How close a sigma must be to one of a table's.
SIGMA_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Shape of the transformer, named as in diffusers' ``config.json``. Defaults are Qwen-Image-Edit and -2509.

    Attributes:
        zero_cond_t: modulate the tokens of the source images as clean ones, at t = 0 (Qwen-Image-Edit-2511).
    """

    in_channels: int = 64
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False

    theta = 10_000.0
    pooled_features = None

    def __post_init__(self) -> None:
        check_rope(self.axes_dims_rope, self.attention_head_dim)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> "QwenConfig":
        """The shape that a ``config.json`` of diffusers' QwenImageTransformer2DModel describes.

        Raises:
            UserError: naming all keys that are unknown, or have values that this model cannot take.
        """
        in_channels = raw.get("in_channels", cls.in_channels)
        checks: Checks = {
            "axes_dims_rope": SIZES,
            "zero_cond_t": FLAG,
            "num_layers": COUNT,
            # Packed tokens in and out have the same channels.
            "patch_size": exactly(2),
            "out_channels": ("a quarter of in_channels", lambda x: type(x) is int and 4 * x == in_channels),
        }
        checks |= dict.fromkeys(
            ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"), SIZE
        )
        off = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
        checks |= dict.fromkeys(off, exactly(False))
        checks["pooled_projection_dim"] = SIZE  # in files of the first version, without a meaning there too
        given = {"out_channels": 16} | dict(raw)
        unused = ("patch_size", "out_channels", "pooled_projection_dim", *off)
        return from_diffusers(cls, CLASS_NAME, given, checks, unused=unused)

    @property
    def hidden(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        return 4 * self.hidden

    @property
    def num_blocks(self) -> int:
        return self.num_layers


def position_ids(grids: Sequence[tuple[int, int]], num_text: int) -> np.ndarray:
    """Rotary positions of [text, images], int32 ``[num_text + tokens, 3]`` (diffusers' QwenEmbedRope, scale_rope).

    Rows and columns of an image count from its centre, its first axis is its number; text goes on behind the largest
    image, on all three axes.

    Args:
        grids: rows and columns of tokens of every image, target first.
        num_text: text states, padding included.
    """
    behind = max(max(rows // 2, columns // 2) for rows, columns in grids)
    text = np.repeat(np.arange(behind, behind + num_text)[:, None], 3, axis=1)
    images = []
    for number, (rows, columns) in enumerate(grids):
        y, x = np.meshgrid(*(np.arange(side) - (side - side // 2) for side in (rows, columns)), indexing="ij")
        images.append(np.stack([np.full_like(y, number), y, x], axis=-1).reshape(-1, 3))
    return np.concatenate([text, *images]).astype(np.int32)


class TimeEmbed(nn.Module):
    """Conditioning vector ``[B, D]`` of sigma ``t`` ``[B]``: the timestep alone (QwenTimestepProjEmbeddings).

    The published model, and all that was trained on it, rounds the sigma and the frequencies to its own dtype.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, t: Array) -> Array:
        features = sinusoidal_embedding(t, 256, scale=1000.0, rounded_to=self.dtype)
        return EmbedMLP(self.features, self.dtype, name="timestep_embedder")(features)


class QwenTransformer(nn.Module):
    """Velocity of packed latents (diffusers QwenImageTransformer2DModel).

    Call with
        hidden: packed tokens ``[B, S, in_channels]``, target tokens first, then those of the source images;
        text: encoder states ``[B, S_txt, joint_attention_dim]``;
        text_mask: bool ``[B, S_txt]``, False for padding that none attends to, or None;
        t: sigma in [0, 1], ``[B]``;
        ids: static integer positions ``[S_txt + S, 3]`` (``position_ids``), text first;
        num_target: how many leading tokens to return.
    Returns the velocity of the target tokens, ``[B, num_target, in_channels]``, float32.

    With modulation tables (``modulation.py``) among the variables, ``t`` must be one of their sigmas; the velocity of
    another is NaN.
    """

    config: QwenConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention_backend: str = "auto"
    shares_tokens = True

    @nn.compact
    def __call__(
        self, hidden: Array, text: Array, text_mask: Array | None, t: Array, ids: np.ndarray, num_target: int
    ) -> Array:
        cfg, d = self.config, self.config.hidden
        known: Array | None = None
        if self.has_variable(MODULATION, "sigmas"):
            sigmas = self.get_variable(MODULATION, "sigmas")
            embed = lambda t: jnp.argmin(jnp.abs(sigmas - t[:, None]), axis=1)  # noqa: E731 - rows of the tables
            temb = embed(t)
            known = jnp.abs(sigmas[temb] - t) <= SIGMA_TOLERANCE
        else:
            embed = TimeEmbed(d, self.dtype, name="time_text_embed")
            temb = embed(t)
        order = stream_order(text.shape[1], hidden.shape[1])
        rope = rope_table(ids[order], cfg.axes_dims_rope, cfg.theta)
        x = Linear(d, (None, "embed"), dtype=self.dtype, name="img_in")(share_tokens(hidden))
        context = RMSNorm(dtype=self.dtype, name="txt_norm")(share_tokens(text).astype(self.dtype))
        context = Linear(d, (None, "embed"), dtype=self.dtype, name="txt_in")(context)
        key_mask = None
        if text_mask is not None:
            key_mask = join_streams(share_tokens(text_mask), jnp.ones(x.shape[:2], jnp.bool_))
        given = BlockInputs(temb, tuple(share_tokens(x, axis=0) for x in rope), key_mask)  # pyright: ignore
        if cfg.zero_cond_t:
            is_source = share_tokens(jnp.arange(hidden.shape[1]) >= num_target, axis=0)
            given = given._replace(source=is_source, temb_source=embed(jnp.zeros_like(t)))
        if cfg.num_layers:
            blocks = stack(DoubleStreamBlock, cfg.num_layers, self.remat)(
                d, cfg.mlp_hidden, cfg.num_attention_heads, IMAGE, TEXT, self.dtype, self.attention_backend,
                name="transformer_blocks",
            )  # fmt: skip
            (x, _), _ = blocks((x, context), given)
        velocity = output_layer(self, x, temb, cfg.in_channels, num_target)
        return velocity if known is None else jnp.where(known[:, None, None], velocity, jnp.nan)

    def init_params(self, key: Array) -> Any:
        """Fresh parameters, with logical axis names boxed into every leaf."""
        cfg = self.config
        tokens, text = jnp.zeros((1, 2, cfg.in_channels)), jnp.zeros((1, 1, cfg.joint_attention_dim))
        return self.init(key, tokens, text, None, jnp.zeros(1), np.zeros((3, 3), np.int32), 1)["params"]


def abstract_params(config: QwenConfig) -> Any:
    """ShapeDtypeStructs (float32) of the parameters, with logical axis names boxed around them; nothing is computed."""
    return jax.eval_shape(lambda: QwenTransformer(config).init_params(jax.random.key(0)))
