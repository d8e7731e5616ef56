"""Description of a procedural editing scene, small enough to travel as JSON; everything else is rendered from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cocoedit_jax.data.scene_text import OPERATIONS, SHAPE_NAMES

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.16),
    "green": (0.14, 0.64, 0.26),
    "blue": (0.16, 0.36, 0.87),
    "yellow": (0.97, 0.86, 0.16),
    "purple": (0.56, 0.20, 0.74),
    "orange": (0.97, 0.52, 0.09),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape. `cell` counts the 2x2 grid row by row; centre and radius are fractions of the image side."""

    shape: str
    color: str
    cell: int
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class SceneSpec:
    """Full description of one editing scene.

    `operation` acts on `objects[index]`; `result` is that object afterwards (None for "remove"). For "add", `index` is
    None and `result` the new object. `background` and `texture_seed` determine the background.
    """

    background: tuple[float, float, float]
    texture_seed: int
    objects: tuple[SceneObject, ...]
    operation: str
    index: int | None
    result: SceneObject | None
    instruction: str

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; `from_json` gives back an equal spec."""
        data = asdict(self)
        data["background"] = list(self.background)
        data["objects"] = [_object_to_json(item) for item in self.objects]
        data["result"] = None if self.result is None else _object_to_json(self.result)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SceneSpec:
        """Raises ValueError naming the field when `data` is not a scene."""
        try:
            red, green, blue = (float(value) for value in data["background"])
            spec = cls(
                background=(red, green, blue),
                texture_seed=int(data["texture_seed"]),
                objects=tuple(_object_from_json(item) for item in data["objects"]),
                operation=str(data["operation"]),
                index=None if data["index"] is None else int(data["index"]),
                result=None if data["result"] is None else _object_from_json(data["result"]),
                instruction=str(data["instruction"]),
            )
        except KeyError as error:
            raise ValueError(f"scene: field {error.args[0]!r} is missing") from error
        except TypeError as error:
            raise ValueError(f"scene: not a scene description ({error})") from error
        if spec.operation not in OPERATIONS:
            raise ValueError(f"scene: field 'operation' is {spec.operation!r}, expected one of {', '.join(OPERATIONS)}")
        if (spec.index is None) != (spec.operation == "add") or (spec.result is None) != (spec.operation == "remove"):
            raise ValueError(f"scene: fields 'index' and 'result' do not fit the operation {spec.operation!r}")
        if spec.index is not None and not 0 <= spec.index < len(spec.objects):
            raise ValueError(f"scene: field 'index' is {spec.index}, but there are {len(spec.objects)} objects")
        return spec


def _object_to_json(item: SceneObject) -> dict[str, Any]:
    return {**asdict(item), "rgb": list(item.rgb)}


def _object_from_json(data: dict[str, Any]) -> SceneObject:
    shape, color, cell = str(data["shape"]), str(data["color"]), int(data["cell"])
    if shape not in SHAPE_NAMES or color not in COLORS or cell not in range(4):
        raise ValueError(f"scene: unknown object (shape {shape!r}, color {color!r}, cell {cell})")
    red, green, blue = (float(value) for value in data["rgb"])
    return SceneObject(
        shape, color, cell, float(data["x"]), float(data["y"]), float(data["radius"]), (red, green, blue)
    )


def edited_objects(spec: SceneSpec) -> tuple[SceneObject, ...]:
    """The objects after the edit."""
    kept = tuple(item for number, item in enumerate(spec.objects) if number != spec.index)
    return kept if spec.result is None else (*kept, spec.result)
