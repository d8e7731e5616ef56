"""Runs shell with commands that only write down how they were called, and reads commands with launch's own flags."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "launch/recipes"

_WRITE = """#!/bin/bash
{ printf '%s\\x1f' "${0##*/}" "$@"; printf '\\x1e'; } >>"$CALLS"
case "${0##*/} $*" in $FAILING) exit 1 ;; esac
"""
_READ = """
import importlib, json, os, sys
from absl import flags
from launch import command
module, lines = importlib.import_module(sys.argv[1]), json.loads(sys.stdin.read())
if "config" in flags.FLAGS:
    import cocoedit_jax.nft.presets  # once, instead of in every child: configuration files import it
for line in lines:
    sys.stdout.flush()
    child = os.fork()
    if not child:  # each in a process of its own, since reading flags changes them
        try:
            sys.argv = [module.__name__, *line]  # where ml_collections looks for overrides
            rest = command._parse(sys.argv)
            found = {"rest": rest[1:], "flags": {name: flags.FLAGS[name].value for name in flags.FLAGS}}
            if "config" in found["flags"]:
                found["config"] = json.loads(flags.FLAGS.config.to_json())
            found["flags"] = {k: v for k, v in found["flags"].items() if isinstance(v, (str, int, float, bool))}
        except SystemExit as error:
            found = {"error": str(error.code)}
        print(json.dumps(found), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


class Shell:
    """Bash, in which ``names`` do nothing but leave their arguments in ``calls``."""

    def __init__(self, folder: Path, names: Iterable[str], failing: str = "none"):
        self.log, self.bin, self.failing = folder / "calls", folder / "bin", failing
        self.bin.mkdir()
        for name in names:
            (self.bin / name).write_text(_WRITE)
            (self.bin / name).chmod(0o755)

    def __call__(self, *command: str, **environment: str) -> list[list[str]]:
        """The calls that ``bash COMMAND...`` makes; they go before the real programs of these names."""
        self.log.write_text("")
        path = f"{self.bin}:{os.environ['PATH']}"
        # What a recipe puts before the PATH must not hide the commands here.
        settings = {"PATH": path, "CALLS": str(self.log), "FAILING": self.failing, "HOME": "/home/me"} | environment
        found = subprocess.run(["bash", *command], env=settings, cwd=ROOT, capture_output=True, text=True, check=False)
        self.code, self.err = found.returncode, found.stderr
        return [call.split("\x1f")[:-1] for call in self.log.read_text().split("\x1e") if call]


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Module and flags of the ``python -m launch...`` among ``words``."""
    where = next(i for i, word in enumerate(words) if word == "-m" and words[i + 1].startswith("launch."))
    assert Path(words[where - 1]).name == "python", words
    return words[where + 1], list(words[where + 2 :])


def read_flags(module: str, lines: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """``lines`` as ``module`` reads them: {"rest", "flags", "config"}, or {"error"} with its message."""
    found = subprocess.run(
        [sys.executable, "-c", _READ, module],
        input=json.dumps([list(line) for line in lines]),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def check_training(flags: Sequence[str], devices: int) -> dict[str, Any]:
    """Reads a command to train on ``devices`` and checks that its batches fit them; what ``read_flags`` returns."""
    from cocoedit_jax.sharding.layouts import parse_layout

    (found,) = read_flags("launch.train", [flags])
    assert "error" not in found, found
    assert not found["rest"]
    config, mesh = found["config"], dict(found["config"]["mesh"])
    sizes = parse_layout(mesh.pop("layout"))[0].sizes(devices, mesh)
    known = 1
    for size in sizes.values():
        known *= size if size > 0 else 1
    assert devices % known == 0, (sizes, devices)
    sizes = {axis: size if size > 0 else devices // known for axis, size in sizes.items()}
    shards = sizes["data"] * sizes["fsdp"]
    rollout, samples = config["rollout"], config["rollout"]["groups"] * config["rollout"]["group_size"]
    assert rollout["batch_size"] % shards == 0 and samples % rollout["batch_size"] == 0
    assert config["train"]["micro_batch"] % shards == 0 and config["evaluation"]["batch_size"] % shards == 0
    assert found["flags"]["distributed"] == "on"  # several runs of one process each would look well at first
    return found
