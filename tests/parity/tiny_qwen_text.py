"""The text side of Qwen-Image-Edit in diffusers' folder layout: the real classes, drawn at random and tiny."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.transformer_cases import randomise

EDIT, EDIT_PLUS = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def save_tiny_qwen_text(folder: Path | str, seed: int = 0, pipeline: str = EDIT_PLUS) -> Path:
    """Writes text_encoder/, tokenizer/, processor/ and model_index.json of a random ``pipeline``; returns the folder.

    As published, processor/ has a tokenizer of its own and model_index.json names the other parts of the pipeline too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer()
    tiny_text_encoder(tokenizer, rng).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "processor")
    tiny_image_processor().save_pretrained(folder / "processor")
    parts = {
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    index = {"_class_name": pipeline, "_diffusers_version": "0.36.0"} | parts
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def tiny_tokenizer() -> Any:
    """A Qwen2 tokenizer without merges: one token per byte."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=131072)
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    return tokenizer


def tiny_text_encoder(tokenizer: Any, rng: np.random.Generator) -> Any:
    """A random `Qwen2_5_VLForConditionalGeneration`; its width is ``config.text_config.hidden_size``.

    Grouped queries, rotary sections of three sizes, windowed and full attention over pictures: all as in the real one.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    groups, per_group = (int(n) for n in rng.integers(1, 3, 2))
    sections = [int(n) for n in rng.permutation([1, 2, 3])]
    heads = groups * per_group
    hidden = heads * 2 * sum(sections)
    vision_heads = int(rng.integers(1, 4))
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": int(rng.integers(20, 50)),
            "num_hidden_layers": int(rng.integers(1, 4)),
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "rope_scaling": {"mrope_section": sections, "rope_type": "default", "type": "default"},
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "vocab_size": len(tokenizer) + 5,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": vision_heads * 8,
            "intermediate_size": int(rng.integers(10, 30)),
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [int(rng.integers(2))],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomise(model, rng)
    return model


def tiny_image_processor() -> Any:
    """As published: pictures of 3136 to 12845056 pixels, patches of 14, merged two by two."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})


def mark_pictures(encoder: Any) -> None:
    """Tells ``encoder`` which tokens are a picture's; diffusers' pipelines do not (``torch_bridge.qwen_text``)."""
    plain = encoder.forward

    def forward(input_ids: Any, **options: Any) -> Any:
        marks = (input_ids == encoder.config.image_token_id).int()
        return plain(input_ids, mm_token_type_ids=marks, **options)

    encoder.forward = forward


class TinyProcessor:
    """What diffusers' pipelines call: transformers' own `Qwen2_5_VLProcessor` cannot be built without torchvision.

    As that one does, it repeats each <|image_pad|> once per merged patch and marks the picture's tokens in
    ``mm_token_type_ids``. A pipeline that holds it cannot be saved.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.image_processor = tokenizer, tiny_image_processor()

    def __call__(self, *, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        from transformers import BatchFeature

        pictures = self.image_processor(images=images, return_tensors=return_tensors)
        sizes = iter((pictures["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        pieces = [line.split("<|image_pad|>") for line in text]
        expanded = [first + "".join("<|image_pad|>" * next(sizes) + piece for piece in rest) for first, *rest in pieces]
        if next(sizes, None) is not None:
            raise ValueError("more pictures than <|image_pad|>")
        tokens = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        marks = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        return BatchFeature({**tokens, **pictures, "mm_token_type_ids": marks})
