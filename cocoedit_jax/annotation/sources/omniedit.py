"""OmniEdit: parquet files with the pictures inside.

Columns (data card of TIGER-Lab/OmniEdit-Filtered-1.2M): omni_edit_id, task, src_img and edited_img (bytes and path),
edited_prompt_list (the same edit in several words), width, height, sc_score_1, sc_score_2, sc_reasoning, pq_score,
pq_reasoning, o_score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation.sources import release
from cocoedit_jax.data.prepare import resume_folder
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress

LAYOUT = "*.parquet, also in data/, with the columns omni_edit_id, src_img and edited_prompt_list"
NEEDED = ("omni_edit_id", "src_img", "edited_prompt_list")
_PASSED = ("task", "sc_score_1", "sc_score_2", "pq_score", "o_score")
_BATCH = 16  # rows in memory at once: pictures of the release have several megabytes


def files(path: Path) -> list[Path]:
    """Parquet files at `path`: itself, or those in it or in its data/."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])


def unpack_omniedit(source: Path, out: Path, *, overwrite: bool = False) -> str:
    """Writes the source pictures, once each, and prompts.jsonl to `out`; returns a summary. The edited pictures are not
    read. The first wording becomes the prompt, the others go along as `other_prompts`.

    Raises:
        UserError: no such files, damaged ones, other columns, or pyarrow is missing.
    """
    found = files(source)
    if not found:
        raise UserError(f"{source}: no OmniEdit here, expected {LAYOUT}")
    problems = []
    for path in found:
        missing = sorted(set(NEEDED) - set(release.columns(path)))
        if missing:
            problems.append(f"{path}: no column {', '.join(missing)}; OmniEdit has {LAYOUT}")
    if problems:
        raise UserError("\n".join(problems))
    total = sum(release.opened(path).metadata.num_rows for path in found)
    summary = ""

    def fill(folder: Path) -> None:
        nonlocal summary
        with progress(total, "unpack", "row") as bar:
            for path in found:
                if release.has_part(folder, path.stem):
                    bar.update(release.opened(path).metadata.num_rows)
                    continue
                rows, left_out = [], []
                for number, row in enumerate(_rows(path)):
                    made = _one(folder, path.stem, number, row)
                    (left_out if "reason" in made else rows).append(made)
                    bar.update(1)
                release.write_part(folder, path.stem, rows, left_out)
        summary = release.join_parts(folder, [path.stem for path in found])

    resume_folder(out, fill, overwrite=overwrite)
    return f"{summary}\nin {out}"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    file = release.opened(path)
    wanted = [name for name in (*NEEDED, *_PASSED) if name in file.schema_arrow.names]
    try:
        for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow's own
        raise UserError(f"{path}: damaged ({error}); download it again, then repeat the command") from error


def _one(folder: Path, part: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    where = {"file": part, "row": number}
    prompts = row["edited_prompt_list"]
    prompts = [prompts] if isinstance(prompts, str) else prompts or []
    prompts = [prompt.strip() for prompt in prompts if isinstance(prompt, str) and prompt.strip()]
    if not prompts:
        return where | {"reason": "no instruction"}
    picture = row["src_img"]
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    suffix = release.suffix_of(data) if isinstance(data, bytes) and data else None
    if suffix is None or not isinstance(data, bytes):
        return where | {"reason": "no readable source picture"}
    # By content: the release edits many a picture in several ways, in several files.
    digest = hashlib.sha256(data).hexdigest()
    name = f"images/{digest[:2]}/{digest}{suffix}"
    path = folder / name
    if not (path.is_file() and path.stat().st_size == len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.tmp")
        draft.write_bytes(data)
        draft.replace(path)
    return {
        "id": f"{part}-{number:06d}",  # omni_edit_id is not unique: one per task
        "image": name,
        "prompt": prompts[0],
        "edit_type": row.get("task"),
        "source": "OmniEdit",
        "license": "MIT",
        "omni_edit_id": row["omni_edit_id"],
        "other_prompts": prompts[1:],
        **{key: row[key] for key in _PASSED[1:] if key in row},
    }
