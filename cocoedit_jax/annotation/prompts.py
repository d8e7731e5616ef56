"""The texts that the models are asked with: one file each, with $placeholders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from cocoedit_jax.errors import UserError

# Name of the file (.txt) -> placeholders that it may use.
PLACEHOLDERS = {
    "classify": {"instruction", "edit_types"},
    "box": {"instruction", "edit_type"},
    "box_add": {"instruction", "edit_type"},
    "rewrite": {"instruction", "edit_type"},
    "clarity": {"instruction", "edit_type"},
    "mask_accuracy": {"instruction", "edit_type"},
    "prominence": {"instruction", "edit_type"},
}


@dataclass(frozen=True)
class Prompts:
    texts: Mapping[str, str]

    def fill(self, name: str, **values: str) -> str:
        return Template(self.texts[name]).substitute(values).strip()

    def hashes(self) -> dict[str, str]:
        """Which texts these are, for the manifest."""
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in self.texts.items()}


def load_prompts(folder: str = "") -> Prompts:
    """The package's prompts, replaced by those that `folder` has.

    Raises:
        UserError: the folder is missing, or one of its files is unknown, empty or has other placeholders.
    """
    package = resources.files("cocoedit_jax.annotation") / "prompts"
    texts = {name: (package / f"{name}.txt").read_text(encoding="utf-8") for name in PLACEHOLDERS}
    if not folder:
        return Prompts(texts)
    if not Path(folder).is_dir():
        raise UserError(f"config.models.prompts: no folder {folder!r}")
    for path in sorted(Path(folder).glob("*.txt")):
        if path.stem not in PLACEHOLDERS:
            raise UserError(f"{path}: no such prompt; expected {', '.join(f'{name}.txt' for name in PLACEHOLDERS)}")
        text = path.read_text(encoding="utf-8")
        template, allowed = Template(text), PLACEHOLDERS[path.stem]
        if not template.is_valid() or not set(template.get_identifiers()) <= allowed or not text.strip():
            names = ", ".join(f"${name}" for name in sorted(allowed))
            raise UserError(f"{path}: expected a text with no other placeholders than {names} (a dollar sign is $$)")
        texts[path.stem] = text
    return Prompts(texts)
