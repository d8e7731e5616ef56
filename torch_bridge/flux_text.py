"""FLUX's text side in PyTorch: CLIP-L pooled and T5-XXL states as diffusers' FluxKontextPipeline.encode_prompt makes
them, and the command that caches them for a data folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.data.records import read_metadata
from cocoedit_jax.data.text_kind import flux_kind
from cocoedit_jax.data.text_record import Row
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction, PrecomputedText
from torch_bridge.encode import cache_text, precompute
from torch_bridge.loading import load_pretrained
from torch_bridge.text_encoder import TextEncoder

T5_TOKENS = 512  # the most that diffusers' pipeline accepts


class FluxTextEncoder(TextEncoder):
    """The two tokenizers and text encoders of a local diffusers folder; nothing is downloaded.

    Args:
        model_dir: holds `text_encoder`, `text_encoder_2` (safetensors), `tokenizer` and `tokenizer_2`.
        max_length: T5 tokens S, at most 512; CoCoEdit trains with 128, stock FLUX samples with 512.
        dtype, device, errors: see `TextEncoder`.
    """

    def __init__(
        self, model_dir: Path | str, max_length: int, *, dtype: str | None = None, device: str | None = None
    ) -> None:
        if not 0 < max_length <= T5_TOKENS:
            raise UserError(f"max_length: {max_length} given, expected 1 to {T5_TOKENS} T5 tokens")
        super().__init__(model_dir, dtype=dtype, device=device)
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        self.max_length = max_length
        self._clip_tokenizer = load_pretrained(CLIPTokenizer, self._root / "tokenizer")
        self._clip_length = self._clip_tokenizer.model_max_length  # 77, as the pipeline reads it
        self._t5_tokenizer = load_pretrained(T5Tokenizer, self._root / "tokenizer_2")
        self._load_model(CLIPTextModel, "text_encoder")
        self._load_model(T5EncoderModel, "text_encoder_2")

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """T5 states [B, S, D] and CLIP pooled [B, P] in `dtype`. Longer prompts are cut, see `count_tokens`.

        Both encoders see the padding, as in diffusers; the rows of a batch do not depend on each other.
        """
        clip = self._encode("text_encoder", self._clip_tokenizer, prompts, self._clip_length)
        t5 = self._encode("text_encoder_2", self._t5_tokenizer, prompts, self.max_length)
        return self._to_numpy(t5.last_hidden_state), self._to_numpy(clip.pooler_output)

    def rows(self, instructions: Sequence[Instruction]) -> list[Row]:
        pairs = zip(*self([instruction.prompt for instruction in instructions]), strict=True)
        return [{"text": text, "pooled": pooled} for text, pooled in pairs]

    def _encode(self, part: str, tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        with self._running(len(ids)):
            return self._models[part](ids.to(self.device))

    def count_tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """Tokens of each uncut prompt with the special ones, int64 [B, 2]: CLIP (limit 77), T5 (`max_length`)."""
        tokenizers = (self._clip_tokenizer, self._t5_tokenizer)
        counts = [[len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids] for tokenizer in tokenizers]
        return np.asarray(counts, np.int64).T

    def describe_cuts(self, prompts: Sequence[str]) -> list[str]:
        """One line per encoder that cuts some of `prompts`: how many, and the longest."""
        counts = self.count_tokens(prompts)
        lines = []
        for column, (name, limit) in enumerate((("CLIP", self._clip_length), ("T5", self.max_length))):
            cut = int(np.sum(counts[:, column] > limit))
            if cut:
                longest = int(np.argmax(counts[:, column]))
                lines.append(
                    f"{cut} of {len(prompts)} prompts are cut to {limit} {name} tokens; "
                    f"the longest has {counts[longest, column]}: {prompts[longest]!r}"
                )
        return lines


def encode_prompts(model_dir: Path | str, prompts: Sequence[str], max_length: int) -> PrecomputedText:
    """The embeddings of `prompts`, each encoded once, for an editor. Prompts that are cut are reported."""
    instructions = [Instruction(prompt) for prompt in prompts]
    return precompute(flux_kind(max_length), FluxTextEncoder(model_dir, max_length), instructions)


def encode_folder(
    data_dir: Path | str, model_dir: Path | str, max_length: int, *, batch_size: int = 16, dtype: str | None = None
) -> str:
    """Caches the embeddings of every prompt in DATA_DIR/metadata.jsonl, see `cache_text`; returns a summary.

    Lines that cannot be read are reported on standard error and left out.
    """
    root = Path(data_dir)
    return cache_text(
        root,
        model_dir,
        flux_kind(max_length),
        *read_metadata(root),
        lambda dtype: FluxTextEncoder(model_dir, max_length, dtype=dtype),
        batch_size=batch_size,
        dtype=dtype,
    )
