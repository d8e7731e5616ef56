"""What is decided, and refused, before text is encoded and any weights are read."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.inference import load, models
from cocoedit_jax.inference.edit import EditOptions
from cocoedit_jax.models import flux, lora, lora_files, orbax_weights, qwen, weights
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.autoencoder_qwen_weights import stored_shapes
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.text import PrecomputedText

ROOT = Path(__file__).resolve().parents[2]
CONFIG = qwen.QwenConfig(64, 1, 6, 2, 8, (2, 2, 2))
SQUARE = (512, 512)
SHARED = {"attention_head_dim": 6, "axes_dims_rope": [2, 2, 2], "joint_attention_dim": 8, "num_attention_heads": 2}
# Configurations of the transformer and the autoencoder.
QWEN = (
    SHARED | {"_class_name": qwen.CLASS_NAME, "num_layers": 1},
    {"_class_name": "AutoencoderKLQwenImage", "base_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
)
FLUX = (
    SHARED | {"_class_name": flux.CLASS_NAME, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 4},
    {"_class_name": "AutoencoderKL", "block_out_channels": [2] * 4, "layers_per_block": 1, "latent_channels": 16,
     "norm_num_groups": 1, "down_block_types": ["DownEncoderBlock2D"] * 4,
     "up_block_types": ["UpDecoderBlock2D"] * 4, "use_quant_conv": False, "use_post_quant_conv": False},
)  # fmt: skip


def tensors_of(kind):
    """{component: {name: zeros}} in diffusers' files."""
    transformer, vae = FLUX if kind == "flux" else QWEN
    if kind == "flux":
        abstract = flux.abstract_params(flux.FluxConfig.from_diffusers(transformer))
        shapes = weights.tensor_shapes(
            nn.unbox(AutoencoderKL(AutoencoderKLConfig.from_dict(vae, "")).abstract_params())
        )
    else:
        abstract = qwen.abstract_params(CONFIG)
        shapes = stored_shapes(AutoencoderQwenConfig.from_dict(vae, ""))
    parts = {"transformer": weights.tensor_shapes(nn.unbox(abstract)), "vae": shapes}
    return {part: {name: np.zeros(shape, np.float32) for name, shape in own.items()} for part, own in parts.items()}


def write_folder(folder, pipeline="QwenImageEditPlusPipeline", tensors=None, **shape):
    """A whole model but for its text encoders; ``tensors`` are instead of ``tensors_of``."""
    kind = "flux" if pipeline.startswith("Flux") else "qwen"
    transformer, vae = FLUX if kind == "flux" else QWEN
    configurations = {
        "transformer/config.json": transformer | shape,
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": {"use_dynamic_shifting": True},
        "model_index.json": {"_class_name": pipeline},
    }
    for name, content in configurations.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for part, own in (tensors_of(kind) if tensors is None else tensors).items():
        weights.save_safetensors(folder / part / "diffusion_pytorch_model.safetensors", own)
    return folder


def to_orbax(folder, drop=None):
    """Rewrites the transformer of a Qwen folder in the Orbax form, without a parameter ``drop``."""
    part = folder / "transformer"
    tree = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), nn.unbox(qwen.abstract_params(CONFIG)))
    if drop:
        del tree[drop[0]][drop[1]]
    orbax_weights.save_orbax(part, tree, json.loads((part / "config.json").read_text()))
    for path in (part / "config.json", part / "diffusion_pytorch_model.safetensors"):
        path.unlink()


@pytest.fixture
def loaded(tmp_path):
    """``load_for_editing`` of the configurations of a Qwen model, without weights: the editor."""

    def run(pictures, pipeline="QwenImageEditPlusPipeline", options=None, zero_cond_t=False, encoded=None, **more):
        folder = write_folder(tmp_path / "model", pipeline, {}, zero_cond_t=zero_cond_t)
        model = dataclasses.replace(models.model_of(folder), check=lambda *_: None, load=lambda *_: None)

        def encode():
            if encoded is not None:
                encoded.append(pipeline)
            return PrecomputedText.of({})

        options = options or EditOptions(3, size=SQUARE)
        return load.load_for_editing(folder, model, encode, options, pictures, **more)[0]

    return run


def test_pictures_that_a_model_does_not_take_are_refused_before_text_is_encoded(loaded):
    encoded = []
    with pytest.raises(UserError, match="2 pictures for one edit; expected at most 1 for the model in .*model"):
        loaded([[SQUARE], [SQUARE, SQUARE]], "QwenImageEditPipeline", encoded=encoded)
    with pytest.raises(UserError, match="4 pictures for one edit; expected at most 3"):
        loaded([[SQUARE] * 4], encoded=encoded)
    with pytest.raises(UserError, match="--size=500x512: image size 512x500 px: both sides must be multiples of 16"):
        loaded([[SQUARE]], options=EditOptions(3, size=(512, 500)), encoded=encoded)
    assert not encoded
    loaded([[SQUARE] * 3], encoded=encoded)
    loaded([[SQUARE]], "QwenImageEditPipeline", encoded=encoded)
    assert encoded == ["QwenImageEditPlusPipeline", "QwenImageEditPipeline"]


def test_modulation_is_computed_for_the_sigmas_of_all_edits(loaded):
    pictures = [[(512, 512)], [(300, 900)], [(512, 512), (900, 300)]]
    options = EditOptions(4)
    editor = loaded(pictures, options=options, zero_cond_t=True)
    assert editor.modulation_sigmas[0] == 0.0
    for own in pictures:
        target, _ = options.sizes(editor, own)
        editor.check_sigmas(editor.sigmas(4, editor.grid(*target)))
    assert 0.0 not in loaded(pictures, options=options).modulation_sigmas


def test_modulation_layers_stay_where_they_are_needed(loaded, tmp_path):
    assert len(loaded([[SQUARE]]).modulation_sigmas) == 3
    # Tables of more sigmas than a layer has inputs (12) are no smaller than it.
    assert loaded([[SQUARE]], options=EditOptions(12, size=SQUARE)).modulation_sigmas is not None
    assert loaded([[SQUARE]], options=EditOptions(13, size=SQUARE)).modulation_sigmas is None
    params = nn.unbox(qwen.abstract_params(CONFIG))
    for target, kept in (("img_mod.1", True), ("attn.to_q", False)):
        config = lora.LoraConfig(2, 2, (target,))
        adapter = lora.init_adapter(jax.random.key(0), params, config)
        lora_files.save_lora(tmp_path / target, adapter, config, model="qwen")
        editor = loaded([[SQUARE]], lora_path=str(tmp_path / target))
        assert (editor.modulation_sigmas is None) == kept, target


REFUSED = [
    # (pipeline, {component: {tensor: its shape, None: absent}}, lines of the message)
    (
        "QwenImageEditPlusPipeline",
        {
            "transformer": {"transformer_blocks.0.attn.to_q.weight": None, "proj_out.bias": (3,), "extra": (1,)},
            "vae": {"decoder.conv_in.weight": None},
        },
        [
            "{folder}/transformer: 3 problem(s) with the weights:",
            "  missing: transformer_blocks.0.attn.to_q.weight (12, 12)",
            "  unexpected: extra (1,)",
            "  wrong shape: proj_out.bias (3,), expected (64,)",
            "{folder}/vae: 1 problem(s) with the weights:",
            "  missing: decoder.conv_in.weight (2, 16, 3, 3, 3)",
        ],
    ),
    (
        "FluxKontextPipeline",
        {"transformer": {"proj_out.bias": (3,)}, "vae": {"decoder.conv_in.weight": None}},
        [
            "{folder}/transformer: 1 problem(s) with the weights:",
            "  wrong shape: proj_out.bias (3,), expected (64,)",
            "{folder}/vae: 1 problem(s) with the weights:",
            "  missing: decoder.conv_in.weight (2, 16, 3, 3)",
        ],
    ),
]


def never(*_):
    raise AssertionError("called")


def refusal(folder):
    """Of ``load_for_editing``, before text is encoded."""
    model = dataclasses.replace(models.model_of(folder), load=never)
    with pytest.raises(UserError) as error:
        load.load_for_editing(folder, model, never, EditOptions(3, size=SQUARE), [[SQUARE]])
    return str(error.value)


@pytest.mark.parametrize("pipeline, changes, lines", REFUSED, ids=["qwen", "flux"])
def test_weights_that_do_not_fit_are_named_together_before_text_is_encoded(tmp_path, pipeline, changes, lines):
    tensors = tensors_of("flux" if pipeline.startswith("Flux") else "qwen")
    for part, own in changes.items():
        for name, shape in own.items():
            tensors[part].pop(name, None)
            if shape is not None:
                tensors[part][name] = np.zeros(shape, np.float32)
    folder = write_folder(tmp_path, pipeline, tensors)
    assert refusal(folder).splitlines() == [line.format(folder=folder) for line in lines]


def test_weights_that_are_not_there_are_named_together_before_text_is_encoded(tmp_path):
    write_folder(tmp_path)
    to_orbax(tmp_path, drop=("proj_out", "bias"))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    first, second, third = refusal(tmp_path).splitlines()
    assert first == f"{tmp_path}/transformer/arrays: 1 tensor(s) do not fit:"
    assert second == "  missing: proj_out.bias (64,)"
    assert third.startswith(f"{tmp_path}/vae: no weights that can be read among ['config.json']")


@dataclasses.dataclass(frozen=True)
class Third(Editor):
    def source_size(self, picture):
        return picture


def test_a_third_model_is_an_entry():
    calls = []

    def build(folder, text, options):
        return Third(types.SimpleNamespace(), types.SimpleNamespace(factor=8, channels=4), text)

    def reading(folder, editor, place):
        calls.append(("load", editor.text))
        return "parameters"

    model = models.EditModel(
        kind="third",
        build=build,
        check=lambda folder, editor: calls.append(("check", folder)),
        load=reading,
        encode=never,
        prepare=lambda editor, sigmas, changed: dataclasses.replace(editor, schedule=(("seen", len(sigmas)),)),
    )
    folder, text = Path("folder"), PrecomputedText.of({"x": {}})
    options = EditOptions(3, size=SQUARE)
    editor, params, adapter = load.load_for_editing(folder, model, lambda: text, options, [[SQUARE]])
    assert calls == [("check", folder), ("load", text)]
    assert (editor.schedule, params, adapter) == ((("seen", 1),), "parameters", None)
    with pytest.raises(UserError, match="2 pictures for one edit; expected at most 1"):
        load.load_for_editing(folder, model, never, options, [[SQUARE] * 2])


ORDER = """
import pathlib
import sys
import jax
from cocoedit_jax.errors import UserError
from cocoedit_jax.inference import edit, load, models

compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

class Encoded(Exception):
    pass

def encode():
    print("encoding", jax.live_arrays(), [event for event in compiled if "backend_compile" in event])
    raise Encoded

folder = pathlib.Path(sys.argv[1])
for lora in sys.argv[2:]:
    try:
        load.load_for_editing(
            folder, models.model_of(folder), encode, edit.EditOptions(3), [[(512, 512)]], lora_path=lora
        )
    except UserError as error:
        print("refused", " ".join(str(error).split()))
    except Encoded:
        pass
jax.numpy.ones(3).sum()
print("then", [event for event in compiled if "backend_compile" in event] != [])
print([name for name in sys.modules if "torch_bridge" in name])
"""


def test_weights_and_lora_are_checked_before_text_is_encoded_and_all_before_the_first_array(tmp_path):
    """With its first operation JAX takes most of the GPU that the text encoders are to run on."""
    folder = write_folder(tmp_path / "model")
    to_orbax(folder)  # and diffusers' form for the autoencoder
    for name, heads in (("fits", CONFIG.num_attention_heads), ("foreign", 4)):
        params = nn.unbox(qwen.abstract_params(dataclasses.replace(CONFIG, num_attention_heads=heads)))
        config = lora.LoraConfig(2, 2, ("attn.to_q",))
        adapter = lora.init_adapter(jax.random.key(0), params, config)
        lora_files.save_lora(tmp_path / name, adapter, config, model="qwen")

    command = [sys.executable, "-c", ORDER, str(folder), str(tmp_path / "foreign"), str(tmp_path / "fits")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    foreign, *rest = done.stdout.splitlines()
    assert foreign.startswith("refused ") and "foreign" in foreign and "attn.to_q" in foreign
    assert rest == ["encoding [] []", "then True", "[]"]
