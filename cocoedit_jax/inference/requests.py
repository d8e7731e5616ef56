"""What to edit: one picture from the command line, or many from a JSONL file."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cocoedit_jax.errors import UserError

SOURCE_SIZES = ("preferred", "target", "own")  # see ``EditOptions.source``


@dataclass(frozen=True)
class EditRequest:
    """One edit: pictures, instruction, where the result goes, and the seed of its noise."""

    images: tuple[Path, ...]
    prompt: str
    out: Path
    seed: int = 0


def read_requests(path: Path, out: Path, seed: int) -> list[EditRequest]:
    """Requests of a JSONL file, one object per line: ``image`` and ``prompt``, optionally ``out`` and ``seed``.

    ``image`` may be a list, for models that take several. Pictures are relative to the file's folder, results to the
    folder ``out``; a line without ``out`` is written to ``NNNNNN.png``, its line number.

    Raises:
        UserError: naming every line that cannot be used.
    """
    if not path.is_file():
        raise UserError(f"--batch={path}: no such file")
    requests, faults = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            try:
                requests.append(_parse(json.loads(line), path.parent, out, number, seed))
            except (ValueError, TypeError) as error:
                faults.append(f"line {number}: {error}")
    outs = [request.out for request in requests]
    faults += [f"{twice}: written by more than one line" for twice in sorted({o for o in outs if outs.count(o) > 1})]
    if faults:
        raise UserError(f"--batch={path}: {len(faults)} fault(s):\n  " + "\n  ".join(faults[:20]))
    if not requests:
        raise UserError(f"--batch={path}: holds no line; expected JSON objects with 'image' and 'prompt'")
    return requests


def _parse(row: Any, root: Path, out: Path, number: int, seed: int) -> EditRequest:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, expected an object")
    if unknown := sorted(set(row) - {"image", "prompt", "out", "seed"}):
        raise ValueError(f"unknown field {unknown[0]!r}; expected image, prompt, out, seed")
    images: Any = row.get("image")
    images = images if isinstance(images, list) else [images]
    for name, values in (("prompt", [row.get("prompt")]), ("image", images or [None])):
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(f"{name} is {row.get(name)!r}; expected a non-empty string")
    own = row.get("seed", seed)
    if not isinstance(own, int) or isinstance(own, bool):
        raise ValueError(f"seed is {own!r}; expected a whole number")
    name = row.get("out", f"{number:06d}.png")
    if not isinstance(name, str) or not (out / name).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"out is {name!r}; expected a file name below --out")
    return EditRequest(tuple(root / name for name in images), row["prompt"], out / name, own)


def open_picture(path: Path) -> Image.Image:
    """The picture, upright and in RGB. Raises UserError naming the file."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such picture") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error


def _make_folder(folder: Path) -> str | None:
    """Makes ``folder``, unless it is there; why no file can be written into it, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: no folder that can be written to ({error})"


def check_pictures(requests: Sequence[EditRequest]) -> list[tuple[tuple[int, int], ...]]:
    """(height, width) of every request's pictures, upright. The folders of the results are made.

    Raises:
        UserError: naming pictures that cannot be read, and results and folders that cannot be written.
    """
    sizes: list[tuple[tuple[int, int], ...]] = []
    faults = [fault for folder in dict.fromkeys(r.out.parent for r in requests) if (fault := _make_folder(folder))]
    writable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    for request in requests:
        if request.out.suffix.lower() not in writable:
            faults.append(f"{request.out}: no picture format that can be written; expected a name such as out.png")
        elif os.path.isdir(request.out):  # Path.is_dir may raise below a folder that is closed to us
            faults.append(f"{request.out}: a folder; expected the name of a file")
        try:
            pictures = [open_picture(image) for image in request.images]
            sizes.append(tuple((picture.height, picture.width) for picture in pictures))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{len(faults)} picture(s) or folder(s) cannot be used:\n  " + "\n  ".join(faults[:20]))
    return sizes
