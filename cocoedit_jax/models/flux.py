"""The FLUX.1 (Kontext) transformer: 19 double-stream and 38 single-stream blocks at real size, any number otherwise.

Module and parameter names follow diffusers' ``FluxTransformer2DModel``, with blocks of one kind stacked along a leading
layer axis and run by ``lax.scan``: ``transformer_blocks.3.attn.to_q.weight`` there is entry 3 of
``params["transformer_blocks"]["attn"]["to_q"]["kernel"]`` here, transposed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models.blocks import BlockInputs, DoubleStreamBlock, StreamNames, block_input, output_layer, stack
from cocoedit_jax.models.layers import (
    EmbedMLP,
    JointAttention,
    Linear,
    Modulation,
    layer_norm,
    modulate,
    rope_table,
    sinusoidal_embedding,
)
from cocoedit_jax.models.parallel import join_streams, share_tokens, split_streams, stream_order
from cocoedit_jax.models.shape import COUNT, FLAG, SIZE, SIZES, Checks, check_rope, exactly, from_diffusers

Array = jax.Array

CLASS_NAME = "FluxTransformer2DModel"  # diffusers' name of it
IMAGE, TEXT = StreamNames("norm1.linear", "ff"), StreamNames("norm1_context.linear", "ff_context")


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Shape of the transformer, named as in diffusers' ``config.json``. Defaults are FLUX.1 Kontext-dev."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_rope(self.axes_dims_rope, self.attention_head_dim)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> "FluxConfig":
        """The shape that a ``config.json`` of diffusers' FluxTransformer2DModel describes.

        Keys that are left out have diffusers' defaults, which are not ours: ``guidance_embeds`` is false there.

        Raises:
            UserError: naming all keys that are unknown, or have values that this model cannot take.
        """
        checks: Checks = {
            "guidance_embeds": FLAG,
            "axes_dims_rope": SIZES,
            "patch_size": exactly(1),
            "out_channels": ("null or in_channels", lambda x: x in (None, raw.get("in_channels", cls.in_channels))),
        }
        checks |= dict.fromkeys(("num_layers", "num_single_layers"), COUNT)
        checks |= dict.fromkeys(("in_channels", "attention_head_dim", "num_attention_heads"), SIZE)
        checks |= dict.fromkeys(("joint_attention_dim", "pooled_projection_dim"), SIZE)
        given = {"guidance_embeds": False} | dict(raw)
        return from_diffusers(cls, CLASS_NAME, given, checks, unused=("patch_size", "out_channels"))

    @property
    def hidden(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    @property
    def num_blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def pooled_features(self) -> int:
        return self.pooled_projection_dim


class SingleBlock(nn.Module):
    """One stream over the joint [text, image], attention and MLP in parallel (diffusers FluxSingleTransformerBlock)."""

    config: FluxConfig
    dtype: Any
    attention_backend: str

    @nn.compact
    def __call__(self, x: Array, given: BlockInputs) -> tuple[Array, None]:
        cfg, d = self.config, self.config.hidden
        x = block_input(x)
        shift, scale, gate = Modulation(3 * d, dtype=self.dtype, num_chunks=3, name="norm.linear")(given.temb)
        h = modulate(layer_norm(x), shift, scale)
        attn, _ = JointAttention(
            cfg.num_attention_heads, cfg.attention_head_dim, self.dtype, self.attention_backend, name="attn"
        )(h, None, given.rope)
        mlp = nn.gelu(Linear(cfg.mlp_hidden, ("embed", "mlp"), dtype=self.dtype, name="proj_mlp")(h), approximate=True)
        out = Linear(d, ("mlp", "embed"), dtype=self.dtype, name="proj_out")(jnp.concatenate([attn, mlp], axis=-1))
        return x + gate * out, None


class TimeTextEmbed(nn.Module):
    """Conditioning vector: embeddings of 1000 t, 1000 guidance (if the model has it) and the pooled text, summed."""

    config: FluxConfig
    dtype: Any

    @nn.compact
    def __call__(self, t: Array, guidance: Array | None, pooled: Array) -> Array:
        d = self.config.hidden
        temb = EmbedMLP(d, self.dtype, name="timestep_embedder")(sinusoidal_embedding(t * 1000, 256))
        if self.config.guidance_embeds:
            if guidance is None:
                raise ValueError("guidance=None, but this model has guidance_embeds=True; pass guidance [B]")
            temb = temb + EmbedMLP(d, self.dtype, name="guidance_embedder")(sinusoidal_embedding(guidance * 1000, 256))
        return temb + EmbedMLP(d, self.dtype, name="text_embedder")(pooled)


class FluxTransformer(nn.Module):
    """Velocity of packed latents (diffusers FluxTransformer2DModel).

    Call with
        hidden: packed tokens ``[B, S, in_channels]``, target tokens first, then condition-image tokens;
        text: encoder states ``[B, S_txt, joint_attention_dim]``;  pooled: ``[B, pooled_projection_dim]``;
        t: sigma in [0, 1], ``[B]``;  guidance: ``[B]`` or None;
        ids: static integer positions ``[S_txt + S, 3]``, text first;
        num_target: how many leading tokens to return.
    Returns the velocity of the target tokens, ``[B, num_target, in_channels]``, float32.
    """

    config: FluxConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention_backend: str = "auto"
    shares_tokens = True

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        text: Array,
        pooled: Array,
        t: Array,
        guidance: Array | None,
        ids: np.ndarray,
        num_target: int,
    ) -> Array:
        cfg, d = self.config, self.config.hidden
        temb = TimeTextEmbed(cfg, self.dtype, name="time_text_embed")(t, guidance, pooled)
        order = stream_order(text.shape[1], hidden.shape[1])
        rope = rope_table(ids[order], cfg.axes_dims_rope, cfg.theta)
        given = BlockInputs(temb, tuple(share_tokens(x, axis=0) for x in rope))  # pyright: ignore[reportArgumentType]
        x = Linear(d, (None, "embed"), dtype=self.dtype, name="x_embedder")(share_tokens(hidden))
        context = Linear(d, (None, "embed"), dtype=self.dtype, name="context_embedder")(share_tokens(text))
        n_text = context.shape[1]

        if cfg.num_layers:
            blocks = stack(DoubleStreamBlock, cfg.num_layers, self.remat)(
                d, cfg.mlp_hidden, cfg.num_attention_heads, IMAGE, TEXT, self.dtype, self.attention_backend,
                name="transformer_blocks",
            )  # fmt: skip
            (x, context), _ = blocks((x, context), given)
        x = join_streams(context, x)
        if cfg.num_single_layers:
            blocks = stack(SingleBlock, cfg.num_single_layers, self.remat)(
                cfg, self.dtype, self.attention_backend, name="single_transformer_blocks"
            )
            x, _ = blocks(x, given)
        return output_layer(self, split_streams(x, n_text)[1], temb, cfg.in_channels, num_target)

    def init_params(self, key: Array) -> Any:
        """Fresh parameters, with logical axis names boxed into every leaf."""
        cfg, one = self.config, jnp.zeros(1)
        tokens, text = jnp.zeros((1, 2, cfg.in_channels)), jnp.zeros((1, 1, cfg.joint_attention_dim))
        ids = np.zeros((3, 3), np.int32)
        return self.init(key, tokens, text, jnp.zeros((1, cfg.pooled_projection_dim)), one, one, ids, 1)["params"]


def abstract_params(config: FluxConfig) -> Any:
    """ShapeDtypeStructs (float32) of the parameters, with logical axis names boxed around them; nothing is computed."""
    return jax.eval_shape(lambda: FluxTransformer(config).init_params(jax.random.key(0)))
