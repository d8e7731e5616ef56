"""The optimizer step compiled at full size without weights, data, or even the devices: what it needs of memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cocoedit_jax.models import lora
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen
from cocoedit_jax.models.editor import Conditioning, Editor, Grid
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.kontext import KontextEditor
from cocoedit_jax.models.qwen import QwenConfig, QwenTransformer
from cocoedit_jax.models.qwen_edit import QwenEditor, with_modulation_at
from cocoedit_jax.models.text import PrecomputedText, TextStates
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.sharding.mesh import batch_sharding
from cocoedit_jax.sharding.rules import sharded_shapes
from cocoedit_jax.train.step import StepBatch, StepScalars, TrainState, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of one optimizer step.

    Attributes:
        height, width: of the pictures, pixels.
        text_tokens: length of the text states.
        text_mask: whether they come with a mask.
        samples: per optimizer step, over all devices.
        micro_batch: samples per forward and backward, over all devices.
        precompute_modulation: of models that can, as in training.
        sampler_steps: of the rollout, whose sigmas are trained on.
    """

    height: int = 512
    width: int = 512
    text_tokens: int = 128
    text_mask: bool = False
    samples: int = 288
    micro_batch: int = 24
    precompute_modulation: bool = True
    sampler_steps: int = 10


FLUX_SCHEDULE = (("base_shift", 0.5), ("max_shift", 1.15), ("base_seq_len", 256), ("max_seq_len", 4096))
QWEN_SCHEDULE = (
    ("base_shift", 0.5), ("max_shift", 0.9), ("base_seq_len", 256), ("max_seq_len", 8192), ("shift_terminal", 0.02),
)  # fmt: skip


def published_editor(
    kind: str, *, dtype: Any = jnp.bfloat16, remat: str = "full", attention_backend: str = "auto"
) -> Editor:
    """The editor of a published model, without its files: ``flux_kontext``, ``qwen_image_edit`` (2509) or
    ``qwen_image_edit_2511``."""
    text = PrecomputedText.of({})
    options: dict[str, Any] = {"dtype": dtype, "remat": remat, "attention_backend": attention_backend}
    if kind == "flux_kontext":
        return KontextEditor(FluxTransformer(FluxConfig(), **options), AutoencoderKL(), text, schedule=FLUX_SCHEDULE)
    shape = {"qwen_image_edit": QwenConfig(), "qwen_image_edit_2511": QwenConfig(zero_cond_t=True)}[kind]
    return QwenEditor(QwenTransformer(shape, **options), AutoencoderQwen(), text, schedule=QWEN_SCHEDULE)


def abstract_state(params: Any, cfg: NFTConfig, lora_cfg: lora.LoraConfig, mesh: Mesh) -> TrainState:
    """Shapes of the replicated training state."""

    def init(key: jax.Array) -> TrainState:
        theta = lora.init_adapter(key, params["transformer"], lora_cfg)
        ema = theta if cfg.ema_decay > 0 else None
        return TrainState(theta, theta, ema, make_optimizer(3e-4, 1e-4, 1.0).init(theta), jnp.zeros((), jnp.int32))

    return sharded_shapes(jax.eval_shape(init, jax.random.key(0)), mesh)


def _abstract_batch(editor: Editor, grid: Grid, cfg: NFTConfig, shape: StepShape, mesh: Mesh) -> StepBatch:
    model = editor.transformer.config
    count = -(-shape.samples // shape.micro_batch)

    def array(*dims: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((count, shape.micro_batch, *dims), dtype, sharding=batch_sharding(mesh, axis=1))

    tokens = (grid.tokens, editor.token_channels)
    text_dtype = editor.transformer.dtype
    return StepBatch(
        x0=array(*tokens),
        conditioning=Conditioning(
            source=array(*tokens),
            text=TextStates(
                array(shape.text_tokens, model.joint_attention_dim, dtype=text_dtype),
                None if model.pooled_features is None else array(model.pooled_features, dtype=text_dtype),
                array(shape.text_tokens, dtype=jnp.bool_) if shape.text_mask else None,
            ),
            guidance=None if editor.guidance is None else array(),
        ),
        preserve_latent=array(grid.height, grid.width),
        r=array(grid.tokens) if cfg.r_granularity == "token" else array(),
        token_weight=array(grid.tokens),
        tau_pos=array(),
        tau_neg=array(),
        valid=array(),
        sample=array(dtype=jnp.int32),
    )


def lower_step(
    editor: Editor, cfg: NFTConfig, lora_cfg: lora.LoraConfig, shape: StepShape, mesh: Mesh
) -> jax.stages.Lowered:
    """The optimizer step, traced for ``mesh``, whose devices may be those of a topology that is not there
    (``jax.experimental.topologies``); ``.compile()`` it for memory and collectives.

    Raises:
        ValueError: a picture size that does not divide.
    """
    grid = editor.grid(shape.height, shape.width)
    sigmas = editor.sigmas(shape.sampler_steps, grid)
    if isinstance(editor, QwenEditor) and shape.precompute_modulation:
        editor = with_modulation_at(editor, [sigmas])
    step = make_train_step(editor, grid, sigmas, cfg, lora_cfg, make_optimizer(3e-4, 1e-4, 1.0), mesh)
    params = sharded_shapes(editor.abstract(), mesh)
    scalar = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("count", "old_decay", "ema_decay")}
    key = jax.eval_shape(lambda: jax.random.key(0))
    scalars = StepScalars(num_micro=jax.ShapeDtypeStruct((), jnp.int32), key=key, **scalar)  # pyright: ignore
    return step.lower(
        abstract_state(params, cfg, lora_cfg, mesh),
        params,
        _abstract_batch(editor, grid, cfg, shape, mesh),
        sharded_shapes(scalars, mesh),
    )


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes per device that the compiler plans: arguments, results, aliased between the two, temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend gives no memory analysis")
    return {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
