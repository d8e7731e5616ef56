"""Pretrains the quickstart's base: ``python -m launch.pretrain --config=configs/quickstart_base.py --out=DIR``."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import command

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart_base.py", "Pretraining configuration.")
_OUT = flags.DEFINE_string("out", "runs/quickstart_base", "Folder for config.json, model.safetensors and samples.png.")
_START_FROM = flags.DEFINE_string("start_from", None, "Base after phase 1 (OUT/clean of an earlier run): phase 2 only.")


def main(argv: list[str]) -> None:
    from cocoedit_jax.train.pretrain import pretrain

    pretrain(_CONFIG.value, Path(_OUT.value), Path(_START_FROM.value) if _START_FROM.value else None)


if __name__ == "__main__":
    command.run(main, jax_only=True)
