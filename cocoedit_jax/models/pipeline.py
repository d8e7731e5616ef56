"""What the models share of a folder in diffusers' layout: the schedule, the frozen parameters, building an editor."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import orbax_weights
from cocoedit_jax.models.editor import Editor

# diffusers' scheduler field -> argument of ``flow.schedule.flow_match_sigmas``.
_SCHEDULE = {
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_seq_len",
    "max_image_seq_len": "max_seq_len",
    "shift_terminal": "shift_terminal",
}


def read_schedule(folder: Path) -> tuple[tuple[str, Any], ...]:
    """Arguments of the sigma schedule from ``scheduler/scheduler_config.json``.

    Raises:
        UserError: the file is missing, or asks for a schedule other than the dynamically shifted one.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}); expected the scheduler's configuration, as JSON") from error
    wanted = {"use_dynamic_shifting": True, "time_shift_type": "exponential", "invert_sigmas": False}
    wanted |= {f"use_{name}_sigmas": False for name in ("karras", "exponential", "beta")}
    problems = [
        f"{key} is {config[key]!r}; expected {value!r}"
        for key, value in wanted.items()
        if key in config and bool(config[key] != value)
    ]
    if not config.get("use_dynamic_shifting", False):
        problems.append("use_dynamic_shifting is absent or false; expected true")
    if problems:
        raise UserError(f"{path}: " + "; ".join(dict.fromkeys(problems)))
    return tuple((ours, config[theirs]) for theirs, ours in _SCHEDULE.items() if config.get(theirs) is not None)


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How the editor of a published model is built, whichever model it is.

    Attributes:
        dtype: of the transformer's weights and activations.
        vae_dtype: of the autoencoder's.
        vae_tile: side in pixels of the tiles in which larger pictures are decoded; None decodes exactly.
        remat: name in ``blocks.REMAT_POLICIES``.
        attention_backend: of the transformer.
        quantize: format of the transformer's kernels (``quantize.FORMATS``); empty: ``dtype``.
    """

    dtype: Any = jnp.bfloat16
    vae_dtype: Any = jnp.float32
    vae_tile: int | None = None
    remat: str = "none"
    attention_backend: str = "auto"
    quantize: str = ""

    @property
    def transformer(self) -> dict[str, Any]:
        """Arguments of the transformer's class."""
        return {"dtype": self.dtype, "remat": self.remat, "attention_backend": self.attention_backend}


def read_part(folder: Path, part: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """``parse`` of FOLDER/PART/config.json. Raises UserError that names the file."""
    path = folder / part
    raw = orbax_weights.read_config(path)
    try:
        return parse(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_components(
    folder: Path, editor: Editor, check_autoencoder: Callable[[Path, Any], object] = orbax_weights.check_params
) -> None:
    """Whether the weights of ``transformer`` and ``vae`` are there and fit ``editor``, from their headers and metadata:
    nothing is read beyond them, and no array is made.

    Args:
        editor: with all layers of the transformer (none computed beforehand).
        check_autoencoder: (folder, shapes) of the model's own form; raises UserError.

    Raises:
        UserError: what loading would refuse of either, both together.
    """
    abstract, faults = nn.unbox(editor.abstract()), []
    for part, name, check in (
        ("transformer", "transformer", orbax_weights.check_params),
        ("vae", "autoencoder", check_autoencoder),
    ):
        try:
            check(folder / part, abstract[name])
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def check_channels(editor: Editor, folder: Path, in_channels: int) -> None:
    """Raises UserError if the autoencoder's latents do not pack to the tokens that the transformer takes."""
    if editor.token_channels != in_channels:
        raise UserError(
            f"{folder / 'vae'}: {editor.autoencoder.channels} latent channels pack to {editor.token_channels} per "
            f"token; {folder / 'transformer'} expects in_channels={in_channels}"
        )
