"""A model, a LoRA and the embeddings of the instructions, ready to edit."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.inference.edit import EditOptions
from cocoedit_jax.inference.models import EditModel
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.models.editor import Editor, Size
from cocoedit_jax.models.pipeline import BuildOptions
from cocoedit_jax.models.quantize import check_format
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding.mesh import make_mesh, replicated
from cocoedit_jax.sharding.rules import sharded_shapes


def load_for_editing(
    folder: Path,
    model: EditModel,
    encode: Callable[[], PrecomputedText],
    options: EditOptions,
    pictures: Sequence[Sequence[Size]],
    *,
    lora_path: str | None = None,
    lora_scale: float = 1.0,
    lora_alpha: float | None = None,
    dtype: str = "bfloat16",
    guidance: float = 2.5,
    vae_tile: int | None = None,
    quantize: str = "",
) -> tuple[Editor, Any, Any]:
    """The editor, its parameters over all devices, and the folded adapter (None without ``lora_path``).

    What can be refused is refused before text is encoded, weights that are missing or do not fit included.

    Args:
        folder: the model's.
        model: what is in it (``models.model_of``).
        encode: gives the embeddings of all instructions; called before the transformer is loaded, so that the encoders
            need not be in memory beside it.
        options: how the edits will be made.
        pictures: (height, width) of every edit's pictures.
        lora_path: file or folder in any format that ``lora_files`` reads.
        lora_scale: strength of the LoRA; 1: as trained.
        lora_alpha: alpha of the LoRA, instead of what its file says or leaves out.
        guidance: embedded guidance scale, for models that have one.
        quantize: format of the transformer's kernels (``quantize.FORMATS``); empty: ``dtype``.

    Raises:
        UserError: a model, LoRA or size that cannot be used.
    """
    check_format(quantize, "--quantize", jax.devices()[0])
    embedded = {"guidance": guidance} if "guidance" in model.uses else {}
    built = BuildOptions(dtype=jnp.dtype(dtype), vae_tile=vae_tile, quantize=quantize)
    editor = model.build(folder, PrecomputedText.of({}), built, **embedded)
    sizes = _check(folder, editor, model, options, pictures)
    file = None if lora_path is None else lora_files.read_lora(Path(lora_path), alpha=lora_alpha, model=model.kind)
    sigmas = [editor.sigmas(options.steps, editor.grid(*size)) for size in sizes]
    editor = model.prepare(editor, sigmas, list(file.layers) if file else [])
    adapter = None
    if file is not None:
        tree, config = lora_files.stack_layers(file, nn.unbox(editor.abstract()["transformer"]))
        adapter = lora.fold_scale(tree, dataclasses.replace(config, alpha=config.alpha * lora_scale))
    model.check(folder, editor)
    # Text comes before the first array: with that, JAX takes most of a GPU's memory.
    editor = dataclasses.replace(editor, text=encode())
    mesh = make_mesh({"fsdp": -1})
    if adapter is not None:
        adapter = jax.device_put(adapter, replicated(mesh))
    return editor, model.load(folder, editor, partial(sharded_shapes, mesh=mesh)), adapter


def _check(
    folder: Path, editor: Editor, model: EditModel, options: EditOptions, pictures: Sequence[Sequence[Size]]
) -> set[Size]:
    """The sizes of all edits. Raises UserError for what this editor cannot do."""
    limit = model.max_pictures(folder, editor)
    if options.size is not None:
        try:
            editor.grid(*options.size)
        except ValueError as error:
            raise UserError(f"--size={options.size[1]}x{options.size[0]}: {error}") from error
    most = max((len(own) for own in pictures), default=0)
    if most > limit:
        raise UserError(f"{most} pictures for one edit; expected at most {limit} for the model in {folder}")
    if options.true_cfg > 1 and editor.guidance is not None:
        raise UserError(f"--true_cfg={options.true_cfg:g}: this model embeds its guidance; expected 1, and --guidance")
    return {options.sizes(editor, own)[0] for own in pictures}
