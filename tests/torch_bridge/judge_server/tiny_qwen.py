"""A model folder of Qwen2.5-VL as it is published, tiny and random."""

import json

import numpy as np

from tests.parity.flux_cases import SEED
from tests.parity.tiny_qwen_text import tiny_image_processor, tiny_text_encoder, tiny_tokenizer

# The structure of Qwen2.5-VL's own.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_qwen(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = tiny_text_encoder(tokenizer, np.random.default_rng(SEED))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    # As published: sampling with a penalty, two end tokens.
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    published = {"do_sample": True, "repetition_penalty": 1.5, "temperature": 0.1, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(published))
