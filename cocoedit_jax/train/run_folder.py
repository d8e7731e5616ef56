"""What a run folder says of its run: one configuration per folder, kept true when the run is continued."""

import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import dotted, write_json

CONFIG, EVALUATION = "config.json", "evaluation.json"
# Settings that may differ between a run and its continuation: they change how long it runs, where it and its judge run
# and what is shown. Data and base may move; that they are the same is checked by the fingerprints in the checkpoint.
_MAY_CHANGE = (
    "train.steps", "checkpoint.", "evaluation.", "mesh.", "rollout.layout", "train.layout",
    "train.adapters", "data.path", "model.path", "model.remat", "model.attention", "max_unscored",
    *(f"judge.vlm.{name}" for name in ("endpoints", "concurrency", "timeout_s", "step_deadline_s", "start_deadline_s",
                                       "cache_dir", "key_env", "key_file", "canary_every")),
)  # fmt: skip
# Settings that runs begun before they existed ran without, and what that meant.
_ADDED = {"model": {"quantize": ""}, "rollout": {"quantize": ""}, "train": {"quantize": ""}}


def check_claim(run_dir: Path, config: ConfigDict, resume: bool) -> None:
    """Whether ``config`` may run in ``run_dir``; nothing is written.

    Raises:
        UserError: the folder holds another run, or none to resume, or one that is longer already.
    """
    path = run_dir / CONFIG
    if resume:
        _check_continues(path, run_dir, json.loads(config.to_json()))
        steps = [int(folder.name) for folder in (run_dir / "checkpoints").glob("*") if folder.name.isdigit()]
        if steps and max(steps) > config.train.steps:
            raise UserError(
                f"--resume: {run_dir} has taken {max(steps)} steps; expected config.train.steps={config.train.steps} "
                "to be at least as many"
            )
    elif path.exists():
        raise UserError(f"--run={run_dir}: holds a run already; add --resume, or name another folder")


def claim(run_dir: Path, config: ConfigDict, resume: bool) -> None:
    """Writes config.json into a new run folder; of a resumed run, checks that it fits and writes it anew.

    A result of the run as it was before, shorter, is kept under another name.

    Raises:
        UserError: as ``check_claim``, or the folder cannot be written.
    """
    check_claim(run_dir, config, resume)
    if resume:
        _keep_earlier_result(run_dir, config.train.steps)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / CONFIG, json.loads(config.to_json()))
    except OSError as error:
        raise UserError(f"--run={run_dir}: cannot be written ({error})") from error


def check_seen(run_dir: Path, seconds: float = 10.0) -> None:
    """Whether this process sees the folder that process 0 has claimed; network disks may show it late.

    Raises:
        UserError: it does not; each process would save its part of a checkpoint on a disk of its own.
    """
    end = time.monotonic() + seconds
    while not (run_dir / CONFIG).is_file():
        if time.monotonic() > end:
            raise UserError(f"--run={run_dir.absolute()}: made by process 0; expected a disk that all processes see")
        time.sleep(0.2)


def _check_continues(path: Path, run_dir: Path, now: dict[str, Any]) -> None:
    if not path.exists():
        raise UserError(f"--run={run_dir}: no config.json, so nothing to resume; start without --resume")
    changed = differences(_completed(json.loads(path.read_text())), _completed(now), except_for=_MAY_CHANGE)
    if changed:
        raise UserError(f"--resume: {path} differs from this configuration:\n  " + "\n  ".join(changed))


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what ``_ADDED`` says of the sections it has."""
    return config | {name: added | config[name] for name, added in _ADDED.items() if name in config}


def _keep_earlier_result(run_dir: Path, steps: int) -> None:
    path = run_dir / EVALUATION
    if path.is_file():
        done = json.loads(path.read_text())["step"]
        if done != steps:
            path.replace(path.with_stem(f"{path.stem}_{done:06d}"))


def differences(before: dict[str, Any], after: dict[str, Any], except_for: tuple[str, ...] = ()) -> list[str]:
    """``key: old then, new now`` for every dotted key that differs, but for those that start as in ``except_for``."""
    then, now = dotted(before), dotted(after)
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(except_for)
    ]
