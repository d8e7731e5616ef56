"""Makes one run of several processes, one on each host, by ``jax.distributed``; a command opts in with
``command.run(main, setup=distributed.initialize)``.

Nothing need be given where JAX detects the cluster: SLURM (srun), Open MPI, Cloud TPU and GKE slices, indexed Jobs of
Kubernetes. Elsewhere: --coordinator_address, --num_processes and --process_id, or the environment variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. launch/recipes/README.md has complete examples.
"""

import dataclasses
import os
import re
from typing import Any

from absl import flags

from cocoedit_jax.errors import UserError

_MODE = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "on", "off"],
    "Several processes as one run; auto: when a cluster of more than one process is detected, or the flags below tell "
    "of one; on: fail rather than run alone.",
)  # fmt: skip
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where all meet. Default: JAX_COORDINATOR_ADDRESS."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "Processes of the run. Default: JAX_NUM_PROCESSES.")
_INDEX = flags.DEFINE_integer("process_id", None, "Of this process, from 0. Default: JAX_PROCESS_ID.")
_DEVICES = flags.DEFINE_string(
    "local_device_ids", None,
    "GPUs of this host that this process uses: all, or numbers as 0,1. Default: JAX_LOCAL_DEVICE_IDS, or all; under "
    "SLURM and Open MPI with several processes on the host, the one of this process's number on it.",
)  # fmt: skip
_JAX_S = 60  # at least, for JAX to connect processes that are all there
_TIMEOUT = flags.DEFINE_integer("initialization_timeout", 300, "Seconds until all must have met.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Processes:
    """What ``jax.distributed.initialize`` is told.

    Attributes:
        coordinator: HOST:PORT.
        count: of processes.
        index: of this one.
        devices: visible on this host; None: all.
    """

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


def initialize() -> None:
    """Joins the other processes; does nothing for a run of one. Must come before anything that touches devices.

    Raises:
        UserError: flags or environment give half of what is needed, or contradict each other, or not all processes
            met within --initialization_timeout.
    """
    found = resolve()
    if found is not None:
        _join(found)


def alone(instead: str = "") -> None:
    """For a command that runs in one process, in place of ``initialize``.

    Args:
        instead: what else can be done, for the message.

    Raises:
        UserError: flags, environment or cluster tell of several, each of which would do all of it.
    """
    found = resolve()
    if found is not None and found.count > 1:
        raise UserError(
            f"process {found.index} of {found.count}: this command runs in one process; start it once, or give "
            "--distributed=off to the one that is to run it" + (f"; {instead}" if instead else "")
        )


def resolve() -> Processes | None:
    """What flags, environment and cluster say; None: a process alone. Waits for the coordinator's name at most.

    Raises:
        UserError: as ``initialize``.
    """
    given = {flag.name: flag for flag in (_COORDINATOR, _COUNT, _INDEX, _DEVICES) if flag.value is not None}
    if _MODE.value == "off":
        if given:
            raise UserError(f"--distributed=off: contradicts --{', --'.join(given)}")
        return None
    coordinator, place = _text("coordinator_address", _COORDINATOR.value)
    coordinator = coordinator and _with_port(coordinator, place)
    count, count_place = _number("num_processes", _COUNT.value, 1)
    index, index_place = _number("process_id", _INDEX.value, 0)
    devices = _device_ids()
    if None in (coordinator, count, index):
        cluster = _detect()
        told = any(value is not None for value in (coordinator, count, index))
        size = _ask(cluster, _size, cluster) if cluster else 0
        if cluster is None or (size < 2 and not told):
            return _alone(coordinator, count, index, cluster)
        port = os.environ.get("JAX_COORDINATOR_PORT")
        count = size if count is None else count
        index = _ask(cluster, cluster.get_process_id) if index is None else index
        if coordinator is None:
            coordinator = _ask(cluster, cluster.get_coordinator_address, _TIMEOUT.value, port)
        if devices is None:
            devices = _own_device(cluster)
    assert coordinator is not None and count is not None and index is not None
    if index >= count:
        raise UserError(
            f"{index_place}={index}: with {count_place}={count}, expected 0{f' to {count - 1}' if count > 1 else ''}"
        )
    if count == 1 and _MODE.value == "auto":
        return None
    return Processes(coordinator, count, index, devices or None)


def _alone(coordinator: str | None, count: int | None, index: int | None, cluster: Any) -> Processes | None:
    """No cluster of several processes: fine if nothing was said of one."""
    names = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    missing = [f"--{name}" for name, value in names.items() if value is None]
    told = [f"{name}={value}" for name, value in names.items() if value is not None]
    if told and not (count == 1 and not index and _MODE.value == "auto"):
        raise UserError(
            f"--{' --'.join(told)}: also needs {', '.join(missing)}, as no cluster was detected that tells them"
        )
    if _MODE.value == "on":
        if cluster is not None:
            host = _ask(
                cluster, cluster.get_coordinator_address, _TIMEOUT.value, os.environ.get("JAX_COORDINATOR_PORT")
            )
            return Processes(host, 1, 0, _device_ids() or None)
        raise UserError(
            "--distributed=on: no cluster was detected; expected --coordinator_address=HOST:PORT --num_processes=N "
            "--process_id=I, or one of srun, mpirun (Open MPI before 5), a TPU slice, an indexed Job of Kubernetes"
        )
    return None


# --- flags and environment -------------------------------------------------------------------------------------------


def _text(flag: str, value: object) -> tuple[str | None, str]:
    """The value of a flag, or of its environment variable, and the name of the one that it comes from."""
    if value is not None:
        return str(value), f"--{flag}"
    name = f"JAX_{flag.upper()}"
    return os.environ.get(name) or None, name


def _number(flag: str, value: int | None, lowest: int) -> tuple[int | None, str]:
    text, place = _text(flag, value)
    if text is None:
        return None, place
    if not re.fullmatch(r"\d+", text) or int(text) < lowest:
        raise UserError(f"{place}={text}: expected a whole number from {lowest} on")
    return int(text), place


def _with_port(text: str, place: str) -> str:
    host, colon, port = text.rpartition(":")
    if (not colon or text.endswith("]")) and (default := os.environ.get("JAX_COORDINATOR_PORT")):
        host, port = text, default
    if not host or not re.fullmatch(r"\d+", port) or not 0 < int(port) < 2**16 or (":" in host and "[" not in host):
        raise UserError(f"{place}={text}: expected HOST:PORT, such as 10.0.0.2:8476 or [fd00::2]:8476")
    return f"{host}:{port}"


def _device_ids() -> list[int] | None:
    """Devices that are asked for; [] is all, None nothing said."""
    text, place = _text("local_device_ids", _DEVICES.value)
    if text is None:
        return None
    if text == "all":
        return []
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"{place}={text}: expected all, or numbers of devices separated by commas, such as 0,1")
    return [int(part) for part in text.split(",")]


# --- clusters --------------------------------------------------------------------------------------------------------


def _detect() -> Any:
    """The cluster environment (a ``ClusterEnv``) that JAX finds itself in, or None."""
    from jax._src.clusters import ClusterEnv, K8sCluster  # what jax.distributed itself asks; there is no public name

    for cluster in ClusterEnv._cluster_types:  # in JAX's order
        if cluster.opt_in_only_method:
            continue
        if cluster is K8sCluster:
            # JAX takes any pod for one of a Job. Only those of an indexed one have a number.
            if "JOB_COMPLETION_INDEX" not in os.environ:
                continue
            try:
                import kubernetes  # noqa: F401  # pyright: ignore[reportMissingImports]
            except ModuleNotFoundError:
                told = [_text(name, flag.value)[0] for name, flag in
                        (("coordinator_address", _COORDINATOR), ("num_processes", _COUNT))]  # fmt: skip
                raise UserError(
                    f"JOB_COMPLETION_INDEX={os.environ['JOB_COMPLETION_INDEX']}: this is a pod of an indexed Job, but "
                    f"{'not all' if any(told) else 'none'} of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                    "JAX_PROCESS_ID are set; set them, or pip install kubernetes, or give --distributed=off"
                ) from None
        if _ask(cluster, cluster.is_env_present):
            return cluster
    return None


def _ask(cluster: Any, question: Any, *arguments: Any) -> Any:
    try:
        return question(*arguments)
    except Exception as error:  # of sockets, HTTP, Kubernetes' API, or malformed variables
        raise UserError(
            f"--distributed={_MODE.value}: {cluster.__name__}, which JAX detected, does not tell who takes part "
            f"({type(error).__name__}: {error}); give --coordinator_address, --num_processes and --process_id, or "
            "--distributed=off to run alone"
        ) from error


def _size(cluster: Any) -> int:
    count = cluster.get_process_count()
    if cluster.name == "slurm" and os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return 1  # an interactive shell: SLURM_NTASKS there is of the allocation, but no other task has started
    return count


def _own_device(cluster: Any) -> list[int] | None:
    """The one device of a process that shares its host; JAX by itself takes no other case into account."""
    local = cluster.get_local_process_id()
    if cluster.name == "slurm":
        hosts = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
        shared = cluster.get_process_count() > hosts
    else:
        shared = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    return [local] if shared and local is not None else None


# --- joining ---------------------------------------------------------------------------------------------------------


def _join(found: Processes) -> None:
    import jax  # first: those that have met are at the same place

    from cocoedit_jax.sharding.meeting import meet

    meet(found.coordinator, found.count, found.index, _TIMEOUT.value)
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            found.devices,
            # All is known. JAX would otherwise take one device per process under SLURM and Open MPI.
            cluster_detection_method="deactivate",
            initialization_timeout=max(_TIMEOUT.value, _JAX_S),
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--coordinator_address={found.coordinator}: the {found.count} processes met, but JAX could not connect "
            f"them (this is process {found.index}): {error}"
        ) from error
    if found.index == 0:
        print(f"{found.count} processes, joined at {found.coordinator}", flush=True)
