"""Edits pictures with FLUX.1 Kontext or Qwen-Image-Edit (base, 2509, 2511), with or without a LoRA.

    python -m launch.edit --model=DIR --image=in.png --prompt="make the car red" --out=out.png [--lora=FILE_OR_FOLDER]
    python -m launch.edit --model=DIR --batch=edits.jsonl --out=FOLDER       # lines {"image", "prompt", "out", "seed"}

DIR is the model in diffusers' layout, or its name in the Hugging Face cache; nothing is downloaded. Text is encoded by
PyTorch: pip install 'cocoedit-jax[bridge]'. Qwen-Image-Edit-2509 and 2511 take several pictures: one --image each.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.solvers import SOLVERS
from cocoedit_jax.inference.requests import SOURCE_SIZES, EditRequest, check_pictures, read_requests
from launch import command

if TYPE_CHECKING:  # commands check their flags before JAX is imported
    from cocoedit_jax.inference.models import EditModel

_MODEL = flags.DEFINE_string("model", None, "Model folder, or a repository name in the Hugging Face cache.")
_IMAGE = flags.DEFINE_multi_string("image", [], "Picture to edit; needs --prompt. Several times for several pictures.")
_PROMPT = flags.DEFINE_string("prompt", None, "Instruction.")
_BATCH = flags.DEFINE_string("batch", None, "JSONL of many edits, instead of --image and --prompt.")
_OUT = flags.DEFINE_string("out", None, "File to write; with --batch, a folder.")
_LORA = flags.DEFINE_string("lora", None, "LoRA file or folder, in any format that launch.convert_lora reads.")
_LORA_SCALE = flags.DEFINE_float("lora_scale", 1.0, "Strength of the LoRA; 1: as trained.")
_LORA_ALPHA = flags.DEFINE_float("lora_alpha", None, "Alpha of the LoRA, instead of what its file says or leaves out.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 28, "Sampler steps.", lower_bound=1)
_SOLVER = flags.DEFINE_enum("solver", "euler", sorted(SOLVERS), "Sampler.")
_GUIDANCE = flags.DEFINE_float("guidance", 2.5, "Embedded guidance scale (FLUX.1 Kontext).", lower_bound=0.0)
_TRUE_CFG = flags.DEFINE_float(
    "true_cfg", 1.0, "Classifier-free guidance away from --negative, at twice the cost (Qwen-Image-Edit; stock: 4).",
    lower_bound=1.0,
)  # fmt: skip
_NEGATIVE = flags.DEFINE_string("negative", " ", "Prompt that --true_cfg leads away from.")
_SIZE = flags.DEFINE_string("size", "auto", "Size of the edit, WIDTHxHEIGHT in pixels; auto: about a megapixel.")
_SOURCE = flags.DEFINE_enum(
    "source_size", "preferred", list(SOURCE_SIZES),
    "Size at which the model sees a picture: as its pipeline chooses it (FLUX.1 Kontext: the nearest in shape of those "
    "that it was trained on), the edit's (stretched to it; as CoCoEdit trains), or its own.",
)  # fmt: skip
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 1, "Edits of one size sampled at once; at least one per device.", lower_bound=1
)
_SIDE_BY_SIDE = flags.DEFINE_bool("side_by_side", False, "Also write the picture beside its edit.")
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 512, "T5 tokens (FLUX.1 Kontext).", lower_bound=1, upper_bound=512)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the transformer.")
_QUANTIZE = flags.DEFINE_string(
    "quantize", "", "Transformer in 8 bits: int8 (any device), int8_weights (memory only), fp8 (GPUs that have it)."
)
_VAE_TILE = flags.DEFINE_integer("vae_tile", 0, "Decode in tiles of so many pixels to save memory; 0: exactly.")
flags.mark_flags_as_required(["model", "out"])


def _size() -> tuple[int, int] | None:
    if _SIZE.value == "auto":
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", _SIZE.value)
    if not match:
        raise UserError(f"--size={_SIZE.value}; expected WIDTHxHEIGHT, such as 1024x768, or auto")
    return int(match[2]), int(match[1])


def _requests() -> list[EditRequest]:
    if _BATCH.value:
        if _IMAGE.value or _PROMPT.value:
            raise UserError("--batch: stands in for --image and --prompt; give one or the other")
        return read_requests(Path(_BATCH.value), Path(_OUT.value or "."), _SEED.value)
    if not _IMAGE.value or not _PROMPT.value:
        raise UserError("--image and --prompt: give both, or --batch=FILE.jsonl")
    images = tuple(Path(image) for image in _IMAGE.value)
    return [EditRequest(images, _PROMPT.value, Path(_OUT.value or ""), _SEED.value)]


def _check_lora_flags() -> None:
    """Raises UserError for flags that change a LoRA where there is none."""
    if _LORA.value is None and (given := [f"--{flag.name}" for flag in (_LORA_SCALE, _LORA_ALPHA) if flag.present]):
        raise UserError(f"{' and '.join(given)}: given without --lora; expected --lora=FILE_OR_FOLDER with it")


def _check_model_flags(model: "EditModel") -> None:
    """Raises UserError for flags that say nothing to this kind of model, or nothing beside the others."""
    given = [flag.name for flag in (_GUIDANCE, _NEGATIVE, _TEXT_TOKENS) if flag.present]
    faults = [f"--{name}: not used by this model; see --help" for name in given if name not in model.uses]
    if "negative" in given and not faults and _TRUE_CFG.value <= 1:
        faults = [f"--negative: not used with --true_cfg={_TRUE_CFG.value:g}; expected --true_cfg above 1 with it"]
    if faults:
        raise UserError("\n".join(faults))


def main(argv: list[str]) -> None:
    _check_lora_flags()
    requests, size = _requests(), _size()
    picture_sizes = check_pictures(requests)
    from cocoedit_jax.inference.edit import EditOptions, PictureEditor, edit_all
    from cocoedit_jax.inference.load import load_for_editing
    from cocoedit_jax.inference.models import model_of
    from cocoedit_jax.models.hub import resolve_model
    from cocoedit_jax.reporting.telemetry import progress

    folder = resolve_model(_MODEL.value or "")
    model = model_of(folder)
    _check_model_flags(model)
    options = EditOptions(
        _STEPS.value, _SOLVER.value, size, _SOURCE.value, _BATCH_SIZE.value, _TRUE_CFG.value, _NEGATIVE.value
    )
    editor, params, adapter = load_for_editing(
        folder,
        model,
        lambda: model.encode(folder, requests, options, _TEXT_TOKENS.value),
        options,
        picture_sizes,
        lora_path=_LORA.value,
        lora_scale=_LORA_SCALE.value,
        lora_alpha=_LORA_ALPHA.value,
        dtype=_DTYPE.value,
        guidance=_GUIDANCE.value,
        vae_tile=_VAE_TILE.value or None,
        quantize=_QUANTIZE.value,
    )
    with progress(len(requests), "edit", "picture") as bar:
        edit_all(
            PictureEditor(editor, params, adapter, options), requests, picture_sizes,
            side_by_side=_SIDE_BY_SIDE.value, progress=bar.update,
        )  # fmt: skip
    print(requests[0].out if len(requests) == 1 else f"{len(requests)} edits in {_OUT.value}")


if __name__ == "__main__":
    command.run(main)
