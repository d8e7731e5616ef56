"""Model folders by name: a local folder, or a repository in the Hugging Face cache. Nothing is ever downloaded here."""

import os
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import validate_repo_id

from cocoedit_jax.errors import UserError


def resolve_model(path_or_id: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a model.

    Args:
        path_or_id: a local folder, or a repository id such as ``black-forest-labs/FLUX.1-Kontext-dev``. A folder of
            that name goes first.
        cache_dir: the cache to look in (default: as ``HF_HUB_CACHE`` and ``HF_HOME`` say).

    Raises:
        UserError: it is neither; the message says how to download it.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(path_or_id)
    try:
        if name.count("/") != 1 or folder.is_absolute():
            raise errors.HFValidationError("expected OWNER/NAME")
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise UserError(f"{name!r}: no such folder, and not a Hugging Face repository id (OWNER/NAME)") from error
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    try:
        return Path(snapshot_download(name, cache_dir=cache, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name!r}: no such folder, and not in the Hugging Face cache {cache}; {download_hint(name, cache_dir)}"
        ) from error


def download_hint(name: str, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """How to fetch repository ``name``; the same weights in one file of another layout, at its root, are left out."""
    where = f" --cache-dir {cache_dir}" if cache_dir else ""
    return f"download it with: hf download {name} --exclude 'flux1-*.safetensors'{where}"
