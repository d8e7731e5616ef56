"""From instructions to embeddings, with any text encoder: into the cache of a data folder, or into memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cocoedit_jax.data.images import DataFault, Framing, load_pair
from cocoedit_jax.data.records import METADATA, Fault, Record, summarize
from cocoedit_jax.data.text_cache_writer import TextCacheWriter, fill
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.data.text_kind import TextKind
from cocoedit_jax.data.text_record import Row, entry_key, stack_rows
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction, PrecomputedText
from cocoedit_jax.reporting.telemetry import progress
from torch_bridge import require_torch
from torch_bridge.text_encoder import TextEncoder


def cache_text(
    root: Path,
    model_dir: Path | str,
    kind: TextKind,
    records: Sequence[Record],
    faults: Sequence[Fault],
    make_encoder: Callable[[str | None], TextEncoder],
    *,
    framing: Framing | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
) -> str:
    """Caches the embeddings of `records` of the data folder `root`, see `text_cache`; returns a summary.

    `faults` are reported on standard error, as are prompts that are cut. What is cached already and of the same picture
    is not encoded again, so the same call goes on where a killed one stopped.

    Args:
        make_encoder: from a dtype to the encoder; called only if there is something to encode.
        framing: how the encoder sees pictures; None: it sees none.
        batch_size: instructions encoded at once.
        dtype: None is the dtype of the cache, or `default_dtype` of the device for a new one.

    Raises:
        UserError: nothing to encode, PyTorch or model files are missing, or the cache is of another model or dtype.
    """
    require_torch("transformers")
    if faults:
        print(summarize(root, len(records), faults), file=sys.stderr)
    if not records:
        raise UserError(f"{root / METADATA}: no usable record; expected one JSON object per line")
    by_key: dict[bytes, tuple[Instruction, Record]] = {}
    for record in records:
        instruction = Instruction(record.prompt, record.image_name)
        by_key.setdefault(entry_key(kind, instruction), (instruction, record))
    instructions = [instruction for instruction, _ in by_key.values()]

    def load(instruction: Instruction) -> Instruction:
        _, record = by_key[entry_key(kind, instruction)]
        try:
            assert framing is not None
            pixels, _, _ = load_pair(*record.files(), framing, record.bucket)
        except DataFault as fault:
            raise UserError(f"record {record.id!r} (line {record.line}): {fault.kind}: {fault}") from fault
        return replace(instruction, pixels=pixels)

    loader = None if framing is None else load
    with TextCacheWriter(root, kind, text_identity(model_dir), dtype) as writer:
        for note in writer.notes:
            print(note, file=sys.stderr)
        remaining = writer.remaining(instructions, loader)
        if remaining:
            encoder = make_encoder(writer.dtype)
            _report_cuts(encoder, remaining)
            fill(writer, instructions, encoder.rows, batch_size, loader, remaining=remaining)
        what = "prompts and pictures" if kind.sees_pictures else "prompts"
        return f"{len(instructions)} distinct {what} of {len(records)} records in {writer.folder}, " + (
            f"{len(remaining)} of them new"
        )


def precompute(
    kind: TextKind,
    encoder: TextEncoder,
    instructions: Sequence[Instruction],
    rows: Callable[[Sequence[Instruction]], Sequence[Row]] | None = None,
) -> PrecomputedText:
    """The embeddings of `instructions`, each encoded once, for an editor; the encoder is released. Prompts that are cut
    are reported.

    Args:
        rows: what takes the place of `encoder.rows`, where pictures come from elsewhere.
    """
    distinct = {entry_key(kind, instruction): instruction for instruction in instructions}
    _report_cuts(encoder, list(distinct.values()))
    table: dict[bytes, Row] = {}
    for key in progress(list(distinct), "encode text", "prompt"):
        table[key] = (rows or encoder.rows)([distinct[key]])[0]
    encoder.release()

    def lookup(asked: Sequence[Instruction]) -> dict[str, np.ndarray]:
        return stack_rows(kind, [table[entry_key(kind, instruction)] for instruction in asked])

    return PrecomputedText(lookup, lambda instruction: entry_key(kind, instruction) in table)


def _report_cuts(encoder: TextEncoder, instructions: Sequence[Instruction]) -> None:
    for line in encoder.describe_cuts([instruction.prompt for instruction in instructions]):
        print(line, file=sys.stderr)
