"""Training with a quantised base: layouts, gradients of the adapter, abstract shapes, whole runs."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora_files, quantize
from cocoedit_jax.models.quantize import phase_formats
from cocoedit_jax.planning import rows, tables
from cocoedit_jax.planning.compiler import phase_key
from cocoedit_jax.planning.predict import by_formula
from cocoedit_jax.planning.topology import parse_topology
from cocoedit_jax.planning.workload import Workload, choose_candidates
from cocoedit_jax.sharding.chips import CHIPS
from cocoedit_jax.sharding.layouts import layout_mesh
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.train import evaluate
from cocoedit_jax.train.config_checks import check_config
from cocoedit_jax.train.editors import EDITORS
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.plan import StepShape, lower_rollout, lower_step
from cocoedit_jax.train.run_folder import check_claim, claim
from cocoedit_jax.train.setup import build
from configs import flux_kontext
from tests.train.layout_cases import CFG, LORA, SIZE, TEXT, editor, rollout, step


def relative(ours, reference):
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, reference)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def moment(case):
    """Adam's first moment after one step: the gradient of the adapter."""
    return case.results[0].opt_state[1][0].mu


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, layout, name",
    [("flux", "fsdp_context:context=2,tensor=2", "int8"), ("qwen", "fsdp", "fp8")],
)
def test_layouts_compute_what_one_device_does(model, layout, name):
    """Kernels and activations are rounded alike however they are split; the programs hold and fetch 8-bit numbers."""
    ours, reference = step(model, layout, quantize=name), step(model, "one", quantize=name)
    assert all(jax.tree.leaves(ours.results[2]))
    # A sum in another order may round some activations to the neighbouring number: that is no more than a part of what
    # rounding does anyway.
    rounding = relative(moment(reference), moment(step(model, "one")))
    assert relative(moment(ours), moment(reference)) < 0.2 * rounding < 0.1
    sampled = [rollout(model, where, quantize=name).results[0] for where in (layout, "one")]
    assert relative(*sampled) < 0.2 * relative(sampled[1], rollout(model, "one").results[0]) < 0.05
    if name == "int8":  # fp8 is widened by the compiler for CPUs
        lines = (ours.program.as_text() or "").splitlines()
        assert any(re.search(r"= \(?.*s8\[[\d,]+\].* all-gather(-start)?\(", line) for line in lines)
    kernels = jax.tree.leaves(ours.inputs[1]["transformer"], is_leaf=quantize.is_kernel)
    assert sum(quantize.is_kernel(x) for x in kernels) == (17 if model == "flux" else 12)


@pytest.mark.slow
@pytest.mark.parametrize("name, bound", [("int8", 0.05), ("int8_weights", 0.05), ("fp8", 0.2)])
def test_gradient_of_the_adapter_is_close_to_that_of_the_base_in_full(name, bound):
    """A random network of width 32 without any training; the larger ones of ``RESULTS.md`` are far closer."""
    assert 1e-4 < relative(moment(step("flux", "one", quantize=name)), moment(step("flux", "one"))) < bound


# --- configuration ---------------------------------------------------------------------------------------------------


def test_phases_have_their_own_formats(config):
    def formats(model="", rollout="", train=""):
        config.model.quantize, config.rollout.quantize, config.train.quantize = model, rollout, train
        return phase_formats(config)

    assert formats() == ("", "")
    assert formats("int8") == ("int8", "int8")
    assert formats("", "int8") == ("int8", "")
    assert formats("int8", "", "int8_weights") == ("int8", "int8_weights")
    with pytest.raises(UserError, match=r"rollout\.quantize='int8', config\.train\.quantize='fp8'; expected"):
        formats("", "int8", "fp8")
    with pytest.raises(UserError, match=r"config\.train\.quantize='int3'"):
        formats("", "", "int3")


def test_configuration_is_refused_with_all_else_that_is_wrong(config):
    config.model.quantize = "int7"
    config.train.steps = 0
    mesh = make_mesh({"data": 1})
    with pytest.raises(UserError, match=r"(?s)config\.train\.steps=0.*config\.model\.quantize='int7'"):
        check_config(config, mesh, mesh, tuple(EDITORS))


def test_a_run_goes_on_in_its_own_format(config, tmp_path):
    claim(tmp_path, config, resume=False)
    old = json.loads((tmp_path / "config.json").read_text())
    for section in ("model", "rollout", "train"):
        old[section].pop("quantize")
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_claim(tmp_path, config, resume=True)
    config.rollout.quantize = "int8"
    with pytest.raises(UserError, match=r"rollout\.quantize: '' then, 'int8' now"):
        check_claim(tmp_path, config, resume=True)


def kernel_of(params):
    return params["transformer"]["single_transformer_blocks"]["proj_mlp"]["kernel"]


def test_bases_of_the_phases(config):
    """One in memory where both store the same numbers; two where one phase is of full precision."""
    config.model.quantize, config.train.quantize = "int8", "int8_weights"
    setup = build(config)
    assert setup.base is setup.rollout_base and kernel_of(setup.params).format == "int8_weights"
    sampled = setup.rollout_base.on(setup.rollout_mesh, setup.rollout_editor.quantize)
    assert kernel_of(sampled).format == "int8" and kernel_of(sampled).values is kernel_of(setup.params).values
    for phases in (("int8", ""), ("", "int8")):
        config.model.quantize, (config.rollout.quantize, config.train.quantize) = "", phases
        two = build(config)
        stored = [quantize.is_kernel(kernel_of(base.params)) for base in (two.rollout_base, two.base)]
        assert stored == [bool(name) for name in phases]
        assert (two.rollout_editor.quantize, two.editor.quantize) == phases
        assert two.base.params.keys() == two.rollout_base.params.keys() == setup.params.keys()
        one = (two.rollout_base if phases[0] else two.base).params
        for ours, expected in zip(jax.tree.leaves(one), jax.tree.leaves(setup.params), strict=True):
            np.testing.assert_array_equal(ours, expected)
        ends = [base.params["transformer"]["proj_out"]["kernel"] for base in (two.base, two.rollout_base)]
        assert ends[0] is not ends[1]  # a move of one base must not take it from the other


def test_evaluations_use_the_base_of_the_optimizer_step(config, monkeypatch):
    """As edited by whoever takes the trained adapter, whatever format the rollout samples in."""
    used = []

    def make_sampler(editor, grid, sigmas, solver, mesh):
        def sample(params, adapter, conditioning, keys):
            kernel = kernel_of(params)
            used.append((editor.quantize, kernel.format if quantize.is_kernel(kernel) else ""))
            return None, jnp.zeros((len(keys), config.data.resolution, config.data.resolution, 3))

        return sample

    monkeypatch.setattr(evaluate, "make_sampler", make_sampler)
    config.mesh.data = 1
    for phases in (("int8", ""), ("", "int8"), ("int8", "int8_weights")):
        config.rollout.quantize, config.train.quantize = phases
        evaluate.Evaluator(build(config))(None, 1)
        assert used.pop() == (phases[1], phases[1]) and not used


@pytest.mark.slow
@pytest.mark.parametrize("phases", [("int8", "int8"), ("int8", ""), ("fp8", "fp8"), ("int8", "int8_weights")])
def test_whole_runs(config, tmp_path, phases):
    config.rollout.quantize, config.train.quantize = phases
    config.rollout.layout = "fsdp:fsdp=2" if phases[1] else ""
    config.mesh.data = 2 if phases[1] else 1
    setup = build(config)
    train(setup, tmp_path)
    folder = tmp_path / "lora" / f"step_{config.train.steps:06d}"
    adapter, _ = lora_files.load_lora(folder, transformer_params=setup.params["transformer"])
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(adapter))


# --- planning --------------------------------------------------------------------------------------------------------


def test_arguments_of_a_planned_program_shrink():
    """The kernels of the blocks take half of bfloat16, a share on each device; the rest is as it was."""
    workload, topology = Workload.of(flux_kontext.get_config()), parse_topology("h100:8")
    (plain,) = choose_candidates(workload, 8, layouts=["fsdp"], per_shard=[1])
    small = dataclasses.replace(plain, quantize=("int8", "int8"))
    used = [by_formula(workload, c, topology, "rollout")["memory"]["arguments"] for c in (plain, small)]
    # Large layers of width 3072: 12 d^2 of each of two streams, or of one.
    assert used[0] - used[1] == pytest.approx((24 * 19 + 12 * 38) * 3072**2 / 8, rel=0.01)


def test_8_bit_products_are_predicted_at_the_peak_of_their_format():
    """Forward passes through linear layers, and nothing else; 288 samples of 2176 tokens, 57 blocks."""
    workload = Workload.of(flux_kontext.get_config())
    linear, attention = (288 * 57 * n for n in (24 * 3072**2 * 2176, 4 * 2176**2 * 3072))

    def compute(cluster, form):
        topology = parse_topology(cluster)
        (candidate,) = choose_candidates(workload, 8, layouts=["fsdp"], per_shard=[1], quantize=[form])
        (row,) = rows.planned_rows(workload, [candidate], topology, None)  # pyright: ignore
        return [row["phases"][phase]["roofline"]["compute"] for phase in ("rollout", "train")], tables.text_table([row])

    def seconds(eight_bit, bf16):
        # Of the ten steps nine are trained: trained, old and reference policy and a recomputed forward pass, and a
        # backward pass without gradients of weights, whose attention costs twice a forward pass's.
        rollout = 10 * (linear / eight_bit + attention / bf16)
        return [x / 8 for x in (rollout, 9 * (4 * linear / eight_bit + linear / bf16 + 6 * attention / bf16))]

    for form in ("int8", "fp8"):
        found, table = compute("h100:8", form)
        assert found == pytest.approx(seconds(1979e12, 989e12)) and f"(h100 {form}: 1,979 T/s)" in table
    for cluster, form, peak in (
        ("h100:8", "none", 989e12),
        ("h100:8", "int8_weights", 989e12),
        ("a100:8", "fp8", 312e12),
    ):
        found, table = compute(cluster, form)
        assert found == pytest.approx(seconds(peak, peak)) and "1,979" not in table
    assert [CHIPS[name].int8 / CHIPS[name].flops for name in ("v5e", "v5p", "v6e")] == pytest.approx([2, 2, 2], 0.01)


def test_programs_are_kept_by_format(config):
    workload = Workload.of(config)
    (plain,) = choose_candidates(workload, 8, layouts=["fsdp"], per_shard=[1])
    keys = []
    for phase, *formats in (("train", "", ""), ("train", "fp8", ""), ("train", "", "int8"), ("rollout", "fp8", "")):
        candidate = dataclasses.replace(plain, quantize=tuple(formats))
        keys.append(phase_key(workload, candidate, "v5e:4x4", phase)["candidate"].get("quantize"))
    assert keys == [None, None, "int8", "fp8"]


def test_lowered_programs_take_8_bit_arguments():
    model = editor("qwen", "int8")
    side, mesh = SIZE * model.autoencoder.factor, layout_mesh("fsdp")
    shape = StepShape(side, side, TEXT, True, 16, 8, False, 2, 8)
    leaves = jax.tree.leaves(model.abstract()["transformer"], is_leaf=quantize.is_kernel)
    stored = sum(x.values.value.size for x in leaves if quantize.is_kernel(x))
    for lowered in (lower_step(model, CFG, LORA, shape, mesh), lower_rollout(model, LORA, shape, mesh)):
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(lowered.args_info) if x.dtype == np.int8) == stored > 0
        assert re.search(r"dot_general .*xi8>, tensor<\d+x\d+xi8>\) -> tensor<[\dx]+xi32>", lowered.as_text())


def test_planner_compares_formats_and_counts_a_second_base(config):
    workload, topology = Workload.of(config), parse_topology("h100:8")
    candidates = choose_candidates(workload, 8, layouts=["replicated"], per_shard=[1], quantize=["none", "int8"])
    assert [c.quantize for c in candidates] == [("", ""), ("int8", "int8")]
    with pytest.raises(UserError, match="--quantize=int2"):
        choose_candidates(workload, 8, layouts=["replicated"], quantize=["int2"])
    mixed = dataclasses.replace(candidates[0], quantize=("int8", ""))
    plain, small, both = rows.planned_rows(workload, [*candidates, mixed], topology, None)  # pyright: ignore
    need = lambda row: row["phases"]["train"]["need"]  # noqa: E731
    model = workload.editor("none", "xla", "int8")
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nn.unbox(model.abstract()["transformer"])))
    assert need(small) < need(plain) and need(both) - need(plain) == size
    assert "--config.model.quantize=int8" in rows.training_command(small, workload, "configs/quickstart.py")
    assert "quantize" not in rows.training_command(plain, workload, "configs/quickstart.py")
    assert "int8/full" in tables.text_table([plain, both])
