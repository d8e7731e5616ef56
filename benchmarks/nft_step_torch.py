"""The PyTorch side of ``nft_step``: diffusers' FLUX transformer, two PEFT adapters, gradient checkpointing.

It takes the step as the released code does (three forwards one after another, adapters switched in between); the code
is ours.
"""

import contextlib
import copy
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from benchmarks import nft_step_problem as problem
from cocoedit_jax.flow.packing import position_ids
from cocoedit_jax.models.lora_files import DIFFUSERS_FILE
from cocoedit_jax.nft.presets import preset

Tensor = torch.Tensor
NAMES = {"theta": "default", "old": "old"}  # the released code's adapter names


def unpack(tokens: Tensor, cells: int) -> Tensor:
    """``[B, n, C p p] -> [B, C, cells, cells]``."""
    p, side = problem.PATCH, cells // problem.PATCH
    grid = tokens.reshape(tokens.shape[0], side, side, -1, p, p).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(tokens.shape[0], -1, cells, cells)


def erode(mask: Tensor, radius: int) -> Tensor:
    return -F.max_pool2d(-mask[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]


def nft_loss(
    x: dict[str, Tensor], x_t: Tensor, v_old: Tensor, v_theta: Tensor, v_ref: Tensor, kl_weight: float
) -> Tensor:
    """The objective of preset "cocoedit", per sample."""
    cfg = preset("cocoedit")
    t, r, x0 = x["t"][:, None, None], x["r"], x["x0"]
    difference = cfg.beta * (v_theta - v_old)
    positive, negative = x_t - t * (v_old + difference), x_t - t * (v_old - difference)

    def policy_error(prediction: Tensor) -> Tensor:
        scale = (prediction - x0).abs().mean(dim=(1, 2)).clamp(min=1e-5).detach()
        return (prediction - x0).square().mean(dim=(1, 2)) / scale

    policy = (r * policy_error(positive) + (1 - r) * policy_error(negative)) * cfg.adv_clip / cfg.beta

    keep = x["preserve_latent"]
    kept, edited = erode(keep, cfg.erode_preserve), erode(1 - keep, cfg.erode_edit)
    ring = cfg.ring_weight * (1 - (kept + edited).clamp(0, 1))

    def distance(prediction: Tensor, weight: Tensor) -> Tensor:
        squares = (unpack(prediction, keep.shape[1]) - unpack(x["source"], keep.shape[1])).square()
        total = squares.shape[1] * weight.sum(dim=(1, 2))
        return (squares.sum(dim=1) * weight).sum(dim=(1, 2)) / total.clamp(min=1e-6)

    ner = cfg.lambda_ner * r * F.relu(distance(positive, (kept + ring).clamp(0, 1)) - x["tau_pos"])
    er = cfg.lambda_er * (1 - r) * F.relu(x["tau_neg"] - distance(negative, (edited + ring).clamp(0, 1)))
    kl = kl_weight * (v_theta - v_ref).square().mean(dim=(1, 2))
    return policy + ner + er + kl


class Released:
    def __init__(self, folder: Path, device: str, dtype: str, size: str) -> None:
        cuda = device != "cpu" and torch.cuda.is_available()
        if device == "gpu" and not cuda:
            raise SystemExit("--device gpu: this PyTorch sees no GPU")
        self.folder, self.size = folder, problem.SIZES[size]
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = getattr(torch, dtype)

    def info(self) -> dict[str, Any]:
        return {
            "device": "gpu" if self.device.type == "cuda" else "cpu",
            "kind": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }

    def prepare(self) -> dict[str, Any]:
        self.model: Any = FluxTransformer2DModel(patch_size=1, **self.size.model)
        self.model.load_state_dict(load_file(self.folder / problem.WEIGHTS_FILE))
        self.model.to(self.device, self.dtype)
        for folder, name in NAMES.items():
            self.model.load_lora_adapter(
                self.folder / folder, weight_name=DIFFUSERS_FILE, prefix="transformer", adapter_name=name
            )
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()  # adapters train in float32
        self.model.requires_grad_(False)
        self.model.set_adapter("default")
        self.model.enable_gradient_checkpointing()
        self.model.train()
        self.trained = {n: p for n, p in self.model.named_parameters() if ".default." in n}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=problem.LEARNING_RATE, weight_decay=problem.WEIGHT_DECAY, foreach=True
        )
        self.inputs = {k: v.to(self.device) for k, v in load_file(self.folder / problem.INPUTS_FILE).items()}
        side = self.size.side
        ids = [torch.from_numpy(position_ids(side, side, index)).float().to(self.device) for index in (0, 1)]
        self.image_ids, self.text_ids = torch.cat(ids), torch.zeros(self.size.text, 3, device=self.device)
        return {}

    def choose_threads(self, variant: dict[str, Any]) -> dict[str, Any]:
        """On a CPU, takes the number of threads that is fastest for this step; more are slower in small models."""
        if self.device.type == "cpu":
            state = copy.deepcopy((self.trained, self.optimizer.state_dict()))
            seconds = {}
            for threads in sorted({1, *(2**i for i in range(8)), os.cpu_count() or 1}):
                if threads <= (os.cpu_count() or 1):
                    torch.set_num_threads(threads)
                    seconds[threads] = min(self.step(variant)["seconds"] for _ in range(2))
            torch.set_num_threads(min(seconds, key=lambda n: seconds[n]))
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(state[0][name])
            self.optimizer.load_state_dict(state[1])
        return {"threads": torch.get_num_threads()}

    def _velocity(self, x_t: Tensor) -> Tensor:
        x = self.inputs
        low = contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        with low:
            out = self.model(
                hidden_states=torch.cat([x_t, x["source"]], dim=1),
                encoder_hidden_states=x["text"],
                pooled_projections=x["pooled"],
                timestep=x["t"],
                guidance=x["guidance"],
                img_ids=self.image_ids,
                txt_ids=self.text_ids,
                return_dict=False,
            )[0]
        return out[:, : x_t.shape[1]].float()

    def _loss(self, variant: dict[str, Any]) -> Tensor:
        x = self.inputs
        t = x["t"][:, None, None]
        x_t = (1 - t) * x["x0"] + t * x["noise"]
        with torch.no_grad():
            self.model.set_adapter("default" if variant["on_policy"] else "old")
            v_old = self._velocity(x_t)
        self.model.set_adapter("default")
        v_theta = self._velocity(x_t)
        with torch.no_grad():
            self.model.disable_adapters()
            v_ref = self._velocity(x_t)
            self.model.enable_adapters()
        return nft_loss(x, x_t, v_old, v_theta, v_ref, variant["kl_weight"]).mean()

    def gradient(self, variant: dict[str, Any], path: str) -> dict[str, Any]:
        self.optimizer.zero_grad()
        loss = self._loss(variant)
        loss.backward()
        gradients = {name.replace(".default", ""): p.grad.cpu().contiguous() for name, p in self.trained.items()}  # type: ignore[union-attr]
        save_file(gradients, path)
        return {"loss": loss.item()}

    def step(self, variant: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self._loss(variant)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), problem.MAX_GRADIENT_NORM)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}


if __name__ == "__main__":
    released = Released(Path(sys.argv[1]), *sys.argv[2:])
    problem.serve({name: getattr(released, name) for name in ("choose_threads", "info", "prepare", "gradient", "step")})
