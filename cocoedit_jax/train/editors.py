"""The editors that ``config.model.kind`` can name. Adding one is a function here (CONTRIBUTING.md, "Add an editor")."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.text_cache import TextCache
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.data.text_kind import flux_kind, qwen_kind, qwen_template
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import kontext, qwen_edit
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.hub import resolve_model
from cocoedit_jax.models.pipeline import BuildOptions
from cocoedit_jax.models.quantize import quantize_params
from cocoedit_jax.models.quickstart import load_base
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.rules import parameter_shardings, sharded_shapes
from cocoedit_jax.sharding.shares import place

PACKAGED_BASE = Path(__file__).resolve().parent.parent / "assets" / "quickstart_base"

# The editor, and a function that loads its parameters: so that what can be refused is refused before they are read.
Loaded = tuple[Editor, Callable[[], Any]]
Loader = Callable[
    [ConfigDict, Mesh, Path, Framing], Loaded
]  # configuration, mesh to load onto, data folder, image sizes
EDITORS: dict[str, Loader] = {}


def register_editor(name: str) -> Callable[[Loader], Loader]:
    """Decorator: make an editor selectable as ``config.model.kind``. Raises UserError for a taken name."""

    def add(loader: Loader) -> Loader:
        if name in EDITORS:
            raise UserError(f"editor {name!r} is registered already; expected a new name")
        EDITORS[name] = loader
        return loader

    return add


def build_options(model: ConfigDict) -> BuildOptions:
    """What ``config.model`` says of the editor of a published model."""
    return BuildOptions(
        dtype=jnp.dtype(model.dtype),
        vae_dtype=jnp.dtype(model.vae_dtype),
        vae_tile=model.vae_tile or None,
        remat=model.remat,
        attention_backend=model.attention,
        quantize=model.get("quantize", ""),
    )


def cached_text(cache: TextCache) -> PrecomputedText:
    """The text side that reads ``cache``."""
    return PrecomputedText(cache, cache.__contains__, f"add them with: {cache.command}")


def check_sizes(editor: Editor, framing: Framing) -> None:
    """Raises UserError when the editor does not take images of the training sizes."""
    try:
        for size in framing.sizes:
            editor.grid(*size)
    except ValueError as error:
        raise UserError(f"config.data.resolution={framing.resolution}: {error}") from error


def check_widths(cache: TextCache, shape: Any, folder: Path) -> None:
    """Raises UserError when the embeddings are not as wide as the transformer of ``folder`` takes them."""
    widths = (cache.header.features, cache.header.pooled_features or None)
    expected = (shape.joint_attention_dim, shape.pooled_features)
    if widths != expected:
        raise UserError(
            f"{cache.folder}: embeddings of widths {widths}; the transformer of {folder} expects {expected}"
        )


@register_editor("quickstart")
def quickstart(config: ConfigDict, mesh: Mesh, data: Path, framing: Framing) -> Loaded:
    """A base written by ``launch.pretrain``; ``model.path`` empty: the one in the package."""
    folder = Path(config.model.path) if config.model.path else PACKAGED_BASE
    editor, params = load_base(folder, remat=config.model.remat, attention_backend=config.model.attention)
    editor = dataclasses.replace(editor, quantize=config.model.get("quantize", ""))
    shardings = parameter_shardings(editor.abstract(), mesh)

    def load() -> Any:
        transformer = quantize_params(params["transformer"], editor.quantize)
        return place(nn.unbox(params | {"transformer": transformer}), shardings)

    return editor, load


@register_editor("flux_kontext")
def flux_kontext(config: ConfigDict, mesh: Mesh, data: Path, framing: Framing) -> Loaded:
    """FLUX.1 Kontext in diffusers' layout; instructions come from the text cache in ``data``."""
    model = config.model
    folder = resolve_model(model.path)
    cache = TextCache(data, flux_kind(model.text_tokens))
    editor = kontext.build_kontext(folder, cached_text(cache), build_options(model), guidance=model.guidance)
    check_widths(cache, editor.transformer.config, folder)
    check_sizes(editor, framing)
    cache.check_encoders(text_identity(folder))  # last: it reads every byte of them
    return editor, lambda: kontext.load_params(folder, editor, partial(sharded_shapes, mesh=mesh))


@register_editor("qwen_image_edit")
def qwen_image_edit(config: ConfigDict, mesh: Mesh, data: Path, framing: Framing) -> Loaded:
    """Qwen-Image-Edit (base, 2509, 2511) in diffusers' layout; instructions with their pictures come from the text
    cache in ``data``."""
    model = config.model
    folder = resolve_model(model.path)
    template = qwen_template(folder)
    if template == "edit" and model.text_tokens:
        raise UserError(
            f"config.model.text_tokens={model.text_tokens}; expected 0 for {folder}: its picture alone takes over a "
            "thousand states, and the instruction comes behind it"
        )
    if not (model.text_mask or model.text_tokens):
        raise UserError(
            "config.model.text_mask=False attends to padding, whose length must not depend on the batch; expected a "
            "length in config.model.text_tokens, 256 as in the released training"
        )
    cache = TextCache(
        data, qwen_kind(template, framing),
        fixed_length=model.text_tokens or None, min_bucket_records=config.rollout.groups,
    )  # fmt: skip
    if cuts := cache.describe_cuts():
        processes.say(f"{cuts} (config.model.text_tokens)")
    editor = qwen_edit.build_qwen_edit(folder, cached_text(cache), build_options(model), text_mask=model.text_mask)
    check_widths(cache, editor.transformer.config, folder)
    check_sizes(editor, framing)
    if model.precompute_modulation:
        grids = [editor.grid(*size) for size in framing.sizes]
        visited = [editor.sigmas(steps, g) for g in grids for steps in (config.rollout.steps, config.evaluation.steps)]
        editor = qwen_edit.with_modulation_at(editor, visited)
    cache.check_encoders(text_identity(folder))  # last: it reads every byte of them
    return editor, lambda: qwen_edit.load_params(folder, editor, partial(sharded_shapes, mesh=mesh))
