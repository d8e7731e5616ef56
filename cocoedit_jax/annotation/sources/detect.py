"""Which kind of input lies at a path."""

from __future__ import annotations

from pathlib import Path

from cocoedit_jax.annotation.record import Item
from cocoedit_jax.annotation.sources import imgedit, omniedit, plain, release
from cocoedit_jax.data import cocoedit40k
from cocoedit_jax.data.records import METADATA
from cocoedit_jax.errors import UserError

FORMATS = {
    "jsonl": "a .jsonl file with the fields image and prompt on each line",
    "folder": f"a folder with {plain.PROMPTS}, or with pictures that each have a .txt of the same name",
    "data": f"a folder with {METADATA} and the images and masks it names",
    "cocoedit-40k": f"CoCoEdit-40K: {cocoedit40k.LAYOUT}",
    "omniedit": f"OmniEdit: {omniedit.LAYOUT}",
    "imgedit": f"ImgEdit: {imgedit.LAYOUT}",
}
PACKED = ("cocoedit-40k", "omniedit", "imgedit")


def detect(path: Path | str) -> str:
    """The key of `FORMATS` for what lies at `path`. Raises UserError listing them when it is none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected one of\n{_expected()}")
    if path.is_file():
        if path.suffix == ".jsonl":
            return "jsonl"
        if path.suffix == ".parquet":
            return _of_parquet(path)
    else:
        if (path / plain.PROMPTS).is_file():
            return "folder"
        if (path / METADATA).is_file():
            return "cocoedit-40k" if cocoedit40k.is_release(path) else "data"
        if (path / "Parquet").is_dir() or any((path / name).is_dir() for name in ("Singleturn", "Multiturn")):
            return "imgedit"
        if found := omniedit.files(path):
            return _of_parquet(found[0])
        if any(True for _ in plain.pictures(path)):
            return "folder"
        if line := plain.left_out(path):
            raise UserError(line)
    raise UserError(f"{path}: not known; expected one of\n{_expected()}")


def _of_parquet(path: Path) -> str:
    names = release.columns(path)
    if set(omniedit.NEEDED) <= set(names):
        return "omniedit"
    if "data" in names or {"input_images", "prompt"} <= set(names):
        return "imgedit"
    raise UserError(f"{path}: columns {', '.join(names)}; expected one of\n{_expected()}")


def _expected() -> str:
    return "\n".join(f"  {name}: {layout}" for name, layout in FORMATS.items())


def unpack_source(
    name: str, source: Path | str, out: Path | str, *, partial: bool = False, overwrite: bool = False
) -> str:
    """Unpacks a published data set to `out` and returns a summary; an interrupted call is continued by the same one.

    CoCoEdit-40K becomes a folder to train on; OmniEdit and ImgEdit, which have no masks, one to annotate. For
    `partial` see `unpack_cocoedit` and `unpack_imgedit`.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected {FORMATS[name]}")
    if name == "cocoedit-40k":
        return cocoedit40k.unpack_cocoedit(source, out, partial=partial, overwrite=overwrite)
    if name == "imgedit":
        return imgedit.unpack_imgedit(source, out, partial=partial, overwrite=overwrite)
    if partial:
        raise UserError("--partial: not used with omniedit, whose pictures lie in the parquet files themselves")
    return omniedit.unpack_omniedit(source, out, overwrite=overwrite)


def read_items(path: Path | str) -> list[Item]:
    """The items at `path`, in a fixed order; images are not opened.

    Raises:
        UserError: it is none of `FORMATS`, a packed data set (the message has the command that unpacks it), or has
            faulty lines.
    """
    path = Path(path)
    kind = detect(path)
    if kind in PACKED:
        raise UserError(
            f"{path}: {FORMATS[kind]}; unpack it first: python -m launch.prepare_data --source={kind} --from={path}"
            " --out=FOLDER"
        )
    if kind == "jsonl":
        return plain.read_jsonl(path)
    if kind == "data":
        return plain.read_data_folder(path)
    return plain.read_jsonl(path / plain.PROMPTS) if (path / plain.PROMPTS).is_file() else plain.read_sidecars(path)
