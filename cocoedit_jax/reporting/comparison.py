"""The comparison of presets: HTML page, Markdown table and trade-off picture, from one result."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting import html
from cocoedit_jax.reporting.measures import (
    EXPLANATION,
    MEASURES,
    Measure,
    difference_cell,
    judged,
    number,
    value_of,
    with_error,
)
from cocoedit_jax.reporting.pictures import COLORS, THEMES, figure_bytes, style_axes

_BY_NAME = {measure.name: measure for measure in MEASURES}
# The PSNR of equal pictures. A row there (the source pasted back) would squeeze all others into one line of the plot.
_PSNR_CAP = 80.0
_TITLE = "Presets on the same fresh scenes"


def over_seeds(seeds: Mapping[str, Mapping[str, Any]], part: str, name: str) -> tuple[float, float, float]:
    """Mean over seeds, standard deviation over seeds (NaN for one) and standard error over scenes.

    The scenes are the same for every seed, so errors are not divided by the number of seeds: the third value is their
    root mean square.
    """
    means = np.asarray([value_of(seed.get(part), name) for seed in seeds.values()], np.float64)
    errors = np.asarray([value_of(seed.get(part), name, "se") for seed in seeds.values()], np.float64)
    if not len(means):
        return math.nan, math.nan, math.nan
    spread = float(means.std(ddof=1)) if len(means) > 1 and np.isfinite(means).all() else math.nan
    return float(means.mean()), spread, float(np.sqrt(np.square(errors).mean()))


def comparison_report(result: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the page ``path`` and, beside it, ``table.md`` and ``tradeoff.png``.

    Pictures ``PRESET_seed_N.png`` in that folder are shown, the first seed of each preset.

    Args:
        result: ``{"scenes": N, "base": {metric: {"mean", "se"}}, "presets": {name: {"seeds": {seed: {"trained": {..},
            "difference": {..}}}}}}``; differences are paired with the base.

    Raises:
        UserError: for a result without base or presets.
    """
    for key in ("base", "presets"):
        if not isinstance(result.get(key), Mapping):
            raise UserError(f"comparison: {key!r} is {result.get(key)!r}; expected a mapping")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    presets = {name: entry.get("seeds", {}) for name, entry in result["presets"].items()}
    presets = {name: seeds for name, seeds in presets.items() if seeds}
    missing = sorted(set(result["presets"]) - set(presets))
    values, differences, caption = _rows(result, presets)
    worse = shortcomings(differences)
    (path.parent / "table.md").write_text(_markdown(values, differences, caption, worse), encoding="utf-8")
    light = tradeoff(result, presets)
    (path.parent / "tradeoff.png").write_bytes(light)

    plain = [[name, *(html.Raw(_cell(cell)) for cell in cells)] for name, cells in differences]
    parts = [html.heading(_TITLE, 1), html.paragraph(f"{result.get('scenes', '?')} scenes.", "soft")]
    parts += [html.paragraph(f"Missing: {name}, no seed finished yet.", "missing") for name in missing]
    parts += [
        html.heading("Measures"),
        html.table(["", *(measure.title for measure in MEASURES)], values, caption[0] + " " + EXPLANATION),
        html.heading("Difference to the base, paired"),
        html.table(["", *(measure.title for measure in MEASURES)], plain, caption[1]),
        html.paragraph(worse),
        html.heading("Trade-off"),
        html.figure(
            light,
            "Judge score against PSNR outside the mask",
            "Right: instructions are followed better. Up: the rest of the picture is kept better. Small: single seeds.",
            tradeoff(result, presets, "dark"),
        ),
    ]
    for name, seeds in presets.items():
        shown = [path.parent / f"{name}_seed_{seed}.png" for seed in seeds]
        for picture in [p for p in shown if p.is_file()][:1]:
            parts += [html.heading(name), html.figure(picture.read_bytes(), f"Edits of {name}")]
    path.write_text(html.page(_TITLE, parts), encoding="utf-8")
    return path


Cell = tuple[float, float, Measure]


def shortcomings(differences: list[tuple[str, list[Cell]]]) -> str:
    """In words, where a row is worse than the base by more than two standard errors."""
    said = []
    for name, cells in differences:
        worse = [cell for cell in cells if judged(*cell) == "bad"]
        if worse:
            said.append(
                f"{name} in " + ", ".join(f"{m.title} ({with_error(d, e, m, signed=True)})" for d, e, m in worse)
            )
    return f"Worse than the base: {'; '.join(said)}." if said else "No row is worse than the base in any measure."


def _cell(cell: Cell) -> str:
    return html.text(difference_cell(*cell))


def _rows(
    result: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]
) -> tuple[list[list[str]], list[tuple[str, list[Cell]]], tuple[str, str]]:
    """Table of measures, table of differences, and a sentence below each."""
    base = result["base"]
    values = [["base", *(number(value_of(base, m.name), m) for m in MEASURES)]]
    differences: list[tuple[str, list[Cell]]] = []
    for name, seeds in presets.items():
        row, cells = [name], []
        for measure in MEASURES:
            mean, spread, _ = over_seeds(seeds, "trained", measure.name)
            row.append(with_error(mean, spread, measure))
            change, _, error = over_seeds(seeds, "difference", measure.name)
            cells.append((change, error, measure))
        values.append(row)
        differences.append((name, cells))
    counts = sorted({len(seeds) for seeds in presets.values()})
    seeds = " or ".join(str(count) for count in counts) or "no"
    return values, differences, (
        f"Mean over {seeds} training seeds ± standard deviation over them, {result.get('scenes', '?')} scenes.",
        "Mean over seeds ± standard error over scenes. Colour: beyond two standard errors.",
    )  # fmt: skip


def _markdown(
    values: list[list[str]], differences: list[tuple[str, list[Cell]]], caption: tuple[str, str], worse: str
) -> str:
    header = ["", *(measure.title for measure in MEASURES)]

    def lines(rows: list[list[str]]) -> list[str]:
        marks = ["---", *["--:"] * len(MEASURES)]
        return [f"| {' | '.join(row)} |" for row in [header, marks, *rows]]

    changes = [[name, *(with_error(*cell, signed=True) for cell in cells)] for name, cells in differences]
    below = caption[1].split(" Colour")[0]
    between = ["", caption[0], "", "Paired difference to the base:", ""]
    return "\n".join([*lines(values), *between, *lines(changes), "", below, "", worse, ""])


def tradeoff(result: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]], theme: str = "light") -> bytes:
    """Judge score against PSNR, PNG: base, a mean and its seeds for each preset; without rows at the cap of PSNR.

    Error bars: standard error over scenes.
    """
    background, ink, line = THEMES[theme]
    figure = Figure(figsize=(6.4, 4.4), facecolor=background, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, theme)
    x, y = _BY_NAME["judge"], _BY_NAME["psnr_outside"]
    base = value_of(result["base"], x.name), value_of(result["base"], y.name)
    if all(math.isfinite(value) for value in base):
        axes.axvline(base[0], color=line, linewidth=1.2, zorder=1)
        axes.axhline(base[1], color=line, linewidth=1.2, zorder=1)
        errors = value_of(result["base"], x.name, "se"), value_of(result["base"], y.name, "se")
        _point(axes, base, errors, ink, "base", "s")
    for color, (name, seeds) in zip(COLORS * len(presets), presets.items(), strict=False):
        each = [[value_of(seed.get("trained"), m.name) for m in (x, y)] for seed in seeds.values()]
        points = np.asarray([pair for pair in each if np.isfinite(pair).all()], np.float64).reshape(-1, 2)
        if not len(points) or points[:, 1].min() >= _PSNR_CAP:
            continue
        if len(points) > 1:
            axes.scatter(points[:, 0], points[:, 1], s=12, color=color, alpha=0.5, linewidths=0, zorder=3)
        errors = over_seeds(seeds, "trained", x.name)[2], over_seeds(seeds, "trained", y.name)[2]
        _point(axes, (float(points[:, 0].mean()), float(points[:, 1].mean())), errors, color, name, "o")
    axes.margins(0.12)
    axes.set_xlabel(f"{x.title} (higher is better)", fontsize=9, color=ink)
    axes.set_ylabel(f"{y.title} (higher is better)", fontsize=9, color=ink)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=ink)
    return figure_bytes(figure)


def _point(
    axes: Axes, at: tuple[float, float], errors: tuple[float, float], color: str, label: str, marker: str
) -> None:
    x, y = (error if math.isfinite(error) else 0.0 for error in errors)
    style = {"color": color, "marker": marker, "markersize": 6.5, "linewidth": 1.4, "zorder": 4}
    axes.errorbar(*at, xerr=x, yerr=y, label=label, **style)
