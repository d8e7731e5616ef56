import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.planning.topology import parse_topology
from cocoedit_jax.sharding.chips import CHIPS, GB, GIB, chip_of


@pytest.mark.parametrize(
    "text, name, devices",
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v6e-32", "v6e:4x8", 32),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-64", "v5p:2x4x4", 32),
        ("V5P:2x2x1", "v5p:2x2x1", 4),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
        ("h100:8", "h100:8", 8),
        ("h200-64", "h200:64", 64),
        ("b200:1", "b200:1", 1),
    ],
)
def test_names(text, name, devices):
    topology = parse_topology(text)
    assert (topology.name, topology.devices) == (name, devices)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("v5e", "v5e:4x4 or v5p-16"),
        ("v9:4x4", "v9:4x4: expected"),
        ("v5e:4x4x4", "2 dimensions.*v5e:2x4"),
        ("v5p:4x4", "3 dimensions.*v5p:2x2x2"),
        ("v5p-17", "no such slice.*v5p-16"),
        ("v6e-3", "no such slice.*v6e-16"),
        ("h100:12", "up to 8 or a multiple"),
        ("h100:0", "up to 8 or a multiple"),
        ("h100:2x4", "number of GPUs"),
        ("v5e:0x4", "dimensions"),
        ("v4:2x2x2", "v4:2x2x2: expected"),
    ],
)
def test_other_names_are_refused(text, expected):
    with pytest.raises(UserError, match=expected):
        parse_topology(text)


@pytest.mark.parametrize(
    "kind, name",  # as JAX and libtpu 0.0.42 say it
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 PCIe", None), ("NVIDIA L4", None), ("cpu", None),
    ],
)  # fmt: skip
def test_devices_are_found_by_what_jax_calls_them(kind, name):
    assert (chip_of(kind) or (None,))[0] == name


def test_chips():
    assert 14 * GIB < CHIPS["v5e"].hbm < 16 * GIB
    assert CHIPS["tpu7x"].flops * CHIPS["tpu7x"].cores == 2307e12  # the data sheet's chip is two devices


def test_groups_beyond_a_node_are_as_fast_as_its_adapters():
    small, large = parse_topology("h100:8"), parse_topology("h100:16")
    assert small.bandwidth(1, 8) == large.bandwidth(1, 8) == large.bandwidth(2, 4) == 450 * GB
    assert large.bandwidth(1, 16) == 8 * 50 * GB  # eight of its members in a node
    assert large.bandwidth(2, 8) == 4 * 50 * GB and large.bandwidth(8, 2) == 50 * GB
    assert parse_topology("v5p-512").bandwidth(1, 256) == CHIPS["v5p"].link
