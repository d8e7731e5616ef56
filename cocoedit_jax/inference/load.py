"""A model, a LoRA and the embeddings of the instructions, ready to edit."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.data.text_kind import qwen_template
from cocoedit_jax.errors import UserError
from cocoedit_jax.inference.edit import EditOptions
from cocoedit_jax.models import flux, kontext, lora, lora_files, modulation, orbax_weights, qwen, qwen_edit
from cocoedit_jax.models.editor import Editor, Size
from cocoedit_jax.models.hub import resolve_model
from cocoedit_jax.models.pipeline import BuildOptions
from cocoedit_jax.models.quantize import check_format
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding.mesh import make_mesh, replicated
from cocoedit_jax.sharding.rules import sharded_shapes

# Class of the transformer in diffusers -> module that builds its editor and loads its parameters.
MODELS = {flux.CLASS_NAME: "flux", qwen.CLASS_NAME: "qwen"}


def model_kind(folder: Path) -> str:
    """``flux`` or ``qwen``. Raises UserError for a folder that holds neither."""
    name = orbax_weights.read_config(folder / "transformer").get("_class_name")
    if name not in MODELS:
        raise UserError(f"{folder / 'transformer'}: _class_name={name!r}; expected one of {sorted(MODELS)}")
    return MODELS[name]


def load_for_editing(
    model: str,
    encode: Callable[[Path, str], PrecomputedText],
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

    What can be refused is refused before the weights are read.

    Args:
        model: folder, or repository in the Hugging Face cache.
        encode: from the model's folder and kind (``model_kind``) to the embeddings of all instructions; called before
            the transformer is loaded, so that the encoders need not be in memory beside it.
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
    folder = resolve_model(model)
    kind = model_kind(folder)
    build: Any = kontext.build_kontext if kind == "flux" else qwen_edit.build_qwen_edit
    embedded = {"guidance": guidance} if kind == "flux" else {}
    built = BuildOptions(dtype=jnp.dtype(dtype), vae_tile=vae_tile, quantize=quantize)
    editor: Editor = build(folder, PrecomputedText.of({}), built, **embedded)
    sizes = _check(folder, editor, kind, options, pictures)
    file = None if lora_path is None else lora_files.read_lora(Path(lora_path), alpha=lora_alpha, model=kind)
    if isinstance(editor, qwen_edit.QwenEditor):
        tabled = qwen_edit.with_modulation_at(editor, [editor.sigmas(options.steps, editor.grid(*s)) for s in sizes])
        # Layers that a LoRA changes must be there, and tables of very many sigmas are larger than the layers.
        levels, changed = len(tabled.modulation_sigmas or ()), modulation.any_replaced(file.layers if file else ())
        editor = editor if changed or levels > editor.transformer.config.hidden else tabled
    adapter = None
    if file is not None:
        tree, config = lora_files.stack_layers(file, nn.unbox(editor.abstract()["transformer"]))
        adapter = lora.fold_scale(tree, dataclasses.replace(config, alpha=config.alpha * lora_scale))
    # Text comes before the first array: with that, JAX takes most of a GPU's memory.
    editor = dataclasses.replace(editor, text=encode(folder, kind))
    mesh = make_mesh({"fsdp": -1})
    if adapter is not None:
        adapter = jax.device_put(adapter, replicated(mesh))
    load: Any = kontext.load_params if kind == "flux" else qwen_edit.load_params
    return editor, load(folder, editor, partial(sharded_shapes, mesh=mesh)), adapter


def _check(
    folder: Path, editor: Editor, kind: str, options: EditOptions, pictures: Sequence[Sequence[Size]]
) -> set[Size]:
    """The sizes of all edits. Raises UserError for what this editor cannot do."""
    limit = 1 if kind == "qwen" and qwen_template(folder) == "edit" else editor.max_sources
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
