"""FLUX.1 Kontext from a model folder in diffusers' layout: the editor, its frozen parameters, picture sizes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cocoedit_jax.flow.packing import position_ids
from cocoedit_jax.models import orbax_weights
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig
from cocoedit_jax.models.editor import Conditioning, Editor, Grid, Params, Size
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.pipeline import BuildOptions, check_channels, check_components, read_part, read_schedule
from cocoedit_jax.models.text import TextSide

Array = jax.Array

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


@dataclasses.dataclass(frozen=True)
class KontextEditor(Editor):
    """FLUX.1 Kontext conditioning: source tokens are appended to the target's, text ids are zero (diffusers'
    FluxKontextPipeline). The transformer is the same class at every size.
    """

    transformer: FluxTransformer
    guidance: float | None = 2.5

    def edit_size(self, pictures: Sequence[Size]) -> Size:
        return fitted_size(*pictures[0], self.unit)

    def source_size(self, picture: Size) -> Size:
        return preferred_size(*picture, self.unit)

    def _apply(
        self, variables: Any, hidden: Array, t: Array, conditioning: Conditioning, grids: tuple[Grid, ...]
    ) -> Array:
        text = conditioning.text
        ids = self._ids(grids, text.states.shape[1])
        velocity: Any = self.transformer.apply(
            variables, hidden, text.states, text.pooled, t, conditioning.guidance, ids, grids[0].tokens
        )
        return velocity

    @functools.lru_cache(maxsize=8)  # noqa: B019 - editors live as long as the program
    def _ids(self, grids: tuple[Grid, ...], num_text: int) -> np.ndarray:
        # The target has index 0, the source image index 1, and both count rows and columns from zero.
        image_ids = [position_ids(*grid.token_shape, index) for index, grid in enumerate(grids)]
        return np.concatenate([np.zeros((num_text, 3), np.int32), *image_ids])


def build_kontext(folder: Path, text: TextSide, options: BuildOptions, *, guidance: float = 2.5) -> KontextEditor:
    """The editor of the model in ``folder``; parameters are held outside.

    Args:
        folder: diffusers' layout: ``transformer/config.json``, ``vae/config.json``, ``scheduler/``.
        text: where embeddings come from.
        guidance: embedded guidance scale.

    Raises:
        UserError: a configuration file is missing or asks for something that is not implemented.
    """
    shape = read_part(folder, "transformer", FluxConfig.from_diffusers)
    vae = AutoencoderKLConfig.from_dict(orbax_weights.read_config(folder / "vae"), str(folder / "vae"))
    editor = KontextEditor(
        transformer=FluxTransformer(shape, **options.transformer),
        # Its one head of 512 features is beyond what most attention kernels take: it chooses for itself.
        autoencoder=AutoencoderKL(vae, options.vae_dtype, tile_size=options.vae_tile),
        text=text,
        guidance=guidance,
        schedule=read_schedule(folder),
        quantize=options.quantize,
    )
    check_channels(editor, folder, shape.in_channels)
    return editor


def check_params(folder: Path, editor: KontextEditor) -> None:
    """Refuses what ``load_params`` would refuse, before any array is made."""
    check_components(folder, editor)


def load_params(folder: Path, editor: KontextEditor, place: Callable[[Any], Any]) -> Params:
    """The frozen parameters, read straight into arrays.

    Args:
        folder: the model's.
        place: boxed shapes to shapes with shardings: ``sharding.rules.sharded_shapes`` on some mesh.

    Raises:
        UserError: files or tensors that are missing or do not fit, all together.
    """
    abstract = place(editor.abstract())
    return {
        "transformer": orbax_weights.load_params(folder / "transformer", abstract["transformer"]),
        "autoencoder": orbax_weights.load_params(folder / "vae", abstract["autoencoder"]),
        "text": {},
    }
