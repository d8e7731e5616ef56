"""The chip table: what one device of each kind offers, from the vendors' data sheets."""

import dataclasses

GB = 1e9
GIB = 2**30
# Of a GPU's memory, what commands that use it for JAX alone let JAX take (launch/command.py), and so what is planned
# with. JAX by itself takes 0.75. The rest is CUDA's context, libraries' workspaces and NCCL's buffers, which are not in
# JAX's pool.
GPU_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device offers.

    Attributes:
        kinds: starts of JAX's ``device_kind``.
        platform: "tpu", which the compiler plans for, or "gpu", planned by formula.
        flops: dense bf16 peak, FLOP/s.
        int8, fp8: dense peak of products of such numbers, 1/s; 0: no such arithmetic, or none that is stated.
        hbm: bytes that a program may use.
        hbm_bandwidth: bytes/s.
        link: bytes/s that it can send to its neighbours, over all links, one direction.
        network: bytes/s beyond a node or slice.
        node: devices on the fast links.
        cores: devices per chip, where a name counts chips differently than programs do.
        dims: of its torus.
    """

    kinds: tuple[str, ...]
    platform: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    network: float
    node: int = 0
    cores: int = 1
    dims: int = 2
    int8: float = 0.0
    fp8: float = 0.0


CHIPS: dict[str, Chip] = {
    # TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p-training,v6e,tpu7x}: peak, HBM, and half of the "bidirectional ICI
    # bandwidth per chip" (600, 400, 1200, 800, 1200 GB/s). HBM of v5e is what its compiler allows (of 16 GiB); of the
    # others the nominal size, lowered to the compiler's own limit where it states one. v4 multiplies int8 as fast as
    # bf16.
    "v4": Chip(("TPU v4",), "tpu", 275e12, 32 * GIB, 1228 * GB, 300 * GB, 3.1 * GB, dims=3, int8=275e12),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), "tpu", 197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.1 * GB, int8=393e12),
    "v5p": Chip(("TPU v5p", "TPU v5"), "tpu", 459e12, 95 * GIB, 2765 * GB, 600 * GB, 6.2 * GB, dims=3, int8=918e12),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), "tpu", 918e12, 31.25 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, int8=1836e12),
    # Programs see the two TensorCores of a chip as two devices: half a chip each (2307 TFLOP/s, 4614 in fp8,
    # 192 GB, 7380 GB/s).
    "tpu7x": Chip(("TPU7x", "TPU v7"), "tpu", 1153.5e12, 96 * GB, 3690 * GB, 300 * GB, 6.2 * GB, cores=2, dims=3,
                  fp8=2307e12),
    # GPU: NVIDIA data sheets (SXM): dense peaks (half of those "with sparsity"), HBM, NVLink 600 (H: 900, B: 1800) GB/s
    # both directions together; one InfiniBand adapter per GPU, 200 Gb/s (H, B: 400), as in DGX systems.
    "a100": Chip(("NVIDIA A100",), "gpu", 312e12, GPU_SHARE * 80 * GB, 2039 * GB, 300 * GB, 25 * GB, node=8,
                 int8=624e12),
    "h100": Chip(("NVIDIA H100",), "gpu", 989e12, GPU_SHARE * 80 * GB, 3350 * GB, 450 * GB, 50 * GB, node=8,
                 int8=1979e12, fp8=1979e12),
    "h200": Chip(("NVIDIA H200",), "gpu", 989e12, GPU_SHARE * 141 * GB, 4800 * GB, 450 * GB, 50 * GB, node=8,
                 int8=1979e12, fp8=1979e12),
    "b200": Chip(("NVIDIA B200",), "gpu", 2250e12, GPU_SHARE * 180 * GB, 7700 * GB, 900 * GB, 50 * GB, node=8,
                 int8=4500e12, fp8=4500e12),
}  # fmt: skip
# Cards that are slower than the SXM one whose name they start with.
OTHER_CARDS = ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL")


def chip_of(device_kind: str) -> tuple[str, Chip] | None:
    """The chip that JAX calls ``device_kind``, with its name in ``CHIPS``; None for one that is not in the table."""
    if device_kind.startswith(OTHER_CARDS):
        return None
    starts = [(kind, name) for name, chip in CHIPS.items() for kind in chip.kinds if device_kind.startswith(kind)]
    if not starts:
        return None
    name = max(starts, key=lambda pair: len(pair[0]))[1]
    return name, CHIPS[name]
