"""Several presets and seeds from one base, evaluated on the same fresh scenes."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.data.records import read_records
from cocoedit_jax.data.source import record_dataset
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.reporting.comparison import comparison_report
from cocoedit_jax.reporting.telemetry import decode_number, progress, write_json
from cocoedit_jax.sharding import processes
from cocoedit_jax.train.evaluate import Evaluation, Evaluator, before_after, paste_source
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.run_folder import CONFIG, EVALUATION, differences
from cocoedit_jax.train.setup import Setup, build

# The baseline that needs no training for consistency, only the true mask at inference: it stands beside the table.
PASTE_BASELINE = "edit-r1"
# Settings that change what a run reports of itself, not its result.
_MAY_DIFFER = (
    "checkpoint.", "evaluation.every", "evaluation.scenes", "evaluation.batch_size", "mesh.", "rollout.layout",
    "train.layout", "train.adapters",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FreshScenes:
    """Scenes of their own seed, which no run trains on; their files lie in ``out``."""

    out: Path
    count: int
    seed: int

    @property
    def name(self) -> str:
        return f"fresh_{self.seed}_{self.count}"

    def into(self, setup: Setup) -> Setup:
        """``setup`` with these scenes as its held-out records."""
        config = setup.config
        folder = self.out / f"scenes_{self.seed}_{self.count}"
        framing = Framing(config.data.resolution, config.data.crop, divisor=16)
        if not folder.exists():
            write_scenes(folder, self.count, config.data.resolution, seed=self.seed)
        records = read_records(folder, framing).records
        seen = {json.dumps(record.extra.get("scene")) for record in (*setup.train_records, *setup.held_out_records)}
        if any(json.dumps(record.extra["scene"]) in seen for record in records):
            raise UserError(f"--scene_seed={self.seed}: scenes of {setup.config.preset}'s training data; name another")
        return dataclasses.replace(setup, held_out=record_dataset(records, framing), held_out_records=records)


def compare(
    config_path: Path,
    overrides: Mapping[str, Any],
    presets: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    scenes: int,
    scene_seed: int,
) -> dict[str, Any]:
    """Trains every preset with every seed under ``out/PRESET/seed_N`` and writes ``comparison.json``, ``table.md``,
    ``report.html`` and, for each preset, a picture.

    Runs that are finished are not repeated, evaluations neither.

    Raises:
        UserError: an unknown preset, a finished run in ``out`` of another configuration or base, or anything that
            ``build`` and ``train`` refuse.
    """
    if processes.count() > 1:
        raise UserError(f"{processes.count()} processes; a comparison runs in one, and launch.train in several")
    get_config = _load_get_config(config_path)
    configs = {(name, seed): _configure(get_config, name, seed, overrides) for name in presets for seed in seeds}
    fresh = FreshScenes(out, scenes, scene_seed)
    _refuse_other_runs(out, configs)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"scenes": scenes, "presets": {name: {"seeds": {}} for name in presets}}
    for (name, seed), config in configs.items():
        run_dir = out / name / f"seed_{seed}"
        measured = run_dir / f"{fresh.name}.json"
        if not measured.is_file():
            _train_and_measure(config, fresh, run_dir, measured)
        base, trained = _read(out / measured.name), _read(measured)
        result["base"] = base.summary()
        for row, evaluation in ((name, trained), (f"{name} + source pasted by mask", _read(measured, "pasted"))):
            if evaluation.metrics:
                seeds_of_row = result["presets"].setdefault(row, {"seeds": {}})["seeds"]
                seeds_of_row[str(seed)] = {"trained": evaluation.summary(), "difference": evaluation.difference(base)}
        write_json(out / "comparison.json", result)
    comparison_report(result, out / "report.html")
    return result


def _load_get_config(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("comparison_config", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--config={path}: no such configuration file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def _configure(get_config: Any, name: str, seed: int, overrides: Mapping[str, Any]) -> ConfigDict:
    config = get_config(name)
    config.update_from_flattened_dict({**overrides, "seed": seed})
    return config


def _refuse_other_runs(out: Path, configs: Mapping[tuple[str, int], ConfigDict]) -> None:
    """Numbers of different settings must not meet in one table."""
    problems = []
    for (name, seed), config in configs.items():
        path = out / name / f"seed_{seed}" / CONFIG
        if path.is_file():
            changed = differences(json.loads(path.read_text()), json.loads(config.to_json()), except_for=_MAY_DIFFER)
            problems += [f"{path.parent}: {line}" for line in changed]
    if problems:
        raise UserError(
            f"--out={out}: holds runs of another configuration; name another folder, or take the settings back:\n  "
            + "\n  ".join(problems)
        )


def _train_and_measure(config: ConfigDict, fresh: FreshScenes, run_dir: Path, measured: Path) -> None:
    """Trains (or resumes) one run and writes its metrics on every fresh scene to ``measured``, after the base's."""
    setup = build(config)
    preset = config.preset
    if not (run_dir / EVALUATION).is_file():
        train(setup, run_dir, resume=(run_dir / CONFIG).is_file())
        if not (run_dir / EVALUATION).is_file():
            raise UserError(f"{run_dir}: stopped before its end; run the same command again to continue")
    folder = run_dir / "lora" / f"step_{config.train.steps:06d}"
    adapter, _ = lora_files.load_lora(folder, transformer_params=setup.params["transformer"])
    setup = fresh.into(setup)
    base = _evaluate_base(setup, fresh.out / measured.name)
    trained = _evaluate(setup, adapter, f"fresh scenes, {preset} seed {config.seed}")
    metrics = {"trained": trained.to_json}
    if preset == PASTE_BASELINE:
        metrics["pasted"] = paste_source(trained, setup.judge).to_json
    Image.fromarray(before_after(base, trained)).save(fresh.out / f"{preset}_seed_{config.seed}.png")
    write_json(measured, metrics)


def _evaluate_base(setup: Setup, path: Path) -> Evaluation:
    """The base on the fresh scenes: its metrics from ``path`` if they are there, and the edits that pictures show."""
    if not path.is_file():
        base = _evaluate(setup, None, "fresh scenes, base")
        write_json(path, {"trained": base.to_json})
        return base
    base, again = _read(path), _evaluate(setup, None, "base, for the picture", limit=8)
    for name, values in again.metrics.items():
        if not np.allclose(values, base.metrics[name][: len(values)], rtol=1e-3, atol=1e-3, equal_nan=True):
            raise UserError(f"{path}: {name} of another base than this configuration's; name another --out folder")
    return dataclasses.replace(base, images=again.images, records=again.records)


def _evaluate(setup: Setup, adapter: Any, desc: str, limit: int | None = None) -> Evaluation:
    limit = len(setup.held_out_records) if limit is None else limit
    with progress(limit, desc, "scene") as bar:
        folded = None if adapter is None else lora.fold_scale(adapter, setup.lora)
        return Evaluator(setup)(folded, limit, bar.update)


def _read(path: Path, part: str = "trained") -> Evaluation:
    metrics = json.loads(path.read_text()).get(part, {})
    return Evaluation({k: np.asarray([decode_number(x) for x in v]) for k, v in metrics.items()}, [], [])
