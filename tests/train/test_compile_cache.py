"""A second start of the same run compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
from pathlib import Path
from tests.train.tiny import tiny_config

def get_config():
    settings = {"train.steps": 1, "evaluation.scenes": 4, "evaluation.batch_size": 4, "mesh.layout": "fsdp",
                "mesh.data": 1, "mesh.fsdp": 2, "train.layout": "tensor:data=1,tensor=2"}
    return tiny_config(Path(%r), Path(%r), **settings)
"""
COUNTED = """
import atexit, collections, json, runpy, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
atexit.register(lambda: print("EVENTS" + json.dumps(events)))
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tiny_base, tiny_data, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG % (str(tiny_base), str(tiny_data)))
    cache = tmp_path / "xla"
    kept = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}

    def start(name: str, *flags: str) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, f"--config={tmp_path / 'config.py'}", f"--run={tmp_path / name}", *flags],
            cwd=ROOT, env=os.environ | kept | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("EVENTS")[2])

    first = start("first", f"--xla_cache={cache}")
    written = sorted(cache.iterdir())
    second = start("second", f"--xla_cache={cache}")
    assert first["cache_misses"] > 10 and written
    assert second.get("cache_misses", 0) == 0 and second["cache_hits"] >= first["cache_misses"]
    assert "cache_hits" not in start("third", "--xla_cache=off")
    assert [f for f in sorted(cache.iterdir()) if f not in written] == []
