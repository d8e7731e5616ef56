"""The same run on Ray Data, on a cluster of this machine's own."""

import json
from dataclasses import replace

import pytest

from cocoedit_jax.annotation import run
from cocoedit_jax.annotation.ray_engine import StageActor
from cocoedit_jax.errors import UserError
from tests.annotation.helpers import contents


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_as_without_ray(done, settings, photos, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    small = {"workers": 1, "cpus": 0.1, "mask_workers": 1, "mask_gpus": 0.0}
    chosen = replace(settings, engine=replace(settings.engine, ray=small))
    out = tmp_path / "out"
    try:
        assert run.annotate(chosen, out, source=str(photos), engine_name="ray") == done[1]
    finally:
        ray.shutdown()
    assert contents(out) == contents(done[0])


def test_what_a_worker_refuses_travels_as_data(settings, photos, tmp_path, monkeypatch):
    """Raised in a worker, it would be tried again and come back as a traceback."""
    with pytest.raises(UserError):  # begins the folder, no more
        run.annotate(settings, tmp_path / "out", source=str(photos), emit_batch="box")
    actor = StageActor(str(tmp_path / "out"), settings, "pixels", "classify")

    def refuse(number, stage):
        raise UserError("no such model")

    rows = {"shard": [0, 1], "tallies": ["{}", '{"fault": "earlier"}']}
    assert json.loads(actor(rows)["tallies"][0])["classify"]["done"] == 2
    monkeypatch.setattr(actor._worker, "run", refuse)
    assert [json.loads(told) for told in actor(rows)["tallies"]] == [{"fault": "no such model"}, {"fault": "earlier"}]


def test_a_missing_ray_is_said(settings, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'cocoedit-jax\[ray\]'"):
        run.annotate(settings, tmp_path / "out", source=str(photos), engine_name="ray")
