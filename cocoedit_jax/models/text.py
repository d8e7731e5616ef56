"""The text side of an editor: what training and inference need of text encoders, and the quickstart's small one.

The quickstart's is an embedding table over words in the place of CLIP and T5. Each token embedding sums a table of the
word, a table of the word before it (which binds "blue" to "circle" without a recurrent encoder) and a table of its
position.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models.layers import partitioned

Array = jax.Array


class TextSide(Protocol):
    """Instructions -> states ``[B, S, D]`` and pooled vector ``[B, P]``, in a host part and a jitted one."""

    def inputs(self, prompts: Sequence[str]) -> Any:
        """A tree of host arrays that lead with B. Raises ValueError for an instruction that cannot be used."""
        ...

    def fault(self, prompt: str) -> str | None:
        """Why an instruction cannot be used, or None if it can."""
        ...

    @property
    def remedy(self) -> str:
        """What to do about faults, or an empty string."""
        ...

    def encode(self, params: Any, inputs: Any) -> tuple[Array, Array]: ...

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

    def inputs(self, prompts: Sequence[str]) -> np.ndarray:
        return self.tokenizer(prompts)

    def fault(self, prompt: str) -> str | None:
        return self.tokenizer.fault(prompt)

    def encode(self, params: Any, inputs: Array) -> tuple[Array, Array]:
        out: Any = self.encoder.apply({"params": params}, inputs)
        return out

    def init(self, key: Array) -> Any:
        return self.encoder.init(key, jnp.zeros((1, self.tokenizer.max_length), jnp.int32))["params"]


@dataclasses.dataclass(frozen=True)
class PrecomputedText:
    """States that other encoders made: read from a cache, or computed by ``torch_bridge`` before sampling starts.

    Attributes:
        lookup: prompts -> ``{"text": [B, S, D], "pooled": [B, P]}``, host arrays.
        has: whether ``lookup`` knows a prompt.
        remedy: what to do about prompts that it does not know.
    """

    lookup: Callable[[Sequence[str]], Mapping[str, np.ndarray]]
    has: Callable[[str], bool]
    remedy: str = ""

    @classmethod
    def of(cls, table: Mapping[str, Mapping[str, np.ndarray]]) -> "PrecomputedText":
        """From ``{prompt: {"text": [S, D], "pooled": [P]}}``."""

        def lookup(prompts: Sequence[str]) -> dict[str, np.ndarray]:
            return {name: np.stack([table[prompt][name] for prompt in prompts]) for name in ("text", "pooled")}

        return cls(lookup, table.__contains__)

    def inputs(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return dict(self.lookup(prompts))

    def fault(self, prompt: str) -> str | None:
        return None if self.has(prompt) else f"prompt {prompt!r} is not in the text cache"

    def encode(self, params: Any, inputs: Mapping[str, Array]) -> tuple[Array, Array]:
        return inputs["text"], inputs["pooled"]

    def init(self, key: Array) -> Any:
        return {}
