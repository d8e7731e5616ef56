"""Names of the linear layers of each model in LoRA files, and which model a file's names belong to.

A layer has its name in diffusers and one in the model's original checkpoint, in which several may be one (see
``lora_bfl``). Qwen-Image's checkpoint has diffusers' names. kohya's files write "_" for ".", so both are looked up.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.lora import DEFAULT_TARGETS

FINAL_MODULATION = "norm_out.linear"
_IN_BLOCK = re.compile(r"((?:double|single|transformer|single_transformer)_blocks)[._](\d+)[._](.+)")


class Blocks(NamedTuple):
    """A collection of blocks: its name here and in the original, depth, and {layer there: the layers here}.

    Both names are "" for what is outside of blocks.
    """

    here: str
    there: str
    depth: int
    layers: Mapping[str, tuple[str, ...]]


_Table = dict[tuple[str, str], tuple[Blocks, tuple[str, ...]]]


def _joined(name: str) -> str:
    return name.replace(".", "_")


def _split_index(name: str) -> tuple[str, str, str]:
    """Collection of blocks, index and the rest of a layer's name; the first two are empty outside of blocks."""
    match = _IN_BLOCK.fullmatch(name)
    return (match[1], match[2], match[3]) if match else ("", "", name)


def _full(collection: str, index: str, rest: str) -> str:
    return f"{collection}.{index}.{rest}" if collection else rest


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """The linear layers of a model.

    Attributes:
        title: what people call it.
        blocks: its collections of blocks, and what is outside of them.
    """

    title: str
    blocks: tuple[Blocks, ...]

    def _originals(self) -> Iterator[tuple[Blocks, str, tuple[str, ...]]]:
        for blocks in self.blocks:
            for name, parts in blocks.layers.items():
                yield blocks, name, parts

    @cached_property
    def _tables(self) -> tuple[_Table, _Table]:
        """Layers by their names in diffusers, and by their names in the original."""
        here: _Table = {
            (blocks.here, _joined(part)): (blocks, (part,)) for blocks, _, parts in self._originals() for part in parts
        }
        return here, {(blocks.there, _joined(name)): (blocks, parts) for blocks, name, parts in self._originals()}

    @cached_property
    def _places(self) -> dict[tuple[str, str], tuple[str, str, int]]:
        return {
            (blocks.here, part): (blocks.there, name, place)
            for blocks, name, parts in self._originals()
            for place, part in enumerate(parts)
        }

    def _look_up(self, table: _Table, name: str) -> tuple[str, ...]:
        collection, index, rest = _split_index(name)
        blocks, parts = table.get((collection, _joined(rest)), (None, ()))
        if blocks is None or (index and int(index) >= blocks.depth):
            return ()
        return tuple(_full(blocks.here, index, part) for part in parts)

    def layers_of(self, name: str) -> tuple[str, ...]:
        """Diffusers names of the layers that ``name`` holds; () when the model has none of that name.

        ``name`` is diffusers' or the original's, with dots or with underscores in their place.
        """
        return next(filter(None, (self._look_up(table, name) for table in self._tables)), ())

    def has_all(self, names: Collection[str]) -> bool:
        """Whether ``names`` are all the model's in diffusers, or all in the original."""
        return any(all(self._look_up(table, name) for name in names) for table in self._tables)

    def original_of(self, layer: str) -> tuple[str, int] | None:
        """Original name of what holds the diffusers layer ``layer``, and its place there; None when there is none."""
        here, index, rest = _split_index(layer)
        if not self._look_up(self._tables[0], layer) or (here, rest) not in self._places:
            return None
        there, name, place = self._places[here, rest]
        return _full(there, index, name), place


def _qkv(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(letter) for letter in "qkv")


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    """Layers that the original calls what diffusers does."""
    return {name: (name,) for name in names}


_FLUX_DOUBLE = {
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
_FLUX_SINGLE = {
    "linear1": (*_qkv("attn.to_{}"), "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": (FINAL_MODULATION,),
}
_QWEN_STREAM = ("mod.1", "mlp.net.0.proj", "mlp.net.2")
_QWEN_BLOCK = _same(*DEFAULT_TARGETS, *(f"{stream}_{layer}" for stream in ("img", "txt") for layer in _QWEN_STREAM))
_QWEN_OUTSIDE = _same(
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "proj_out",
    FINAL_MODULATION,
)

MODELS = {
    "flux": ModelNames(
        "FLUX",
        (
            Blocks("transformer_blocks", "double_blocks", 19, _FLUX_DOUBLE),
            Blocks("single_transformer_blocks", "single_blocks", 38, _FLUX_SINGLE),
            Blocks("", "", 0, _FLUX_OUTSIDE),
        ),
    ),
    "qwen": ModelNames(
        "Qwen-Image",
        (
            Blocks("transformer_blocks", "transformer_blocks", 60, _QWEN_BLOCK),
            Blocks("", "", 0, _QWEN_OUTSIDE),
        ),
    ),
}


def titles(keys: Collection[str] = MODELS.keys()) -> str:
    """The models ``keys`` by what people call them."""
    return " or ".join(MODELS[key].title for key in keys)


def identify(names: Collection[str]) -> tuple[str, ...]:
    """Keys of the models that have all ``names``; failing these, of those that alone have some; else that have some."""
    whole = tuple(key for key, model in MODELS.items() if model.has_all(names))
    if whole:
        return whole
    owners = [[key for key, model in MODELS.items() if model.layers_of(name)] for name in names]
    alone = {keys[0] for keys in owners if len(keys) == 1}
    some = {key for keys in owners for key in keys}
    return tuple(key for key in MODELS if key in (alone or some))


def only(names: Collection[str]) -> str | None:
    """Key of the one model that ``names`` are of; None when that is not clear."""
    found = identify(names) if names else ()
    return found[0] if len(found) == 1 else None


def choose(source: str, names: Collection[str], wanted: str | None = None) -> str | None:
    """Key of the model that ``names`` belong to; None where several have them all, as the same layers.

    Args:
        source: what errors name.
        wanted: the model it has to be, if that is known.

    Raises:
        UserError: names of no model, of another than ``wanted``, or that mean different layers in several.
    """
    if wanted is not None and wanted not in MODELS:
        raise UserError(f"model={wanted!r}; expected one of {', '.join(MODELS)}")
    found, first = identify(names), ", ".join(sorted(names)[:3])
    if not found:
        raise UserError(f"{source}: no layer of {titles()}; it adapts {first}")
    if wanted is not None:
        if wanted not in found:
            raise UserError(
                f"{source}: a LoRA of {titles(found)} (it adapts {first}); expected one of {titles([wanted])}"
            )
        return wanted
    if len(found) == 1:
        return found[0]
    unclear = [name for name in names if len({MODELS[key].layers_of(name) for key in found}) > 1]
    if not unclear:
        return None
    raise UserError(
        f"{source}: {', '.join(sorted(unclear)[:3])} may be of {titles(found)}; expected layers of one model, "
        f"or {' or '.join(f'model={key}' for key in found)} to say which"
    )
