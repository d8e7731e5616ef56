"""Several presets and seeds from one base, evaluated on the same fresh scenes."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.data.records import Record, read_records
from cocoedit_jax.data.source import record_dataset
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.reporting.comparison import comparison_report
from cocoedit_jax.reporting.telemetry import decode_number, progress, write_json
from cocoedit_jax.train.evaluate import Evaluation, Evaluator, paste_source
from cocoedit_jax.train.loop import before_after, train
from cocoedit_jax.train.setup import Setup, build

# The baseline that needs no training for consistency, only the true mask at inference: it stands beside the table.
PASTE_BASELINE = "edit-r1"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("comparison_config", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--config={path}: no such configuration file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fresh_scenes(out: Path, config: ConfigDict, scenes: int, seed: int) -> tuple[grain.MapDataset, tuple[Record, ...]]:
    folder = out / f"scenes_{seed}_{scenes}"
    framing = Framing(config.data.resolution, config.data.crop, divisor=16)
    if not folder.exists():
        write_scenes(folder, scenes, config.data.resolution, seed=seed)
    records = read_records(folder, framing).records
    return record_dataset(records, framing), records


def _evaluate(setup: Setup, adapter: Any, scenes: tuple[grain.MapDataset, tuple[Record, ...]], desc: str) -> Evaluation:
    setup.held_out, setup.held_out_records = scenes
    with progress(len(scenes[1]), desc, "scene") as bar:
        folded = None if adapter is None else lora.fold_scale(adapter, setup.lora)
        return Evaluator(setup)(folded, len(scenes[1]), bar.update)


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

    The fresh scenes have their own seed: no run trains or is chosen on them. Runs that are finished are not repeated.

    Raises:
        UserError: an unknown preset, or anything ``build`` and ``train`` refuse.
    """
    get_config = _load(config_path).get_config
    out.mkdir(parents=True, exist_ok=True)
    # Runs of one preset compile the same programs; the sampler is the same for all.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").resolve()))
    result: dict[str, Any] = {"scenes": scenes, "presets": {name: {"seeds": {}} for name in presets}}
    configs = {(name, seed): _configure(get_config, name, seed, overrides) for name in presets for seed in seeds}
    for (name, seed), config in configs.items():
        run_dir = out / name / f"seed_{seed}"
        measured = run_dir / f"fresh_{scene_seed}_{scenes}.json"
        if not measured.is_file():
            _train_and_measure(build(config), out, run_dir, measured, scenes, scene_seed)
        base, trained = _read(out / measured.name), _read(measured)
        result["base"] = base.summary()
        for row, evaluation in ((name, trained), (f"{name} + source pasted by mask", _read(measured, "pasted"))):
            if evaluation.metrics:
                seeds_of_row = result["presets"].setdefault(row, {"seeds": {}})["seeds"]
                seeds_of_row[str(seed)] = {"trained": evaluation.summary(), "difference": evaluation.difference(base)}
        write_json(out / "comparison.json", result)
    comparison_report(result, out / "report.html")
    return result


def _train_and_measure(setup: Setup, out: Path, run_dir: Path, measured: Path, scenes: int, scene_seed: int) -> None:
    """Trains (or resumes) one run; writes its metrics on every fresh scene to ``measured``, the base's to ``out``."""
    fresh = _fresh_scenes(out, setup.config, scenes, scene_seed)
    preset = setup.config.preset
    if not (run_dir / "evaluation.json").is_file():
        train(setup, run_dir, resume=(run_dir / "config.json").is_file())
        if not (run_dir / "evaluation.json").is_file():
            raise UserError(f"{run_dir}: stopped before its end; run the same command again to continue")
    adapter, _ = lora_files.load_lora(run_dir / "lora" / f"step_{setup.config.train.steps:06d}")
    base = _evaluate(setup, None, fresh, "fresh scenes, base")
    write_json(out / measured.name, {"trained": base.to_json})
    trained = _evaluate(setup, adapter, fresh, f"fresh scenes, {preset} seed {setup.config.seed}")
    metrics = {"trained": trained.to_json}
    if preset == PASTE_BASELINE:
        metrics["pasted"] = paste_source(trained, setup.judge).to_json
    picture = before_after(base, trained)
    Image.fromarray(picture).save(out / f"{preset}_seed_{setup.config.seed}.png")
    write_json(measured, metrics)


def _read(path: Path, part: str = "trained") -> Evaluation:
    metrics = json.loads(path.read_text()).get(part, {})
    return Evaluation({k: np.asarray([decode_number(x) for x in v]) for k, v in metrics.items()}, [], [])


def _configure(get_config: Any, name: str, seed: int, overrides: Mapping[str, Any]) -> ConfigDict:
    config = get_config(name)
    config.update_from_flattened_dict({**overrides, "seed": seed})
    return config

