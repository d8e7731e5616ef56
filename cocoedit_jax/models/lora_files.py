"""LoRA files: read from and written to disk in the formats of ``lora_formats``.

Alpha is recorded or folded into B, never both: a reader of the record would apply it twice.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora_names, model_card, weights
from cocoedit_jax.models.lora import Adapter, LoraConfig, check_fits
from cocoedit_jax.models.lora_bfl import LowRank
from cocoedit_jax.models.lora_formats import DTYPES, FORMATS, PREFIX, decode, detect, encode, plain, unify
from cocoedit_jax.reporting.telemetry import write_text

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FOLDER, PEFT_FILE, PEFT_CONFIG = "peft", "adapter_model.safetensors", "adapter_config.json"
CARD_FILE = "README.md"
# Header key from which diffusers takes rank, alpha and targets; without it, it assumes alpha = rank.
METADATA_KEY = "lora_adapter_metadata"

# The released code's converter writes this name, and loses alpha.
_CONVERTED = "adapter_model_converted"
_PEFT_ALPHA = 8  # PEFT's default, where a configuration leaves it out
_REFUSED = ("use_rslora", "use_dora", "lora_bias", "modules_to_save")


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies on disk, before it belongs to a model.

    Attributes:
        path: the tensor file.
        format: one of ``FORMATS``.
        layers: {diffusers name: LoRA}, all of one rank and alpha.
        config: that rank and alpha, and the targets.
        dtype: of the tensors in the file.
        header: what else the file's header says.
        model: key in ``lora_names.MODELS``; None where the layers are those of several.
        notes: what a user should know about how it was read.
    """

    path: Path
    format: str
    layers: dict[str, LowRank]
    config: LoraConfig
    dtype: str
    header: dict[str, str]
    model: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(x.a.size + x.b.size for x in self.layers.values())


# --- reading ----------------------------------------------------------------------------------------------------------


def _locate(path: Path) -> Path:
    """The tensor file at ``path``: a file, or a folder that holds one under a name that diffusers or PEFT gave it."""
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} .safetensors files there, name one" if found else "no LoRA adapter there"
    raise UserError(f"{path}: {what}; expected a folder with {DIFFUSERS_FILE} or {PEFT_FILE}, or a file")


def _read_fields(file: Path, format: str, prefix: str, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration fields, from the header (diffusers) or the file beside it (PEFT); {} when not recorded."""
    try:
        if format == "diffusers":
            raw = json.loads(header.get(METADATA_KEY, "{}"))
            fields = {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}
            if raw and not fields:
                raise ValueError(f"no entry of {METADATA_KEY} starts with {prefix!r}")
        elif format == "peft":
            fields = json.loads((file.parent / PEFT_CONFIG).read_text())
        else:
            return {}
        for name in ("r", "lora_alpha"):
            if not isinstance(fields.get(name, 1), (int, float)):
                raise ValueError(f"{name}={fields[name]!r}; expected a number")
    except (OSError, ValueError, AttributeError) as error:
        hint = "; to do without it, give alpha" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{file}: its LoRA configuration is not readable ({error}){hint}") from error
    used = [name for name in _REFUSED if fields.get(name)]
    if used:
        raise UserError(f"{file}: LoRA configuration uses {used}; expected plain LoRA")
    return fields


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's ``rank_pattern`` and ``alpha_pattern``: a key is a regular expression for a name's end."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _check_ranks(layers: Mapping[str, LowRank], fields: Mapping[str, Any]) -> list[str]:
    wrong: dict[tuple[int, int], list[str]] = {}
    for name, x in layers.items():
        rank = _by_pattern(fields.get("rank_pattern"), name, fields.get("r", x.rank))
        if rank != x.rank:
            wrong.setdefault((x.rank, rank), []).append(name)
    return [f"rank {found} in {', '.join(n)}; its configuration says {said}" for (found, said), n in wrong.items()]


# Keys of adapters of the text encoders, which train beside the transformer's in some tools.
_TEXT_ENCODERS = ("lora_te", "text_encoder", "lora_transformer_te")


def read_lora(
    path: Path, format: str | None = None, *, alpha: float | None = None, model: str | None = None
) -> LoraFile:
    """Reads a LoRA of one of ``lora_names.MODELS`` in any of ``FORMATS``.

    Args:
        path: the safetensors file, or a folder in diffusers' or PEFT's layout.
        format: what it is; by default found out from the keys.
        alpha: overrides what the file says, for every layer. A file that says nothing acts at alpha = rank.
        model: key of the model that it has to be of; by default known by the names of its layers.

    Raises:
        UserError: nothing readable there, a LoRA of another model or of none, or keys that are not a plain LoRA's, all
            named together.
    """
    if alpha is not None and not 0 < alpha < np.inf:
        raise UserError(f"alpha={alpha}; expected a number above 0")
    file = _locate(Path(path))
    tensors, header = weights.load_safetensors(file)
    detected, prefix = detect(str(file), tensors.keys(), format)
    fields: dict[str, Any] = {}
    if not (detected == "peft" and alpha is not None and not (file.parent / PEFT_CONFIG).exists()):
        fields = _read_fields(file, detected, prefix, header)
    if format == "diffusers-baked" and fields:
        raise UserError(f"{file}: its header records alpha, so it is not {format}; expected format diffusers")
    problems: list[str] = []
    others = [key for key in tensors if key.startswith(_TEXT_ENCODERS)]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in others}
    layers, model = decode(str(file), tensors, prefix, model, problems)
    problems += _check_ranks(layers, fields)
    weights.refuse(str(file), problems)

    recorded = fields.get("lora_alpha", _PEFT_ALPHA) if fields else None
    notes: list[str] = []
    if others:
        first = ", ".join(sorted(others)[:2]) + (", ..." if len(others) > 2 else "")
        notes.append(f"{file}: {len(others)} tensor(s) of text encoders are left out: {first}")
    for name, x in layers.items():
        value = _by_pattern(fields.get("alpha_pattern"), name, x.rank if recorded is None else recorded)
        value = value if np.isnan(x.alpha) else x.alpha
        layers[name] = x._replace(alpha=value if alpha is None else alpha)
    if detected == "diffusers" and not fields:
        detected = "diffusers-baked"
        if alpha is None and file.name.startswith(_CONVERTED):
            rank = next(iter(layers.values())).rank
            notes.append(
                f"{file} does not record its alpha: the scale alpha / rank that it should act at is unknown. The "
                "released code trains at scale 2 and loses that on export; its published evaluation ran at scale 1, "
                f"which programs assume, and so does this one. To choose, give alpha={2 * rank} for the strength it "
                f"was trained at, or alpha={rank} for that of the published evaluation"
            )
    layers, changed = unify(layers)
    if changed:
        notes.append(f"{file}: layers differ in rank or scale; padded to the largest rank, scales moved into B")
    one = next(iter(layers.values()))
    targets = fields.get("target_modules")
    targets = tuple(targets if isinstance(targets, list) else sorted(layers))
    return LoraFile(
        file, detected, layers, LoraConfig(one.rank, one.alpha, targets),
        dtype=next(str(t.dtype) for t in tensors.values() if t.ndim == 2),
        header={k: v for k, v in header.items() if k not in ("format", METADATA_KEY) and not k.startswith("ss_")},
        model=model, notes=tuple(notes),
    )  # fmt: skip


def load_lora(
    path: Path,
    format: str | None = None,
    *,
    alpha: float | None = None,
    model: str | None = None,
    transformer_params: Mapping[str, Any] | None = None,
) -> tuple[Adapter, LoraConfig]:
    """``stack_layers`` of ``read_lora``, whose arguments these are."""
    if model is None and transformer_params is not None:
        model = model_of(transformer_params)
    return stack_layers(read_lora(path, format, alpha=alpha, model=model), transformer_params)


def model_of(transformer_params: Mapping[str, Any]) -> str | None:
    """Key in ``lora_names.MODELS`` of the model whose linear layers these parameters are; None for any other."""
    paths = [path[:-1] for path in weights.flatten(transformer_params) if path[-1] == "kernel"]
    return lora_names.only([weights.module_name(path, 0 if path[0] in weights.STACKED else None) for path in paths])


def stack_layers(found: LoraFile, transformer_params: Mapping[str, Any] | None = None) -> tuple[Adapter, LoraConfig]:
    """The adapter (float32, layers stacked, on the host) and configuration of a file that was read.

    Prints to standard error what the file leaves open.

    Args:
        found: the file.
        transformer_params: the model's parameters, arrays or shapes. With them, a file that adapts only some layers of
            a stack gets zeros for the others, and everything is checked to fit the model.

    Raises:
        UserError: for what does not fit the model, and without a model for layers of a stack that the file leaves out.
    """
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    model = None if transformer_params is None else model_of(transformer_params)
    if model is not None:
        lora_names.choose(str(found.path), found.layers, model)
    stacks: dict[tuple[str, ...], dict[int, np.ndarray]] = {}  # layer -1: not in a stack
    for name, x in found.layers.items():
        module_path, layer = weights.module_path(name)
        for leaf, factor in (("lora_A", x.a), ("lora_B", x.b)):
            stacks.setdefault((*module_path, leaf), {})[-1 if layer is None else layer] = factor.T
    problems: list[str] = []
    flat: dict[tuple[str, ...], Any] = {}
    for module_path, stack in stacks.items():
        if transformer_params is not None and -1 not in stack:
            _fill_up(stack, transformer_params.get(module_path[0], {}))
        layers = sorted(stack)
        if layers == [-1]:
            flat[module_path] = stack[-1]
        elif layers == list(range(len(stack))) and len({x.shape for x in stack.values()}) == 1:
            flat[module_path] = np.stack([stack[layer] for layer in layers])
        else:
            problems.append(f"{'.'.join(module_path)}: layers {layers}; expected all from 0 on, of one shape")
    weights.refuse(str(found.path), problems)
    adapter = weights.unflatten(flat)
    if transformer_params is not None:
        check_fits(adapter, transformer_params, str(found.path))
    return adapter, found.config


def _fill_up(stack: dict[int, np.ndarray], params: Mapping[str, Any]) -> None:
    """Adds zeros for the layers of ``params``, a stack of blocks, that ``stack`` lacks."""
    depth = next((leaf.shape[0] for leaf in weights.flatten(params).values()), 0)
    zeros = np.zeros_like(next(iter(stack.values())))
    stack.update({layer: zeros for layer in range(depth) if layer not in stack})


# --- writing ----------------------------------------------------------------------------------------------------------


def adapter_layers(adapter: Adapter, cfg: LoraConfig) -> dict[str, LowRank]:
    """{diffusers name: LoRA} of an adapter tree, as the writers take it."""
    tensors = weights.to_diffusers(adapter)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {n: LowRank(tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"], cfg.alpha) for n in names}


def _diffusers_fields(cfg: LoraConfig) -> dict[str, Any]:
    fields = {"r": cfg.rank, "lora_alpha": plain(cfg.alpha), "target_modules": list(cfg.targets)}
    return {PREFIX["diffusers"] + name: value for name, value in fields.items()}


def _peft_config(cfg: LoraConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": cfg.rank,
        "lora_alpha": plain(cfg.alpha),
        "target_modules": list(cfg.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }


def write_lora(
    path: Path,
    layers: Mapping[str, LowRank],
    cfg: LoraConfig,
    format: str,
    *,
    dtype: str = "float32",
    model: str | None = None,
    info: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes ``layers`` (of one rank and alpha, those of ``cfg``) in ``format``; returns the tensor file.

    Args:
        path: a name ending in .safetensors is the file; anything else a folder, in which the file gets the name that
            diffusers and PEFT look for. ``peft`` needs a folder.
        dtype: one of ``DTYPES``.
        model: key of the model that they are of; by default known by their names.
        info: joins the safetensors header.
        overwrite: replace files that exist.

    Raises:
        UserError: a file is in the way, the format has no name for a layer, or a number does not fit ``dtype``.
    """
    for name, value, choices in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise UserError(f"{name}={value!r}; expected one of {', '.join(choices)}")
    path, peft = Path(path), format == "peft"
    if peft and path.suffix == ".safetensors":
        raise UserError(f"{path}: format peft is a folder with {PEFT_FILE} and {PEFT_CONFIG}; expected a folder's name")
    file = path if path.suffix == ".safetensors" else path / (PEFT_FILE if peft else DIFFUSERS_FILE)
    config = file.parent / PEFT_CONFIG
    in_the_way = [f for f in ((file, config) if peft else (file,)) if f.exists()]
    if in_the_way and not overwrite:
        raise UserError(f"{', '.join(map(str, in_the_way))}: exists; add --overwrite, or name another place")
    tensors = encode(layers, format, dtype, model)
    header = {METADATA_KEY: json.dumps(_diffusers_fields(cfg))} if format == "diffusers" else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    if peft:
        config.unlink(missing_ok=True)  # new tensors must not be read with an old alpha
    weights.save_safetensors(file, tensors, {**(info or {}), **header, "format": "pt"})
    if peft:
        write_text(config, json.dumps(_peft_config(cfg), indent=1) + "\n")
    return file


def save_lora(
    folder: Path,
    adapter: Adapter,
    cfg: LoraConfig,
    info: Mapping[str, str] | None = None,
    *,
    model: str | None = None,
) -> None:
    """Writes what training gives: ``folder`` in diffusers' layout, ``folder/peft`` in PEFT's, and a model card.

    There is one ``.safetensors`` in ``folder`` itself, so that ``pipe.load_lora_weights(folder)`` cannot take another;
    ``launch.convert_lora`` makes the rest. ``info`` (see ``model_card.write``) joins both headers; ``model``, the key
    of the model in ``lora_names.MODELS``, is by default known by the names of the layers.
    """
    layers = adapter_layers(adapter, cfg)
    model = model or lora_names.only(layers)
    write_lora(folder, layers, cfg, "diffusers", info=info)
    write_lora(folder / PEFT_FOLDER, layers, cfg, "peft", info=info)
    write_text(folder / CARD_FILE, model_card.write(cfg, len(layers), info or {}, model))
