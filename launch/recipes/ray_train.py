"""One process of a run on each node of a Ray cluster.

    ray job submit --address=http://HEAD:8265 --working-dir=. -- \\
        python -m launch.recipes.ray_train --hosts=2 --gpus_per_host=8 -- \\
        --config=configs/flux_kontext.py --run=/shared/runs/kontext --config.data.path=/shared/data \\
        --config.judge.vlm.endpoints=URL --config.mesh.layout=fsdp --config.rollout.batch_size=16 \\
        --config.train.micro_batch=16 --config.evaluation.batch_size=16

What follows the lone ``--`` are the flags of launch.train. Every node needs this package, and the disk of the run.
Ctrl-C or SIGTERM here stops all of them, saved. Needs pip install 'cocoedit-jax[ray]'.
"""

import signal
import socket
import subprocess
import sys
from typing import Any

from absl import app, flags

_HOSTS = flags.DEFINE_integer("hosts", None, "Nodes, with one process each.", lower_bound=1)
_CPUS = flags.DEFINE_float("cpus_per_host", 1.0, "CPU cores that Ray reserves on each.", lower_bound=0.0)
_GPUS = flags.DEFINE_integer("gpus_per_host", 0, "GPUs that Ray reserves on each.", lower_bound=0)
_TPUS = flags.DEFINE_integer("tpus_per_host", 0, "TPU chips that Ray reserves on each.", lower_bound=0)
_APART = flags.DEFINE_bool("one_per_node", True, "Each process on a node of its own.")
_MODULE = flags.DEFINE_string("module", "launch.train", "Command to run.")
_WAIT = flags.DEFINE_float("placement_timeout", 600.0, "Seconds to wait for that many free nodes.", lower_bound=1.0)
flags.mark_flag_as_required("hosts")


class Host:
    """The actor on one node. The command is a process of its own: its signals and devices are no business of Ray's."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def address(self) -> str:
        """Of this node, with a port that is free."""
        import ray.util

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, command: list[str]) -> int:
        """Runs ``command`` with this node's Python; its exit code."""
        if self._stopped:
            return -signal.SIGTERM
        self._process = subprocess.Popen([sys.executable, *command])
        return self._process.wait()

    def stop(self) -> None:
        """Tells the command to save and end."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()


def _place(ray: Any, count: int) -> list[Any]:
    """``count`` actors. Ends the program if the cluster has no room for them."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    wanted = {"CPU": _CPUS.value, "GPU": float(_GPUS.value), "TPU": float(_TPUS.value)}
    bundle = {name: amount for name, amount in wanted.items() if amount}
    group = placement_group([bundle] * count, strategy="STRICT_SPREAD" if _APART.value else "PACK")
    if not group.wait(_WAIT.value):
        where = " on nodes of their own" if _APART.value else ""
        sys.exit(
            f"error: --hosts={count}: no room for {bundle}{where} in {_WAIT.value:g} s; "
            f"the cluster has {ray.cluster_resources()}"
        )
    return [
        ray.remote(Host).options(
            num_cpus=_CPUS.value,
            num_gpus=_GPUS.value,
            resources={"TPU": wanted["TPU"]} if _TPUS.value else None,
            max_concurrency=2,  # run, and stop beside it
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(count)
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError:
        sys.exit("error: ray cannot be imported; install with: pip install 'cocoedit-jax[ray]'")
    stopping = []
    ray.init()
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which handles them too
        signal.signal(number, lambda *_: stopping.append(True))
    assert _HOSTS.value is not None  # marked as required
    hosts = _place(ray, _HOSTS.value)
    common = ["-m", _MODULE.value, *argv[1:], "--distributed=on"]
    numbers: list[list[str]] = [[] for _ in hosts]
    if not _TPUS.value:  # a slice has numbered its hosts itself, and jax asks it
        common.append(f"--coordinator_address={ray.get(hosts[0].address.remote())}")
        numbers = [[f"--num_processes={len(hosts)}", f"--process_id={index}"] for index in range(len(hosts))]
    waiting = [host.run.remote([*common, *mine]) for host, mine in zip(hosts, numbers, strict=True)]
    codes, told = [], False
    while waiting:
        done, waiting = ray.wait(waiting, timeout=1.0)
        for reference in done:
            try:
                codes.append(ray.get(reference))
            except RayError as error:
                print(f"error: a host is lost ({type(error).__name__}); continue with --resume", file=sys.stderr)
                codes.append(1)
        if not told and (stopping or any(codes)):
            told = True
            for host in hosts:
                host.stop.remote()
    ray.shutdown()
    if any(codes):
        sys.exit(f"error: exit codes {codes}; the messages are above")


if __name__ == "__main__":
    app.run(main)
