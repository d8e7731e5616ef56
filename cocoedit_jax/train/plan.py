"""Sampler and optimizer step compiled at full size without weights, data, or even the devices: what they need of
memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from cocoedit_jax.sharding.rules import adapter_shardings, sharded_shapes
from cocoedit_jax.train.rollout import make_sampler
from cocoedit_jax.train.step import StepBatch, StepScalars, TrainState, init_state, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of one step: its rollout and its optimizer step.

    Attributes:
        height, width: of the pictures, pixels.
        text_tokens: length of the text states.
        text_mask: whether they come with a mask.
        samples: per optimizer step, over all devices.
        micro_batch: samples per forward and backward, over all devices.
        precompute_modulation: of models that can, as in training.
        sampler_steps: of the rollout, whose sigmas are trained on.
        rollout_batch: samples drawn at once, over all devices.
        solver: of the rollout.
        sharded_adapters: as for ``make_train_step``.
    """

    height: int = 512
    width: int = 512
    text_tokens: int = 128
    text_mask: bool = False
    samples: int = 288
    micro_batch: int = 24
    precompute_modulation: bool = True
    sampler_steps: int = 10
    rollout_batch: int = 24
    solver: str = "dpm2"
    sharded_adapters: bool = False


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


def abstract_state(
    params: Any, cfg: NFTConfig, lora_cfg: lora.LoraConfig, mesh: Mesh, *, sharded: bool = False
) -> TrainState:
    """Shapes of the training state, placed by ``adapter_shardings``."""
    optimizer = make_optimizer(3e-4, 1e-4, 1.0)
    init = lambda key: init_state(key, params["transformer"], cfg, lora_cfg, optimizer)  # noqa: E731
    state = jax.eval_shape(init, jax.random.key(0))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, state, adapter_shardings(state, mesh, sharded=sharded))


class _Shapes:
    """ShapeDtypeStructs of batches: leading dimensions, of which the last is split over the samples' axes."""

    def __init__(self, mesh: Mesh, *leading: int):
        self._leading, self._sharding = leading, batch_sharding(mesh, axis=len(leading) - 1)

    def __call__(self, *dims: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((*self._leading, *dims), dtype, sharding=self._sharding)

    def conditioning(self, editor: Editor, grid: Grid, shape: StepShape) -> Conditioning:
        model, dtype = editor.transformer.config, editor.transformer.dtype
        text = TextStates(
            self(shape.text_tokens, model.joint_attention_dim, dtype=dtype),
            None if model.pooled_features is None else self(model.pooled_features, dtype=dtype),
            self(shape.text_tokens, dtype=jnp.bool_) if shape.text_mask else None,
        )
        return Conditioning(
            source=self(grid.tokens, editor.token_channels),
            text=text,
            guidance=None if editor.guidance is None else self(),
        )


def _abstract_batch(editor: Editor, grid: Grid, cfg: NFTConfig, shape: StepShape, mesh: Mesh) -> StepBatch:
    array = _Shapes(mesh, -(-shape.samples // shape.micro_batch), shape.micro_batch)
    return StepBatch(
        x0=array(grid.tokens, editor.token_channels),
        conditioning=array.conditioning(editor, grid, shape),
        preserve_latent=array(grid.height, grid.width),
        r=array(grid.tokens) if cfg.r_granularity == "token" else array(),
        token_weight=array(grid.tokens),
        tau_pos=array(),
        tau_neg=array(),
        valid=array(),
        sample=array(dtype=jnp.int32),
    )


def prepared(editor: Editor, shape: StepShape) -> tuple[Editor, Grid, np.ndarray]:
    """The editor as it is trained on pictures of ``shape``, their grid and the sampler's sigmas."""
    grid = editor.grid(shape.height, shape.width)
    sigmas = editor.sigmas(shape.sampler_steps, grid)
    if isinstance(editor, QwenEditor) and shape.precompute_modulation:
        editor = with_modulation_at(editor, [sigmas])
    return editor, grid, sigmas


def lower_step(
    editor: Editor, cfg: NFTConfig, lora_cfg: lora.LoraConfig, shape: StepShape, mesh: Mesh
) -> jax.stages.Lowered:
    """The optimizer step, traced for ``mesh``, whose devices may be those of a topology that is not there
    (``jax.experimental.topologies``); ``.compile()`` it for memory and collectives.

    Args:
        editor: ``published_editor(kind)``, or any other.
        shape: ``micro_batch`` must be a multiple of ``sharding.mesh.sample_shards(mesh)``.
        mesh: ``sharding.layouts.layout_mesh(layout, devices=devices)``.

    Raises:
        ValueError: a picture size that does not divide.
    """
    editor, grid, sigmas = prepared(editor, shape)
    step = make_train_step(
        editor, grid, sigmas, cfg, lora_cfg, make_optimizer(3e-4, 1e-4, 1.0), mesh,
        sharded_adapters=shape.sharded_adapters,
    )  # fmt: skip
    params = sharded_shapes(editor.abstract(), mesh)
    scalar = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("count", "old_decay", "ema_decay")}
    key = jax.eval_shape(lambda: jax.random.key(0))
    scalars = StepScalars(num_micro=jax.ShapeDtypeStruct((), jnp.int32), key=key, **scalar)  # pyright: ignore
    return step.lower(
        abstract_state(params, cfg, lora_cfg, mesh, sharded=shape.sharded_adapters),
        params,
        _abstract_batch(editor, grid, cfg, shape, mesh),
        sharded_shapes(scalars, mesh),
    )


def lower_rollout(editor: Editor, lora_cfg: lora.LoraConfig, shape: StepShape, mesh: Mesh) -> jax.stages.Lowered:
    """The sampler on ``shape.rollout_batch`` samples, decoding included, traced for ``mesh`` as by ``lower_step``; a
    step runs it ``shape.samples / shape.rollout_batch`` times.

    Args:
        shape: ``rollout_batch`` must be a multiple of ``sharding.mesh.sample_shards(mesh)``.

    Raises:
        ValueError: a picture size that does not divide.
    """
    editor, grid, sigmas = prepared(editor, shape)
    params, rows = sharded_shapes(editor.abstract(), mesh), _Shapes(mesh, shape.rollout_batch)
    adapter = jax.eval_shape(lambda key: lora.init_adapter(key, params["transformer"], lora_cfg), jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape.rollout_batch))
    return make_sampler(editor, grid, sigmas, shape.solver, mesh).lower(  # pyright: ignore[reportFunctionMemberAccess]
        params,
        sharded_shapes(adapter, mesh),
        rows.conditioning(editor, grid, shape),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(mesh)),
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
