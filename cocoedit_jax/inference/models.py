"""The models that ``launch.edit`` knows, and in what they differ for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.data.text_kind import qwen_template
from cocoedit_jax.errors import UserError
from cocoedit_jax.inference.edit import EditOptions, picture_names
from cocoedit_jax.inference.requests import EditRequest, open_picture
from cocoedit_jax.models import flux, kontext, modulation, orbax_weights, qwen, qwen_edit
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.text import Instruction, PrecomputedText

# The encoders need PyTorch: they are imported when text is encoded.


@dataclass(frozen=True)
class EditModel:
    """A kind of model.

    Attributes:
        kind: key in ``lora_names.MODELS``.
        build: (folder, text side, ``BuildOptions``) to the editor; with keyword ``guidance``, if that is in ``uses``.
        check: (folder, editor); raises UserError where ``load`` would, before any array is made.
        load: (folder, editor, place) to the parameters.
        encode: (folder, requests, options, text tokens) to the embeddings of all instructions.
        uses: those options of ``launch.edit`` among guidance, negative and text_tokens that mean something to it.
        max_pictures: (folder, editor) to the most pictures that one edit may start from.
        prepare: (editor, sigmas of all edits, names of the linear layers that a LoRA changes) to the editor to load.
    """

    kind: str
    build: Callable[..., Editor]
    check: Callable[[Path, Any], object]
    load: Callable[[Path, Any, Callable[[Any], Any]], Any]
    encode: Callable[[Path, Sequence[EditRequest], EditOptions, int], PrecomputedText]
    uses: frozenset[str] = frozenset()
    max_pictures: Callable[[Path, Editor], int] = lambda folder, editor: editor.max_sources
    prepare: Callable[[Any, Sequence[np.ndarray], Sequence[str]], Editor] = lambda editor, sigmas, changed: editor


def _encode_flux(
    folder: Path, requests: Sequence[EditRequest], options: EditOptions, text_tokens: int
) -> PrecomputedText:
    from torch_bridge.flux_text import encode_prompts

    return encode_prompts(folder, [request.prompt for request in requests], text_tokens)


def _encode_qwen(
    folder: Path, requests: Sequence[EditRequest], options: EditOptions, text_tokens: int
) -> PrecomputedText:
    from torch_bridge.qwen_text import encode_edits

    pictures = {picture_names(request): request.images for request in requests}
    return encode_edits(
        folder,
        [Instruction(request.prompt, picture_names(request)) for request in requests],
        lambda instruction: [open_picture(image) for image in pictures[instruction.image]],
        negative=options.negative if options.true_cfg > 1 else None,
    )


def _with_tables(editor: Any, sigmas: Sequence[np.ndarray], changed: Sequence[str]) -> Editor:
    """The modulation is computed beforehand where that saves memory."""
    tabled = qwen_edit.with_modulation_at(editor, sigmas)
    # Layers that a LoRA changes must be there, and tables of very many sigmas are larger than the layers.
    larger = len(tabled.modulation_sigmas or ()) > editor.transformer.config.hidden
    return editor if larger or modulation.any_replaced(changed) else tabled


# Class of the transformer in diffusers -> model.
MODELS = {
    flux.CLASS_NAME: EditModel(
        kind="flux",
        build=kontext.build_kontext,
        check=kontext.check_params,
        load=kontext.load_params,
        encode=_encode_flux,
        uses=frozenset({"guidance", "text_tokens"}),
    ),
    qwen.CLASS_NAME: EditModel(
        kind="qwen",
        build=qwen_edit.build_qwen_edit,
        check=qwen_edit.check_params,
        load=qwen_edit.load_params,
        encode=_encode_qwen,
        uses=frozenset({"negative"}),
        max_pictures=lambda folder, editor: 1 if qwen_template(folder) == "edit" else editor.max_sources,
        prepare=_with_tables,
    ),
}


def model_of(folder: Path) -> EditModel:
    """The kind of the model in ``folder``. Raises UserError for a folder that holds none of ``MODELS``."""
    name = orbax_weights.read_config(folder / "transformer").get("_class_name")
    if name not in MODELS:
        raise UserError(f"{folder / 'transformer'}: _class_name={name!r}; expected one of {sorted(MODELS)}")
    return MODELS[name]
