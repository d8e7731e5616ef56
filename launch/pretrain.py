"""Pretrains the quickstart's base: ``python -m launch.pretrain --config=configs/quickstart_base.py --out=DIR``."""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart_base.py", "Pretraining configuration.")
_OUT = flags.DEFINE_string("out", None, "Folder for config.json, model.safetensors and samples.png.", required=True)
_START_FROM = flags.DEFINE_string("start_from", None, "Base after phase 1 (OUT/clean of an earlier run): phase 2 only.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --config.key=value")
    from cocoedit_jax.train.pretrain import pretrain

    pretrain(_CONFIG.value, Path(_OUT.value), Path(_START_FROM.value) if _START_FROM.value else None)


if __name__ == "__main__":
    app.run(main)
