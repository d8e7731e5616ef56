"""Makes or checks a data folder: ``python -m launch.prepare_data --source=scenes --out=DIR`` or ``--check=DIR``."""

import sys

from absl import app, flags

from cocoedit_jax.errors import UserError

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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --name=value")
    if (_OUT.value is None) == (_CHECK.value is None):
        raise app.UsageError("give exactly one of --out=DIR (make data) and --check=DIR (check data)")
    from cocoedit_jax.data import prepare

    try:
        if _CHECK.value is not None:
            print(prepare.check_folder(_CHECK.value, _RESOLUTION.value, _CROP.value))
        elif _OUT.value is not None:
            num, size, seed = _NUM.value, _SIZE.value, _SEED.value
            folder = prepare.write_scenes(
                _OUT.value, num, size, seed, operations=_OPERATIONS.value, overwrite=_OVERWRITE.value
            )
            print(f"{num} records of {size}x{size} px in {folder}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
