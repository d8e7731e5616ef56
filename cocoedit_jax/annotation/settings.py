"""The checked settings of an annotation run; what each means is said in configs/annotate.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from cocoedit_jax.annotation.boxes import CONVENTIONS
from cocoedit_jax.data.duplicates import MAX_THRESHOLD
from cocoedit_jax.errors import UserError


@dataclass(frozen=True)
class ModelSettings:
    endpoints: tuple
    name: str
    key_env: str
    key_file: str
    concurrency: int
    timeout_s: float
    deadline_s: float
    probe_s: float
    max_unanswered: float
    cell: int
    max_pixels: int
    image_format: str
    prompts: str


@dataclass(frozen=True)
class ClassifySettings:
    local: tuple
    whole: tuple
    aliases: dict
    max_tokens: int


@dataclass(frozen=True)
class BoxSettings:
    convention: str
    probe: bool
    min_side: int
    max_boxes: int
    max_tokens: int


@dataclass(frozen=True)
class MaskSettings:
    segmenter: str
    options: dict
    from_box: tuple
    dilate: dict
    fill_holes: bool
    min_piece: float


@dataclass(frozen=True)
class RewriteSettings:
    use: bool
    max_words: int
    max_tokens: int


@dataclass(frozen=True)
class ScoreSettings:
    min_mass: float


@dataclass(frozen=True)
class FilterSettings:
    min_clarity: float | None
    min_mask_accuracy: float | None
    min_prominence: float | None
    min_area: float
    max_area: float
    min_crop_area: float
    max_crop_area: float
    max_components: int
    min_box_iou: float
    max_border: float
    duplicates: str
    near_bits: int
    near_colour: float


@dataclass(frozen=True)
class EngineSettings:
    shard_size: int
    in_flight: int
    images: str
    batch_requests: int
    batch_mib: float
    ray: dict


@dataclass(frozen=True)
class Settings:
    models: ModelSettings
    classify: ClassifySettings
    box: BoxSettings
    mask: MaskSettings
    rewrite: RewriteSettings
    score: ScoreSettings
    filter: FilterSettings
    engine: EngineSettings

    def fixed(self) -> dict[str, Any]:
        """What must not change while a folder is being annotated: all but where and how fast, and the filter."""
        plain = asdict(self)
        models = {k: v for k, v in plain["models"].items() if k in ("name", "cell", "max_pixels", "image_format")}
        keep = ("classify", "box", "mask", "rewrite", "score")
        return {"models": models, **{name: plain[name] for name in keep}, "shard_size": self.engine.shard_size}


# Bounds of the numbers: lowest and highest allowed.
_SHARE = (0.0, 1.0)
_BOUNDS = {
    "models.concurrency": (1, 4096), "models.timeout_s": (0.1, math.inf), "models.deadline_s": (0.1, math.inf),
    "models.probe_s": (0.1, math.inf),
    "models.max_unanswered": _SHARE, "models.cell": (1, 256), "models.max_pixels": (64 * 64, math.inf),
    "classify.max_tokens": (1, 4096), "box.min_side": (1, 4096), "box.max_boxes": (1, 100),
    "box.max_tokens": (1, 4096), "mask.min_piece": _SHARE, "rewrite.max_words": (1, 1000),
    "rewrite.max_tokens": (1, 4096), "score.min_mass": _SHARE, "filter.max_components": (1, math.inf),
    "filter.near_bits": (0, MAX_THRESHOLD), "filter.near_colour": (0.0, 255.0),
    "engine.shard_size": (1, 100_000), "engine.in_flight": (1, 64), "engine.batch_requests": (1, math.inf),
    "engine.batch_mib": (0.001, math.inf),
}  # fmt: skip
_RAY = {"workers": (1, math.inf), "cpus": (0.0, math.inf), "mask_workers": (1, math.inf), "mask_gpus": (0.0, math.inf)}


def check(config: Mapping[str, Any]) -> Settings:
    """Settings from the plain dictionary of a configuration (`ConfigDict.to_dict()`).

    Raises:
        UserError: naming every key that is not usable, its value and what is expected.
    """
    problems: list[str] = []
    sections: dict[str, Any] = {}
    types = get_type_hints(Settings)
    for name in sorted(set(config) - set(types)):
        problems.append(f"config.{name}: no such section; expected {', '.join(types)}")
    for section, kind in types.items():
        values = dict(config.get(section, {}))
        names = [field.name for field in fields(kind)]
        if sorted(values) != sorted(names):
            odd = sorted(set(values) ^ set(names))
            problems.append(f"config.{section}: {', '.join(odd)} missing or unknown; expected exactly {names}")
            continue
        hints = get_type_hints(kind)
        for name in names:
            problem = _problem(f"{section}.{name}", values[name], hints[name])
            if problem:
                problems.append(f"config.{section}.{name}={values[name]!r}; expected {problem}")
        sections[section] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    if problems:
        raise UserError("\n".join(problems))
    settings = Settings(**sections)
    problems = _joint_problems(settings)
    if problems:
        raise UserError("\n".join(problems))
    return settings


def _problem(key: str, value: Any, kind: Any) -> str | None:
    if kind in (int, float, float | None):
        if value is None and kind == float | None:
            return None
        low, high = _BOUNDS.get(key, _SHARE)
        word = "a whole number" if kind is int else "a number"
        number = type(value) is int or (type(value) is float and kind is not int)
        if value is None or not number or not math.isfinite(value) or not low <= value <= high:
            return f"{word} from {low:g} to {high:g}" + (", or None" if kind == float | None else "")
    elif kind is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str) and entry for entry in value):
            return "a list of texts"
    elif kind is dict:
        if not isinstance(value, Mapping):
            return "a dictionary"
    elif not isinstance(value, kind):
        return {bool: "true or false", str: "a text"}[kind]
    return None


def _joint_problems(settings: Settings) -> list[str]:
    problems = []
    kinds = (*settings.classify.local, *settings.classify.whole)
    if len(set(kinds)) != len(kinds):
        problems.append(f"config.classify: local and whole {kinds!r}; expected every kind once")
    for name, kind in settings.classify.aliases.items():
        if kind not in kinds:
            problems.append(f"config.classify.aliases.{name}={kind!r}; expected one of {', '.join(kinds)}")
    for kind in settings.mask.from_box:
        if kind not in settings.classify.local:
            problems.append(f"config.mask.from_box: {kind!r}; expected some of {', '.join(settings.classify.local)}")
    for kind, share in settings.mask.dilate.items():
        if kind not in (*settings.classify.local, "other"):
            problems.append(f"config.mask.dilate.{kind}: no such kind of local edit")
        elif _problem("", share, float):
            problems.append(f"config.mask.dilate.{kind}={share!r}; expected a share of the shorter side, 0 to 1")
    if "other" not in settings.mask.dilate:
        problems.append("config.mask.dilate.other: missing; it holds for the kinds that are not named")
    if settings.box.convention not in ("auto", *CONVENTIONS):
        problems.append(f"config.box.convention={settings.box.convention!r}; expected auto, {', '.join(CONVENTIONS)}")
    if settings.models.image_format not in ("jpeg", "png"):
        problems.append(f"config.models.image_format={settings.models.image_format!r}; expected jpeg or png")
    if settings.filter.duplicates not in ("near", "exact", "keep"):
        problems.append(f"config.filter.duplicates={settings.filter.duplicates!r}; expected near, exact or keep")
    if settings.engine.images not in ("copy", "hardlink"):
        problems.append(f"config.engine.images={settings.engine.images!r}; expected copy or hardlink")
    if not settings.models.endpoints:
        problems.append("config.models.endpoints=(); expected at least one http address")
    for name, (low, high) in _RAY.items():
        value = settings.engine.ray.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            problems.append(f"config.engine.ray.{name}={value!r}; expected a number, at least {low:g}")
    for low, high in (("min_area", "max_area"), ("min_crop_area", "max_crop_area")):
        if getattr(settings.filter, low) >= getattr(settings.filter, high):
            problems.append(f"config.filter.{low} and {high}: expected the first below the second")
    return problems
