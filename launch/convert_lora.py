"""Converts a LoRA of FLUX or Qwen-Image, which its names tell apart.

    python -m launch.convert_lora --from=PATH --to=PATH --format=comfyui [--alpha=64] [--model=qwen]

It reads what it writes: diffusers' layout (alpha in the header, or baked into B), PEFT's folder, kohya's and ComfyUI's.
The LoRAs that CoCoEdit released (adapter_model_converted.safetensors) have lost their alpha: --alpha=64 is the strength
they were trained at, --alpha=32 (what a file without alpha acts at) that of their published evaluation.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from absl import flags

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora_files
from cocoedit_jax.models.lora_formats import DTYPES, FORMATS, unread_by_diffusers
from cocoedit_jax.models.lora_names import MODELS, titles
from launch import command

_FROM = flags.DEFINE_string("from", None, "LoRA file, or folder in diffusers' or PEFT's layout.", required=True)
_TO = flags.DEFINE_string(
    "to", None, "File to write (NAME.safetensors), or folder; peft needs a folder.", required=True
)
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format to write.", required=True)
_ALPHA = flags.DEFINE_float("alpha", None, "Alpha of the LoRA, instead of what its file says (or leaves out).")
_MODEL = flags.DEFINE_enum(
    "model", None, list(MODELS), f"What the LoRA is of ({titles()}), where its names leave that open."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Type of the tensors to write.")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace files that exist.")


def describe(found: lora_files.LoraFile) -> str:
    """What ``found`` is, and how often it adapts each kind of layer."""
    cfg, of = found.config, titles([found.model] if found.model else MODELS)
    kinds = Counter(re.sub(r"^(\w*blocks)\.\d+\.", r"\1.*.", name) for name in found.layers)
    lines = [
        f"{found.path}: {found.format} of {of}, {len(found.layers)} layers, rank {cfg.rank}, alpha {cfg.alpha:g} "
        f"(scale {cfg.scale:g}), {found.size:,} parameters, {found.dtype}"
    ]
    return "\n".join(lines + [f"  {name} x {count}" for name, count in kinds.items()])


def main(argv: list[str]) -> None:
    found = lora_files.read_lora(Path(_FROM.value), alpha=_ALPHA.value, model=_MODEL.value)
    print(describe(found))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        file = lora_files.write_lora(
            Path(_TO.value), found.layers, found.config, _FORMAT.value,
            dtype=_DTYPE.value, model=found.model, info=found.header, overwrite=_OVERWRITE.value,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--to={_TO.value}: {error}") from error
    if unread := unread_by_diffusers(found.layers, _FORMAT.value, found.model):
        print(f"note: diffusers leaves these out of {_FORMAT.value} files: {', '.join(unread)}", file=sys.stderr)
    print(f"wrote {file}: {_FORMAT.value}, {_DTYPE.value}")


if __name__ == "__main__":
    command.run(main)
