"""One run's state and its step: rollout -> rewards -> advantage -> optimizer step -> old policy (arXiv 2602.14068)."""

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cocoedit_jax.data.groups import SamplePlan, groups_for_step, plan_samples, refill_groups
from cocoedit_jax.data.records import fingerprint
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.models.editor import Editor, Grid
from cocoedit_jax.nft.policy import ema_decay, old_policy_decay
from cocoedit_jax.reporting.pictures import sample_grid
from cocoedit_jax.reporting.telemetry import PhaseTimer, progress
from cocoedit_jax.rewards.judge import judge_hook
from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.base import Base, weights_fingerprint
from cocoedit_jax.sharding.mesh import batch_sharding, replicated
from cocoedit_jax.sharding.rules import adapter_shardings
from cocoedit_jax.sharding.shares import Shares, divide, place
from cocoedit_jax.train.checkpoint import Checkpoints
from cocoedit_jax.train.evaluate import Evaluation, Evaluator
from cocoedit_jax.train.loading import load_shares
from cocoedit_jax.train.optimality import Drawn, judge_rollout, pack_step
from cocoedit_jax.train.performance import Performance
from cocoedit_jax.train.refill import refill
from cocoedit_jax.train.rollout import RewardQueue, Rollout, collect, make_encoder, make_sampler
from cocoedit_jax.train.setup import Setup
from cocoedit_jax.train.step import StepScalars, TrainState, init_state, make_optimizer, make_train_step
from cocoedit_jax.train.stop import Stop


class NonFiniteError(FloatingPointError):
    """A loss, reward or gradient is NaN or infinite; the message names it. The last good checkpoint is kept."""


@dataclass
class Programs:
    """The compiled functions for one image size."""

    grid: Grid
    sampler: Any
    train_step: Any


class Trainer:
    """One run. ``train()`` reads top-down; the state between two steps is ``state``, ``banned`` and nothing else."""

    def __init__(self, setup: Setup, run_dir: Path):
        self.setup, self.config, self.cfg, self.run_dir = setup, setup.config, setup.algorithm, run_dir
        self.optimizer = make_optimizer(
            self.config.train.learning_rate, self.config.train.weight_decay, self.config.train.max_grad_norm
        )
        self.checkpoints = Checkpoints(run_dir, self.config.checkpoint.keep)
        self.evaluator = Evaluator(setup)
        samples = self.config.rollout.groups * self.config.rollout.group_size
        self.queue = RewardQueue(setup.judge, self.cfg, samples // self.config.rollout.batch_size)
        self.encode = make_encoder(setup.editor, setup.rollout_mesh)
        self.sharded = self.config.train.get("adapters", "replicated") == "sharded"
        self.state = self._initial_state()
        self.banned: set[str] = set()
        self.prints = {"data": fingerprint(setup.train_records), "base": weights_fingerprint(setup.params)}
        self._programs: dict[int, Programs] = {}
        self.performance = Performance(setup)
        self.metrics: dict[str, float] = {}  # of the last step

    def _initial_state(self) -> TrainState:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        return self._placed(
            init_state(key, self.setup.params["transformer"], self.cfg, self.setup.lora, self.optimizer)
        )

    def _placed(self, state: TrainState) -> TrainState:
        return place(state, adapter_shardings(state, self.setup.mesh, sharded=self.sharded))

    def _base_on(self, base: Base, editor: Editor, mesh: Mesh, timer: PhaseTimer) -> Any:
        """The parameters of ``base`` on ``mesh``, for ``editor``; a move is a phase of its own."""
        with timer("reshard") if base.mesh != mesh else nullcontext():
            return base.on(mesh, editor.quantize)

    def programs(self, bucket: int) -> Programs:
        """Sampler and optimizer step for the images of ``bucket``."""
        if bucket not in self._programs:
            setup, rollout = self.setup, self.config.rollout
            grid = setup.editor.grid(*setup.framing.sizes[bucket])
            sigmas = setup.editor.sigmas(rollout.steps, grid)
            self._programs[bucket] = Programs(
                grid,
                make_sampler(setup.rollout_editor, grid, sigmas, rollout.solver, setup.rollout_mesh),
                make_train_step(
                    setup.editor,
                    grid,
                    sigmas,
                    self.cfg,
                    setup.lora,
                    self.optimizer,
                    setup.mesh,
                    sharded_adapters=self.sharded,
                ),  # fmt: skip
            )
        return self._programs[bucket]

    def train_step(self, step: int, timer: PhaseTimer) -> tuple[dict[str, float], Drawn]:
        """Optimizer step ``step`` (from 1): its metrics and the samples it learned from.

        Raises:
            UserError: the judge cannot be used, or scored too few samples; the state is that of the step before.
        """
        step_key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        rollout_key, train_key = jax.random.split(step_key)
        with timer("data"):
            records = self._records(step)
            plan = plan_samples(records, self.config.rollout.group_size)
            programs = self.programs(self.setup.train_records[int(records[0])].bucket)
        sample = partial(self._sample, step, programs, rollout_key, timer)
        drawn = sample(plan)
        if rounds := self.config.rollout.refill:
            drawn = refill(drawn, rounds, partial(self._further, step), sample, self.config.max_unscored)
        judged = drawn.judged
        judged.metrics |= {f"judge/{name}": value for name, value in drawn.rollout.judge_counters.items()}
        self._check_rewards(step, judged.metrics)
        metrics = judged.metrics | {"seconds/waiting_for_rewards": drawn.rollout.seconds_waiting}
        metrics |= self._update(step, drawn, programs, train_key, timer)
        self.banned |= set(judged.banned)
        metrics["groups/banned"] = float(len(self.banned))
        self.metrics = metrics
        return metrics, drawn

    def _sample(
        self, step: int, programs: Programs, key: jax.Array, timer: PhaseTimer, plan: SamplePlan,
        rows: np.ndarray | None = None, before: Drawn | None = None,
    ) -> Drawn:  # fmt: skip
        """Samples and scores ``plan``; with ``rows`` only those, the others are as ``before``."""
        setup = self.setup
        with timer("data"):
            shares = divide(plan.group, self.config.rollout.batch_size, setup.rollout_mesh, rows=rows)
            batch, loaded, text = self._load(step, plan, shares, before)
        params = self._base_on(setup.rollout_base, setup.rollout_editor, setup.rollout_mesh, timer)
        with timer("encode"):  # all records, though ``before`` has some: another number would be another program
            conditioning = self.encode(params, shares, loaded["image"], text)
        with timer("rollout"):
            old = jax.device_put(lora.fold_scale(self.state.old, setup.lora), replicated(setup.rollout_mesh))
            drawn_now = plan if rows is None else plan.take(rows)
            rollout = collect(
                programs.sampler, params, old, conditioning, drawn_now, batch, key, self.queue, shares
            )  # fmt: skip
        self._check_rollout(step, rollout)
        with timer("advantage"):
            if before is not None and rows is not None:
                rollout = before.rollout.with_rows(rows, rollout, self.queue.merged_counters)
            source, factor = np.asarray(conditioning.source), setup.editor.autoencoder.factor
            judged = judge_rollout(rollout, plan, batch, source, programs.grid, factor, self.cfg)
        return Drawn(programs.grid, plan, batch, conditioning, rollout, judged)

    def _load(
        self, step: int, plan: SamplePlan, shares: Shares, before: Drawn | None
    ) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """The records of ``plan``, of which each process reads its own: ``batch`` as ``collect`` takes it, the loaded
        ones, and their text inputs. Pictures that ``before`` has of the same records stay."""

        def check_judge() -> None:
            if before is None:
                judge_hook(self.setup.judge, "check")(step)
                self.queue.pop_counters()  # those of evaluations and checks are none of the step's

        records = plan.records
        batch, loaded, text = load_shares(
            self.setup.editor, self.setup.train, self.setup.train_records, records, shares, check_judge
        )
        images: dict[Any, np.ndarray] = {}
        if before is not None:
            same = np.flatnonzero(before.plan.records == records)
            images = {g: before.batch["image"][g] for g in same}
        images |= dict(zip(shares.groups.tolist(), loaded["image"], strict=True))
        batch |= {"image": [images.get(g) for g in range(len(records))], "edit_mask": shares.whole(loaded["edit_mask"])}
        return batch, loaded, text

    def _records(self, step: int) -> np.ndarray:
        """Indices of the training records of ``step``, one per group; all of one image size."""
        return groups_for_step(
            self.config.seed, step - 1, self.config.rollout.groups, len(self.setup.train_records),
            *self._banned_and_buckets(self.banned),
        )  # fmt: skip

    def _further(self, step: int, number: int, count: int, taken: np.ndarray, banned: list[str]) -> np.ndarray:
        """Indices of at most ``count`` records for round ``number`` of refilling ``step``; see ``train.refill``."""
        return refill_groups(
            self.config.seed, step - 1, number, count, len(self.setup.train_records), taken,
            *self._banned_and_buckets(self.banned.union(banned)),
        )  # fmt: skip

    def _banned_and_buckets(self, banned: set[str]) -> tuple[list[int], list[int] | None]:
        """Indices of the training records that ``banned`` names, and the bucket of every record if a step has one."""
        records = self.setup.train_records
        indices = [i for i, r in enumerate(records) if self._ban_key(r.id, r.prompt) in banned]
        return indices, [r.bucket for r in records] if self.setup.framing.crop == "buckets" else None

    def _update(
        self, step: int, drawn: Drawn, programs: Programs, key: jax.Array, timer: PhaseTimer
    ) -> dict[str, float]:
        """The optimizer step and the old policy's: from optimality to new adapters."""
        with timer("advantage"):
            rng = np.random.default_rng((self.config.seed, step))
            host, num_micro, count = pack_step(
                self.setup.editor, drawn.rollout, drawn.judged, drawn.plan, drawn.batch, drawn.conditioning, self.cfg,
                self.config.train.micro_batch, rng,
            )  # fmt: skip
        if not count:  # nothing to learn from; the step still counts, so that the data position moves on
            self.state = dataclasses.replace(self.state, step=self.state.step + 1)
            return {}
        params = self._base_on(self.setup.base, self.setup.editor, self.setup.mesh, timer)
        with timer("train"):
            batch = place(host, batch_sharding(self.setup.mesh, axis=1))
            scalars = StepScalars(
                num_micro=jnp.asarray(num_micro, jnp.int32),
                count=jnp.asarray(count, jnp.float32),
                old_decay=jnp.asarray(old_policy_decay(step, self.cfg.old_decay_type), jnp.float32),
                ema_decay=jnp.asarray(ema_decay(step, self.cfg.ema_decay), jnp.float32),
                key=key,
            )
            scalars = place(scalars, replicated(self.setup.mesh))
            self.state, device_metrics, finite = programs.train_step(self.state, params, batch, scalars)
            metrics = {f"train/{k}": float(v) for k, v in device_metrics.items()}
        self._check_finite(step, metrics, finite)
        return metrics

    def _ban_key(self, record_id: str, prompt: str) -> str:
        return record_id if self.cfg.group_key == "record" else prompt

    def _check_rewards(self, step: int, metrics: dict[str, float]) -> None:
        prefix = "judge/invalid/"
        why = [f"{k.removeprefix(prefix)} x {v:g}" for k, v in metrics.items() if k.startswith(prefix)]
        self._check_share(f"step {step}", metrics["samples/unscored"] / metrics["samples/drawn"], why)

    def _check_share(self, where: str, unscored: float, why: list[str]) -> None:
        if unscored > self.config.max_unscored:
            reasons = f" ({', '.join(why)})" if why else ""
            raise UserError(
                f"{where}: {unscored:.0%} of the samples have no reward{reasons}, more than config.max_unscored="
                f"{self.config.max_unscored:.0%}; resume the run when the judge {self.config.judge.name!r} works"
            )

    def _check_rollout(self, step: int, rollout: Rollout) -> None:
        bad = [f"rollout {name}" for name in ("x0", "images") if not np.isfinite(getattr(rollout, name)).all()]
        # A score that could not be made is marked invalid; one that is said to be valid must be a number.
        bad += [f"reward {n}" for n, v in rollout.rewards.items() if not np.isfinite(v[rollout.reward_valid[n]]).all()]
        if bad:
            raise NonFiniteError(f"step {step}: not finite: {', '.join(bad)}; the last checkpoint is kept")

    def _check_finite(self, step: int, metrics: dict[str, float], finite: Any) -> None:
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        flags = jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
        bad += ["gradient of " + "/".join(str(k.key) for k in path) for path, flag in flags if not flag]
        if bad:
            raise NonFiniteError(f"step {step}: not finite: {', '.join(bad)}; the weights are those of step {step - 1}")

    def picture(self, drawn: Drawn) -> np.ndarray:
        """Source, then the first edits of a group side by side, for the first groups that are whole in this process."""
        size, batch, own = self.config.rollout.group_size, drawn.batch, drawn.rollout.own
        first = [i for i in range(0, len(drawn.plan), size) if np.isin(np.arange(i, i + size), own).all()][:4]
        if not first:  # several processes share every group: what there is of the first
            first, size = [int(own[0])], int((drawn.plan.group[own] == drawn.plan.group[own[0]]).sum())
        group, shown = drawn.plan.group[first], range(min(6, size))
        at = np.searchsorted(own, first)  # in the images
        columns = [("source", np.stack([batch["image"][g] for g in group]))]
        columns += [(f"edit {k + 1}", drawn.rollout.images[at + k]) for k in shown]
        notes = [None, *([f"reward {reward:.2f}" for reward in drawn.judged.reward[own[at + k]]] for k in shown)]
        prompts = [batch["prompt"][g] for g in group]
        return sample_grid(columns, masks=batch["edit_mask"][group], instructions=prompts, notes=notes)

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
        adapter = jax.device_put(self.trained_adapter(), replicated(self.setup.mesh))
        if processes.is_first():
            lora_files.save_lora(folder, jax.device_get(adapter), self.setup.lora, info)
        # The checkpoint comes last: whatever is killed before it is on disk is done again.
        progress = {"banned": sorted(self.banned), "step": step, "seed": self.config.seed}
        self.checkpoints.save(self.state, progress | self.prints)

    def resume(self) -> int:
        """Loads the newest checkpoint; returns its step.

        Raises:
            UserError: it was trained on other records, or on another base.
        """
        self.state, saved = self.checkpoints.restore(self.state)
        config = self.config
        for name, what, field, value in (
            ("data", f"the records of {config.data.path}", "config.data.path", "data"),
            ("base", f"the base weights of {config.model.path or 'the quickstart'}", "config.model.path", "weights"),
        ):
            now = self.prints[name]
            then = saved.get(name, now)  # older checkpoints say nothing of the base
            if now != then:
                raise UserError(
                    f"--resume: {what} are not those that {self.run_dir} was trained on (fingerprint {now}, {then} "
                    f"then); point {field} at the same {value}"
                )
        self.state = self._placed(self.state)
        self.banned = set(saved["banned"])
        return int(self.state.step)

    def save_state(self) -> None:
        """Saves the state as it is, unless it is saved already."""
        if self.checkpoints.latest != int(self.state.step):
            self.save(self.metrics)

    def evaluate(self, adapter: Any, scenes: int, desc: str, stop: Stop) -> Evaluation:
        """Held-out evaluation with a progress bar; ``adapter`` without its scale, or None. Raises UserError if the
        judge scored too few.
        """
        folded = None if adapter is None else lora.fold_scale(adapter, self.setup.lora)
        total = min(scenes, len(self.setup.held_out_records))
        with progress(total, desc, "scene", process_index=processes.index()) as bar:

            def done(count: int) -> None:
                bar.update(count)
                stop.check()

            found = self.evaluator(folded, scenes, done)
        self._check_share(desc, float(np.isnan(found.metrics["judge"]).mean()), [])
        return found

    def small_evaluation(self, base: Evaluation) -> dict[str, float]:
        """Metrics of the first held-out records, for the log. Raises UserError as ``evaluate``."""
        count = min(self.config.evaluation.every_scenes, base.count)
        now = self.evaluator(lora.fold_scale(self.trained_adapter(), self.setup.lora), count)
        self._check_share("evaluate", float(np.isnan(now.metrics["judge"]).mean()), [])
        return {f"held_out/{name}": value["mean"] for name, value in now.summary().items()}

    def close(self) -> None:
        judge_hook(self.setup.judge, "close")()  # first, or the queue would wait for its calls
        self.queue.close()
        self.checkpoints.wait()
        self.checkpoints.close()
