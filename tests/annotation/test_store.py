"""The state on disk: laying out the work, whose it is, and the sum over it."""

import json
import shutil
from dataclasses import replace

import pytest

from cocoedit_jax.annotation import engine, run
from cocoedit_jax.annotation import store as store_module
from cocoedit_jax.annotation.gather import check_sum
from cocoedit_jax.annotation.record import Item
from cocoedit_jax.annotation.store import Store
from cocoedit_jax.errors import UserError
from tests.annotation.helpers import contents


@pytest.mark.parametrize("fault", ["lost", "twice", "other"])
def test_a_sum_that_does_not_come_out_is_an_error(done, tmp_path, fault):
    folder = shutil.copytree(done[0], tmp_path / "out")
    path = folder / "rejected.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = {"lost": rows[1:], "twice": [rows[0], *rows], "other": [rows[1], *rows[1:]]}[fault]
    check_sum(Store.open(folder))
    path.write_text("".join(changed), encoding="utf-8")
    said = f"12 in, {12 + len(changed) - len(rows)} out; lost "
    with pytest.raises(RuntimeError, match=said):
        check_sum(Store.open(folder))


def test_shards_of_another_input_are_found_by_the_sum(done, tmp_path):
    """Shards and output agree: one record twice, another one lost."""
    folder = shutil.copytree(done[0], tmp_path / "out")
    store = Store.open(folder)
    first, second = store.read(0)
    store.write(0, [first, replace(second, item=replace(second.item, id=second.item.id + "x"))])
    for name in ("metadata.jsonl", "rejected.jsonl", "dead.jsonl"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(f'"{second.item.id}"', f'"{second.item.id}x"'), encoding="utf-8")
    with pytest.raises(RuntimeError, match="other records than the input"):
        check_sum(store)


def test_who_comes_second_leaves_the_work_of_the_first(done, photos, tmp_path):
    """Two processes lay out the same folder: one may be past a shard before the other has written the manifest."""
    folder = shutil.copytree(done[0] / "shards", tmp_path / "out/shards").parent
    before = (folder / "shards/000001.jsonl").read_bytes()
    store = Store.open(folder)
    (folder / "shards/manifest.json").unlink()
    again = Store.create(folder, run.find_items(str(photos), None), store.manifest["plan"], store.size)
    assert again.total == store.total and (folder / "shards/000001.jsonl").read_bytes() == before


class Killed(BaseException):
    pass


def laid_out(root, count, monkeypatch, dies_at=None, size=2):
    """`count` items and the folder for them, laid out until `dies_at` is written."""
    items = [Item(f"i{n}", f"/in/{n}.png", "p") for n in range(count)]
    whole = store_module.write_whole

    def write(path, data, **options):
        if path.name == dies_at:
            raise Killed
        whole(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_whole", write)
        return items, Store.create(root, items, {}, size)


@pytest.mark.parametrize("dies_at", ["000000.jsonl", "000002.jsonl", "manifest.json"])
def test_killed_while_the_work_is_laid_out(tmp_path, monkeypatch, dies_at):
    """Shards of one input and shards of another would lose records and hold others twice."""
    with pytest.raises(Killed):
        laid_out(tmp_path, 6, monkeypatch, dies_at)
    with pytest.raises(UserError, match="another input .6 records, this one has 7(?s:.*)delete that folder"):
        laid_out(tmp_path, 7, monkeypatch)
    with pytest.raises(UserError, match="shards of 2 records, not 3(?s:.*)delete that folder"):
        laid_out(tmp_path, 6, monkeypatch, size=3)
    items, store = laid_out(tmp_path, 6, monkeypatch)
    assert [a.item for n in range(store.count) for a in store.read(n)] == items
    (tmp_path / "shards/layout.json").unlink()
    (tmp_path / "shards/manifest.json").unlink()
    with pytest.raises(UserError, match="holds shards, but no layout.json"):
        laid_out(tmp_path, 6, monkeypatch)


def test_of_two_inputs_at_once_one_is_refused(tmp_path, monkeypatch):
    """Another process writes its manifest first."""
    whole = store_module.write_whole

    def overtaken(path, data, **options):
        if path.name == "manifest.json":
            whole(path, json.dumps(json.loads(data) | {"input": "other"}).encode())
        whole(path, data, **options)

    monkeypatch.setattr(store_module, "write_whole", overtaken)
    with pytest.raises(UserError, match="another input"):
        laid_out(tmp_path, 6, monkeypatch)


def test_other_work_in_a_folder_is_refused(done, settings, photos, tmp_path, monkeypatch):
    folder, outcome = done
    other = replace(settings, mask=replace(settings.mask, fill_holes=False))
    with pytest.raises(UserError, match="mask.fill_holes: True, now False"):
        run.annotate(other, folder)
    with pytest.raises(UserError, match="another input"):
        run.annotate(settings, folder, source=str(photos), prompt="make it blue")
    with pytest.raises(UserError, match="give --input="):
        run.annotate(settings, tmp_path / "new")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").touch()
    with pytest.raises(UserError, match="holds thesis.tex, but no annotation"):
        run.annotate(settings, tmp_path / "foreign", source=str(photos))
    # What is finished is gathered again; no model is asked.
    monkeypatch.setattr(engine, "make_model", None)
    before = contents(folder)
    assert run.annotate(settings, folder, source=str(photos)) == outcome and contents(folder) == before
    shard = folder / "shards/000001.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(UserError, match="000001.jsonl: 1 records, expected 2"):
        run.annotate(settings, folder)
    shard.write_bytes(whole)
