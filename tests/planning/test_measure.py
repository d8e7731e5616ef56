"""The measured mode on the tests' devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cocoedit_jax.planning import measure, rows, tables
from cocoedit_jax.planning.held import held
from cocoedit_jax.planning.measure import HeldBase, Program, fill, measured_rows
from cocoedit_jax.planning.workload import Workload, choose_candidates
from cocoedit_jax.sharding.mesh import make_mesh, replicated
from tests.planning.test_rows import GPU_MESSAGE
from tests.train.tiny import tiny_config, tiny_quickstart


@pytest.fixture
def workload(tmp_path, monkeypatch):
    """16 samples of the tiny editor, two micro-batches of one per share on eight devices; the cheapest programs."""
    (tmp_path / "config.json").write_text(tiny_quickstart().to_json())
    monkeypatch.setattr(measure, "peak_flops", lambda device: (1e9, "test"))
    few = {"rollout.steps": 2, "rollout.solver": "euler", "algorithm.old_decay_type": 0, "algorithm.kl_weight": 0.0}
    return Workload.of(tiny_config(tmp_path, tmp_path, "edit-r1", **few))


def candidates(workload, per_shard):
    return choose_candidates(workload, 8, layouts=["data_fsdp:fsdp=2"], per_shard=per_shard, remat=["none"])


def test_rows_of_the_devices_present(workload):
    """One row runs, one runs out of memory."""

    class Small(Program):
        def __init__(self, workload, candidate, *more):
            if candidate.per_shard == 2:
                raise jax.errors.JaxRuntimeError(GPU_MESSAGE)
            super().__init__(workload, candidate, *more)

    fits, exhausted = measured_rows(workload, candidates(workload, [1, 2]), repeats=2, program=Small)
    assert fits["fits"] and fits["mesh"] == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    for phase in ("rollout", "train"):
        found = fits["phases"][phase]
        assert found["measured"]["samples"] == 2 and found["compile_seconds"] > 0
        assert found["measured"]["q1"] <= found["measured"]["median"] <= found["measured"]["q3"]
        memory = found["memory"]
        assert found["need"] == memory["total"] > memory["arguments"] + memory["beside"]
        # What is planned by formula is what the compiler takes.
        arguments, beside = held(workload, candidates(workload, [1])[0], phase)
        assert sum(arguments.values()) == pytest.approx(memory["arguments"], rel=0.01)
        assert sum(beside.values()) == memory["beside"]
    seconds = sum(fits["phases"][p]["measured"]["median"] for p in fits["phases"])
    assert fits["samples_per_second"] == pytest.approx(16 / seconds)
    assert not exhausted["fits"] and exhausted["phases"]["train"]["need"] == 24 * 2**30
    assert rows.recommend([fits, exhausted]) is fits
    table = tables.text_table([fits, exhausted])
    assert "rollout: out of memory" in table and "random weights" in table and "peak GiB" not in table


class Fake:
    """A program that takes as many seconds as its candidate has samples per share, and memory in turn."""

    compile_seconds, kept, memory = 3.0, True, {"arguments": 5.0, "temporaries": 6.0, "total": 11.0}
    calls: list = []

    def __init__(self, workload, candidate, phase, devices, micro_batches):
        self.name = (candidate.per_shard, phase)
        assert micro_batches == 3

    def __call__(self, base):
        self.calls.append(self.name)
        return float(self.name[0]) * (1 + len(self.calls) % 2)


def test_programs_take_turns_and_what_is_known_is_told(workload, monkeypatch):
    Fake.calls.clear()
    peaks = iter([7, 9, 9, 9, 9, 20, 20, 20])  # before and after each first run
    monkeypatch.setattr(measure, "peak_memory", lambda devices: next(peaks))
    told = []
    found = measured_rows(
        workload, candidates(workload, [1, 2]), repeats=3, micro_batches=3, program=Fake,
        done=lambda rows: told.append([(row["per_shard"], "step_seconds" in row) for row in rows]),
    )  # fmt: skip
    once = [(n, phase) for n in (1, 2) for phase in ("rollout", "train")]
    assert Fake.calls == once * 4
    assert told == [[(1, False)], [(1, False), (2, False)], *[[(1, True), (2, True)]] * 3]
    # Only those that nobody before needed as much as are known to be a program's own.
    assert [[p.get("peak") for p in row["phases"].values()] for row in found] == [[9, None], [20, None]]
    table = tables.text_table(found)
    train = found[0]["phases"]["train"]
    assert train["need"] == 11 + train["memory"]["beside"] and "peak GiB" in table and "3.0 (kept)" in table
    rollout = found[0]["phases"]["rollout"]
    assert rollout["need"] == 9 + rollout["memory"]["beside"] - rollout["held_beside"]["encoders"]
    assert found[1]["phases"]["rollout"]["measured"] == {"median": 4, "q1": 4, "q3": 4, "samples": 3}


def test_a_row_without_room_for_what_a_run_holds_beside_it_does_not_fit(workload, monkeypatch):
    beside = [sum(held(workload, c, "rollout")[1].values()) for c in candidates(workload, [1])]
    monkeypatch.setattr(measure, "memory_limit", lambda devices: 11 + beside[0] - 1)
    Fake.calls.clear()
    (found,) = measured_rows(workload, candidates(workload, [1]), repeats=2, micro_batches=3, program=Fake)
    assert not found["fits"] and found["phases"]["train"]["fits"] and found["phases"]["rollout"]["over"] == 1
    assert Fake.calls.count((1, "rollout")) == 1  # it is not timed


def test_a_program_that_runs_out_of_memory_later_is_a_row_and_the_others_go_on(workload, monkeypatch):
    """The first row's optimizer step fails in the second of three rounds, after its first run."""
    Fake.calls.clear()
    dropped = []
    monkeypatch.setattr(HeldBase, "drop", lambda self: dropped.append(len(Fake.calls)))

    class Tight(Fake):
        def __call__(self, base):
            seconds = super().__call__(base)
            if self.name == (1, "train") and self.calls.count(self.name) == 3:
                raise jax.errors.JaxRuntimeError(GPU_MESSAGE)
            return seconds

    rates = []
    found = measured_rows(
        workload, candidates(workload, [1, 2]), repeats=3, micro_batches=3, program=Tight,
        done=lambda rows: rates.append(["samples_per_second" in row for row in rows]),
    )  # fmt: skip
    assert found[0]["phases"]["train"] == {
        "fits": False, "need": 24 * 2**30, "available": None, "message": GPU_MESSAGE,
    }  # fmt: skip
    assert Fake.calls.count((1, "train")) == 3 and dropped == [10]
    assert [found[i]["phases"][p]["measured"]["samples"] for i, p in ((0, "rollout"), (1, "train"))] == [3, 3]
    assert rates[2:] == [[True, True], [False, True], [False, True]]
    assert not found[0]["fits"] and rows.recommend(found) is found[1]
    assert "train: out of memory" in tables.text_table(found)


def test_the_base_stays_where_it_is_wanted():
    mesh = make_mesh({"fsdp": 8})
    split = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    struct = lambda shape, sharding: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)  # noqa: E731
    base = HeldBase()
    first = base.placed({"a": struct((8, 4), split), "b": struct((3,), replicated(mesh))})
    assert base.placed({"a": struct((8, 4), split), "b": struct((3,), None)}) == first  # unused: wherever it is
    second = base.placed({"a": struct((8, 4), replicated(mesh)), "b": struct((3,), replicated(mesh))})
    assert second["b"] is first["b"] and second["a"].sharding.is_fully_replicated
    np.testing.assert_array_equal(second["a"].astype(jnp.float32), first["a"].astype(jnp.float32))


def test_large_arrays_are_random_and_made_in_place(monkeypatch):
    monkeypatch.setattr(measure, "_HOST_BYTES", 0)
    mesh = make_mesh({"fsdp": 8})
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    shape = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=sharding)
    x = np.asarray(fill(shape))
    assert abs(x.mean()) < 1e-3 and x.std() == pytest.approx(0.07 / 12**0.5, rel=0.02)
    rows, columns = np.corrcoef(x), np.corrcoef(x.T)
    for table in (rows, columns):
        off = table[~np.eye(len(table), dtype=bool)]
        assert np.abs(off).mean() < 0.15
    compiled = measure._hashed(shape).lower().compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.output_size_in_bytes <= x.nbytes / 8 + 256
