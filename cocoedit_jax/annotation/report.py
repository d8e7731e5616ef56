"""The report of an annotation run, one HTML file: what happened to whom, scores, pictures, thresholds to try, an audit.

The page asks nothing of any other address: pictures and data lie in it, and its Content-Security-Policy lets it run no
script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation import report_parts as parts
from cocoedit_jax.annotation.reasons import DEAD, REJECTED
from cocoedit_jax.annotation.record import SCORE_NAMES, SCORES, Annotation, read_annotations
from cocoedit_jax.annotation.settings import FilterSettings
from cocoedit_jax.annotation.stages import STAGES
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting import html
from cocoedit_jax.reporting.telemetry import write_text

REPORT = "report.html"
MAX_ROWS = 200_000  # in the threshold preview; of more, as many are drawn
_SIDE = 320  # px of pictures
_STAGE_WORDS = {
    "load": "picture opened", "classify": "local edit", "box": "target found", "mask": "mask made",
    "rewrite": "instruction refined", "score": "scored",
}  # fmt: skip
# Sliders: key of FilterSettings, what it limits, its words, highest value, step.
_RULES = (
    ("min_clarity", "clarity", "instruction clarity, at least", 1.0, 0.01),
    ("min_mask_accuracy", "mask_accuracy", "mask accuracy, at least", 1.0, 0.01),
    ("min_prominence", "prominence", "target prominence, at least", 1.0, 0.01),
    ("min_area", "area", "share of the picture, at least", 1.0, 0.005),
    ("max_area", "area", "share of the picture, at most", 1.0, 0.005),
    ("min_crop_area", "crop_area", "share of the centred square, at least", 1.0, 0.005),
    ("max_crop_area", "crop_area", "share of the centred square, at most", 1.0, 0.005),
    ("max_components", "components", "pieces of the mask, at most", 30, 1),
    ("min_box_iou", "box_iou", "overlap of mask and box (IoU), at least", 1.0, 0.01),
    ("max_border", "border", "share of the border inside the mask, at most", 1.0, 0.01),
)
_VERDICTS = ("good", "wrong mask", "wrong instruction", "unsure")
_CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; margin: .75rem 0; }
.card { background: var(--fill); border-radius: 6px; padding: .6rem; overflow-wrap: anywhere; font-size: .9rem; }
.picture { position: relative; display: inline-block; max-width: 100%; } .picture img { display: block; }
.box { position: absolute; border: 2px dashed #ffd60a; } .prompt { font-weight: 600; } .refined { font-style: italic; }
.bar { background: var(--fill); width: 14rem; height: .9rem; } .bar div { background: #2a78c2; height: 100%; }
.bins rect { fill: #2a78c2; } .bins line { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 3 2; }
.wrapped { display: block; white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 9rem;
  max-width: 24rem; }
.bins { display: block; } .sliders { display: grid; grid-template-columns: auto minmax(8rem, 1fr) 4rem;
  gap: .3rem .8rem; align-items: center; max-width: 46rem; } .sliders input { width: 100%; }
#passing { font-weight: 600; font-size: 1.15rem; } fieldset { border: 0; padding: 0; margin: .4rem 0; }
fieldset label { margin-right: .7rem; } .card input[type=text] { width: 100%; }
"""


def write_report(
    folder: Path | str, rules: FilterSettings, *, examples: int = 12, audit: int = 100, seed: int = 0
) -> Path:
    """Writes FOLDER/report.html from FOLDER/scores.jsonl and returns its path.

    Args:
        folder: the output of an annotation run.
        rules: the filter that chose; where the sliders begin.
        examples: pictures each of the best, the worst and of a draw.
        audit: records to be judged by people; drawn anew only by another `seed`.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    folder = Path(folder)
    annotations = list(read_annotations(folder / SCORES))
    if not annotations:
        raise UserError(f"{folder / SCORES}: empty; nothing to report")
    script = (resources.files("cocoedit_jax") / "assets" / "annotation_report.js").read_text(encoding="utf-8")
    audited = _draw(annotations, audit, seed, lambda a: a.mask_file is not None)
    body = [
        html.heading(f"Annotation of {folder.resolve().name}", 1),
        html.paragraph(_sum(annotations), "soft"),
        *_funnel(annotations),
        *_distributions(annotations, rules),
        *_preview(annotations, rules),
        *_examples(annotations, folder, examples, seed),
        *_audit(audited, folder),
        _data_block(annotations, audited, folder, seed, rules),
        f"<script>{script}</script>",
    ]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{_CSS}</style>'
    path = folder / REPORT
    write_text(path, html.page(f"Annotation of {folder.resolve().name}", body, head))
    return path


def _sum(annotations: Sequence[Annotation]) -> str:
    counts = Counter(annotation.status for annotation in annotations)
    text = f"{len(annotations)} in = {counts['kept']} kept + {counts['rejected']} rejected + {counts['dead']} dead"
    return text + (f" + {counts['pending']} not done" if counts["pending"] else "") + "."


def _funnel(annotations: Sequence[Annotation]) -> list[str]:
    total = len(annotations)
    reached = [STAGES.index(a.stage) - _ended(a) for a in annotations if a.stage in STAGES]
    counts = {_STAGE_WORDS[stage]: sum(at >= number for at in reached) for number, stage in enumerate(STAGES)}
    counts = {"given": total, **counts, "kept by the filter": sum(a.status == "kept" for a in annotations)}
    rows = [
        [words, str(count), f"{100 * count / total:.1f} %", html.Raw(parts.bar(count, total))]
        for words, count in counts.items()
    ]
    content = [html.heading("Funnel"), html.table(["", "Records", "Share", ""], rows)]
    reasons = Counter((a.status, a.reason) for a in annotations if a.status in ("rejected", "dead"))
    if reasons:
        words = {**DEAD, **REJECTED}
        content.append(
            html.table(
                ["Reason", "", "Records", "Meaning"],
                [
                    [str(reason), status, str(count), parts.wrapped(words.get(str(reason), "").rstrip(" *"))]
                    for (status, reason), count in reasons.most_common()
                ],
            )
        )
    return content


def _ended(annotation: Annotation) -> bool:
    """Whether it ended in the stage that it names as done: a global edit is classified, but is no local one."""
    return annotation.status == "rejected" and annotation.reason == "global_edit"


def _by_type(annotations: Sequence[Annotation]) -> dict[str, list[Annotation]]:
    """The largest type first, then all."""
    groups: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        groups.setdefault(annotation.edit_type or "no type", []).append(annotation)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def _distributions(annotations: Sequence[Annotation], rules: FilterSettings) -> list[str]:
    rows = []
    for name, group in {**_by_type(annotations), "all": list(annotations)}.items():
        row = [parts.wrapped(name), str(len(group)), str(sum(a.status == "kept" for a in group))]
        for score in SCORE_NAMES:
            values = [value for a in group if (value := a.scores.get(score)) is not None]
            row.append(html.Raw(parts.histogram(values, getattr(rules, f"min_{score}"))))
        areas = [a.mask_area for a in group if a.mask_area is not None]
        rows.append([*row, html.Raw(parts.histogram(areas, rules.min_area, rules.max_area))])
    header = ["Edit type", "Records", "Kept", *(name.replace("_", " ").capitalize() for name in SCORE_NAMES), "Area"]
    caption = "From 0 on the left to 1 on the right; each histogram has its own height. Dashed: thresholds."
    return [html.heading("Scores and areas by edit type"), html.table(header, rows, caption)]


def _scored(annotations: Sequence[Annotation]) -> list[Annotation]:
    """Those whose way ended at the filter: what other thresholds would choose among."""
    return [a for a in annotations if a.stage == STAGES[-1] and a.reason != "duplicate"]


def _columns(annotations: Sequence[Annotation]) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {
        name: [annotation.scores.get(name) for annotation in annotations] for name in SCORE_NAMES
    }
    for name in dict.fromkeys(column for _, column, *_ in _RULES if column not in SCORE_NAMES):
        columns[name] = [annotation.attributes.get("measures", {}).get(name) for annotation in annotations]
    return columns


def _preview(annotations: Sequence[Annotation], rules: FilterSettings) -> list[str]:
    rows = []
    for name, column, words, highest, step in _RULES:
        value = getattr(rules, name)
        side = "max" if name.startswith("max") else "min"
        off = ' data-off="yes" data-unused="yes"' if value is None else ""
        start = 0 if value is None else value
        rows.append(
            f'<label for="{name}">{words}</label><input type="range" id="{name}" data-rule="{column}"'
            f' data-side="{side}" min="0" max="{max(highest, start)}" step="{step}" value="{start}"'
            f' data-start="{start}"{off}><output id="value-{name}"></output>'
        )
    types = list(_by_type(_scored(annotations)))
    table = html.table(
        ["Edit type", "Would pass"],
        [[parts.wrapped(name), html.Raw(f'<span id="passing-{number}"></span>')] for number, name in enumerate(types)],
    )
    count = len(_scored(annotations))
    drawn = f" Drawn from {count} by chance." if count > MAX_ROWS else ""
    return [
        html.heading("Other thresholds"),
        html.paragraph(f"Of the scored records, so many would pass.{drawn} Nothing is changed here.", "soft"),
        '<p><span id="passing"></span> <button id="reset" type="button">as chosen</button></p>',
        f'<div class="sliders">{"".join(rows)}</div>',
        table,
        html.paragraph("To choose so, without any model:"),
        '<pre><code id="refilter"></code></pre>',
    ]


def _quality(annotation: Annotation) -> float:
    """The lowest score, which decides; -1 where one is missing."""
    values = [annotation.scores.get(name) for name in SCORE_NAMES]
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else -1.0


def _examples(annotations: Sequence[Annotation], folder: Path, count: int, seed: int) -> list[str]:
    order = sorted(_scored(annotations), key=lambda a: (-_quality(a), a.item.id))
    order = [annotation for annotation in order if annotation.mask_file is not None]
    drawn = _draw(annotations, count, seed + 1, lambda a: True)
    content = []
    for title, chosen in (
        ("Best", order[:count]),
        ("Worst", order[::-1][: min(count, max(len(order) - count, 0))]),
        ("Random", drawn),
    ):
        content.append(html.heading(f"{title}: {len(chosen)}"))
        if chosen:
            content.append(parts.cards([parts.card(annotation, folder, _SIDE) for annotation in chosen]))
        else:
            content.append(html.paragraph("None.", "soft"))
    note = "Best and worst by the lowest of the scores. Red: what may change. Yellow: the box."
    return [html.heading("Samples"), html.paragraph(note, "soft"), *content]


def _draw(
    annotations: Sequence[Annotation], count: int, seed: int, wanted: Callable[[Annotation], bool]
) -> list[Annotation]:
    """`count` of those `wanted`, in their order; the same for the same seed, whatever their order in the file was."""
    pool = sorted((a for a in annotations if wanted(a)), key=lambda a: a.item.id)
    chosen = {a.item.id for a in random.Random(seed).sample(pool, min(count, len(pool)))}
    return [a for a in annotations if a.item.id in chosen]


def _audit(audited: Sequence[Annotation], folder: Path) -> list[str]:
    content = []
    for number, annotation in enumerate(audited):
        choices = "".join(
            f'<label><input type="radio" name="verdict-{number}" value="{word}"> {word}</label>' for word in _VERDICTS
        )
        note = f'<input type="text" placeholder="note" aria-label="note on record {number + 1}">'
        below = f"<fieldset>{choices}</fieldset>{note}"
        mark = f' data-audit="{number}" data-status="{annotation.status}"'
        content.append(parts.card(annotation, folder, _SIDE, below, mark))
    text = (
        f"{len(audited)} records with a mask, drawn by chance, kept or not. Judge them, then save the answers:"
        " this page forgets them when it is closed."
    )
    return [
        html.heading("Audit"),
        html.paragraph(text, "soft"),
        '<p><span id="agreement"></span> <button id="export" type="button">save audit.csv</button></p>',
        parts.cards(content),
    ]


def _data_block(
    annotations: Sequence[Annotation], audited: Sequence[Annotation], folder: Path, seed: int, rules: FilterSettings
) -> str:
    scored = _scored(annotations)
    types = list(_by_type(scored))
    if len(scored) > MAX_ROWS:
        scored = random.Random(seed).sample(scored, MAX_ROWS)
    numbers = {name: number for number, name in enumerate(types)}
    fields = ("id", "image", "edit_type", "prompt", "refined_prompt", *SCORE_NAMES, "mask_area", "status", "reason")
    data: Mapping[str, Any] = {
        "types": types,
        "type": [numbers[annotation.edit_type or "no type"] for annotation in scored],
        # Not rounded: the preview must count as the filter does.
        "columns": _columns(scored),
        "thresholds": asdict(rules),
        "command": f"python -m launch.annotate --output={shlex.quote(str(folder))} --refilter",
        "audit_fields": fields,
        "audit": [
            [a.item.id, a.item.image, a.edit_type, a.item.prompt, a.refined_prompt]
            + [a.scores.get(name) for name in SCORE_NAMES]
            + [a.mask_area, a.status, a.reason]
            for a in audited
        ],
    }
    # "<" only as an escape, so that no text can end the element.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'
