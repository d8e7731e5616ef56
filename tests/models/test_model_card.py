import pytest

from cocoedit_jax.models import model_card
from cocoedit_jax.models.lora import LoraConfig

INFO = {
    "base_model": "black-forest-labs/FLUX.1-Kontext-dev",
    "preset": "cocoedit",
    "step": "80",
    "reward_weight/judge": "0.8",
    "reward_weight/pixel": "0.2",
    "reward/judge": "0.6100",
    "reward/total": "0.5900",
    "reward/std": "0.1234",
}


def front_matter(text):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    return huggingface_hub.ModelCard(text).data


def test_front_matter_for_the_hub():
    data = front_matter(model_card.write(LoraConfig(), 266, INFO))
    assert (data.base_model, data.library_name) == (INFO["base_model"], "diffusers")
    assert data.to_dict()["pipeline_tag"] == "image-to-image"
    assert {"lora", "diffusers"} <= set(data.tags)


@pytest.mark.parametrize("base", ["/data/flux", "quickstart base", "runs/base", "not recorded"])
def test_base_that_is_no_repository(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    text = model_card.write(LoraConfig(), 266, INFO | {"base_model": base})
    assert front_matter(text).base_model is None
    assert f"| Base model | {base} |" in text


def test_what_a_reader_needs():
    text = model_card.write(LoraConfig(32, 64), 266, INFO)
    for part in (
        "| Preset | cocoedit |",
        "| Step | 80 |",
        "| Rank, alpha | 32, 64 (scale alpha / rank = 2) |",
        "| Layers | 266 linear layers: attention projections |",
        "| judge | 0.8 | 0.6100 |",
        "| pixel | 0.2 | not measured |",
        "| total |  | 0.5900 |",
        'from_pretrained("black-forest-labs/FLUX.1-Kontext-dev")',
        "instead of 2.",
        "no mask",
        "python -m launch.convert_lora --from=FOLDER --to=comfyui.safetensors --format=comfyui",
        "base model's licence",
    ):
        assert part in text, part
    assert "0.1234" not in text
    other = model_card.write(LoraConfig(2, 1, ("x_embedder",)), 1, {"preset": "a|b"})
    for part in (
        "1 linear layers: x_embedder",
        "| Preset | a\\|b |",
        "No rewards are recorded",
        "| Step | not recorded |",
    ):
        assert part in other, part
