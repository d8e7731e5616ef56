"""Compares layouts of a run, on the devices present or for ones that are not there, and recommends one.

    python -m launch.bench_sharding --config=configs/quickstart.py                         # measured on this host
    python -m launch.bench_sharding --config=configs/flux_kontext.py --topology=v5e:4x4 \\
        --layouts=fsdp,fsdp_tensor --per_shard=1,2 --remat=full,attention --recommend      # planned by the TPU compiler
    python -m launch.bench_sharding --config=configs/flux_kontext.py --topology=h100:8     # by formula

Every layout x --per_shard x --remat x --attention x --quantize is a row. Writes OUT/sharding.json and
OUT/sharding.html. Planning for TPUs needs no TPU: pip install 'cocoedit-jax[tpu]' (or TPU_LIBRARY_PATH=.../libtpu.so)
and JAX_PLATFORMS=cpu. One program takes the compiler minutes, once: results are kept in --cache, so that a later call
goes on or is instant.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import command, distributed

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration of the run, as for launch.train.")
_TOPOLOGY = flags.DEFINE_list(
    "topology", [], "Slices or clusters that are not there: v5e:4x4, v5p-16, tpu7x:2x2x1, h100:8; empty: measure here."
)
_LAYOUTS = flags.DEFINE_multi_string("layouts", [], "Layouts, such as fsdp or fsdp_tensor:tensor=4; default: all.")
_PER_SHARD = flags.DEFINE_list("per_shard", [], "Samples per micro-batch and share; default: the configuration's.")
_REMAT = flags.DEFINE_list("remat", [], "Remat policies; default: the configuration's.")
_ATTENTION = flags.DEFINE_list("attention", [], "Attention backends; default: the configuration's.")
_ADAPTERS = flags.DEFINE_string("adapters", "", "replicated or sharded; default: the configuration's.")
_QUANTIZE = flags.DEFINE_list(
    "quantize", [], "Formats of the frozen base: none, int8, int8_weights, fp8; default: the configuration's."
)
_PHASES = flags.DEFINE_list("phases", ["rollout", "train"], "Phases of a step to look at.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measured rounds.", lower_bound=2)
_MICRO_BATCHES = flags.DEFINE_integer(
    "micro_batches", 2, "Most micro-batches that are run to time an optimizer step.", lower_bound=1
)
_RECOMMEND = flags.DEFINE_bool("recommend", False, "Choose the fastest row that fits and print the command to train.")
_OUT = flags.DEFINE_string("out", "runs/sharding", "Folder for sharding.json and sharding.html.")
_CACHE = flags.DEFINE_string("cache", "runs/sharding_cache", "Folder for what the compiler said.")
flags.mark_flag_as_required("config")


def _layouts() -> list[str]:
    """Layouts separated by commas, but not those before the sizes of one: ``fsdp,fsdp_tensor:fsdp=4,tensor=2``."""
    out: list[str] = []
    for text in _LAYOUTS.value:
        for part in text.split(","):
            if "=" in part and ":" not in part and out:
                out[-1] += f",{part}"
            else:
                out.append(part)
    return out


def main(argv: list[str]) -> None:
    config = _CONFIG.value
    if not _TOPOLOGY.value:
        distributed.alone("layouts of several hosts are planned with --topology, such as v5e:4x4 or h100:16")
    import jax

    from cocoedit_jax.errors import UserError
    from cocoedit_jax.planning import measure, rows, tables
    from cocoedit_jax.planning.compiler import PHASES, Cache
    from cocoedit_jax.planning.page import page
    from cocoedit_jax.planning.topology import parse_topology
    from cocoedit_jax.planning.workload import Workload, choose_candidates
    from cocoedit_jax.reporting.telemetry import write_json, write_text

    unknown = sorted(set(_PHASES.value) - set(PHASES))
    if unknown or not _PHASES.value:
        raise UserError(f"--phases={','.join(_PHASES.value)}; expected some of {', '.join(PHASES)}")
    if not all(text.isdecimal() for text in _PER_SHARD.value):
        raise UserError(f"--per_shard={','.join(_PER_SHARD.value)}; expected whole numbers, at least 1")
    workload, places = Workload.of(config), [parse_topology(text) for text in _TOPOLOGY.value]
    phases = [phase for phase in PHASES if phase in _PHASES.value]

    def candidates(devices: int) -> list:
        chosen = choose_candidates(
            workload,
            devices,
            layouts=_layouts(),
            per_shard=[int(text) for text in _PER_SHARD.value],
            remat=_REMAT.value,
            attention=_ATTENTION.value,
            quantize=_QUANTIZE.value,
            adapters=_ADAPTERS.value or config.train.get("adapters", "replicated"),
        )
        usable = rows.check_samples(workload, chosen)
        for layout in dict.fromkeys(c.layout for c in chosen if c not in usable):
            print(f"left out: {layout} on {devices} devices, whose shares do not divide the samples", file=sys.stderr)
        return usable

    override = config_flags.get_override_values(flags.FLAGS["config"])
    overrides = [f"--config.{key}={value}" for key, value in override.items()]
    path: str = flags.FLAGS["config"].config_filename  # pyright: ignore[reportAttributeAccessIssue]
    settings = (
        f"{path}: {config.model.kind}, {config.data.resolution} px, {workload.samples} samples per step, LoRA rank "
        f"{config.lora.rank}"
    )
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)

    def write(found: list[rows.Row]) -> tuple[rows.Row | None, str]:
        """Everything that is known so far; the row to recommend, and its command."""
        chosen = rows.recommend(found) if any(row["fits"] and "step_seconds" in row for row in found) else None
        line = rows.training_command(chosen, workload, path, overrides) if chosen else ""
        write_json(out / "sharding.json", {"settings": settings, "rows": found, "recommended": line})
        write_text(out / "sharding.html", page(found, settings, line if _RECOMMEND.value else "", chosen))
        return chosen, line

    found: list[rows.Row] = []
    if _TOPOLOGY.value:
        planned = [(place, candidates(place.devices)) for place in places]  # refused before anything is compiled
        cache = Cache(Path(_CACHE.value))
        for place, some in planned:
            found += rows.planned_rows(workload, some, place, cache, phases)
            write(found)
    else:
        found = measure.measured_rows(
            workload, candidates(jax.device_count()), repeats=_REPEATS.value, micro_batches=_MICRO_BATCHES.value,
            phases=phases, done=write,
        )  # fmt: skip

    chosen, line = write(found)
    print(settings)
    print(tables.text_table(found))
    print(f"\n{out / 'sharding.html'}, {out / 'sharding.json'}", file=sys.stderr)
    if _RECOMMEND.value:
        chosen = chosen or rows.recommend(found)  # an error if none fits, after everything was written
        print(
            f"\nrecommended: {chosen['layout']} on {chosen['where']}, {chosen['per_shard']} per shard, remat "
            f"{chosen['remat']}\n{line}"
        )


if __name__ == "__main__":
    command.run(main, jax_only=True)
