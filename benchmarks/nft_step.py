"""Speed of one NFT optimizer micro-step, ours against PyTorch, side by side in one run.

    python -m benchmarks.nft_step                       # CPU, or the accelerator that JAX finds
    python -m benchmarks.nft_step --size tiny --repeats 3

A micro-step is: velocity of the old policy, of the reference policy and of the trained one, the NFT objective with
region terms, backward to the trained adapter, gradient clipping, AdamW. The PyTorch side is diffusers'
``FluxTransformer2DModel`` with two PEFT adapters and gradient checkpointing, three forwards one after another, as the
released code runs it. Both sides hold the same weights and inputs; losses and adapter gradients are compared first.

Two worker processes stay alive and take single timed steps in turn, so that a change of load or clock hits
both. Rows of the table:

    identical work          ours also recomputes every block in the backward pass and does three forwards
    default configuration   ours as the shipped configuration runs: activations kept, no reference forward (kl_weight 0)
    on-policy               as before, with old_decay_type 0: the old policy is the trained one, one forward
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

# name -> what our side does; the PyTorch side always takes the released code's step.
VARIANTS: dict[str, dict[str, Any]] = {
    "identical work": {"remat": "full", "kl_weight": 1e-4, "on_policy": False},
    "default configuration": {"remat": "none", "kl_weight": 0.0, "on_policy": False},
    "on-policy": {"remat": "none", "kl_weight": 0.0, "on_policy": True},
}
WORKERS = {"PyTorch": "benchmarks.nft_step_torch", "ours": "benchmarks.nft_step_ours"}
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 2e-1)}  # relative: loss, gradient


class Worker:
    """A child process that answers one JSON line with one JSON line."""

    def __init__(self, module: str, folder: Path, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", module, str(folder), args.device, args.dtype, args.size]
        root = Path(__file__).parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
        self.module = module
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.module} ended with code {self.process.wait()} during {do!r}; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(workers: dict[str, Worker], folder: Path, dtype: str) -> dict[str, dict[str, float]]:
    """Relative differences of loss and adapter gradient for every variant. Raises SystemExit when they disagree."""
    loss_bound, gradient_bound = TOLERANCE[dtype]
    differences = {}
    for name, variant in VARIANTS.items():
        loss, gradients = {}, {}
        for side, worker in workers.items():
            path = folder / f"gradient_{side}.safetensors"
            loss[side] = worker("gradient", variant=variant, path=str(path))["loss"]
            gradients[side] = load_file(path)
        ours, reference = gradients["ours"], gradients["PyTorch"]
        if ours.keys() != reference.keys():
            raise SystemExit(
                f"{name}: the sides differ in trained tensors: {sorted(ours.keys() ^ reference.keys())[:4]}"
            )
        largest = max(float(np.abs(g).max()) for g in reference.values())
        difference = {
            "loss": abs(loss["ours"] / loss["PyTorch"] - 1),
            "gradient": max(float(np.abs(ours[k] - reference[k]).max()) for k in ours) / largest,
        }
        print(
            f"{name:24s} loss {loss['ours']:.6f}, relative difference {difference['loss']:.1e}; "
            f"gradients of {len(ours)} tensors {difference['gradient']:.1e}",
            flush=True,
        )
        if not (difference["loss"] < loss_bound and difference["gradient"] < gradient_bound and largest > 0):
            raise SystemExit(f"{name}: the sides disagree; expected below {loss_bound:.0e} and {gradient_bound:.0e}")
        differences[name] = difference
    return differences


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(low), "q3": float(high)}


def measure(workers: dict[str, Worker], warmup: int, repeats: int) -> dict[str, Any]:
    """Seconds per step, in rounds: PyTorch, then each variant of ours; ratios are taken within a round."""
    times: dict[str, list[float]] = {name: [] for name in ("PyTorch", *VARIANTS)}
    for index in range(warmup + repeats):
        released = VARIANTS["identical work"]
        seconds = {"PyTorch": workers["PyTorch"]("step", variant=released)["seconds"]}
        for name, variant in VARIANTS.items():
            seconds[name] = workers["ours"]("step", variant=variant)["seconds"]
        if index >= warmup:
            for name, value in seconds.items():
                times[name].append(value)
    ratios = {name: [t / o for t, o in zip(times["PyTorch"], times[name], strict=True)] for name in VARIANTS}
    return {
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio": {name: spread(values) | {"samples": len(values)} for name, values in ratios.items()},
    }


def print_table(result: dict[str, Any]) -> None:
    seconds, ratio = result["seconds"], result["ratio"]
    print(f"\n{'':24s} {'median s':>10s} {'IQR s':>17s} {'PyTorch / ours':>16s} {'IQR':>14s}")
    for name, row in seconds.items():
        line = f"{name:24s} {row['median']:10.3f}   {row['q1']:6.3f} .. {row['q3']:6.3f}"
        if name in ratio:
            line += f" {ratio[name]['median']:15.2f}x   {ratio[name]['q1']:5.2f} .. {ratio[name]['q3']:5.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"], help="auto: a GPU if both see one")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    parser.add_argument("--size", default="mid", choices=["tiny", "mid", "large"])
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before timing starts")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.repeats < 2 or args.warmup < 1:
        parser.error(f"--repeats {args.repeats} --warmup {args.warmup}: expected at least 2 and 1")

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers: dict[str, Worker] = {}
        try:
            for side in ("ours", "PyTorch"):  # ours writes the weights and inputs that the other reads
                workers[side] = Worker(WORKERS[side], folder, args)
                workers[side]("prepare")
            workers["PyTorch"]("choose_threads", variant=VARIANTS["identical work"])
            info = {side: worker("info") for side, worker in workers.items()}
            for side, fields in info.items():
                print(f"{side}: " + ", ".join(f"{key} {value}" for key, value in fields.items()), flush=True)
            if info["ours"]["device"] != info["PyTorch"]["device"]:
                raise SystemExit("the sides run on different devices; pass --device cpu or install both for the GPU")
            differences = compare(workers, folder, args.dtype)
            result = measure(workers, args.warmup, args.repeats)
        finally:
            for worker in workers.values():
                worker.close()
    print_table(result)
    # Load of other programs; these workers had not started when it was read.
    if load > 0.5:
        print(f"\nThe machine was busy before the run (load average {load:.1f}): times are not trustworthy.")
    if args.output:
        settings = {key: getattr(args, key) for key in ("device", "dtype", "size", "repeats", "warmup")}
        document = {"settings": settings, "load_before": load, "info": info, "difference": differences, **result}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
