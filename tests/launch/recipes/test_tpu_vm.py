"""The TPU recipe: every call of gcloud, and the commands that it sends to the workers."""

import subprocess

import pytest

from cocoedit_jax.planning.topology import parse_topology
from tests.launch.recipes.calls import RECIPES, Shell, check_training, command_of

SCRIPT = str(RECIPES / "tpu_vm.sh")
# Flags of gcloud's commands as its reference documents them: those that must be there, and the others.
PLACE = {"project", "zone"}
GCLOUD = {
    "compute tpus tpu-vm create": (PLACE | {"accelerator-type", "version"}, {"spot"}),
    "compute tpus tpu-vm ssh": (PLACE | {"worker", "command"}, set()),
    "compute tpus tpu-vm delete": (PLACE | {"quiet"}, set()),
    "compute tpus queued-resources create": (
        PLACE | {"accelerator-type", "runtime-version"}, {"node-id", "node-count", "node-prefix", "spot"},
    ),
    "compute tpus queued-resources describe": (PLACE, {"format"}),
    "compute tpus queued-resources delete": (PLACE | {"force", "quiet"}, set()),
}  # fmt: skip


def gcloud(calls):
    """(command, name, flags) of every call."""
    found = []
    for program, *words in calls:
        assert program == "gcloud"
        command, (name, *flags) = " ".join(words[:4]), words[4:]
        given = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
        assert all(flag.startswith("--") for flag in flags) and not name.startswith("-"), flags
        needed, optional = GCLOUD[command]
        assert needed <= given.keys() <= needed | optional, (command, given)
        found.append((command, name, given))
    return found


@pytest.fixture
def bash(tmp_path):
    return Shell(tmp_path, ["gcloud", "sudo", "curl", "git", "mountpoint", "uv", "sh"])


def test_slice(bash):
    ((command, name, flags),) = gcloud(bash(SCRIPT, "create"))
    assert command.endswith("tpu-vm create") and name == "cocoedit"
    assert parse_topology(flags["accelerator-type"]).name == "v5e:4x4"
    assert flags["version"] == "v2-alpha-tpuv5-lite" and "spot" not in flags
    assert "spot" in gcloud(bash(SCRIPT, "create", SPOT="--spot"))[0][2]


def test_queue(bash):
    ((command, _, flags),) = gcloud(bash(SCRIPT, "queue"))
    assert command.endswith("queued-resources create") and flags["node-id"] == "cocoedit"
    (_, _, flags), = gcloud(bash(SCRIPT, "queue", SLICES="2"))  # fmt: skip
    assert flags["node-count"] == "2" and flags["node-prefix"] == "cocoedit" and "node-id" not in flags
    assert gcloud(bash(SCRIPT, "state"))[0][0].endswith("describe")


@pytest.mark.parametrize("slices, nodes", [(1, ["cocoedit"]), (2, ["cocoedit-0", "cocoedit-1"])])
def test_train(bash, slices, nodes):
    calls = gcloud(bash(SCRIPT, "resume", SLICES=str(slices)))
    assert [name for _, name, _ in calls] == nodes
    assert len({flags["command"] for _, _, flags in calls}) == 1 and calls[0][2]["worker"] == "all"
    ((_, *unit),) = bash("-c", calls[0][2]["command"])
    module, flags = command_of(unit)
    assert unit[0] == "systemd-run" and module == "launch.train"
    assert "--working-directory=/home/me/cocoedit" in unit
    chips = parse_topology(gcloud(bash(SCRIPT, "create"))[0][2]["accelerator-type"]).devices
    found = check_training(flags, chips * slices)
    assert found["config"]["mesh"]["fsdp"] == chips, "weights do not leave a slice"
    assert found["flags"]["resume"] is True
    ((_, *unit),) = bash("-c", gcloud(bash(SCRIPT, "train", SLICES=str(slices)))[0][2]["command"])
    assert set(flags) - set(command_of(unit)[1]) == {"--resume"}


def test_install_and_stop(bash):
    (_, _, flags), = gcloud(bash(SCRIPT, "install"))  # fmt: skip
    assert subprocess.run(["bash", "-n", "-c", flags["command"]], check=False).returncode == 0
    assert "nfs 10.0.0.2:/share /mnt/shared" in flags["command"] and "$HOME/cocoedit" in flags["command"]
    (_, _, flags), = gcloud(bash(SCRIPT, "stop"))  # fmt: skip
    assert bash("-c", flags["command"]) == [["sudo", "systemctl", "stop", "--no-block", "cocoedit"]]
    assert gcloud(bash(SCRIPT, "log"))[0][2]["worker"] == "0"


def test_delete(bash):
    assert [command.split()[-2:] for command, _, _ in gcloud(bash(SCRIPT, "delete"))] == [
        ["queued-resources", "describe"],
        ["queued-resources", "delete"],
    ]
    bash.failing = "*describe*"
    assert gcloud(bash(SCRIPT, "delete"))[-1][0] == "compute tpus tpu-vm delete"


def test_an_unknown_action_shows_the_usage(bash):
    assert not bash(SCRIPT, "creat") and bash.code == 2 and "queue" in bash.err and "PROJECT" not in bash.err
