"""Data sets and folders as items: each layout as it is published, in small, with real photographs; and what is odd."""

import builtins
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation.record import Item
from cocoedit_jax.annotation.run import find_items
from cocoedit_jax.annotation.sources import FORMATS, detect, omniedit, read_items, release, unpack_source
from cocoedit_jax.annotation.sources.omniedit import unpack_omniedit
from cocoedit_jax.annotation.store import check_items
from cocoedit_jax.data.records import record_id
from cocoedit_jax.errors import UserError

photos = pytest.importorskip("skimage.data", reason="needs scikit-image's packaged photographs")


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


CAT, CUP = encoded(photos.chelsea()), encoded(photos.coffee(), "JPEG")


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --- plain ------------------------------------------------------------------------------------------------------------


def test_jsonl(tmp_path):
    path = lines(
        tmp_path / "in/list.jsonl",
        {"image": "a.png", "prompt": " make it red "},
        "",
        {
            "image": str(tmp_path / "b.png"),
            "prompt": "p",
            "id": 7,
            "edit_type": "add",
            "source": "s",
            "license": "CC0",
        },
    )
    first, second = read_items(path)
    assert first.image == str(tmp_path / "in/a.png") and first.prompt == "make it red" and first.source == ""
    assert first.id == record_id("a.png", " make it red ")
    assert (second.id, second.image, second.edit_type) == ("7", str(tmp_path / "b.png"), "add")
    assert second.source == "s" and second.extra == {"license": "CC0"}
    assert detect(path) == "jsonl"


def test_faulty_lines_are_named_together(tmp_path):
    good = {"image": "a.png", "prompt": "p", "id": "x"}
    rows = [good, "{", [1], {"image": "a.png"}, good | {"prompt": "\ud800", "id": "y"}, good, good | {"id": True}]
    with pytest.raises(UserError) as caught:
        read_items(lines(tmp_path / "list.jsonl", *rows))
    text = str(caught.value)
    assert "6 of 7 cannot be used" in text
    for number, said in ((2, "Expecting"), (3, "a JSON list"), (4, "field 'prompt' is None"), (5, "surrogates"),
                         (6, "id 'x' was used on line 1"), (7, "field 'id' is True")):  # fmt: skip
        assert any(line.startswith(f"  line {number}: ") and said in line for line in text.splitlines()), said
    with pytest.raises(UserError, match="nothing to annotate, expected one JSON object per line"):
        read_items(lines(tmp_path / "empty.jsonl"))
    many = lines(tmp_path / "many.jsonl", *["{"] * 30)
    with pytest.raises(UserError, match=r"30 of 30 cannot be used(?s:.*)\.\.\. and 10 more"):
        read_items(many)


def test_what_no_file_of_ours_can_hold_is_the_lines_own_fault(tmp_path):
    good = {"image": "a.png", "prompt": "p", "edit_type": "add"}
    rows = [good | {"edit_type": "\ud800"}, good | {"note": ["\ud800"]}, good | {"note": float("nan")}, good]
    with pytest.raises(UserError, match="3 of 4 cannot be used:\n  line 1: (?s:.*)line 2: (?s:.*)line 3: Out of range"):
        read_items(lines(tmp_path / "list.jsonl", *rows))
    with pytest.raises(UserError, match=r"item 2, 'b\\udcff', cannot be written: 'utf-8' codec"):
        check_items([Item("a", "a.png", "p"), Item("b\udcff", "b.png", "p")])


def test_a_folder_with_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.png", "sub/a.JPG", ".hidden/c.png"):
        (tmp_path / name).write_bytes(CAT)
    (tmp_path / "b.txt").write_text("make it red\n\n make it blue \nmake it red\n")
    (tmp_path / "sub/a.txt").write_text("\ufeffremove the cat")
    items = read_items(tmp_path)
    assert detect(tmp_path) == "folder"
    assert [(item.image, item.prompt) for item in items] == [
        (str(tmp_path / "b.png"), "make it red"),
        (str(tmp_path / "b.png"), "make it blue"),
        (str(tmp_path / "sub/a.JPG"), "remove the cat"),
    ]
    assert items[2].id == record_id("sub/a.JPG", "remove the cat")
    (tmp_path / "c.png").write_bytes(CAT)
    (tmp_path / "d.png").write_bytes(CAT)
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(UserError) as caught:
        read_items(tmp_path)
    assert "c.png: no c.txt beside it" in str(caught.value) and "d.png: d.txt is empty" in str(caught.value)


def test_pictures_that_are_not_read_are_said(tmp_path, capsys):
    """A folder from a telephone is annotated in part, not in silence."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.png", "b.HEIC", "sub/c.heic", "sub/d.gif", "e.avif", ".hidden/f.gif", "notes.md"):
        (tmp_path / name).write_bytes(CAT)
    (tmp_path / "a.txt").write_text("make it red")
    said = f"{tmp_path}: 1 x .avif, 1 x .gif, 2 x .heic left out; convert what is to be annotated to one of .png, .jpg"
    for prompt in (None, "make it blue"):
        assert [item.image for item in find_items(str(tmp_path), prompt)] == [str(tmp_path / "a.png")]
        out = capsys.readouterr().out
        assert out.startswith(said) and out.count("\n") == 1
    lines(tmp_path / "prompts.jsonl", {"image": "a.png", "prompt": "p"})
    assert len(find_items(str(tmp_path), None)) == 1 and not capsys.readouterr().out  # a list says what is wanted
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"2 x \.heic left out; convert"):
        read_items(tmp_path)


def test_a_folder_with_prompts_and_a_data_folder(tmp_path):
    lines(tmp_path / "a/prompts.jsonl", {"image": "x.png", "prompt": "p"})
    assert detect(tmp_path / "a") == "folder" and read_items(tmp_path / "a")[0].image == str(tmp_path / "a/x.png")
    row = {"image": "x.png", "mask": "m.png", "prompt": "p", "edit_type": "add", "source": "s", "n": 1}
    lines(tmp_path / "b/metadata.jsonl", row)
    (item,) = read_items(tmp_path / "b")
    assert detect(tmp_path / "b") == "data" and item.extra == {"n": 1, "mask": str(tmp_path / "b/m.png")}
    assert (item.source, item.edit_type) == ("s", "add")


def test_what_is_not_known_lists_what_is(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(UserError) as caught:
            detect(path)
        assert all(f"  {name}: " in str(caught.value) for name in FORMATS)
    with pytest.raises(UserError, match="/gone: no such file or folder; expected CoCoEdit-40K: metadata.jsonl beside"):
        unpack_source("cocoedit-40k", "/gone", tmp_path / "out")


def test_cocoedit_is_recognised(tmp_path):
    lines(tmp_path / "metadata.jsonl", {"image": "x.png", "mask": "m.png", "prompt": "p"})
    (tmp_path / "images_part1.zip_aa").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack it first: python -m launch.prepare_data --source=cocoedit-40k --from="):
        read_items(tmp_path)


# --- OmniEdit ---------------------------------------------------------------------------------------------------------


def omni(path, rows):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    base = {"task": "removal", "sc_score_1": 9, "pq_score": 8, "o_score": 8.5, "sc_reasoning": "long"}
    full = [
        base | {"omni_edit_id": f"task_{n}", "edited_prompt_list": prompts, "src_img": {"bytes": data, "path": "x"},
                "edited_img": {"bytes": b"not read", "path": "y"}}
        for n, (prompts, data) in enumerate(rows)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(full), path, row_group_size=2)


@pytest.fixture
def omni_folder(tmp_path):
    root = tmp_path / "download"
    omni(
        root / "data/train-00000-of-00002.parquet", [(["remove the cat", "no cat"], CAT), (["x"], b"broken"), ([], CAT)]
    )
    omni(root / "data/train-00001-of-00002.parquet", [(["add a spoon"], CUP), (["paint the cat", ""], CAT)])
    return root


def test_omniedit(omni_folder, tmp_path):
    assert detect(omni_folder) == "omniedit"
    with pytest.raises(UserError, match="unpack it first: .* --source=omniedit"):
        read_items(omni_folder)
    summary = unpack_source("omniedit", omni_folder, tmp_path / "out")
    assert summary.startswith("5 rows: 3 instructions, 2 left out")
    assert "1 x no readable source picture" in summary and "1 x no instruction" in summary
    items = read_items(tmp_path / "out")
    assert [(item.id, item.prompt) for item in items] == [
        ("train-00000-of-00002-000000", "remove the cat"),
        ("train-00001-of-00002-000000", "add a spoon"),
        ("train-00001-of-00002-000001", "paint the cat"),
    ]
    first, second, third = items
    assert first.image == third.image and first.image.endswith(".png") and second.image.endswith(".jpg")
    with open(first.image, "rb") as file:
        assert file.read() == CAT
    assert first.edit_type == "removal" and first.source == "OmniEdit"
    assert first.extra == {"license": "MIT", "omni_edit_id": "task_0", "other_prompts": ["no cat"],
                           "sc_score_1": 9, "pq_score": 8, "o_score": 8.5}  # fmt: skip
    left = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in left] == [
        ("train-00000-of-00002", 1),
        ("train-00000-of-00002", 2),
    ]
    assert len(list((tmp_path / "out/images").rglob("*.*"))) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "left_out.jsonl", "prompts.jsonl"]
    with pytest.raises(UserError, match="not empty"):
        unpack_omniedit(omni_folder, tmp_path / "out")
    unpack_omniedit(omni_folder, tmp_path / "out", overwrite=True)


def test_omniedit_goes_on_where_it_was_stopped(omni_folder, tmp_path, monkeypatch):
    whole = unpack_omniedit(omni_folder, tmp_path / "whole")
    rows, seen = omniedit._rows, []

    def stops(path):
        seen.append(path.stem)
        for number, row in enumerate(rows(path)):
            if len(seen) == 2 and number == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(omniedit, "_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        unpack_omniedit(omni_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert unpack_omniedit(omni_folder, tmp_path / "out").splitlines()[:-1] == whole.splitlines()[:-1]
    assert seen == ["train-00000-of-00002", "train-00001-of-00002", "train-00001-of-00002"]
    assert (tmp_path / "out/prompts.jsonl").read_text() == (tmp_path / "whole/prompts.jsonl").read_text()


def test_damaged_and_other_parquet_files(omni_folder, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = omni_folder / "data/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="train-00001-of-00002.parquet: not a whole parquet file"):
        unpack_omniedit(omni_folder, tmp_path / "out")
    parquet.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(UserError, match="no column edited_prompt_list, omni_edit_id, src_img"):
        unpack_omniedit(omni_folder, tmp_path / "out")
    with pytest.raises(UserError, match="columns text; expected one of"):
        detect(path)
    assert not (tmp_path / "out").exists()


def test_without_pyarrow(tmp_path, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(release.importlib, "import_module", lambda name: real("no_such_module_" + name))
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs pyarrow .*pip install 'cocoedit-jax\[parquet\]'"):
        detect(tmp_path)


# --- ImgEdit ----------------------------------------------------------------------------------------------------------


def tar_pieces(folder, name, files, size):
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    for number, start in enumerate(range(0, len(data), size)):
        (folder / f"{name}.tar.split.{number:03d}").write_bytes(data[start : start + size])


def turn(path, prompt):
    return {"input_images": [path], "output_images": [path.replace("original", "result")], "prompt": prompt}


@pytest.fixture
def imgedit_folder(tmp_path):
    """add (in pieces), hybrid (archives under another name), two turns, and rows that cannot be used."""
    root = tmp_path / "download"
    dot = encoded(np.zeros((9, 9, 3), np.uint8))
    add = {"results_add_part0/1/original.png": CAT, "results_add_part0/1/result.png": dot}
    tar_pieces(root / "Singleturn", "add_part0", add, 100_000)
    tar_pieces(root / "Singleturn", "results_hybrid_part0", {"./results_hybrid_part0/2/original.png": CUP}, 100_000)
    tar_pieces(root / "Multiturn", "content_memory_part0", {"results_memory/3/origin_0.png": CAT}, 10**9)
    lines(
        root / "Parquet/add_part0.jsonl",
        turn("results_add_part0/1/original.png", "add a hat"),
        {"input_images": ["a.png", "b.png"], "prompt": "combine"},
        {"input_images": [], "prompt": "x"},
        turn("results_add_part0/1/original.png", " "),
    )
    lines(root / "Parquet/hybrid_part0.jsonl", turn("results_compose_part0/2/original.png", "remove and add"))
    turns = [turn("results_memory/3/origin_0.png", "paint it"), turn("results_memory/3/origin_1.png", "undo that")]
    (root / "Parquet/content_memory_part0.json").write_text(json.dumps([{"data": turns}]))
    return root


def test_imgedit(imgedit_folder, tmp_path):
    assert detect(imgedit_folder) == "imgedit"
    summary = unpack_source("imgedit", imgedit_folder, tmp_path / "out")
    assert summary.startswith("6 rows: 3 instructions, 3 left out") and "1 x several input pictures" in summary
    items = {item.id: item for item in read_items(tmp_path / "out")}
    assert {name: (item.prompt, item.edit_type) for name, item in items.items()} == {
        "add_part0-000000": ("add a hat", "add"),
        "content_memory_part0-000000": ("paint it", "content_memory"),
        "hybrid_part0-000000": ("remove and add", "hybrid"),
    }
    for name, data in (("add_part0", CAT), ("content_memory_part0", CAT), ("hybrid_part0", CUP)):
        with open(items[f"{name}-000000"].image, "rb") as file:
            assert file.read() == data
    pictures = [path for path in (tmp_path / "out/images").rglob("*") if path.is_file()]
    assert len(pictures) == 3  # the edited ones are not unpacked


def test_imgedit_as_parquet(imgedit_folder, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = imgedit_folder / "Parquet/add_part0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][:1]
    path.unlink()
    parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    assert unpack_source("imgedit", imgedit_folder, tmp_path / "out").startswith("3 rows: 3 instructions, 0 left out")


def test_imgedit_with_archives_missing(imgedit_folder, tmp_path):
    for piece in (imgedit_folder / "Singleturn").glob("add_part0*"):
        piece.unlink()
    with pytest.raises(UserError, match="pictures of 1 of 3 rows are neither there nor in the 2 tar archives"):
        unpack_source("imgedit", imgedit_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = unpack_source("imgedit", imgedit_folder, tmp_path / "out", partial=True)
    assert summary.startswith("6 rows: 2 instructions, 4 left out") and "1 x picture not there" in summary
    # Pictures that lie open are taken as they are.
    place = imgedit_folder / "Singleturn/results_add_part0/1/original.png"
    place.parent.mkdir(parents=True)
    place.write_bytes(CAT)
    assert unpack_source("imgedit", imgedit_folder, tmp_path / "all").startswith("6 rows: 3 instructions")


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/secret.png", "..\\secret.png"])
def test_imgedit_names_that_lead_out(imgedit_folder, tmp_path, name):
    lines(imgedit_folder / "Parquet/add_part0.jsonl", turn(name, "add a hat"))
    with pytest.raises(UserError, match="add_part0.jsonl row 0: input_images .* leads out of the folder"):
        unpack_source("imgedit", imgedit_folder, tmp_path / "out")
