"""Post-trains an editor: ``python -m launch.train --config=configs/quickstart.py [--run=DIR] [--resume]``."""

import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cocoedit_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with an optional preset: configs/quickstart.py:edit-r1."
)
_RUN = flags.DEFINE_string("run", None, "Run folder; default: runs/PRESET-TIME. Needed with --resume.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --run from its last checkpoint.")
_STRICT = flags.DEFINE_bool("strict", False, "Refuse a data folder with a faulty record instead of skipping it.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are written --config.key=value")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    config = _CONFIG.value
    try:
        if "preset" in config_flags.get_override_values(flags.FLAGS["config"]):
            raise UserError("--config.preset: only a label; choose the preset as --config=FILE.py:NAME")
        if _RESUME.value and not _RUN.value:
            raise UserError("--resume: also needs --run=DIR, the folder of the run to continue")
        config.data.strict |= _STRICT.value
        from cocoedit_jax.train.loop import train
        from cocoedit_jax.train.setup import build

        run_dir = Path(_RUN.value or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        result = train(build(config), run_dir, resume=_RESUME.value)
    except UserError as error:
        sys.exit(f"error: {error}")
    if result:
        for name, before in result["base"].items():
            after, change = result["trained"][name], result["difference"][name]
            print(
                f"{name:>14}: base {before['mean']:7.3f}   trained {after['mean']:7.3f}   "
                f"difference {change['mean']:+.3f} +- {change['se']:.3f}"
            )
        print(f"report: {run_dir / 'report.html'}")


if __name__ == "__main__":
    app.run(main)
