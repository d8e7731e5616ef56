"""Everything a run needs, built and checked before any accelerator time is spent."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.data.records import Fault, Record, RecordSet, fingerprint, read_records, split_records
from cocoedit_jax.data.source import record_dataset
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.quantize import phase_formats, same_storage
from cocoedit_jax.models.text import Instruction
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.rewards.judge import Judge, judge_hook, judge_options, make_judge
from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.base import Base
from cocoedit_jax.sharding.layouts import check_shape, layout_mesh
from cocoedit_jax.train.config_checks import check_config
from cocoedit_jax.train.editors import EDITORS, check_sizes
from cocoedit_jax.train.run_folder import differences


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
        mesh: of the optimizer step.
        rollout_mesh: of sampling, for rollouts and evaluations; the same devices.
        editor: as the optimizer step and evaluations use it.
        rollout_editor: as sampling of the step's edits uses it: the same, or with another ``quantize``.
        base: the frozen base of ``editor``, on whichever of the two meshes used it last.
        rollout_base: that of ``rollout_editor``: the same object, unless one of the two is of full precision.
    """

    config: ConfigDict
    algorithm: NFTConfig
    lora: lora.LoraConfig
    mesh: Mesh
    rollout_mesh: Mesh
    editor: Editor
    rollout_editor: Editor
    base: Base
    rollout_base: Base
    framing: Framing
    train: grain.MapDataset
    train_records: tuple[Record, ...]
    held_out: grain.MapDataset
    held_out_records: tuple[Record, ...]
    judge: Judge

    @property
    def params(self) -> Any:
        """The frozen base as it is placed now."""
        return self.base.params


def phase_meshes(config: ConfigDict) -> tuple[Mesh, Mesh]:
    """The meshes of rollout and optimizer step: ``config.mesh``, unless ``rollout.layout`` or ``train.layout`` says
    otherwise.

    Raises:
        UserError: naming the field, for a layout or sizes that do not fit the devices.
    """
    sizes = config.mesh.to_dict()
    common = sizes.pop("layout", "replicated")

    def mesh(phase: str) -> Mesh:
        own = config[phase].get("layout", "")
        if own:
            return layout_mesh(own, field=f"config.{phase}.layout")
        return layout_mesh(common, sizes, field="config.mesh.layout")

    rollout, train = mesh("rollout"), mesh("train")
    if rollout.size != train.size:
        raise UserError(
            f"config.rollout.layout={config.rollout.get('layout', '')!r} takes {rollout.size} device(s), "
            f"config.train.layout={config.train.get('layout', '')!r} {train.size}; expected the same ones"
        )
    return rollout, train


def load_records(config: ConfigDict, framing: Framing) -> RecordSet:
    """The records of ``config.data.path``; with an empty path, of scenes that are drawn now unless they were before.

    Raises:
        UserError: there is no usable record, or ``data.strict`` and a faulty one.
    """
    path = Path(config.data.path)
    if not config.data.path:
        if not config.data.generate:
            raise UserError("config.data.path is empty and config.data.generate is 0; expected a folder, or scenes")
        path = Path("data") / f"scenes_{config.data.resolution}px_{config.data.generate}"
        _draw_once(path, config)
    with progress(0, "check records", "record", process_index=processes.index()) as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        groups = config.rollout.groups
        return read_records(path, framing, strict=config.data.strict, min_bucket_records=groups, progress=done)


def _draw_once(path: Path, config: ConfigDict) -> None:
    """Scenes in ``path``, drawn by one process. Raises UserError if another does not see them."""

    def draw() -> None:
        if not path.exists():
            write_scenes(path, config.data.generate, config.data.resolution, seed=0)

    def look() -> None:
        if not path.exists():
            raise UserError(f"{path.absolute()}: drawn by process 0; expected a folder that all processes see")

    processes.from_first("draw scenes", draw)
    processes.gather("see scenes", look)


def _usable(found: RecordSet, editor: Editor, judge: Judge, strict: bool) -> tuple[Record, ...]:
    """The records that model and judge can take. Faults are printed, or refused if ``strict`` or if none is left."""
    records, faults = [], list(found.faults)
    judge_fault = judge_hook(judge, "fault")
    for record in found.records:
        reasons = {
            "instruction": editor.text.fault(Instruction(record.prompt, record.image_name)),
            "judge": judge_fault(record.extra),
        }
        faults += [Fault(record.line, kind, f"{record.id!r}: {why}") for kind, why in reasons.items() if why]
        if not any(reasons.values()):
            records.append(record)
    if not faults:
        return found.records
    checked = dataclasses.replace(
        found, records=tuple(records), faults=tuple(sorted(faults, key=lambda fault: fault.line))
    )
    summary = checked.summary()
    if editor.text.remedy and any(fault.kind == "instruction" for fault in faults):
        summary += f"\n{editor.text.remedy}"
    if strict or not records:
        raise UserError(summary)
    processes.say(summary)
    return checked.records


def _check_edit_types(algorithm: NFTConfig, records: tuple[Record, ...]) -> None:
    known = {record.edit_type for record in records if record.edit_type is not None}
    unknown = sorted(set(algorithm.tau_by_edit_type) - known)
    if unknown:
        raise UserError(
            f"config.algorithm.tau_by_edit_type: {unknown} is the type of no record; expected some of {sorted(known)}"
        )


def _check_same_configuration(config: ConfigDict) -> None:
    """Raises UserError where another process runs something else; each may have files and judges of its own."""
    mine = json.loads(config.to_json(), parse_constant=str)  # NaN, which is refused later, equals itself as text
    first = processes.from_first("configuration", lambda: mine)

    def compare() -> None:
        changed = differences(first, mine, except_for=("data.path", "model.path", "judge."))
        if changed:
            raise UserError("another configuration than process 0's ('then'):\n  " + "\n  ".join(changed))

    processes.gather("same configuration", compare)


def build(config: ConfigDict) -> Setup:
    """Checks the configuration, reads the data, loads the model.

    Raises:
        UserError: anything is not usable; nothing has been computed by then.
    """
    _check_same_configuration(config)
    rollout_mesh, mesh = phase_meshes(config)
    idle = set(range(processes.count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise UserError(
            f"config.mesh: {mesh.size} devices, none of them of process {sorted(idle)}; expected a layout that uses "
            f"devices of all {processes.count()} processes"
        )
    algorithm = check_config(config, rollout_mesh, mesh, tuple(EDITORS))
    judge = make_judge(**judge_options(config.judge.to_dict()))
    framing = Framing(config.data.resolution, config.data.crop, divisor=16)
    found = load_records(config, framing)
    rollout_format, train_format = phase_formats(config)
    loaded_format = train_format if rollout_format else ""
    loaded = ConfigDict(config.to_dict())
    loaded.model.quantize = loaded_format
    editor, load_params = EDITORS[config.model.kind](loaded, rollout_mesh, found.root, framing)
    in_format = lambda name: dataclasses.replace(editor, quantize=name)  # noqa: E731
    for phase, used in (("rollout", rollout_mesh), ("train", mesh)):
        own = config[phase].get("layout", "")
        check_shape(used, editor.transformer.config, f"config.{phase}.layout={own!r}" if own else "config.mesh")
    check_sizes(editor, framing)
    records = _usable(found, editor, judge, config.data.strict)
    _check_edit_types(algorithm, records)
    train, held_out = split_records(records, config.data.held_out)
    if len(train) < config.rollout.groups or not held_out:
        raise UserError(
            f"{found.root}: {len(train)} records to train on and {len(held_out)} held out; expected at least "
            f"{config.rollout.groups} (config.rollout.groups) and 1"
        )
    prints = processes.gather("fingerprints", lambda: fingerprint((*train, *held_out)))
    if len(set(prints)) > 1:
        raise UserError(
            f"config.data.path={config.data.path!r}: fingerprints of the usable records are {prints} in the processes; "
            "expected the same records everywhere"
        )
    try:
        processes.gather("judge", lambda: judge_hook(judge, "start")())
        first = Base(load_params(), editor.abstract(), rollout_mesh)  # where it is used first
        rollout_base, base = (
            first if same_storage(name, loaded_format) else first.quantized(in_format(name).abstract())
            for name in (rollout_format, train_format)
        )
    except BaseException:
        judge_hook(judge, "close")()
        raise
    return Setup(
        config, algorithm, lora.LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha), mesh, rollout_mesh,
        in_format(train_format), in_format(rollout_format), base, rollout_base, framing, record_dataset(train, framing),
        train, record_dataset(held_out, framing), held_out, judge,
    )  # fmt: skip
