"""Random access to editing records as a Grain dataset, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from cocoedit_jax.data.images import DataFault, Framing, load_pair
from cocoedit_jax.data.records import Record
from cocoedit_jax.errors import UserError


class RecordSource:
    """Grain random-access source: item i is the dictionary of record i.

    image float32 [H, W, 3] in [0, 1]; edit_mask float32 [H, W], 1 = may change; image_name, prompt, id,
    edit_type (str or None), extra (dict), index (int).
    """

    def __init__(self, records: Sequence[Record], framing: Framing):
        self._records = tuple(records)
        self._framing = framing

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        number = int(index)
        record = self._records[number]
        try:
            image, edit_mask, _ = load_pair(*record.files(), self._framing, record.bucket)
        except DataFault as fault:
            raise UserError(f"record {record.id!r} (line {record.line}): {fault.kind}: {fault}") from fault
        return {"image": image, "edit_mask": edit_mask} | describe(record, number)

    def __repr__(self) -> str:
        return f"RecordSource({len(self._records)} records, {self._framing})"


def describe(record: Record, number: int) -> dict[str, Any]:
    """What is known of record `number` without reading its files: the other fields of a `RecordSource` item."""
    return {
        "image_name": record.image_name,
        "prompt": record.prompt,
        "id": record.id,
        "edit_type": record.edit_type,
        "extra": record.extra,
        "index": number,
    }


def record_dataset(records: Sequence[Record], framing: Framing) -> grain.MapDataset:
    """Grain dataset over `records`; `dataset[i]` is the dictionary described in `RecordSource`."""
    if not records:
        raise UserError("records: none given, expected at least one")
    return grain.MapDataset.source(RecordSource(records, framing))


def load_batch(dataset: grain.MapDataset, indices: Sequence[int] | np.ndarray, num_threads: int = 4) -> dict[str, Any]:
    """Items `indices` read concurrently, in order: image [B, H, W, 3] and edit_mask [B, H, W] stacked, index int64 [B],
    the other fields as lists. All items must be of one size (one bucket).
    """
    if not len(indices):
        raise UserError("indices: none given, expected at least one")

    def read(index: int) -> dict[str, Any]:
        item = dataset[int(index)]
        if item is None:
            raise UserError(f"index {index}: the dataset filters this item out, expected one item per index")
        return item

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        items = list(pool.map(read, indices))
    sizes = sorted({item["edit_mask"].shape for item in items})
    if len(sizes) > 1:
        raise UserError(f"indices: records of several sizes {sizes} in one batch, expected one bucket per batch")
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    return batch | {
        "image": np.stack(batch["image"]),
        "edit_mask": np.stack(batch["edit_mask"]),
        "index": np.asarray(batch["index"], np.int64),
    }
