"""What the server needs of a model: prompts prepared one by one, completed in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Message:
    """`role`: system, user or assistant; `parts`: texts and RGB pictures in order."""

    role: str
    parts: tuple[str | Image.Image, ...]

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if isinstance(part, Image.Image)]

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]


@dataclass(frozen=True)
class Sampling:
    """Greedy decoding of up to `max_tokens` tokens.

    `top_logprobs`: candidates to report at each place, None for no log-probabilities at all; `token_ids`, if any, are
    reported instead of the most probable.
    """

    max_tokens: int = 1
    top_logprobs: int | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt as its model prepared it, and its length in tokens, those of pictures included."""

    inputs: Any
    tokens: int


@dataclass(frozen=True)
class TokenChoice:
    """A generated token with its natural-log probability before temperature, and the candidates at its place: most
    probable first, or the generated token and then the ids that were asked for.
    """

    token_id: int
    logprob: float
    candidates: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """`finish_reason`: "stop" at an end token (which is not in `text` but in `choices`), else "length"."""

    choices: tuple[TokenChoice, ...]
    text: str
    finish_reason: str


class PromptError(ValueError):
    """Messages that a model cannot be given; the text says which and why."""


class ChatModel(Protocol):
    """`prepare` may be called from several threads at once; `load` and `complete` from one."""

    vocabulary_size: int
    max_tokens: int  # the longest prompt and completion together
    digits: frozenset[int]  # ids of the tokens "0" to "5", alone or after a space

    def load(self) -> None:
        """Takes the weights into memory. Raises UserError."""
        ...

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Raises PromptError."""
        ...

    def complete(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[Completion]:
        """One completion each; a fault may be of any type, and is of the whole batch."""
        ...

    def token(self, token_id: int) -> str:
        """The text of one token."""
        ...
