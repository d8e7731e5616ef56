"""What makes a step of the quickstart cheaper, and what that does to the result.

    python -m benchmarks.cheaper --out=DIR [--rows=default,kl] [--steps=80] [--scenes=256] [--seed=0]

Each row trains the quickstart with some settings changed and evaluates it on the held-out scenes, as
``python -m launch.train --config=configs/quickstart.py --config.KEY=VALUE`` does. Seconds are processor time of the
whole process, over all its threads, so that another program on the machine does not count; means over the steps but
those that compile, because a fraction of the KL term is in some steps only. With ``--scenes=0`` nothing is evaluated. A
run that is stopped (Ctrl-C, SIGTERM) goes on when the same command is given again. ``DIR/table.md`` holds what is
finished.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.models import lora
from cocoedit_jax.reporting.telemetry import PhaseTimer, decode_number, progress, write_json
from cocoedit_jax.rewards.judge import JudgeRequest, JudgeScore, SceneJudge
from cocoedit_jax.train.evaluate import Evaluation, Evaluator
from cocoedit_jax.train.setup import Setup, build
from cocoedit_jax.train.stop import Stop, Stopped
from cocoedit_jax.train.trainer import Trainer
from configs.quickstart import get_config

FAULTY = {"judge.name": "benchmarks.cheaper:FaultyJudge", "max_unscored": 1.0}
# One row each: what is changed of configs/quickstart.py, which has one timestep, no KL term and no refilling.
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "kl": {"algorithm.kl_weight": 1e-4},
    "kl_quarter": {"algorithm.kl_weight": 1e-4, "algorithm.kl_fraction": 0.25},
    "strong_kl": {"algorithm.kl_weight": 0.1},
    "strong_kl_quarter": {"algorithm.kl_weight": 0.1, "algorithm.kl_fraction": 0.25},
    "old_is_trained": {"algorithm.old_decay_type": 0},
    "all_timesteps": {"algorithm.timestep_fraction": 1.0, "algorithm.train_at_pure_noise": True},
    "half_of_timesteps": {"algorithm.timestep_fraction": 0.5},
    "refill": {"rollout.refill": 1},
    "faulty": FAULTY,
    "faulty_refill": FAULTY | {"rollout.refill": 1},
    "faulty_refill_3": FAULTY | {"rollout.refill": 3},
}
LOST = 0.3  # share of the records that the faulty judge cannot score
KEPT = ("seconds/", "samples/", "groups/", "train/kl", "reward/total")


class FaultyJudge(SceneJudge):
    """The judge of scenes, which has no score for any edit of some records."""

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[JudgeScore]:
        lost = [int(hashlib.sha256(r.record_id.encode()).hexdigest()[:8], 16) < LOST * 16**8 for r in requests]
        return [
            JudgeScore(None, "lost") if gone else score
            for gone, score in zip(lost, super().__call__(requests), strict=True)
        ]


def measure(setup: Setup, adapter: Any, scenes: int, stop: Stop, desc: str) -> Evaluation:
    """On the first held-out scenes, with a judge that answers. Raises Stopped after a signal."""

    def done(count: int) -> None:
        bar.update(count)
        stop.check()

    with progress(scenes, desc, "scene") as bar:
        return Evaluator(dataclasses.replace(setup, judge=SceneJudge()))(adapter, scenes, done)


def take_steps(trainer: Trainer, folder: Path, steps: int, stop: Stop) -> None:
    """The steps that are left, each with its line in ``steps.jsonl``. Raises Stopped after a signal."""
    start = trainer.resume() if trainer.checkpoints.latest is not None else 0
    log = folder / "steps.jsonl"
    lines = log.read_text().splitlines()[:start] if start else []
    with progress(steps, folder.name, "step", start) as bar:
        for step in range(start + 1, steps + 1):
            cpu, wall = PhaseTimer(time.process_time), time.perf_counter()
            since = time.process_time()
            metrics, _ = trainer.train_step(step, cpu)
            row = {name: value for name, value in metrics.items() if name.startswith(KEPT)}
            row |= {"cpu": time.process_time() - since, "wall": time.perf_counter() - wall} | {
                name.replace("seconds/", "cpu/"): value for name, value in cpu.pop().items()
            }
            lines.append(json.dumps({"step": step, "compiles": step == start + 1} | row))
            if step % 10 == 0 or step == steps or stop.requested:
                log.write_text("\n".join(lines) + "\n")
                trainer.save(metrics)
            bar.update(1)
            stop.check()


def run_row(name: str, args: argparse.Namespace, stop: Stop) -> None:
    """Trains and evaluates one row, unless its result is there. Raises Stopped after a signal."""
    folder = args.out / name
    result, base_file = folder / "result.json", args.out / "base.json"
    if result.is_file():
        return
    config = get_config()
    config.update_from_flattened_dict({"seed": args.seed, "train.steps": args.steps} | ROWS[name])
    setup = build(config)
    folder.mkdir(parents=True, exist_ok=True)
    if args.scenes and not base_file.is_file():
        write_json(base_file, measure(setup, None, args.scenes, stop, "base").to_json)
    trainer = Trainer(setup, folder)
    try:
        take_steps(trainer, folder, args.steps, stop)
        if not args.scenes:
            return write_json(result, {})
        adapter = lora.fold_scale(trainer.trained_adapter(), setup.lora)
        trained = measure(setup, adapter, args.scenes, stop, f"{name}, trained")
    finally:
        trainer.close()
    values = {key: np.asarray([decode_number(x) for x in v]) for key, v in json.loads(base_file.read_text()).items()}
    write_json(result, {"trained": trained.summary(), "difference": trained.difference(Evaluation(values, [], []))})


def table(out: Path) -> str:
    """The finished rows as Markdown."""
    lines = [
        "| | CPU s per step | rollout | train | groups learned from | judge | PSNR outside (dB) |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in ROWS:
        folder = out / name
        if not (folder / "result.json").is_file():
            continue
        rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        steady = [row for row in rows if not row["compiles"]]
        mean = lambda key, steady=steady: float(np.mean([row.get(key, 0.0) for row in steady]))  # noqa: E731
        used = np.mean([row["samples/used"] for row in rows]) / get_config().rollout.group_size
        change = json.loads((folder / "result.json").read_text()).get("difference", {})
        digits = {"judge": 3, "psnr_outside": 2}
        cells = [
            f"{change[key]['mean']:+.{d}f} ± {change[key]['se']:.{d}f}" if change else "" for key, d in digits.items()
        ]
        seconds = [f"{mean(key):.2f}" for key in ("cpu", "cpu/rollout", "cpu/train")]
        lines.append(f"| {name} | {' | '.join([*seconds, f'{used:.2f}', *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and table")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of ROWS")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each row")
    parser.add_argument("--scenes", type=int, default=256, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.rows.split(",")) - ROWS.keys():
        parser.error(f"--rows: {sorted(unknown)}; expected some of {sorted(ROWS)}")
    try:
        with Stop() as stop:
            for name in args.rows.split(","):
                run_row(name, args, stop)
    except Stopped:
        print("stopped; the same command goes on")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table(args.out))
    print(table(args.out))


if __name__ == "__main__":
    main()
