"""Rows, the choice among them, and how they are shown; with a compiler that is not there."""

import dataclasses
import json
import re

import jax
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.planning import compiler, predict, rows, tables
from cocoedit_jax.planning.compiler import Cache, parse_out_of_memory
from cocoedit_jax.planning.page import page
from cocoedit_jax.planning.topology import parse_topology
from cocoedit_jax.planning.workload import Workload, choose_candidates
from cocoedit_jax.sharding.chips import GIB
from cocoedit_jax.train.plan import memory
from configs import flux_kontext

# Of FLUX.1 Kontext (tests/train/test_plan.py) at 512 px and 16 devices: what a run holds beside its programs.
ADAPTER = 4 * 52_297_728  # float32
VAE, ENCODER = 335_278_732, 137_096_832
RECORD = 2 * (128 * 4096 + 768) + 4 * 1024 * 64  # bfloat16 text and pooled text, float32 latents of the source
DRAWN = 288 * (4 * 1024 * 64 + 12 * 512**2) // 16  # latents and pictures


def beside(phase: str, per_shard: int = 1) -> int:
    """The step's 24 records, of the batch what is not the device's own; state and encoder, or the autoencoder."""
    if phase == "train":
        return VAE + 24 * RECORD
    return 4 * ADAPTER + ENCODER + (24 + 15 * per_shard) * RECORD + DRAWN


# As libtpu 0.0.42.1 and XLA's GPU allocator write it.
TPU_MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.35G) exceeds "
    "available HBM (15.75G)."
)
GPU_MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 25769803776 bytes."


@pytest.mark.parametrize(
    "message, need, available",
    [
        (TPU_MESSAGE, 22.35 * GIB, 15.75 * GIB),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.",
            20 * GIB,
            15.75 * GIB,
        ),
        (GPU_MESSAGE, 24 * GIB, None),
        ("RESOURCE_EXHAUSTED: no figures", None, None),
    ],
)
def test_messages_of_too_little_memory(message, need, available):
    assert parse_out_of_memory(message) == {"need": need, "available": available}


def test_another_message_is_none_of_them():
    assert parse_out_of_memory("INTERNAL: Mosaic failed") is None


@pytest.fixture(scope="module")
def workload():
    return Workload.of(flux_kontext.get_config())


class Compiled:
    """What a compiler would say of 10 GiB with one gather of 16 MiB per execution."""

    class Analysis:
        argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 2 * GIB, 1 * GIB, 1 * GIB
        temp_size_in_bytes = 8 * GIB

    def memory_analysis(self):
        return self.Analysis

    def as_text(self):
        gather = "bf16[8388608]{0} all-gather(%x), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}"
        return f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %r = {gather}\n}}\n"


class Lowered:
    def __init__(self, candidate):
        self.candidate = candidate

    def compile(self):
        if self.candidate.per_shard > 2:
            raise jax.errors.JaxRuntimeError(TPU_MESSAGE)
        return Compiled()


@pytest.fixture
def planned(workload, tmp_path, monkeypatch):
    """Three rows on v5e:4x4, of which the last needs too much; and how many programs were compiled."""
    compiled = []

    def lower(workload, candidate, phase, mesh):
        compiled.append((candidate.per_shard, phase))
        return Lowered(candidate)

    class Device:
        platform, device_kind = "tpu", "TPU v5 lite"

        def __init__(self, number):
            self.id, self.process_index = number, 0

    monkeypatch.setattr(rows, "load_topology", lambda topology: [Device(i) for i in range(topology.devices)])
    monkeypatch.setattr(compiler, "make_mesh", lambda sizes, devices: None)
    topology = parse_topology("v5e:4x4")
    candidates = choose_candidates(workload, 16, layouts=["fsdp"], per_shard=[1, 2, 3])

    def run():
        return rows.planned_rows(workload, candidates, topology, Cache(tmp_path), lower=lower)

    return run, compiled


def test_out_of_memory_is_a_row_and_nothing_is_compiled_twice(planned, workload):
    run, compiled = planned
    found = run()
    assert [row["fits"] for row in found] == [True, True, False]
    for phase in ("rollout", "train"):
        assert found[2]["phases"][phase]["over"] == pytest.approx(6.6 * GIB + beside(phase, 3))
    assert len(compiled) == 6
    assert run() == found and len(compiled) == 6
    train, rollout = found[0]["phases"]["train"], found[0]["phases"]["rollout"]
    assert train["memory"]["total"] == train["need"] == pytest.approx(10 * GIB + beside("train"))
    assert rollout["memory"]["arguments"] == 2 * GIB
    # The rollout's program runs 288 / 16 times in a step; 15/16 of 16 MiB each time.
    assert rollout["collectives"]["all-gather"] == {"count": 18, "bytes": 18 * 15 * 2**20}
    assert train["collectives"]["all-gather"] == {"count": 1, "bytes": 15 * 2**20}
    flops = predict.executed_flops(workload, workload.editor("full", "xla"), "full")
    assert train["roofline"]["compute"] == pytest.approx(flops["train"] / 16 / 197e12)
    assert found[0]["step_seconds"] == train["roofline"]["seconds"] + rollout["roofline"]["seconds"]


CONDITIONAL = """%some (x: f32[8]) -> bf16[8388608] {
  ROOT %r = bf16[8388608]{0} all-gather(%x), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
}

%none (x: f32[8]) -> bf16[8388608] {
  ROOT %z = bf16[8388608]{0} broadcast(%x), dimensions={}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %c = bf16[8388608]{0} conditional(%p, %x, %x), true_computation=%some, false_computation=%none
}
"""


def test_exchanges_of_the_reference_forward_count_by_its_share(workload, monkeypatch):
    monkeypatch.setattr(Compiled, "as_text", lambda self: CONDITIONAL)
    monkeypatch.setattr(compiler, "make_mesh", lambda sizes, devices: None)
    (candidate,) = choose_candidates(workload, 16, layouts=["fsdp"], per_shard=[1])
    for share in (1.0, 0.25):
        some = dataclasses.replace(workload, algorithm=workload.algorithm.replace(kl_fraction=share))
        found = compiler.compile_phase(some, candidate, "train", [None] * 16, lambda *_: Lowered(candidate))
        assert found["collectives"]["all-gather"] == {"count": share, "bytes": share * 15 * 2**20}


def test_a_slice_that_cannot_be_described_is_named(monkeypatch):
    def refuse(name, platform):
        raise RuntimeError("Topology v5e:3x5 is not known\nmore")

    monkeypatch.setattr(compiler.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=r"--topology=v5e:3x5: Topology .* is not known\nexpected the TPU compiler"):
        compiler.load_topology(parse_topology("v5e:3x5"))


def test_recommendation(planned, workload):
    found = planned[0]()
    chosen = rows.recommend(found)
    assert chosen["per_shard"] == 2  # the same arithmetic with half the traffic of weights
    command = rows.training_command(chosen, workload, "configs/flux_kontext.py", ["--config.data.resolution=512"])
    assert command == (
        "python -m launch.train --config=configs/flux_kontext.py --config.data.resolution=512 "
        "--config.mesh.layout=fsdp --config.rollout.batch_size=32 --config.train.micro_batch=32 "
        "--config.model.remat=full --config.model.attention=auto --config.evaluation.batch_size=16"
    )
    with pytest.raises(UserError, match=r"none of 1 fits; closest: fsdp, 3 per shard.*7\.65 GiB too much"):
        rows.recommend(found[2:])


def test_table_json_and_page(planned, workload):
    found = planned[0]()
    table = tables.text_table(found)
    assert "2.00 + 8.00 + 1.01" in table and "2.00 + 8.00 + 0.34" in table and "15.75" in table
    assert "rollout: 7.65 GiB too much; train: 6.94 GiB" in table
    assert "predictions" in table
    assert len(tables.markdown_table(found).splitlines()) == 5
    json.dumps(found, allow_nan=False)
    text = page(found, "settings & more", "python -m launch.train", found[0])
    assert "settings &amp; more" in text and text.count("<img") == 2 and "://" not in text
    assert "all-gather 19" in text


def test_gpus_by_formula(workload, tmp_path):
    candidates = choose_candidates(workload, 8, layouts=["replicated", "fsdp"], per_shard=[2])
    whole, split = rows.planned_rows(workload, candidates, parse_topology("h100:8"), Cache(tmp_path))
    arguments = [row["phases"]["rollout"]["memory"]["arguments"] for row in (whole, split)]
    base, samples = 23_802_816_640, 2 * RECORD
    assert arguments[0] == pytest.approx(base + VAE - ENCODER + ADAPTER + samples, rel=1e-6)
    assert arguments[0] - arguments[1] == pytest.approx(base * 7 / 8, rel=0.01)
    assert whole["method"] == "by formula" and tables.BY_FORMULA in tables.text_table([whole, split])
    assert split["phases"]["rollout"]["exchanged"] == pytest.approx(18 * 10 * 23.8e9 * 7 / 8, rel=0.01)


def test_bad_candidates_are_named_together(workload):
    with pytest.raises(UserError) as error:
        choose_candidates(
            workload, 16, layouts=["fsdb", "fsdp_tensor:tensor=5", "replicated:data=8"], per_shard=[0], remat=["some"]
        )
    for text in ("fsdb", "tensor=5", "data=8: .* does not fit 16 devices", "--per_shard=0", "--remat=some"):
        assert re.search(text, str(error.value))
    candidates = choose_candidates(workload, 128, layouts=["fsdp"])
    with pytest.raises(UserError, match=r"288 samples; expected a multiple of the \[128\]"):
        rows.check_samples(workload, candidates)


def test_memory_of_the_fake_is_read_like_a_real_one():
    assert memory(Compiled())["temporaries"] == 8 * GIB  # pyright: ignore
