"""The text side of an editor: what training and inference need of text encoders, and the quickstart's small one.

The quickstart's is an embedding table over words in the place of CLIP and T5. Each token embedding sums a table of the
word, a table of the word before it (which binds "blue" to "circle" without a recurrent encoder) and a table of its
position.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models.layers import partitioned

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What a text side is asked about.

    Attributes:
        prompt: the instruction.
        image: name of the source picture, its path relative to the data folder ("" where there is none): some text
            encoders see the picture too.
        pixels: the source as the editor sees it, float32 ``[H, W, 3]`` in [0, 1]; None before it is loaded.
    """

    prompt: str
    image: str = ""
    pixels: np.ndarray | None = None


def instructions(batch: Mapping[str, Any]) -> list[Instruction]:
    """Of loaded records: ``prompt``, ``image_name`` and ``image``, as in ``data.source``."""
    return [Instruction(*row) for row in zip(batch["prompt"], batch["image_name"], batch["image"], strict=True)]


class TextStates(NamedTuple):
    """What a text side gives a transformer."""

    states: Array  # [B, S, D]
    pooled: Array | None = None  # [B, P], for models that take one
    mask: Array | None = None  # bool [B, S], False where a state is padding; None: all count


class TextSide(Protocol):
    """Instructions -> states, in a host part and a jitted one."""

    def inputs(self, instructions: Sequence[Instruction]) -> Any:
        """A tree of host arrays that lead with B. Raises ValueError for an instruction that cannot be used."""
        ...

    def fault(self, instruction: Instruction) -> str | None:
        """Why an instruction cannot be used, or None if it can; asked before any picture is loaded."""
        ...

    @property
    def remedy(self) -> str:
        """What to do about faults, or an empty string."""
        ...

    def encode(self, params: Any, inputs: Any) -> TextStates: ...

    def init(self, key: Array) -> Any:
        """Fresh parameters, boxed with logical axis names; ``{}`` if there are none."""
        ...


PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+")


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Lower-cased words to ids; 0 pads, 1 stands for any word outside ``vocabulary``.

    Raises:
        ValueError: from ``__call__``, when an instruction has no word or more than ``max_length`` words.
    """

    vocabulary: tuple[str, ...]
    max_length: int

    @property
    def num_ids(self) -> int:
        return len(self.vocabulary) + 2

    def fault(self, prompt: str) -> str | None:
        """Why ``prompt`` cannot be used, or None if it can."""
        count = len(_WORD.findall(prompt.lower()))
        if 0 < count <= self.max_length:
            return None
        return f"prompt {prompt!r} has {count} words; expected 1 to {self.max_length}"

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids ``[B, max_length]``, int32."""
        index = {word: i + 2 for i, word in enumerate(self.vocabulary)}
        out = np.full((len(prompts), self.max_length), PAD, np.int32)
        for row, prompt in enumerate(prompts):
            words = _WORD.findall(prompt.lower())
            if fault := self.fault(prompt):
                raise ValueError(fault)
            out[row, : len(words)] = [index.get(word, UNKNOWN) for word in words]
        return out


class TableTextEncoder(nn.Module):
    """Ids ``[B, S]`` -> encoder states ``[B, S, features]`` and pooled ``[B, pooled_features]``."""

    num_ids: int
    max_length: int
    features: int
    pooled_features: int

    @nn.compact
    def __call__(self, ids: Array) -> tuple[Array, Array]:
        init = nn.initializers.normal(1.0)

        def table(name: str, rows: int, features: int) -> Array:
            return self.param(name, partitioned(init, (None, None)), (rows, features), jnp.float32)

        previous = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
        states = (
            table("word", self.num_ids, self.features)[ids]
            + table("previous_word", self.num_ids, self.features)[previous]
            + table("position", self.max_length, self.features)[None]
        )
        valid = (ids != PAD).astype(jnp.float32)[..., None]
        pooled = jnp.sum(table("pooled", self.num_ids, self.pooled_features)[ids] * valid, axis=1)
        return states, pooled / jnp.sqrt(jnp.maximum(jnp.sum(valid, axis=1), 1.0))


@dataclasses.dataclass(frozen=True)
class WordTable:
    """The quickstart's text side."""

    tokenizer: WordTokenizer
    encoder: TableTextEncoder
    remedy: str = ""

    def inputs(self, instructions: Sequence[Instruction]) -> np.ndarray:
        return self.tokenizer([instruction.prompt for instruction in instructions])

    def fault(self, instruction: Instruction) -> str | None:
        return self.tokenizer.fault(instruction.prompt)

    def encode(self, params: Any, inputs: Array) -> TextStates:
        out: Any = self.encoder.apply({"params": params}, inputs)
        return TextStates(*out)

    def init(self, key: Array) -> Any:
        return self.encoder.init(key, jnp.zeros((1, self.tokenizer.max_length), jnp.int32))["params"]


@dataclasses.dataclass(frozen=True)
class PrecomputedText:
    """States that other encoders made: read from a cache, or computed by ``torch_bridge`` before sampling starts.

    Attributes:
        lookup: instructions -> ``{"text": [B, S, D], "pooled": [B, P], "mask": [B, S]}``, host arrays; the last two
            only where the model takes them.
        has: whether ``lookup`` knows an instruction.
        remedy: what to do about those that it does not know.
    """

    lookup: Callable[[Sequence[Instruction]], Mapping[str, np.ndarray]]
    has: Callable[[Instruction], bool]
    remedy: str = ""

    @classmethod
    def of(cls, table: Mapping[str, Mapping[str, np.ndarray]]) -> "PrecomputedText":
        """From ``{prompt: {"text": [S, D], "pooled": [P]}}``, whose arrays are of one shape."""

        def lookup(instructions: Sequence[Instruction]) -> dict[str, np.ndarray]:
            rows = [table[instruction.prompt] for instruction in instructions]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

        return cls(lookup, lambda instruction: instruction.prompt in table)

    def inputs(self, instructions: Sequence[Instruction]) -> dict[str, np.ndarray]:
        return dict(self.lookup(instructions))

    def fault(self, instruction: Instruction) -> str | None:
        if self.has(instruction):
            return None
        of = f" of {instruction.image}" if instruction.image else ""
        return f"prompt {instruction.prompt!r}{of} is not in the text cache"

    def encode(self, params: Any, inputs: Mapping[str, Array]) -> TextStates:
        return TextStates(inputs["text"], inputs.get("pooled"), inputs.get("mask"))

    def init(self, key: Array) -> Any:
        return {}
