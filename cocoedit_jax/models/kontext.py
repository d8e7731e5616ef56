"""FLUX.1 Kontext from a model folder in diffusers' layout: the editor, its frozen parameters, picture sizes."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import orbax_weights
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig
from cocoedit_jax.models.editor import KontextEditor
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.text import TextSide

# (height, width) in pixels, about one megapixel each, that FLUX.1 Kontext was trained on (model card).
PREFERRED_SIZES = tuple(
    (h, w)
    for w, h in (
        (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
        (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
        (1568, 672),
    )
)  # fmt: skip
MAX_AREA = 1024**2  # pixels of an edit whose size is not given
# diffusers' scheduler field -> argument of ``flow.schedule.flow_match_sigmas``.
_SCHEDULE = {
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_seq_len",
    "max_image_seq_len": "max_seq_len",
    "shift_terminal": "shift_terminal",
}


def preferred_size(height: int, width: int, unit: int = 16) -> tuple[int, int]:
    """The preferred (height, width) with the nearest aspect ratio, as diffusers chooses it for the source image: the
    ratio is taken after both sides are cut to multiples of ``unit``."""
    aspect = (width // unit * unit or width) / (height // unit * unit or height)
    return min(PREFERRED_SIZES, key=lambda size: (abs(aspect - size[1] / size[0]), size[1], size[0]))


def fitted_size(height: int, width: int, unit: int, max_area: int = MAX_AREA) -> tuple[int, int]:
    """(height, width) of about ``max_area`` pixels with the aspect ratio of ``height`` x ``width``, cut to multiples of
    ``unit``: diffusers' formula, applied to the picture's ratio where its pipeline starts from 1024x1024."""
    aspect = width / height
    sides = round(math.sqrt(max_area / aspect)), round(math.sqrt(max_area * aspect))
    return sides[0] // unit * unit, sides[1] // unit * unit


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


def build_kontext(
    folder: Path,
    text: TextSide,
    *,
    dtype: Any = jnp.bfloat16,
    vae_dtype: Any = jnp.float32,
    vae_tile: int | None = None,
    remat: str = "none",
    attention_backend: str = "auto",
    guidance: float = 2.5,
    shards: int = 1,
) -> KontextEditor:
    """The editor of the model in ``folder``; parameters are held outside.

    Args:
        folder: diffusers' layout: ``transformer/config.json``, ``vae/config.json``, ``scheduler/``.
        text: where embeddings come from.
        dtype: of the transformer's weights and activations.
        vae_dtype: of the autoencoder's.
        vae_tile: side in pixels of the tiles in which larger pictures are decoded; None decodes exactly.
        guidance: embedded guidance scale.
        shards: number of devices that a batch is split over.

    Raises:
        UserError: a configuration file is missing or asks for something that is not implemented.
    """
    paths = {name: folder / name for name in ("transformer", "vae")}
    try:
        shape = FluxConfig.from_diffusers(orbax_weights.read_config(paths["transformer"]))
    except UserError as error:
        raise UserError(f"{paths['transformer']}: {error}") from error
    vae = AutoencoderKLConfig.from_dict(orbax_weights.read_config(paths["vae"]), str(paths["vae"]))
    editor = KontextEditor(
        transformer=FluxTransformer(shape, dtype=dtype, remat=remat, attention_backend=attention_backend),
        # Its one head of 512 features is beyond what most attention kernels take: it chooses for itself.
        autoencoder=AutoencoderKL(vae, vae_dtype, shards=shards, tile_size=vae_tile),
        text=text,
        guidance=guidance,
        schedule=read_schedule(folder),
    )
    if editor.token_channels != shape.in_channels:
        raise UserError(
            f"{paths['vae']}: {vae.latent_channels} latent channels pack to {editor.token_channels} per token; "
            f"{paths['transformer']} expects in_channels={shape.in_channels}"
        )
    return editor


def load_params(folder: Path, abstract: Any) -> Any:
    """The frozen parameters, read straight into arrays placed as ``abstract`` says.

    Args:
        folder: the model's.
        abstract: shapes with shardings: ``sharding.rules.sharded_shapes`` of ``editor.abstract()``.

    Raises:
        UserError: files or tensors that are missing or do not fit, all together.
    """
    return {
        "transformer": orbax_weights.load_params(folder / "transformer", abstract["transformer"]),
        "autoencoder": orbax_weights.load_params(folder / "vae", abstract["autoencoder"]),
        "text": {},
    }
