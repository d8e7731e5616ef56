"""Qwen-Image-Edit's text side in PyTorch: the states of Qwen2.5-VL for instructions and pictures, as diffusers'
QwenImageEditPipeline and QwenImageEditPlusPipeline make them, and the command that caches them for a data folder.

The rotary positions of Qwen2.5-VL are three-dimensional in pictures. transformers 5 builds them only where
it is told which tokens are a picture's, which diffusers 0.42 does not do; the models were trained, and
CoCoEdit's released ones too, with the version before. So what is computed here is what they were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import read_records
from cocoedit_jax.data.text_kind import TextKind, qwen_kind, qwen_template
from cocoedit_jax.data.text_record import Row, to_bytes
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction, PrecomputedText
from cocoedit_jax.reporting.telemetry import progress
from torch_bridge import require_torch
from torch_bridge.encode import cache_text, precompute
from torch_bridge.qwen_vl import QwenVLProcessor
from torch_bridge.text_encoder import TextEncoder

_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
_BEFORE, _AFTER = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
MAX_ASPECT = 200  # that the picture processor takes
SYSTEM_TOKENS = 64  # of _BEFORE; their states are dropped
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_RESERVED = ("<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Template:
    """What stands for picture number ``{}`` in the text, the area in pixels at which it is seen, and whether several
    are possible."""

    picture: str
    area: int
    several: bool


TEMPLATES = {
    "edit": Template(_PICTURE, 1024 * 1024, False),
    "edit_plus": Template(f"Picture {{}}: {_PICTURE}", 384 * 384, True),
}


def resize_to_area(image: Image.Image, area: int) -> Image.Image:
    """`image` (any aspect ratio) with about `area` pixels, both sides multiples of 32, as the pipelines resize it."""
    ratio = image.width / image.height
    width = math.sqrt(area * ratio)
    sides = [round(side / 32) * 32 for side in (width, width / ratio)]
    if max(sides) >= MAX_ASPECT * min(sides):
        limit = f"expected an aspect ratio below {MAX_ASPECT}"
        raise UserError(f"picture of {image.width}x{image.height} px: too narrow; {limit}")
    return image.convert("RGB").resize((sides[0], sides[1]), Image.Resampling.LANCZOS)


class QwenTextEncoder(TextEncoder):
    """Qwen2.5-VL with tokenizer and picture processor of a local diffusers folder; nothing is downloaded.

    Args:
        model_dir: a QwenImageEditPipeline ("edit": one picture, seen at about a megapixel) or QwenImageEditPlusPipeline
            ("edit_plus": some, seen at the area of 384 x 384). Holds model_index.json, `text_encoder` (safetensors) and
            `processor`, whose tokenizer is used.
        dtype, device, errors: see `TextEncoder`.
    """

    def __init__(self, model_dir: Path | str, *, dtype: str | None = None, device: str | None = None) -> None:
        self.template = qwen_template(model_dir)
        super().__init__(model_dir, dtype=dtype, device=device)
        from transformers import Qwen2_5_VLForConditionalGeneration

        processor = self._root / "processor"
        has_tokenizer = (processor / "tokenizer_config.json").is_file()
        self._processor = QwenVLProcessor.load(processor if has_tokenizer else self._root / "tokenizer", processor)
        # The head (lm_head) is not needed, and stays off the device.
        self._load_model(Qwen2_5_VLForConditionalGeneration, "text_encoder", inner="model")
        expected = int(self._models["text_encoder"].config.image_token_id)
        if self._processor.image_token_id != expected:
            raise UserError(f"{processor}: <|image_pad|> is not token {expected}, as text_encoder expects")

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], max_tokens: int | None = None
    ) -> list[np.ndarray]:
        """Last states [L, D] in `dtype` of each prompt with its pictures of any size; L is its true length.

        The states are those of the whole user and assistant turn, picture tokens included, and the rows of a batch do
        not depend on each other. An empty prompt is possible, as a negative one.

        Args:
            max_tokens: states that are kept of each, from the first one on; None: all. Released training keeps 256.
        """
        template = TEMPLATES[self.template]
        for prompt, pictures in zip(prompts, images, strict=True):
            if not pictures or len(pictures) > 1 and not template.several:
                expected = "one or more" if template.several else "one"
                raise UserError(
                    f"{prompt!r}: {len(pictures)} pictures given; template {self.template} takes {expected}"
                )
            if reserved := [token for token in _RESERVED if token in prompt]:
                raise UserError(f"prompt {prompt!r} contains {reserved[0]}, which stands for a picture; remove it")
        inputs = []
        for prompt, pictures in zip(prompts, images, strict=True):
            names = "".join(template.picture.format(number + 1) for number in range(len(pictures)))
            seen = [resize_to_area(image, template.area) for image in pictures]
            inputs.append(self._processor(f"{_BEFORE}{names}{prompt}{_AFTER}", seen))
        # Padding follows the text: no token sees what comes after it.
        batch = self._processor.batch(inputs, self.device, padding_side="right")
        with self._running(len(inputs)):
            states = self._models["text_encoder"](**batch, use_cache=False).last_hidden_state
        lengths = [len(prompt.input_ids) for prompt in inputs]
        ends = [min(length, SYSTEM_TOKENS + (max_tokens or length)) for length in lengths]
        return [self._to_numpy(row[SYSTEM_TOKENS:end]) for row, end in zip(states, ends, strict=True)]

    def rows(self, instructions: Sequence[Instruction]) -> list[Row]:
        images = []
        for instruction in instructions:
            if instruction.pixels is None:
                raise ValueError(f"{instruction.prompt!r} of {instruction.image!r}: pixels is None")
            images.append([Image.fromarray(to_bytes(instruction.pixels))])
        return [{"text": states} for states in self([instruction.prompt for instruction in instructions], images)]


def encode_edits(
    model_dir: Path | str,
    instructions: Sequence[Instruction],
    read: Callable[[Instruction], Sequence[Image.Image]],
    negative: str | None = None,
) -> PrecomputedText:
    """The embeddings of `instructions`, each encoded once, for an editor.

    Args:
        instructions: `image` tells apart those that are about different pictures, and is otherwise of no meaning.
        read: the pictures that an instruction is about, in order, of any size.
        negative: a prompt to encode with the pictures of every instruction beside its own, for classifier-free
            guidance: find it as ``Instruction(negative, instruction.image)``. "" and " " are prompts too.
    """
    encoder = QwenTextEncoder(model_dir)
    if negative is not None:
        opposed = [Instruction(negative, instruction.image, instruction.pixels) for instruction in instructions]
        instructions = [*instructions, *opposed]

    def rows(asked: Sequence[Instruction]) -> list[Row]:
        prompts = [instruction.prompt for instruction in asked]
        return [{"text": states} for states in encoder(prompts, [read(instruction) for instruction in asked])]

    return precompute(TextKind("qwen", template=encoder.template), encoder, instructions, rows)


def encode_folder(
    data_dir: Path | str,
    model_dir: Path | str,
    framing: Framing,
    *,
    batch_size: int = 16,
    dtype: str | None = None,
    min_bucket_records: int = 1,
) -> str:
    """Caches the embeddings of every record of a data folder, see `cache_text`; returns a summary.

    Args:
        framing: of training; the encoder sees the framed pictures.
        min_bucket_records: as in training, where buckets with fewer records are given up (`read_records`).
    """
    require_torch("transformers")
    root, kind = Path(data_dir), qwen_kind(qwen_template(model_dir), framing)
    with progress(0, "check records", "record") as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        found = read_records(root, framing, strict=False, min_bucket_records=min_bucket_records, progress=done)
    return cache_text(
        root,
        model_dir,
        kind,
        found.records,
        found.faults,
        lambda dtype: QwenTextEncoder(model_dir, dtype=dtype),
        framing=framing,
        batch_size=batch_size,
        dtype=dtype,
    )
