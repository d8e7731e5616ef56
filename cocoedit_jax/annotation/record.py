"""What goes into annotation and what comes out, and both as JSON.

An output folder holds

    metadata.jsonl   the kept, in the layout that data/records.py reads: images/, masks/ (white = keep)
    rejected.jsonl   what the filter refused, with a reason code
    dead.jsonl       what could not be annotated, with a reason code
    scores.jsonl     every annotation, raw; what --refilter and the report read
    shards/          the state of the work: NUMBER.jsonl, layout.json, manifest.json; images/ that are set aside

Lines of the last three files and of the shards are `Annotation.to_json()`; all files keep the order of the input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cocoedit_jax.errors import UserError

REJECTED, DEAD, SCORES, SHARDS, MANIFEST = "rejected.jsonl", "dead.jsonl", "scores.jsonl", "shards", "manifest.json"
SCORE_NAMES = ("clarity", "mask_accuracy", "prominence")
Status = Literal["pending", "kept", "rejected", "dead"]


@dataclass(frozen=True)
class Item:
    """One input. `id` is unique in a run; `image` is a path that can be opened as it is; `source` names the data set
    (with its licence, where known, in `extra["license"]`); `extra` holds all other fields and passes through.
    """

    id: str
    image: str
    prompt: str
    edit_type: str | None = None
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Annotation:
    """All that is known of an item so far.

    size, box: (width, height) and (x0, y0, x1, y1) in pixels of the upright picture (EXIF orientation applied).
    mask_file: relative to the output folder, white = keep. mask_area: share of the picture that may change, in [0, 1].
    scores: by `SCORE_NAMES`, in [0, 1]; None where the judge gave none.
    attributes: what the models said of the target (target, location, attributes) and measures of the mask.
    stage: the last stage that is done (see stages.STAGES). reason: a code of `reasons.py` for rejected and dead.
    seconds: by stage; a stage that handles many records at once is shared out evenly.
    """

    item: Item
    size: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None
    mask_file: str | None = None
    mask_area: float | None = None
    refined_prompt: str | None = None
    scores: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(SCORE_NAMES))
    attributes: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""
    status: Status = "pending"
    reason: str | None = None
    detail: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def edit_type(self) -> str | None:
        return self.item.edit_type

    def dead(self, reason: str, detail: str) -> Annotation:
        return replace(self, status="dead", reason=reason, detail=detail)

    def rejected(self, reason: str, detail: str) -> Annotation:
        return replace(self, status="rejected", reason=reason, detail=detail)

    def to_json(self) -> dict[str, Any]:
        """One flat object: the fields of the item, then the others."""
        return item_to_json(self.item) | {k: v for k, v in asdict(self).items() if k != "item"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Annotation:
        """Inverse of `to_json`. Raises UserError naming a field that is unknown, missing or of another type."""
        item_fields = {f.name for f in fields(Item)}
        item = item_from_json({name: value for name, value in data.items() if name in item_fields})
        rest = {name: value for name, value in data.items() if name not in item_fields}
        unknown = sorted(set(rest) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"annotation {item.id!r}: unknown fields {', '.join(unknown)}")
        if rest.get("status", "pending") not in ("pending", "kept", "rejected", "dead"):
            raise UserError(f"annotation {item.id!r}: status {rest['status']!r}, expected kept, rejected or dead")
        for name, length in (("size", 2), ("box", 4)):
            if rest.get(name) is not None:
                if not isinstance(rest[name], list | tuple) or len(rest[name]) != length:
                    raise UserError(f"annotation {item.id!r}: {name} {rest[name]!r}, expected {length} numbers")
                rest[name] = tuple(rest[name])
        return cls(item=item, **rest)


def item_to_json(item: Item) -> dict[str, Any]:
    return asdict(item)


def item_from_json(data: Mapping[str, Any]) -> Item:
    """Inverse of `item_to_json`. Raises UserError naming the field that is missing, unknown or of another type."""
    for name in ("id", "image", "prompt"):
        if not isinstance(data.get(name), str) or not data[name].strip():
            raise UserError(f"item {data.get('id')!r}: field {name!r} is {data.get(name)!r}, expected a non-empty text")
    unknown = sorted(set(data) - {f.name for f in fields(Item)})
    if unknown:
        raise UserError(f"item {data['id']!r}: unknown fields {', '.join(unknown)}")
    if not isinstance(data.get("edit_type"), str | None) or not isinstance(data.get("source", ""), str):
        raise UserError(f"item {data['id']!r}: edit_type and source are texts")
    if not isinstance(data.get("extra", {}), Mapping):
        raise UserError(f"item {data['id']!r}: extra is {data['extra']!r}, expected an object")
    return Item(**data)


def to_line(annotation: Annotation) -> str:
    """One line of a JSONL file, with its line end."""
    return json.dumps(annotation.to_json(), ensure_ascii=False, allow_nan=False) + "\n"


def read_annotations(path: Path | str) -> Iterator[Annotation]:
    """The annotations of a JSONL file, in order. Raises UserError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the output of python -m launch.annotate")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                data = json.loads(line)
                if not isinstance(data, dict):
                    raise UserError("expected a JSON object")
                yield Annotation.from_json(data)
            except ValueError as error:  # UserError is one
                raise UserError(f"{path} line {number}: {error}") from error
