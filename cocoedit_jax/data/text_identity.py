"""Which text encoders made an embedding: hashes of their configuration, tokenizer, processor and weight files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoedit_jax.data.text_kind import MODEL_INDEX, read_index
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress, write_json

IDENTITY_FILE = "text_identity.json"
FORMAT_VERSION = 1
# What the names of parts of a pipeline start with, and the file that such a part must have.
_NEEDS = {
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "processor": "preprocessor_config.json",
}
_FLUX = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # without model_index.json
_TOKENIZER_FILES = (".json", ".txt", ".model")
_CHUNK = 8_000_000  # bytes
_MEGABYTE = 1_000_000


def text_parts(model_dir: Path | str) -> tuple[str, ...]:
    """Folders of text encoders, tokenizers and processors of a pipeline, encoders first: those that model_index.json
    names, or FLUX's where there is no such file."""
    index = read_index(model_dir)
    if index is None:
        return _FLUX
    named = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    return tuple(name for start in _NEEDS for name in sorted(named) if name.startswith(start))


def encoder_files(model_dir: Path | str) -> list[Path]:
    """Files of a diffusers folder that decide text embeddings, relative to it: configuration and weights of its text
    encoders, their tokenizers and, where they see pictures, the processor.

    Raises:
        UserError: naming everything that is missing.
    """
    root = Path(model_dir)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a diffusers model folder on this machine")
    found: list[Path] = []
    missing: list[str] = []

    def take(name: str) -> None:
        if (root / name).is_file():
            found.append(Path(name))
        else:
            missing.append(name)

    parts = text_parts(root)
    if not parts:
        raise UserError(f"{root / MODEL_INDEX}: names no text encoder; expected the index of a diffusers pipeline")
    for part in parts:
        needed = next(file for start, file in _NEEDS.items() if part.startswith(start))
        take(f"{part}/{needed}")
        if part.startswith("text_encoder"):
            for name in _weights(root / part):
                take(f"{part}/{name}")
        else:
            files = sorted((root / part).iterdir()) if (root / part).is_dir() else []
            found += [
                path.relative_to(root) for path in files if path.suffix in _TOKENIZER_FILES and path.name != needed
            ]
    if missing:
        raise UserError(
            f"{root}: missing {', '.join(missing)}; expected the text encoders and tokenizers of a diffusers pipeline"
        )
    return found


def text_identity(model_dir: Path | str) -> dict[str, Any]:
    """Identity of the text encoders of `model_dir`: {"format_version", "digest", "files": {name: SHA-256}}.

    Every byte of the weights is read, with a progress bar. A folder without text encoders may carry the identity of
    those it belongs to in text_identity.json (`write_text_identity`).

    Raises:
        UserError: neither is there, or text_identity.json is not what `write_text_identity` writes.
    """
    root = Path(model_dir)
    stated = root / IDENTITY_FILE
    if stated.is_file() and not any((root / name).exists() for name in text_parts(root)):
        return _read(stated)
    files = encoder_files(root)
    total = sum((root / name).stat().st_size for name in files)
    hashes = {}
    done = 0
    with progress(total // _MEGABYTE, "hashing text encoders", unit=" MB") as bar:
        for name in files:
            digest = hashlib.sha256()
            with (root / name).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    bar.update(done // _MEGABYTE - bar.n)
            hashes[name.as_posix()] = digest.hexdigest()
    return {"format_version": FORMAT_VERSION, "digest": _digest(hashes), "files": hashes}


def write_text_identity(folder: Path | str, identity: Mapping[str, Any]) -> Path:
    """Writes `identity` to FOLDER/text_identity.json; returns the path."""
    path = Path(folder) / IDENTITY_FILE
    write_json(path, identity)
    return path


def describe_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """None for equal identities; else both digests and the files that differ."""
    if found["digest"] == expected["digest"]:
        return None
    ours, theirs = found["files"], expected["files"]
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{found['digest'][:12]}, expected {expected['digest'][:12]} (different: {', '.join(names[:3])}{more})"


def checked_identity(value: Any, source: str) -> dict[str, Any]:
    """`value` if it is an identity. Raises UserError naming `source` otherwise."""
    files = value.get("files") if isinstance(value, dict) else None
    if (
        not isinstance(files, dict)
        or not files
        or value.get("format_version") != FORMAT_VERSION
        or value.get("digest") != _digest(files)
    ):
        raise UserError(f"{source}: not an identity of text encoders (format {FORMAT_VERSION}, or changed by hand)")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return checked_identity(value, str(path))


def _digest(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _weights(folder: Path) -> list[str]:
    single = "model.safetensors"
    index = folder / f"{single}.index.json"
    if (folder / single).is_file() or not index.is_file():
        return [single]
    return [index.name, *_shards(index)]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors shards ({error!r})") from error
