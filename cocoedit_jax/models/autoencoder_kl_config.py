"""Shape of FLUX's autoencoder, read from diffusers' ``vae/config.json`` and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cocoedit_jax.models.config_checks import is_count, is_number, read_values, refuse

CLASS_NAME = "AutoencoderKL"
DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"

# What diffusers takes for a key that the file does not have.
DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": (DOWN_BLOCK,),
    "up_block_types": (UP_BLOCK,),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# They change no number here: sample_size is diffusers' default tile, force_upcast its default dtype.
_IGNORED = ("sample_size", "force_upcast")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Shape of the network, named as in diffusers' ``vae/config.json``. Defaults are FLUX.1's.

    Raises:
        UserError: naming every field that is not usable, its value and what is expected.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN_BLOCK,) * 4
    up_block_types: tuple[str, ...] = (UP_BLOCK,) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        refuse("AutoencoderKLConfig", _problems(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> "AutoencoderKLConfig":
        """From the contents of diffusers' ``vae/config.json``; ``source`` names the file in errors.

        Raises:
            UserError: naming every unknown key and every value that is not implemented.
        """
        values = read_values(
            raw, source, class_name=CLASS_NAME, defaults=DIFFUSERS_DEFAULTS, ignored=_IGNORED, problems_of=_problems
        )
        return cls(**values)


def _problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields of a configuration, one line each."""
    out = []

    def check(name: str, ok: bool, expected: str) -> None:
        if not ok:
            out.append(f"{name}={values[name]!r}; expected {expected}")

    for name in ("layers_per_block", "latent_channels", "norm_num_groups"):
        check(name, is_count(values[name]), "a whole number, at least 1")
    for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        check(name, isinstance(values[name], bool), "true or false")
    for name in ("in_channels", "out_channels"):
        check(name, values[name] == 3, "3 (red, green, blue)")
    check("act_fn", values["act_fn"] == "silu", "'silu'")
    for name in ("latents_mean", "latents_std"):
        check(name, values[name] is None, "null (latents are scaled by scaling_factor and shift_factor)")
    check("scaling_factor", is_number(values["scaling_factor"]) and values["scaling_factor"] != 0, "a number but 0")
    check("shift_factor", values["shift_factor"] is None or is_number(values["shift_factor"]), "a number or null")
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    if not (isinstance(channels, tuple) and channels and all(is_count(c) for c in channels)):
        check("block_out_channels", False, "a tuple (in JSON a list) of whole numbers, at least 1")
        return out
    if is_count(groups):
        check("block_out_channels", all(c % groups == 0 for c in channels), f"multiples of norm_num_groups={groups}")
    for name, block in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
        check(name, values[name] == (block,) * len(channels), f"{len(channels)} times {block!r}, one per block")
    return out
