"""Layouts of LoRA files: tensors by key <-> LoRA by layer, for the models of ``lora_names``.

| format | keys | read by |
|---|---|---|
| ``diffusers`` | diffusers' names; alpha in the file's header | diffusers; others take alpha = rank |
| ``diffusers-baked`` | the same, B times alpha / r, nothing recorded | diffusers, ComfyUI |
| ``peft`` | diffusers' names; alpha in ``adapter_config.json`` | PEFT |
| ``kohya`` | ``lora_unet_`` names of the original layout, an alpha per layer | kohya, ComfyUI, diffusers |
| ``comfyui`` | the same under ``diffusion_model.``, with dots | ComfyUI, diffusers |

The original layout is Black Forest Labs' for FLUX; for Qwen-Image it is diffusers' own.

Reading goes by content: the prefix of the keys says which format it is, the names which model; they may be diffusers'
or the original's, and halves may be called A and B or down and up, under any prefix.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora_bfl, weights
from cocoedit_jax.models.lora_bfl import LowRank
from cocoedit_jax.models.lora_names import MODELS, choose, titles

DTYPES = ("float32", "bfloat16", "float16")
PREFIX = {
    "diffusers": "transformer.",
    "diffusers-baked": "transformer.",
    "peft": "base_model.model.",
    "kohya": "lora_unet_",
    "comfyui": "diffusion_model.",
}
FORMATS = tuple(PREFIX)
_ORIGINAL = ("kohya", "comfyui")  # formats with the names of the original layout
# Models of whose original layout diffusers reads the blocks and, without a word, nothing else (as of version 0.42).
_BLOCKS_ONLY = ("flux",)
# Prefixes met in files, the more specific first. OneTrainer writes lora_transformer_; a transformer's own
# save_lora_adapter writes none.
_READ = {
    "transformer.": "diffusers",
    "base_model.model.": "peft",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "diffusion_model.": "comfyui",
    "": "diffusers",
}
_BARE = re.compile(r"(double_|single_)?(transformer_)?blocks\.\d+\.")  # a key without prefix
# PEFT's adapter may have kept its name ("default") from memory.
_KEY = re.compile(r"(.+)\.(?:(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight|(alpha))")


def plain(number: float) -> float | int:
    """The number as JSON's readers expect it: without a decimal point if it is whole."""
    return int(number) if number == int(number) else number


def detect(source: str, keys: Iterable[str], format: str | None) -> tuple[str, str]:
    """Format and prefix of most of ``keys``. Raises UserError, naming ``source``, when there is none."""
    if format is not None and format not in FORMATS:
        raise UserError(f"format={format!r}; expected one of {', '.join(FORMATS)}")
    wanted = None if format is None else format.removesuffix("-baked")
    prefixes = [prefix for prefix, name in _READ.items() if wanted in (None, name)]
    counts = Counter(
        next((p for p in prefixes if (key.startswith(p) if p else _BARE.match(key))), None) for key in keys
    )
    counts.pop(None, None)
    if not counts:
        first = ", ".join(sorted(keys)[:3]) or "no tensors"
        raise UserError(f"{source}: no LoRA of {titles()} in {format or 'any known'} format; it holds {first}")
    prefix = counts.most_common(1)[0][0]
    assert prefix is not None
    return _READ[prefix], prefix


def _pairs(tensors: Mapping[str, np.ndarray], prefix: str, problems: list[str]) -> dict[str, LowRank]:
    """{layer's name in the file: its LoRA}; alpha is NaN where the file has none."""
    halves: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        half = match and ("a" if match[2] else "b" if match[3] else "alpha")
        fits = tensor.size == 1 if half == "alpha" else tensor.ndim == 2
        if match is None or half is None or not key.startswith(prefix) or not fits:
            problems.append(
                f"{key} {tensor.shape}: expected {prefix}LAYER.lora_A.weight and .lora_B.weight (or .lora_down, "
                ".lora_up) with two axes, or .alpha with one number"
            )
        elif not np.isfinite(tensor.astype(np.float32)).all():
            problems.append(f"{key}: not finite")
        else:
            halves.setdefault(match[1].removeprefix(prefix), {})[half] = key, tensor.astype(np.float32)
    pairs = {}
    for name, found in halves.items():
        a, b, alpha = found.get("a"), found.get("b"), found.get("alpha")
        if a is None or b is None:
            problems += [f"{key}: its other half is missing" for key, _ in found.values()]
        elif not a[1].shape[0] == b[1].shape[1] > 0:
            problems.append(f"{a[0]}, {b[0]}: ranks {a[1].shape[0]} and {b[1].shape[1]}; expected the same, above 0")
        else:
            pairs[name] = LowRank(a[1], b[1], float(alpha[1].item()) if alpha else np.nan)
    return pairs


def decode(
    source: str, tensors: Mapping[str, np.ndarray], prefix: str, model: str | None, problems: list[str]
) -> tuple[dict[str, LowRank], str | None]:
    """A file's LoRA by diffusers names, fused projections taken apart, and its model (see ``lora_names.choose``).

    Appends to ``problems`` what is no LoRA of that model. Alpha is NaN where the tensors do not tell it.

    Raises:
        UserError: naming ``source``, if the layers are not those of one model, or not those of ``model``.
    """
    layers: dict[str, LowRank] = {}
    pairs = _pairs(tensors, prefix, problems)
    found = choose(source, pairs, model) if pairs else model
    names = MODELS[found or next(iter(MODELS))]
    for name, pair in pairs.items():
        try:
            if not names.layers_of(name):
                raise ValueError(f"{titles([found] if found else MODELS)} has no such layer")
            parts = lora_bfl.split(names, name, pair)
        except ValueError as error:
            problems.append(f"{prefix}{name}: {error}")
            continue
        problems += [f"{prefix}{name}: holds {p}, and another key does too" for p in parts.keys() & layers.keys()]
        layers |= parts
    return layers, found


def unify(layers: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], bool]:
    """The same effects with one rank and one alpha, and whether anything had to change for it.

    Smaller ranks are padded with zeros; differing scales move into B.
    """
    rank = max(x.rank for x in layers.values())
    scales = [x.scale for x in layers.values()]
    # Alphas come from float32 tensors, and fused ones are divided.
    same_scale = np.ptp(scales) <= 1e-6 * np.abs(scales).max()
    alpha = plain(float(f"{scales[0] * rank:.7g}")) if same_scale else rank
    unified = {}
    for name, x in layers.items():
        b = x.b if same_scale else x.b * np.float32(x.scale)
        pad = rank - x.rank
        unified[name] = LowRank(np.pad(x.a, ((0, pad), (0, 0))), np.pad(b, ((0, 0), (0, pad))), alpha)
    return unified, not same_scale or any(x.rank != rank for x in layers.values())


def encode(layers: Mapping[str, LowRank], format: str, dtype: str, model: str | None = None) -> dict[str, np.ndarray]:
    """Tensors of ``layers``, which have one rank and alpha, in ``format``.

    Args:
        model: whose layers these are; by default known by their names.

    Raises:
        UserError: numbers beyond ``dtype``'s range, layers that the format has no name for, or that several models
            have by other names in this format.
    """
    prefix, original = PREFIX[format], format in _ORIGINAL
    halves = ("lora_down.weight", "lora_up.weight") if original else ("lora_A.weight", "lora_B.weight")
    tensors: dict[str, np.ndarray] = {}
    if original:
        model = choose(format, layers, model)
        if model is None:
            raise UserError(
                f"{format}: {titles()} have all of these layers, under other names in this format; expected "
                f"{' or '.join(f'model={key}' for key in MODELS)}"
            )
        layers = lora_bfl.fuse(MODELS[model], layers)
    for name, x in layers.items():
        stem = prefix + (name.replace(".", "_") if format == "kohya" else name)
        b = x.b * np.float32(x.scale) if format == "diffusers-baked" else x.b
        with np.errstate(over="ignore"):  # looked at below
            tensors |= {
                f"{stem}.{h}": np.asarray(f).astype(jnp.dtype(dtype)) for h, f in zip(halves, (x.a, b), strict=True)
            }
        if original:
            tensors[f"{stem}.alpha"] = np.asarray(x.alpha, np.float32)
    infinite = [name for name, tensor in tensors.items() if not np.isfinite(tensor.astype(np.float32)).all()]
    weights.refuse(f"{format} in {dtype}", [f"{name}: not finite" for name in infinite])
    return tensors


def unread_by_diffusers(layers: Collection[str], format: str, model: str | None = None) -> list[str]:
    """Those of ``layers`` that diffusers leaves out of a file in ``format``; ``model`` as in ``encode``."""
    if format not in _ORIGINAL or choose(format, layers, model) not in _BLOCKS_ONLY:
        return []
    return sorted(name for name in layers if not _BARE.match(name))
