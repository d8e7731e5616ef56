"""Procedural image-editing scenes: coloured shapes on a muted texture, an instruction, the exact target and edit mask.

A scene is a small JSON-able `SceneSpec`; source, target and masks are rendered from it, deterministically.
The instruction determines the target completely: moved and added objects sit in the centre of their corner, new colours
take their canonical shade, added objects the canonical radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cocoedit_jax.data.scene_render import SceneBatch, SceneLayers, render, render_batch, render_layers
from cocoedit_jax.data.scene_spec import COLORS, SceneObject, SceneSpec, edited_objects
from cocoedit_jax.data.scene_text import (
    COLOR_NAMES,
    OPERATIONS,
    SHAPE_NAMES,
    compose_instruction,
    max_instruction_words,
    scene_vocabulary,
    words,
)

__all__ = [
    "COLORS", "OPERATIONS", "SceneBatch", "SceneLayers", "SceneObject", "SceneSpec", "edited_objects",
    "max_instruction_words", "render", "render_batch", "render_layers", "sample_batch", "sample_specs",
    "scene_vocabulary", "words",
]  # fmt: skip

RADIUS_RANGE = (0.15, 0.19)  # of the image side
ADDED_RADIUS = 0.17
EXTENT = 1.05  # no shape reaches further than this many radii from its centre, along x or y
CELL_MARGIN = 0.02  # free border inside a cell, of the image side
_UNIFORMS_PER_SCENE = 64


def sample_batch(
    rng: np.random.Generator, n: int, size: int = 48, operations: Sequence[str] = OPERATIONS
) -> SceneBatch:
    """`n` random editing pairs at `size` x `size` pixels (an even number)."""
    return render_batch(sample_specs(rng, n, operations), size)


def sample_specs(rng: np.random.Generator, n: int, operations: Sequence[str] = OPERATIONS) -> list[SceneSpec]:
    """`n` random scenes; the operations are equally likely."""
    unknown = sorted(set(operations) - set(OPERATIONS))
    if unknown or not operations:
        raise ValueError(f"operations: {unknown or 'none'} given, expected some of {', '.join(OPERATIONS)}")
    uniforms = rng.random((n, _UNIFORMS_PER_SCENE)).tolist()
    return [_sample_spec(iter(row).__next__, operations) for row in uniforms]


def _sample_spec(uniform: Callable[[], float], operations: Sequence[str]) -> SceneSpec:
    def pick(count: int) -> int:
        return int(uniform() * count)

    level, tint = 0.40 + 0.36 * uniform(), 0.035
    background = tuple(round(level + tint * (2 * uniform() - 1), 4) for _ in range(3))
    cells = [0, 1, 2, 3]
    for last in (3, 2, 1):  # Fisher-Yates
        other = pick(last + 1)
        cells[last], cells[other] = cells[other], cells[last]
    count = 2 + pick(2)
    kinds: list[tuple[str, str]] = []
    objects = []
    for cell in cells[:count]:
        color, shape = _new_kind(kinds, pick)
        kinds.append((color, shape))
        radius = RADIUS_RANGE[0] + (RADIUS_RANGE[1] - RADIUS_RANGE[0]) * uniform()
        room = max(0.0, 0.25 - EXTENT * radius - CELL_MARGIN)
        x, y = _cell_center(cell)
        shade = 1.0 + 0.06 * (2 * uniform() - 1)
        r, g, b = (round(min(1.0, max(0.0, shade * value + 0.02 * (2 * uniform() - 1))), 4) for value in COLORS[color])
        objects.append(
            SceneObject(
                shape,
                color,
                cell,
                round(x + room * (2 * uniform() - 1), 4),
                round(y + room * (2 * uniform() - 1), 4),
                round(radius, 4),
                (r, g, b),
            )
        )
    operation = operations[pick(len(operations))]
    index = pick(count)
    item, free = objects[index], cells[count:][pick(4 - count)]
    x, y = _cell_center(free)
    result: SceneObject | None
    if operation == "remove":
        result = None
    elif operation == "recolor":
        options = [c for c in COLOR_NAMES if (c, item.shape) not in kinds and c != item.color]
        color = options[pick(len(options))]
        result = replace(item, color=color, rgb=COLORS[color])
    elif operation == "reshape":
        options = [s for s in SHAPE_NAMES if (item.color, s) not in kinds]
        result = replace(item, shape=options[pick(len(options))])
    elif operation == "move":
        result = replace(item, cell=free, x=x, y=y)
    else:
        color, shape = _new_kind(kinds, pick)
        result = SceneObject(shape, color, free, x, y, ADDED_RADIUS, COLORS[color])
        item = result
    instruction = compose_instruction(
        operation,
        pick,
        color=item.color,
        shape=item.shape,
        cell=item.cell,
        new_color=result.color if result else "",
        new_shape=result.shape if result else "",
        new_cell=result.cell if result else 0,
    )
    return SceneSpec(
        (background[0], background[1], background[2]),
        pick(2**31),
        tuple(objects),
        operation,
        None if operation == "add" else index,
        result,
        instruction,
    )


def _new_kind(taken: list[tuple[str, str]], pick: Callable[[int], int]) -> tuple[str, str]:
    options = [(c, s) for c in COLOR_NAMES for s in SHAPE_NAMES if (c, s) not in taken]
    return options[pick(len(options))]


def _cell_center(cell: int) -> tuple[float, float]:
    return 0.25 + 0.5 * (cell % 2), 0.25 + 0.5 * (cell // 2)
