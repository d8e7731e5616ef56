"""One tiny model of each family, and its sampler and optimizer step compiled for any layout."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.models import lora
from cocoedit_jax.models.autoencoder import IdentityAutoencoder
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig
from cocoedit_jax.models.editor import Conditioning, Editor, Grid
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.kontext import KontextEditor
from cocoedit_jax.models.quantize import quantize_params
from cocoedit_jax.models.qwen import QwenConfig, QwenTransformer
from cocoedit_jax.models.qwen_edit import QwenEditor
from cocoedit_jax.models.text import PrecomputedText, TextStates
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.sharding.layouts import layout_mesh
from cocoedit_jax.sharding.mesh import batch_sharding, replicated
from cocoedit_jax.sharding.rules import adapter_shardings, parameter_shardings
from cocoedit_jax.train.rollout import make_sampler, sample_keys
from cocoedit_jax.train.step import StepBatch, StepScalars, init_state, make_optimizer, make_train_step
from tests.train.tiny import random_params

LORA = lora.LoraConfig(rank=2, alpha=4)
CFG = preset("cocoedit").replace(timestep_fraction=0.7, kl_weight=0.0)
SIZE, TEXT, MICRO, NUM_MICRO = 8, 4, 8, 2
VAE = AutoencoderKLConfig(
    block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=3, norm_num_groups=2,
)  # fmt: skip
OPTIMIZER = make_optimizer(1e-3, 1e-4, 1.0)


def editor(model: str, quantize: str = "") -> Editor:
    """Three layers of each kind, four heads; widths divide by 8. 16 tokens each of target and source, 4 of text."""
    text: Any = PrecomputedText.of({})
    options = {"remat": "full" if model == "flux" else "none"}
    if model == "flux":
        shape = FluxConfig(12, 3, 3, 8, 4, 8, 4, True, (2, 2, 4))
        return KontextEditor(
            FluxTransformer(shape, **options), IdentityAutoencoder(), text, guidance=2.5, quantize=quantize
        )
    vae = AutoencoderKL(VAE)  # one picture at a time
    return QwenEditor(QwenTransformer(QwenConfig(12, 3, 8, 4, 8, (2, 2, 4)), **options), vae, text, quantize=quantize)


def grid_of(model: Editor) -> Grid:
    return model.grid(SIZE * model.autoencoder.factor, SIZE * model.autoencoder.factor)


def batch(model: Editor, *leading: int) -> dict[str, Any]:
    """Random latents and conditioning; some texts end in padding."""
    rng = np.random.default_rng(0)
    grid, shape = grid_of(model), model.transformer.config
    normal = lambda *size: rng.standard_normal((*leading, *size)).astype(np.float32)  # noqa: E731
    pooled = normal(shape.pooled_features) if shape.pooled_features else None
    mask = rng.random((*leading, TEXT)) < 0.7 if isinstance(model, QwenEditor) else None
    if mask is not None:
        mask[..., 0] = True
    guidance = None if model.guidance is None else np.full(leading, model.guidance, np.float32)
    return {
        "x0": normal(grid.tokens, model.token_channels),
        "conditioning": Conditioning(
            normal(grid.tokens, model.token_channels),
            TextStates(normal(TEXT, shape.joint_attention_dim), pooled, mask),  # pyright: ignore[reportArgumentType]
            guidance,  # pyright: ignore[reportArgumentType]
        ),
    }


def step_batch(model: Editor) -> StepBatch:
    rng, lead = np.random.default_rng(1), (NUM_MICRO, MICRO)
    uniform = lambda *size: rng.random((*lead, *size)).astype(np.float32)  # noqa: E731
    return StepBatch(
        **batch(model, *lead),
        preserve_latent=(uniform(SIZE, SIZE) > 0.3).astype(np.float32),
        r=uniform(),
        token_weight=1 + uniform(SIZE**2 // 4),
        tau_pos=np.full(lead, 1e-3, np.float32),
        tau_neg=np.full(lead, 2.0, np.float32),
        valid=np.ones(lead, np.float32),
        sample=np.arange(NUM_MICRO * MICRO, dtype=np.int32).reshape(lead),
    )  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass
class Case:
    """A compiled program, the mesh it is for, what it was given and what it gave, on the host."""

    mesh: Any
    program: jax.stages.Compiled
    inputs: tuple
    results: Any


def _place(model: Editor, layout: str) -> tuple[Any, Any]:
    mesh = layout_mesh("fsdp", devices=jax.devices()[:1]) if layout == "one" else layout_mesh(layout)
    params = random_params(dataclasses.replace(model, quantize=""))
    params = params | {"transformer": quantize_params(params["transformer"], model.quantize)}
    return mesh, jax.device_put(params, parameter_shardings(model.abstract(), mesh))


def _run(mesh: Any, function: Any, *inputs: Any) -> Case:
    program = function.lower(*inputs).compile()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), inputs)
    return Case(mesh, program, shapes, jax.device_get(program(*inputs)))


@functools.cache
def step(name: str, layout: str, attention: str = "auto", sharded: bool = False, quantize: str = "") -> Case:
    """The optimizer step of model ``name`` on ``layout`` ("one": a single device)."""
    model = with_attention(editor(name, quantize), attention)
    mesh, params = _place(model, layout)
    grid = grid_of(model)
    function = make_train_step(model, grid, model.sigmas(3, grid), CFG, LORA, OPTIMIZER, mesh, sharded_adapters=sharded)
    state = init_state(jax.random.key(1), params["transformer"], CFG, LORA, OPTIMIZER)
    # Away from the zero start of B, which would hide the gradients of A.
    theta = jax.tree.map(lambda x: x + jnp.float32(0.05), state.theta)
    state = dataclasses.replace(state, theta=theta, old=jax.tree.map(lambda x: x * jnp.float32(0.9), theta))
    scalars = StepScalars(
        num_micro=jnp.asarray(NUM_MICRO, jnp.int32),
        count=jnp.asarray(NUM_MICRO * MICRO, jnp.float32),
        old_decay=jnp.asarray(0.25, jnp.float32),
        ema_decay=jnp.asarray(0.5, jnp.float32),
        key=jax.random.key(7),
    )
    return _run(
        mesh,
        function,
        jax.device_put(state, adapter_shardings(state, mesh, sharded=sharded)),
        params,
        jax.device_put(step_batch(model), batch_sharding(mesh, axis=1)),
        jax.device_put(scalars, replicated(mesh)),
    )


@functools.cache
def rollout(name: str, layout: str, attention: str = "auto", quantize: str = "") -> Case:
    """The sampler of model ``name`` on ``layout``, with an adapter."""
    model = with_attention(editor(name, quantize), attention)
    mesh, params = _place(model, layout)
    grid = grid_of(model)
    adapter = lora.fold_scale(lora.init_adapter(jax.random.key(2), params["transformer"], LORA), LORA)
    adapter = jax.tree.map(lambda x: x + jnp.float32(0.05), adapter)
    return _run(
        mesh,
        make_sampler(model, grid, model.sigmas(2, grid), "euler", mesh),
        params,
        jax.device_put(adapter, replicated(mesh)),
        jax.device_put(batch(model, MICRO)["conditioning"], batch_sharding(mesh)),
        jax.device_put(sample_keys(jax.random.key(3), np.arange(MICRO)), batch_sharding(mesh)),
    )


def with_attention(model: Editor, backend: str) -> Editor:
    return dataclasses.replace(model, transformer=model.transformer.clone(attention_backend=backend))
