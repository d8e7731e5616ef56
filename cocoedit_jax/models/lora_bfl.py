"""Names of FLUX's linear layers in LoRA files, and LoRA of the projections that Black Forest Labs' layout fuses.

The original checkpoint (and with it kohya's and ComfyUI's files) stacks the rows of what diffusers keeps apart:
``double_blocks.0.img_attn.qkv`` is ``to_q | to_k | to_v`` and ``single_blocks.0.linear1`` is
``to_q | to_k | to_v | proj_mlp``. LoRA of n such layers, fused: A stacks theirs ``[n r, in]``, B is block-diagonal
``[rows, n r]``, alpha is n times theirs, so that alpha / r stays. A layer that is not adapted keeps a block of zeros:
readers (diffusers, kohya's converter) recognise only n equal blocks, and would give the layers rank n r otherwise.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cocoedit_jax.errors import UserError


class LowRank(NamedTuple):
    """LoRA of one linear layer, ``W += alpha / r B A``, in PyTorch's layout: ``a [r, in]``, ``b [out, r]``, float32."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _qkv(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(letter) for letter in "qkv")


_DOUBLE = {
    "img_attn.qkv": _qkv("attn.to_{}"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": _qkv("attn.add_{}_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": (*_qkv("attn.to_{}"), "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FINAL_MODULATION = "norm_out.linear"  # rows scale | shift in diffusers, shift | scale in the original
_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": (_FINAL_MODULATION,),
}
# (collection of blocks here, there, {layer there: layers here}); "" outside of blocks.
_COLLECTIONS = (
    ("transformer_blocks", "double_blocks", _DOUBLE),
    ("single_transformer_blocks", "single_blocks", _SINGLE),
    ("", "", _OUTSIDE),
)
_MLP_RATIO = 4  # rows of proj_mlp per hidden unit, in every FLUX.1
_IN_BLOCK = re.compile(r"((?:double|single|transformer|single_transformer)_blocks)[._](\d+)[._](.+)")


def _joined(name: str) -> str:
    return name.replace(".", "_")


# Layers by their names in either layout; kohya's files write "_" for ".", so both are looked up that way.
_LAYERS: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
_FUSED: dict[
    tuple[str, str], tuple[str, str, int]
] = {}  # layer here -> collection and layer there, place among its parts
for _here, _there, _table in _COLLECTIONS:
    for _name, _parts in _table.items():
        _LAYERS[_there, _joined(_name)] = _here, _parts
        for _place, _part in enumerate(_parts):
            _LAYERS[_here, _joined(_part)] = _here, (_part,)
            _FUSED[_here, _part] = _there, _name, _place


def _split_index(name: str) -> tuple[str, str, str]:
    """Collection of blocks, index and the rest of a layer's name; the first two are empty outside of blocks."""
    match = _IN_BLOCK.fullmatch(name)
    return (match[1], match[2], match[3]) if match else ("", "", name)


def _full(collection: str, index: str, rest: str) -> str:
    return f"{collection}.{index}.{rest}" if collection else rest


def layers_of(name: str) -> tuple[str, ...]:
    """Diffusers names of the layers that ``name`` holds; () when FLUX has none of that name.

    ``name`` is diffusers' or the original's, with dots or with underscores in their place.
    """
    collection, index, rest = _split_index(name)
    here, parts = _LAYERS.get((collection, _joined(rest)), ("", ()))
    return tuple(_full(here, index, part) for part in parts)


def split(name: str, fused: LowRank) -> dict[str, LowRank]:
    """LoRA of each layer that ``name`` holds, by diffusers name. Exact: the sum of effects is that of ``fused``.

    Block-sparse B gives every layer its own A; otherwise they share it. Layers without effect are left out where fusing
    put them (zeros in both factors) and where a dense B has no rows for them.

    Raises:
        ValueError: the rows of B are not those of ``name``'s layers.
    """
    parts = layers_of(name)
    if len(parts) == 1:
        ours = _joined(name) == _joined(parts[0])
        return {parts[0]: fused if ours else _swap_final(parts[0], fused)}
    out, hidden = fused.b.shape[0], fused.a.shape[1]
    rows = [hidden] * 3 + ([out - 3 * hidden] if len(parts) > 3 else [])
    if sum(rows) != out or min(rows) < 1:
        raise ValueError(
            f"{out} output rows for {hidden} input columns; expected q | k | v{' | mlp' * (len(rows) > 3)}"
        )
    b = np.split(fused.b, np.cumsum(rows)[:-1])
    for count in dict.fromkeys((len(parts), 3)):
        if fused.rank % count == 0 and _is_block_diagonal(b, count):
            blocks = zip(np.split(fused.a, count), b, range(count), strict=False)
            r = fused.rank // count
            pieces = [LowRank(a, rows[:, i * r : (i + 1) * r], fused.alpha / count) for a, rows, i in blocks]
            used = [p.a.any() or p.b.any() for p in pieces]
            break
    else:
        pieces = [fused._replace(b=rows) for rows in b]
        used = [p.b.any() for p in pieces]
    return {part: p for part, p, keep in zip(parts, pieces, used, strict=False) if keep or not any(used)}


def _is_block_diagonal(b: list[np.ndarray], count: int) -> bool:
    """Whether the i-th piece of B is zero outside of the i-th of ``count`` blocks of columns (beyond: zero)."""
    r = b[0].shape[1] // count
    return not any(piece[:, : i * r].any() or piece[:, (i + 1) * r :].any() for i, piece in enumerate(b))


def fuse(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Inverse of ``split`` for all ``layers`` of an adapter (one rank and alpha): {name in the original: LoRA}.

    Raises:
        UserError: naming the layers that the original FLUX does not have.
    """
    groups: dict[str, dict[int, str]] = {}
    unknown = []
    for name in layers:
        here, index, rest = _split_index(name)
        if (here, rest) not in _FUSED:
            unknown.append(name)
            continue
        there, fused, place = _FUSED[here, rest]
        groups.setdefault(_full(there, index, fused), {})[place] = name
    if unknown:
        raise UserError(f"no layers of FLUX in Black Forest Labs' layout: {', '.join(sorted(unknown))}")
    return {name: _fuse(name, {i: layers[part] for i, part in parts.items()}) for name, parts in groups.items()}


def _fuse(name: str, pieces: dict[int, LowRank]) -> LowRank:
    parts = layers_of(name)
    if len(parts) == 1:
        return _swap_final(parts[0], pieces[0])
    one = next(iter(pieces.values()))
    hidden, r = one.a.shape[1], one.rank
    rows = [hidden, hidden, hidden, _MLP_RATIO * hidden][: len(parts)]
    if 3 in pieces:
        rows[3] = pieces[3].b.shape[0]
    wrong = [parts[i] for i, p in pieces.items() if p.a.shape != (r, hidden) or p.b.shape != (rows[i], r)]
    if wrong:
        raise UserError(f"{name}: shapes of {', '.join(wrong)} do not belong to one fused projection of width {hidden}")
    a = np.zeros((len(parts) * r, hidden), np.float32)
    b = np.zeros((sum(rows), len(parts) * r), np.float32)
    for i, piece in pieces.items():
        a[i * r : (i + 1) * r] = piece.a
        b[sum(rows[:i]) : sum(rows[: i + 1]), i * r : (i + 1) * r] = piece.b
    return LowRank(a, b, one.alpha * len(parts))


def _swap_final(layer: str, lora: LowRank) -> LowRank:
    """Exchanges the halves of the last modulation's rows, whose order differs between the two layouts."""
    return lora._replace(b=np.roll(lora.b, lora.b.shape[0] // 2, axis=0)) if layer == _FINAL_MODULATION else lora
