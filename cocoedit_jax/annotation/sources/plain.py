"""Plain inputs: a JSONL file with images and instructions, or pictures with text files beside them.

PROMPTS lines are objects with `image` (a path, relative to the file's folder or absolute) and `prompt`, optionally
`id`, `edit_type`, `source` and `license`; all other fields pass through as `extra`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation.record import Item
from cocoedit_jax.data.records import METADATA, read_metadata, record_id, summarize
from cocoedit_jax.errors import UserError

PROMPTS = "prompts.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Named where they are left out, so that nobody takes a part of a folder for the whole.
_NOT_READ = (".avif", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg", ".tga")
_LISTED = 20


def read_jsonl(path: Path) -> list[Item]:
    """Items of a JSONL file, in order; images are not opened.

    Raises:
        UserError: no item, or lines that cannot be used; up to 20 are listed, with their numbers.
    """
    items: list[Item] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                data = json.loads(text)
                item = _item(data, path.parent)
                if item.id in lines:
                    if data.get("id") is not None:
                        raise ValueError(f"id {item.id!r} was used on line {lines[item.id]}")
                    # The same picture and instruction once more: for the filter to reject as a duplicate.
                    item = replace(item, id=f"{item.id}-line{number}")
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
                problems.append(f"line {number}: {error}")
                continue
            lines[item.id] = number
            items.append(item)
    _refuse(path, problems, len(items), "one JSON object per line with the fields image and prompt")
    return items


def _item(data: Any, folder: Path) -> Item:
    if not isinstance(data, dict):
        raise ValueError(f"a JSON {type(data).__name__}, expected an object")
    for name in ("image", "prompt"):
        if not isinstance(data.get(name), str) or not data[name].strip() or "\0" in data[name]:
            raise ValueError(f"field {name!r} is {data.get(name)!r}, expected a non-empty text")
    # JSON as it is read may hold half a surrogate pair, which UTF-8 cannot, and NaN, which we do not write.
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    given = data.get("id")
    if isinstance(given, bool) or not isinstance(given, str | int | None) or given == "":
        raise ValueError(f"field 'id' is {given!r}, expected a text or a whole number")
    for name in ("edit_type", "source"):
        if not isinstance(data.get(name), str | None):
            raise ValueError(f"field {name!r} is {data[name]!r}, expected a text")
    return Item(
        id=record_id(data["image"], data["prompt"]) if given is None else str(given),
        image=str(folder / data["image"]),
        prompt=data["prompt"].strip(),
        edit_type=data.get("edit_type"),
        source=data.get("source") or "",
        extra={k: v for k, v in data.items() if k not in ("id", "image", "prompt", "edit_type", "source")},
    )


def pictures(folder: Path) -> Iterator[Path]:
    """Pictures below a folder, in the order of their paths; hidden files and folders are left out."""
    return _with_suffix(folder, PICTURES)


def left_out(folder: Path) -> str:
    """One line about the pictures below a folder in formats that are not read; empty where there are none."""
    counts = Counter(path.suffix.lower() for path in _with_suffix(folder, _NOT_READ))
    if not counts:
        return ""
    kinds = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(counts.items()))
    return f"{folder}: {kinds} left out; convert what is to be annotated to one of {', '.join(PICTURES)}"


def _with_suffix(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in suffixes and not hidden and not path.is_dir():
            yield path


def read_sidecars(folder: Path) -> list[Item]:
    """Items of pictures with a .txt of the same name beside them; each line of it that is not blank is an instruction.

    Raises:
        UserError: pictures without text or with an empty one, or no picture at all.
    """
    items: dict[str, Item] = {}
    problems: list[str] = []
    for path in pictures(folder):
        name = path.relative_to(folder).as_posix()
        try:
            lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            problems.append(f"{name}: no {path.stem}.txt beside it")
            continue
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{name}: {path.stem}.txt cannot be read as UTF-8 text: {error}")
            continue
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            problems.append(f"{name}: {path.stem}.txt is empty")
        for prompt in prompts:
            item = Item(record_id(name, prompt), str(path), prompt)
            items.setdefault(item.id, item)  # the same line twice is one instruction
    _refuse(folder, problems, len(items), "pictures, each with a .txt of the same name that holds its instructions")
    return list(items.values())


def read_data_folder(folder: Path) -> list[Item]:
    """Items of a folder as training reads it; its mask goes to `extra["mask"]`."""
    records, faults = read_metadata(folder)
    if faults or not records:
        raise UserError(summarize(folder, len(records), faults) if faults else f"{folder / METADATA}: empty file")
    return [
        Item(
            record.id, str(record.image), record.prompt, record.edit_type, str(record.extra.get("source") or ""),
            {k: v for k, v in record.extra.items() if k != "source"} | {"mask": str(record.mask)},
        )
        for record in records
    ]  # fmt: skip


def _refuse(path: Path, problems: list[str], usable: int, expected: str) -> None:
    if problems:
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listed = "\n  ".join([*problems[:_LISTED], *more])
        raise UserError(f"{path}: {len(problems)} of {len(problems) + usable} cannot be used:\n  {listed}")
    if not usable:
        raise UserError(f"{path}: nothing to annotate, expected {expected}")
