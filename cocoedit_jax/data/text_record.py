"""Entries of the text cache: what they are found by, their bytes, and rows of several lengths as one array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save

from cocoedit_jax.data.text_kind import TextKind

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Names of types in the bytes of a safetensors file; its NumPy reader does not know bfloat16.
_STORED = {"BF16": DTYPES["bfloat16"], "F32": DTYPES["float32"], "U8": np.dtype(np.uint8)}
KEY_BYTES = hashlib.sha256().digest_size
NO_PICTURE = bytes(KEY_BYTES)
ENTRY_BYTES = 2 * KEY_BYTES + 4
LENGTH_MULTIPLE = 64  # tokens: few enough padded ones, few enough shapes to compile

Row = Mapping[str, np.ndarray]  # "text" [L, D]; "pooled" [P] where the encoder makes one


class Entry(NamedTuple):
    """What is known of an entry without reading it."""

    key: bytes  # `entry_key`
    picture: bytes  # `picture_digest`
    length: int  # of its states

    def pack(self) -> bytes:
        """`ENTRY_BYTES` bytes."""
        return self.key + self.picture + self.length.to_bytes(4, "little")

    @classmethod
    def unpack(cls, packed: bytes) -> Entry:
        key, picture, length = packed[:KEY_BYTES], packed[KEY_BYTES : 2 * KEY_BYTES], packed[2 * KEY_BYTES :]
        return cls(key, picture, int.from_bytes(length, "little"))


class Asked(Protocol):
    """What an embedding is of: `models.text.Instruction`, as far as the cache is concerned."""

    @property
    def prompt(self) -> str: ...

    @property
    def image(self) -> str:
        """Name of the picture: its path relative to the data folder, POSIX."""
        ...

    @property
    def pixels(self) -> np.ndarray | None:
        """float32 [H, W, 3] in [0, 1], framed."""
        ...


def entry_key(kind: TextKind, asked: Asked) -> bytes:
    """What an entry is found by, 32 bytes: a hash of the prompt and, where the encoder sees it, the picture's name."""
    name = asked.image if kind.sees_pictures else ""
    return hashlib.sha256(json.dumps([asked.prompt, name]).encode()).digest()


def describe(kind: TextKind, asked: Asked) -> str:
    """For messages: the prompt and, where the encoder sees it, the picture's name."""
    return f"{asked.prompt!r} of {asked.image!r}" if kind.sees_pictures else repr(asked.prompt)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3] in [0, 1] as uint8, rounded; exact for pictures that were read from files."""
    return np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)


def picture_digest(kind: TextKind, asked: Asked) -> bytes:
    """A hash of size and pixels of the framed picture, 32 bytes; `NO_PICTURE` where the encoder sees none."""
    if not kind.sees_pictures:
        return NO_PICTURE
    if asked.pixels is None:
        raise ValueError(f"{describe(kind, asked)}: pixels is None; {kind.name} sees the picture")
    digest = hashlib.sha256(json.dumps(asked.pixels.shape).encode())
    digest.update(np.ascontiguousarray(to_bytes(asked.pixels)))
    return digest.digest()


def pack_record(key: bytes, row: Row) -> bytes:
    """One record: the bytes of a safetensors file."""
    tensors = {**row, "key": np.frombuffer(key, np.uint8)}
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def unpack_record(record: bytes) -> dict[str, np.ndarray]:
    """Inverse of `pack_record`, with `key` as an array; the arrays are read-only."""
    return {
        name: np.frombuffer(stored["data"], _STORED[stored["dtype"]]).reshape(stored["shape"])
        for name, stored in safetensors.deserialize(record)
    }


def pad_states(
    rows: Sequence[np.ndarray], length_multiple: int = LENGTH_MULTIPLE, fixed_length: int | None = None
) -> dict[str, np.ndarray]:
    """States [L_i, D] as one zero-padded batch {"text": [B, S, D], "mask": bool [B, S], True at states}.

    S is the least multiple of `length_multiple` that holds all. With `fixed_length`, S is that, longer rows lose their
    end and there is no mask, so padding is attended to: as CoCoEdit's released training does (256).
    """
    longest = max(len(row) for row in rows)
    length = fixed_length or -(-longest // length_multiple) * length_multiple
    text = np.zeros((len(rows), length, rows[0].shape[-1]), rows[0].dtype)
    for padded, row in zip(text, rows, strict=True):
        padded[: len(row)] = row[:length]
    if fixed_length:
        return {"text": text}
    return {"text": text, "mask": np.arange(length) < np.asarray([len(row) for row in rows])[:, None]}


def stack_rows(
    kind: TextKind, rows: Sequence[Row], length_multiple: int = LENGTH_MULTIPLE, fixed_length: int | None = None
) -> dict[str, np.ndarray]:
    """A batch: "text" [B, S, D]; "pooled" [B, P] where the encoder makes one; "mask" [B, S] where entries differ in
    length, see `pad_states`."""
    states = [row["text"] for row in rows]
    batch = {"text": np.stack(states)} if kind.max_length else pad_states(states, length_multiple, fixed_length)
    if "pooled" in rows[0]:
        batch["pooled"] = np.stack([row["pooled"] for row in rows])
    return batch
