"""Qwen2.5-VL's inputs against transformers: expansion, padding and M-RoPE positions."""

import json

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.errors import UserError
from tests.parity.flux_cases import SEED
from tests.parity.tiny_qwen_text import tiny_image_processor, tiny_text_encoder, tiny_tokenizer
from torch_bridge.qwen_vl import QwenVLProcessor, load_qwen_vl, mrope_positions

torch = pytest.importorskip("torch", reason="needs the [bridge] extra")
pytest.importorskip("transformers", reason="needs the [bridge] extra")

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
RNG = np.random.default_rng(SEED)


def picture(width, height):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = tiny_tokenizer()
    tiny_text_encoder(tokenizer, np.random.default_rng(SEED)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_qwen_vl(folder, "float32", "cpu")


@pytest.fixture(scope="module")
def processor(folder):
    return QwenVLProcessor.load(folder)


@pytest.fixture(scope="module")
def prompts(processor):
    return [
        processor(f"before {PICTURE} after {PICTURE} which?", [picture(112, 56), picture(60, 200)]),
        processor("no picture at all"),
        processor(f"{PICTURE}, a longer text at the end of it", [picture(84, 84)]),
    ]


@torch.inference_mode()
def last_logits(model, inputs):
    return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].numpy()


def test_a_picture_has_one_token_per_merged_patch(processor, prompts):
    ids = prompts[0].input_ids
    assert prompts[0].image_grid_thw.tolist() == [[1, 4, 8], [1, 14, 4]]
    assert (ids == processor.image_token_id).sum() == 2 * 4 + 7 * 2
    assert len(prompts[1].pixel_values) == 0 and not (prompts[1].input_ids == processor.image_token_id).any()
    with pytest.raises(ValueError, match=r"1 pictures for 2 <\|image_pad\|>"):
        processor(PICTURE * 2, [picture(56, 56)])


def test_positions_are_those_of_transformers(model, processor, prompts):
    inputs = processor.batch(prompts, "cpu")
    expected, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    np.testing.assert_array_equal(inputs["position_ids"].numpy(), expected.numpy())
    # Written out: two of text, a picture of 2 x 3 merged patches, one of text.
    found = mrope_positions(np.asarray([0, 0, 1, 1, 1, 1, 1, 1, 0], bool), np.asarray([[1, 4, 6]]))
    assert found.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]


@pytest.mark.parametrize("grids", [[[1, 4, 4]], [[1, 4, 8]], [], [[1, 4, 6], [1, 2, 2]]])
def test_positions_need_as_many_tokens_as_the_pictures_have(grids):
    with pytest.raises(ValueError, match="picture tokens than the pictures have"):
        mrope_positions(np.asarray([0, 0, 1, 1, 1, 1, 1, 1, 0], bool), np.asarray(grids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, processor, prompts, side):
    inputs = processor.batch(prompts, "cpu", padding_side=side)
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits.numpy()
    for row, prompt in enumerate(prompts):
        alone = last_logits(model, processor.batch([prompt], "cpu"))[0]
        last = int(inputs["attention_mask"][row].nonzero().max())
        np.testing.assert_allclose(logits[row, last], alone, rtol=1e-4, atol=1e-5)
        assert np.ptp(alone) > 0.01


def test_positions_matter_and_the_model_makes_the_same(model, processor, prompts):
    inputs = processor.batch(prompts[:1], "cpu")
    explicit = last_logits(model, inputs)
    positions = inputs.pop("position_ids")
    np.testing.assert_allclose(last_logits(model, inputs), explicit, rtol=0, atol=1e-6)
    model.model.rope_deltas = None
    plain = last_logits(model, inputs | {"position_ids": torch.arange(positions.shape[-1]).expand_as(positions)})
    assert np.abs(plain - explicit).max() > 1e-3


def test_folders_as_published(folder, model, processor, prompts, tmp_path):
    """Qwen2.5-VL's files have the text model's settings at the top of config.json, M-RoPE under its old name, tensors
    without `language_model` in their names, and the limits of pictures as `min_pixels` and `max_pixels`.
    """
    from safetensors.numpy import load_file, save_file

    def older(name):
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        return name.removeprefix("language_model.")

    tensors = {older(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {name.partition(".")[0] for name in tensors} == {"model", "visual", "lm_head"}
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters", None) or text.pop("rope_scaling")
    text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    published = text | config | {"vocab_size": text["vocab_size"], "model_type": "qwen2_5_vl"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    for path in folder.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    inputs = processor.batch(prompts, "cpu")
    found = last_logits(load_qwen_vl(tmp_path, "float32", "cpu"), inputs)
    np.testing.assert_array_equal(found, last_logits(model, inputs))
    image = picture(300, 200)
    again, expected = (p(PICTURE, [image]) for p in (QwenVLProcessor.load(tmp_path), processor))
    np.testing.assert_array_equal(again.pixel_values, expected.pixel_values)
    np.testing.assert_array_equal(again.input_ids, expected.input_ids)
    tiny = Image.new("RGB", (8, 8))
    assert QwenVLProcessor.load(tmp_path)(PICTURE, [tiny]).image_grid_thw.tolist() == [[1, 4, 4]]  # 56 x 56 px at least


def test_other_models_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_qwen_vl(tmp_path, "float32", "cpu")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_vl"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model_type 'qwen3_vl' given, expected 'qwen2_5_vl'"):
        load_qwen_vl(tmp_path, "float32", "cpu")
