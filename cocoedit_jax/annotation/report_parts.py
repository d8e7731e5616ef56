"""Parts of the annotation report that are drawn: histograms as SVG, and pictures with their regions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from cocoedit_jax.annotation.pictures import marked, read_edit_mask
from cocoedit_jax.annotation.record import SCORE_NAMES, Annotation
from cocoedit_jax.data.images import DataFault, load_image
from cocoedit_jax.reporting import html

BINS = 20
_BAR, _HEIGHT = 7, 34  # px


def histogram(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """SVG of `values` in [0, 1] over 20 bins, with lines at the thresholds; a dash where there is no value."""
    if not len(values):
        return "–"
    counts, _ = np.histogram(np.clip(np.asarray(values, float), 0, 1), BINS, (0, 1))
    top = counts.max()
    bars = "".join(
        f'<rect x="{index * _BAR}" y="{_HEIGHT - size:g}" width="{_BAR - 1}" height="{size:g}"></rect>'
        for index, count in enumerate(counts)
        if (size := round(_HEIGHT * int(count) / int(top), 1))
    )
    lines = "".join(
        f'<line x1="{at * BINS * _BAR:g}" x2="{at * BINS * _BAR:g}" y1="0" y2="{_HEIGHT}"></line>'
        for at in (low, high)
        if at is not None
    )
    said = f"{len(values)} values, median {np.median(values):.2f}; counts from 0 to 1: {' '.join(map(str, counts))}"
    return (
        f'<svg class="bins" viewBox="0 0 {BINS * _BAR} {_HEIGHT}" width="{BINS * _BAR}" height="{_HEIGHT}" role="img">'
        f"<title>{escape(said)}</title>{bars}{lines}</svg>"
    )


def bar(count: int, total: int) -> str:
    """A horizontal bar of the share `count` / `total`."""
    share = 100 * count / total if total else 0
    return f'<div class="bar"><div style="width:{share:.2f}%"></div></div>'


def overlay(annotation: Annotation, folder: Path, side: int) -> str:
    """The picture as an <img>, at most `side` px: region tinted, box as a dashed line; or why there is none."""
    try:
        image = load_image(Path(annotation.item.image))
    except DataFault as fault:
        return html.paragraph(f"no picture: {fault}", "missing")
    full = image.size
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    missing = ""
    if annotation.mask_file is not None:
        try:
            image = marked(image, read_edit_mask(folder / annotation.mask_file))
        except (OSError, ValueError) as error:
            missing = html.paragraph(f"no mask: {error}", "missing")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    address = base64.b64encode(buffer.getvalue()).decode()
    box = ""
    if annotation.box is not None:
        x0, y0, x1, y1 = (
            100 * value / length for value, length in zip(annotation.box, (*full, *full), strict=True)
        )  # in percent, so that the line fits the picture at any size
        box = f'<div class="box" style="left:{x0:.2f}%;top:{y0:.2f}%;width:{x1 - x0:.2f}%;height:{y1 - y0:.2f}%"></div>'
    picture = f'<img src="data:image/jpeg;base64,{address}" alt="{escape(annotation.item.prompt)}">'
    return f'<div class="picture">{picture}{box}</div>{missing}'


def wrapped(text: str) -> html.Raw:
    """A table cell that may take several lines."""
    return html.Raw(f'<span class="wrapped">{html.text(text)}</span>')


def score_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def card(annotation: Annotation, folder: Path, side: int, below: str = "", attributes: str = "") -> str:
    """Picture, instruction before and after, scores and what the filter said; `below` is markup."""
    scores = ", ".join(f"{name.replace('_', ' ')} {score_text(annotation.scores.get(name))}" for name in SCORE_NAMES)
    area = "" if annotation.mask_area is None else f", area {100 * annotation.mask_area:.1f} %"
    said = annotation.status if annotation.reason is None else f"{annotation.status}: {annotation.reason}"
    lines = [f'<p class="prompt">{html.text(annotation.item.prompt)}</p>']
    if annotation.refined_prompt and annotation.refined_prompt != annotation.item.prompt:
        lines.append(f'<p class="refined">{html.text(annotation.refined_prompt)}</p>')
    kind = annotation.edit_type or "no type"
    lines.append(html.paragraph(f"{kind}; {scores}{area}", "soft"))
    detail = f" ({annotation.detail})" if annotation.detail else ""
    lines.append(html.paragraph(f"{said}{detail}", "soft"))
    return (
        f'<article class="card"{attributes} title="{escape(annotation.item.id)}">'
        f"{overlay(annotation, folder, side)}{''.join(lines)}{below}</article>"
    )


def cards(content: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(content)}</div>'
