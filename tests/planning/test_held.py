"""What lies on a device beside the programs of a run, of published models by shape."""

import dataclasses

import pytest

from cocoedit_jax.planning import held, rows
from cocoedit_jax.planning.topology import parse_topology
from cocoedit_jax.planning.workload import Workload, choose_candidates
from configs import flux_kontext, qwen_image_edit
from tests.planning.test_rows import ADAPTER, VAE, beside


@pytest.fixture(scope="module")
def workload():
    return Workload.of(flux_kontext.get_config())


def candidate(workload, **options):
    (found,) = choose_candidates(workload, 16, layouts=["fsdp"], per_shard=[1], **options)
    return found


def test_a_run_holds_its_training_state_while_it_samples_and_its_encoders_while_it_trains(workload):
    for phase in ("rollout", "train"):
        _, found = held.held(workload, candidate(workload), phase)
        assert sum(found.values()) == pytest.approx(beside(phase), rel=1e-6)
    arguments, _ = held.held(workload, candidate(workload), "train")
    assert arguments["adapters"] == pytest.approx(4 * ADAPTER, rel=1e-6)  # trained, old, two moments


def test_the_training_state_is_split_where_adapters_are_sharded_and_has_an_average_if_asked_for(workload):
    for algorithm, copies in ((workload.algorithm, 4), (workload.algorithm.replace(ema_decay=0.9), 5)):
        some = dataclasses.replace(workload, algorithm=algorithm)
        for adapters, shares in (("replicated", 1), ("sharded", 16)):
            arguments, found = held.held(some, candidate(some, adapters=adapters), "rollout")
            assert found["adapters"] == pytest.approx(copies * ADAPTER / shares, rel=1e-3)
            assert arguments["sampling adapter"] == ADAPTER  # whole wherever it samples


def test_a_base_of_another_format_is_held_beside(workload):
    both = dataclasses.replace(candidate(workload), quantize=("int8", ""))
    assert held.held(workload, both, "rollout")[1]["other base"] == pytest.approx(23.8e9 / 16, rel=0.01)
    small = held.held(workload, both, "train")[1]["other base"]
    assert small == held.held(workload, both, "rollout")[0]["base"] < 0.66 * 23.8e9 / 16
    same = dataclasses.replace(both, quantize=("int8", "int8_weights"))
    assert "other base" not in held.held(workload, same, "rollout")[1]


def test_rows_by_formula_hold_the_same(workload):
    (row,) = rows.planned_rows(workload, [candidate(workload)], parse_topology("h100:16"), None)  # pyright: ignore
    for phase in ("rollout", "train"):
        found = row["phases"][phase]
        assert found["memory"]["beside"] == pytest.approx(beside(phase), rel=1e-6)
        parts = found["memory"]["arguments"] + found["memory"]["temporaries"] + found["memory"]["beside"]
        assert found["need"] == found["memory"]["total"] == pytest.approx(parts)
        assert found["memory"]["arguments"] == sum(held.held(workload, candidate(workload), phase)[0].values())
    assert VAE == row["phases"]["train"]["held_beside"]["encoders"]


def test_precomputed_modulation_is_not_held():
    """A third of Qwen-Image-Edit, in place of which its tables are."""
    config = qwen_image_edit.get_config()
    base = []
    for config.model.precompute_modulation in (True, False):
        some = Workload.of(config.copy_and_resolve_references())
        (replicated,) = choose_candidates(some, 8, layouts=["replicated"], per_shard=[1])
        base.append(held.held(some, replicated, "train")[0]["base"])
    assert base == [27_208_612_992 + 44_359_720, 40_860_802_176]


# GiB of arguments that libtpu 0.0.42.1 plans for a chip of v5e:4x4, step and rollout batch (benchmarks/RESULTS.md).
COMPILED = [
    (flux_kontext, 512, 2.20, 1.77),
    (flux_kontext, 1024, 2.23, 1.77),
    (qwen_image_edit, 512, 3.08, 2.08),
    (qwen_image_edit, 1024, 3.11, 2.09),
]


@pytest.mark.parametrize("module, pixels, train, rollout", COMPILED)
def test_arguments_are_those_that_the_compiler_plans(module, pixels, train, rollout):
    config = module.get_config()
    config.data.resolution = pixels
    some = Workload.of(config)
    for phase, expected in (("train", train), ("rollout", rollout)):
        arguments, _ = held.held(some, candidate(some), phase)
        assert sum(arguments.values()) / 2**30 == pytest.approx(expected, abs=0.015)
