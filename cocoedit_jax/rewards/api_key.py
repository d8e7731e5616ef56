"""An API key: read from the environment or a file, and kept out of everything that is shown."""

import os
import re
from pathlib import Path

from cocoedit_jax.errors import UserError


class Secret:
    """An API key that does not show itself."""

    def __init__(self, value: str):
        self.value = value

    def __repr__(self) -> str:
        return "<key>" if self.value else "<no key>"

    def hide(self, text: str) -> str:
        """``text`` without the key, should a server repeat it."""
        return text.replace(self.value, "<key>") if self.value else text

    def hide_bytes(self, raw: bytes) -> bytes:
        """As ``hide``; before a reply is shortened, which could leave a part of the key."""
        return raw.replace(self.value.encode(), b"<key>") if self.value else raw


def read_key(key_env: str = "", key_file: str = "") -> str:
    """The API key from an environment variable or a file; empty when neither is named.

    Raises:
        UserError: both are named, or the one that is holds no key.
    """
    if key_env and key_file:
        raise UserError(f"key_env={key_env!r} and key_file={key_file!r}: expected at most one of them")
    if key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_env):
        # Not shown: it may be the key.
        raise UserError("key_env: expected the name of an environment variable, not the key itself")
    if key_env:
        key, where = os.environ.get(key_env, "").strip(), f"key_env: the environment variable {key_env}"
    elif key_file:
        where = f"key_file: {key_file}"
        try:
            key = Path(key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({type(error).__name__})") from error
    else:
        return ""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where} is {'not one word' if key else 'empty or not set'}; expected an API key")
    return key
