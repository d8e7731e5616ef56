"""Writes data folders in the CoCoEdit-40K layout, all or nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cocoedit_jax.data.images import ImageFile
from cocoedit_jax.data.packed import PACK
from cocoedit_jax.data.records import METADATA, TEXT_CACHE
from cocoedit_jax.data.scenes import OPERATIONS, render_batch, sample_specs
from cocoedit_jax.errors import UserError

_CHUNK = 256
# What a folder of ours holds: records to train on, or instructions to annotate (annotation/sources).
_OWN_ENTRIES = {METADATA, "prompts.jsonl", "left_out.jsonl", "duplicates.jsonl", "images", "masks", PACK}


def write_scenes(
    out: Path | str,
    num: int,
    size: int = 48,
    seed: int = 0,
    *,
    operations: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write `num` procedural scenes of `size` px to the folder `out`; returns its path.

    The records carry id, prompt, image, mask (white = keep), edit_type and scene (see `SceneSpec.to_json`). The same
    arguments give the same files. The folder appears complete or not at all. Raises UserError when `out` is not empty
    and `overwrite` is off, or holds anything that is not a data folder.
    """
    if size < 16 or size % 2:
        raise UserError(f"size: {size} px given, expected an even number >= 16")
    unknown = sorted(set(operations) - set(OPERATIONS))
    if unknown:
        raise UserError(f"operations: unknown {', '.join(unknown)}, expected some of {', '.join(OPERATIONS)}")

    def fill(folder: Path) -> None:
        rng = np.random.default_rng(seed)
        (folder / "images").mkdir()
        (folder / "masks").mkdir()
        with (folder / METADATA).open("w", encoding="utf-8") as metadata, tqdm(total=num, unit="scene") as bar:
            for start in range(0, num, _CHUNK):
                specs = sample_specs(rng, min(_CHUNK, num - start), operations or OPERATIONS)
                batch = render_batch(specs, size)
                for offset, spec in enumerate(specs):
                    name = f"{start + offset:06d}.png"
                    pixels = np.rint(batch.source[offset] * 255).astype(np.uint8)
                    keep = np.rint((1 - batch.edit_mask[offset]) * 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / "images" / name)
                    Image.fromarray(keep).save(folder / "masks" / name)
                    record = {
                        "id": f"scene-{size}-{seed}-{start + offset:06d}",
                        "prompt": spec.instruction,
                        "image": f"images/{name}",
                        "mask": f"masks/{name}",
                        "edit_type": spec.operation,
                        "scene": spec.to_json(),
                    }
                    metadata.write(json.dumps(record) + "\n")
                bar.update(len(specs))

    return write_folder(Path(out), fill, overwrite=overwrite)


def write_folder(out: Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Let `fill` write into a temporary folder beside `out`, then rename it to `out`."""
    _refuse_foreign(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            fill(fresh)
            _put(fresh, out, Path(scratch) / "old")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    return out


def resume_folder(out: Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """As `write_folder`, but what `fill` has written stays in `.NAME.partial` when it fails, and it finds that folder
    again when called anew.
    """
    _refuse_foreign(out, overwrite)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        fill(partial)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            _put(partial, out, Path(scratch) / "old")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}; what is done so far is kept in {partial}") from error
    return out


def _put(fresh: Path, out: Path, old: Path) -> None:
    """Renames `fresh` to `out`; what was there goes to `old`, and comes back should that fail."""
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _refuse_foreign(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: exists and is not a folder; expected a new name or a data folder")
    if not out.exists():
        return
    entries = sorted(entry.name for entry in out.iterdir())
    if TEXT_CACHE in entries:
        raise UserError(f"{out}: will not be replaced: its {TEXT_CACHE}/ is costly to make; move or delete that first")
    foreign = [name for name in entries if name not in _OWN_ENTRIES]
    if entries and not overwrite:
        raise UserError(f"{out}: the folder is not empty; give another name, or --overwrite to replace it")
    if foreign or (entries and not {METADATA, "prompts.jsonl"} & set(entries)):
        # Overwriting deletes the folder, so only one that this program could have written qualifies.
        raise UserError(
            f"{out}: will not be replaced: {', '.join(foreign[:3]) or 'its content'} does not belong to a data folder"
        )


def place_file(file: ImageFile, target: Path) -> None:
    """The content of `file` at `target`, whole or not at all: as a hard link where the file system has them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    if isinstance(file, Path):
        try:
            target.hardlink_to(file.resolve())
            return
        except OSError:  # another disk, or no links there
            pass
    draft = target.with_name(f"{target.name}.tmp")
    draft.write_bytes(file.read_bytes())
    draft.replace(target)
