"""A run as several processes of this machine: one for each host, with a few CPU devices each.

python -m tests.train.hosts ADDRESS PROCESSES INDEX OPTIONS      # one of them; OPTIONS: JSON, see ``main``
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start(processes: int, devices: int, options: dict[str, Any]) -> list[subprocess.Popen]:
    """The processes of one run on ``devices`` devices in all."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # Compiling takes nearly all of the time: as in tests/conftest.py.
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    flags += f" --xla_force_host_platform_device_count={devices // processes}"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": options["cache"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.train.hosts", address, str(processes)]
    return [
        subprocess.Popen(
            [*command, str(index), json.dumps(options)], cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Exit code and output of each; none outlives ``seconds``."""
    end = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1.0, end - time.monotonic()))[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def run(processes: int, devices: int, options: dict[str, Any], seconds: float = 900) -> list[str]:
    """Outputs of a run that must succeed."""
    ended = finish(start(processes, devices, options), seconds)
    assert all(code == 0 for code, _ in ended), "\n\n".join(f"[{code}] {text[-3000:]}" for code, text in ended)
    return [text for _, text in ended]


def main(address: str, count: int, index: int, options: dict[str, Any]) -> None:
    """Trains as ``options`` say: ``base``, ``data``, ``run``, ``config`` (dotted keys), ``resume``, ``cache`` of
    compiled programs; ``hit``: ``[process, step, what]`` makes the judge of a process "raise" an error when that
    step is checked, or "kill" the process while it is sampled.

    What this process loaded and judged in training is written to RUN/process_INDEX.json.
    """
    import jax

    if count > 1:
        jax.distributed.initialize(address, count, index)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    from cocoedit_jax.data import source
    from cocoedit_jax.errors import UserError
    from cocoedit_jax.rewards.judge import SceneJudge, register_judge
    from cocoedit_jax.sharding import processes
    from cocoedit_jax.train.loop import train
    from cocoedit_jax.train.setup import build
    from tests.train.tiny import tiny_config

    seen: dict[str, Any] = {"loaded": [], "judged": [], "step": 0}
    original = source.load_pair

    def load_pair(*args: Any) -> Any:
        seen["loaded"].append([seen["step"], args[0].name])
        return original(*args)

    source.load_pair = load_pair

    @register_judge("spy")
    class Spy(SceneJudge):
        def check(self, step: int) -> None:
            seen["step"] = step
            if options.get("hit") == [index, step, "raise"]:
                raise UserError("the judge is out of order")

        def __call__(self, requests: Any) -> Any:
            if options.get("hit") == [index, seen["step"], "kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            seen["judged"] += [[seen["step"], r.record_id, float(r.edited.mean())] for r in requests]
            return super().__call__(requests)

        def pop_counters(self) -> dict[str, float]:
            return {"asked": 1.0}

    settings = {"judge.name": "spy", "mesh.data": 0, "mesh.fsdp": 0} | options.get("config", {})
    config = tiny_config(Path(options["base"]), Path(options["data"]), **settings)
    try:
        with processes.together():
            train(build(config), Path(options["run"]), resume=options.get("resume", False))
    except UserError as error:
        sys.exit(f"error: {error}")
    (Path(options["run"]) / f"process_{index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
