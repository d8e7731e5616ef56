"""Pictures of a run for people: grids of edits and training curves. Host code only: numpy, Pillow, Matplotlib."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from cocoedit_jax.errors import UserError

# Blue, vermilion, green, purple, ochre, sky: told apart by colour-blind readers, on white and on black.
COLORS = ("#2a78c2", "#d1602f", "#2f9e6e", "#a4609c", "#b58a1b", "#4fa8d0")
THEMES = {  # background, text, grid lines
    "light": ("#ffffff", "#30343b", "#d5d8dd"),
    "dark": ("#1b1e24", "#d4d8de", "#3a3f49"),
}

# Panels of the training curves: (title, keys). A key matches the metric of that name or any ending in "/key".
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("reward/total", "reward/judge", "reward/pixel")),
    ("PSNR outside the mask (dB)", ("psnr_outside",)),
    ("SSIM outside the mask", ("ssim_outside",)),
    ("Change inside the mask", ("change_inside",)),
    ("No-edit rate", ("no_edit",)),
    ("Loss", ("loss", "policy", "ner", "er", "kl")),
    ("Optimality r (mean, standard deviation)", ("optimality/mean", "optimality/std")),
    ("Spread of rewards", ("reward/std", "reward/group_std")),
    ("Samples per step", ("samples/drawn", "samples/used", "samples/unscored")),
    ("Samples without a score, by reason", ("judge/invalid/*",)),
    ("Repeated requests to the judge, by cause", ("judge/retry/*",)),
    ("Judge: probability on digits, entropy (nats)", ("judge/mass", "judge/entropy")),
    ("Distance to the old policy", ("deviation_old",)),
    ("Gradient norm", ("gradient_norm",)),
    ("Seconds per step", ("seconds/*",)),
)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib brings DejaVu, which has far more letters than Pillow's own font.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def to_uint8(images: Any) -> np.ndarray:
    """Float images in [0, 1] as bytes; bytes pass unchanged, not-a-number becomes black."""
    pixels = np.asarray(images)
    if pixels.dtype == np.uint8:
        return pixels
    return np.rint(np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1) * 255).astype(np.uint8)


def outline(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Pixels of ``mask`` ``[H, W]`` (> 0.5 = inside) that lie within ``thickness`` of its outside, as bool."""
    inside = np.asarray(mask) > 0.5
    core = inside
    for _ in range(thickness):
        padded = np.pad(core, 1, mode="edge")
        core = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel repeated ``factor`` times along height and width."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_outline(image: np.ndarray, mask: np.ndarray, width: int = 2) -> np.ndarray:
    """A copy of ``image`` (bytes) with the edge of ``mask`` drawn white inside black, seen on any colour."""
    out = image.copy()
    out[outline(mask, 2 * width)] = 0
    out[outline(mask, width)] = 255
    return out


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + " ..."]
    for i, line in enumerate(lines):  # words wider than the row, sentences without spaces
        while len(line) > 4 and font.getlength(line) > width:
            line = line[:-4].rstrip(" .") + "..."
        lines[i] = line
    return lines


def sample_grid(
    columns: Sequence[tuple[str, Any]],
    *,
    masks: Any = None,
    instructions: Sequence[str] | None = None,
    notes: Sequence[Sequence[str] | None] | None = None,
    outlined: Sequence[int] = (0,),
    scale: int | None = None,
    theme: str = "light",
) -> np.ndarray:
    """A table of pictures, uint8 ``[height, width, 3]``: a row per sample, its instruction above it.

    Args:
        columns: (title, images ``[N, H, W, 3]`` in [0, 1] or bytes), all of one size.
        masks: edit masks ``[N, H, W]``, 1 = may change; their edge is drawn over the ``outlined`` columns.
        instructions: a sentence for each row.
        notes: for each column None or a short text for each row, such as "judge 0.71  38.2 dB", written below.
        scale: whole factor by which pictures are enlarged; by default to at least 168 pixels.

    Raises:
        UserError: for shapes or lengths that do not fit together.
    """
    images = [to_uint8(pictures) for _, pictures in columns]
    if not images:
        raise UserError("sample_grid: no columns, expected at least one")
    shape = images[0].shape
    for (title, _), pictures in zip(columns, images, strict=True):
        if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.shape != shape:
            raise UserError(f"sample_grid: column {title!r} has shape {pictures.shape}; expected {shape[:3]} x 3")
    n, height, width = shape[:3]
    if masks is not None and np.shape(masks) != (n, height, width):
        raise UserError(f"sample_grid: masks have shape {np.shape(masks)}; expected {(n, height, width)}")
    per_row = [("instructions", instructions)] + [("notes", column) for column in notes or ()]
    for name, texts in per_row:
        if texts is not None and len(texts) != n:
            raise UserError(f"sample_grid: {len(texts)} {name}; expected {n}")
    if notes is not None and len(notes) != len(columns):
        raise UserError(f"sample_grid: notes for {len(notes)} columns; expected {len(columns)}")

    scale = scale or max(1, math.ceil(168 / max(height, width)))
    cell_h, cell_w = height * scale, width * scale
    text, small, bold = _font(15), _font(12), _font(15, bold=True)
    gap, margin, line = 8, 14, 21
    total_w = 2 * margin + len(images) * (cell_w + gap) - gap
    sentences = [_wrap(s, text, total_w - 2 * margin, 3) for s in instructions or [""] * n]
    title_lines = [_wrap(title, bold, cell_w, 2) for title, _ in columns]
    header = line * max(len(lines) for lines in title_lines) + 6
    note_h = 18 if notes is not None and any(column is not None for column in notes) else 0
    row_heights = [len(s) * line + (4 if s else 0) + cell_h + note_h + 12 for s in sentences]
    background, ink, _ = THEMES[theme]
    canvas = Image.new("RGB", (total_w, 2 * margin + header + sum(row_heights) - 12), background)
    draw = ImageDraw.Draw(canvas)
    lefts = [margin + i * (cell_w + gap) for i in range(len(images))]
    for left, lines in zip(lefts, title_lines, strict=True):
        for i, words in enumerate(lines):
            draw.text((left, margin + i * line), words, fill=ink, font=bold)
    top = margin + header
    for row in range(n):
        y = top
        for words in sentences[row]:
            draw.text((margin, y), words, fill=ink, font=text)
            y += line
        y += 4 if sentences[row] else 0
        for i, left in enumerate(lefts):
            cell = enlarge(images[i][row], scale)
            if masks is not None and i in outlined:
                cell = draw_outline(cell, enlarge(np.asarray(masks)[row], scale), 1 if max(cell_h, cell_w) < 300 else 2)
            canvas.paste(Image.fromarray(cell), (left, y))
            column = notes[i] if notes else None
            if column is not None:
                draw.text((left, y + cell_h + 2), _fit(column[row], small, cell_w), fill=ink, font=small)
        top += row_heights[row]
    return np.asarray(canvas)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    return (_wrap(text, font, width, 1) or [""])[0]


def png_bytes(image: np.ndarray) -> bytes:
    """``image`` (float in [0, 1] or uint8) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def figure_bytes(figure: Figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def style_axes(axes: Axes, theme: str) -> None:
    background, ink, line = THEMES[theme]
    axes.set_facecolor(background)
    axes.grid(color=line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(line)


def matching(names: Sequence[str], key: str) -> list[str]:
    """Metric names that ``key`` stands for: the name itself, names ending in ``/key``, or ``prefix/*``."""
    if key.endswith("/*"):
        return [name for name in names if name.startswith(key[:-1])]
    return [name for name in names if name == key or name.endswith(f"/{key}")]


def series(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, float64 ``[K]`` each."""
    pairs = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), int | float)]
    values = np.asarray(pairs, np.float64).reshape(-1, 2)
    values = values[np.isfinite(values[:, 1])]
    return values[:, 0], values[:, 1]


def _panels(metrics: Sequence[Mapping[str, float]], panels: Any) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    names = list(dict.fromkeys(name for row in metrics for name in row))
    for title, keys in panels:
        matched = dict.fromkeys(name for key in keys for name in matching(names, key))
        lines = [(name, *series(metrics, name)) for name in matched]
        lines = [entry for entry in lines if len(entry[1]) and (len(matched) == 1 or np.any(entry[2] != 0))]
        if lines:
            yield title, lines


def curves(
    metrics: Sequence[Mapping[str, float]],
    panels: Sequence[tuple[str, Sequence[str]]] = PANELS,
    *,
    theme: str = "light",
    columns: int = 3,
) -> bytes | None:
    """Small charts over the steps as one PNG file; None when ``metrics`` holds none of the keys.

    Noisy lines of more than 20 points are drawn thin, with their running mean over a twelfth of the run on top.
    """
    drawn = list(_panels(metrics, panels))
    if not drawn:
        return None
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    background, ink, _ = THEMES[theme]
    figure = Figure(figsize=(3.5 * columns, 2.35 * rows), facecolor=background, layout="constrained")
    for index, (title, lines) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1)
        style_axes(axes, theme)
        axes.set_title(title, fontsize=9.5, color=ink, loc="left")
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.yaxis.get_offset_text().set(color=ink, fontsize=7.5)
        for color, (name, steps, values) in zip(COLORS * len(lines), lines, strict=False):
            label = name.rsplit("/", 1)[-1]
            window = len(values) // 12
            if window >= 2 and len(values) > 20:
                axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
                kernel = np.ones(2 * (window // 2) + 1)
                mean = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
                axes.plot(steps, mean, color=color, linewidth=1.7, label=label)
            else:
                marker = "o" if len(values) < 12 else None
                axes.plot(steps, values, color=color, linewidth=1.7, label=label, marker=marker, markersize=3)
        if len(lines) > 1:
            axes.legend(fontsize=7.5, frameon=False, labelcolor=ink, ncols=2)
        if index >= len(drawn) - columns:
            axes.set_xlabel("step", fontsize=8.5, color=ink)
    return figure_bytes(figure)
