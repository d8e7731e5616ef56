"""The stages on Ray Data: one operator per stage, shards stream through all of them at once, on one machine or many.

Rows are shard numbers; the annotations themselves stay in the shards of the output folder, which every machine must
see under the same path (NFS, Lustre, a mounted bucket with atomic renames). So a lost worker costs its shard's stage
and nothing else: Ray runs the task again on what is on disk.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation.engine import make_worker, settle_unanswered, stop_if_silent
from cocoedit_jax.annotation.segmenters import WITHOUT_GPU
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


def shares(settings: Settings, resources: Mapping[str, float]) -> tuple[float, float]:
    """CPUs of a worker and GPUs of a mask worker, in a cluster with `resources` ("CPU", "GPU") in all. The workers of
    all stages exist at once: what they reserve must be there, or Ray waits for it without end and without a word.

    Raises:
        UserError: no GPU for a segmenter that shall have one.
    """
    options = settings.engine.ray
    workers = options["workers"] * (len(STAGES) - 1) + options["mask_workers"]
    cpus = min(float(options["cpus"]), resources.get("CPU", 0.0) / (2 * workers))  # half is for Ray's own tasks
    gpus = 0.0 if settings.mask.segmenter in WITHOUT_GPU else float(options["mask_gpus"])
    needed, there = gpus * options["mask_workers"], resources.get("GPU", 0.0)
    if needed > there:
        raise UserError(
            f"--engine=ray: {options['mask_workers']} mask workers want {needed:g} GPUs, the cluster has {there:g}; set"
            " --config.engine.ray.mask_gpus (0: on CPUs; 0.5: two on one GPU) or mask_workers"
        )
    return cpus, gpus


def run_ray(root: Path, settings: Settings, convention: str, numbers: Sequence[int]) -> None:
    """As `engine.run_stages`, on the cluster that `RAY_ADDRESS` names, or on this machine.

    Raises:
        UserError: Ray is missing, GPUs are, too many requests without an answer, or what a worker raised.
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
    cpus, mask_gpus = shares(settings, ray.cluster_resources())
    rows = [{"shard": number, "tallies": "{}"} for number in numbers]
    flow = data.from_items(rows, override_num_blocks=len(rows))
    for stage in STAGES:
        mask = stage == "mask"
        flow = flow.map_batches(
            StageActor,
            fn_constructor_args=(str(root.resolve()), settings, convention, stage),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=int(options["mask_workers"] if mask else options["workers"])),
            num_cpus=cpus,
            num_gpus=(mask_gpus or None) if mask else None,
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
