"""The training loop: steps with evaluations, checkpoints and the log, until the last one or a signal."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.report import write_report
from cocoedit_jax.reporting.telemetry import PhaseTimer, Telemetry, progress, write_json
from cocoedit_jax.sharding import processes
from cocoedit_jax.train.evaluate import Evaluation, before_after
from cocoedit_jax.train.run_folder import EVALUATION, claim
from cocoedit_jax.train.setup import Setup
from cocoedit_jax.train.stop import Stop, Stopped
from cocoedit_jax.train.trainer import Trainer


def train(setup: Setup, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Runs ``setup.config.train.steps`` optimizer steps and writes the run folder.

    Returns:
        the contents of ``evaluation.json`` (empty when the run was stopped by a signal).

    Raises:
        UserError: the run folder holds another run, or the judge fails too often.
        NonFiniteError: NaN or infinity in a loss or gradient.
    """
    config = setup.config
    processes.from_first("claim", lambda: claim(run_dir, config, resume))
    trainer = Trainer(setup, run_dir)
    try:
        with Telemetry(run_dir, active=processes.is_first()) as telemetry, Stop() as stop:
            saved = processes.from_first("checkpoint", lambda: trainer.checkpoints.latest)
            start = trainer.resume() if resume and saved is not None else 0
            telemetry.truncate(start)
            if start == 0:
                trainer.save({})
            peak = trainer.performance.peak_source
            processes.say(f"{run_dir}: preset {config.preset}, {len(setup.train_records)} records; MFU: {peak}")
            try:
                base = trainer.evaluate(None, config.evaluation.scenes, "evaluate base", stop)
                _take_steps(trainer, start, base, telemetry, stop)
                adapter = trainer.trained_adapter()
                trained = trainer.evaluate(adapter, config.evaluation.scenes, "evaluate trained", stop)
            except processes.ProcessFailed:  # and what all of them hold together cannot be saved
                raise
            except UserError as error:  # of the judge, before a step has changed anything
                processes.gather("save after an error", lambda: None)  # all of them, or none can
                trainer.save_state()
                raise processes.Agreed(f"{error}\n{_continue(trainer)}") from error
            if telemetry.active:
                telemetry.image(config.train.steps, "held_out", before_after(base, trained))
        result = {
            "scenes": base.count,
            "step": config.train.steps,
            "base": base.summary(),
            "trained": trained.summary(),
            "difference": trained.difference(base),
        }
        if processes.is_first():
            write_json(run_dir / EVALUATION, result)
        return result
    except Stopped:
        processes.say(f"stopped; {_continue(trainer)}")
        return {}
    except BaseException as error:
        processes.publish(error)
        raise
    finally:
        trainer.close()
        if processes.is_first() and (run_dir / "metrics.jsonl").is_file():
            write_report(run_dir)


def _continue(trainer: Trainer) -> str:
    run = shlex.quote(str(trainer.run_dir))
    return f"step {trainer.checkpoints.latest} is saved, continue with --resume --run={run}"


def _take_steps(trainer: Trainer, start: int, base: Evaluation, telemetry: Telemetry, stop: Stop) -> None:
    """The optimizer steps after ``start``, each logged, some evaluated and saved. Raises Stopped after a signal."""
    config, timer = trainer.config, PhaseTimer()
    with progress(config.train.steps, "train", "step", start, process_index=processes.index()) as bar:
        for step in range(start + 1, config.train.steps + 1):
            metrics, drawn = trainer.train_step(step, timer)
            last = step == config.train.steps
            stop.agree()
            if telemetry.active and (step % config.evaluation.every == 0 or last or step == 1):
                telemetry.image(step, "rollout", trainer.picture(drawn))
            if step % config.evaluation.every == 0 and not last and not stop.requested:
                try:
                    with timer("evaluate"):
                        metrics |= trainer.small_evaluation(base)
                except UserError:  # the step itself is done
                    telemetry.log(step, metrics)
                    raise
            seconds = timer.pop()
            text_tokens = drawn.conditioning.text.states.shape[1]
            metrics |= seconds | trainer.performance(seconds, metrics, drawn.grid, text_tokens)
            telemetry.log(step, metrics)
            if step % config.checkpoint.every == 0 or last or stop.requested:
                with timer("checkpoint"):
                    trainer.save(metrics)
            bar.set_postfix(reward=f"{metrics.get('reward/total', np.nan):.3f}")
            bar.update(1)
            if stop.requested:
                raise Stopped
