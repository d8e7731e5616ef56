"""The stages on Ray Data: one operator per stage, shards stream through all of them at once, on one machine or many.

Rows are shard numbers; the annotations themselves stay in the shards of the output folder, which every machine must
see under the same path (NFS, Lustre, a mounted bucket with atomic renames). So a lost worker costs its shard's stage
and nothing else: Ray runs the task again on what is on disk.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation.engine import make_worker, settle_unanswered, stop_if_silent
from cocoedit_jax.annotation.settings import Settings
from cocoedit_jax.annotation.stages import STAGES
from cocoedit_jax.annotation.store import Store
from cocoedit_jax.annotation.work import Tally
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress


class StageActor:
    """One stage on shards, one shard a call; holds its client or segmenter."""

    def __init__(self, root: str, settings: Settings, convention: str, stage: str):
        self._stage = stage
        self._worker = make_worker(Store.open(Path(root)), settings, convention, [stage])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tallies = []
        for number, before in zip(batch["shard"], batch["tallies"], strict=True):
            told = json.loads(before)
            if "fault" not in told:
                try:
                    told[self._stage] = asdict(self._worker.run(int(number), self._stage))
                except UserError as error:  # as data: Ray would wrap it into a traceback and try again
                    told["fault"] = str(error)
            tallies.append(json.dumps(told))
        return {"shard": batch["shard"], "tallies": tallies}


def run_ray(root: Path, settings: Settings, convention: str, numbers: Sequence[int]) -> None:
    """As `engine.run_stages`, on the cluster that `RAY_ADDRESS` names, or on this machine.

    Raises:
        UserError: Ray is missing, too many requests without an answer, or what a worker raised.
    """
    try:
        ray = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    except ImportError as error:
        raise UserError(f"--engine=ray: {error}; install with: pip install 'cocoedit-jax[ray]'") from error
    if not numbers:
        return
    options, limit = settings.engine.ray, settings.models.max_unanswered
    if not ray.is_initialized():
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    rows = [{"shard": number, "tallies": "{}"} for number in numbers]
    flow = data.from_items(rows, override_num_blocks=len(rows))
    for stage in STAGES:
        mask = stage == "mask"
        flow = flow.map_batches(
            StageActor,
            fn_constructor_args=(str(root.resolve()), settings, convention, stage),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=int(options["mask_workers"] if mask else options["workers"])),
            num_cpus=options["cpus"],
            num_gpus=(options["mask_gpus"] or None) if mask else None,
        )
    tallies = {stage: Tally() for stage in STAGES}
    faults: list[str] = []
    with progress(len(rows), desc="     ray", unit="shard") as bar:
        for row in flow.iter_rows():
            told = json.loads(row["tallies"])
            faults += [told.pop("fault")] if "fault" in told else []
            for stage, tally in told.items():
                tallies[stage].add(Tally(**tally))
                stop_if_silent(stage, Tally(**tally), tallies[stage], len(rows) * settings.engine.shard_size, limit)
            bar.set_postfix_str(" ".join(f"{stage} {tally.done}" for stage, tally in tallies.items()))
            bar.update(1)
    if faults:
        raise UserError(f"{len(faults)} shards were not done; the first: {faults[0]}")
    settle_unanswered(Store.open(root), numbers, tallies, limit)
