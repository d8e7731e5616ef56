"""The Kubernetes recipes: their structure, what their parts say of each other, and how a pod starts and stops a run."""

import math
import os
import signal
import subprocess
import time

import jsonschema
import pytest
import yaml

from cocoedit_jax.planning.topology import parse_topology
from tests.launch.recipes.calls import RECIPES, check_training, command_of, read_flags


def _object(required, **properties):
    return {"type": "object", "required": required, "properties": properties}


def _closed(required, **properties):
    return _object(required, **properties) | {"additionalProperties": False}


TEXT, MANY, COUNT = {"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}, {"type": "integer"}
_CONTAINER = _closed(
    ["name", "image", "command", "resources"],
    name=TEXT, image=TEXT, workingDir=TEXT, command=MANY | {"items": TEXT},
    ports=MANY | {"items": _closed(["containerPort"], containerPort=COUNT)},
    env=MANY | {"items": _closed(["name"], name=TEXT, value=TEXT, valueFrom={"type": "object"})},
    resources=_closed(["limits"], limits=_object([])), readinessProbe=_object(["httpGet"]),
    volumeMounts=MANY | {"items": _closed(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly={})},
)  # fmt: skip
POD = _closed(
    ["containers"],
    restartPolicy={"enum": ["Never", "OnFailure", "Always"]}, terminationGracePeriodSeconds=COUNT | {"minimum": 1},
    nodeSelector=_object([]) | {"additionalProperties": TEXT}, tolerations=MANY, volumes=MANY,
    containers=MANY | {"items": _CONTAINER},
)  # fmt: skip
# JobSet v1alpha2 (jobset.sigs.k8s.io/docs/reference), as far as it is used; other fields are refused.
_JOB = _closed(
    ["parallelism", "completions", "completionMode", "backoffLimit", "template"],
    parallelism=COUNT | {"minimum": 1}, completions=COUNT, completionMode={"const": "Indexed"},
    backoffLimit={"const": 0}, template=_closed(["spec"], spec=POD),
)  # fmt: skip
JOBSET = _closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"}, kind={"const": "JobSet"},
    metadata=_closed(["name"], name=TEXT | {"pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"}, annotations=_object([])),
    spec=_closed(
        ["replicatedJobs", "network", "failurePolicy"],
        network=_closed(
            ["enableDNSHostnames"], enableDNSHostnames={"const": True}, publishNotReadyAddresses={"const": True}
        ),
        failurePolicy=_closed(["maxRestarts"], maxRestarts=COUNT | {"minimum": 1}),
        replicatedJobs=MANY | {"items": _closed(
            ["name", "replicas", "template"], name=TEXT, replicas=COUNT | {"minimum": 1},
            template=_closed(["spec"], spec=_JOB),
        )},
    ),
)  # fmt: skip
DEPLOYMENT = _closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "apps/v1"}, kind={"const": "Deployment"}, metadata=_closed(["name"], name=TEXT),
    spec=_closed(["replicas", "selector", "template"], replicas=COUNT, selector=_object(["matchLabels"]),
                 template=_closed(["metadata", "spec"], metadata=_object(["labels"]), spec=POD)),
)  # fmt: skip
# GKE's names of TPUs, as in its documentation of node selectors -> ours.
ACCELERATORS = {
    "tpu-v5-lite-podslice": "v5e", "tpu-v5p-slice": "v5p", "tpu-v6e-slice": "v6e", "tpu7x": "tpu7x",
}  # fmt: skip


def load(name):
    jobset = yaml.safe_load((RECIPES / name).read_text())
    jsonschema.validate(jobset, JOBSET)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    (container,) = spec["template"]["spec"]["containers"]
    check_volumes(spec["template"]["spec"])
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "JobSet starts all pods anew, or none"
    return jobset, job, spec, container


def check_volumes(pod):
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def variables(container):
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def training(container, devices):
    """Checks the command of a pod; what its flags say."""
    bash, script, run, *command = container["command"]
    assert bash == "bash" and script == "launch/recipes/in_pod.sh"
    module, flags = command_of(command)
    assert module == "launch.train"
    found = check_training([*flags, f"--run={run}", "--resume"], devices)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    vlm = found["config"]["judge"]["vlm"]
    for path in (run, vlm["key_file"], vlm["cache_dir"], found["config"]["data"]["path"]):
        assert path.startswith(tuple(mounts)), path
    return found


def test_gpus():
    jobset, job, spec, container = load("jobset_gpu.yaml")
    known = variables(container)
    # Pods are NAME-JOB-REPLICA-INDEX, in the subdomain of the JobSet's headless service, which has its name.
    name = jobset["metadata"]["name"]
    host, _, port = known["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert host == f"{name}-{job['name']}-0-0.{name}" and job["replicas"] == 1
    assert [{"containerPort": int(port)}] == container["ports"]
    assert known["JAX_NUM_PROCESSES"] == str(spec["parallelism"])
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert known["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    assert isinstance(known["JAX_NUM_PROCESSES"], str), "Kubernetes refuses numbers"
    training(container, spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"])


def test_tpu_slice():
    _, job, spec, container = load("jobset_tpu.yaml")
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector.keys() == {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    family = ACCELERATORS[selector["cloud.google.com/gke-tpu-accelerator"]]
    topology = parse_topology(f"{family}:{selector['cloud.google.com/gke-tpu-topology']}")
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert not variables(container).keys() & {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    training(container, job["replicas"] * topology.devices)


def test_judge():
    deployment, service = yaml.safe_load_all((RECIPES / "judge.yaml").read_text())
    jsonschema.validate(deployment, DEPLOYMENT)
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    check_volumes(pod["spec"])
    (container,) = pod["spec"]["containers"]
    module, flags = command_of(container["command"])
    (found,) = read_flags(module, [flags])
    assert module == "launch.serve_judge" and not found["rest"]
    port = found["flags"]["port"]
    assert container["ports"] == [{"containerPort": port}] and service["spec"]["ports"] == [{"port": port}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": port}
    url = f"http://{service['metadata']['name']}:{port}/v1"
    for name in ("jobset_gpu.yaml", "jobset_tpu.yaml"):
        words = load(name)[3]["command"]
        assert f"--config.judge.vlm.endpoints={url}" in words
        assert f"--config.judge.vlm.key_file={found['flags']['key_file']}" in words


# --- in_pod.sh -------------------------------------------------------------------------------------------------------


def pod(run, body, **options):
    """The script with a stand-in for the trainer, whose flags are $@."""
    return subprocess.Popen(
        ["bash", str(RECIPES / "in_pod.sh"), str(run), "bash", "-c", body, "train"],
        env=os.environ | {"IN_POD_WAIT": "0"}, stdout=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body, code",
    [("exit 3", 3), ("touch {run}/evaluation.json", 0), ("true", 75)],
    ids=["failed", "complete", "stopped"],
)
def test_exit_codes(tmp_path, body, code):
    process = pod(tmp_path, body.format(run=tmp_path))
    process.communicate(timeout=30)
    assert process.returncode == code


def test_a_run_that_is_there_is_continued(tmp_path):
    assert pod(tmp_path, 'echo "$@"').communicate()[0].split() == [f"--run={tmp_path}"]
    (tmp_path / "config.json").touch()
    assert pod(tmp_path, 'echo "$@"').communicate()[0].split() == [f"--run={tmp_path}", "--resume"]


def test_the_signal_comes_once(tmp_path):
    """To the first process alone, as from Kubernetes, or to the whole group, and again: the trainer saves."""
    body = f"trap 'echo told' TERM; touch {tmp_path}/up; for i in 1 2 3 4 5 6 7 8; do sleep 0.1; done; echo saved"
    for tell in (os.kill, os.killpg):
        process = pod(tmp_path, body, start_new_session=True)
        end = time.monotonic() + 20
        while not (tmp_path / "up").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        tell(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        tell(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert out.split() == ["told", "saved"] and process.returncode == 75
        (tmp_path / "up").unlink()
