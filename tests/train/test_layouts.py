"""Every layout computes what one device does, holds what it promises, and reduces gradients once."""

import math
import re

import jax
import numpy as np
import pytest

from cocoedit_jax.sharding.collectives import exchanges
from cocoedit_jax.sharding.mesh import CONTEXT, DATA, FSDP, SAMPLE_AXES, TENSOR
from cocoedit_jax.sharding.rules import RULES
from tests.train.layout_cases import Case, rollout, step

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
ALL_AXES = "fsdp_context:context=2,tensor=2"
LAYOUTS = ("replicated", "fsdp", "data_fsdp", "tensor", "fsdp_tensor", "fsdp_context", ALL_AXES)
# test_step has FLUX over data and fsdp.
FAST = {("qwen", "fsdp")}
CASES = [
    pytest.param(model, layout, id=f"{model}-{layout}", marks=() if (model, layout) in FAST else pytest.mark.slow)
    for model in ("flux", "qwen")
    for layout in LAYOUTS
]


def assert_close(ours, reference, name=""):
    """To 1e-5 of the largest number in each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-6), err_msg=name)


def same_step(case: Case, reference: Case) -> None:
    (new, metrics, finite), (expected, expected_metrics, _) = case.results, reference.results
    assert all(jax.tree.leaves(finite))
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    # Adam's first moment after one step is the gradient; the weights it has scaled.
    assert_close(new.opt_state[1][0].mu, expected.opt_state[1][0].mu, "gradient")


def in_bytes(tree, placed: bool) -> int:
    shape = lambda x: x.sharding.shard_shape(x.shape) if placed else x.shape  # noqa: E731
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.dtype == np.float32)


def same_rollout(case: Case, reference: Case) -> None:
    (x0, images), (expected_x0, expected_images) = case.results, reference.results
    assert_close(x0, expected_x0, "latents")
    assert_close(images, expected_images, "images")
    assert np.ptp(expected_images) > 0.5


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_layout_computes_what_one_device_does(model, layout):
    same_step(step(model, layout), step(model, "one"))
    same_rollout(rollout(model, layout), rollout(model, "one"))


def largest(case: Case) -> int:
    """Numbers in the largest float array of a program on one device, but for its arguments."""
    lines = [line for line in (case.program.as_text() or "").splitlines() if " parameter(" not in line]
    shapes = {dims for line in lines for dims in re.findall(r"\bf32\[([\d,]+)\]", line.partition(" = ")[2])}
    return max(math.prod(int(d) for d in dims.split(",")) for dims in shapes)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_layout_holds_what_it_promises(model, layout):
    case = step(model, layout)
    state, params, batch, _ = case.inputs
    share = case.mesh.shape[FSDP] * case.mesh.shape[TENSOR]
    kernels = [
        (path, x)
        for path, x in jax.tree_util.tree_leaves_with_path(params["transformer"])
        if path[0].key in BLOCKS and path[-1].key == "kernel" and "norm" not in str(path)
    ]
    for path, kernel in kernels:
        assert math.prod(kernel.sharding.shard_shape(kernel.shape)) * share == kernel.size, path
    samples = math.prod(case.mesh.shape[axis] for axis in SAMPLE_AXES)
    assert in_bytes(batch, placed=True) * samples == in_bytes(batch, placed=False)
    memory = case.program.memory_analysis()
    assert memory is not None
    arguments = in_bytes((state, params["transformer"], batch), placed=True)
    assert arguments <= memory.argument_size_in_bytes <= 1.05 * arguments + 4096
    # No array is larger than a share of samples and tokens needs, than the largest weight of one layer, or than what
    # the device holds of a stack, which goes through the loops.
    shares = samples * case.mesh.shape[CONTEXT]
    weights = jax.tree_util.tree_leaves_with_path(params["transformer"])
    layer = max(x.size // (x.shape[0] if path[0].key in BLOCKS else 1) for path, x in weights)
    held = max(math.prod(x.sharding.shard_shape(x.shape)) for _, x in weights)
    adapter = max(x.size for x in jax.tree.leaves(state.theta))
    assert largest(case) <= max(largest(step(model, "one")) // shares, layer, held, adapter)
    # Nowhere in the programs is a stack of weights whole, unless every device holds it.
    for text in (case.program.as_text() or "", rollout(model, layout).program.as_text() or ""):
        for path, kernel in kernels:
            shape = ",".join(map(str, kernel.shape))
            assert (f"f32[{shape}]" in text) == (share == 1), path


def found(case: Case):
    """The exchanges of a program, each with its axes."""
    return [(e, e.axes(case.mesh)) for e in exchanges(case.program.as_text() or "", case.mesh.size)]


def reductions(case: Case):
    """Those over samples or tokens."""
    kinds = ("all-reduce", "reduce-scatter")
    return [e for e, axes in found(case) if e.kind in kinds and set(axes) & {*SAMPLE_AXES, CONTEXT}]


def check_one_reduction(case: Case) -> None:
    """Nothing is summed over the axes of samples and tokens in a loop; outside, every gradient once, and some
    scalars."""
    once = reductions(case)
    assert not [e for e in once if e.in_loop]
    gradients = sum(x.size for x in jax.tree.leaves(case.inputs[0].theta))
    summed = sum(math.prod(shape) for e in once for shape in e.shapes)
    # A tensor axis leaves each device a share of some.
    assert gradients / case.mesh.shape[TENSOR] <= summed < gradients + 200
    for e, axes in found(case):
        if e.in_loop and set(axes) & set(SAMPLE_AXES):  # fetching weights
            assert e.kind == "all-gather" and axes == (FSDP,), e


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_gradients_are_reduced_once(model, layout):
    case = step(model, layout)
    check_one_reduction(case)
    fetched = [e for e, axes in found(case) if e.kind == "all-gather" and e.in_loop and FSDP in axes]
    assert bool(fetched) == (case.mesh.shape[FSDP] > 1)
    # In sampling, nothing else crosses the axes of samples.
    for e, axes in found(rollout(model, layout)):
        assert not set(axes) & set(SAMPLE_AXES) or (e.kind, axes) == ("all-gather", (FSDP,)), e


@pytest.mark.slow
def test_sharded_adapters_give_the_same_step():
    case, reference = step("qwen", "fsdp", sharded=True), step("qwen", "one")
    same_step(case, reference)
    state, whole = case.inputs[0], step("qwen", "fsdp").inputs[0]
    assert in_bytes(state, placed=True) < 0.2 * in_bytes(whole, placed=True)
    assert in_bytes(state, placed=False) == in_bytes(whole, placed=False)
    assert not [e for e in reductions(case) if e.in_loop]


@pytest.mark.slow
def test_sequences_that_are_whole_on_every_device_give_the_same_step():
    """A backend of one device on a context axis, which is automatic then."""
    same_step(step("qwen", "fsdp_context", attention="blocked"), step("qwen", "one"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux", "qwen"])
@pytest.mark.parametrize(("attention", "kind"), [("ulysses", "all-to-all"), ("ring", "collective-permute")])
def test_both_ways_to_split_tokens_give_the_same_step_and_samples(model, attention, kind):
    case = step(model, "fsdp_context:context=4", attention=attention)
    same_step(case, step(model, "one"))
    check_one_reduction(case)
    sampled = rollout(model, "fsdp_context:context=4", attention)
    same_rollout(sampled, rollout(model, "one"))
    for program in (case, sampled):
        kinds = {e.kind for e, axes in found(program) if axes == (CONTEXT,)}
        assert kinds & {"all-to-all", "collective-permute"} == {kind}


def test_every_axis_of_the_rules_is_covered():
    """A new axis that splits weights needs a layout above."""
    assert set(RULES.values()) <= {None, FSDP, TENSOR} and set(SAMPLE_AXES) == {DATA, FSDP}
