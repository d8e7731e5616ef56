"""The measured mode on the tests' devices."""

import jax
import pytest

from cocoedit_jax.planning import measure, rows, tables
from cocoedit_jax.planning.measure import Program, measured_rows
from cocoedit_jax.planning.workload import Workload, choose_candidates
from tests.planning.test_rows import GPU_MESSAGE
from tests.train.tiny import tiny_config, tiny_quickstart


def test_rows_of_the_devices_present(tmp_path, monkeypatch):
    """One row runs, one runs out of memory."""
    (tmp_path / "config.json").write_text(tiny_quickstart().to_json())
    workload = Workload.of(tiny_config(tmp_path, tmp_path))
    assert workload.samples == 16
    candidates = choose_candidates(workload, 8, layouts=["data_fsdp:fsdp=2"], per_shard=[1, 2], remat=["none"])
    monkeypatch.setattr(measure, "peak_flops", lambda device: (1e9, "test"))

    class Small(Program):
        def __init__(self, workload, candidate, phase, devices):
            if candidate.per_shard == 2:
                raise jax.errors.JaxRuntimeError(GPU_MESSAGE)
            super().__init__(workload, candidate, phase, devices)

    fits, exhausted = measured_rows(workload, candidates, repeats=2, program=Small)
    assert fits["fits"] and fits["mesh"] == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    for phase in ("rollout", "train"):
        found = fits["phases"][phase]
        assert found["measured"]["samples"] == 2 and found["compile_seconds"] > 0
        assert found["measured"]["q1"] <= found["measured"]["median"] <= found["measured"]["q3"]
    seconds = sum(fits["phases"][p]["measured"]["median"] for p in fits["phases"])
    assert fits["samples_per_second"] == pytest.approx(16 / seconds)
    assert not exhausted["fits"] and exhausted["phases"]["train"]["need"] == 24 * 2**30
    assert rows.recommend([fits, exhausted]) is fits
    table = tables.text_table([fits, exhausted])
    assert "rollout: out of memory" in table and "random weights" in table
