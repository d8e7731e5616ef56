"""LoRA adapters (arXiv 2106.09685) as parameter trees beside a frozen model, and their files.

An adapter has the module paths of the transformer it belongs to, with ``lora_A [.., in, r]`` and
``lora_B [.., r, out]`` in place of a kernel; stacked blocks keep their leading layer axis. It acts as
``y += alpha / r * x A B``. Their files: ``lora_files``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
