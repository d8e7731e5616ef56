"""Which encoders made an embedding, and which template they were given."""

import json
import shutil

import pytest

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.text_identity import checked_identity, encoder_files, text_identity, write_text_identity
from cocoedit_jax.data.text_kind import qwen_kind, qwen_template
from cocoedit_jax.errors import UserError
from tests.data.text_cases import tiny_model


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


def qwen_folder(root, pipeline="QwenImageEditPlusPipeline"):
    tiny_model(root)
    for name in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(root / name)
    (root / "processor").mkdir()
    (root / "processor" / "preprocessor_config.json").write_text("{}")
    index = {name: ["transformers", "X"] for name in ("processor", "scheduler", "text_encoder", "tokenizer", "vae")}
    index |= {"_class_name": pipeline, "feature_extractor": [None, None]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_identity_of_a_pipeline_that_sees_pictures(tmp_path):
    model = qwen_folder(tmp_path / "qwen")
    names = [path.as_posix() for path in encoder_files(model)]
    assert names[:2] == ["text_encoder/config.json", "text_encoder/model.safetensors"]
    assert names[2:] == [
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        "processor/preprocessor_config.json",
    ]
    identity = text_identity(model)
    (model / "processor" / "preprocessor_config.json").write_text('{"patch_size": 16}')
    assert text_identity(model)["digest"] != identity["digest"]
    (model / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"missing processor/preprocessor_config\.json"):
        text_identity(model)


def test_template_of_a_pipeline(tmp_path):
    assert qwen_template(qwen_folder(tmp_path / "plus")) == "edit_plus"
    assert qwen_template(qwen_folder(tmp_path / "edit", "QwenImageEditPipeline")) == "edit"
    with pytest.raises(UserError, match=r"json: _class_name is 'FluxKontextPipeline'; expected .* or Qwen"):
        qwen_template(qwen_folder(tmp_path / "flux", "FluxKontextPipeline"))
    with pytest.raises(UserError, match=r"model_index\.json: no such file"):
        qwen_template(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model_index\.json: not the index of a diffusers pipeline"):
        qwen_template(tmp_path)
    with pytest.raises(UserError, match="template: 'edit_more' given, expected one of edit, edit_plus"):
        qwen_kind("edit_more", Framing(32))
