import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.qwen import QwenConfig

# transformer/config.json of Qwen-Image-Edit.
PUBLISHED = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.35.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, QwenConfig()),
        ({"pooled_projection_dim": 768}, QwenConfig()),  # files of diffusers 0.34
        (
            {"zero_cond_t": True, "use_additional_t_cond": False, "use_layer3d_rope": False},
            QwenConfig(zero_cond_t=True),
        ),
    ],
    ids=["edit", "older", "2511"],
)
def test_published_configurations(more, expected):
    assert QwenConfig.from_diffusers(PUBLISHED | more) == expected


def test_absent_keys_have_diffusers_defaults():
    assert QwenConfig.from_diffusers({}) == QwenConfig()


def test_everything_unusable_is_named_together():
    raw = PUBLISHED | {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "out_channels": 64,
        "guidance_embeds": True,
        "use_layer3d_rope": True,
        "use_additional_t_cond": 1,
        "zero_cond_t": "yes",
        "num_layers": -1,
        "joint_attention_dim": 0,
        "quantization_config": {},
    }
    with pytest.raises(UserError) as error:
        QwenConfig.from_diffusers(raw)
    for text in (
        "_class_name='FluxTransformer2DModel': expected 'QwenImageTransformer2DModel'",
        "patch_size=1: expected 2",
        "out_channels=64: expected a quarter of in_channels",
        "guidance_embeds=True: expected false",
        "use_layer3d_rope=True: expected false",
        "use_additional_t_cond=1: expected false",
        "zero_cond_t='yes': expected true or false",
        "num_layers=-1: expected a whole number",
        "joint_attention_dim=0: expected a positive whole number",
        "quantization_config={}: not an option of this model",
    ):
        assert text in str(error.value)
    with pytest.raises(UserError, match="sums to 127"):
        QwenConfig.from_diffusers(PUBLISHED | {"axes_dims_rope": [15, 56, 56]})
    with pytest.raises(UserError, match="out_channels=16: expected a quarter"):
        QwenConfig.from_diffusers({"in_channels": 128})
