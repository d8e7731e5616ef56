"""FLUX text embeddings against diffusers' pipeline, and the command that caches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cocoedit_jax.data import prepare
from cocoedit_jax.data.check import check_folder
from cocoedit_jax.data.records import read_metadata
from cocoedit_jax.data.text_cache import TextCache
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.data.text_kind import flux_kind
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction
from tests.parity.tiny_kontext import save_tiny_kontext
from tests.parity.transformer_cases import SEED
from torch_bridge.flux_text import FluxTextEncoder, encode_folder

torch = pytest.importorskip("torch", reason="needs the [bridge] extra")
pytest.importorskip("diffusers", reason="needs the [bridge] extra")
pytest.importorskip("transformers", reason="needs the [bridge] extra")

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["make the circle red", "Remove the é square: now!", "a " * 60, "word " * 150, "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_kontext(tmp_path_factory.mktemp("models") / "kontext", SEED)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six scenes, the last two with the prompt of the first, and a line that cannot be read."""
    folder = prepare.write_scenes(tmp_path_factory.mktemp("data") / "scenes", 6, size=32, seed=SEED)
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] = f"{row['prompt']} {number if number < 4 else 0}"
    rows[4]["prompt"] = rows[5]["prompt"] = rows[0]["prompt"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "no image"}\n')
    return folder


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "launch.prepare_data", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_length", [128, 512])
def test_embeddings_are_those_of_the_pipeline(model, max_length, dtype):
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True)
    with torch.no_grad():
        *expected, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=max_length)
    text, pooled = FluxTextEncoder(model, max_length, dtype=dtype, device="cpu")(PROMPTS)
    assert text.shape[:2] == (len(PROMPTS), max_length) and text.dtype.name == pooled.dtype.name == dtype
    for ours, tensor in zip((text, pooled), expected, strict=True):
        assert tensor is not None
        reference = tensor.float().numpy()
        assert np.ptp(reference, axis=0).min() > 0  # every number depends on the prompt
        np.testing.assert_array_equal(ours.astype(np.float32), reference)


def test_rows_of_a_batch_are_independent(model):
    encoder = FluxTextEncoder(model, 128, device="cpu")
    text, pooled = encoder(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        np.testing.assert_allclose(alone[0][0], text[row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(alone[1][0], pooled[row], rtol=0, atol=1e-5)


def test_tensor_names_of_published_checkpoints(model, tmp_path):
    """Older transformers wrote CLIP's names with a prefix and with position ids, and T5's embedding twice."""
    from safetensors.numpy import load_file, save_file

    older = save_tiny_kontext(tmp_path / "older", SEED)
    clip_path, t5_path = (older / name / "model.safetensors" for name in ("text_encoder", "text_encoder_2"))
    clip = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(clip_path).items()}
    save_file(clip | {"text_model.embeddings.position_ids": np.arange(77)[None]}, clip_path, {"format": "pt"})
    t5 = load_file(t5_path)
    save_file(t5 | {"encoder.embed_tokens.weight": t5["shared.weight"].copy()}, t5_path, {"format": "pt"})
    expected = FluxTextEncoder(model, 128, device="cpu")(PROMPTS)
    for ours, reference in zip(FluxTextEncoder(older, 128, device="cpu")(PROMPTS), expected, strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_cut_prompts_are_counted_and_named(model):
    encoder = FluxTextEncoder(model, 128, device="cpu")
    counts = encoder.count_tokens(PROMPTS)
    assert counts.shape == (len(PROMPTS), 2) and counts[4].tolist() == [3, 3]  # CLIP: start x end; T5: ▁ x end
    assert encoder.describe_cuts(["x"]) == []
    clip, t5 = encoder.describe_cuts(PROMPTS)
    assert clip.startswith("1 of 5 prompts are cut to 77 CLIP tokens; the longest has 602: 'word word")
    assert t5.startswith(f"1 of 5 prompts are cut to 128 T5 tokens; the longest has {counts[3, 1]}: 'word word")
    # What is cut off has no influence.
    longer = encoder(["word " * 151])
    np.testing.assert_allclose(longer[0], encoder(["word " * 150])[0], rtol=0, atol=1e-5)


def test_unusable_models(model, tmp_path):
    with pytest.raises(UserError, match="no such folder; expected a diffusers model folder on this machine"):
        FluxTextEncoder("black-forest-labs/FLUX.1-Kontext-dev", 128)
    with pytest.raises(UserError, match="max_length: 513 given"):
        FluxTextEncoder(model, 513)
    with pytest.raises(UserError, match="dtype: 'float16' given, expected one of bfloat16, float32"):
        FluxTextEncoder(model, 128, dtype="float16")
    from safetensors.numpy import load_file, save_file

    broken = save_tiny_kontext(tmp_path / "broken", SEED)
    path = broken / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    dropped = next(name for name in tensors if name.endswith("SelfAttention.q.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"text_encoder_2: 1 tensor\(s\) of T5EncoderModel are missing: {dropped}"):
        FluxTextEncoder(broken, 128)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="text_encoder_2: cannot be loaded as T5EncoderModel"):
        FluxTextEncoder(broken, 128)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"missing text_encoder_2/model\.safetensors"):
        FluxTextEncoder(broken, 128)


def test_command(model, data):
    """Twice the same command encodes once; training reads what the encoder returned."""
    options = (f"--model={model}", f"--out={data}", "--encode=flux", "--encode_batch=3", "--dtype=bfloat16")
    first = command(*options)
    assert first.returncode == 0, first.stderr
    assert "4 distinct prompts of 6 records" in first.stdout and "4 of them new" in first.stdout
    assert "1 of 7 records cannot be used: 1 x missing field" in first.stderr
    folder = flux_kind(128).folder(data)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = command(*options[:3])  # the dtype is the cache's
    assert again.returncode == 0 and "0 of them new" in again.stdout, again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    cache = TextCache(data, flux_kind(128), text_identity(model))
    prompts = list(dict.fromkeys(record.prompt for record in read_metadata(data)[0]))
    text, pooled = FluxTextEncoder(model, 128, dtype="bfloat16", device="cpu")(prompts[:3])
    found = cache([Instruction(prompt) for prompt in prompts])
    np.testing.assert_array_equal(found["text"][:3].view(np.uint16), text.view(np.uint16))
    np.testing.assert_array_equal(found["pooled"][:3].view(np.uint16), pooled.view(np.uint16))
    # The folder is still a data folder.
    with pytest.raises(UserError, match=r"1 of 7 records cannot be used\n\n1 problems: 1 x missing field"):
        check_folder(data, 32)

    with pytest.raises(UserError, match="dtype bfloat16, expected float32"):
        encode_folder(data, model, 128, dtype="float32")


def test_a_new_prompt_is_added_and_a_cut_one_reported(model, tmp_path, capsys):
    data = prepare.write_scenes(tmp_path / "data", 2, size=32, seed=SEED)
    encode_folder(data, model, 128, batch_size=1)
    row = json.loads((data / "metadata.jsonl").read_text().splitlines()[0]) | {"id": "long", "prompt": "word " * 150}
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    capsys.readouterr()
    assert "1 of them new" in encode_folder(data, model, 128)
    assert "1 of 1 prompts are cut to 128 T5 tokens" in capsys.readouterr().err
    cache = TextCache(data, flux_kind(128))
    assert [part.count for part in cache.header.parts] == [2, 1] and Instruction(row["prompt"]) in cache
    other = save_tiny_kontext(tmp_path / "other", SEED + 1)
    with pytest.raises(UserError, match="made by text encoder"):
        encode_folder(data, other, 128)


def test_without_pytorch_the_error_is_one_line(data, model, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    job = command("--encode=flux", f"--model={model}", f"--out={data}", PYTHONPATH=path)
    assert job.returncode == 1 and job.stderr.count("\n") == 1
    assert job.stderr.startswith("error: torch") and "pip install 'cocoedit-jax[bridge]'" in job.stderr
