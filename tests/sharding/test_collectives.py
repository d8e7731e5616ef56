"""Collectives read from programs whose exchanges are known by hand: counts, bytes, axes, loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cocoedit_jax.sharding.collectives import Total, by_kind, exchanges
from cocoedit_jax.sharding.mesh import batch_sharding, make_mesh, replicated


def compiled(function, sizes, *shapes, in_specs, out_specs):
    mesh = make_mesh(sizes)
    run = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_loops_multiply_and_bytes_are_those_of_a_ring():
    """3 x 5 gathers of [4, 6] shards over 4 devices; one sum of [2, 2] over 2; 3 permutations."""

    def function(x, y):
        def inner(carry, _):
            whole = jax.lax.all_gather(carry, "fsdp", tiled=True)  # [16, 6]
            return carry + jnp.sin(whole[:4] * whole[4:8]), None

        def outer(carry, _):
            carry, _ = jax.lax.scan(inner, carry, None, length=5)
            return jax.lax.ppermute(carry, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

        x, _ = jax.lax.scan(outer, x, None, length=3)
        return x, jax.lax.psum(y, "data")

    text = compiled(
        function, {"data": 2, "fsdp": 4}, (16, 6), (2, 2), in_specs=(P("fsdp"), P()), out_specs=(P("fsdp"), P())
    )
    found = by_kind(exchanges(text, devices=8))
    assert found == {
        "all-gather": Total(15, 15 * 16 * 6 * 4 * 3 / 4),
        "all-reduce": Total(1, 2 * 2 * 2 * 4 / 2),
        "collective-permute": Total(3, 3 * 4 * 6 * 4),
    }


def test_reduce_scatter_and_all_to_all():
    def function(x):
        y = jax.lax.psum_scatter(x, "fsdp", tiled=True)  # [8, 4] -> [2, 4]
        return y, jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)

    text = compiled(function, {"fsdp": 4}, (8, 4), in_specs=P(), out_specs=(P("fsdp"), P("fsdp")))
    found = by_kind(exchanges(text, devices=4))
    assert found["reduce-scatter"] == Total(1, 8 * 4 * 4 * 3 / 4)
    assert found["all-to-all"] == Total(1, 8 * 4 * 4 * 3 / 4)


def test_a_loop_of_unknown_length_runs_as_often_as_told():
    def function(count, x):
        return jax.lax.fori_loop(0, count[0].astype(jnp.int32), lambda i, x: jax.lax.psum(x, "fsdp"), x)

    text = compiled(function, {"fsdp": 4}, (1,), (8,), in_specs=(P(), P()), out_specs=P())
    assert by_kind(exchanges(text, 4))["all-reduce"].count == 1
    assert by_kind(exchanges(text, 4, unknown_trips=7)) == {"all-reduce": Total(7, 7 * 2 * 8 * 4 * 3 / 4)}


def test_branches_run_as_often_as_told():
    """The sum of one branch, in a loop of five; the other branch has none."""

    def function(some, x):
        def body(x, chosen):
            return x + jax.lax.cond(chosen, lambda: jax.lax.psum(x, "fsdp"), lambda: jnp.zeros_like(x)), None

        return jax.lax.scan(body, x, some > 0)[0]

    text = compiled(function, {"fsdp": 4}, (5,), (8,), in_specs=(P(), P()), out_specs=P())
    assert by_kind(exchanges(text, 4))["all-reduce"].count == 5
    assert by_kind(exchanges(text, 4, branch_share=0.4)) == {"all-reduce": Total(2, 2 * 2 * 8 * 4 * 3 / 4)}


# As the TPU compiler writes them: loops by their conditions, asynchronous halves, pieces, tuples, layouts with
# commas, groups in two notations.
TPU = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%wrapped (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %rs = bf16[8,128]{1,0:T(8,128)(2,1)} reduce-scatter(%p), channel_id=9, replica_groups=[4,4]<=[16], to_apply=%add
}

%body (t: (s32[], bf16[64,1024])) -> (s32[], bf16[64,1024]) {
  %t = (s32[]{:T(128)}, bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %cp = (bf16[1,64,1024]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,64,1024]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%t), channel_id=3, source_target_pairs={{0,15},{1,0}}, metadata={op_name="while/body" calls="x"}
  %cpd = bf16[1,64,1024]{2,1,0:T(8,128)(2,1)S(1)} collective-permute-done(%cp)
  %rss = ((bf16[32,128]{1,0}), bf16[8,128]{1,0}, s32[]) async-start(%t), calls=%wrapped
  %rsd = bf16[8,128]{1,0:T(8,128)(2,1)} async-done(%rss), calls=%wrapped
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %copy.1 = s32[]{:T(128)} copy(%i)
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%copy.1, %step)
  ROOT %out = (s32[]{:T(128)}, bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, /*index=1*/%cpd)
}

%cond (t: (s32[], bf16[64,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  %t = (s32[]{:T(128)}, bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

%async_collective_fusion.1 (p: bf16[64,1024]) -> bf16[256,1024] {
  %p = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %piece = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, replica_groups=[4,4]<=[16], dimensions={0}
}

ENTRY %main (x: bf16[64,1024]) -> bf16[64,1024] {
  %x = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %ag = (bf16[64,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, dimensions={0}
  %agd = bf16[256,1024]{1,0:T(8,128)(2,1)} all-gather-done(%ag)
  %f1 = bf16[256,1024]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = bf16[256,1024]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %ar = (f32[16]{0:T(128)}, f32[4,4]{1,0:T(4,128)}) all-reduce(%x, %x), channel_id=2, replica_groups={}, to_apply=%add
  ROOT %w = (s32[]{:T(128)}, bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}) while(%x), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}, backend_config={"flag_configs":[]}
}
"""  # noqa: E501


def test_the_notation_of_tpu_programs():
    assert by_kind(exchanges(TPU, devices=16)) == {
        "all-gather": Total(2, 2 * 256 * 1024 * 2 * 3 / 4),
        "all-reduce": Total(1, 2 * 2 * 16 * 4 * 15 / 16),
        "collective-permute": Total(6, 6 * 64 * 1024 * 2),
        "reduce-scatter": Total(6, 6 * 8 * 128 * 2 * 3),
    }


@pytest.mark.parametrize(
    "dtype, size", [("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("s4", 0.5), ("c64", 8), ("u32", 4)]
)
def test_sizes_of_types(dtype, size):
    line = f"  ROOT %r = {dtype}[8]{{0}} collective-permute(%x), source_target_pairs={{{{0,1}}}}\n"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}}}\n"
    assert by_kind(exchanges(text, 2))["collective-permute"].bytes == 8 * size


def test_collectives_of_a_program():
    """By axis and size, in loops and outside."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def run(x, w):
        def layer(_, x):
            return x + jax.lax.psum(x, "tensor")

        x = jax.lax.fori_loop(0, 3, layer, x)
        return jax.lax.psum(jax.lax.all_gather(w, "fsdp", axis=0, tiled=True).sum() + x, ("data", "fsdp"))

    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P(("data", "fsdp")), P("fsdp")), out_specs=P(),
        check_vma=False,
    )  # fmt: skip
    x = jax.device_put(jnp.ones((8, 5)), batch_sharding(mesh))
    text = jax.jit(run).lower(x, jax.device_put(jnp.ones((4, 3)), replicated(mesh))).compile().as_text()
    found = {(e.kind, e.axes(mesh), e.count, e.bytes, e.in_loop) for e in exchanges(text or "", mesh.size)}
    assert found == {
        ("all-reduce", ("tensor",), 3, 2 * 2 * 5 * 4 / 2, True),
        ("all-gather", ("fsdp",), 1, 4 * 3 * 4 / 2, False),
        ("all-reduce", ("data", "fsdp"), 1, 2 * 2 * 5 * 4 * 3 / 4, False),
    }


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}", ("tensor",)),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",)),
    ],
)
def test_device_groups(groups, axes):
    kind = "collective-permute" if "pairs" in groups else "all-reduce"
    text = (
        f"ENTRY %main (p: f32[3]) -> f32[3] {{\n  %r = f32[3]{{0}} {kind}(%p), channel_id=1, {groups}, to_apply=%a\n}}"
    )
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    (found,) = exchanges(text, mesh.size)
    assert found.axes(mesh) == axes and found.shapes == ((3,),) and not found.in_loop
    members = 2 ** len(axes)
    assert found.bytes == (12 if kind == "collective-permute" else 2 * 12 * (members - 1) / members)


def test_groups_of_an_unknown_form_are_refused():
    text = "ENTRY %main (p: f32[3]) -> f32[3] {\n  %r = f32[3]{0} all-reduce(%p), replica_groups=new(2), to_apply=%a\n}"
    with pytest.raises(ValueError, match="another form"):
        exchanges(text, 8)
