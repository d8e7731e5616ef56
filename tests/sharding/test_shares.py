"""Which samples and records a process works on: every sample once, and the same numbers over any processes."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from cocoedit_jax.sharding.mesh import AXES, make_mesh
from cocoedit_jax.sharding.shares import divide, local_rows

CASES = {  # sizes of the mesh, groups, group size, batch size
    "data": ((8, 1, 1, 1), 8, 4, 16),
    "fsdp": ((2, 4, 1, 1), 4, 8, 8),
    "straddling": ((8, 1, 1, 1), 6, 8, 24),
    "more shares than groups": ((4, 2, 1, 1), 2, 8, 16),
    "context": ((1, 2, 4, 1), 6, 4, 8),
    "tensor, pictures whole": ((1, 2, 1, 4), 3, 4, 6),
    "one share": ((1, 1, 2, 4), 3, 4, 12),
    "filled up": ((4, 2, 1, 1), 3, 4, 8),
    "hardly anything": ((8, 1, 1, 1), 1, 2, 16),
}


def fake_mesh(shape: tuple[int, ...], processes: int) -> Any:
    """Consecutive devices of each process, as JAX lists them."""
    size = int(np.prod(shape))
    devices = np.asarray([SimpleNamespace(process_index=i * processes // size) for i in range(size)]).reshape(shape)
    return SimpleNamespace(devices=devices, size=size, shape=dict(zip(AXES, shape, strict=True)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_sample_has_one_judge_and_its_record_there(case, processes):
    shape, groups, size, batch_size = CASES[case]
    plan = np.repeat(np.arange(groups), size)
    mesh = fake_mesh(shape, processes)
    found = [divide(plan, batch_size, mesh, process) for process in range(processes)]
    alone = divide(plan, batch_size, fake_mesh(shape, 1), 0)
    for each in found:  # what is computed together does not depend on the processes
        for name in ("batches", "encoded", "position"):
            np.testing.assert_array_equal(getattr(each, name), getattr(alone, name))
    np.testing.assert_array_equal(np.sort(alone.batches.reshape(-1)), np.arange(alone.batches.size))
    np.testing.assert_array_equal(alone.batches.reshape(-1)[alone.order], np.arange(len(plan)))
    np.testing.assert_array_equal(alone.encoded[alone.position], np.arange(groups))
    judged = np.concatenate([each.own for each in found])
    assert len(judged) == len(plan) and set(judged) == set(range(len(plan)))
    rows = len(alone.encoded) // mesh.size
    for process, each in enumerate(found):
        assert set(plan[each.own]) <= set(each.groups)
        devices = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == process]
        encoded = {int(g) for device in devices for g in alone.encoded[device * rows : (device + 1) * rows]}
        assert set(each.groups) == encoded | set(plan[each.own])


def test_groups_that_divide_stay_with_one_judge_and_are_loaded_once():
    plan = np.repeat(np.arange(8), 4)
    found = [divide(plan, 16, fake_mesh((2, 4, 1, 1), 4), process) for process in range(4)]
    for process, each in enumerate(found):
        np.testing.assert_array_equal(np.sort(each.own), np.arange(8 * process, 8 * process + 8))
        np.testing.assert_array_equal(each.groups, [2 * process, 2 * process + 1])


def test_records_that_repeat_share_a_group():
    plan = np.repeat([0, 1, 0, 1], 4)  # fewer allowed records than groups
    found = [divide(plan, 8, fake_mesh((4, 1, 1, 1), 2), process) for process in range(2)]
    np.testing.assert_array_equal(found[0].encoded[found[0].position], [0, 1])
    assert all(set(each.groups) == {0, 1} for each in found)


def test_placed_records_come_back_whole():
    mesh = make_mesh({"data": 4, "context": 2})
    shares = divide(np.repeat(np.arange(6), 4), 8, mesh)
    records = np.random.default_rng(0).random((6, 5)).astype(np.float32)
    placed = shares.place(records)
    assert placed.shape == (len(shares.encoded), 5)
    assert all(len(shard.data) == len(placed) // 8 for shard in placed.addressable_shards)
    np.testing.assert_array_equal(np.asarray(placed)[shares.position], records)
    np.testing.assert_array_equal(shares.whole(records), records)


def test_rows_of_this_process():
    mesh = make_mesh({"data": 4, "context": 2})
    x = jax.device_put(np.arange(16.0).reshape(8, 2), jax.NamedSharding(mesh, jax.P("data")))
    assert local_rows(x, np.arange(8)) is x
    part = local_rows(x, [2, 3, 6, 7])
    assert isinstance(part, jax.Array) and len(part.sharding.device_set) == 2
    np.testing.assert_array_equal(part, np.asarray(x)[[2, 3, 6, 7]])
    np.testing.assert_array_equal(local_rows(x, [6, 1]), [[12.0, 13.0], [2.0, 3.0]])
    assert local_rows(x, []).shape == (0, 2)
