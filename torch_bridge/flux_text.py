"""FLUX's text side in PyTorch: CLIP-L pooled and T5-XXL states as diffusers' FluxKontextPipeline.encode_prompt makes
them, and the command that caches them for a data folder."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.data.records import METADATA, read_metadata, summarize
from cocoedit_jax.data.text_cache import DTYPES, cache_folder
from cocoedit_jax.data.text_cache_writer import Embeddings, TextCacheWriter, fill
from cocoedit_jax.data.text_identity import encoder_files, text_identity
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.reporting.telemetry import progress
from torch_bridge import require_torch
from torch_bridge.loading import default_device, default_dtype, load_model, load_pretrained

T5_TOKENS = 512  # the most that diffusers' pipeline accepts


class FluxTextEncoder:
    """The two tokenizers and text encoders of a local diffusers folder; nothing is downloaded.

    Args:
        model_dir: holds `text_encoder`, `text_encoder_2` (safetensors), `tokenizer` and `tokenizer_2`.
        max_length: T5 tokens S, at most 512; CoCoEdit trains with 128, stock FLUX samples with 512.
        dtype: "bfloat16" or "float32", of weights, computation and result; None: `default_dtype`.
        device: "cpu", "cuda" or "cuda:1"; None: `default_device`.

    Raises:
        UserError: PyTorch is missing, or files are missing or do not hold these models.
    """

    def __init__(
        self, model_dir: Path | str, max_length: int, *, dtype: str | None = None, device: str | None = None
    ) -> None:
        torch = require_torch("transformers")
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        if not 0 < max_length <= T5_TOKENS:
            raise UserError(f"max_length: {max_length} given, expected 1 to {T5_TOKENS} T5 tokens")
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r} given, expected one of {', '.join(DTYPES)}")
        self.max_length = max_length
        root = Path(model_dir)
        encoder_files(root)
        self._torch = torch
        self._clip_tokenizer = load_pretrained(CLIPTokenizer, root / "tokenizer")
        self._clip_length = self._clip_tokenizer.model_max_length  # 77, as the pipeline reads it
        self._t5_tokenizer = load_pretrained(T5Tokenizer, root / "tokenizer_2")
        self._clip = load_model(CLIPTextModel, root / "text_encoder", self.dtype, self.device)
        self._t5 = load_model(T5EncoderModel, root / "text_encoder_2", self.dtype, self.device)

    def release(self) -> None:
        """Gives the memory of the encoders back to the device; the encoder cannot be used afterwards."""
        del self._clip, self._t5
        gc.collect()
        if self.device.startswith("cuda"):
            self._torch.cuda.empty_cache()

    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        """T5 states [B, S, D] and CLIP pooled [B, P] in `dtype`. Longer prompts are cut, see `count_tokens`.

        Both encoders see the padding, as in diffusers; the rows of a batch do not depend on each other.
        """
        clip = self._encode(self._clip, self._clip_tokenizer, prompts, self._clip_length)
        t5 = self._encode(self._t5, self._t5_tokenizer, prompts, self.max_length)
        return _to_numpy(t5.last_hidden_state, self.dtype), _to_numpy(clip.pooler_output, self.dtype)

    def _encode(self, model: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        try:
            with self._torch.inference_mode():
                return model(ids.to(self.device))
        except self._torch.OutOfMemoryError as error:
            raise UserError(f"{len(ids)} prompts at once do not fit into GPU memory; lower --encode_batch") from error

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
    encoder = FluxTextEncoder(model_dir, max_length)
    distinct = list(dict.fromkeys(prompts))
    for line in encoder.describe_cuts(distinct):
        print(line, file=sys.stderr)
    table = {}
    for prompt in progress(distinct, "encode text", "prompt"):
        text, pooled = encoder([prompt])
        table[prompt] = {"text": text[0], "pooled": pooled[0]}
    encoder.release()
    return PrecomputedText.of(table)


def encode_folder(
    data_dir: Path | str, model_dir: Path | str, max_length: int, *, batch_size: int = 16, dtype: str | None = None
) -> str:
    """Caches the embeddings of every prompt in DATA_DIR/metadata.jsonl (see `text_cache`); returns a summary.

    Lines that cannot be read are reported on standard error and left out, as are cut prompts reported. Prompts that are
    cached already are not encoded again, so the same call goes on where a killed one stopped.

    Args:
        dtype: None is the dtype of the cache, or `default_dtype` of the device for a new one.

    Raises:
        UserError: nothing to encode, PyTorch or model files are missing, or the cache is of another model or dtype.
    """
    require_torch("transformers")
    root = Path(data_dir)
    records, faults = read_metadata(root)
    if faults:
        print(summarize(root, len(records), faults), file=sys.stderr)
    if not records:
        raise UserError(f"{root / METADATA}: no usable record; expected one JSON object per line")
    prompts = list(dict.fromkeys(record.prompt for record in records))
    folder = cache_folder(root, max_length)
    with TextCacheWriter(folder, text_identity(model_dir), max_length, dtype) as writer:
        for note in writer.notes:
            print(note, file=sys.stderr)
        missing = writer.missing(prompts)
        if missing:
            encoder = FluxTextEncoder(model_dir, max_length, dtype=writer.dtype)
            for line in encoder.describe_cuts(missing):
                print(line, file=sys.stderr)
            fill(writer, prompts, encoder, batch_size)
    return f"{len(prompts)} distinct prompts of {len(records)} records in {folder}, {len(missing)} of them new"


def _to_numpy(tensor: Any, dtype: str) -> np.ndarray:
    """NumPy array of type `dtype`; PyTorch itself does not convert bfloat16."""
    target = DTYPES[dtype]
    tensor = tensor.cpu().contiguous()
    bits = {2: "int16", 4: "int32"}[target.itemsize]
    torch = require_torch()
    return tensor.to(getattr(torch, dtype)).view(getattr(torch, bits)).numpy().view(target)
