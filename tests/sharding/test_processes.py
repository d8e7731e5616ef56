"""Two processes of this machine: exchanges are exact, and the failure of one ends both with its message."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding import processes

ROOT = Path(__file__).parents[2]
PROCESS = """
import json, math, os, signal, sys, time
import jax
address, me, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, me)
from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding import processes
processes.BEAT_S, processes.LOST_S, processes.SUSPECT_S, processes.GRACE_S = 0.3, 6.0, 3.0, 2.0

def broken():
    if me == 1:
        raise UserError("no judge answers")

try:
    with processes.together():
        values = processes.gather("numbers", lambda: [0.1 + me, math.nan if me else -math.inf, f"{me} \\u00e4"])
        first = processes.from_first("folder", lambda: f"runs/{me}")
        try:
            processes.gather("judge", broken)
        except processes.Agreed as error:
            message = str(error)
        again = processes.gather("again", lambda: me)
        print(json.dumps([values, first, message, again]), flush=True)
        if me == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if me == 1 and how == "fails":
            raise ValueError("out of luck")
        if me == 0 and how == "stuck":
            time.sleep(300)  # as in an exchange between devices that will never be
        if me == 1 and how == "stuck":
            raise UserError("the disk is full")
        if me == 0 and how == "leader":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "astray" and me == 1:
            processes.gather("evaluate", lambda: me)
        if how != "well":
            processes.gather("train", lambda: me)
except UserError as error:
    sys.exit(f"error: {error}")
"""


def run(how: str) -> list[tuple[int, str, str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), how], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, outputs, strict=True)]


def test_what_one_knows_all_know_and_a_failure_ends_both():
    (code, told, errors), (other_code, other_told, other_errors) = run("fails")
    assert told == other_told
    values, first, message, again = json.loads(told.splitlines()[-1])
    assert values[0][0] == 0.1 and values[0][1] == float("-inf") and values[1][0] == 1.1
    assert str(values[1][1]) == "nan" and values[1][2] == "1 ä"
    assert first == "runs/0" and message == "process 1: no judge answers" and again == [0, 1]
    assert (code, other_code) == (1, 1), errors + other_errors
    assert "error: process 1: ValueError: out of luck" in errors and "Traceback" not in errors
    assert "ValueError: out of luck" in other_errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("well", (0, 0), ("", "")),
        ("killed", (1, -9), ("error: process 1 is gone: no sign of life for 6 s", "")),
        ("stuck", (1, 1), ("error: process 1: the disk is full", "error: the disk is full")),
        ("leader", (-9, None), ("", "process 0, which all|leader task")),
        ("astray", (1, 1), ("not in step: .'train', 'evaluate'.",) * 2),
    ],
)
def test_failures(how, codes, said):
    ended = run(how)
    for (code, _, errors), expected, text in zip(ended, codes, said, strict=True):
        assert code == expected if expected is not None else code, ended
        assert re.search(text, errors), errors


def test_one_process_needs_no_one():
    with processes.together():
        assert processes.gather("x", lambda: 3) == [3] and processes.from_first("y", lambda: 4) == 4
        with pytest.raises(UserError, match="^as it is$"):
            processes.gather("z", fail)
    assert processes.is_first()


def fail():
    raise UserError("as it is")
