import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.planning.chips import CHIPS, GB, GIB, parse_topology
from cocoedit_jax.sharding.flops import PEAK_FLOPS


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
    ],
)
def test_other_names_are_refused(text, expected):
    with pytest.raises(UserError, match=expected):
        parse_topology(text)


def test_peaks_are_those_of_the_flops_table():
    names = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "h100": "NVIDIA H100", "h200": "NVIDIA H200",
             "b200": "NVIDIA B200"}  # fmt: skip
    for family, name in names.items():
        assert CHIPS[family].flops == PEAK_FLOPS[name]
    assert 14 * GIB < CHIPS["v5e"].hbm < 16 * GIB


def test_clusters_of_more_than_a_node_are_as_fast_as_their_network():
    assert parse_topology("h100:8").link == 450 * GB
    assert parse_topology("h100:16").link == 50 * GB
    assert parse_topology("v5p-512").link == CHIPS["v5p"].link
