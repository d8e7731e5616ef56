"""LoRA of the projections that a model's original checkpoint fuses: FLUX's, in Black Forest Labs' layout.

That checkpoint (and with it kohya's and ComfyUI's files) stacks the rows of what diffusers keeps apart:
``double_blocks.0.img_attn.qkv`` is ``to_q | to_k | to_v`` and ``single_blocks.0.linear1`` is
``to_q | to_k | to_v | proj_mlp``. LoRA of n such layers, fused: A stacks theirs ``[n r, in]``, B is block-diagonal
``[rows, n r]``, alpha is n times theirs, so that alpha / r stays. A layer that is not adapted keeps a block of zeros:
readers (diffusers, kohya's converter) recognise only n equal blocks, and would give the layers rank n r otherwise.
What is fused is a matter of names (``lora_names``); a model that fuses nothing comes through as it is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.lora_names import FINAL_MODULATION, ModelNames

_MLP_RATIO = 4  # rows of proj_mlp per hidden unit, in every FLUX.1


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


def split(model: ModelNames, name: str, fused: LowRank) -> dict[str, LowRank]:
    """LoRA of each layer that ``name`` holds, by diffusers name. Exact: the sum of effects is that of ``fused``.

    Block-sparse B gives every layer its own A; otherwise they share it. Layers without effect are left out where fusing
    put them (zeros in both factors) and where a dense B has no rows for them.

    Raises:
        ValueError: the rows of B are not those of ``name``'s layers.
    """
    parts = model.layers_of(name)
    if len(parts) == 1:
        return {parts[0]: _swap_final(parts[0], name, fused)}
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


def fuse(model: ModelNames, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Inverse of ``split`` for all ``layers`` of an adapter (one rank and alpha): {name in the original: LoRA}.

    Raises:
        UserError: naming the layers that the model does not have.
    """
    groups: dict[str, dict[int, str]] = {}
    unknown = []
    for layer in layers:
        found = model.original_of(layer)
        if found is None:
            unknown.append(layer)
        else:
            name, place = found
            groups.setdefault(name, {})[place] = layer
    if unknown:
        raise UserError(f"no layers of {model.title}: {', '.join(sorted(unknown))}")
    return {
        name: _fuse(name, model.layers_of(name), {i: layers[part] for i, part in parts.items()})
        for name, parts in groups.items()
    }


def _fuse(name: str, parts: tuple[str, ...], pieces: dict[int, LowRank]) -> LowRank:
    if len(parts) == 1:
        return _swap_final(parts[0], name, pieces[0])
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


def _swap_final(layer: str, name: str, lora: LowRank) -> LowRank:
    """Exchanges the halves of the last modulation's rows where ``name`` is not diffusers' (with dots or underscores).

    They are scale | shift in diffusers, and shift | scale where FLUX's original names it otherwise.
    """
    if layer != FINAL_MODULATION or name.replace(".", "_") == layer.replace(".", "_"):
        return lora
    return lora._replace(b=np.roll(lora.b, lora.b.shape[0] // 2, axis=0))
