"""The same run on Ray Data, on a cluster of this machine's own."""

import json
from dataclasses import replace

import pytest

from cocoedit_jax.annotation import run
from cocoedit_jax.annotation.ray_engine import StageActor, shares
from cocoedit_jax.errors import UserError
from tests.annotation.helpers import contents


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_as_without_ray(done, settings, photos, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    out = tmp_path / "out"
    try:
        assert run.annotate(settings, out, source=str(photos), engine_name="ray") == done[1]
    finally:
        ray.shutdown()
    assert contents(out) == contents(done[0])


def test_what_workers_reserve_is_there(settings):
    """Else Ray waits for it, and says nothing."""
    sam = replace(settings, mask=replace(settings.mask, segmenter="sam2"))
    assert settings.mask.segmenter == "box" and settings.engine.ray["mask_gpus"] == 1
    cpus, gpus = shares(settings, {"CPU": 2.0})
    assert gpus == 0 and 0 < cpus and cpus * (5 * 2 + 1) <= 2
    assert shares(sam, {"CPU": 64.0, "GPU": 1.0}) == (1.0, 1.0)
    with pytest.raises(UserError, match="1 mask workers want 1 GPUs, the cluster has 0; set --config.engine.ray.mask"):
        shares(sam, {"CPU": 64.0})


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
