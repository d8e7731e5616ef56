"""The cache of text embeddings: what comes back, what a killed job leaves, and every way a cache can be wrong."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cocoedit_jax.data.text_cache import TextCache, cache_folder, prompt_key
from cocoedit_jax.data.text_cache_writer import TextCacheWriter, fill
from cocoedit_jax.data.text_identity import checked_identity, text_identity, write_text_identity
from cocoedit_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LENGTH, FEATURES, POOLED = 8, 40, 12
PROMPTS = [f"make circle {number} rød" for number in range(23)]


def embed(prompts, dtype=np.float32):
    """Embeddings that depend on the prompt alone."""
    rows = [np.random.default_rng(list(prompt_key(prompt))) for prompt in prompts]
    text = np.stack([row.standard_normal((LENGTH, FEATURES), np.float32) for row in rows])
    return text.astype(dtype), np.stack([row.standard_normal(POOLED, np.float32) for row in rows]).astype(dtype)


def tiny_model(folder, content=b"weights"):
    """The files that an identity is made of."""
    for encoder in ("text_encoder", "text_encoder_2"):
        (folder / encoder).mkdir(parents=True)
        (folder / encoder / "config.json").write_text("{}")
        (folder / encoder / "model.safetensors").write_bytes(content)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        (folder / tokenizer).mkdir()
        (folder / tokenizer / "tokenizer_config.json").write_text("{}")
        (folder / tokenizer / "tokenizer.json").write_text('{"model": 1}')
    return folder


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return text_identity(tiny_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def folder(tmp_path):
    return cache_folder(tmp_path / "data", LENGTH)


def write(folder, identity, prompts=PROMPTS, encode=embed, dtype=None, **options):
    with TextCacheWriter(folder, identity, LENGTH, dtype, **options) as writer:
        return fill(writer, prompts, encode, 4)


def assert_holds(cache, prompts=PROMPTS, dtype=np.float32):
    found = cache(prompts)
    for array, expected in zip((found["text"], found["pooled"]), embed(prompts, dtype), strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(folder, identity, dtype):
    doubled = [*PROMPTS, *PROMPTS]
    assert write(folder, identity, doubled, lambda prompts: embed(prompts, dtype), part_prompts=10) == len(PROMPTS)
    cache = TextCache(folder, identity, LENGTH)
    assert len(cache) == len(PROMPTS) and [part.count for part in cache.header.parts] == [10, 10, 3]
    assert_holds(cache, [PROMPTS[22], PROMPTS[0], PROMPTS[10], PROMPTS[0]], dtype)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".npy", ".array_record", ""}


def test_threads_share_a_cache(folder, identity):
    write(folder, identity, part_prompts=5)
    cache = TextCache(folder)
    rng = np.random.default_rng(0)
    batches = [[PROMPTS[i] for i in rng.integers(0, len(PROMPTS), 6)] for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda batch: assert_holds(cache, batch), batches))


SLOW_WRITER = """
import sys, time, json
from pathlib import Path
from tests.data.test_text_cache import PROMPTS, embed, write

def encode(prompts):
    print(prompts[0], flush=True)
    time.sleep(0.1)
    return embed(prompts)

write(Path(sys.argv[1]), json.loads(sys.argv[2]), encode=encode, part_prompts=6)
"""


def test_a_killed_job_goes_on_where_it_stopped(folder, identity):
    command = [sys.executable, "-c", SLOW_WRITER, str(folder), json.dumps(identity)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as job:
        assert job.stdout is not None
        for _ in range(4):  # 12 prompts are in two parts, the next ones are under way
            assert job.stdout.readline().startswith("make circle")
        job.send_signal(signal.SIGKILL)
    assert job.returncode == -signal.SIGKILL
    survived = len(TextCache(folder))
    assert 0 < survived < len(PROMPTS) and survived % 6 == 0
    assert_holds(TextCache(folder), PROMPTS[:survived])
    assert write(folder, identity) == len(PROMPTS) - survived
    assert write(folder, identity) == 0
    assert_holds(TextCache(folder))


def test_leftovers_of_every_stage_are_overwritten(folder, identity):
    write(folder, identity, PROMPTS[:9], part_prompts=9)
    whole = (folder / "part-00000.array_record").read_bytes()
    (folder / "part-00001.array_record.tmp").write_bytes(whole[:70_000])
    (folder / "part-00001.keys.tmp").write_bytes(b"\x93NUM")
    (folder / "part-00001.array_record").write_bytes(whole[:80_000])  # renamed, but header.json was not written
    (folder / "header.json.tmp").write_text('{"form')
    assert_holds(TextCache(folder), PROMPTS[:9])
    assert write(folder, identity) == len(PROMPTS) - 9
    assert_holds(TextCache(folder))
    assert not list(folder.glob("*.tmp"))


def test_a_first_part_without_header_is_made_again(folder, identity):
    write(folder, identity, PROMPTS[:9])
    (folder / "header.json").unlink()
    assert write(folder, identity) == len(PROMPTS)
    assert_holds(TextCache(folder))


def test_a_lost_header_deletes_nothing(folder, identity):
    write(folder, identity, part_prompts=10)
    (folder / "header.json").unlink()
    with pytest.raises(UserError, match=r"has parts but no header\.json"):
        write(folder, identity)
    assert len(list(folder.glob("part-*.array_record"))) == 3


def test_prompts_added_later_are_appended(folder, identity):
    write(folder, identity, PROMPTS[:9])
    before = (folder / "part-00000.array_record").read_bytes()
    assert write(folder, identity, PROMPTS) == len(PROMPTS) - 9
    assert (folder / "part-00000.array_record").read_bytes() == before
    cache = TextCache(folder)
    assert [part.count for part in cache.header.parts] == [9, len(PROMPTS) - 9]
    assert_holds(cache)


def test_parts_are_closed_by_age_too(folder, identity):
    write(folder, identity, PROMPTS[:3], part_seconds=0.0)
    assert [part.count for part in TextCache(folder).header.parts] == [1, 1, 1]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_exception_keeps_what_was_encoded(folder, identity, stop):
    def encode(prompts):
        if PROMPTS[12] in prompts:
            raise stop
        return embed(prompts)

    with pytest.raises(stop):
        write(folder, identity, encode=encode)
    assert_holds(TextCache(folder), PROMPTS[:12])


def test_values_that_are_not_finite_are_refused(folder, identity):
    def encode(prompts):
        text, pooled = embed(prompts)
        text[prompts.index(PROMPTS[5]) if PROMPTS[5] in prompts else slice(0, 0), 3, 3] = np.inf
        return text, pooled

    with pytest.raises(UserError, match="text embedding of 'make circle 5 rød' is not finite in float32"):
        write(folder, identity, encode=encode)
    assert_holds(TextCache(folder), PROMPTS[:4])


def test_shapes_and_dtypes_of_one_cache_agree(folder, identity):
    write(folder, identity, PROMPTS[:2])
    with pytest.raises(ValueError, match=r"text: float32 \(1, 8, 39\), expected float32 \(1, 8, 40\)"):
        write(folder, identity, ["new"], lambda prompts: (embed(prompts)[0][..., 1:], embed(prompts)[1]))
    with pytest.raises(ValueError, match="pooled: float64"):
        write(folder, identity, ["new"], lambda prompts: (embed(prompts)[0], embed(prompts)[1].astype(np.float64)))


def test_a_disk_that_is_full(folder, identity):
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n" + SLOW_WRITER
    )
    command = [sys.executable, "-c", script, str(folder), json.dumps(identity)]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 1 and "part-00000.array_record.tmp: cannot be written" in job.stderr
    assert not (folder / "header.json").exists()
    assert write(folder, identity) == len(PROMPTS)
    assert_holds(TextCache(folder))


def test_other_encoders_lengths_and_dtypes_are_refused(folder, identity, tmp_path):
    write(folder, identity, PROMPTS[:2])
    other = text_identity(tiny_model(tmp_path / "other", b"other weights"))
    both = f"{identity['digest'][:12]}, expected {other['digest'][:12]}"
    names = r"different: text_encoder/model.safetensors, text_encoder_2/model.safetensors"
    with pytest.raises(UserError, match=rf"made by text encoder {both} \({names}\); max_length 8, expected 16"):
        TextCache(folder, other, 16)
    with pytest.raises(UserError, match=f"made by text encoder {both}"):
        write(folder, other)
    with pytest.raises(UserError, match="dtype float32, expected bfloat16"):
        write(folder, identity, dtype="bfloat16")
    assert_holds(TextCache(folder), PROMPTS[:2])


def test_missing_prompts_are_named_with_the_command(folder, identity):
    write(folder, identity, PROMPTS[:19])
    cache = TextCache(folder)
    assert PROMPTS[18] in cache and PROMPTS[19] not in cache
    command = f"python -m launch.prepare_data --encode=flux --model=MODEL_DIR --out={folder.parent.parent} --max_length"
    with pytest.raises(
        UserError, match="4 prompt.s. not in the text cache: 'make circle 19 rød', .*, .*, ...; add"
    ) as e:
        cache([*PROMPTS, *PROMPTS])
    assert command in str(e.value)
    with pytest.raises(UserError, match="no text cache; make it with: python") as e:
        TextCache(folder.with_name("flux-16"), max_length=16)
    assert f"{command}=16" in str(e.value)
    with pytest.raises(UserError, match="prompts: none given"):
        cache([])


@pytest.mark.parametrize("name", ["part-00001.array_record", "part-00001.keys.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_part_is_named_and_made_again(folder, identity, name, damage):
    write(folder, identity, part_prompts=10)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name) as e:
        TextCache(folder)
    assert "make them again with: python -m launch.prepare_data" in str(e.value)
    with TextCacheWriter(folder, identity, LENGTH) as writer:
        assert len(writer.notes) == 1 and name in writer.notes[0]
        assert fill(writer, PROMPTS, embed, 4) == 10
    assert_holds(TextCache(folder))


def test_a_damaged_part_of_dropped_prompts_does_not_stay(folder, identity):
    write(folder, identity, part_prompts=10)
    (folder / "part-00001.array_record").unlink()
    kept = PROMPTS[:10]
    assert write(folder, identity, kept) == 0
    assert_holds(TextCache(folder), kept)
    assert not (folder / "part-00001.keys.npy").exists()


def test_a_changed_byte_is_found_when_it_is_read(folder, identity):
    write(folder, identity, part_prompts=10)
    path = folder / "part-00000.array_record"
    content = bytearray(path.read_bytes())
    place = content.find(embed(PROMPTS[:1])[0].tobytes())
    content[place + 100] ^= 1
    path.write_bytes(content)
    cache = TextCache(folder)
    assert_holds(cache, PROMPTS[10:])
    with pytest.raises(UserError, match=r"part-00000\.array_record: damaged .*; delete it, then run: python"):
        cache(PROMPTS[:1])
    path.unlink()
    assert write(folder, identity) == 10
    assert_holds(TextCache(folder))


def test_swapped_parts_are_found(folder, identity):
    write(folder, identity, PROMPTS[:20], part_prompts=10)
    one, two = (folder / f"part-0000{number}.array_record" for number in range(2))
    assert one.stat().st_size == two.stat().st_size
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(UserError, match=r"part-00001\.array_record: damaged \(record of another prompt\)"):
        TextCache(folder)([PROMPTS[15]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: "{", "not the header of a text cache"),
        (lambda header: [1], "not the header of a text cache"),
        (lambda header: header | {"format_version": 2}, "format_version 2, expected 1"),
        (lambda header: header | {"features": -1}, "sizes or dtype"),
        (lambda header: header | {"dtype": "float16"}, "sizes or dtype"),
        (lambda header: header | {"parts": [{"name": "../../x", "count": 1, "bytes": 1}]}, "names of parts"),
        (lambda header: header | {"identity": {"digest": "0"}}, "identity: not an identity of text encoders"),
    ],
)
def test_broken_headers(folder, identity, change, message):
    write(folder, identity, PROMPTS[:2])
    path = folder / "header.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    for use in (lambda: TextCache(folder), lambda: write(folder, identity)):
        with pytest.raises(UserError, match=message) as e:
            use()
        assert str(path) in str(e.value)


def test_one_writer_at_a_time(folder, identity):
    with TextCacheWriter(folder, identity, LENGTH) as writer:
        with pytest.raises(UserError, match="another process is writing"):
            write(folder, identity)
        fill(writer, PROMPTS, embed, 4)
    assert write(folder, identity) == 0


def test_identity_is_of_contents(tmp_path):
    model = tiny_model(tmp_path / "a")
    identity = text_identity(model)
    assert identity == text_identity(tiny_model(tmp_path / "b"))
    assert len(identity["files"]) == 8
    for name in identity["files"]:
        path = model / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        changed = text_identity(model)
        assert [n for n in changed["files"] if changed["files"][n] != identity["files"][n]] == [name]
        assert changed["digest"] != identity["digest"]
        path.write_bytes(content)
    (model / "text_encoder" / "README.md").write_text("not read by anyone")
    assert text_identity(model) == identity


def test_identity_of_shards(tmp_path):
    model = tiny_model(tmp_path / "model")
    encoder = model / "text_encoder_2"
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00002.safetensors")
    index = encoder / "model.safetensors.index.json"
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"missing text_encoder_2/model-00002-of-00002\.safetensors"):
        text_identity(model)
    (encoder / shards["b"]).write_bytes(b"more")
    assert {f"text_encoder_2/{shard}" for shard in shards.values()} < set(text_identity(model)["files"])
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index of safetensors shards"):
        text_identity(model)


def test_identity_without_encoders(tmp_path):
    identity = text_identity(tiny_model(tmp_path / "model"))
    converted = tmp_path / "converted"
    with pytest.raises(UserError, match="no such folder"):
        text_identity(converted)
    converted.mkdir()
    with pytest.raises(UserError, match=r"missing text_encoder/config\.json, .*tokenizer_2/tokenizer_config\.json"):
        text_identity(converted)
    path = write_text_identity(converted, identity)
    assert text_identity(converted) == identity == checked_identity(identity, "x")
    path.write_text(json.dumps(identity | {"digest": "0" * 64}))
    with pytest.raises(UserError, match=r"text_identity\.json: not an identity .* changed by hand"):
        text_identity(converted)
    path.write_text("nothing")
    with pytest.raises(UserError, match=r"text_identity\.json: not JSON"):
        text_identity(converted)
