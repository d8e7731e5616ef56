"""What the published data sets are unpacked to: pictures and a prompts.jsonl, with account of what was left out."""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from cocoedit_jax.annotation.sources.plain import PROMPTS
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import write_text

LEFT_OUT = "left_out.jsonl"  # where, and why, for each row that is not in prompts.jsonl


def parquet() -> Any:
    """The module pyarrow.parquet. Raises UserError where pyarrow is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"reading .parquet files needs pyarrow ({error}); install it with: pip install 'cocoedit-jax[parquet]'"
        ) from error


def columns(path: Path) -> list[str]:
    """Names of the columns of a parquet file. Raises UserError when it is damaged or pyarrow is missing."""
    return opened(path).schema_arrow.names


def opened(path: Path) -> Any:
    """`pyarrow.parquet.ParquetFile`. Raises UserError when it is damaged or pyarrow is missing."""
    module = parquet()
    try:
        return module.ParquetFile(path)
    except Exception as error:  # pyarrow has errors of its own, which are no common class
        raise UserError(f"{path}: not a whole parquet file ({error}); download it again") from error


def suffix_of(data: bytes) -> str | None:
    """The file name suffix for the bytes of a picture by its header; None where it is none, or too large to decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                kind = picture.format
    except Exception:  # Pillow raises anything on damaged headers
        return None
    return {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}.get(kind or "")


def write_part(folder: Path, name: str, rows: Iterable[dict[str, Any]], left_out: Iterable[dict[str, Any]]) -> None:
    """The result of one input file, kept apart until all are there; `has_part` then is true."""
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    write_text(parts / f"{name}.{LEFT_OUT}", _lines(left_out))
    write_text(parts / f"{name}.{PROMPTS}", _lines(rows))  # last: it says that the part is done


def has_part(folder: Path, name: str) -> bool:
    return (folder / "parts" / f"{name}.{PROMPTS}").is_file()


def join_parts(folder: Path, names: Iterable[str]) -> str:
    """Joins the parts of `names` in that order into prompts.jsonl and left_out.jsonl; returns a summary."""
    kept, reasons = 0, Counter()
    with (folder / PROMPTS).open("w", encoding="utf-8") as prompts, (folder / LEFT_OUT).open("w") as left:
        for name in names:
            text = (folder / "parts" / f"{name}.{PROMPTS}").read_text(encoding="utf-8")
            prompts.write(text)
            kept += text.count("\n")
            text = (folder / "parts" / f"{name}.{LEFT_OUT}").read_text(encoding="utf-8")
            left.write(text)
            reasons.update(json.loads(line)["reason"] for line in text.splitlines())
    for part in (folder / "parts").iterdir():
        part.unlink()
    (folder / "parts").rmdir()
    if not kept:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        raise UserError(f"no instruction left: {why or 'the files have no rows'}")
    summary = f"{kept + reasons.total()} rows: {kept} instructions, {reasons.total()} left out"
    return summary + "".join(f"\n  {count} x {reason}" for reason, count in reasons.most_common())


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
