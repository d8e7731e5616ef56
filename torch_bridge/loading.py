"""Loading transformers' models and tokenizers from folders on this machine, with faults as one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cocoedit_jax.errors import UserError
from torch_bridge import require_torch


def default_device() -> str:
    """The GPU if PyTorch finds one."""
    return "cuda" if require_torch().cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slow."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def load_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """``cls.from_pretrained(folder)`` without the network.

    Raises:
        UserError: whatever is wrong with the files.
    """
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers raises anything, from KeyError to SafetensorError
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: cannot be loaded as {cls.__name__}: {first_line}") from error


def load_model(cls: Any, folder: Path, dtype: str, device: str, inner: str | None = None) -> Any:
    """A model of safetensors files, complete, in eval mode, on ``device``; or only its attribute ``inner``.

    Args:
        dtype: name of a type of PyTorch, such as "bfloat16".

    Raises:
        UserError: files or tensors are missing or do not fit, or the device's memory is too small.
    """
    torch = require_torch("transformers")
    model, info = load_pretrained(
        cls, folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
    )
    prefix = "" if inner is None else f"{inner}."
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
    if missing:  # transformers would go on with random ones
        names = ", ".join(missing[:3])
        raise UserError(f"{folder}: {len(missing)} tensor(s) of {cls.__name__} are missing: {names}")
    kept = model if inner is None else getattr(model, inner)
    del model
    try:
        return kept.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{folder}: does not fit into the memory of {device}") from error
