"""A text side small enough to train on a laptop: an embedding table over words.

It fills the place of CLIP and T5 in the quickstart. Each token embedding sums a table of the word, a table of the word
before it (which binds "blue" to "circle" without a recurrent encoder) and a table of its position.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models.layers import partitioned

Array = jax.Array

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

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Ids ``[B, max_length]``, int32."""
        index = {word: i + 2 for i, word in enumerate(self.vocabulary)}
        out = np.full((len(prompts), self.max_length), PAD, np.int32)
        for row, prompt in enumerate(prompts):
            words = _WORD.findall(prompt.lower())
            if not 0 < len(words) <= self.max_length:
                raise ValueError(f"prompt {prompt!r} has {len(words)} words; expected 1 to {self.max_length}")
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
