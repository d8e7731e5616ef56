"""Makes, unpacks, checks, encodes, packs or cleans a data folder, one at a time:

python -m launch.prepare_data --source=scenes --out=DIR
python -m launch.prepare_data --source=cocoedit-40k --from=DOWNLOAD --out=DIR
python -m launch.prepare_data --source=omniedit --from=DOWNLOAD --out=DIR    # or imgedit: for launch.annotate
python -m launch.prepare_data --check=DIR
python -m launch.prepare_data --encode=flux --model=MODEL_DIR --out=DIR
python -m launch.prepare_data --encode=qwen --model=MODEL_DIR --out=DIR --resolution=512 --crop=center
python -m launch.prepare_data --dedupe=DIR --near=4 --out=NEW
python -m launch.prepare_data --pack=DIR --out=NEW
"""

from absl import flags

from cocoedit_jax.errors import UserError
from launch import command

_SOURCE = flags.DEFINE_enum(
    "source",
    "scenes",
    ["scenes", "cocoedit-40k", "omniedit", "imgedit"],
    "What to make: procedural editing scenes, or a published data set, unpacked from --from.",
)
_FROM = flags.DEFINE_string("from", None, "With a published data set: the folder (or file) it was downloaded to.")
_PARTIAL = flags.DEFINE_boolean(
    "partial", False, "With --from: leave out records whose files are not there, instead of refusing."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write; holds metadata.jsonl, images/ and masks/ afterwards.")
_NUM = flags.DEFINE_integer("num", 2000, "Number of scenes.", lower_bound=1)
_SIZE = flags.DEFINE_integer("size", 48, "Side of scenes in pixels, an even number.", lower_bound=16)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random scenes.", lower_bound=0)
_OPERATIONS = flags.DEFINE_list("operations", [], "Edit types of scenes to draw from (comma separated; all if empty).")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace a data folder that exists already.")
_CHECK = flags.DEFINE_string("check", None, "Do not write; check this folder as training would and print a report.")
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 512, "With --check and --encode=qwen: training size in pixels.", lower_bound=1
)
_ROWS = flags.DEFINE_integer("rows", 20, "With --check: rows of each table; 0 for all.", lower_bound=0)
_DEDUPE = flags.DEFINE_string("dedupe", None, "Data folder to copy to --out without repeated records.")
_NEAR = flags.DEFINE_integer(
    "near",
    None,
    "With --check and --dedupe: pictures also count as the same when their 64-bit difference hashes differ in at most"
    " so many bits (and their colours agree); try 4. Not given: only equal files do.",
    lower_bound=0,
    upper_bound=16,
)
_PACK = flags.DEFINE_string("pack", None, "Data folder to pack into ArrayRecord files in --out, for training.")
_CROP = flags.DEFINE_enum(
    "crop", "center", ["center", "buckets"], "With --check and --encode=qwen: how images are framed in training."
)
_GROUPS = flags.DEFINE_integer(
    "groups", 1, "With --encode=qwen --crop=buckets: config.rollout.groups of the training, whose records of rarer "
    "shapes take the nearest other one.", lower_bound=1,
)  # fmt: skip
_ENCODE = flags.DEFINE_enum(
    "encode", None, ["flux", "qwen"],
    "Cache text embeddings of the data folder --out in it (needs PyTorch): of its prompts for FLUX.1 Kontext, of its "
    "prompts and pictures for Qwen-Image-Edit.",
)  # fmt: skip
_MODEL = flags.DEFINE_string(
    "model", None, "With --encode: model folder in diffusers' layout, or a repository in the Hugging Face cache."
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 128, "With --encode=flux: T5 tokens; training takes 128, stock 512.", lower_bound=1, upper_bound=512
)
_BATCH = flags.DEFINE_integer("encode_batch", 16, "With --encode: prompts encoded at once.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "bfloat16", "float32"],
    "With --encode: auto is the cache's own, for a new one bfloat16 on a GPU and float32 on a CPU.",
)
# Which flags say something in which mode; all others are refused there.
_SCENES = (_NUM, _SIZE, _SEED, _OPERATIONS)
_MODES = {
    "--encode=flux": (_ENCODE, _OUT, _MODEL, _BATCH, _DTYPE, _MAX_LENGTH),
    "--encode=qwen": (_ENCODE, _OUT, _MODEL, _BATCH, _DTYPE, _RESOLUTION, _CROP, _GROUPS),
    "--check": (_CHECK, _RESOLUTION, _CROP, _ROWS, _NEAR),
    "--dedupe": (_DEDUPE, _OUT, _NEAR, _OVERWRITE),
    "--pack": (_PACK, _OUT, _OVERWRITE),
    "--from": (_SOURCE, _FROM, _PARTIAL, _OUT, _OVERWRITE),
    "making data": (_SOURCE, _OUT, *_SCENES, _OVERWRITE),
}


def main(argv: list[str]) -> None:
    mode = _mode()
    _refuse(mode)
    out = _OUT.value or ""
    if mode.startswith("--encode"):
        print(_encode(out, _MODEL.value or ""))
    elif mode == "--check":
        from cocoedit_jax.data.check import check_folder

        print(check_folder(_CHECK.value or "", _RESOLUTION.value, _CROP.value, rows=_ROWS.value, near=_NEAR.value))
    elif mode == "--dedupe":
        from cocoedit_jax.data.dedupe import dedupe_folder

        print(dedupe_folder(_DEDUPE.value or "", out, threshold=_NEAR.value, overwrite=_OVERWRITE.value))
    elif mode == "--pack":
        from cocoedit_jax.data.pack_writer import pack_folder

        print(pack_folder(_PACK.value or "", out, overwrite=_OVERWRITE.value))
    elif mode == "--from":
        from cocoedit_jax.annotation.sources import unpack_source

        source = _FROM.value or ""
        print(unpack_source(_SOURCE.value, source, out, partial=_PARTIAL.value, overwrite=_OVERWRITE.value))
    else:
        from cocoedit_jax.data import prepare

        num, size, seed = _NUM.value, _SIZE.value, _SEED.value
        folder = prepare.write_scenes(out, num, size, seed, operations=_OPERATIONS.value, overwrite=_OVERWRITE.value)
        print(f"{num} records of {size}x{size} px in {folder}")


def _encode(out: str, model: str) -> str:
    from cocoedit_jax.models.hub import resolve_model

    folder, dtype = resolve_model(model), None if _DTYPE.value == "auto" else _DTYPE.value
    if _ENCODE.value == "flux":
        from torch_bridge import flux_text

        return flux_text.encode_folder(out, folder, _MAX_LENGTH.value, batch_size=_BATCH.value, dtype=dtype)
    from cocoedit_jax.data.images import Framing
    from torch_bridge import qwen_text

    framing = Framing(_RESOLUTION.value, _CROP.value)
    return qwen_text.encode_folder(
        out, folder, framing, batch_size=_BATCH.value, dtype=dtype, min_bucket_records=_GROUPS.value
    )


def _mode() -> str:
    chosen = [f"--{flag.name}" for flag in (_ENCODE, _CHECK, _DEDUPE, _PACK) if flag.value is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: one at a time")
    if chosen != ["--check"] and _OUT.value is None:
        raise UserError("give --out=DIR (what to write), or --check=DIR (check data)")
    if chosen:
        if chosen == ["--encode"] and _MODEL.value is None:
            raise UserError("--encode needs --model=MODEL_DIR, the folder of the text encoders")
        return f"--encode={_ENCODE.value}" if chosen == ["--encode"] else chosen[0]
    if _FROM.value is not None and _SOURCE.value == "scenes":
        raise UserError("--from: name what it holds with --source=cocoedit-40k, omniedit or imgedit")
    if _FROM.value is None and _SOURCE.value != "scenes":
        raise UserError(f"--source={_SOURCE.value} needs --from=FOLDER, where it was downloaded to")
    return "making data" if _FROM.value is None else "--from"


def _refuse(mode: str) -> None:
    used = {flag.name for flag in _MODES[mode]}
    present = {flag.name: None for others in _MODES.values() for flag in others if flag.present}  # in order
    names = ", ".join(f"--{name}" for name in present if name not in used)
    if names:
        raise UserError(f"{names}: not used with {mode}; see --help")


if __name__ == "__main__":
    command.run(main)
