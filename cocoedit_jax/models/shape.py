"""Reading a transformer's shape from diffusers' ``config.json``: what the models' configuration classes share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.config_checks import is_count

Check = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is that
Checks = dict[str, Check]
T = TypeVar("T")


SIZE: Check = ("a positive whole number", is_count)
COUNT: Check = ("a whole number", lambda x: x == 0 or is_count(x))
SIZES: Check = ("a list of whole numbers", lambda x: isinstance(x, list | tuple) and all(map(is_count, x)))
FLAG: Check = ("true or false", lambda x: isinstance(x, bool))


def exactly(*values: Any) -> Check:
    """One of ``values``, of the same type."""
    names = " or ".join("null" if value is None else str(value).lower() for value in values)
    return names, lambda x: any(type(x) is type(value) and x == value for value in values)


def check_rope(axes_dims_rope: tuple[int, ...], attention_head_dim: int) -> None:
    """Raises ValueError unless the rotary dimensions fill a head."""
    if sum(axes_dims_rope) != attention_head_dim:
        raise ValueError(
            f"axes_dims_rope={axes_dims_rope} sums to {sum(axes_dims_rope)}; "
            f"expected attention_head_dim={attention_head_dim}"
        )


def from_diffusers(
    cls: Callable[..., T], class_name: str, raw: Mapping[str, Any], checks: Checks, unused: tuple[str, ...] = ()
) -> T:
    """``cls`` with the values of a ``config.json``.

    Args:
        cls: the configuration class; raises ValueError for values that do not go together.
        class_name: diffusers' name of the model.
        raw: the file; keys that start with an underscore are its own.
        checks: of every key that the model knows.
        unused: keys that are checked, and no arguments of ``cls``.

    Raises:
        UserError: naming all keys that are unknown, or have values that this model cannot take.
    """
    given = {key: value for key, value in raw.items() if not key.startswith("_")}
    problems = [f"{key}={value!r}: not an option of this model" for key, value in given.items() if key not in checks]
    problems += [
        f"{key}={given[key]!r}: expected {expected}"
        for key, (expected, accepts) in checks.items()
        if key in given and not accepts(given[key])
    ]
    if raw.get("_class_name", class_name) != class_name:
        problems.append(f"_class_name={raw['_class_name']!r}: expected {class_name!r}")
    if not problems:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k not in unused}
        try:
            return cls(**values)
        except ValueError as error:
            problems = [str(error)]
    raise UserError(f"configuration of a {class_name}: " + "; ".join(problems))
