"""Qwen-Image-Edit's text embeddings against diffusers' pipelines, and the command that caches them."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data import prepare
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import read_records
from cocoedit_jax.data.source import record_dataset
from cocoedit_jax.data.text_cache import TextCache
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.data.text_kind import qwen_kind
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction
from tests.parity.tiny_qwen_text import EDIT, EDIT_PLUS, TinyProcessor, save_tiny_qwen_text
from tests.parity.transformer_cases import SEED
from torch_bridge.qwen_text import QwenTextEncoder, encode_edits, encode_folder

torch = pytest.importorskip("torch", reason="needs the [bridge] extra")
pytest.importorskip("diffusers", reason="needs the [bridge] extra")
pytest.importorskip("transformers", reason="needs the [bridge] extra")

PROMPTS = ["make the circle red", "", "Remove the é square {0}: now!\n" * 4]
AREA = {"edit": 1024 * 1024, "edit_plus": 384 * 384}


@pytest.fixture(scope="module", params=[EDIT, EDIT_PLUS])
def model(request, tmp_path_factory):
    return save_tiny_qwen_text(tmp_path_factory.mktemp("models") / "qwen", SEED, request.param)


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    return save_tiny_qwen_text(tmp_path_factory.mktemp("models") / "plus", SEED + 1, EDIT_PLUS)


def pictures(*sizes):
    rng = np.random.default_rng(SEED)
    coarse = [rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8) for width, height in sizes]
    return [Image.fromarray(array).resize(size) for array, size in zip(coarse, sizes, strict=True)]


def relative(ours, reference):
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def pipeline_of(folder, marked=True):
    """diffusers' pipeline without the parts that text does not need. ``marked``: its text encoder is told which tokens
    are a picture's, as it was by the version of transformers that the pipeline was written for."""
    import diffusers
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "processor")
    if marked:
        plain = encoder.forward

        def forward(input_ids, **options):
            marks = (input_ids == encoder.config.image_token_id).int()
            return plain(input_ids, mm_token_type_ids=marks, **options)

        encoder.forward = forward
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, name)(
        scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, processor=TinyProcessor(tokenizer),
        transformer=None,
    )  # fmt: skip


def resized(pipeline, image, area):
    """As the pipelines' own calls do before they encode."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, image.width / image.height)
    return pipeline.image_processor.resize(image, height, width)


def reference(pipeline, prompts, images):
    """States [L, D] of one batch."""
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(prompts, image=images, device="cpu")
    lengths = [states.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
    return [row[:length].numpy() for row, length in zip(states, lengths, strict=True)]


def test_states_are_those_of_the_pipeline(model):
    """A batch of unequal prompts and pictures; without the marks diffusers' own states differ, so positions count."""
    encoder = QwenTextEncoder(model, device="cpu")
    images = pictures((96, 96), (120, 64), (48, 80))
    ours = encoder(PROMPTS, [[image] for image in images])
    small = [resized(pipeline_of(model), image, AREA[encoder.template]) for image in images]
    for marked in (True, False):
        pipeline = pipeline_of(model, marked)
        if encoder.template == "edit":
            expected = reference(pipeline, PROMPTS, small)
        else:  # takes one instruction at a time
            expected = [reference(pipeline, [p], [image])[0] for p, image in zip(PROMPTS, small, strict=True)]
        assert [states.shape for states in ours] == [states.shape for states in expected]
        assert len({len(states) for states in ours}) == 3
        for states, other in zip(ours, expected, strict=True):
            assert states.dtype == np.float32 and np.ptp(other, axis=0).min() > 0
            assert relative(states, other) < 1e-5 if marked else relative(states, other) > 1e-2


def test_two_pictures(plus):
    encoder = QwenTextEncoder(plus, device="cpu")
    pairs = [pictures((96, 96), (120, 64)), pictures((64, 128), (64, 64))]
    ours = encoder(PROMPTS[:2], pairs)
    pipeline = pipeline_of(plus)
    for prompt, pair, states in zip(PROMPTS[:2], pairs, ours, strict=True):
        (expected,) = reference(pipeline, [prompt], [resized(pipeline, image, AREA["edit_plus"]) for image in pair])
        assert states.shape == expected.shape and relative(states, expected) < 1e-5
    swapped = encoder(PROMPTS[:1], [pairs[0][::-1]])[0]
    assert swapped.shape == ours[0].shape and relative(swapped, ours[0]) > 1e-2


def rotary_positions(ids, grids, token):
    """[3, 1, L]: text advances all three axes by one; a picture of h x w merged patches that starts at p has positions
    (p, p + row, p + column), and what follows it starts at p + max(h, w)."""
    positions, start, at, grids = [], 0, 0, iter(grids)
    while at < len(ids):
        if ids[at] != token:
            positions.append((start, start, start))
            start, at = start + 1, at + 1
            continue
        height, width = next(grids)
        positions += [(start, start + row, start + column) for row in range(height) for column in range(width)]
        start, at = start + max(height, width), at + height * width
    return torch.tensor(positions).T[:, None]


def test_positions(plus):
    """Against the whole model with explicit positions, head and all."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    images = pictures((96, 96), (160, 64))
    processor = TinyProcessor(Qwen2Tokenizer.from_pretrained(plus / "processor"))
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(plus / "text_encoder").eval()
    pipeline = pipeline_of(plus)
    names = "".join(f"Picture {number}: <|vision_start|><|image_pad|><|vision_end|>" for number in (1, 2))
    inputs = processor(
        text=[pipeline.prompt_template_encode.format(names + PROMPTS[0])],
        images=[resized(pipeline, image, AREA["edit_plus"]) for image in images],
        padding=False,
        return_tensors="pt",
    )
    grids = [(height // 2, width // 2) for _, height, width in inputs["image_grid_thw"].tolist()]
    assert grids[0] == (14, 14) and grids[1][0] < grids[1][1]
    positions = rotary_positions(inputs["input_ids"][0].tolist(), grids, whole.config.image_token_id)
    del inputs["mm_token_type_ids"]
    with torch.no_grad():
        output = whole(**inputs, position_ids=positions, output_hidden_states=True)
        expected = output.hidden_states[-1][0]
        assert torch.equal(whole.lm_head(expected), output.logits[0])  # the last states are after the final norm
    ours = QwenTextEncoder(plus, device="cpu")(PROMPTS[:1], [images])[0]
    assert relative(ours, expected[64:].numpy()) < 1e-6


def test_rows_of_a_batch_are_independent(plus):
    encoder = QwenTextEncoder(plus, device="cpu")
    images = [[image] for image in pictures((96, 96), (120, 64), (48, 80))]
    together = encoder(PROMPTS, images)
    for prompt, image, states in zip(PROMPTS, images, together, strict=True):
        np.testing.assert_allclose(encoder([prompt], [image])[0], states, rtol=0, atol=1e-5)
    cut = encoder(PROMPTS, images, max_tokens=256)  # of released training
    for short, states in zip(cut, together, strict=True):
        np.testing.assert_array_equal(short, states[:256])
    half = QwenTextEncoder(plus, device="cpu", dtype="bfloat16")(PROMPTS[:1], images[:1])[0]
    assert half.dtype.name == "bfloat16" and relative(half.astype(np.float32), together[0]) < 0.1


def test_folders_of_other_versions(plus, tmp_path):
    """Published: tensors named as transformers 4.4x did, texts' sizes beside those of pictures, vocab.json and
    merges.txt; and later tensor names."""
    from safetensors.numpy import load_file, save_file

    image = [pictures((96, 96))]
    expected = QwenTextEncoder(plus, device="cpu")(["é red"], image)[0]
    other = tmp_path / "other"
    shutil.copytree(plus, other)
    config = json.loads((plus / "text_encoder" / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    rope_scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling}
    (other / "text_encoder" / "config.json").write_text(json.dumps(flat | {"torch_dtype": "bfloat16"}))
    tokenizer = json.loads((plus / "processor" / "tokenizer.json").read_text())
    (other / "processor" / "tokenizer.json").unlink()
    (other / "processor" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (other / "processor" / "merges.txt").write_text("#version: 0.2\n")
    added = {token.pop("id"): token for token in tokenizer["added_tokens"]}
    (other / "processor" / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072})
    )
    np.testing.assert_array_equal(QwenTextEncoder(other, device="cpu")(["é red"], image)[0], expected)
    path = other / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    assert "visual.patch_embed.proj.weight" in tensors and "model.embed_tokens.weight" in tensors
    newer = {
        f"model.{name}" if name.startswith("visual") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
        if name != "lm_head.weight"  # not needed
    }
    save_file(newer, path, {"format": "pt"})
    np.testing.assert_array_equal(QwenTextEncoder(other, device="cpu")(["é red"], image)[0], expected)
    del newer["model.visual.blocks.0.attn.qkv.weight"]
    save_file(newer, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensor\(s\) of Qwen2_5_VL.* are missing: model.visual.blocks.0.attn.qkv"):
        QwenTextEncoder(other)


def test_unusable_instructions(model, tmp_path):
    encoder = QwenTextEncoder(model, device="cpu")
    image = pictures((64, 64))
    with pytest.raises(UserError, match=r"'x': 0 pictures given; template \w+ takes one"):
        encoder(["x"], [[]])
    if encoder.template == "edit":
        with pytest.raises(UserError, match="2 pictures given; template edit takes one"):
            encoder(["x"], [image * 2])
    with pytest.raises(UserError, match=r"prompt 'a<\|image_pad\|>' contains <\|image_pad\|>"):
        encoder(["a<|image_pad|>"], [image])
    with pytest.raises(UserError, match="picture of 4000x1 px: too narrow"):
        encoder(["x"], [[Image.new("RGB", (4000, 1))]])
    with pytest.raises(UserError, match=r"model_index\.json: no such file; expected the index of QwenImageEdit"):
        QwenTextEncoder(tmp_path)


def test_edits(plus):
    """Embeddings of launch.edit: by prompt and name, the negative prompt beside them, padded with a mask."""
    images = pictures((96, 96), (120, 64))
    named = {"one": images[:1], "both": images}
    asked = [Instruction("red", "one"), Instruction("red", "both"), Instruction("red", "one")]
    text = encode_edits(plus, asked, lambda instruction: named[instruction.image], " ")
    negative = [Instruction(" ", name) for name in named]
    assert all(text.fault(instruction) is None for instruction in [*asked, *negative])
    assert text.fault(Instruction("", "one")) and text.fault(Instruction("red", "two"))
    encoder = QwenTextEncoder(plus)
    for instructions in (asked, negative):
        states, pooled, mask = text.encode({}, text.inputs(instructions))
        assert pooled is None and mask is not None and states.shape[1] % 64 == 0
        for row, length, instruction in zip(states, mask.sum(1), instructions, strict=True):
            (expected,) = encoder([instruction.prompt], [named[instruction.image]])
            assert length == len(expected)
            np.testing.assert_allclose(row[:length], expected, rtol=0, atol=1e-5)


@contextmanager
def counted(monkeypatch):
    """The instructions that are encoded."""
    seen, plain = [], QwenTextEncoder.rows
    with monkeypatch.context() as patch:
        patch.setattr(QwenTextEncoder, "rows", lambda self, asked: seen.extend(asked) or plain(self, asked))
        yield seen


def test_folder(model, tmp_path, monkeypatch, capsys):
    """A data folder is encoded once, as training frames its pictures; what is new or changed is added."""
    data = prepare.write_scenes(tmp_path / "scenes", 4, size=48, seed=SEED)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join([*lines, '{"prompt": "no image"}']))
    framing = Framing(32)
    with counted(monkeypatch) as encoded:
        summary = encode_folder(data, model, framing, batch_size=3, dtype="float32")
    assert "4 distinct prompts and pictures of 4 records" in summary and "4 of them new" in summary
    assert "1 of 5 records cannot be used: 1 x missing field" in capsys.readouterr().err
    template = QwenTextEncoder(model).template
    kind = qwen_kind(template, framing)
    assert len(encoded) == 4 and (data / "text_cache" / f"qwen-{template}-32-center" / "header.json").is_file()

    records = read_records(data, framing, strict=False).records
    source = record_dataset(records, framing)
    asked = [
        Instruction(record.prompt, record.image_name, source[number]["image"]) for number, record in enumerate(records)
    ]
    cache = TextCache(data, kind, text_identity(model))
    found = cache(asked)
    images = [[Image.fromarray(np.rint(instruction.pixels * 255).astype(np.uint8))] for instruction in asked]
    expected = QwenTextEncoder(model, dtype="float32")([instruction.prompt for instruction in asked], images)
    for states, mask, row in zip(found["text"], found["mask"], expected, strict=True):
        assert mask.sum() == len(row)
        np.testing.assert_allclose(states[mask], row, rtol=0, atol=1e-5)

    path = records[1].image
    Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(path)
    changed = record_dataset(records, framing)[1]["image"]
    with pytest.raises(UserError, match=rf"1 picture.s. changed, .*: {asked[1].image}; encode them with: .*=qwen"):
        cache([Instruction(asked[1].prompt, asked[1].image, changed)])
    with counted(monkeypatch) as encoded:
        assert "1 of them new" in encode_folder(data, model, framing)
        assert "0 of them new" in encode_folder(data, model, framing)
    assert [instruction.image for instruction in encoded] == [asked[1].image]
    TextCache(data, kind)([Instruction(asked[1].prompt, asked[1].image, changed)])
