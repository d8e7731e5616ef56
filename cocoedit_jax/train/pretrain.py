"""Supervised flow matching on procedural scenes: makes the quickstart's base editor."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon
from PIL import Image

from cocoedit_jax.data.scene_judge import judge_batch
from cocoedit_jax.data.scenes import SceneBatch, render_layers, sample_batch, scene_vocabulary
from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.packing import pack, token_share
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.flux import FluxConfig
from cocoedit_jax.models.quickstart import QuickstartConfig, build_editor, load_base, save_base
from cocoedit_jax.models.text import Instruction
from cocoedit_jax.reporting.telemetry import progress

Params = Any
_EVAL_SCENES = 64
_EVAL_STEPS = 8
_EVAL_SEED = 2**31 - 1


def spoil(rng: np.random.Generator, batch: SceneBatch, drift: ConfigDict) -> np.ndarray:
    """Targets ``[B, H, W, 3]`` with missing or partial edits, and a background that drifts: in contrast, in colour, and
    by a smooth field. Objects keep their colours, so a judge that looks at objects does not see the drift. Edits that
    take hold drift most, as a picture that is redrawn changes more than one that is left alone.
    """
    n, size = batch.target.shape[:2]
    layers = render_layers(batch.specs, size)
    kind = rng.random(n)
    amount = np.where(kind < drift.no_edit, 0.0, 1.0)
    partial = (kind >= drift.no_edit) & (kind < drift.no_edit + drift.partial)
    amount = np.where(partial, rng.uniform(0.2, 0.8, n), amount)[:, None, None, None]
    out = batch.source + amount * (batch.target - batch.source)
    before, after = layers.source_coverage[..., None], layers.target_coverage[..., None]
    background = 1 - (before + amount * (after - before))
    # A 3x3 grid of random colours, stretched over the image, is a field without fine detail.
    coarse = rng.normal(size=(n, 3, 3, 3))
    position = np.linspace(0, 2, size)
    weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(3)[None]))  # linear interpolation [size, 3]
    field = np.einsum("yi,xj,nijc->nyxc", weight, weight, coarse)
    gain = drift.gain * rng.normal(size=(n, 1, 1, 1))
    bias = drift.bias * rng.normal(size=(n, 1, 1, 3))
    strength = drift.at_rest + (1 - drift.at_rest) * amount
    shift = strength * (gain * (out - 0.5) + bias + drift.field * field)
    return np.clip(out + background * shift, 0, 1).astype(np.float32)


def _batches(config: ConfigDict, editor: Editor, first: int, last: int) -> Iterator[dict[str, np.ndarray]]:
    """Training batches of steps ``first`` to ``last``, each from its own random stream, drawn one step ahead."""

    def draw(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((config.seed, step))
        batch = sample_batch(rng, config.batch_size, config.image_size)
        target = batch.target if step < config.clean.steps else spoil(rng, batch, config.drift)
        return {
            "source": batch.source.astype(np.float32),
            "target": target.astype(np.float32),
            "mask": batch.edit_mask.astype(np.float32),
            "text": editor.text_inputs([Instruction(prompt) for prompt in batch.instructions]),
        }

    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(draw, step) for step in range(first, min(first + 2, last)))
        for step in range(first, last):
            if step + 2 < last:
                ahead.append(pool.submit(draw, step + 2))
            yield ahead.popleft().result()


def _optimizer(config: ConfigDict, phase: ConfigDict) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for the rest; warm-up, plateau and linear decay."""
    end = 0.05 * phase.learning_rate
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(end, phase.learning_rate, phase.warmup_steps),
            optax.constant_schedule(phase.learning_rate),
            optax.linear_schedule(phase.learning_rate, end, phase.decay_steps),
        ],
        [phase.warmup_steps, phase.steps - phase.decay_steps],
    )

    def is_matrix(path: tuple, leaf: Any) -> Any:
        stacked_kernel = path[-1].key == "kernel" and leaf.ndim == 3
        return MuonDimensionNumbers(reduction_axis=1, output_axis=2) if stacked_kernel else None

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,  # updates as large as AdamW's, so that one learning rate serves both
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
        ),
    )


def flow_matching_loss(editor: Editor, params: Params, batch: dict, key: jax.Array, mask_weight: float):
    """Mean squared velocity error, tokens weighted by ``1 + (mask_weight - 1) * share of the edit mask``.

    t follows a logit-normal distribution (arXiv 2403.03206).
    """
    grid = editor.grid(*batch["source"].shape[1:3])
    noise_key, time_key = jax.random.split(key)
    conditioning = editor.encode(params, batch["source"], batch["text"])
    x0 = pack(editor.autoencoder.encode(params["autoencoder"], batch["target"]), editor.patch)
    noise = jax.random.normal(noise_key, x0.shape)
    t = jax.nn.sigmoid(jax.random.normal(time_key, (x0.shape[0],)) + 0.4)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    velocity = editor.velocity(params, None, x_t, t, conditioning, grid)
    weight = 1 + (mask_weight - 1) * token_share(batch["mask"], editor.patch)
    error = jnp.mean(jnp.square(velocity - (noise - x0)), axis=-1)
    return jnp.sum(error * weight) / jnp.sum(weight)


def evaluate(editor: Editor, params: Params, size: int) -> tuple[dict[str, float], np.ndarray]:
    """Judge score, no-edit rate and PSNR outside the mask on fixed scenes, and a picture of some of them."""
    batch = sample_batch(np.random.default_rng(_EVAL_SEED), _EVAL_SCENES, size)
    grid = editor.grid(size, size)

    @jax.jit
    def edit(params: Params, source: jax.Array, text: Any, key: jax.Array) -> jax.Array:
        conditioning = editor.encode(params, source, text)
        z = jax.random.normal(key, (source.shape[0], grid.tokens, editor.token_channels))
        velocity = lambda z, t: editor.velocity(params, None, z, jnp.full((z.shape[0],), t), conditioning, grid)  # noqa: E731
        return editor.decode(params, sample(velocity, z, editor.sigmas(_EVAL_STEPS, grid), "euler"), grid)

    text = editor.text_inputs([Instruction(prompt) for prompt in batch.instructions])
    edited = np.asarray(edit(params, batch.source.astype(np.float32), text, jax.random.key(0)))
    score = judge_batch(batch.specs, edited)
    keep = (1 - batch.edit_mask)[..., None]
    mse = (np.square(edited - batch.source) * keep).sum((1, 2, 3)) / (3 * keep.sum((1, 2, 3)))
    rows = [np.concatenate(list(images[:16]), axis=1) for images in (batch.source, batch.target, edited)]
    rows += [np.concatenate(list(images[16:32]), axis=1) for images in (batch.source, batch.target, edited)]
    metrics = {
        "judge": float(score.score.mean()),
        "no_edit": float(score.no_edit.mean()),
        "psnr_outside": float(np.mean(-10 * np.log10(np.maximum(mse, 1e-8)))),
    }
    return metrics, np.concatenate(rows, axis=0)


def pretrain(config: ConfigDict, out: Path, start_from: Path | None = None) -> None:
    """Trains the base and writes it to ``out``, with a picture of held-out edits.

    Each phase starts from the averaged weights of the one before with a fresh optimizer, so ``start_from``, a folder
    with the base after phase 1 (kept in ``out/clean``), gives the same result as the whole run.
    """
    quickstart = QuickstartConfig(
        FluxConfig(**config.transformer), scene_vocabulary(), config.max_words, config.patch, config.image_size
    )
    editor = build_editor(quickstart, remat="dots")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error})") from error
    log = out / "pretraining.jsonl"
    log.unlink(missing_ok=True)

    def save(folder: Path, params: Params, step: int, loss: float) -> str:
        metrics, picture = evaluate(editor, params, config.image_size)
        save_base(folder, quickstart, params, {"steps": str(step), "config": config.to_json()})
        Image.fromarray(np.uint8(np.round(picture * 255))).save(folder / "samples.png")
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, **metrics}) + "\n")
        return f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items())

    if start_from is None:
        params = nn.unbox(jax.jit(editor.init)(jax.random.key(config.seed)))
        params = _train_phase(config, editor, params, config.clean, 0, save, out)
        save(out / "clean", params, config.clean.steps, float("nan"))
    else:
        params = load_base(start_from)[1]
    _train_phase(config, editor, params, config.drift, config.clean.steps, save, out)


def _train_phase(
    config: ConfigDict,
    editor: Editor,
    params: Params,
    phase: ConfigDict,
    first: int,
    save: Callable[[Path, Params, int, float], str],
    out: Path,
) -> Params:
    """Runs the steps after ``first``; returns the averaged weights, which are saved as they come."""
    optimizer = _optimizer(config, phase)
    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    @jax.jit
    def train_step(state: tuple, batch: dict, step: jax.Array) -> tuple[tuple, jax.Array]:
        params, ema, opt_state = state
        key = jax.random.fold_in(jax.random.key(config.seed), step + first)
        objective = lambda p: flow_matching_loss(editor, p, batch, key, config.mask_weight)  # noqa: E731
        loss, grads = jax.value_and_grad(objective)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
            updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        count = step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        return (params, ema, opt_state), loss

    losses: list[float] = []
    batches = _batches(config, editor, first, first + phase.steps)
    bar = progress(phase.steps, "pretrain", "step")
    for step, batch in enumerate(batches, start=1):
        state, loss = train_step(state, batch, jnp.asarray(step))
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"pretraining loss is {losses[-1]} at step {first + step}; last base: {out}")
        bar.update(1)
        if step % config.checkpoint_every == 0 or step == phase.steps:
            recent = float(np.mean(losses[-100:]))
            bar.set_postfix(loss=f"{recent:.4f}")
            bar.write(save(out, state[1], first + step, recent))
    bar.close()
    return state[1]
