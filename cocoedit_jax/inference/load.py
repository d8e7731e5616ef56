"""A model, a LoRA and the embeddings of the instructions, ready to edit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.hub import resolve_model
from cocoedit_jax.models.kontext import build_kontext, load_params
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding.mesh import make_mesh, replicated
from cocoedit_jax.sharding.rules import sharded_shapes


def load_for_editing(
    model: str,
    encode: Callable[[Path], PrecomputedText],
    *,
    lora_path: str | None = None,
    lora_scale: float = 1.0,
    dtype: str = "bfloat16",
    guidance: float = 2.5,
    vae_tile: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Editor, Any, Any]:
    """The editor, its parameters over all devices, and the folded adapter (None without ``lora_path``).

    What can be refused is refused before the weights are read.

    Args:
        model: folder, or repository in the Hugging Face cache.
        encode: from the model's folder to the embeddings of all instructions; called before the transformer is loaded,
            so that the encoders need not be in memory beside it.
        lora_path: file or folder in any format that ``lora_files`` reads.
        lora_scale: strength of the LoRA; 1: as trained.
        size: (height, width) of the edits, to be checked.

    Raises:
        UserError: a model, LoRA or size that cannot be used.
    """
    folder = resolve_model(model)
    nothing = PrecomputedText.of({})
    editor = build_kontext(folder, nothing, dtype=jnp.dtype(dtype), guidance=guidance, vae_tile=vae_tile)
    if size is not None:
        try:
            editor.grid(*size)
        except ValueError as error:
            raise UserError(f"--size={size[1]}x{size[0]}: {error}") from error
    file = None if lora_path is None else lora_files.read_lora(Path(lora_path))
    # Text comes first: JAX takes most of a GPU's memory when it starts.
    editor = dataclasses.replace(editor, text=encode(folder))
    mesh = make_mesh({"fsdp": -1})
    abstract, adapter = sharded_shapes(editor.abstract(), mesh), None
    if file is not None:
        tree, config = lora_files.stack_layers(file, abstract["transformer"])
        config = dataclasses.replace(config, alpha=config.alpha * lora_scale)
        adapter = jax.device_put(lora.fold_scale(tree, config), replicated(mesh))
    return editor, load_params(folder, abstract), adapter
