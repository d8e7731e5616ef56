import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.flux import FluxConfig
from tests.models.tiny_flux import CONFIG, CONFIG_JSON

# transformer/config.json of FLUX.1 Kontext-dev.
KONTEXT = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "out_channels": None,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def test_published_configuration():
    assert FluxConfig.from_diffusers(KONTEXT) == FluxConfig()
    assert FluxConfig.from_diffusers(CONFIG_JSON) == CONFIG
    assert FluxConfig.from_diffusers(KONTEXT | {"out_channels": 64}) == FluxConfig()


def test_absent_keys_have_diffusers_defaults():
    assert FluxConfig.from_diffusers({}) == FluxConfig(guidance_embeds=False)


def test_everything_unusable_is_named_together():
    raw = KONTEXT | {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": 2,
        "out_channels": 128,
        "guidance_embeds": 1,
        "num_layers": 1.5,
        "in_channels": 0,
        "axes_dims_rope": 128,
        "quantization_config": {"quant_method": "bitsandbytes"},
        "new_option": True,
    }
    with pytest.raises(UserError) as error:
        FluxConfig.from_diffusers(raw)
    for text in (
        "_class_name='SD3Transformer2DModel': expected 'FluxTransformer2DModel'",
        "patch_size=2: expected 1",
        "out_channels=128: expected null or in_channels",
        "guidance_embeds=1: expected true or false",
        "num_layers=1.5: expected a whole number",
        "in_channels=0: expected a positive whole number",
        "axes_dims_rope=128: expected a list of whole numbers",
        "quantization_config={'quant_method': 'bitsandbytes'}: not an option of this model",
        "new_option=True: not an option of this model",
    ):
        assert text in str(error.value)


def test_rotary_dimensions_must_fill_the_head():
    with pytest.raises(UserError, match="sums to 127; expected attention_head_dim=128"):
        FluxConfig.from_diffusers(KONTEXT | {"axes_dims_rope": [15, 56, 56]})
