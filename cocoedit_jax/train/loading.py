"""What a process reads of a batch of records: those that its devices encode and whose edits it judges."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from cocoedit_jax.data.records import Record
from cocoedit_jax.data.source import describe, load_batch
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.text import instructions
from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.shares import Shares


def load_shares(
    editor: Editor,
    dataset: grain.MapDataset,
    records: Sequence[Record],
    indices: Sequence[int] | np.ndarray,
    shares: Shares,
    first: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The records ``indices`` ``[G]``, of which ``shares.groups`` are read; all processes must call it.

    Args:
        dataset: of ``records``.
        first: called before anything is read.

    Returns:
        what is known of all records without reading them, as lists of length G; of the loaded ones, what
        ``data.source.load_batch`` gives; and the text inputs of the loaded ones, of one shape in all processes.

    Raises:
        UserError: in all processes, when a record cannot be read in any of them, or ``first`` raised one.
    """
    loaded: dict[str, Any] = {}
    text: Any = None

    def load() -> list[list[int]]:
        nonlocal loaded, text
        first()
        loaded = load_batch(dataset, np.asarray(indices)[shares.groups])
        text = editor.text_inputs(instructions(loaded))
        return [list(np.shape(x)[1:]) for x in jax.tree.leaves(text)]

    shapes = processes.gather("records", load)
    facts = [describe(records[int(index)], int(index)) for index in indices]
    return {name: [row[name] for row in facts] for name in facts[0]}, loaded, _filled(text, shapes)


def _filled(text: Any, shapes: Sequence[Sequence[Sequence[int]]]) -> Any:
    """Texts as long as the longest of all processes: filled with zeros, which masks say are no states."""
    leaves, structure = jax.tree.flatten(text)
    shape = [np.max(each, axis=0) for each in zip(*shapes, strict=True)]
    out = []
    for x, wanted in zip(leaves, shape, strict=True):
        missing = [(0, 0), *((0, int(n) - have) for n, have in zip(wanted, x.shape[1:], strict=True))]
        out.append(np.pad(x, missing) if any(n for _, n in missing) else x)
    return jax.tree.unflatten(structure, out)
