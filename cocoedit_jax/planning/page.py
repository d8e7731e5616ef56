"""The comparison as one self-contained HTML page with pictures."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from cocoedit_jax.planning.rows import Row
from cocoedit_jax.planning.tables import base_text, cells, details, notes
from cocoedit_jax.reporting import html
from cocoedit_jax.reporting.pictures import COLORS, THEMES, figure_bytes, style_axes

GIB = 2**30
_MOST_BARS = 40  # rows in a picture; the table has all


def _label(row: Row, rows: Sequence[Row]) -> str:
    parts = [row["layout"]]
    for key, words in (("where", "{}"), ("resolution", "{} px"), ("per_shard", "{} per shard"), ("remat", "remat {}"),
                       ("attention", "{}")):  # fmt: skip
        if len({r[key] for r in rows}) > 1:
            parts.append(words.format(row[key]))
    if len({tuple(r["quantize"]) for r in rows}) > 1:
        parts.append(base_text(row))
    return ", ".join(parts)


def _bars(rows: Sequence[Row], theme: str, per_row: int) -> tuple[Figure, Any]:
    background, _, _ = THEMES[theme]
    figure = Figure(figsize=(9, 1.3 + 0.26 * per_row * len(rows)), facecolor=background, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, theme)
    return figure, axes


def _finish(axes: Any, rows: Sequence[Row], theme: str, title: str) -> None:
    ink = THEMES[theme][1]
    axes.set_yticks(range(len(rows)), [_label(row, rows) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(title, fontsize=9, color=ink)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=ink, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def memory_chart(rows: Sequence[Row], theme: str = "light") -> bytes | None:
    """Stacked bars per row and phase against what a device has; PNG. None without figures of memory."""
    rows = [r for r in rows if any(p.get("memory") or p.get("need") for p in r["phases"].values())][:_MOST_BARS]
    if not rows:
        return None
    figure, axes = _bars(rows, theme, 2)
    labelled: set[str] = set()

    def bar(y: float, width: float, left: float, color: str, label: str, **style: Any) -> None:
        axes.barh(y, width, 0.34, left=left, color=color, label=None if label in labelled else label, **style)
        labelled.add(label)

    for index, row in enumerate(rows):
        for offset, (name, phase) in zip((-0.19, 0.19), row["phases"].items(), strict=False):
            tone = 0 if name == "rollout" else 1
            used, need = phase.get("memory"), phase.get("need")
            if used:
                arguments = used["arguments"] / GIB
                bar(index + offset, arguments, 0, COLORS[tone], f"{name}: arguments")
                beside = used.get("beside", 0.0) / GIB
                beyond = used["total"] / GIB - arguments - beside
                bar(index + offset, beyond, arguments, COLORS[tone], f"{name}: temporaries", alpha=0.5)
                bar(index + offset, beside, arguments + beyond, COLORS[tone], f"{name}: beside", alpha=0.25)
            elif need:
                bar(index + offset, need / GIB, 0, COLORS[tone], f"{name}: need", alpha=0.3, hatch="//")
    limits = sorted({p["available"] for r in rows for p in r["phases"].values() if p.get("available")})
    for limit in limits:
        axes.axvline(limit / GIB, color=THEMES[theme][1], linewidth=1.4, linestyle="--")
    _finish(axes, rows, theme, "GiB per device" + (" (dashed: what a program may use)" if limits else ""))
    return figure_bytes(figure)


def _seconds(phase: dict[str, Any]) -> float | None:
    if "measured" in phase:
        return phase["measured"]["median"]
    return phase["roofline"]["seconds"] if "roofline" in phase else None


def time_chart(rows: Sequence[Row], theme: str = "light") -> bytes | None:
    """Seconds of rollout and train step, stacked; PNG. None where no row has times."""
    rows = [row for row in rows if "step_seconds" in row][:_MOST_BARS]
    if not rows:
        return None
    figure, axes = _bars(rows, theme, 1)
    for tone, name in enumerate(("rollout", "train")):
        widths = [_seconds(row["phases"].get(name, {})) or 0.0 for row in rows]
        left = [(_seconds(row["phases"].get("rollout", {})) or 0.0) if name == "train" else 0.0 for row in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, 0.6, left=left, color=COLORS[tone], label=name)
    measured = any(row["method"] == "measured" for row in rows)
    _finish(axes, rows, theme, "seconds per step" + ("" if measured else " (prediction: roofline)"))
    return figure_bytes(figure)


def best_by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """For each kind of chip, the fastest row that fits of every number of devices, by that number."""
    out: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "samples_per_second" in row:
            sizes = out.setdefault(f"{row['where'].partition(':')[0]}, {row['model']} {row['resolution']} px", {})
            best = sizes.get(row["devices"])
            if best is None or row["samples_per_second"] > best["samples_per_second"]:
                sizes[row["devices"]] = row
    return {name: [sizes[n] for n in sorted(sizes)] for name, sizes in out.items()}


def scaling_chart(rows: Sequence[Row], theme: str = "light") -> bytes | None:
    """Samples per second over devices, the best row of each size; PNG. None where all rows have one size."""
    series = best_by_size(rows)
    if max((len(points) for points in series.values()), default=0) < 2:
        return None
    background, ink, line = THEMES[theme]
    figure = Figure(figsize=(6.4, 4.2), facecolor=background, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, theme)
    for color, (name, points) in zip(COLORS * len(series), series.items(), strict=False):
        sizes = [point["devices"] for point in points]
        rates = [point["samples_per_second"] for point in points]
        axes.plot(sizes, rates, color=color, marker="o", label=name)
        axes.plot(sizes, [rates[0] * n / sizes[0] for n in sizes], color=line, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted({point["devices"] for points in series.values() for point in points}))
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("devices (dotted: as many times faster as there are more devices)", fontsize=9, color=ink)
    axes.set_ylabel("samples per second", fontsize=9, color=ink)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=ink)
    return figure_bytes(figure)


_PICTURES: tuple[tuple[str, str, Callable[..., bytes | None]], ...] = (
    ("Memory", "Memory per device of rollout and train step.", memory_chart),
    ("Time", "Seconds of rollout and train step.", time_chart),
    ("Scaling", "Samples per second of the fastest row that fits, over the number of devices.", scaling_chart),
)


def page(rows: Sequence[Row], settings: str, command: str = "", chosen: Row | None = None) -> str:
    """The page.

    Args:
        settings: what was compared, one line.
        command: the recommended command line, and ``chosen`` its row.
    """
    parts = [html.heading("Which layout to train with", 1), html.paragraph(settings, "soft")]
    if command and chosen is not None:
        parts += [
            html.heading("Recommended"),
            html.paragraph(f"{chosen['layout']} on {chosen['where']}, {chosen['per_shard']} per shard, remat "
                           f"{chosen['remat']}: {chosen['samples_per_second']:.3g} samples per second"
                           + ("" if chosen["method"] == "measured" else " at most (prediction)") + "."),
            html.code(command),
        ]  # fmt: skip
    header, body = cells(rows)
    for line, row in zip(body, rows, strict=True):
        kind = "good" if row["fits"] else "bad"
        line[-1] = html.Raw(f'<span class="{kind}">{html.text(line[-1])}</span>')
    parts += [html.heading("Comparison"), html.table(header, body)]
    parts += [html.paragraph(note, "soft") for note in notes(rows)]
    for title, alt, draw in _PICTURES:
        light, dark = draw(rows, "light"), draw(rows, "dark")
        if light is not None:
            parts += [html.heading(title), html.figure(light, alt, alt, dark, scroll=True)]
    exchanged = [text for row in rows if (text := details(row))]
    if exchanged:
        items = "".join(html.paragraph(text) for text in exchanged)
        parts.append(html.folded("Collectives per step, by kind: executions and bytes sent by one device", items))
    return html.page("Layouts compared", parts)
