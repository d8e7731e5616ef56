"""Everything a run needs, built and checked before any accelerator time is spent."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.data.records import Record, RecordSet, read_records, split_records
from cocoedit_jax.data.source import record_dataset
from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.solvers import SOLVERS
from cocoedit_jax.models import lora
from cocoedit_jax.models.attention import BACKENDS
from cocoedit_jax.models.editor import KontextEditor
from cocoedit_jax.models.flux import REMAT_POLICIES
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.rewards.judge import Judge, make_judge
from cocoedit_jax.rewards.registry import weighted_rewards
from cocoedit_jax.sharding.mesh import DATA, make_mesh
from cocoedit_jax.train.editors import EDITORS

_MOST_FAULTS = 20  # listed in one message


@dataclass
class Setup:
    """The parts of a run. ``params`` is the frozen base, sharded over ``mesh``."""

    config: ConfigDict
    algorithm: NFTConfig
    lora: lora.LoraConfig
    mesh: Mesh
    editor: KontextEditor
    params: Any
    framing: Framing
    train: grain.MapDataset
    train_records: tuple[Record, ...]
    held_out: grain.MapDataset
    held_out_records: tuple[Record, ...]
    judge: Judge


def _positive(config: ConfigDict, *names: str) -> None:
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.{name}={value!r}; expected a whole number, at least 1")


def check_config(config: ConfigDict, mesh: Mesh) -> NFTConfig:
    """The algorithm settings of a usable configuration.

    Raises:
        UserError: naming the first key that is not usable, its value and what is expected.
    """
    _positive(
        config, "rollout.groups", "rollout.group_size", "rollout.batch_size", "rollout.steps", "train.steps",
        "train.micro_batch", "lora.rank", "evaluation.scenes", "evaluation.batch_size", "evaluation.every",
        "evaluation.every_scenes", "evaluation.steps", "checkpoint.every", "checkpoint.keep", "data.resolution",
    )  # fmt: skip
    if config.rollout.group_size < 2:
        raise UserError(f"config.rollout.group_size={config.rollout.group_size}; a group needs at least 2 edits")
    for name, choices in (
        ("model.kind", tuple(EDITORS)),
        ("model.remat", tuple(REMAT_POLICIES)),
        ("model.attention", ("auto", *BACKENDS)),
        ("rollout.solver", tuple(SOLVERS)),
        ("evaluation.solver", tuple(SOLVERS)),
    ):
        section, key = name.split(".")
        if config[section][key] not in choices:
            raise UserError(f"config.{name}={config[section][key]!r}; expected one of {sorted(choices)}")
    samples, shards = config.rollout.groups * config.rollout.group_size, mesh.shape[DATA]
    if samples % config.rollout.batch_size:
        raise UserError(
            f"config.rollout.batch_size={config.rollout.batch_size}; expected a divisor of the {samples} samples of a "
            f"step (groups x group_size)"
        )
    for name in ("rollout.batch_size", "train.micro_batch", "evaluation.batch_size"):
        section, key = name.split(".")
        if config[section][key] % shards:
            raise UserError(f"config.{name}={config[section][key]}; expected a multiple of the {shards} data shards")
    if not 0 < config.data.held_out < 1:
        raise UserError(f"config.data.held_out={config.data.held_out}; expected a share between 0 and 1")
    algorithm = NFTConfig.from_dict(config.algorithm.to_dict())
    weighted_rewards(algorithm)
    return algorithm


def load_records(config: ConfigDict, framing: Framing) -> RecordSet:
    """The records of ``config.data.path``, drawn first if they are to be generated; faults are printed or refused."""
    path = Path(config.data.path)
    if not path.exists() and config.data.generate:
        write_scenes(path, config.data.generate, config.data.resolution, seed=0)
    records = read_records(path, framing, strict=config.data.strict)
    if records.faults:
        print(records.summary())
    return records


def _check_conditioning(editor: KontextEditor, framing: Framing, records: tuple[Record, ...]) -> None:
    """Refuses image sizes and instructions that the model cannot take, before anything is computed."""
    try:
        for size in framing.sizes:
            editor.grid(*size)
    except ValueError as error:
        raise UserError(f"config.data.resolution={framing.resolution}: {error}") from error
    faults = [(record, fault) for record in records if (fault := editor.text.fault(record.prompt))]
    if faults:
        lines = [f"line {record.line}, record {record.id!r}: {fault}" for record, fault in faults[:_MOST_FAULTS]]
        more = [f"... and {len(faults) - len(lines)} more"] if len(faults) > len(lines) else []
        more += [editor.text.remedy] if editor.text.remedy else []
        raise UserError(f"{len(faults)} instructions that this model cannot take:\n  " + "\n  ".join(lines + more))


def build(config: ConfigDict) -> Setup:
    """Checks the configuration, reads the data, loads the model.

    Raises:
        UserError: anything is not usable; nothing has been computed by then.
    """
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes; this trainer runs in one process, on all of its devices")
    mesh = make_mesh(config.mesh.to_dict())
    algorithm = check_config(config, mesh)
    judge = make_judge(**config.judge.to_dict())
    framing = Framing(config.data.resolution, config.data.crop, divisor=16)
    records = load_records(config, framing)
    train, held_out = split_records(records.records, config.data.held_out)
    if len(train) < config.rollout.groups or not held_out:
        raise UserError(
            f"{config.data.path}: {len(train)} records to train on and {len(held_out)} held out; expected at least "
            f"{config.rollout.groups} (config.rollout.groups) and 1"
        )
    editor, load_params = EDITORS[config.model.kind](config, mesh)
    _check_conditioning(editor, framing, records.records)
    params = load_params()
    return Setup(
        config, algorithm, lora.LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha), mesh, editor, params,
        framing, record_dataset(train, framing), train, record_dataset(held_out, framing), held_out, judge,
    )  # fmt: skip
