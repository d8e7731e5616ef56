"""The report of a run, one HTML file: what training changed, curves, pictures, throughput, how to use the result."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.reporting import html
from cocoedit_jax.reporting.comparison import comparison_report
from cocoedit_jax.reporting.measures import EXPLANATION, MEASURES, difference_cell, number, value_of
from cocoedit_jax.reporting.pictures import curves, series
from cocoedit_jax.reporting.telemetry import dotted, read_metrics

__all__ = ["comparison_report", "write_report"]

# Part of another phase; counting it would count the time twice.
_INNER = ("seconds/waiting_for_rewards",)
_CAPTIONS = {
    "held_out": "Held-out records: source with the edit region, the base model's edit, the trained model's edit.",
    "rollout": "Edits that one training step sampled and scored, a row per instruction.",
}


def write_report(run_dir: str | Path) -> Path:
    """Writes RUN/report.html from what the run folder holds and returns its path.

    A part that is missing, as after an interruption, is named in the report.
    """
    run = Path(run_dir)
    config, evaluation = _read_json(run / "config.json"), _read_json(run / "evaluation.json")
    metrics = read_metrics(run)
    preset = str((config or {}).get("preset", "unknown preset"))
    parts = [html.heading(f"Run {run.resolve().name}", 1), html.paragraph(_status(preset, config, metrics), "soft")]
    parts += _evaluation(evaluation) + _curves(metrics) + _judge(metrics)
    parts += _pictures(run / "samples") + _throughput(metrics)
    parts += _how_to(run, preset, config) + _configuration(config)
    path = run / "report.html"
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(html.page(f"{run.resolve().name}: {preset}", parts), encoding="utf-8")
    return path


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or cut off by an interruption
        return None
    return content if isinstance(content, dict) else None


def _missing(what: str) -> str:
    return html.paragraph(f"Missing: {what}", "missing")


def _get(config: Mapping[str, Any] | None, key: str, default: Any = None) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def _status(preset: str, config: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, float]]) -> str:
    done, wanted = int(metrics[-1]["step"]) if metrics else 0, _get(config, "train.steps")
    steps = f"{done} of {wanted} steps" if wanted else f"{done} steps"
    if wanted and done < wanted:
        steps += " (not finished)"
    return f"Preset {preset}, {steps}, seed {_get(config, 'seed', 'unknown')}."


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    parts = [html.heading("What training changed")]
    if evaluation is None or "base" not in evaluation or "trained" not in evaluation:
        return [*parts, _missing("evaluation.json, which a run writes at its end.")]
    base, trained, difference = evaluation["base"], evaluation["trained"], evaluation.get("difference")
    rows = []
    for measure in MEASURES:
        change, error = value_of(difference, measure.name), value_of(difference, measure.name, "se")
        row = [number(value_of(part, measure.name), measure) for part in (base, trained)]
        rows.append([measure.title, *row, difference_cell(change, error, measure)])
    caption = (
        f"{evaluation.get('scenes', '?')} held-out records, step {evaluation.get('step', '?')}. "
        "Differences are paired: same record, same noise; ± is the standard error over records. "
        "Colour: beyond two standard errors. "
    )
    parts.append(html.table(["", "Base", "Trained", "Difference"], rows, caption + EXPLANATION))
    return parts


def _curves(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    light, dark = curves(metrics), curves(metrics, theme="dark")
    if light is None:
        return [html.heading("Curves"), _missing("metrics.jsonl, which a run writes after every step.")]
    caption = "Thick: running mean. Points: small held-out evaluations."
    return [html.heading("Curves"), html.figure(light, "Training curves", caption, dark, scroll=True)]


def _judge(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """What became of the samples that a judge with counters was given; nothing for a judge without."""
    names = sorted({name for row in metrics for name in row if name.startswith("judge/")})
    total = lambda name: float(series(metrics, name)[1].sum())  # noqa: E731
    drawn = total("samples/drawn")
    if not names or not drawn:
        return []
    titles = {"judge/scored": "scored", "judge/from_cache": "scored before, from the cache"}
    titles |= {n: f"invalid: {n.removeprefix('judge/invalid/')}" for n in names if n.startswith("judge/invalid/")}
    rows = [[title, f"{total(n):.0f}", f"{100 * total(n) / drawn:.2f} %"] for n, title in titles.items() if n in names]
    rows.append(["all samples", f"{drawn:.0f}", ""])
    repeats = [(n.removeprefix("judge/retry/"), total(n)) for n in names if n.startswith("judge/retry/")]
    said = ", ".join(f"{cause} {count:.0f}" for cause, count in repeats) or "none"
    caption = f"Over all steps. An invalid sample is left out of its group. Requests that were repeated: {said}."
    return [html.heading("Judge"), html.table(["Samples", "Number", "Share"], rows, caption)]


def _pictures(folder: Path) -> list[str]:
    steps: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"(.+)_(\d{6,})\.png", path.name)
        if match:
            steps.setdefault(match[1], []).append((int(match[2]), path))
    parts = [html.heading("Pictures")]
    if not steps:
        return [*parts, _missing("pictures in samples/.")]
    order = {tag: place for place, tag in enumerate(_CAPTIONS)}
    for tag in sorted(steps, key=lambda tag: (order.get(tag, len(order)), tag)):
        shown = sorted(steps[tag])
        for step, path in [shown[0], shown[-1]] if len(shown) > 1 else shown:
            caption = f"Step {step}. {_CAPTIONS.get(tag, tag)}"
            parts.append(html.figure(path.read_bytes(), f"{tag}, step {step}", caption))
    if "held_out" not in steps:
        parts.append(_missing("the held-out pictures, which a run writes at its end."))
    return parts


def _throughput(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    parts = [html.heading("Throughput")]
    names = list(dict.fromkeys(name for row in metrics for name in row if name.startswith("seconds/")))
    if not names:
        return [*parts, _missing("phase times in metrics.jsonl.")]
    settled = metrics[1:] or metrics  # the first step compiles
    mean = {name: float(np.sum(series(settled, name)[1])) / len(settled) for name in names}
    total = sum(value for name, value in mean.items() if name not in _INNER)
    rows = []
    for name in sorted(names, key=lambda name: -mean[name]):
        label = name.removeprefix("seconds/").replace("_", " ")
        share = "within the above" if name in _INNER else f"{100 * mean[name] / total:.1f} %" if total else "–"
        rows.append([label, f"{mean[name]:.3f}", share])
    rows.append(["all phases", f"{total:.3f}", ""])
    first = sum(value for name, value in metrics[0].items() if name in names and name not in _INNER)
    caption = f"Mean over the {len(settled)} steps after the first, which took {first:.1f} s with compilation."
    if len(metrics) == 1:
        caption = "One step only, with compilation."
    parts.append(html.table(["Phase", "Seconds per step", "Share"], rows, caption))
    facts = []
    for prefix, words, style in (("samples_per_second", "samples per second", "{:.2f}"), ("mfu", "MFU", "{:.1%}"),
                                 ("memory", "memory (GiB)", "{:.2f}")):  # fmt: skip
        for name in dict.fromkeys(name for row in metrics for name in row):
            values = series(settled, name)[1]
            if (name == prefix or name.startswith(f"{prefix}/")) and len(values):
                phase = name.removeprefix(prefix).strip("/").replace("_", " ")
                facts.append([f"{words} {phase}".strip(), style.format(float(np.median(values)))])
    if facts:
        parts.append(html.table(["Median over steps", ""], facts, "MFU: work by formula over the device's peak."))
    return parts


def _how_to(run: Path, preset: str, config: Mapping[str, Any] | None) -> list[str]:
    parts = [html.heading("Use the result")]
    saved = sorted((run / "lora").glob("step_*"))
    if not saved:
        parts.append(_missing("LoRA files in lora/, written at every checkpoint."))
    else:
        folder = f"{run.as_posix()}/lora/{saved[-1].name}"
        base = _get(config, "model.path") or "the base model's folder"
        parts.append(html.paragraph(f"The newest LoRA is lora/{saved[-1].name}; its folder peft/ holds PEFT's layout."))
        python = ["from cocoedit_jax.models.lora_files import load_lora", f'adapter, config = load_lora("{folder}")']
        parts.append(html.code("\n".join(python)))
        if _get(config, "model.kind") != "quickstart":
            parts.append(html.paragraph("In diffusers:"))
            parts.append(
                html.code(
                    "from diffusers import DiffusionPipeline\n"
                    f'pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{folder}")'
                )
            )
    kept = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    where = f"from step {max(kept)}" if kept else "from its newest checkpoint"
    parts += [
        html.paragraph(f"To continue the run {where}, with the configuration file and overrides it was started with:"),
        html.code(f"python -m launch.train --config=FILE.py:{preset} --run={shlex.quote(run.as_posix())} --resume"),
    ]
    return parts


def _configuration(config: Mapping[str, Any] | None) -> list[str]:
    parts = [html.heading("Configuration")]
    if config is None:
        return [*parts, _missing("config.json.")]
    rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in dotted(config).items()]
    return [*parts, html.folded(f"{len(rows)} settings", html.table(["Setting", "Value"], rows))]
