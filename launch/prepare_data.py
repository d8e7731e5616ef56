"""Makes, checks or encodes a data folder, one at a time:

python -m launch.prepare_data --source=scenes --out=DIR
python -m launch.prepare_data --check=DIR
python -m launch.prepare_data --encode=flux --model=MODEL_DIR --out=DIR
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
_RESOLUTION = flags.DEFINE_integer("resolution", 512, "With --check: training size in pixels.", lower_bound=1)
_CROP = flags.DEFINE_enum("crop", "center", ["center", "buckets"], "With --check: how images are framed.")
_ENCODE = flags.DEFINE_enum(
    "encode", None, ["flux"], "Cache text embeddings of the prompts of the data folder --out in it (needs PyTorch)."
)
_MODEL = flags.DEFINE_string(
    "model", None, "With --encode: model folder in diffusers' layout, or a repository in the Hugging Face cache."
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 128, "With --encode: T5 tokens; 128 as in training, 512 as stock.", lower_bound=1, upper_bound=512
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
_CHECKING = (_RESOLUTION, _CROP)
_ENCODING = (_MODEL, _MAX_LENGTH, _BATCH, _DTYPE)


def main(argv: list[str]) -> None:
    out, model = _OUT.value, _MODEL.value
    if (out is None) == (_CHECK.value is None):
        raise UserError("give exactly one of --out=DIR (make data, or encode it) and --check=DIR (check data)")
    if _ENCODE.value is not None:
        _refuse(_CHECK, *_MAKING, *_CHECKING, mode="--encode")
        if model is None:
            raise UserError("--encode needs --model=MODEL_DIR, the folder of the text encoders")
    elif _CHECK.value is not None:
        _refuse(*_ENCODING, mode="--check")
    else:
        _refuse(*_ENCODING, mode="making data")

    if _ENCODE.value is not None and out is not None and model is not None:
        from cocoedit_jax.models.hub import resolve_model
        from torch_bridge.flux_text import encode_folder

        dtype = None if _DTYPE.value == "auto" else _DTYPE.value
        print(encode_folder(out, resolve_model(model), _MAX_LENGTH.value, batch_size=_BATCH.value, dtype=dtype))
        return
    from cocoedit_jax.data import prepare

    if _CHECK.value is not None:
        print(prepare.check_folder(_CHECK.value, _RESOLUTION.value, _CROP.value))
    elif out is not None:
        num, size, seed = _NUM.value, _SIZE.value, _SEED.value
        folder = prepare.write_scenes(out, num, size, seed, operations=_OPERATIONS.value, overwrite=_OVERWRITE.value)
        print(f"{num} records of {size}x{size} px in {folder}")


def _refuse(*given: flags.FlagHolder, mode: str) -> None:
    names = ", ".join(f"--{flag.name}" for flag in given if flag.present)
    if names:
        raise UserError(f"{names}: not used with {mode}; see --help")


if __name__ == "__main__":
    command.run(main)
