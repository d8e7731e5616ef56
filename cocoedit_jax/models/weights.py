"""Parameter trees <-> safetensors files with diffusers' tensor names.

The names in our trees are diffusers' own, so the map is mechanical: stacked blocks are unstacked into numbered ones,
``kernel [in, out]`` becomes ``weight [out, in]``, a convolution's ``kernel [h, w, in, out]`` becomes
``weight [out, in, h, w]`` and a norm's ``scale`` becomes ``weight``. Adapter trees go the same way: ``lora_A [in, r]``
becomes ``lora_A.weight [r, in]``.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from cocoedit_jax.errors import UserError

# Collections of blocks that are stacked along a leading layer axis.
STACKED = ("transformer_blocks", "single_transformer_blocks")
# Leaves that torch stores with other axes, and leaves with another name there.
_TRANSPOSED = ("kernel", "lora_A", "lora_B")
_CONVOLUTION = 4  # dimensions of a convolution's kernel
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


class Spec(NamedTuple):
    """Where a tensor of a file belongs: path and layer index (None outside a stack) here, shape in the file."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested dict -> {path: leaf}."""
    out: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flatten(value, (*prefix, name))
        else:
            out[(*prefix, name)] = value
    return out


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        node = out
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return out


def module_name(path: tuple[str, ...], layer: int | None) -> str:
    """Diffusers name of the module at ``path``; ``layer`` is its index in a stack of blocks, or None outside one."""
    return ".".join(path if layer is None else (path[0], str(layer), *path[1:]))


def module_path(name: str) -> tuple[tuple[str, ...], int | None]:
    """Inverse of ``module_name``. An index inside a block belongs to the module before it (``to_out.0``,
    ``net.2``), and so does the one layer of a modulation (``norm1.linear``)."""
    stack, _, rest = name.partition(".")
    head, layer = (), None
    if stack in STACKED:
        index, _, name = rest.partition(".")
        if not index.isdecimal():
            raise ValueError(f"module name {stack}.{rest!r}: expected a layer index after {stack!r}")
        head, layer = (stack,), int(index)
    return (*head, *re.findall(r"net\.\d+(?:\.proj)?(?=\.|$)|\w+\.linear(?=\.|$)|[^.]+(?:\.\d+)?(?=\.|$)", name)), layer


def _tensor_name(path: tuple[str, ...], layer: int | None) -> str:
    return f"{module_name(path[:-1], layer)}.{_LEAF_NAMES.get(path[-1], path[-1])}".lstrip(".")


def torch_axes(leaf: str, ndim: int) -> tuple[int, ...]:
    """Order of our axes in torch, for ``numpy.transpose``."""
    if leaf not in _TRANSPOSED:
        return tuple(range(ndim))
    return (3, 2, 0, 1) if ndim == _CONVOLUTION else tuple(range(ndim))[::-1]


def _to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(torch_axes(leaf, array.ndim))


def _from_torch(leaf: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(np.argsort(torch_axes(leaf, tensor.ndim)))


def tensor_specs(tree: Mapping[str, Any]) -> dict[str, Spec]:
    """Diffusers name -> where it belongs in ``tree``, of arrays or ShapeDtypeStructs."""
    specs = {}
    for path, leaf in flatten(tree).items():
        stacked = path[0] in STACKED
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = tuple(shape[axis] for axis in torch_axes(path[-1], len(shape)))
        for layer in range(leaf.shape[0]) if stacked else (None,):
            specs[_tensor_name(path, layer)] = Spec(path, layer, shape)
    return specs


def tensor_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Diffusers name -> shape in torch layout, of arrays or ShapeDtypeStructs."""
    return {name: shape for name, (_, _, shape) in tensor_specs(tree).items()}


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors under their diffusers names, in torch layout."""
    flat = {path: np.asarray(jax.device_get(leaf)) for path, leaf in flatten(params).items()}
    out = {}
    for name, (path, layer, _) in tensor_specs(params).items():
        leaf = flat[path] if layer is None else flat[path][layer]
        out[name] = np.ascontiguousarray(_to_torch(path[-1], leaf))
    return out


def misfits(
    specs: Mapping[str, Spec], found: Mapping[str, tuple[int, ...]], unreadable: Collection[str] = ()
) -> list[str]:
    """A line for every missing, unexpected and wrong-shape tensor; ``unreadable`` ones are not called missing."""
    known = {*found, *unreadable}
    problems = [f"missing: {name} {spec.shape}" for name, spec in specs.items() if name not in known]
    problems += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in specs]
    return problems + [
        f"wrong shape: {name} {found[name]}, expected {spec.shape}"
        for name, spec in specs.items()
        if name in found and found[name] != spec.shape
    ]


def refuse(source: str, problems: list[str], summary: str = "tensor(s) do not fit") -> None:
    """Raises UserError with all ``problems`` of the tensors in ``source``, if there are any."""
    if problems:
        raise UserError(f"{source}: {len(problems)} {summary}:\n  " + "\n  ".join(sorted(problems)))


def from_diffusers(tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A tree shaped like ``abstract`` (arrays or ShapeDtypeStructs) filled with ``tensors``.

    Raises:
        UserError: naming every missing, unexpected and wrong-shape tensor of ``source`` together.
    """
    specs = tensor_specs(abstract)
    refuse(source, misfits(specs, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    layers: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, (path, _, _) in specs.items():
        tensor = tensors[name]
        layers.setdefault(path, []).append(_from_torch(path[-1], tensor))
    flat = {}
    for path, leaf in flatten(abstract).items():
        value = np.stack(layers[path]) if path[0] in STACKED else layers[path][0]
        flat[path] = jnp.asarray(value, leaf.dtype)
    return unflatten(flat)


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes ``path`` atomically."""
    temporary = path.with_name(path.name + ".tmp")
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # keeps scalars scalar
    save_file(contiguous, temporary, {"format": "pt", **(metadata or {})})
    temporary.replace(path)


def load_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the header's metadata. Raises UserError when the file is absent or not safetensors."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
