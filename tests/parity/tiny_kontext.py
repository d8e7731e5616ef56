"""A whole FLUX.1 Kontext pipeline in diffusers' folder layout: the real classes, drawn at random and tiny."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.transformer_cases import randomise

# One letter each, so any prompt becomes many tokens and is soon too long; plus a few words.
_LETTERS = string.ascii_letters + string.digits + ".,:;!?'-()"
_WORDS = ("the", "a", "make", "remove", "circle", "square", "red", "blue", "to", "of")


def save_tiny_kontext(folder: Path | str, seed: int = 0) -> Path:
    """Writes a random `FluxKontextPipeline` to `folder`, for `from_pretrained`; returns the folder.

    ``seed`` draws widths, depths and all weights. As in the real model: 16 latent channels at 1/8 of the image side
    (packed to 64), embedded guidance, CLIP with 77 tokens, T5 with 512, dynamic shifting.
    """
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = _tokenizers(folder / "vocabulary", rng)
    clip, t5 = _text_encoders(clip_tokenizer, t5_tokenizer, rng)
    axes = tuple(int(2 * n) for n in rng.integers(1, 5, 3))
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=int(rng.integers(1, 4)),
        num_single_layers=int(rng.integers(1, 4)),
        attention_head_dim=sum(axes),
        num_attention_heads=int(rng.integers(1, 4)),
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=clip.config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=axes,  # type: ignore[arg-type]
    )
    groups = int(rng.integers(2, 5))
    widths = tuple(int(groups * n) for n in np.sort(rng.integers(1, 5, 4)))
    autoencoder = AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
        block_out_channels=widths,  # type: ignore[arg-type]
        layers_per_block=int(rng.integers(1, 3)),
        latent_channels=16,
        norm_num_groups=groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=float(rng.uniform(0.3, 0.5)),
        shift_factor=float(rng.uniform(0.05, 0.2)),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    for module in (transformer, autoencoder, clip, t5):
        randomise(module, rng)
    _scale_convolutions(autoencoder)
    pipeline = FluxKontextPipeline(
        scheduler=scheduler,
        vae=autoencoder,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizers(folder: Path, rng: np.random.Generator) -> tuple[Any, Any]:
    from transformers import CLIPTokenizer, T5Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTokenizer.from_pretrained(folder, model_max_length=77, local_files_only=True)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores = -rng.uniform(2.0, 9.0, len(_LETTERS) + len(_WORDS) + 1)
    ordinary = ["▁", *_LETTERS, *(f"▁{word}" for word in _WORDS)]
    vocabulary = special + [(piece, float(score)) for piece, score in zip(ordinary, scores, strict=True)]
    t5 = T5Tokenizer(vocab=vocabulary, extra_ids=10, model_max_length=512)
    return clip, t5


def _text_encoders(clip_tokenizer: Any, t5_tokenizer: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    heads = int(rng.integers(1, 5))
    # FLUX's own configuration still says 2, which transformers takes for "the largest id is the end of the text".
    end = (2, clip_tokenizer.eos_token_id)[int(rng.integers(2))]
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=heads * int(rng.integers(4, 9)),
            intermediate_size=int(rng.integers(20, 50)),
            num_hidden_layers=int(rng.integers(1, 4)),
            num_attention_heads=heads,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=int(rng.integers(16, 40)),
            d_kv=int(rng.integers(4, 9)),
            d_ff=int(rng.integers(20, 50)),
            num_layers=int(rng.integers(1, 4)),
            num_heads=int(rng.integers(1, 5)),
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
            relative_attention_max_distance=32,
        )
    )
    return clip.eval(), t5.eval()


def _scale_convolutions(module: Any) -> None:
    """Keeps activations near 1: `randomise` does not look at a convolution's number of inputs."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.mul_(1 / (0.3 * parameter[0].numel() ** 0.5))
