"""Whole runs: the run folder, resuming bit for bit after kill -9, stopping on SIGTERM, refusing bad settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.lora_files import load_lora
from cocoedit_jax.models.quickstart import build_editor, save_base
from cocoedit_jax.models.weights import load_safetensors
from cocoedit_jax.reporting.telemetry import read_metrics
from cocoedit_jax.rewards import judge as judges
from cocoedit_jax.rewards.judge import JudgeScore
from cocoedit_jax.train.loop import train
from cocoedit_jax.train.setup import build
from cocoedit_jax.train.trainer import NonFiniteError
from tests.train.tiny import random_params, tiny_config, tiny_quickstart

pytestmark = pytest.mark.usefixtures("kept_programs")

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_leaves_everything(config, tmp_path):
    run = tmp_path / "run"
    result = train(build(config), run)
    assert set(result) == {"scenes", "step", "base", "trained", "difference"}
    assert json.loads((run / "evaluation.json").read_text()) == result
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == [1, 2]
    for key in ("reward/judge", "train/loss", "seconds/rollout", "seconds/train", "samples_per_second", "mfu/train"):
        assert key in metrics[-1], key
    lora_files = ("pytorch_lora_weights.safetensors", "peft/adapter_config.json", "peft/adapter_model.safetensors")
    for name in ("config.json", "report.html", "checkpoints/2", "samples/held_out_000002.png",
                 *(f"lora/step_000002/{name}" for name in ("README.md", *lora_files))):  # fmt: skip
        assert (run / name).exists(), name
    assert list((run / "tensorboard").iterdir())
    adapter, cfg = load_lora(run / "lora/step_000002")
    assert cfg.rank == 2 and all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapter))
    with pytest.raises(UserError, match="holds a run already"):
        train(build(config), run)


def command(base: Path, data: Path, run: Path, *extra: str) -> list[str]:
    config = tiny_config(base, data)
    flat = {
        "model.path": str(base), "data.path": str(data), "data.generate": 0, "data.resolution": 16,
        "train.steps": 4, "mesh.data": 1,
    }  # fmt: skip
    for section in ("rollout", "lora", "evaluation", "checkpoint"):
        flat |= {f"{section}.{k}": v for k, v in config[section].items()}
    flat["train.micro_batch"] = 8
    return [
        sys.executable, "-m", "launch.train", "--config=configs/quickstart.py", f"--run={run}",
        *(f"--config.{k}={v}" for k, v in flat.items()), *extra,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def final_state(run: Path, step: int) -> list[np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore((run / "checkpoints" / str(step) / "state").resolve()))


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
def test_resumed_after_kill_is_bit_identical(tiny_base, tiny_data, tmp_path):
    """Four steps straight equal two steps, kill -9 in the third, and the rest after --resume."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(tiny_base, tiny_data, straight), cwd=ROOT, env=environment(), check=True, timeout=400)

    process = subprocess.Popen(
        command(tiny_base, tiny_data, killed), cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(killed / "checkpoints" / "2", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "evaluation.json").exists()
    subprocess.run(
        command(tiny_base, tiny_data, killed, "--resume"), cwd=ROOT, env=environment(), check=True, timeout=400
    )

    for a, b in zip(final_state(straight, 4), final_state(killed, 4), strict=True):
        np.testing.assert_array_equal(a, b)
    # The order of a safetensors header is not defined, so contents are compared instead of bytes.
    files = [load_safetensors(run / "lora/step_000004/pytorch_lora_weights.safetensors") for run in (straight, killed)]
    assert files[0][1] == files[1][1] and files[0][0].keys() == files[1][0].keys()
    for name, tensor in files[0][0].items():
        np.testing.assert_array_equal(tensor, files[1][0][name])
    assert (straight / "evaluation.json").read_text() == (killed / "evaluation.json").read_text()
    timing = ("seconds", "mfu", "samples_per_second")
    for a, b in zip(read_metrics(straight), read_metrics(killed), strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(timing)} == {
            k: v for k, v in b.items() if not k.startswith(timing)
        }


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tiny_base, tiny_data, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command(tiny_base, tiny_data, run), "--config.train.steps=100000", "--config.checkpoint.every=100000"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(run / "samples" / "rollout_000001.png", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "--resume" in output
    step = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert step >= 1 and (run / "lora" / f"step_{step:06d}").is_dir()
    assert len(read_metrics(run)) == step


def test_another_configuration_cannot_resume(tiny_base, tiny_data, tmp_path, monkeypatch):
    register(monkeypatch, "silent", lambda r: JudgeScore(None, "no answer"))
    of_run = {"judge.name": "silent"}  # a run that ends with the checkpoint of step 0
    config, run = tiny_config(tiny_base, tiny_data, **of_run), tmp_path / "run"
    with pytest.raises(UserError, match="step 0 is saved"):
        train(build(config), run)
    other = tiny_config(tiny_base, tiny_data, **of_run, **{"train.learning_rate": 1.0, "train.steps": 3})
    with pytest.raises(UserError, match="train.learning_rate: 0.*then, 1.0 now"):
        train(build(other), run, resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        train(build(config), tmp_path / "empty", resume=True)
    fewer = tiny_config(tiny_base, tiny_data, **of_run, **{"data.held_out": 0.5, "train.steps": 3})
    (run / "config.json").write_text(fewer.to_json())  # as if the data had changed under the same settings
    with pytest.raises(UserError, match="records of .* not those that .* was trained on"):
        train(build(fewer), run, resume=True)


def test_the_base_may_move_but_not_change(tiny_base, tiny_data, tmp_path, monkeypatch):
    register(monkeypatch, "silent", lambda r: JudgeScore(None, "no answer"))
    of_run = {"judge.name": "silent"}  # a run that ends with the checkpoint of step 0
    with pytest.raises(UserError, match="step 0 is saved"):
        train(build(tiny_config(tiny_base, tiny_data, **of_run)), tmp_path / "run")
    moved, other = shutil.copytree(tiny_base, tmp_path / "moved"), tmp_path / "other"
    with pytest.raises(UserError, match="step 0 is saved"):  # as before
        train(build(tiny_config(moved, tiny_data, **of_run)), tmp_path / "run", resume=True)
    editor = build_editor(tiny_quickstart())
    save_base(other, tiny_quickstart(), random_params(editor, seed=5), {})
    with pytest.raises(UserError, match=f"base weights of {other} are not those .*point config.model.path at the same"):
        train(build(tiny_config(other, tiny_data, **of_run)), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout.batch_size", 7, "rollout.batch_size=7.*divisor"),
        ("rollout.group_size", 1, "group_size=1.*at least 2"),
        ("seed", -1, "seed=-1.*at least 0"),
        ("train.learning_rate", 0.0, "learning_rate=0.0.*above 0"),
        ("train.learning_rate", float("nan"), "learning_rate=nan"),
        ("train.max_grad_norm", 0.0, "max_grad_norm=0.0"),
        ("lora.alpha", -3, "lora.alpha=-3"),
        ("max_unscored", -1.0, "max_unscored=-1.0"),
        ("data.held_out", 0.0, "held_out=0.0"),
        ("algorithm.tau_by_edit_type", {"recolour": (0.1, 0.2)}, "recolour.*is the type of no record"),
        ("data.path", "no/such/folder", "no/such/folder"),
        ("train.micro_batch", 3, "train.micro_batch=3.*multiple of the 2 shares"),
        ("rollout.groups", 1000, "records to train on"),
        ("model.kind", "sdxl", "model.kind='sdxl'.*'quickstart'"),
        ("model.remat", "some", "model.remat='some'.*'full'"),
        ("model.attention", "flash", "model.attention='flash'.*'ulysses'"),
        ("model.attention", "ring", "model.attention='ring'.*config.mesh.context above 1"),
        ("model.attention", "splash", "model.attention='splash'.*another one on a cpu"),
        ("rollout.solver", "ddpm", "rollout.solver='ddpm'.*'dpm2'"),
        ("algorithm.reward_weights.lpips", 0.1, "'lpips' is no reward"),
        ("model.path", "nowhere", "nowhere.*no config.json"),
        ("judge.name", "gpt", "gpt"),
        ("algorithm.lambda_ner", -1.0, "lambda_ner is -1.0"),
        ("mesh.data", 9, "mesh"),
        ("mesh.layout", "zero", "config.mesh.layout='zero'.*'fsdp_tensor'"),
        ("rollout.layout", "fsdp:fsdp=16", "config.rollout.layout='fsdp:fsdp=16'.*8 device"),
        ("train.layout", "fsdp", "config.rollout.layout='' takes 2 device.*config.train.layout='fsdp' 8"),
        ("train.adapters", "split", "train.adapters='split'.*'sharded'"),
        ("mesh.tensor", 4, "config.mesh: 4 devices on the tensor axis.*2 attention heads"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(tiny_base, tiny_data, key, value, message):
    overrides = {"mesh.data": 2, "rollout.group_size": 2} if key == "rollout.groups" else {"mesh.data": 2}
    with pytest.raises(UserError, match=message):
        build(tiny_config(tiny_base, tiny_data, **{**overrides, key: value}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=configs/quickstart.py", "--config.train.learning_rat=1"], "no key 'learning_rat'; Did you"),
        (["--config=configs/quickstart.py:cocoedit2"], "preset is 'cocoedit2'"),
        (["--config=configs/nowhere.py"], "nowhere.py"),
        (["--config=configs/quickstart.py", "--resume", "--run=no/such/run"], "nothing to resume"),
        (["--config=configs/quickstart.py", "--unknown=1"], "unknown"),
        (["--config=configs/quickstart.py", "stray"], "stray"),
    ],
    ids=["key", "preset", "file", "run", "flag", "argument"],
)
def test_a_wrong_command_line_gets_one_error(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments], cwd=ROOT, capture_output=True, text=True,
        env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: " in done.stderr and said in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "no").exists()


def register(monkeypatch, name: str, answer) -> None:
    monkeypatch.setitem(judges.JUDGES, name, lambda: lambda requests: [answer(r) for r in requests])


def test_a_judge_that_fails_stops_the_run_and_keeps_the_checkpoint(tiny_base, tiny_data, tmp_path, monkeypatch):
    register(monkeypatch, "broken", lambda r: JudgeScore(None, "no answer"))
    config = tiny_config(tiny_base, tiny_data, **{"judge.name": "broken"})
    with pytest.raises(UserError, match="evaluate base: 100% of the samples have no reward.*broken"):
        train(build(config), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()


def test_not_finite_stops_and_names_the_tensor(config, tmp_path, monkeypatch):
    from cocoedit_jax.train import trainer

    original = trainer.pack_step

    def poisoned(*args, **kwargs):
        host, num_micro, count = original(*args, **kwargs)
        host.x0[...] = np.nan
        return host, num_micro, count

    monkeypatch.setattr(trainer, "pack_step", poisoned)
    with pytest.raises(NonFiniteError, match="step 1: not finite: train/.*gradient of transformer_blocks/attn"):
        train(build(config), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["0"]


def test_a_reward_that_is_no_number_stops_the_run(config, tmp_path, monkeypatch):
    from cocoedit_jax.rewards import registry

    broken = lambda batch, cfg, judge: (np.full(len(batch.records), np.nan), np.ones(len(batch.records), bool))  # noqa: E731
    monkeypatch.setitem(registry.REWARDS, "broken", broken)
    config.algorithm.reward_weights.broken = 0.5
    with pytest.raises(NonFiniteError, match="step 1: not finite: reward broken"):
        train(build(config), tmp_path / "run")


@pytest.mark.slow
def test_bans_hold_survive_a_resume_and_the_old_policy_samples(tiny_base, tiny_data, tmp_path, monkeypatch):
    """A judge that gives every edit of some records full marks solves them: they are never drawn again."""
    from cocoedit_jax.train import trainer

    def solved(record_id: str) -> bool:
        return int(record_id[-1]) % 2 == 0

    register(
        monkeypatch, "fond",
        lambda r: JudgeScore(1.0 if solved(r.record_id) else float(1000 * r.edited.mean() % 1)),
    )  # fmt: skip
    drawn, sampled_by = [], []
    collect = trainer.collect

    def spy(sampler, params, adapter, conditioning, plan, batch, *rest):
        drawn.append(list(batch["id"]))
        sampled_by.append(jax.device_get(adapter))
        return collect(sampler, params, adapter, conditioning, plan, batch, *rest)

    monkeypatch.setattr(trainer, "collect", spy)
    settings = {
        "judge.name": "fond", "algorithm.ban": True, "rollout.groups": 6, "algorithm.ema_decay": 0.0,
        "algorithm.pixel_psnr_max_db": 1.0, "algorithm.pixel_ssim_weight": 0.0,
    }  # fmt: skip
    run = tmp_path / "run"
    train(build(tiny_config(tiny_base, tiny_data, **settings, **{"train.steps": 3})), run)
    train(build(tiny_config(tiny_base, tiny_data, **settings, **{"train.steps": 5})), run, resume=True)
    assert len(drawn) == 5
    banned: set[str] = set()
    for ids in drawn:
        assert not banned & set(ids)
        banned |= {i for i in ids if solved(i)}
    assert read_metrics(run)[-1]["groups/banned"] == len(banned) > 0
    # The first rollout's adapter changes nothing yet; the last one's is the old policy of step 4, not the trained one.
    assert all(np.abs(x).max() == 0 for path, x in leaves(sampled_by[0]) if path.endswith("lora_B"))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((run / "checkpoints" / "4" / "state").resolve())
    trees = (leaves(tree) for tree in (sampled_by[4], state["old"], state["theta"]))
    for (path, used), (_, old), (_, theta) in zip(*trees, strict=True):
        if path.endswith("lora_B"):
            np.testing.assert_allclose(used, 2 * old, rtol=1e-6)  # alpha / rank
            assert np.abs(old - theta).max() > 0


def leaves(tree) -> list[tuple[str, np.ndarray]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    named = (("/".join(str(k.key) for k in path), np.asarray(x)) for path, x in flat)
    return sorted(named, key=lambda pair: pair[0])
