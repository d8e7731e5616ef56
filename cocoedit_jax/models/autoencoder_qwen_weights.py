"""Weights of Qwen-Image's autoencoder: the tensors of a video network, of which a single frame uses a part."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cocoedit_jax.models import orbax_weights, safetensors_folder, weights
from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.safetensors_folder import StoredTensor
from cocoedit_jax.models.sharded_weights import load_stored

Shape = tuple[int, ...]
# Convolutions that are 2-D in the files too, by the end of their module's name.
_FLAT = ("resample.1", "to_qkv", "proj")
_TIME = "time_conv"


def _video_shape(name: str, shape: Shape) -> Shape:
    """Shape in the files of the tensor with this ``shape`` here, in torch's order of axes."""
    module, _, leaf = name.rpartition(".")
    if leaf == "gamma":
        return (*shape, 1, 1) if ".attentions." in module else (*shape, 1, 1, 1)
    if leaf == "bias" or module.endswith(_FLAT):
        return shape
    return (*shape[:2], shape[-1], *shape[2:])


def _used_shapes(abstract: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes in the files of the tensors that hold the parameters ``abstract``."""
    return {name: _video_shape(name, shape) for name, shape in weights.tensor_shapes(abstract).items()}


def _time_shapes(config: AutoencoderQwenConfig) -> dict[str, Shape]:
    """The convolutions along time."""
    flags, out = config.temperal_downsample, {}

    def add(module: str, outputs: int, inputs: int) -> None:
        out.update({f"{module}.{_TIME}.weight": (outputs, inputs, 3, 1, 1), f"{module}.{_TIME}.bias": (outputs,)})

    for level, flag in enumerate(flags):
        if flag:
            channels = config.base_dim * config.dim_mult[level]
            add(f"encoder.down_blocks.{(level + 1) * (config.num_res_blocks + 1) - 1}", channels, channels)
    for i, flag in enumerate(flags[::-1]):
        if flag:
            channels = config.base_dim * config.dim_mult[::-1][i]
            add(f"decoder.up_blocks.{i}.upsamplers.0", 2 * channels, channels)
    return out


def stored_shapes(config: AutoencoderQwenConfig) -> dict[str, Shape]:
    """{name: shape} of all tensors in diffusers' files."""
    return _used_shapes(AutoencoderQwen(config).abstract_params()) | _time_shapes(config)


def unused_parameters(config: AutoencoderQwenConfig) -> dict[str, Shape]:
    """What of diffusers' files a single frame does not use: {name: shape of that part of the tensor}.

    The convolutions along time as a whole, and all but the last slice in time of every 3x3x3 kernel.
    """
    out = {}
    for name, shape in _used_shapes(AutoencoderQwen(config).abstract_params()).items():
        if len(shape) == 5 and shape[2] > 1 and name.endswith(".weight"):
            out[name] = (*shape[:2], shape[2] - 1, *shape[3:])
    return out | _time_shapes(config)


@dataclasses.dataclass(frozen=True)
class _OneFrame(StoredTensor):
    """A tensor as a single frame uses it: ``shape`` is that of the part, ``stored`` the whole."""

    stored: StoredTensor

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes  # what is read

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        whole = self.stored.read(start, stop)
        return whole[:, :, -1] if whole.ndim == len(self.shape) + 1 else whole.reshape(len(whole), *self.shape[1:])


def load_params(folder: Path, abstract: Mapping[str, Any], *, dtype: Any = None) -> dict[str, Any]:
    """Parameters of an ``AutoencoderQwen`` from diffusers' files, every array placed as ``abstract`` says.

    Args:
        folder: the ``vae`` of a model: ``config.json`` and weights, in one file or in shards.
        abstract: nested dict of ShapeDtypeStructs or arrays, with shardings: ``sharding.rules.sharded_shapes``.
        dtype: of all arrays; None takes that of ``abstract``, ``sharded_weights.STORED`` that of the files.

    Returns:
        A tree like ``abstract``. What ``unused_parameters`` lists is left behind; tensors of which nothing is used may
        be absent.

    Raises:
        UserError: the configuration is not usable; or, all together: absent, truncated and unreadable files; tensors
            that are missing, unexpected, of another shape or of a dtype that is no plain float.
    """
    return load_stored(check_params(folder, abstract), abstract, dtype=dtype, name=folder.name)


def check_params(folder: Path, abstract: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors that ``load_params`` would read, from the files' headers alone; refuses what it would refuse."""
    config = AutoencoderQwenConfig.from_dict(orbax_weights.read_config(folder), str(folder))
    found, unused = safetensors_folder.scan(folder), _time_shapes(config)
    here = weights.tensor_specs(abstract)
    specs = {name: spec._replace(shape=_video_shape(name, spec.shape)) for name, spec in here.items()}
    shapes = {name: tensor.shape for name, tensor in found.tensors.items() if name not in unused}
    problems = weights.misfits(specs, shapes, found.lost)
    weights.refuse(str(folder), found.problems + problems, "problem(s) with the weights")
    parts: dict[str, StoredTensor] = {}
    for name, spec in here.items():
        stored = found.tensors[name]
        parts[name] = _OneFrame(stored.file, stored.dtype, spec.shape, stored.offset, stored)
    return parts
