"""The paper's table: trains several presets from the same base and evaluates them on the same fresh scenes.

    python -m launch.compare --config=configs/quickstart.py --presets=edit-r1,cocoedit,cocoedit-routed --seeds=0,1,2

Finished runs are kept, so an interrupted comparison continues where it stopped.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cocoedit_jax.errors import UserError
from launch import command, distributed

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file; its presets are chosen by --presets.")
_PRESETS = flags.DEFINE_list("presets", ["edit-r1", "cocoedit", "cocoedit-routed"], "Presets to compare.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Training seeds.")
_OUT = flags.DEFINE_string("out", "runs/compare", "Folder for the runs and the tables.")
_SCENES = flags.DEFINE_integer("scenes", 512, "Fresh scenes to evaluate on.", lower_bound=2)
_SCENE_SEED = flags.DEFINE_integer("scene_seed", 779, "Seed of the fresh scenes.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    from cocoedit_jax.train.compare import compare

    if not _PRESETS.value:
        raise UserError("--presets is empty; expected names separated by commas")
    if not _SEEDS.value or not all(seed.isdecimal() for seed in _SEEDS.value):
        raise UserError(f"--seeds={','.join(_SEEDS.value)}; expected whole numbers from 0 on, separated by commas")
    seeds = [int(seed) for seed in _SEEDS.value]
    out = Path(_OUT.value)
    result = compare(_config_path(), _overrides(), _PRESETS.value, seeds, out, _SCENES.value, _SCENE_SEED.value)
    print((out / "table.md").read_text())
    print(json.dumps({"report": str(out / "report.html"), "scenes": result["scenes"]}))


def _config_path() -> Path:
    return Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0])


def _overrides() -> dict[str, object]:
    return config_flags.get_override_values(flags.FLAGS["config"])


if __name__ == "__main__":
    command.run(main, setup=distributed.alone, jax_only=True)
