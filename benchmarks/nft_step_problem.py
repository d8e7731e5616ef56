"""What both sides of ``nft_step`` compute: sizes, random weights, inputs; and how a worker talks to its parent."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

LEARNING_RATE, WEIGHT_DECAY, MAX_GRADIENT_NORM = 3e-4, 1e-4, 1.0
LORA_RANK, LORA_ALPHA = 32, 64
PATCH = 2
# Times 1000 these are exact in bfloat16, to which diffusers rounds them in a bfloat16 run and we do not.
GUIDANCE, TIMES = 2.0, (0.5, 0.25, 0.125)
WEIGHTS_FILE, INPUTS_FILE = "transformer.safetensors", "inputs.safetensors"
ADAPTERS = ("theta", "old")


@dataclasses.dataclass(frozen=True)
class Size:
    """Model shape (fields of diffusers' ``config.json``) and batch: ``side`` x ``side`` target and source tokens."""

    model: dict[str, Any]
    side: int
    text: int
    batch: int


def _model(doubles: int, singles: int, heads: int, axes: tuple[int, int, int], text: int) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": doubles,
        "num_single_layers": singles,
        "attention_head_dim": sum(axes),
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "pooled_projection_dim": 256,
        "guidance_embeds": True,
        "axes_dims_rope": axes,
    }


SIZES = {
    "tiny": Size(_model(1, 2, 2, (4, 6, 6), 32), side=4, text=8, batch=2),
    "mid": Size(_model(3, 6, 8, (8, 28, 28), 512), side=16, text=64, batch=3),
    "large": Size(_model(8, 16, 16, (16, 56, 56), 1024), side=32, text=128, batch=3),
}


def serve(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers JSON lines from stdin until it closes. Prints of libraries go to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(commands[request.pop("do")](**request)) + "\n")
        answers.flush()
