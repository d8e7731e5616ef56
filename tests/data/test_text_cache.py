"""The cache of text embeddings: what comes back, what a killed job leaves, and every way a cache can be wrong."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from cocoedit_jax.data.text_cache import TextCache
from cocoedit_jax.data.text_cache_writer import TextCacheWriter, fill
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.data.text_kind import flux_kind
from cocoedit_jax.errors import UserError
from tests.data.text_cases import FEATURES, FLUX, LENGTH, POOLED, PROMPTS, ROOT, embed, tiny_model, write


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return text_identity(tiny_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def folder(data):
    return FLUX.folder(data)


def assert_holds(cache, instructions=PROMPTS, dtype=np.float32):
    found = cache(instructions)
    rows = embed(instructions, dtype)
    for name in ("text", "pooled"):
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], np.stack([row[name] for row in rows]))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(data, folder, identity, dtype):
    doubled = [*PROMPTS, *PROMPTS]
    assert write(data, identity, doubled, lambda prompts: embed(prompts, dtype), part_entries=10) == len(PROMPTS)
    cache = TextCache(data, FLUX, identity)
    assert len(cache) == len(PROMPTS) and [part.count for part in cache.header.parts] == [10, 10, 3]
    assert_holds(cache, [PROMPTS[22], PROMPTS[0], PROMPTS[10], PROMPTS[0]], dtype)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".npy", ".array_record", ""}


def test_threads_share_a_cache(data, identity):
    write(data, identity, part_entries=5)
    cache = TextCache(data, FLUX)
    rng = np.random.default_rng(0)
    batches = [[PROMPTS[i] for i in rng.integers(0, len(PROMPTS), 6)] for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda batch: assert_holds(cache, batch), batches))


SLOW_WRITER = """
import sys, time, json
from pathlib import Path
from tests.data.text_cases import PROMPTS, embed, write

def encode(prompts):
    print(prompts[0].prompt, flush=True)
    time.sleep(0.1)
    return embed(prompts)

write(Path(sys.argv[1]), json.loads(sys.argv[2]), encode=encode, part_entries=6)
"""


def test_a_killed_job_goes_on_where_it_stopped(data, identity):
    command = [sys.executable, "-c", SLOW_WRITER, str(data), json.dumps(identity)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as job:
        assert job.stdout is not None
        for _ in range(4):  # 12 prompts are in two parts, the next ones are under way
            assert job.stdout.readline().startswith("make circle")
        job.send_signal(signal.SIGKILL)
    assert job.returncode == -signal.SIGKILL
    survived = len(TextCache(data, FLUX))
    assert 0 < survived < len(PROMPTS) and survived % 6 == 0
    assert_holds(TextCache(data, FLUX), PROMPTS[:survived])
    assert write(data, identity) == len(PROMPTS) - survived
    assert write(data, identity) == 0
    assert_holds(TextCache(data, FLUX))


def test_leftovers_of_every_stage_are_overwritten(data, folder, identity):
    write(data, identity, PROMPTS[:9], part_entries=9)
    whole = (folder / "part-00000.array_record").read_bytes()
    (folder / "part-00001.array_record.tmp").write_bytes(whole[:70_000])
    (folder / "part-00001.keys.tmp").write_bytes(b"\x93NUM")
    (folder / "part-00001.array_record").write_bytes(whole[:80_000])  # renamed, but header.json was not written
    (folder / "header.json.tmp").write_text('{"form')
    assert_holds(TextCache(data, FLUX), PROMPTS[:9])
    assert write(data, identity) == len(PROMPTS) - 9
    assert_holds(TextCache(data, FLUX))
    assert not list(folder.glob("*.tmp"))


def test_a_first_part_without_header_is_made_again(data, folder, identity):
    write(data, identity, PROMPTS[:9])
    (folder / "header.json").unlink()
    assert write(data, identity) == len(PROMPTS)
    assert_holds(TextCache(data, FLUX))


def test_a_lost_header_deletes_nothing(data, folder, identity):
    write(data, identity, part_entries=10)
    (folder / "header.json").unlink()
    with pytest.raises(UserError, match=r"has parts but no header\.json"):
        write(data, identity)
    assert len(list(folder.glob("part-*.array_record"))) == 3


def test_prompts_added_later_are_appended(data, folder, identity):
    write(data, identity, PROMPTS[:9])
    before = (folder / "part-00000.array_record").read_bytes()
    assert write(data, identity, PROMPTS) == len(PROMPTS) - 9
    assert (folder / "part-00000.array_record").read_bytes() == before
    cache = TextCache(data, FLUX)
    assert [part.count for part in cache.header.parts] == [9, len(PROMPTS) - 9]
    assert_holds(cache)


def test_parts_are_closed_by_age_too(data, identity):
    write(data, identity, PROMPTS[:3], part_seconds=0.0)
    assert [part.count for part in TextCache(data, FLUX).header.parts] == [1, 1, 1]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_exception_keeps_what_was_encoded(data, identity, stop):
    def encode(prompts):
        if PROMPTS[12] in prompts:
            raise stop
        return embed(prompts)

    with pytest.raises(stop):
        write(data, identity, encode=encode)
    assert_holds(TextCache(data, FLUX), PROMPTS[:12])


def test_values_that_are_not_finite_are_refused(data, identity):
    def encode(prompts):
        rows = embed(prompts)
        for prompt, row in zip(prompts, rows, strict=True):
            row["text"][3, 3] += np.inf if prompt == PROMPTS[5] else 0.0
        return rows

    with pytest.raises(UserError, match="text embedding of 'make circle 5 rød' is not finite in float32"):
        write(data, identity, encode=encode)
    assert_holds(TextCache(data, FLUX), PROMPTS[:4])


def test_shapes_and_dtypes_of_one_cache_agree(data, identity):
    write(data, identity, PROMPTS[:2])

    def refused(message, **changes):
        rows = [embed(PROMPTS[2:3])[0] | changes]
        with pytest.raises(ValueError, match=message):
            write(data, identity, PROMPTS[2:3], lambda prompts: rows)

    refused(r"text: float32 \(8, 39\), expected float32 \(8, 40\)", text=np.ones((LENGTH, 39), np.float32))
    refused(r"text: float32 \(7, 40\), expected float32 \(8, 40\)", text=np.ones((7, FEATURES), np.float32))
    refused("pooled: float64", pooled=np.ones(POOLED))


def test_a_disk_that_is_full(data, folder, identity):
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n" + SLOW_WRITER
    )
    command = [sys.executable, "-c", script, str(data), json.dumps(identity)]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 1 and "part-00000.array_record.tmp: cannot be written" in job.stderr
    assert not (folder / "header.json").exists()
    assert write(data, identity) == len(PROMPTS)
    assert_holds(TextCache(data, FLUX))


def test_other_encoders_lengths_and_dtypes_are_refused(data, identity, tmp_path):
    write(data, identity, PROMPTS[:2])
    other = text_identity(tiny_model(tmp_path / "other", b"other weights"))
    both = f"{identity['digest'][:12]}, expected {other['digest'][:12]}"
    names = r"different: text_encoder/model.safetensors, text_encoder_2/model.safetensors"
    with pytest.raises(UserError, match=f"made by text encoder {both}"):
        write(data, other)
    with pytest.raises(UserError, match="dtype float32, expected bfloat16"):
        write(data, identity, dtype="bfloat16")
    assert_holds(TextCache(data, FLUX), PROMPTS[:2])
    longer = flux_kind(16)
    FLUX.folder(data).rename(longer.folder(data))
    with pytest.raises(UserError, match=rf"made by text encoder {both} \({names}\); max_length 8, expected 16"):
        TextCache(data, longer, other)


def test_missing_prompts_are_named_with_the_command(data, identity):
    write(data, identity, PROMPTS[:19])
    cache = TextCache(data, FLUX)
    assert PROMPTS[18] in cache and PROMPTS[19] not in cache
    command = f"python -m launch.prepare_data --encode=flux --model=MODEL_DIR --out={data} --max_length"
    message = "4 instruction.s. not in the text cache: 'make circle 19 rød', .*, .*, ...; encode"
    with pytest.raises(UserError, match=message) as e:
        cache([*PROMPTS, *PROMPTS])
    assert f"{command}=8" in str(e.value)
    with pytest.raises(UserError, match="no text cache; make it with: python") as e:
        TextCache(data, flux_kind(16))
    assert f"{command}=16" in str(e.value)
    with pytest.raises(UserError, match="instructions: none given"):
        cache([])


@pytest.mark.parametrize("name", ["part-00001.array_record", "part-00001.keys.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_part_is_named_and_made_again(data, folder, identity, name, damage):
    write(data, identity, part_entries=10)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name) as e:
        TextCache(data, FLUX)
    assert "make them again with: python -m launch.prepare_data" in str(e.value)
    with TextCacheWriter(data, FLUX, identity) as writer:
        assert len(writer.notes) == 1 and name in writer.notes[0]
        assert fill(writer, PROMPTS, embed, 4) == 10
    assert_holds(TextCache(data, FLUX))


def test_a_damaged_part_of_dropped_prompts_does_not_stay(data, folder, identity):
    write(data, identity, part_entries=10)
    (folder / "part-00001.array_record").unlink()
    kept = PROMPTS[:10]
    assert write(data, identity, kept) == 0
    assert_holds(TextCache(data, FLUX), kept)
    assert not (folder / "part-00001.keys.npy").exists()


def test_a_changed_byte_is_found_when_it_is_read(data, folder, identity):
    write(data, identity, part_entries=10)
    path = folder / "part-00000.array_record"
    content = bytearray(path.read_bytes())
    place = content.find(embed(PROMPTS[:1])[0]["text"].tobytes())
    content[place + 100] ^= 1
    path.write_bytes(content)
    cache = TextCache(data, FLUX)
    assert_holds(cache, PROMPTS[10:])
    with pytest.raises(UserError, match=r"part-00000\.array_record: damaged .*; delete it, then run: python"):
        cache(PROMPTS[:1])
    path.unlink()
    assert write(data, identity) == 10
    assert_holds(TextCache(data, FLUX))


def test_swapped_parts_are_found(data, folder, identity):
    write(data, identity, PROMPTS[:20], part_entries=10)
    one, two = (folder / f"part-0000{number}.array_record" for number in range(2))
    assert one.stat().st_size == two.stat().st_size
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(UserError, match=r"part-00001\.array_record: damaged \(record of another instruction\)"):
        TextCache(data, FLUX)([PROMPTS[15]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: "{", "not the header of a text cache"),
        (lambda header: [1], "not the header of a text cache"),
        (lambda header: header | {"format_version": 1}, "format_version 1, expected 2; delete .* and encode"),
        (lambda header: header | {"kind": {"encoder": "flux", "size": 3}}, "not the header of a text cache"),
        (lambda header: header | {"features": -1}, "sizes or dtype"),
        (lambda header: header | {"dtype": "float16"}, "sizes or dtype"),
        (lambda header: header | {"parts": [{"name": "../../x", "count": 1, "bytes": 1}]}, "names of parts"),
        (lambda header: header | {"identity": {"digest": "0"}}, "identity: not an identity of text encoders"),
    ],
)
def test_broken_headers(data, folder, identity, change, message):
    write(data, identity, PROMPTS[:2])
    path = folder / "header.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    for use in (lambda: TextCache(data, FLUX), lambda: write(data, identity)):
        with pytest.raises(UserError, match=message) as e:
            use()
        assert str(path) in str(e.value)


def test_one_writer_at_a_time(data, identity):
    with TextCacheWriter(data, FLUX, identity) as writer:
        with pytest.raises(UserError, match="another process is writing"):
            write(data, identity)
        fill(writer, PROMPTS, embed, 4)
    assert write(data, identity) == 0
