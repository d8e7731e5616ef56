"""What the transformers are built of: the double-stream block, stacks of blocks, the output layer."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from cocoedit_jax.models import quantize
from cocoedit_jax.models.attention_blocked import ATTENTION_NAME
from cocoedit_jax.models.layers import (
    LORA,
    MODULATION,
    FeedForward,
    JointAttention,
    Linear,
    Modulation,
    layer_norm,
    modulate,
)
from cocoedit_jax.models.parallel import (
    constrain_tokens,
    holds_shards,
    not_whole_weights,
    tokens_are_shares,
    whole_tokens,
)

Array = jax.Array
Rope = tuple[Array, Array]

BLOCK_INPUT_NAME = "block_input"
_policies = jax.checkpoint_policies


def _cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """cuDNN's output and softmax statistics. JAX makes them in its own backward rule, where they cannot be named."""
    return primitive.name.startswith("dot_product_attention_fwd")


def _float_dots(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Matmul outputs, but for sums of quantised numbers: what is made of those is named, and half as large."""
    return params.get("preferred_element_type") != jnp.int32 and _policies.dots_with_no_batch_dims_saveable(
        primitive, *operands, **params
    )


# What the forward pass keeps for the backward pass, which recomputes the rest.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # every activation
    "dots": _policies.save_from_both_policies(  # matmul outputs
        _float_dots, _policies.save_only_these_names(quantize.OUTPUT_NAME)
    ),
    "attention": _policies.save_from_both_policies(  # block inputs, attention outputs and their softmax statistics
        _policies.save_only_these_names(ATTENTION_NAME), _cudnn_forward
    ),
    "full": _policies.nothing_saveable,  # block inputs only
    "offload": _policies.save_and_offload_only_these_names(  # block inputs only, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT_NAME],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def block_input(x: Array) -> Array:
    """The states ``[B, S, D]`` that a block starts from: split by tokens, and named for remat policies."""
    return checkpoint_name(constrain_tokens(x), BLOCK_INPUT_NAME)


class BlockInputs(NamedTuple):
    """What every block of a stack is given beside the streams."""

    temb: Array  # conditioning vector [B, D], or rows [B] of modulation tables
    rope: Rope  # of the joint sequence (``parallel.join_streams``)
    key_mask: Array | None = None  # bool [B, S_text + S], joint
    source: Array | None = None  # bool [S], True for image tokens that are modulated by ``temb_source``
    temb_source: Array | None = None  # like ``temb``


@dataclasses.dataclass(frozen=True)
class StreamNames:
    """Names of one stream's modulation and MLP."""

    modulation: str
    mlp: str


class DoubleStreamBlock(nn.Module):
    """Image and text streams with separate weights and joint attention (MMDiT, arXiv 2403.03206).

    diffusers' FluxTransformerBlock and QwenImageTransformerBlock, which differ in names, and in that the tokens of the
    source images may have a modulation of their own.
    """

    hidden: int
    mlp_hidden: int
    num_heads: int
    image: StreamNames
    text: StreamNames
    dtype: Any
    attention_backend: str

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], given: BlockInputs) -> tuple[tuple[Array, Array], None]:
        x, context = (block_input(stream) for stream in streams)
        image, text = (
            Modulation(6 * self.hidden, dtype=self.dtype, name=names.modulation) for names in (self.image, self.text)
        )
        chunks = image(given.temb)
        if given.temb_source is not None and given.source is not None:
            is_source = given.source[None, :, None]
            chunks = [jnp.where(is_source, s, c) for s, c in zip(image(given.temb_source), chunks, strict=True)]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunks
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = text(given.temb)
        attn_x, attn_context = JointAttention(
            self.num_heads, self.hidden // self.num_heads, self.dtype, self.attention_backend, name="attn"
        )(
            modulate(layer_norm(x), shift, scale),
            modulate(layer_norm(context), c_shift, c_scale),
            given.rope,
            given.key_mask,
        )
        assert attn_context is not None
        x = x + gate * attn_x
        x = x + gate_mlp * FeedForward(self.hidden, self.mlp_hidden, self.dtype, name=self.image.mlp)(
            modulate(layer_norm(x), shift_mlp, scale_mlp)
        )
        context = context + c_gate * attn_context
        context = context + c_gate_mlp * FeedForward(self.hidden, self.mlp_hidden, self.dtype, name=self.text.mlp)(
            modulate(layer_norm(context), c_shift_mlp, c_scale_mlp)
        )
        return (x, context), None


def output_layer(transformer: nn.Module, x: Array, temb: Array, features: int, num_target: int) -> Array:
    """Modulated norm of the first ``num_target`` tokens and their projection to latents, float32; for use in
    ``transformer``."""
    if not tokens_are_shares():
        x = x[:, :num_target]
    dtype: Any = transformer.dtype  # pyright: ignore[reportAttributeAccessIssue]
    # The final layer's order is (scale, shift), unlike the blocks'.
    scale, shift = Modulation(2 * x.shape[-1], dtype=dtype, num_chunks=2, name="norm_out.linear")(temb)
    zeros = nn.initializers.zeros
    project = Linear(features, ("embed", None), dtype=dtype, kernel_init=zeros, name="proj_out")
    return whole_tokens(project(modulate(layer_norm(x), shift, scale)).astype(jnp.float32))[:, :num_target]


def stack(block: type[nn.Module], length: int, remat: str) -> Any:
    """``block`` scanned over ``length`` layers, rematerialised by the named policy; the body returns no parameters."""
    if remat not in REMAT_POLICIES:
        raise KeyError(f"remat={remat!r} is unknown; expected one of {sorted(REMAT_POLICIES)}")
    policy = REMAT_POLICIES[remat]
    if remat == "none" and holds_shards():
        policy = not_whole_weights
    if policy is not None:
        block = nn.remat(block, policy=policy, prevent_cse=False)
    broadcast: Any = nn.broadcast
    return nn.scan(
        block,
        variable_axes={"params": 0, LORA: 0, MODULATION: 0},
        split_rngs={"params": True},
        in_axes=broadcast,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
