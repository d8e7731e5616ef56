"""Edits pictures: resizing, sampling, writing results as they come.

The same as diffusers' ``FluxKontextPipeline`` called with ``height``, ``width`` and ``max_area=height * width``, from
the same noise; with source ``target`` or ``own`` also with ``_auto_resize=False``.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.inference.requests import EditRequest, open_picture
from cocoedit_jax.models import kontext
from cocoedit_jax.models.editor import KontextEditor

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class EditOptions:
    """How edits are made.

    Attributes:
        steps: sampler steps.
        solver: name in ``flow.solvers.SOLVERS``.
        size: of the edit; None: about a megapixel with the picture's aspect ratio (diffusers' own default is a square).
        source: size at which the model sees the picture: ``preferred`` (the nearest of the sizes that Kontext was
            trained on), ``target`` (the size of the edit, as in training) or ``own`` (cut to multiples of 16).
        batch_size: most edits sampled at once; they have one size.
    """

    steps: int = 28
    solver: str = "euler"
    size: Size | None = None
    source: str = "preferred"
    batch_size: int = 1

    def sizes(self, editor: KontextEditor, height: int, width: int) -> tuple[Size, Size]:
        """Sizes of the edit and of the picture as the model sees it, for a picture of ``height`` x ``width``."""
        unit = editor.autoencoder.factor * editor.patch
        target = self.size or kontext.fitted_size(height, width, unit)
        if self.source == "preferred":
            return target, kontext.preferred_size(height, width, unit)
        own = (max(height // unit, 1) * unit, max(width // unit, 1) * unit)
        return target, target if self.source == "target" else own


class PictureEditor:
    """Compiled sampling for each pair of sizes. ``adapter`` has its scale folded in, or is None."""

    def __init__(self, editor: KontextEditor, params: Any, adapter: Any, options: EditOptions):
        self.editor, self.options = editor, options
        self._params, self._adapter = params, adapter
        self._programs: dict[tuple[Size, Size], Callable[..., jax.Array]] = {}

    def _program(self, target: Size, source: Size) -> Callable[..., jax.Array]:
        key = (target, source)
        if key not in self._programs:
            editor, options = self.editor, self.options
            grid, source_grid = editor.grid(*target), editor.grid(*source)
            sigmas = editor.sigmas(options.steps, grid)

            def run(params: Any, adapter: Any, images: jax.Array, text: Any, noise: jax.Array) -> jax.Array:
                conditioning = editor.encode(params, images, text)

                def velocity(z: jax.Array, sigma: jax.Array) -> jax.Array:
                    t = jnp.full((z.shape[0],), sigma)
                    return editor.velocity(params, adapter, z, t, conditioning, grid, source_grid)

                return editor.decode(params, sample(velocity, noise, sigmas, options.solver), grid)

            self._programs[key] = jax.jit(run)
        return self._programs[key]

    def noise(self, seed: int, target: Size) -> jax.Array:
        """Packed noise ``[tokens, channels]`` of one edit."""
        grid = self.editor.grid(*target)
        return jax.random.normal(jax.random.key(seed), (grid.tokens, self.editor.token_channels))

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], noise: jax.Array, target: Size, source: Size
    ) -> np.ndarray:
        """Edits ``[B, H, W, 3]`` in [0, 1] of ``pictures``, which are resized to ``source``.

        ``noise`` is packed, ``[B, tokens, channels]``.
        """
        height, width = source
        resized = [p.resize((width, height), Image.Resampling.LANCZOS) for p in pictures]
        images = np.stack([np.asarray(p, np.float32) / np.float32(255) for p in resized])
        text = self.editor.text_inputs(prompts)
        return np.asarray(self._program(target, source)(self._params, self._adapter, images, text, noise))


def edit_all(
    editor: PictureEditor,
    requests: Sequence[EditRequest],
    sizes: Sequence[Size],
    *,
    side_by_side: bool = False,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Makes every edit and writes it as soon as it is made, whole or not at all.

    Args:
        sizes: (height, width) of every request's picture, from ``check_pictures``.
        side_by_side: also write ``NAME_side_by_side.png``, the picture beside its edit.
        progress: called with the number of edits after each batch.
    """
    groups: dict[tuple[Size, Size], list[EditRequest]] = defaultdict(list)
    for request, size in zip(requests, sizes, strict=True):
        groups[editor.options.sizes(editor.editor, *size)].append(request)
    for (target, source), members in groups.items():
        for start in range(0, len(members), editor.options.batch_size):
            part = members[start : start + editor.options.batch_size]
            # A short last batch repeats its last member, so that every batch has one shape.
            padded = part + part[-1:] * (min(editor.options.batch_size, len(members)) - len(part))
            pictures = [open_picture(request.image) for request in padded]
            noise = jnp.stack([editor.noise(request.seed, target) for request in padded])
            edits = editor(pictures, [request.prompt for request in padded], noise, target, source)
            for request, picture, edit in zip(part, pictures, edits, strict=False):
                result = Image.fromarray(np.uint8(np.rint(edit * 255)))
                _write(result, request.out)
                if side_by_side:
                    _write(_beside(picture, result), request.out.with_stem(f"{request.out.stem}_side_by_side"))
            progress(len(part))


def _beside(picture: Image.Image, edit: Image.Image) -> Image.Image:
    """The picture, scaled to the edit's height, and the edit."""
    width = max(1, round(picture.width * edit.height / picture.height))
    both = Image.new("RGB", (width + edit.width, edit.height))
    both.paste(picture.resize((width, edit.height), Image.Resampling.LANCZOS), (0, 0))
    both.paste(edit, (width, 0))
    return both


def _write(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        picture.save(draft)
    except (ValueError, OSError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); expected a name such as out.png") from error
    draft.replace(path)
