"""Makes a data set of pictures, masks and refined instructions from pictures and instructions:

python -m launch.annotate --input=FOLDER_OR_JSONL --output=DIR
python -m launch.annotate --input=PHOTOS --prompt='make it red' --output=DIR --fake     # no model, a first look
python -m launch.annotate --output=DIR                                                 # continue
python -m launch.annotate --output=DIR --refilter --config.filter.min_clarity=0.8      # choose again, no model
"""

import glob
from pathlib import Path

from absl import flags
from ml_collections import config_flags

import configs
from cocoedit_jax.errors import UserError
from launch import command

_DEFAULT = str(Path(next(iter(configs.__path__))) / "annotate.py")


class _Number(flags.FloatParser):
    """A number, or None, which switches a threshold off."""

    def parse(self, argument: str) -> float | None:
        return None if argument == "None" else super().parse(argument)


config_flags.register_flag_parser_for_type(float, _Number())
_CONFIG = config_flags.DEFINE_config_file("config", _DEFAULT, "Settings; every key is explained in the file.")
_INPUT = flags.DEFINE_string("input", None, "JSONL file or folder with pictures and instructions; see the README.")
_PROMPT = flags.DEFINE_string("prompt", None, "With a folder of pictures alone: the instruction for all of them.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the data set, and for the state of the work.", required=True)
_FAKE = flags.DEFINE_boolean("fake", False, "A stand-in for the model, and boxes as masks: a first look, no data.")
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray"], "Where the stages run.")
_SHARD = flags.DEFINE_string("shard", "0/1", "Only part i of n of the shards, as i/n: for job arrays.")
_EMIT = flags.DEFINE_enum(
    "emit_batch", None, ["classify", "box", "rewrite", "score"],
    "Write this stage's requests to DIR/batches/ for vllm run-batch instead of asking a server.",
)  # fmt: skip
_ACCEPT = flags.DEFINE_list("accept_batch", [], "Files of replies (patterns allowed) to requests of --emit_batch.")
_REFILTER = flags.DEFINE_boolean("refilter", False, "Only choose again among finished annotations, by config.filter.")
_RETRY = flags.DEFINE_boolean("retry_dead", False, "Take up the dead letters again where they died.")


def main(argv: list[str]) -> None:
    if _REFILTER.value + bool(_EMIT.value) + bool(_ACCEPT.value) > 1:
        raise UserError("--refilter, --emit_batch and --accept_batch: one at a time")
    if _REFILTER.value and (_INPUT.value or _RETRY.value):
        raise UserError("--refilter: works on what --output holds; not together with --input or --retry_dead")
    if _ENGINE.value == "ray" and (_EMIT.value or _ACCEPT.value):
        raise UserError("--engine=ray: not used with --emit_batch and --accept_batch")
    config = _CONFIG.value
    if _FAKE.value:
        with config.unlocked():
            config.models.name, config.mask.segmenter, config.mask.options = "fake", "box", {}
            config.box.convention = "pixels"
    from cocoedit_jax.annotation import run, settings

    run.annotate(
        settings.check(config.to_dict()),
        Path(_OUTPUT.value or ""),
        source=_INPUT.value,
        prompt=_PROMPT.value,
        part=_SHARD.value,
        engine_name=_ENGINE.value,
        emit_batch=_EMIT.value,
        accept_batch=[name for pattern in _ACCEPT.value for name in sorted(glob.glob(pattern)) or [pattern]],
        refilter=_REFILTER.value,
        retry_dead=_RETRY.value,
    )


if __name__ == "__main__":
    command.run(main)
