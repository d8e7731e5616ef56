"""Runs of whole models in diffusers' layout, tiny and random: what their tests share."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cocoedit_jax.models.lora_files import load_lora, save_lora
from cocoedit_jax.rewards.judge import JudgeScore

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32  # pixels


def shrunk(config: ConfigDict, model: Path, data: Path, **overrides) -> ConfigDict:
    """A published model's configuration for one step of a tiny one; overrides use dotted keys."""
    small = {
        "model.path": str(model), "model.dtype": "float32", "data.path": str(data),
        "data.resolution": SIZE, "data.held_out": 0.3, "rollout.groups": 2, "rollout.group_size": 4,
        "rollout.batch_size": 8, "rollout.steps": 3, "train.steps": 1, "train.micro_batch": 4, "lora.rank": 2,
        "lora.alpha": 4, "mesh.data": 2, "mesh.fsdp": 2, "judge.name": "tests.train.whole:red_judge",
        "evaluation.scenes": 4, "evaluation.batch_size": 4, "evaluation.steps": 2, "checkpoint.every": 1,
        "algorithm.timestep_fraction": 0.7, "algorithm.ban": False,
    }  # fmt: skip
    config.update_from_flattened_dict(small | overrides)
    return config


def red_judge():
    """A judge that likes red pictures."""
    return lambda requests: [JudgeScore(float(r.edited[..., 0].mean())) for r in requests]


def strengthened(folder: Path, out: Path) -> Path:
    """The LoRA with larger B: two steps from zero change no pixel of an 8-bit picture."""
    adapter, cfg = load_lora(folder)
    grow = lambda path, x: x * (300 if path[-1].key == "lora_B" else 1)  # noqa: E731
    save_lora(out, jax.tree_util.tree_map_with_path(grow, adapter), cfg)
    return out


def launch_edit(model: Path, picture: Path, out: Path, *more: str) -> np.ndarray:
    """The edit that the command makes of ``picture``, 3 steps from seed 5, as integers."""
    arguments = [
        sys.executable, "-m", "launch.edit", f"--model={model}", f"--image={picture}", "--prompt=make it red",
        f"--out={out}", f"--size={SIZE}x{SIZE}", "--source_size=target", "--steps=3", "--dtype=float32", "--seed=5",
        *more,
    ]  # fmt: skip
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, timeout=300)
    with Image.open(out) as file:
        return np.asarray(file, np.int32)


def edit_noise() -> np.ndarray:
    """The packed noise of ``launch_edit``."""
    return np.array(jax.random.normal(jax.random.key(5), ((SIZE // 16) ** 2, 64)))[None]
