"""Shape of Qwen-Image's autoencoder, read from diffusers' ``vae/config.json`` and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cocoedit_jax.models.config_checks import is_count, is_number, read_values, refuse

CLASS_NAME = "AutoencoderKLQwenImage"
_IGNORED = ("dropout",)  # of training the autoencoder


@dataclasses.dataclass(frozen=True)
class AutoencoderQwenConfig:
    """Shape of the network, named (and spelt) as in diffusers' ``vae/config.json``. Defaults are Qwen-Image's, which
    diffusers takes too for keys that a file does not have.

    Raises:
        UserError: naming every field that is not usable, its value and what is expected.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    input_channels: int = 3
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self) -> None:
        refuse("AutoencoderQwenConfig", _problems(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> "AutoencoderQwenConfig":
        """From the contents of diffusers' ``vae/config.json``; ``source`` names the file in errors.

        Raises:
            UserError: naming every unknown key and every value that is not implemented.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values = read_values(
            raw, source, class_name=CLASS_NAME, defaults=defaults, ignored=_IGNORED, problems_of=_problems
        )
        return cls(**values)


def _problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields of a configuration, one line each."""
    out = []

    def check(name: str, ok: bool, expected: str) -> None:
        if not ok:
            out.append(f"{name}={values[name]!r}; expected {expected}")

    # The decoder halves the channels wherever it doubles the size.
    check("base_dim", is_count(values["base_dim"]) and values["base_dim"] > 1, "a whole number, at least 2")
    for name in ("z_dim", "num_res_blocks"):
        check(name, is_count(values[name]), "a whole number, at least 1")
    check("attn_scales", values["attn_scales"] == (), "an empty list (attention in the middle block only)")
    check("input_channels", values["input_channels"] == 3, "3 (red, green, blue)")
    multipliers = values["dim_mult"]
    shaped = isinstance(multipliers, tuple) and len(multipliers) > 0 and all(map(is_count, multipliers))
    check("dim_mult", shaped, "a tuple (in JSON a list) of whole numbers, at least 1")
    steps = len(multipliers) - 1 if shaped else None
    flags = values["temperal_downsample"]
    check(
        "temperal_downsample",
        isinstance(flags, tuple) and all(isinstance(x, bool) for x in flags) and steps in (None, len(flags)),
        f"{'' if steps is None else f'{steps} '}times true or false, one fewer than dim_mult",
    )
    for name, positive in (("latents_mean", False), ("latents_std", True)):
        numbers = values[name]
        ok = isinstance(numbers, tuple) and all(is_number(x) and (x > 0 or not positive) for x in numbers)
        count = values["z_dim"] if is_count(values["z_dim"]) else None
        kind = "positive number" if positive else "number"
        check(name, ok and count in (None, len(numbers)), f"one {kind} per channel of a latent (z_dim={count})")
    return out
