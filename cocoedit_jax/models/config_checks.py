"""Reading a model's ``config.json``: what cannot be used is refused, all of it at once."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cocoedit_jax.errors import UserError


def refuse(source: str, problems: list[str]) -> None:
    """Raises UserError with all ``problems`` of ``source``, if there are any."""
    if problems:
        raise UserError(f"{source}: {len(problems)} value(s) cannot be used:\n  " + "\n  ".join(problems))


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_values(
    raw: Mapping[str, Any],
    source: str,
    *,
    class_name: str,
    defaults: Mapping[str, Any],
    ignored: Collection[str],
    problems_of: Callable[[Mapping[str, Any]], list[str]],
) -> dict[str, Any]:
    """The fields of a configuration from the contents of diffusers' ``config.json``.

    Args:
        raw: the file's contents; keys with a leading underscore are diffusers' own.
        source: names the file in errors.
        class_name: diffusers' class.
        defaults: {key: what diffusers takes where the file does not have it}, of every field.
        ignored: keys that change no number here.
        problems_of: what is wrong with a whole set of fields, a line each.

    Raises:
        UserError: naming every unknown key and every value that cannot be used.
    """
    given = {k: v for k, v in raw.items() if not k.startswith("_") and k not in ignored}
    values = dict(defaults) | {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in defaults}
    problems = problems_of(values)
    if raw.get("_class_name", class_name) != class_name:
        problems.append(f"_class_name={raw['_class_name']!r}; expected {class_name!r}")
    problems += [f"{k}={given[k]!r}; unknown key" for k in given if k not in defaults]
    refuse(source, problems)
    return values
