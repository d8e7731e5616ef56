"""What a vision-language judge is asked: question templates, read from files."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat_protocol import image_part, text_part, user_message

# How the scores of several questions become one.
COMBINE = {
    "min": lambda scores: min(scores),
    "mean": lambda scores: float(np.mean(scores)),
    "product": lambda scores: float(np.prod(scores)),
    "geometric": lambda scores: float(np.prod(scores) ** (1 / len(scores))),
}
_PLACE = re.compile(r"\{(\w+)\}")
_FOLDER = resources.files("cocoedit_jax.rewards") / "prompts"


@dataclass(frozen=True)
class JudgePrompt:
    """``before`` and ``after`` head the source and the edited image; ``questions``: name -> text with places in braces,
    ``{instruction}`` or the name of a further field of the record. ``digest`` identifies the wording.
    """

    name: str
    before: str
    after: str
    questions: Mapping[str, str]
    combine: str
    digest: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Further fields of a record that the questions need."""
        places = dict.fromkeys(p for text in self.questions.values() for p in _PLACE.findall(text))
        return tuple(place for place in places if place != "instruction")

    def fault(self, extra: Mapping[str, Any]) -> str | None:
        """Why a record with these further fields cannot be asked about."""
        for name in self.fields:
            if not isinstance(extra.get(name), str) or not extra[name].strip():
                return f"field {name!r} is {extra.get(name)!r}; expected text, for the judge's prompt {self.name!r}"
        return None

    def ask(self, question: str, instruction: str, extra: Mapping[str, Any]) -> str:
        """The text of a question. Raises ValueError for a field that is missing."""
        fault = self.fault(extra)
        if fault:
            raise ValueError(fault)
        values = {**extra, "instruction": instruction}
        # In one pass: braces in an instruction are no places.
        return _PLACE.sub(lambda match: str(values[match[1]]), self.questions[question])

    def messages(self, source: bytes, edited: bytes, text: str, format: str) -> list[dict[str, Any]]:
        """Named parts, the source first: what the edits of one source share comes before what differs, so that a
        server can reuse it. ``source`` and ``edited`` are image files of ``format``.
        """
        parts = [
            text_part(self.before), image_part(source, format), text_part(self.after), image_part(edited, format),
            text_part(text),
        ]  # fmt: skip
        return [user_message(*parts)]


def prompt_names() -> list[str]:
    """The prompts that come with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))


def load_prompt(name: str) -> JudgePrompt:
    """A prompt of the package by name, or of a .json file of the same form.

    Raises:
        UserError: there is none, or it cannot be used; every fault of the file is named.
    """
    file = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
    if "/" in name.removesuffix(".json") and not name.endswith(".json") or not file.is_file():
        raise UserError(f"template: {name!r} given, expected one of {', '.join(prompt_names())}, or a .json file")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"template: {file} cannot be read ({error})") from error
    problems = _problems(data)
    if problems:
        raise UserError("\n".join(f"template: {file}: {problem}" for problem in problems))
    questions = {key: _text(value) for key, value in data["questions"].items()}
    shown = json.dumps([data["before"], data["after"], questions, data["combine"]])
    digest = hashlib.sha256(shown.encode()).hexdigest()[:16]
    return JudgePrompt(name, data["before"], data["after"], questions, data["combine"], digest)


def _text(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else "\n".join(value)


def _problems(data: Any) -> list[str]:
    if not isinstance(data, dict):
        return [f"a JSON {type(data).__name__}, expected an object"]
    problems = [
        f"field {key!r} is {data.get(key)!r}, expected text"
        for key in ("before", "after")
        if not isinstance(data.get(key), str) or not data[key].strip()
    ]
    if not isinstance(data.get("combine"), str) or data["combine"] not in COMBINE:
        problems.append(f"field 'combine' is {data.get('combine')!r}, expected one of {', '.join(COMBINE)}")
    questions = data.get("questions")
    if not isinstance(questions, dict) or not questions:
        return [*problems, f"field 'questions' is {questions!r}, expected an object of question names and texts"]
    for key, value in questions.items():
        lines = [value] if isinstance(value, str) else value
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            problems.append(f"question {key!r} is {value!r}, expected text or a list of lines")
        elif "{instruction}" not in _text(lines):
            problems.append(f"question {key!r} has no {{instruction}}")
    return problems
