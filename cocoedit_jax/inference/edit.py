"""Edits pictures: resizing, sampling, writing results as they come.

The same as diffusers' pipelines from the same noise: ``FluxKontextPipeline`` called with ``height``, ``width`` and
``max_area=height * width`` (with source ``target`` or ``own`` also with ``_auto_resize=False``), and
``QwenImageEditPipeline`` and ``QwenImageEditPlusPipeline`` called with ``height`` and ``width``.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.guidance import rescaled_guidance
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.inference.requests import EditRequest, open_picture
from cocoedit_jax.models.editor import Editor, Size
from cocoedit_jax.models.text import Instruction
from cocoedit_jax.sharding.mesh import SAMPLE_AXES, sample_shards
from cocoedit_jax.sharding.rules import manual_specs

Sizes = tuple[Size, tuple[Size, ...]]  # of the edit, and of its pictures as the model sees them


@dataclass(frozen=True)
class EditOptions:
    """How edits are made.

    Attributes:
        steps: sampler steps.
        solver: name in ``flow.solvers.SOLVERS``.
        size: of the edit; None: about a megapixel with the picture's aspect ratio (``Editor.edit_size``).
        source: size at which the model sees a picture: ``preferred`` (as the model's pipeline chooses it), ``target``
            (the size of the edit, as in training) or ``own`` (cut to what the model takes).
        batch_size: most edits sampled at once, rounded up to a multiple of the devices that share them; they have one
            size.
        true_cfg: strength of classifier-free guidance away from ``negative``; 1: none, at half the cost.
        negative: the prompt that guidance leads away from.
    """

    steps: int = 28
    solver: str = "euler"
    size: Size | None = None
    source: str = "preferred"
    batch_size: int = 1
    true_cfg: float = 1.0
    negative: str = " "

    def sizes(self, editor: Editor, pictures: Sequence[Size]) -> Sizes:
        """Sizes of the edit, and of its ``pictures`` as the model sees them."""
        target = self.size or editor.edit_size(pictures)
        if self.source == "preferred":
            return target, tuple(editor.source_size(picture) for picture in pictures)
        if self.source == "target":
            return target, (target,) * len(pictures)
        cut = lambda side: max(side // editor.unit, 1) * editor.unit  # noqa: E731
        return target, tuple((cut(height), cut(width)) for height, width in pictures)


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh that the transformer's parameters are placed on; None: one device."""
    leaves = jax.tree.leaves(params["transformer"])
    shardings = [x.sharding for x in leaves if isinstance(x.sharding, NamedSharding)]
    return shardings[0].mesh if shardings and shardings[0].mesh.size > 1 else None  # pyright: ignore


class PictureEditor:
    """Compiled sampling for each set of sizes. ``adapter`` has its scale folded in, or is None.

    Edits are split over the axes of samples of the mesh that ``params`` are on, as in training: every device encodes,
    samples and decodes its own, and fetches the shards of a layer's weights when it runs.

    Attributes:
        shards: into how many shares a batch of edits is split.
        batch_size: of the options, rounded up to a multiple of ``shards``.
    """

    def __init__(self, editor: Editor, params: Any, adapter: Any, options: EditOptions):
        self.editor, self.options = editor, options
        self._params, self._adapter, self._mesh = params, adapter, _mesh_of(params)
        self.shards = sample_shards(self._mesh) if self._mesh else 1
        self.batch_size = self._whole(options.batch_size)
        self._programs: dict[Sizes, Callable[..., jax.Array]] = {}

    def _whole(self, count: int) -> int:
        return -(-count // self.shards) * self.shards

    def _split(self, run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        if self._mesh is None:
            return run
        network = manual_specs(self.editor.network(self.editor.abstract()), self._mesh)
        everywhere, samples = PartitionSpec(), PartitionSpec(SAMPLE_AXES)
        return jax.shard_map(
            run,
            mesh=self._mesh,
            in_specs=({name: network.get(name, everywhere) for name in self._params}, everywhere, *[samples] * 4),
            out_specs=samples,
            axis_names=frozenset(SAMPLE_AXES),
            check_vma=False,
        )

    def _program(self, target: Size, sources: tuple[Size, ...]) -> Callable[..., jax.Array]:
        if (target, sources) not in self._programs:
            editor, options = self.editor, self.options
            grid, grids = editor.grid(*target), tuple(editor.grid(*size) for size in sources)
            sigmas = editor.sigmas(options.steps, grid)
            editor.check_sigmas(sigmas)

            def run(params: Any, adapter: Any, images: Any, text: Any, negative: Any, noise: jax.Array) -> jax.Array:
                wanted: Any = editor.encode(params, images, text)
                unwanted = negative and wanted.replace(text=editor.text.encode(params["text"], negative))

                def velocity(z: jax.Array, sigma: jax.Array) -> jax.Array:
                    t = jnp.full((z.shape[0],), sigma)
                    v = editor.velocity(params, adapter, z, t, wanted, grid, grids)
                    if unwanted is None:
                        return v
                    away = editor.velocity(params, adapter, z, t, unwanted, grid, grids)
                    return rescaled_guidance(v, away, options.true_cfg)

                return editor.decode(params, sample(velocity, noise, sigmas, options.solver), grid)

            self._programs[target, sources] = jax.jit(self._split(run))
        return self._programs[target, sources]

    def noise(self, seed: int, target: Size) -> jax.Array:
        """Packed noise ``[tokens, channels]`` of one edit."""
        grid = self.editor.grid(*target)
        return jax.random.normal(jax.random.key(seed), (grid.tokens, self.editor.token_channels))

    def __call__(
        self,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        noise: jax.Array,
        sizes: Sizes,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Edits ``[B, H, W, 3]`` in [0, 1].

        Args:
            pictures: of every edit, as many each; they are resized to the sizes that the model sees.
            prompts: one for every edit.
            noise: packed, ``[B, tokens, channels]``.
            names: of every edit's pictures, where the text side knows them by name (``picture_names``).
        """
        target, sources = sizes
        images = [np.stack([_resized(own[i], size) for own in pictures]) for i, size in enumerate(sources)]
        names = names or [""] * len(prompts)
        text = self.editor.text_inputs([Instruction(*pair) for pair in zip(prompts, names, strict=True)])
        negative = None
        if self.options.true_cfg > 1:
            negative = self.editor.text_inputs([Instruction(self.options.negative, name) for name in names])
        rows = np.minimum(np.arange(self._whole(len(prompts))), len(prompts) - 1)  # the last, until all shares are full
        given = jax.tree.map(lambda x: np.asarray(x)[rows], (images, text, negative, noise))
        return np.asarray(self._program(target, sources)(self._params, self._adapter, *given))[: len(prompts)]


def picture_names(request: EditRequest) -> str:
    """What the text side knows the pictures of ``request`` by."""
    return "\n".join(str(image) for image in request.images)


def _resized(picture: Image.Image, size: Size) -> np.ndarray:
    height, width = size
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / np.float32(255)


def edit_all(
    editor: PictureEditor,
    requests: Sequence[EditRequest],
    sizes: Sequence[Sequence[Size]],
    *,
    side_by_side: bool = False,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Makes every edit and writes it as soon as it is made, whole or not at all.

    Args:
        sizes: (height, width) of every request's pictures, from ``check_pictures``.
        side_by_side: also write ``NAME_side_by_side.png``, the pictures beside their edit.
        progress: called with the number of edits after each batch.
    """
    groups: dict[Sizes, list[EditRequest]] = defaultdict(list)
    for request, own in zip(requests, sizes, strict=True):
        groups[editor.options.sizes(editor.editor, own)].append(request)
    for group, members in groups.items():
        size = min(editor.batch_size, len(members))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            # A short last batch repeats its last member, so that every batch has one shape.
            padded = part + part[-1:] * (size - len(part))
            pictures = [[open_picture(image) for image in request.images] for request in padded]
            noise = jnp.stack([editor.noise(request.seed, group[0]) for request in padded])
            prompts, names = [request.prompt for request in padded], [picture_names(request) for request in padded]
            edits = editor(pictures, prompts, noise, group, names)
            for request, own, edit in zip(part, pictures, edits, strict=False):
                result = Image.fromarray(np.uint8(np.rint(edit * 255)))
                _write(result, request.out)
                if side_by_side:
                    _write(_beside([*own, result]), request.out.with_stem(f"{request.out.stem}_side_by_side"))
            progress(len(part))


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures in a row, scaled to the height of the last."""
    height = pictures[-1].height
    scaled = [
        p.resize((max(1, round(p.width * height / p.height)), height), Image.Resampling.LANCZOS) for p in pictures
    ]
    row, left = Image.new("RGB", (sum(picture.width for picture in scaled), height)), 0
    for picture in scaled:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def _write(picture: Image.Image, path: Path) -> None:
    draft = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # may be gone since ``check_pictures``
        picture.save(draft)
        draft.replace(path)
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); expected a name such as out.png") from error
