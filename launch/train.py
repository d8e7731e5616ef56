"""Post-trains an editor: ``python -m launch.train --config=configs/quickstart.py [--run=DIR] [--resume]``."""

import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cocoedit_jax.errors import UserError
from launch import command, distributed

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with an optional preset: configs/quickstart.py:edit-r1."
)
_RUN = flags.DEFINE_string("run", None, "Run folder; default: runs/PRESET-TIME. Needed with --resume.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --run from its last checkpoint.")
_STRICT = flags.DEFINE_bool("strict", False, "Refuse a data folder with a faulty record instead of skipping it.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    config = _CONFIG.value
    if "preset" in config_flags.get_override_values(flags.FLAGS["config"]):
        raise UserError("--config.preset: only a label; choose the preset as --config=FILE.py:NAME")
    if _RESUME.value and not _RUN.value:
        raise UserError("--resume: also needs --run=DIR, the folder of the run to continue")
    config.data.strict |= _STRICT.value
    from cocoedit_jax.sharding import processes
    from cocoedit_jax.train.loop import train
    from cocoedit_jax.train.run_folder import check_claim
    from cocoedit_jax.train.setup import build

    with processes.together():
        new = f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = Path(_RUN.value or processes.from_first("run folder", lambda: new))
        processes.from_first("check run folder", lambda: check_claim(run_dir, config, _RESUME.value))
        result = train(build(config), run_dir, resume=_RESUME.value)
    if result and processes.is_first():
        for name, before in result["base"].items():
            after, change = result["trained"][name], result["difference"][name]
            print(
                f"{name:>14}: base {before['mean']:7.3f}   trained {after['mean']:7.3f}   "
                f"difference {change['mean']:+.3f} +- {change['se']:.3f}"
            )
        print(f"report: {run_dir / 'report.html'}")


if __name__ == "__main__":
    command.run(main, setup=distributed.initialize, jax_only=True)
