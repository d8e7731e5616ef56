"""A model's transformer between diffusers' safetensors and the Orbax form; the work behind launch.convert_weights."""

import contextlib
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import flux, orbax_weights, qwen
from cocoedit_jax.models.hub import download_hint, resolve_model
from cocoedit_jax.models.sharded_weights import STORED, save_sharded, unstacked
from cocoedit_jax.reporting.telemetry import write_json

FORMS = ("orbax", "diffusers")
COMPONENT = "transformer"
PIPELINE = "model_index.json"
# diffusers' class -> shapes of its parameters, from its config.json.
_ABSTRACT: dict[str, Callable[[dict[str, Any]], Any]] = {
    flux.CLASS_NAME: lambda raw: flux.abstract_params(flux.FluxConfig.from_diffusers(raw)),
    qwen.CLASS_NAME: lambda raw: qwen.abstract_params(qwen.QwenConfig.from_diffusers(raw)),
}


def abstract_transformer(config: dict[str, Any]) -> Any:
    """Shapes of the parameters, logical axis names boxed around them, of the model with this ``config.json``.

    Raises:
        UserError: the class is not known here, or an option of it.
    """
    name = config.get("_class_name")
    if name not in _ABSTRACT:
        raise UserError(f"config.json: _class_name={name!r}; expected one of {sorted(_ABSTRACT)}")
    return _ABSTRACT[name](config)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``200MB``; units are powers of 1000, as diffusers counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(KB|MB|GB|TB)", text.strip().upper())
    size = int(float(match[1]) * 1000 ** (("KB", "MB", "GB", "TB").index(match[2]) + 1)) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size={text}; expected a size such as 5GB or 200MB")
    return size


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, beside ``target``, that becomes ``target`` when all has gone well.

    Raises:
        UserError: ``target`` exists and is not an empty folder, or writing fails.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; expected a new or empty folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            draft = Path(scratch) / target.name
            draft.mkdir()
            yield draft
            draft.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from error


def convert(
    source: str | Path,
    target: Path,
    form: str,
    *,
    dtype: Any = None,
    max_shard_size: int = 5 * 10**9,
    copy_rest: bool = True,
) -> int:
    """Writes the ``transformer`` of a model folder in another form, shard size or dtype. Needs memory for it once.

    Args:
        source: a model folder or repository id (``hub.resolve_model``); its transformer may be in either form.
        target: a new folder; it appears when it is complete.
        form: one of ``FORMS``.
        dtype: of the arrays; None keeps them as they are stored, bit for bit.
        max_shard_size: bytes in a file of diffusers' form.
        copy_rest: also copy the other component folders, whatever is in them, and ``model_index.json``.

    Returns:
        Bytes of weights written.

    Raises:
        UserError: the source is not usable, or the target cannot be written.
    """
    root = resolve_model(source)
    component = root / COMPONENT
    if not component.is_dir():
        hint = "" if Path(source).is_dir() else f"; {download_hint(str(source))}"
        raise UserError(f"{root}: no folder {COMPONENT!r} in it; expected a model folder as diffusers saves it{hint}")
    config = orbax_weights.read_config(component)
    abstract = unstacked(nn.unbox(abstract_transformer(config)))  # stacking would only be undone
    with whole_folder(target) as draft:
        room = shutil.disk_usage(draft).free
        if dtype is None:
            need = _bytes_below(component)
        else:
            need = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) * np.dtype(dtype).itemsize
        need += _bytes_below(root) - _bytes_below(component) if copy_rest else 0
        if room < need:
            raise UserError(f"{target}: {room / 1e9:.1f} GB free there; the weights need {need / 1e9:.1f} GB")
        params = orbax_weights.load_params(component, abstract, dtype=dtype or STORED)
        out = draft / COMPONENT
        out.mkdir()
        if form == "orbax":
            orbax_weights.save_orbax(out, params, config)
        else:
            write_json(out / "config.json", config)
            save_sharded(out, params, max_shard_size=max_shard_size)
        if copy_rest:
            _copy_rest(root, draft)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy_rest(root: Path, draft: Path) -> None:
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name != COMPONENT and not path.name.startswith("."):
            shutil.copytree(path, draft / path.name)  # links of the cache become files
        elif path.name == PIPELINE:
            shutil.copyfile(path, draft / path.name)
