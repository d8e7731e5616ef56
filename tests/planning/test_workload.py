"""What is planned for, where the configuration leaves it to the model."""

import json

import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from cocoedit_jax.errors import UserError
from cocoedit_jax.planning.compiler import phase_key
from cocoedit_jax.planning.workload import QWEN_PICTURE_STATES, Workload, choose_candidates
from configs import flux_kontext, qwen_image_edit
from torch_bridge.qwen_text import TEMPLATES, resize_to_area


def qwen(path, text_tokens=0) -> Workload:
    config = qwen_image_edit.get_config()
    config.model.path, config.model.text_tokens = str(path), text_tokens
    return Workload.of(config)


@pytest.mark.parametrize("template", TEMPLATES)
def test_states_of_a_square_picture_are_those_of_the_encoder(template):
    seen = resize_to_area(Image.new("RGB", (512, 512)), TEMPLATES[template].area)
    # max_pixels of Qwen2.5-VL's preprocessor_config.json; its image tokens are patches of 14 px, merged two by two
    height, width = smart_resize(seen.height, seen.width, factor=28, max_pixels=12845056)
    assert QWEN_PICTURE_STATES[template] == height * width // 28**2


def test_states_and_kind_of_models_that_are_not_here_are_those_of_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    names = {"Qwen/Qwen-Image-Edit": (1429, False), "Qwen/Qwen-Image-Edit-2509": (256, False),
             "Qwen/Qwen-Image-Edit-2511": (256, True), "some/where/mine": (256, False)}  # fmt: skip
    for name, (states, zero_cond_t) in names.items():
        workload = qwen(name)
        assert workload.text_tokens() == states, name
        assert workload.editor("none", "xla").transformer.config.zero_cond_t == zero_cond_t, name
    assert qwen("Qwen/Qwen-Image-Edit-2509", text_tokens=100).text_tokens() == 100
    assert Workload.of(flux_kontext.get_config()).text_tokens() == 128


def test_states_and_kind_of_models_that_are_here_are_those_of_their_files(tmp_path):
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"

    def write(pipeline: str, zero_cond_t: bool) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        config.write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": zero_cond_t}))

    write("QwenImageEditPlusPipeline", True)
    clean = qwen(tmp_path)
    assert clean.qwen == ("edit_plus", True) and clean.editor("none", "xla").transformer.config.zero_cond_t
    write("QwenImageEditPipeline", False)
    first = qwen(tmp_path)
    assert first.text_tokens() == 1429 and not first.editor("none", "xla").transformer.config.zero_cond_t
    # Programs of the two are not the same one.
    keys = []
    for workload in (clean, first):
        workload.config.model.text_tokens = 256
        (candidate,) = choose_candidates(workload, 8, layouts=["fsdp"])
        keys.append(phase_key(workload, candidate, "v5e:2x4", "train"))
    assert keys[0] != keys[1]
    write("FluxKontextPipeline", False)
    with pytest.raises(UserError, match="model_index.json: _class_name is 'FluxKontextPipeline'"):
        qwen(tmp_path).text_tokens()
