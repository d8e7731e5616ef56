"""Makes, checks or encodes a data folder, one at a time:

python -m launch.prepare_data --source=scenes --out=DIR
python -m launch.prepare_data --check=DIR
python -m launch.prepare_data --encode=flux --model=MODEL_DIR --out=DIR
python -m launch.prepare_data --encode=qwen --model=MODEL_DIR --out=DIR --resolution=512 --crop=center
"""

from absl import flags

from cocoedit_jax.errors import UserError
from launch import command

_SOURCE = flags.DEFINE_enum("source", "scenes", ["scenes"], "What to make: procedural editing scenes.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; holds metadata.jsonl, images/ and masks/ afterwards.")
_NUM = flags.DEFINE_integer("num", 2000, "Number of records.", lower_bound=1)
_SIZE = flags.DEFINE_integer("size", 48, "Image side in pixels, an even number.", lower_bound=16)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random scenes.", lower_bound=0)
_OPERATIONS = flags.DEFINE_list("operations", [], "Edit types to draw from (comma separated; all if empty).")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace a data folder that exists already.")
_CHECK = flags.DEFINE_string("check", None, "Do not write; check this folder as training would and print a summary.")
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 512, "With --check and --encode=qwen: training size in pixels.", lower_bound=1
)
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
# Flags that say something only together with the mode they belong to.
_MAKING = (_SOURCE, _NUM, _SIZE, _SEED, _OPERATIONS, _OVERWRITE)
_FRAMING = (_RESOLUTION, _CROP)
_ENCODING = (_MODEL, _MAX_LENGTH, _BATCH, _DTYPE, _GROUPS)


def main(argv: list[str]) -> None:
    out, model = _OUT.value, _MODEL.value
    if (out is None) == (_CHECK.value is None):
        raise UserError("give exactly one of --out=DIR (make data, or encode it) and --check=DIR (check data)")
    if _ENCODE.value is not None:
        others = (_MAX_LENGTH,) if _ENCODE.value == "qwen" else (*_FRAMING, _GROUPS)
        _refuse(_CHECK, *_MAKING, *others, mode=f"--encode={_ENCODE.value}")
        if model is None:
            raise UserError("--encode needs --model=MODEL_DIR, the folder of the text encoders")
    elif _CHECK.value is not None:
        _refuse(*_ENCODING, mode="--check")
    else:
        _refuse(*_FRAMING, *_ENCODING, mode="making data")

    if _ENCODE.value is not None and out is not None and model is not None:
        print(_encode(out, model))
        return
    from cocoedit_jax.data import prepare

    if _CHECK.value is not None:
        print(prepare.check_folder(_CHECK.value, _RESOLUTION.value, _CROP.value))
    elif out is not None:
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


def _refuse(*given: flags.FlagHolder, mode: str) -> None:
    names = ", ".join(f"--{flag.name}" for flag in given if flag.present)
    if names:
        raise UserError(f"{names}: not used with {mode}; see --help")


if __name__ == "__main__":
    command.run(main)
