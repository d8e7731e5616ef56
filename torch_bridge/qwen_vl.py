"""Qwen2.5-VL's inputs without torchvision: pictures and text to tokens, patches and 3-D rotary positions.

transformers' own `Qwen2_5_VLProcessor` cannot be built without torchvision, and since version 5 its model computes
M-RoPE positions only if it is told which tokens are pictures; without, they are silently those of plain text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocoedit_jax.errors import UserError
from torch_bridge import require_torch
from torch_bridge.loading import load_model, load_pretrained

MODEL_TYPE = "qwen2_5_vl"
IMAGE_PAD = "<|image_pad|>"


@dataclass(frozen=True)
class QwenInputs:
    """One prompt of L tokens with n pictures of P patches in all.

    `input_ids` int64 [L]; `pixel_values` float32 [P, channels * 2 * patch^2]; `image_grid_thw` int64 [n, 3] (frames,
    rows and columns of patches, before merging); `positions` int64 [3, L] (time, row, column).
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    image_grid_thw: np.ndarray
    positions: np.ndarray


def mrope_positions(is_image: np.ndarray, grids: np.ndarray, merge_size: int = 2) -> np.ndarray:
    """M-RoPE positions of one unpadded prompt, int64 [3, L] (time, row, column).

    Text counts up by one on all three axes. A picture that starts at p has (p, p + row, p + column) for its merged
    patches, and what follows it starts at p + max(rows, columns). Qwen2-VL, arXiv 2409.12191, section 2.1.

    Args:
        is_image: bool [L], the tokens of pictures.
        grids: int [n, 3], patches of each picture (frames, rows, columns) before merging.

    Raises:
        ValueError: the pictures do not have as many tokens as `is_image` marks.
    """
    positions = np.zeros((3, len(is_image)), np.int64)
    start = token = 0
    sizes = iter(np.asarray(grids, np.int64).reshape(-1, 3))
    while token < len(is_image):
        if not is_image[token]:
            positions[:, token] = start
            start, token = start + 1, token + 1
            continue
        grid = next(sizes, None)
        if grid is None:
            raise ValueError("more picture tokens than the pictures have")
        frames, rows, columns = grid // (1, merge_size, merge_size)
        count = int(frames * rows * columns)
        if not is_image[token : token + count].all() or token + count > len(is_image):
            raise ValueError("fewer picture tokens than the pictures have")
        positions[:, token : token + count] = start + np.indices((frames, rows, columns)).reshape(3, -1)
        start, token = start + int(max(rows, columns)), token + count
    if next(sizes, None) is not None:
        raise ValueError("fewer picture tokens than the pictures have")
    return positions


class QwenVLProcessor:
    """Text with one `<|image_pad|>` per picture, and the pictures, to `QwenInputs`; then a padded batch for the model.

    Args:
        tokenizer: a `Qwen2Tokenizer`.
        image_processor: a `Qwen2VLImageProcessorPil`.
    """

    def __init__(self, tokenizer: Any, image_processor: Any):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise UserError(f"tokenizer: has no token {IMAGE_PAD}; expected the one of a Qwen2.5-VL model")

    @classmethod
    def load(cls, tokenizer_folder: Path | str, image_processor_folder: Path | str | None = None) -> QwenVLProcessor:
        """From the folders of a model (one for both) or of a diffusers pipeline (`tokenizer`, `processor`).

        Raises:
            UserError: PyTorch or files are missing.
        """
        require_torch("transformers")
        from transformers import Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = Path(tokenizer_folder)
        tokenizer = load_pretrained(Qwen2Tokenizer, folder)
        return cls(tokenizer, load_pretrained(Qwen2VLImageProcessorPil, Path(image_processor_folder or folder)))

    def __call__(self, text: str, images: Sequence[Image.Image] = ()) -> QwenInputs:
        """Tokens of `text` with each `<|image_pad|>` repeated once per merged patch of its picture (RGB).

        Raises:
            ValueError: another number of pictures than places for them, or a picture with an aspect ratio over 200.
        """
        grids, pixels = np.zeros((0, 3), np.int64), np.zeros((0, 0), np.float32)
        if images:
            made = self.image_processor(images=list(images), return_tensors="np")
            grids = np.asarray(made["image_grid_thw"], np.int64)
            pixels = np.asarray(made["pixel_values"], np.float32)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        places = ids == self.image_token_id
        if places.sum() != len(grids):
            raise ValueError(f"{len(grids)} pictures for {places.sum()} {IMAGE_PAD}")
        merge = self.image_processor.merge_size
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = grids.prod(-1) // merge**2
        ids = np.repeat(ids, repeats)
        return QwenInputs(ids, pixels, grids, mrope_positions(ids == self.image_token_id, grids, merge))

    def batch(self, prompts: Sequence[QwenInputs], device: str, *, padding_side: str = "left") -> dict[str, Any]:
        """Tensors for the model's forward by keyword: `input_ids`, `attention_mask`, `mm_token_type_ids` [B, L],
        `position_ids` [3, B, L], and `pixel_values`, `image_grid_thw` where there are pictures.

        `generate` makes the positions itself: leave `position_ids` out there.
        """
        torch = require_torch()
        longest = max(len(prompt.input_ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = np.full((len(prompts), longest), pad, np.int64)
        mask = np.zeros_like(ids)
        positions = np.zeros((3, *ids.shape), np.int64)
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            place = slice(longest - length, longest) if padding_side == "left" else slice(length)
            ids[row, place], mask[row, place], positions[:, row, place] = prompt.input_ids, 1, prompt.positions
        types = (ids == self.image_token_id) & (mask == 1)
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": types.astype(np.int64),
            "position_ids": positions,
        }
        if types.any():
            pictured = [prompt for prompt in prompts if len(prompt.image_grid_thw)]
            arrays["pixel_values"] = np.concatenate([prompt.pixel_values for prompt in pictured])
            arrays["image_grid_thw"] = np.concatenate([prompt.image_grid_thw for prompt in pictured])
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def read_config(folder: Path | str) -> Mapping[str, Any]:
    """The config.json of a Qwen2.5-VL model.

    Raises:
        UserError: it is missing, not JSON, or of another model.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected the configuration of a Qwen2.5-VL model"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else config
        raise UserError(f"{path}: model_type {found!r} given, expected {MODEL_TYPE!r}")
    return config


def load_qwen_vl(folder: Path | str, dtype: str, device: str) -> Any:
    """The `Qwen2_5_VLForConditionalGeneration` in `folder`, in eval mode on `device`.

    Raises:
        UserError: PyTorch, files or tensors are missing, it is another model, or the device's memory is too small.
    """
    require_torch("transformers")
    read_config(folder)
    from transformers import Qwen2_5_VLForConditionalGeneration

    return load_model(Qwen2_5_VLForConditionalGeneration, Path(folder), dtype, device)
