"""Text caches of the tests: instructions, embeddings that can be told apart, and the files of a model."""

from pathlib import Path

import numpy as np

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.text_cache_writer import TextCacheWriter, fill
from cocoedit_jax.data.text_kind import flux_kind, qwen_kind
from cocoedit_jax.data.text_record import entry_key
from cocoedit_jax.models.text import Instruction

ROOT = Path(__file__).resolve().parents[2]
LENGTH, FEATURES, POOLED = 8, 40, 12
FLUX, QWEN = flux_kind(LENGTH), qwen_kind("edit_plus", Framing(32))
PROMPTS = [Instruction(f"make circle {number} rød") for number in range(23)]


def embed(instructions, dtype=np.float32, kind=FLUX):
    """Embeddings that depend on prompt and picture alone."""
    rows = []
    for instruction in instructions:
        seed = list(entry_key(kind, instruction))
        if kind.sees_pictures:
            seed += list(np.rint(instruction.pixels * 255).astype(int).ravel()[:9])
        rng = np.random.default_rng(seed)
        length = LENGTH if kind is FLUX else int(rng.integers(3, 150))
        row = {"text": rng.standard_normal((length, FEATURES), np.float32).astype(dtype)}
        if kind is FLUX:
            row["pooled"] = rng.standard_normal(POOLED, np.float32).astype(dtype)
        rows.append(row)
    return rows


def tiny_model(folder, content=b"weights"):
    """The files that an identity is made of."""
    for encoder in ("text_encoder", "text_encoder_2"):
        (folder / encoder).mkdir(parents=True)
        (folder / encoder / "config.json").write_text("{}")
        (folder / encoder / "model.safetensors").write_bytes(content)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        (folder / tokenizer).mkdir()
        (folder / tokenizer / "tokenizer_config.json").write_text("{}")
        (folder / tokenizer / "tokenizer.json").write_text('{"model": 1}')
    return folder


def write(data, identity, instructions=PROMPTS, encode=embed, dtype=None, kind=FLUX, load=None, **options):
    with TextCacheWriter(data, kind, identity, dtype, **options) as writer:
        return fill(writer, instructions, encode, 4, load)
