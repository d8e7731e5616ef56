"""The FLUX.1 (Kontext) transformer: 19 double-stream and 38 single-stream blocks at real size, any number otherwise.

Module and parameter names follow diffusers' ``FluxTransformer2DModel``, with blocks of one kind stacked along a leading
layer axis and run by ``lax.scan``: ``transformer_blocks.3.attn.to_q.weight`` there is entry 3 of
``params["transformer_blocks"]["attn"]["to_q"]["kernel"]`` here, transposed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.layers import (
    LORA,
    EmbedMLP,
    FeedForward,
    JointAttention,
    Linear,
    Modulation,
    layer_norm,
    modulate,
    rope_table,
    sinusoidal_embedding,
)

Array = jax.Array
Rope = tuple[Array, Array]

REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep block inputs only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul outputs, recompute the rest
}


CLASS_NAME = "FluxTransformer2DModel"  # diffusers' name of it


def _size(value: Any) -> bool:
    return type(value) is int and value > 0


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
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope={self.axes_dims_rope} sums to {sum(self.axes_dims_rope)}; "
                f"expected attention_head_dim={self.attention_head_dim}"
            )

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> "FluxConfig":
        """The shape that a ``config.json`` of diffusers' FluxTransformer2DModel describes.

        Keys that are left out have diffusers' defaults, which are not ours: ``guidance_embeds`` is false there.

        Raises:
            UserError: naming all keys that are unknown, or have values that this model cannot take.
        """
        given: dict[str, Any] = {"guidance_embeds": False}
        given |= {key: value for key, value in raw.items() if not key.startswith("_")}
        checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "guidance_embeds": ("true or false", lambda x: isinstance(x, bool)),
            "axes_dims_rope": ("a list of whole numbers", lambda x: isinstance(x, list | tuple) and all(map(_size, x))),
            "patch_size": ("1", lambda x: x == 1),
            "out_channels": ("null or in_channels", lambda x: x in (None, given.get("in_channels", cls.in_channels))),
        }
        for key in ("num_layers", "num_single_layers"):
            checks[key] = ("a whole number", lambda x: x == 0 or _size(x))
        for key in ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"):
            checks[key] = ("a positive whole number", _size)
        checks["pooled_projection_dim"] = checks["in_channels"]
        problems = [
            f"{key}={value!r}: not an option of this model" for key, value in given.items() if key not in checks
        ]
        problems += [
            f"{key}={given[key]!r}: expected {expected}"
            for key, (expected, accepts) in checks.items()
            if key in given and not accepts(given[key])
        ]
        if raw.get("_class_name", CLASS_NAME) != CLASS_NAME:
            problems.append(f"_class_name={raw['_class_name']!r}: expected {CLASS_NAME!r}")
        if not problems:
            values: dict[str, Any] = {key: given[key] for key in given if key not in ("patch_size", "out_channels")}
            values["axes_dims_rope"] = tuple(given.get("axes_dims_rope", cls.axes_dims_rope))
            try:
                return cls(**values)
            except ValueError as error:
                problems = [str(error)]
        raise UserError(f"configuration of a {CLASS_NAME}: " + "; ".join(problems))

    @property
    def hidden(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden * self.mlp_ratio)


class DoubleBlock(nn.Module):
    """Image and text streams with separate weights and joint attention (diffusers FluxTransformerBlock)."""

    config: FluxConfig
    dtype: Any
    attention_backend: str

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], temb: Array, rope: Rope) -> tuple[tuple[Array, Array], None]:
        cfg, d = self.config, self.config.hidden
        x, context = streams
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = Modulation(6, d, self.dtype, name="norm1")(temb)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = Modulation(
            6, d, self.dtype, name="norm1_context"
        )(temb)
        attn_x, attn_context = JointAttention(
            cfg.num_attention_heads, cfg.attention_head_dim, self.dtype, self.attention_backend, name="attn"
        )(modulate(layer_norm(x), shift, scale), modulate(layer_norm(context), c_shift, c_scale), rope)
        assert attn_context is not None
        x = x + gate[:, None] * attn_x
        x = x + gate_mlp[:, None] * FeedForward(d, cfg.mlp_hidden, self.dtype, name="ff")(
            modulate(layer_norm(x), shift_mlp, scale_mlp)
        )
        context = context + c_gate[:, None] * attn_context
        context = context + c_gate_mlp[:, None] * FeedForward(d, cfg.mlp_hidden, self.dtype, name="ff_context")(
            modulate(layer_norm(context), c_shift_mlp, c_scale_mlp)
        )
        return (x, context), None


class SingleBlock(nn.Module):
    """One stream over [text, image], attention and MLP in parallel (diffusers FluxSingleTransformerBlock)."""

    config: FluxConfig
    dtype: Any
    attention_backend: str

    @nn.compact
    def __call__(self, x: Array, temb: Array, rope: Rope) -> tuple[Array, None]:
        cfg, d = self.config, self.config.hidden
        shift, scale, gate = Modulation(3, d, self.dtype, name="norm")(temb)
        h = modulate(layer_norm(x), shift, scale)
        attn, _ = JointAttention(
            cfg.num_attention_heads, cfg.attention_head_dim, self.dtype, self.attention_backend, name="attn"
        )(h, None, rope)
        mlp = nn.gelu(Linear(cfg.mlp_hidden, ("embed", "mlp"), dtype=self.dtype, name="proj_mlp")(h), approximate=True)
        out = Linear(d, ("mlp", "embed"), dtype=self.dtype, name="proj_out")(jnp.concatenate([attn, mlp], axis=-1))
        return x + gate[:, None] * out, None


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


def _stack(block: type[nn.Module], length: int, remat: str) -> Any:
    """``block`` scanned over ``length`` layers, rematerialised by the named policy; the body returns no parameters."""
    if remat not in REMAT_POLICIES:
        raise KeyError(f"remat={remat!r} is unknown; expected one of {sorted(REMAT_POLICIES)}")
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    broadcast: Any = nn.broadcast
    return nn.scan(
        block,
        variable_axes={"params": 0, LORA: 0},
        split_rngs={"params": True},
        in_axes=(broadcast, broadcast),  # pyright: ignore[reportArgumentType] - flax documents tuples
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


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
        x = Linear(d, (None, "embed"), dtype=self.dtype, name="x_embedder")(hidden)
        context = Linear(d, (None, "embed"), dtype=self.dtype, name="context_embedder")(text)
        cos, sin = rope_table(ids, cfg.axes_dims_rope, cfg.theta)
        rope = (jnp.asarray(cos), jnp.asarray(sin))
        block_args = (cfg, self.dtype, self.attention_backend)

        if cfg.num_layers:
            blocks = _stack(DoubleBlock, cfg.num_layers, self.remat)(*block_args, name="transformer_blocks")
            (x, context), _ = blocks((x, context), temb, rope)
        n_text = context.shape[1]
        x = jnp.concatenate([context, x], axis=1)
        if cfg.num_single_layers:
            blocks = _stack(SingleBlock, cfg.num_single_layers, self.remat)(
                *block_args, name="single_transformer_blocks"
            )
            x, _ = blocks(x, temb, rope)

        x = x[:, n_text : n_text + num_target]
        # The final layer's order is (scale, shift), unlike the blocks'.
        scale, shift = Modulation(2, d, self.dtype, name="norm_out")(temb)
        x = modulate(layer_norm(x), shift, scale)
        out = Linear(
            cfg.in_channels, ("embed", None), dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj_out"
        )(x)
        return out.astype(jnp.float32)


def abstract_params(config: FluxConfig) -> Any:
    """ShapeDtypeStructs (float32) of the parameters, with logical axis names boxed around them; nothing is computed."""
    zeros = [jnp.zeros((1, 2, config.in_channels)), jnp.zeros((1, 1, config.joint_attention_dim))]
    zeros += [jnp.zeros((1, config.pooled_projection_dim)), jnp.zeros(1), jnp.zeros(1)]
    init = FluxTransformer(config).init
    return jax.eval_shape(lambda key: init(key, *zeros, np.zeros((3, 3), np.int32), 1)["params"], jax.random.key(0))
