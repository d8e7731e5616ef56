"""The training loop: rollout -> rewards -> advantage -> one optimizer step -> old policy (arXiv 2602.14068)."""

import dataclasses
import json
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cocoedit_jax.data.groups import groups_for_step, plan_samples
from cocoedit_jax.data.source import load_batch
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.models.editor import Grid
from cocoedit_jax.nft.policy import ema_decay, old_policy_decay
from cocoedit_jax.reporting.pictures import sample_grid
from cocoedit_jax.reporting.report import write_report
from cocoedit_jax.reporting.telemetry import PhaseTimer, Telemetry, progress, write_json
from cocoedit_jax.sharding.flops import flux_forward_flops, lora_gradient_flops, peak_flops
from cocoedit_jax.sharding.mesh import batch_sharding, replicated
from cocoedit_jax.train.checkpoint import Checkpoints
from cocoedit_jax.train.evaluate import Evaluation, Evaluator
from cocoedit_jax.train.optimality import judge_rollout, pack_step
from cocoedit_jax.train.rollout import RewardQueue, Rollout, collect, make_sampler
from cocoedit_jax.train.setup import Setup
from cocoedit_jax.train.step import StepScalars, TrainState, make_optimizer, make_train_step

GRID_ROWS = 8  # edits in a sample picture


class NonFiniteError(FloatingPointError):
    """A loss, reward or gradient is NaN or infinite; the message names it. The last good checkpoint is kept."""


@dataclass
class Programs:
    """The compiled functions for one image size."""

    grid: Grid
    sampler: Any
    train_step: Any


class Stop:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second signal acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once", flush=True)
        signal.signal(number, self._previous[number])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run. ``train()`` reads top-down; the state between two steps is ``state``, ``banned`` and nothing else."""

    def __init__(self, setup: Setup, run_dir: Path):
        self.setup, self.config, self.cfg, self.run_dir = setup, setup.config, setup.algorithm, run_dir
        self.optimizer = make_optimizer(
            self.config.train.learning_rate, self.config.train.weight_decay, self.config.train.max_grad_norm
        )
        self.checkpoints = Checkpoints(run_dir, self.config.checkpoint.keep)
        self.evaluator = Evaluator(setup)
        self.queue = RewardQueue(setup.judge, self.cfg)
        self.encode = jax.jit(setup.editor.encode)
        self.state = self._initial_state()
        self.banned: set[str] = set()
        self._programs: dict[int, Programs] = {}
        self.peak = peak_flops()

    def _initial_state(self) -> TrainState:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        theta = lora.init_adapter(key, self.setup.params["transformer"], self.setup.lora)
        copy = lambda: jax.tree.map(jnp.copy, theta)  # noqa: E731 - donated buffers must not be shared
        state = TrainState(
            theta=theta,
            old=copy(),
            ema=copy() if self.cfg.ema_decay > 0 else None,
            opt_state=self.optimizer.init(theta),
            step=jnp.zeros((), jnp.int32),
        )
        return jax.device_put(state, replicated(self.setup.mesh))

    def programs(self, bucket: int) -> Programs:
        """Sampler and optimizer step for the images of ``bucket``."""
        if bucket not in self._programs:
            setup, rollout = self.setup, self.config.rollout
            grid = setup.editor.grid(*setup.framing.sizes[bucket])
            sigmas = setup.editor.sigmas(rollout.steps, grid)
            self._programs[bucket] = Programs(
                grid,
                make_sampler(setup.editor, grid, sigmas, rollout.solver, setup.mesh),
                make_train_step(setup.editor, grid, sigmas, self.cfg, setup.lora, self.optimizer, setup.mesh),
            )
        return self._programs[bucket]

    def train_step(self, step: int, timer: PhaseTimer) -> tuple[dict[str, float], np.ndarray]:
        """Optimizer step ``step`` (from 1): metrics and a picture of some of its samples."""
        setup, cfg, config = self.setup, self.cfg, self.config
        step_key = jax.random.fold_in(jax.random.key(config.seed), step)
        rollout_key, train_key = jax.random.split(step_key)

        with timer("data"):
            banned = [i for i, r in enumerate(setup.train_records) if self._ban_key(r.id, r.prompt) in self.banned]
            buckets = [r.bucket for r in setup.train_records] if setup.framing.crop == "buckets" else None
            records = groups_for_step(
                config.seed, step - 1, config.rollout.groups, len(setup.train_records), banned, buckets
            )
            plan = plan_samples(records, config.rollout.group_size)
            batch = load_batch(setup.train, records)
            programs = self.programs(setup.train_records[int(records[0])].bucket)
        with timer("encode"):
            tokens = setup.editor.tokenize(batch["prompt"])
            conditioning = self.encode(setup.params, batch["image"], tokens)
        with timer("rollout"):
            old = lora.fold_scale(self.state.old, setup.lora)
            rollout = collect(
                programs.sampler, setup.params, old, conditioning, plan, batch, rollout_key, self.queue,
                config.rollout.batch_size,
            )  # fmt: skip
        self._check_rollout(step, rollout)
        with timer("advantage"):
            source = np.asarray(conditioning.source)
            factor = setup.editor.autoencoder.factor
            judged = judge_rollout(rollout, plan, batch, source, programs.grid, factor, cfg)
            self._check_rewards(step, judged.metrics)
            rng = np.random.default_rng((config.seed, step))
            host, num_micro, count = pack_step(
                setup.editor, rollout, judged, plan, batch, conditioning, cfg, config.train.micro_batch, rng
            )
        metrics = judged.metrics | {"seconds/waiting_for_rewards": rollout.seconds_waiting}
        if count:
            with timer("train"):
                step_batch = jax.device_put(host, batch_sharding(setup.mesh, axis=1))
                scalars = StepScalars(
                    num_micro=jnp.asarray(num_micro, jnp.int32),
                    count=jnp.asarray(count, jnp.float32),
                    old_decay=jnp.asarray(old_policy_decay(step, cfg.old_decay_type), jnp.float32),
                    ema_decay=jnp.asarray(ema_decay(step, cfg.ema_decay), jnp.float32),
                    key=train_key,
                )
                scalars = jax.device_put(scalars, NamedSharding(setup.mesh, PartitionSpec()))
                self.state, device_metrics, finite = programs.train_step(
                    self.state, setup.params, step_batch, scalars
                )
                metrics |= {f"train/{k}": float(v) for k, v in device_metrics.items()}
            self._check_finite(step, metrics, finite)
        else:  # nothing to learn from; the step still counts, so that the data position moves on
            self.state = dataclasses.replace(self.state, step=self.state.step + 1)
        self.banned |= set(judged.banned)
        metrics["groups/banned"] = float(len(self.banned))
        return metrics, self._picture(rollout, judged, plan, batch)

    def _ban_key(self, record_id: str, prompt: str) -> str:
        return record_id if self.cfg.group_key == "record" else prompt

    def _check_rewards(self, step: int, metrics: dict[str, float]) -> None:
        share = metrics["samples/unscored"] / metrics["samples/drawn"]
        if share > self.config.max_unscored:
            raise UserError(
                f"step {step}: {share:.0%} of the samples have no reward, more than config.max_unscored="
                f"{self.config.max_unscored:.0%}; resume the run when the judge {self.config.judge.name!r} works"
            )

    def _check_rollout(self, step: int, rollout: Rollout) -> None:
        bad = [f"rollout {name}" for name in ("x0", "images") if not np.isfinite(getattr(rollout, name)).all()]
        if bad:
            raise NonFiniteError(f"step {step}: not finite: {', '.join(bad)}; the last checkpoint is kept")

    def _check_finite(self, step: int, metrics: dict[str, float], finite: Any) -> None:
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        flags = jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
        bad += ["gradient of " + "/".join(str(k.key) for k in path) for path, flag in flags if not flag]
        if bad:
            raise NonFiniteError(f"step {step}: not finite: {', '.join(bad)}; the weights are those of step {step - 1}")

    def _picture(self, rollout: Any, judged: Any, plan: Any, batch: dict[str, Any]) -> np.ndarray:
        """Source, then the first group's edits side by side, for the first groups of the step."""
        size = self.config.rollout.group_size
        groups = range(min(4, len(plan) // size))
        source = batch["image"][plan.group[[g * size for g in groups]]]
        mask = batch["edit_mask"][plan.group[[g * size for g in groups]]]
        columns = [("source", source)]
        for k in range(min(6, size)):
            columns.append((f"edit {k + 1}", rollout.images[[g * size + k for g in groups]]))
        notes = [None, *([f"reward {judged.reward[g * size + k]:.2f}" for g in groups] for k in range(min(6, size)))]
        prompts = [batch["prompt"][plan.group[g * size]] for g in groups]
        return sample_grid(columns, masks=mask, instructions=prompts, notes=notes)

    def performance(self, seconds: dict[str, float], metrics: dict[str, float], bucket: int = 0) -> dict[str, float]:
        """Samples per second and MFU of the step just taken, by formula."""
        shape, grid = self.setup.editor.transformer.config, self.programs(bucket).grid
        tokens = 2 * grid.tokens + self.setup.editor.tokenizer.max_length
        drawn, used = int(metrics["samples/drawn"]), int(metrics["samples/used"])
        if self.cfg.invalid == "zero_weight":
            used = drawn
        timesteps = max(1, int(self.config.rollout.steps * self.cfg.timestep_fraction))
        rollout = self.config.rollout.steps * flux_forward_flops(shape, tokens, drawn)
        forwards = (self.cfg.old_decay_type != 0) + (self.cfg.kl_weight > 0)
        train = timesteps * (
            lora_gradient_flops(shape, tokens, used) + forwards * flux_forward_flops(shape, tokens, used)
        )
        peak = self.peak[0] * len(self.setup.mesh.devices.flat)
        out = {"samples_per_second": drawn / sum(seconds.values())}
        for name, work in (("rollout", rollout), ("train", train)):
            taken = seconds.get(f"seconds/{name}", 0.0)
            if taken:
                out[f"mfu/{name}"] = work / taken / peak
        return out

    # --- saving ------------------------------------------------------------------------------------------------------

    def trained_adapter(self) -> Any:
        """What a run gives: the averaged adapter if the preset keeps one, else the trained one."""
        return self.state.theta if self.state.ema is None else self.state.ema

    def save(self, metrics: dict[str, float]) -> None:
        """Checkpoint for resuming, and the LoRA in diffusers' and PEFT's layouts with its model card."""
        step = int(self.state.step)
        # The data position is a function of the step; it is written down for the reader.
        base = self.config.model.path or "quickstart base"
        info = {"step": str(step), "preset": self.config.preset, "base_model": base}
        info |= {f"reward_weight/{name}": f"{weight:g}" for name, weight in self.cfg.reward_weights.items()}
        info |= {k: f"{v:.4f}" for k, v in metrics.items() if k.startswith("reward/")}
        folder = self.run_dir / "lora" / f"step_{step:06d}"
        lora_files.save_lora(folder, self.trained_adapter(), self.setup.lora, info)
        # The checkpoint comes last: whatever is killed before it is on disk is done again.
        self.checkpoints.save(self.state, {"banned": sorted(self.banned), "step": step, "seed": self.config.seed})

    def resume(self) -> int:
        """Loads the newest checkpoint; returns its step."""
        self.state, saved = self.checkpoints.restore(self.state)
        self.state = jax.device_put(self.state, replicated(self.setup.mesh))
        self.banned = set(saved["banned"])
        return int(self.state.step)

    def evaluate(self, adapter: Any, scenes: int, desc: str) -> Evaluation:
        """Held-out evaluation with a progress bar; ``adapter`` without its scale, or None."""
        folded = None if adapter is None else lora.fold_scale(adapter, self.setup.lora)
        with progress(min(scenes, len(self.setup.held_out_records)), desc, "scene") as bar:
            return self.evaluator(folded, scenes, bar.update)

    def close(self) -> None:
        self.queue.close()
        self.checkpoints.wait()
        self.checkpoints.close()


def train(setup: Setup, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Runs ``setup.config.train.steps`` optimizer steps and writes the run folder.

    Returns:
        the contents of ``evaluation.json`` (empty when the run was stopped by a signal).

    Raises:
        UserError: the run folder holds another run, or the judge fails too often.
        NonFiniteError: NaN or infinity in a loss or gradient.
    """
    config = setup.config
    run_dir.mkdir(parents=True, exist_ok=True)
    _claim(run_dir, config, resume)
    trainer = Trainer(setup, run_dir)
    timer = PhaseTimer()
    try:
        with Telemetry(run_dir) as telemetry, Stop() as stop:
            start = trainer.resume() if resume and trainer.checkpoints.latest is not None else 0
            telemetry.truncate(start)
            if start == 0:
                trainer.save({})
            print(f"{run_dir}: preset {config.preset}, {len(setup.train_records)} records; MFU: {trainer.peak[1]}")
            base = trainer.evaluate(None, config.evaluation.scenes, "evaluate base")
            if stop.requested:
                print(f"stopped before the first step; continue with --resume --run={run_dir}")
                return {}
            bar = progress(config.train.steps, "train", "step", start)
            for step in range(start + 1, config.train.steps + 1):
                metrics, picture = trainer.train_step(step, timer)
                seconds = timer.pop()
                metrics |= seconds | trainer.performance(seconds, metrics)
                last = step == config.train.steps
                if step % config.evaluation.every == 0 or last or step == 1:
                    telemetry.image(step, "rollout", picture)
                if step % config.evaluation.every == 0 and not last:
                    metrics |= _small_evaluation(trainer, base)
                telemetry.log(step, metrics)
                if step % config.checkpoint.every == 0 or last or stop.requested:
                    with timer("checkpoint"):
                        trainer.save(metrics)
                bar.set_postfix(reward=f"{metrics.get('reward/total', np.nan):.3f}")
                bar.update(1)
                if stop.requested and not last:
                    print(f"stopped after step {step}; continue with --resume --run={run_dir}")
                    return {}
            bar.close()
            trained = trainer.evaluate(trainer.trained_adapter(), config.evaluation.scenes, "evaluate trained")
            telemetry.image(config.train.steps, "held_out", before_after(base, trained))
    finally:
        trainer.close()
        if (run_dir / "metrics.jsonl").is_file():
            write_report(run_dir)
    result = {
        "scenes": len(base.records),
        "step": config.train.steps,
        "base": base.summary(),
        "trained": trained.summary(),
        "difference": trained.difference(base),
    }
    write_json(run_dir / "evaluation.json", result)
    write_report(run_dir)
    return result


def _small_evaluation(trainer: Trainer, base: Evaluation) -> dict[str, float]:
    count = min(trainer.config.evaluation.every_scenes, len(base.records))
    now = trainer.evaluator(lora.fold_scale(trainer.trained_adapter(), trainer.setup.lora), count)
    return {f"held_out/{name}": value["mean"] for name, value in now.summary().items()}


def before_after(base: Evaluation, trained: Evaluation, rows: int = GRID_ROWS) -> np.ndarray:
    """Source, base and trained edits of the first held-out records, with judge score and PSNR under each."""
    count = min(rows, len(base.records))
    shape = base.images[0].shape
    chosen = [i for i in range(len(base.records)) if base.images[i].shape == shape][:count]
    columns = [
        ("source", np.stack([base.records[i]["image"] for i in chosen])),
        ("base", np.stack([base.images[i] for i in chosen])),
        ("trained", np.stack([trained.images[i] for i in chosen])),
    ]
    note = lambda e, i: f"judge {e.metrics['judge'][i]:.2f}, {e.metrics['psnr_outside'][i]:.1f} dB"  # noqa: E731
    notes = [None, [note(base, i) for i in chosen], [note(trained, i) for i in chosen]]
    masks = np.stack([base.records[i]["edit_mask"] for i in chosen])
    return sample_grid(columns, masks=masks, instructions=[base.records[i]["prompt"] for i in chosen], notes=notes)


# Settings that may differ between a run and its continuation: they change how long it runs and what is shown.
_MAY_CHANGE = ("train.steps", "checkpoint.", "evaluation.", "mesh.", "data.path", "model.remat", "model.attention")


def _claim(run_dir: Path, config: ConfigDict, resume: bool) -> None:
    """Writes config.json into a new run folder, or checks that a resumed run has the same configuration."""
    path = run_dir / "config.json"
    now = json.loads(config.to_json())
    if not resume:
        if path.exists():
            raise UserError(f"--run={run_dir}: holds a run already; add --resume, or name another folder")
        write_json(path, now)
        return
    if not path.exists():
        raise UserError(f"--run={run_dir}: no config.json, so nothing to resume; start without --resume")
    before, after = _flat(json.loads(path.read_text())), _flat(now)
    changed = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(f"--resume: {path} differs from this configuration:\n  " + "\n  ".join(changed))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
