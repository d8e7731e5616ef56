"""LoRA adapters (arXiv 2106.09685) as parameter trees beside a frozen model, and their files.

An adapter has the module paths of the transformer it belongs to, with ``lora_A [.., in, r]`` and
``lora_B [.., r, out]`` in place of a kernel; stacked blocks keep their leading layer axis. It acts as
``y += alpha / r * x A B``.

Two layouts are written and read: diffusers' (``pipe.load_lora_weights(folder)``) and PEFT's
(``PeftModel.from_pretrained(transformer, folder / "peft")``). Both record alpha beside the tensors, never folded in.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights

Array = jax.Array
Adapter = dict[str, Any]

DEFAULT_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FOLDER, PEFT_FILE, PEFT_CONFIG = "peft", "adapter_model.safetensors", "adapter_config.json"
# Header key from which diffusers takes rank, alpha and targets; without it, it assumes alpha = rank.
METADATA_KEY = "lora_adapter_metadata"
_DIFFUSERS_PREFIX, _PEFT_PREFIX = "transformer.", "base_model.model."


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank, alpha and the modules adapted; a target is a module's diffusers name or the end of it (PEFT's rule)."""

    rank: int = 32
    alpha: float = 64
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}; expected at least 1")
        if not self.targets:
            raise UserError("lora.targets=(); expected at least one module name")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _hits(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


def _target_kernels(params: Mapping[str, Any], cfg: LoraConfig) -> dict[tuple[str, ...], Any]:
    """{module path: kernel} of the modules that ``cfg.targets`` name."""
    found, used = {}, set()
    for path, leaf in weights.flatten(params).items():
        if path[-1] != "kernel":
            continue
        layers = range(leaf.shape[0]) if path[0] in weights.STACKED else (None,)
        hits = [{t for t in cfg.targets if _hits(t, weights.module_name(path[:-1], layer))} for layer in layers]
        if all(hits):
            found[path[:-1]] = leaf
            used.update(*hits)
    unused = [target for target in cfg.targets if target not in used]
    if unused:
        raise UserError(f"lora.targets: {unused} match no linear layer of the model (of a stack, all layers or none)")
    return found


def init_adapter(key: Array, transformer_params: Mapping[str, Any], cfg: LoraConfig) -> Adapter:
    """A fresh adapter: A ~ N(0, 1 / r^2) as PEFT's "gaussian", B = 0, so that it changes nothing yet; float32.

    Args:
        key: random key.
        transformer_params: the transformer's parameters, arrays or ShapeDtypeStructs, without partitioning boxes.
        cfg: which modules, and the rank.

    Raises:
        UserError: a target matches no linear layer.
    """
    flat: dict[tuple[str, ...], Array] = {}
    for i, (path, kernel) in enumerate(sorted(_target_kernels(transformer_params, cfg).items())):
        *layers, features_in, features_out = kernel.shape
        normal = jax.random.normal(jax.random.fold_in(key, i), (*layers, features_in, cfg.rank), jnp.float32)
        flat[(*path, "lora_A")] = normal / cfg.rank
        flat[(*path, "lora_B")] = jnp.zeros((*layers, cfg.rank, features_out), jnp.float32)
    return weights.unflatten(flat)


def fold_scale(adapter: Adapter, cfg: LoraConfig) -> Adapter:
    """The adapter with every ``lora_B`` multiplied by alpha / r: the form that the model applies."""
    flat = weights.flatten(adapter)
    return weights.unflatten({p: x * cfg.scale if p[-1] == "lora_B" else x for p, x in flat.items()})


def logical_axes(adapter: Adapter, transformer_logical_axes: Mapping[str, Any]) -> dict[str, Any]:
    """Logical axis names of an adapter's leaves: those of the kernel it belongs to, the rank axis unnamed.

    ``transformer_logical_axes`` is the transformer's tree with a tuple of names, or flax's partitioning box, per leaf.
    """
    kernels = weights.flatten(transformer_logical_axes)
    flat = {}
    for path in weights.flatten(adapter):
        box = kernels[(*path[:-1], "kernel")]
        *layers, name_in, name_out = getattr(box, "names", box)
        flat[path] = (*layers, name_in, None) if path[-1] == "lora_A" else (*layers, None, name_out)
    return weights.unflatten(flat)


def check_fits(adapter: Adapter, transformer_params: Mapping[str, Any], source: str) -> None:
    """Raises UserError naming every module of ``adapter`` that the transformer lacks or has in another shape."""
    params = weights.flatten(transformer_params)
    problems = []
    for path, leaf in weights.flatten(adapter).items():
        kernel = params.get((*path[:-1], "kernel"))
        axis = -2 if path[-1] == "lora_A" else -1
        name = ".".join(path)
        if kernel is None:
            problems.append(f"{name}: the model has no such linear layer")
        elif leaf.shape[:-2] != kernel.shape[:-2] or leaf.shape[axis] != kernel.shape[axis]:
            problems.append(f"{name} {leaf.shape}: does not fit the kernel {kernel.shape}")
    weights.refuse(source, problems)


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def to_diffusers(adapter: Adapter, cfg: LoraConfig) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and safetensors header of diffusers' LoRA layout."""
    tensors = {_DIFFUSERS_PREFIX + name: tensor for name, tensor in weights.to_diffusers(adapter).items()}
    fields = {"r": cfg.rank, "lora_alpha": _plain(cfg.alpha), "target_modules": list(cfg.targets)}
    adapter_metadata = {_DIFFUSERS_PREFIX + name: value for name, value in fields.items()}
    return tensors, {"format": "pt", METADATA_KEY: json.dumps(adapter_metadata)}


def save_lora(folder: Path, adapter: Adapter, cfg: LoraConfig, info: Mapping[str, str] | None = None) -> None:
    """Writes ``folder`` in diffusers' layout and ``folder/peft`` in PEFT's; ``info`` joins both safetensors headers."""
    peft = folder / PEFT_FOLDER
    peft.mkdir(parents=True, exist_ok=True)
    tensors, metadata = to_diffusers(adapter, cfg)
    weights.save_safetensors(folder / DIFFUSERS_FILE, tensors, {**(info or {}), **metadata})
    renamed = {_PEFT_PREFIX + name.removeprefix(_DIFFUSERS_PREFIX): tensor for name, tensor in tensors.items()}
    weights.save_safetensors(peft / PEFT_FILE, renamed, {**(info or {}), "format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": cfg.rank,
        "lora_alpha": _plain(cfg.alpha),
        "target_modules": list(cfg.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    (peft / PEFT_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _locate(path: Path) -> tuple[Path, str]:
    """The tensor file at ``path`` (a file, or a folder in either layout) and the prefix of its names."""
    for name, prefix in ((DIFFUSERS_FILE, _DIFFUSERS_PREFIX), (PEFT_FILE, _PEFT_PREFIX)):
        if (path / name).is_file():
            return path / name, prefix
    if path.is_file():
        return path, _PEFT_PREFIX if path.name == PEFT_FILE else _DIFFUSERS_PREFIX
    raise UserError(f"{path}: no LoRA adapter there; expected a folder with {DIFFUSERS_FILE} or {PEFT_FILE}, or a file")


def _read_fields(file: Path, prefix: str, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration fields, from the header (diffusers) or the file beside it (PEFT); {} when not recorded."""
    try:
        if prefix == _DIFFUSERS_PREFIX:
            raw = json.loads(header.get(METADATA_KEY, "{}"))
            fields = {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}
        else:
            fields = json.loads((file.parent / PEFT_CONFIG).read_text())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: its LoRA configuration is not readable ({error})") from error
    refused = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "modules_to_save")
    used = [name for name in refused if fields.get(name)]
    if used:
        raise UserError(f"{file}: LoRA configuration uses {used}; expected plain LoRA of one rank and alpha")
    return fields


def load_lora(path: Path, *, alpha: float | None = None) -> tuple[Adapter, LoraConfig]:
    """Reads an adapter that ``save_lora``, diffusers or PEFT wrote.

    Args:
        path: a folder in either layout, or the safetensors file itself.
        alpha: overrides the recorded value. Files without one get alpha = rank, as diffusers reads them; the released
            code's converter drops it, so its files need ``alpha=64`` to act as they were trained.

    Returns:
        The adapter (float32, layers stacked) and its configuration.

    Raises:
        UserError: nothing readable there, or keys that are not a plain LoRA adapter's, all named together.
    """
    file, prefix = _locate(Path(path))
    tensors, header = weights.load_safetensors(file)
    fields = _read_fields(file, prefix, header)
    problems: list[str] = []
    stacks: dict[tuple[str, ...], dict[int, np.ndarray]] = {}  # layer -1: not in a stack
    names: set[str] = set()
    for key, tensor in tensors.items():
        module, _, leaf = key.removesuffix(".weight").rpartition(".")
        if not (key.startswith(prefix) and key.endswith((".lora_A.weight", ".lora_B.weight")) and tensor.ndim == 2):
            problems.append(f"{key} {tensor.shape}: expected {prefix}MODULE.lora_A.weight or .lora_B.weight, 2-D")
            continue
        if f"{module}.lora_{'B' if leaf == 'lora_A' else 'A'}.weight" not in tensors:
            problems.append(f"{key}: its other half is missing")
        name = module.removeprefix(prefix)
        try:
            module_path, layer = weights.module_path(name)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        names.add(name)
        stacks.setdefault((*module_path, leaf), {})[-1 if layer is None else layer] = np.asarray(tensor, np.float32).T
    ranks = {x.shape[-1] if p[-1] == "lora_A" else x.shape[-2] for p, stack in stacks.items() for x in stack.values()}
    rank = fields.get("r", min(ranks, default=0))
    if ranks != {rank}:
        problems.append(f"ranks found {sorted(ranks)}; expected all {rank}")
    flat: dict[tuple[str, ...], Array] = {}
    for module_path, stack in stacks.items():
        layers = sorted(stack)
        if layers == [-1]:
            flat[module_path] = jnp.asarray(stack[-1])
        elif layers == list(range(len(stack))) and len({x.shape for x in stack.values()}) == 1:
            flat[module_path] = jnp.asarray(np.stack([stack[layer] for layer in layers]))
        else:
            problems.append(f"{'.'.join(module_path)}: layers {layers}; expected all from 0 on, of one shape")
    weights.refuse(str(file), problems)
    targets = fields.get("target_modules")
    targets = tuple(targets if isinstance(targets, list) else sorted(names))
    alpha = fields.get("lora_alpha") if alpha is None else alpha
    return weights.unflatten(flat), LoraConfig(rank, rank if alpha is None else alpha, targets)
