"""Qwen-Image-Edit (base, 2509, 2511) from a model folder in diffusers' layout: the editor and its frozen parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models import autoencoder_qwen_weights, modulation, orbax_weights
from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.editor import Conditioning, Editor, Grid, Params, Size
from cocoedit_jax.models.layers import MODULATION
from cocoedit_jax.models.pipeline import BuildOptions, check_channels, check_components, read_part, read_schedule
from cocoedit_jax.models.qwen import SIGMA_TOLERANCE, QwenConfig, QwenTransformer, position_ids
from cocoedit_jax.models.text import TextSide

Array = jax.Array

AREA = 1024**2  # pixels of an edit whose size is not given, and of a source image
_SIDE = 32  # pixels to which diffusers' pipelines round sides


def fitted_size(height: int, width: int, area: int = AREA) -> Size:
    """(height, width) of about ``area`` pixels with the aspect ratio of ``height`` x ``width``, sides rounded to
    multiples of 32: ``calculate_dimensions`` of diffusers' pipelines."""
    aspect = width / height
    sides = math.sqrt(area / aspect), math.sqrt(area * aspect)
    return round(sides[0] / _SIDE) * _SIDE, round(sides[1] / _SIDE) * _SIDE


@dataclasses.dataclass(frozen=True)
class QwenEditor(Editor):
    """Qwen-Image-Edit conditioning: the tokens of any number of source images follow the target's, and the text states
    have seen the images (diffusers' QwenImageEditPipeline and QwenImageEditPlusPipeline).

    Attributes:
        text_mask: False attends to padded text states, as the released training did.
        modulation_sigmas: the sigmas that are used. The modulation is computed for them when the weights are loaded,
            and its layers, a third of the model, are not kept; None keeps them, for any sigma.
    """

    transformer: QwenTransformer
    text_mask: bool = True
    modulation_sigmas: tuple[float, ...] | None = None

    max_sources = 3

    def edit_size(self, pictures: Sequence[Size]) -> Size:
        return fitted_size(*pictures[-1])

    def source_size(self, picture: Size) -> Size:
        return fitted_size(*picture)

    def check_sigmas(self, sigmas: np.ndarray) -> None:
        if self.modulation_sigmas is None:
            return
        known, visited = np.asarray(self.modulation_sigmas), np.asarray(sigmas, np.float32)[:-1]
        unknown = visited[np.abs(known - visited[:, None]).min(axis=1) > SIGMA_TOLERANCE]
        if len(unknown):
            raise ValueError(f"sigmas {unknown}: the modulation was computed for others, {known}")

    def _apply(
        self, variables: Any, hidden: Array, t: Array, conditioning: Conditioning, grids: tuple[Grid, ...]
    ) -> Array:
        text = conditioning.text
        mask = text.mask if self.text_mask else None
        ids = self._ids(tuple(grid.token_shape for grid in grids), text.states.shape[1])
        velocity: Any = self.transformer.apply(variables, hidden, text.states, mask, t, ids, grids[0].tokens)
        return velocity

    @functools.lru_cache(maxsize=8)  # noqa: B019 - editors live as long as the program
    def _ids(self, grids: tuple[tuple[int, int], ...], num_text: int) -> np.ndarray:
        return position_ids(grids, num_text)

    def init(self, key: Array) -> Params:
        params = super().init(key)
        if self.modulation_sigmas is None:
            return params
        rest, part = modulation.split(params["transformer"])
        tables = modulation.tables(self.transformer, nn.unbox(part), self.modulation_sigmas)
        return params | {"transformer": rest, MODULATION: tables}


def build_qwen_edit(folder: Path, text: TextSide, options: BuildOptions, *, text_mask: bool = True) -> QwenEditor:
    """The editor of the model in ``folder``; parameters are held outside. Its modulation is not precomputed:
    ``with_modulation_at`` says for which sigmas it should be.

    Args:
        folder: diffusers' layout: ``transformer/config.json``, ``vae/config.json``, ``scheduler/``.
        text: where embeddings come from.
        text_mask: False attends to padded text states.

    Raises:
        UserError: a configuration file is missing or asks for something that is not implemented.
    """
    shape = read_part(folder, "transformer", QwenConfig.from_diffusers)
    vae = AutoencoderQwenConfig.from_dict(orbax_weights.read_config(folder / "vae"), str(folder / "vae"))
    editor = QwenEditor(
        transformer=QwenTransformer(shape, **options.transformer),
        autoencoder=AutoencoderQwen(vae, options.vae_dtype, tile_size=options.vae_tile),
        text=text,
        text_mask=text_mask,
        schedule=read_schedule(folder),
        quantize=options.quantize,
    )
    check_channels(editor, folder, shape.in_channels)
    return editor


def with_modulation_at(editor: QwenEditor, sigmas: Sequence[np.ndarray]) -> QwenEditor:
    """``editor`` with its modulation precomputed for samplers that use ``sigmas`` (``editor.sigmas``, 0 included)."""
    visited = {float(sigma) for levels in sigmas for sigma in np.asarray(levels, np.float32)[:-1]}
    clean = {0.0} if editor.transformer.config.zero_cond_t else set()
    return dataclasses.replace(editor, modulation_sigmas=tuple(sorted(visited | clean)))


def check_params(folder: Path, editor: QwenEditor) -> None:
    """Refuses what ``load_params`` would refuse, before any array is made."""
    whole = dataclasses.replace(editor, modulation_sigmas=None)
    check_components(folder, whole, autoencoder_qwen_weights.check_params)


def load_params(folder: Path, editor: QwenEditor, place: Callable[[Any], Any]) -> Params:
    """The frozen parameters, read straight into arrays.

    Args:
        folder: the model's.
        place: boxed shapes to shapes with shardings: ``sharding.rules.sharded_shapes`` on some mesh.

    Raises:
        UserError: files or tensors that are missing or do not fit, all together.
    """
    abstract = place(editor.abstract())
    plain = dataclasses.replace(editor, modulation_sigmas=None, quantize="")
    source, shapes = folder / "transformer", place(plain.abstract())["transformer"]
    _, part = modulation.split(shapes)
    params = {
        "autoencoder": autoencoder_qwen_weights.load_params(folder / "vae", abstract["autoencoder"]),
        "text": {},
    }
    if editor.modulation_sigmas is None:
        return params | {"transformer": orbax_weights.load_params(source, abstract["transformer"])}
    levels = jnp.asarray(editor.modulation_sigmas, jnp.float32)
    tables = abstract[MODULATION] | {"sigmas": jax.device_put(levels, abstract[MODULATION]["sigmas"].sharding)}
    return params | {
        "transformer": orbax_weights.load_params(source, abstract["transformer"], skip=part),
        MODULATION: modulation.load_tables(source, editor.transformer, shapes, tables),
    }
