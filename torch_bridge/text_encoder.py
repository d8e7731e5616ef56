"""What every text encoder in PyTorch shares: where and in which precision it runs, loading, memory, conversion."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.data.text_identity import encoder_files
from cocoedit_jax.data.text_record import DTYPES, Row
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction
from torch_bridge import require_torch
from torch_bridge.loading import default_device, default_dtype, load_model


class TextEncoder(ABC):
    """The text side of a local diffusers folder; nothing is downloaded.

    Args:
        model_dir: see `encoder_files` for what it must hold.
        dtype: "bfloat16" or "float32", of weights, computation and result; None: `default_dtype`.
        device: "cpu", "cuda" or "cuda:1"; None: `default_device`.

    Raises:
        UserError: PyTorch is missing, or files are missing or do not hold these models.
    """

    def __init__(self, model_dir: Path | str, *, dtype: str | None = None, device: str | None = None) -> None:
        self._torch = require_torch("transformers")
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r} given, expected one of {', '.join(DTYPES)}")
        self._root = Path(model_dir)
        encoder_files(self._root)
        self._models: dict[str, Any] = {}

    @abstractmethod
    def rows(self, instructions: Sequence[Instruction]) -> list[Row]:
        """What the text cache stores of each of `instructions`, in `dtype`."""

    def describe_cuts(self, prompts: Sequence[str]) -> list[str]:
        """One line per limit that some of `prompts` exceed: how many, and the longest."""
        return []

    def release(self) -> None:
        """Gives the memory of the models back to the device; the encoder cannot be used afterwards."""
        self._models.clear()
        gc.collect()
        if self.device.startswith("cuda"):
            self._torch.cuda.empty_cache()

    def _load_model(self, model_class: Any, part: str, inner: str | None = None) -> None:
        """Puts the model in the folder `part`, or only its attribute `inner`, on the device as `self._models[part]`."""
        self._models[part] = load_model(model_class, self._root / part, self.dtype, self.device, inner)

    @contextmanager
    def _running(self, count: int) -> Iterator[None]:
        """No gradients, and a clear error when `count` instructions at once are too many for the device."""
        try:
            with self._torch.inference_mode():
                yield
        except self._torch.OutOfMemoryError as error:
            raise UserError(f"{count} prompts at once do not fit into GPU memory; lower --encode_batch") from error

    def _to_numpy(self, tensor: Any) -> np.ndarray:
        """NumPy array of type `dtype`; PyTorch itself does not convert bfloat16."""
        target = DTYPES[self.dtype]
        tensor = tensor.cpu().contiguous().to(getattr(self._torch, self.dtype))
        bits = {2: self._torch.int16, 4: self._torch.int32}[target.itemsize]
        return tensor.view(bits).numpy().view(target)
