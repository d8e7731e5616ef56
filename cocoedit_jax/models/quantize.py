"""The frozen base in 8 bits: kernels with one scale per output channel, and the product of activations with them.

A kernel ``W [in, out]`` is stored as ``values [in, out]`` (int8 or float8_e4m3fn) and ``scale [out]`` (float32), with
``W ~ values * scale``, symmetric: the largest magnitude of a column is the largest number of the format. It is one leaf
of ``params``, a ``Kernel``, in the place of the array; stacks have a leading layer axis in both.

Formats with quantised activations (``int8``, ``fp8``) round every token ``x [in]`` to the same format with a scale of
its own, multiply 8-bit numbers by 8-bit numbers, and scale the sum: ``y = (x8 @ values) * scale_x * scale``. The sum is
exact in int32 for int8, and float32 for fp8. ``int8_weights`` multiplies the activations as they are: it saves memory
and no time.

Rounding an activation has gradient one (straight-through, arXiv 1308.3432): the gradient that flows back is that of the
stored kernel, ``dx = (dy * scale) @ values^T``, in the dtype of the activations, in all formats. Kernel and scale are
constants. An adapter is applied to the activations as they are, and its own gradients are not rounded.

Rollout and optimizer step may differ (``phase_formats``). The velocities that the objective compares, of the trained,
old and reference policy, are always of one base, that of the step. What a rollout of another format draws is then
off-policy by the rounding, as samples of an earlier policy are: DiffusionNFT (arXiv 2509.16117) has no likelihood ratio
that this would bias, it takes the samples as data.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights

Array = jax.Array

# The layers that are quantised, by the end of their diffusers names: all large ones of the blocks, more than 99 % of a
# transformer's arithmetic. Embedders, modulation and the output layer stay as they are: they take few tokens or are
# small, and their error would reach every block or the velocity itself.
LAYERS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "net.0.proj", "net.2", "proj_mlp", "proj_out",
)  # fmt: skip
OUTPUT_NAME = "quantized_linear"  # of a layer's result, for remat policies: its int32 sum need not be kept


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kernel is stored and multiplied.

    Attributes:
        dtype: of the stored values.
        limit: their largest magnitude.
        activations: whether activations are rounded to ``dtype`` too.
    """

    dtype: Any
    limit: float
    activations: bool

    @property
    def sum_dtype(self) -> Any:
        """In which products of two numbers of ``dtype`` are summed."""
        return jnp.int32 if self.dtype == jnp.int8 else jnp.float32


FORMATS: dict[str, Format] = {
    "int8": Format(jnp.int8, 127.0, activations=True),
    "int8_weights": Format(jnp.int8, 127.0, activations=False),
    "fp8": Format(jnp.float8_e4m3fn, 448.0, activations=True),
}


@flax.struct.dataclass
class Kernel:
    """A quantised kernel, or a stack of them; has the shape and placement of the kernel it stands for."""

    values: Any  # [..., in, out]
    scale: Any  # [..., out], float32
    format: str = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def sharding(self) -> Any:
        return self.values.sharding


def is_kernel(leaf: Any) -> bool:
    return isinstance(leaf, Kernel)


def check_format(name: str, field: str, device: Any = None) -> None:
    """Raises UserError, naming ``field``, where ``name`` is no format (empty: none), or ``device`` lacks its arithmetic
    (CPUs take all formats, for tests)."""
    if name and name not in FORMATS:
        raise UserError(f"{field}={name!r}; expected one of {list(FORMATS)}, or empty for full precision")
    if name != "fp8" or device is None:
        return
    kind = str(device.device_kind)
    old_tpu = device.platform == "tpu" and not kind.startswith("TPU7")
    capability = str(getattr(device, "compute_capability", "") or "")
    old_gpu = device.platform == "gpu" and "." in capability and float(capability) < 8.9
    if old_tpu or old_gpu:
        raise UserError(f"{field}='fp8' on a {kind}, which has no fp8 arithmetic; expected int8")


def round_to(x: Array, form: Format, axis: int) -> tuple[Array, Array]:
    """``x`` in ``form.dtype`` and its float32 scale with ``axis`` of size 1, so that ``x ~ values * scale``.

    What is not finite makes its scale NaN or infinite, and so its products, instead of vanishing in the rounding.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / form.limit)
    scaled = jnp.clip(x / scale, -form.limit, form.limit)
    if form.sum_dtype == jnp.int32:
        scaled = jnp.round(scaled)
    return scaled.astype(form.dtype), scale


def quantize(kernel: Array, name: str) -> Kernel:
    """A kernel ``[..., in, out]`` in the format ``name``."""
    values, scale = round_to(kernel, FORMATS[name], axis=-2)
    return Kernel(values, jnp.squeeze(scale, axis=-2), name)


def dequantize(kernel: Kernel, dtype: Any = jnp.float32) -> Array:
    """The kernel that ``kernel`` stands for."""
    return (kernel.values.astype(jnp.float32) * kernel.scale[..., None, :]).astype(dtype)


def _dot(x: Array, kernel: Array, contract: int, sum_dtype: Any) -> Array:
    """``x [..., n]`` by dimension ``contract`` of ``kernel``."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (contract,)), ((), ())), preferred_element_type=sum_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, values: Array, scale: Array, name: str) -> Array:
    form = FORMATS[name]
    if form.activations:
        rounded, token_scale = round_to(x, form, axis=-1)
        y = _dot(rounded, values, 0, form.sum_dtype).astype(jnp.float32) * token_scale * scale
    else:  # whole numbers to 127 are exact in bfloat16
        y = _dot(x, values.astype(x.dtype), 0, jnp.float32) * scale
    return checkpoint_name(y.astype(x.dtype), OUTPUT_NAME)


def _forward(x: Array, values: Array, scale: Array, name: str) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, values, scale, name), (values, scale)


def _backward(name: str, kept: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    values, scale = kept
    scaled = (dy.astype(jnp.float32) * scale).astype(dy.dtype)
    return _dot(scaled, values.astype(dy.dtype), 1, jnp.float32).astype(dy.dtype), None, None


_matmul.defvjp(_forward, _backward)


def matmul(x: Array, kernel: Kernel) -> Array:
    """``x W`` for activations ``[..., in]``, in their dtype; gradients as at the top."""
    return _matmul(x, kernel.values, kernel.scale, kernel.format)


def result_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Logical axes of a bias or scale of a kernel with logical ``axes``: too small to be worth fetching, it is split
    only as its layer's result is."""
    return tuple(None if name == "embed" else name for name in (*axes[:-2], axes[-1]))


# --- trees of parameters ---------------------------------------------------------------------------------------------


def _is_quantised(path: tuple[str, ...]) -> bool:
    name = ".".join(path[:-1])
    hit = any(name.endswith("." + layer) for layer in LAYERS)
    return path[0] in weights.STACKED and path[-1] == "kernel" and hit


def _map_kernels(params: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return weights.unflatten(
        {path: change(leaf) if _is_quantised(path) else leaf for path, leaf in weights.flatten(params).items()}
    )


def quantize_params(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A transformer's parameters with the kernels of ``LAYERS`` in the format ``name`` (empty: as they are).

    Args:
        params: arrays or tracers; boxed with logical axis names or not.
    """

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return quantize(leaf, name)
        kernel = quantize(leaf.value, name)
        scale = nn.LogicallyPartitioned(kernel.scale, result_axes(leaf.names))
        return Kernel(leaf.replace(value=kernel.values), scale, name)

    return _map_kernels(params, change) if name else dict(params)


def with_format(params: Any, name: str) -> Any:
    """``params`` with the same kernels, multiplied as ``name`` says. Raises ValueError where that stores others."""

    def change(leaf: Any) -> Any:
        if not is_kernel(leaf):
            return leaf
        if not same_storage(leaf.format, name):
            raise ValueError(f"a kernel stored as {leaf.format} cannot be used as {name}")
        return leaf.replace(format=name)

    return jax.tree.map(change, params, is_leaf=is_kernel)


def same_storage(a: str, b: str) -> bool:
    """Whether two formats (empty: full precision) store the same numbers."""
    return a == b or bool(a and b and FORMATS[a].dtype == FORMATS[b].dtype)


def phase_formats(config: Any) -> tuple[str, str]:
    """Formats of rollout and optimizer step: ``config.model.quantize``, unless ``rollout.quantize`` or
    ``train.quantize`` says otherwise.

    Raises:
        UserError: naming the field, for a name that is no format, or two formats that store different numbers.
    """
    common = config.model.get("quantize", "")
    check_format(common, "config.model.quantize")
    out = []
    for phase in ("rollout", "train"):
        own = config[phase].get("quantize", "")
        check_format(own, f"config.{phase}.quantize")
        out.append(own or common)
    rollout, train = out
    if rollout and train and not same_storage(rollout, train):
        raise UserError(
            f"config.rollout.quantize={rollout!r}, config.train.quantize={train!r}; expected formats that store the "
            "same numbers, or one phase in full precision"
        )
    return rollout, train


@functools.lru_cache(maxsize=64)
def _program(name: str, shardings: Any) -> Any:
    return jax.jit(lambda kernel: quantize(kernel, name), out_shardings=shardings)


def quantize_placed(kernel: Array, target: Kernel) -> Kernel:
    """``kernel``, placed as ``target.values`` is, in the format and with the shardings of ``target`` (arrays or
    ShapeDtypeStructs)."""
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return _program(target.format, shardings)(kernel)
