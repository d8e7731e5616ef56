"""Text embeddings of a data folder: computed once per distinct prompt, read back without the encoders.

DIR/text_cache/flux-128/ holds `header.json` (format, encoder identity, sizes, list of parts) and for each part
`part-00000.array_record` (per prompt the bytes of a safetensors file with `text` [S, D], `pooled` [P] and `key`) and
`part-00000.keys.npy` (the keys, SHA-256 of the prompts, in order). A part counts from the moment header.json names it,
so a job killed at any time leaves a whole cache, and what else it left is overwritten by the next one.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save

from cocoedit_jax.data.records import TEXT_CACHE
from cocoedit_jax.data.text_identity import checked_identity, describe_difference
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import write_json

HEADER = "header.json"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Names of types in the bytes of a safetensors file; its NumPy reader does not know bfloat16.
_STORED = {"BF16": DTYPES["bfloat16"], "F32": DTYPES["float32"], "U8": np.dtype(np.uint8)}
KEY_BYTES = hashlib.sha256().digest_size
_PART_NAME = re.compile(r"part-(\d{5,})")


def cache_folder(data_dir: Path | str, max_length: int) -> Path:
    """Where the FLUX embeddings with `max_length` T5 tokens of a data folder lie."""
    return Path(data_dir) / TEXT_CACHE / f"flux-{max_length}"


def encode_command(folder: Path, max_length: int | None = None) -> str:
    """The command that makes, completes or repairs the cache in `folder`."""
    length = f" --max_length={max_length}" if max_length is not None else ""
    data_dir = shlex.quote(str(folder.parent.parent))
    return f"python -m launch.prepare_data --encode=flux --model=MODEL_DIR --out={data_dir}{length}"


@dataclass(frozen=True)
class Part:
    """One file of embeddings: its name without suffix, prompts in it, and its size in bytes."""

    name: str
    count: int
    bytes: int

    def records(self, folder: Path) -> Path:
        return folder / f"{self.name}.array_record"

    def keys(self, folder: Path) -> Path:
        return folder / f"{self.name}.keys.npy"

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the files as far as their sizes tell; records are checked when they are read."""
        path = self.records(folder)
        if not path.is_file():
            return f"{path}: no such file, though {HEADER} names it"
        if (size := path.stat().st_size) != self.bytes:
            return f"{path}: damaged: {size} bytes, expected {self.bytes}"
        try:
            self.read_keys(folder)
        except UserError as error:
            return str(error)
        return None

    def read_keys(self, folder: Path) -> list[bytes]:
        """`prompt_key` of each prompt in order. Raises UserError when the file is damaged."""
        path = self.keys(folder)
        try:
            keys = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged: {error}") from error
        if keys.dtype != np.uint8 or keys.shape != (self.count, KEY_BYTES):
            raise UserError(f"{path}: damaged: {keys.dtype} {keys.shape}, expected uint8 {(self.count, KEY_BYTES)}")
        flat = keys.tobytes()
        return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)]


@dataclass(frozen=True)
class Header:
    """What header.json says. `features` is D, `pooled_features` P; `dtype` is a key of `DTYPES`."""

    identity: Mapping[str, Any]
    max_length: int
    features: int
    pooled_features: int
    dtype: str
    parts: tuple[Part, ...] = ()

    def write(self, folder: Path) -> None:
        count = sum(part.count for part in self.parts)
        write_json(
            folder / HEADER,
            {
                "format_version": FORMAT_VERSION,
                "count": count,
                **asdict(self),
                "parts": [asdict(p) for p in self.parts],
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Header | None:
        """None where there is no header. Raises UserError when it is not one of this format."""
        path = folder / HEADER
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format_version"] != FORMAT_VERSION:
                raise UserError(f"{path}: format_version {value['format_version']!r}, expected {FORMAT_VERSION}")
            sizes = {name: value[name] for name in ("max_length", "features", "pooled_features")}
            parts = tuple(Part(**part) for part in value["parts"])
            numbers = [*sizes.values(), *(number for part in parts for number in (part.count, part.bytes))]
            names = [part.name for part in parts]
            if not all(type(number) is int and number > 0 for number in numbers) or value["dtype"] not in DTYPES:
                raise ValueError("sizes or dtype")
            if len(set(names)) < len(names) or not all(_PART_NAME.fullmatch(name) for name in names):
                raise ValueError("names of parts")
            identity = checked_identity(value["identity"], f"{path}: identity")
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the header of a text cache ({error!r})") from error
        return cls(identity, dtype=value["dtype"], parts=parts, **sizes)

    def refuse_other(self, folder: Path, identity: Mapping[str, Any] | None, max_length: int | None, dtype: str | None):
        """Raises UserError naming everything in which this cache differs from what is expected (None: anything)."""
        problems = []
        if identity is not None and (difference := describe_difference(self.identity, identity)):
            problems.append(f"made by text encoder {difference}")
        if max_length not in (None, self.max_length):
            problems.append(f"max_length {self.max_length}, expected {max_length}")
        if dtype not in (None, self.dtype):
            problems.append(f"dtype {self.dtype}, expected {dtype}")
        if problems:
            raise UserError(f"{folder}: {'; '.join(problems)}")


class TextCache:
    """Embeddings by prompt; safe to share between threads.

    Args:
        folder: see `cache_folder`.
        expected_identity: of the model's text encoders (`text_identity`); None accepts any.
        max_length: expected number of T5 tokens; None accepts any.

    Raises:
        UserError: there is no cache, it was made by other encoders or with another length, or parts are damaged.
    """

    def __init__(
        self, folder: Path | str, expected_identity: Mapping[str, Any] | None = None, max_length: int | None = None
    ):
        self._folder = Path(folder)
        header = Header.read(self._folder)
        if header is None or not header.parts:
            raise UserError(f"{self._folder}: no text cache; make it with: {encode_command(self._folder, max_length)}")
        header.refuse_other(self._folder, expected_identity, max_length, None)
        self.header = header
        damaged = [damage for part in header.parts if (damage := part.damage(self._folder))]
        if damaged:
            raise UserError("\n".join([*damaged, f"make them again with: {self._command()}"]))
        keys = [key for part in header.parts for key in part.read_keys(self._folder)]
        self._index = {key: position for position, key in enumerate(keys)}
        self._ends = list(itertools.accumulate(part.count for part in header.parts))
        # With the counts given, files are opened when they are first read.
        self._source = grain.sources.ArrayRecordDataSource(
            [f"{part.records(self._folder)}[0:{part.count}]" for part in header.parts]
        )

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, prompt: str) -> bool:
        return prompt_key(prompt) in self._index

    def check(self, prompts: Iterable[str]) -> None:
        """Raises UserError when any of `prompts` is not in the cache: how many, the first few, and what to do."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]
        if missing:
            first = ", ".join(repr(prompt) for prompt in missing[:3])
            raise UserError(
                f"{self._folder}: {len(missing)} prompt(s) not in the text cache: {first}"
                f"{', ...' if len(missing) > 3 else ''}; add them with: {self._command()}"
            )

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"text": [B, S, D], "pooled": [B, P]} in the cache's dtype. Raises UserError, see `check`."""
        if not prompts:
            raise UserError("prompts: none given, expected at least one")
        self.check(prompts)
        read = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        return {name: np.stack([read[prompt][name] for prompt in prompts]) for name in ("text", "pooled")}

    def _read(self, prompt: str) -> dict[str, np.ndarray]:
        key = prompt_key(prompt)
        position = self._index[key]
        header = self.header
        shapes = {"text": (header.max_length, header.features), "pooled": (header.pooled_features,)}
        try:
            tensors = unpack_record(self._source[position])
            if tensors["key"].tobytes() != key:
                raise ValueError("record of another prompt")
            for name, shape in shapes.items():
                if tensors[name].shape != shape or tensors[name].dtype != DTYPES[header.dtype]:
                    raise ValueError(f"{name} is {tensors[name].dtype} {tensors[name].shape}, expected {shape}")
        except Exception as error:  # the readers' own errors are bare RuntimeErrors and the like
            path = header.parts[bisect.bisect_right(self._ends, position)].records(self._folder)
            raise UserError(f"{path}: damaged ({error}); delete it, then run: {self._command()}") from error
        return tensors

    def _command(self) -> str:
        return encode_command(self._folder, self.header.max_length)


def prompt_key(prompt: str) -> bytes:
    """What a prompt is found by: the SHA-256 of its UTF-8 text, 32 bytes."""
    return hashlib.sha256(prompt.encode()).digest()


def pack_record(key: bytes, text: np.ndarray, pooled: np.ndarray) -> bytes:
    """One record: the bytes of a safetensors file."""
    tensors = {"text": text, "pooled": pooled, "key": np.frombuffer(key, np.uint8)}
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def unpack_record(record: bytes) -> dict[str, np.ndarray]:
    """Inverse of `pack_record`; the arrays are read-only."""
    return {
        name: np.frombuffer(stored["data"], _STORED[stored["dtype"]]).reshape(stored["shape"])
        for name, stored in safetensors.deserialize(record)
    }
