"""A model, a LoRA and the embeddings of the instructions, ready to edit."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora
from cocoedit_jax.models.editor import KontextEditor
from cocoedit_jax.models.hub import resolve_model
from cocoedit_jax.models.kontext import build_kontext, load_params
from cocoedit_jax.models.lora_files import load_lora
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.sharding.mesh import make_mesh, replicated
from cocoedit_jax.sharding.rules import parameter_shardings


def load_for_editing(
    model: str,
    prompts: Sequence[str],
    *,
    lora_path: str | None = None,
    lora_scale: float = 1.0,
    text_tokens: int = 512,
    dtype: str = "bfloat16",
    guidance: float = 2.5,
    vae_tile: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[KontextEditor, Any, Any]:
    """The editor, its parameters over all devices, and the folded adapter (None without ``lora_path``).

    What can be refused is refused before the weights are read; ``prompts`` are encoded by PyTorch, which is let go
    before the transformer is loaded.

    Raises:
        UserError: a model, LoRA or size that cannot be used, or PyTorch is missing.
    """
    folder = resolve_model(model)
    nothing = PrecomputedText.of({})
    editor = build_kontext(folder, nothing, dtype=jnp.dtype(dtype), guidance=guidance, vae_tile=vae_tile)
    if size is not None:
        try:
            editor.grid(*size)
        except ValueError as error:
            raise UserError(f"--size={size[1]}x{size[0]}: {error}") from error
    adapter = None if lora_path is None else _load_adapter(Path(lora_path), lora_scale, editor)
    editor = dataclasses.replace(editor, text=_encode(folder, text_tokens, prompts))
    mesh = make_mesh({"fsdp": -1})
    params = load_params(editor, folder, parameter_shardings(editor.abstract(), mesh))
    return editor, params, None if adapter is None else jax.device_put(adapter, replicated(mesh))


def _load_adapter(path: Path, strength: float, editor: KontextEditor) -> Any:
    adapter, config = load_lora(path)
    lora.check_fits(adapter, nn.unbox(editor.abstract()["transformer"]), str(path))
    return lora.fold_scale(adapter, dataclasses.replace(config, alpha=config.alpha * strength))


def _encode(folder: Path, text_tokens: int, prompts: Sequence[str]) -> PrecomputedText:
    from torch_bridge.flux_text import FluxTextEncoder

    encoder = FluxTextEncoder(folder, text_tokens)
    distinct = list(dict.fromkeys(prompts))
    for line in encoder.describe_cuts(distinct):
        print(line, file=sys.stderr)
    table = {}
    for prompt in progress(distinct, "encode text", "prompt"):
        text, pooled = encoder([prompt])
        table[prompt] = {"text": text[0], "pooled": pooled[0]}
    return PrecomputedText.of(table)
