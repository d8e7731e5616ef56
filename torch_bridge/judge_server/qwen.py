"""Qwen2.5-VL in PyTorch as a model of the server: left-padded batches, greedy, log-probabilities of the raw logits."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocoedit_jax.errors import UserError
from torch_bridge import require_torch
from torch_bridge.judge_server.chat_model import Completion, Message, Prompt, PromptError, Sampling, TokenChoice
from torch_bridge.loading import default_device, default_dtype
from torch_bridge.qwen_vl import QwenInputs, QwenVLProcessor, load_qwen_vl, read_config

_MAX_CANDIDATES = 20


class QwenModel:
    """A Qwen2.5-VL model folder: weights, tokenizer with its chat template, image processor.

    Args:
        dtype: "bfloat16" or "float32"; None: `default_dtype` of the device.
        device: "cpu", "cuda" or "cuda:1"; None: the GPU if there is one.

    Raises:
        UserError: PyTorch or files are missing, or the model is another one. Weights are looked at only by `load`.
    """

    def __init__(self, folder: Path | str, *, dtype: str | None = None, device: str | None = None):
        self._torch = require_torch("transformers")
        self._folder = Path(folder)
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        config = read_config(self._folder)
        text = config.get("text_config") or config
        self.vocabulary_size = int(text["vocab_size"])
        self.max_tokens = int(text.get("max_position_embeddings", 32768))
        self._processor = QwenVLProcessor.load(self._folder)
        self._tokenizer = self._processor.tokenizer
        self._template = _chat_template(self._tokenizer, self._folder)
        self._ends = _end_tokens(self._tokenizer, self._folder)
        self.digits = _digit_tokens(self._tokenizer, self._folder)
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = sorted(str(token) for token in added if token.special)
        self._model: Any = None
        self.token = functools.lru_cache(4096)(self._decode_one)

    def load(self) -> None:
        model = load_qwen_vl(self._folder, self.dtype, self.device)
        from transformers import GenerationConfig

        # The published one samples, with a penalty on repetition.
        pad = self._ends[0] if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=list(self._ends), pad_token_id=pad)
        self._model = model

    def _decode_one(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Raises PromptError: a text holds one of the tokenizer's special tokens, which would change the structure of
        the conversation, or a picture cannot be resized.
        """
        chat, images = [], []
        for message in messages:
            for text in message.texts:
                if found := next((token for token in self._special if token in text), None):
                    raise PromptError(f"a text of {message.role!r} holds the special token {found!r}")
            parts = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
            ]
            plain = len(parts) == 1 and "text" in parts[0]  # templates of system messages take strings
            chat.append({"role": message.role, "content": parts[0]["text"] if plain else parts})
            images += message.images
        text = self._tokenizer.apply_chat_template(
            chat, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        try:
            inputs = self._processor(str(text), images)
        except ValueError as error:
            raise PromptError(str(error)) from error
        return Prompt(inputs, len(inputs.input_ids))

    def complete(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[Completion]:
        torch = self._torch
        try:
            with torch.inference_mode():
                if all(sampling.max_tokens == 1 for sampling in samplings):
                    ids, logits = self._next_tokens([prompt.inputs for prompt in prompts])
                else:
                    ids, logits = self._generate([prompt.inputs for prompt in prompts], samplings)
                return self._completions(ids, logits, samplings)
        except torch.OutOfMemoryError as error:
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
            raise MemoryError(f"{len(prompts)} prompts do not fit into the memory of {self.device}") from error

    def _next_tokens(self, inputs: Sequence[QwenInputs]) -> tuple[Any, list[Any]]:
        """Ids [B, 1] of the most probable next tokens, and the logits [B, V] of that place alone."""
        batch = self._processor.batch(inputs, self.device)
        logits = self._model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.argmax(-1, keepdim=True), [logits]

    def _generate(self, inputs: Sequence[QwenInputs], samplings: Sequence[Sampling]) -> tuple[Any, list[Any]]:
        """Ids [B, T] and, if any request wants log-probabilities, T logits [B, V]."""
        batch = self._processor.batch(inputs, self.device)
        del batch["position_ids"]  # generate makes them from mm_token_type_ids, and goes on counting
        scored = any(sampling.top_logprobs is not None for sampling in samplings)
        made = self._model.generate(
            **batch,
            max_new_tokens=max(sampling.max_tokens for sampling in samplings),
            return_dict_in_generate=True,
            output_logits=scored,
        )
        return made.sequences[:, batch["input_ids"].shape[1] :], list(made.logits) if scored else []

    def _completions(self, ids: Any, logits: Sequence[Any], samplings: Sequence[Sampling]) -> list[Completion]:
        rows = ids.tolist()
        lengths = []
        for row, sampling in zip(rows, samplings, strict=True):
            end = next((place for place, token_id in enumerate(row) if token_id in self._ends), None)
            longest = min(len(row), sampling.max_tokens)
            lengths.append(longest if end is None or end >= longest else end + 1)
        choices: list[list[TokenChoice]] = [[] for _ in rows]
        for place, at_place in enumerate(logits):
            tables = self._log_probabilities(at_place, ids[:, place], samplings)
            for row, table in enumerate(tables):
                if place < lengths[row]:
                    choices[row].append(table)
        completions = []
        for row, (token_ids, length) in enumerate(zip(rows, lengths, strict=True)):
            token_ids = token_ids[:length]
            stopped = bool(token_ids) and token_ids[-1] in self._ends
            text = self._tokenizer.decode(token_ids[:-1] if stopped else token_ids, skip_special_tokens=True)
            made = choices[row] or [TokenChoice(token_id, 0.0) for token_id in token_ids]
            completions.append(Completion(tuple(made), text, "stop" if stopped else "length"))
        return completions

    def _log_probabilities(self, logits: Any, chosen: Any, samplings: Sequence[Sampling]) -> list[TokenChoice]:
        """For each row of logits [B, V]: the chosen token and its candidates."""
        torch = self._torch
        logprobs = torch.log_softmax(logits.float(), -1)
        top, top_ids = logprobs.topk(min(_MAX_CANDIDATES, logprobs.shape[-1]), -1)
        asked = max(len(sampling.token_ids) for sampling in samplings)
        wanted = [[*sampling.token_ids, *[0] * (asked - len(sampling.token_ids))] for sampling in samplings]
        columns = torch.cat([chosen[:, None], torch.tensor(wanted, device=chosen.device, dtype=torch.long)], -1)
        gathered, top, top_ids = (t.cpu().tolist() for t in (logprobs.gather(-1, columns), top, top_ids))
        out = []
        for row, (token_id, sampling) in enumerate(zip(chosen.tolist(), samplings, strict=True)):
            if sampling.token_ids:
                pairs = zip((token_id, *sampling.token_ids), gathered[row], strict=False)
                candidates = tuple(dict(pairs).items())
            else:
                candidates = tuple(zip(top_ids[row], top[row], strict=True))[: sampling.top_logprobs or 0]
            out.append(TokenChoice(token_id, gathered[row][0], candidates))
        return out


def _chat_template(tokenizer: Any, folder: Path) -> str:
    """The tokenizer's own, or the processor's in chat_template.json."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    path = folder / "chat_template.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: no chat template; expected one in tokenizer_config.json, chat_template.jinja or {path.name}"
        ) from error


def _end_tokens(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json's, or the tokenizer's."""
    found = tokenizer.eos_token_id
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    ends = tuple(found) if isinstance(found, list) else (found,)
    if not all(isinstance(end, int) for end in ends):
        raise UserError(f"{folder}: eos_token_id {found!r} given, expected the number of a token")
    return ends


def _digit_tokens(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Raises UserError if a digit is more than one token: then the first token does not hold the score."""
    found = {digit: tokenizer(digit, add_special_tokens=False)["input_ids"] for digit in "012345"}
    if split := [digit for digit, ids in found.items() if len(ids) != 1]:
        raise UserError(f"{folder}: the digit {split[0]} is {len(found[split[0]])} tokens, expected one")
    spaced = (tokenizer(f" {digit}", add_special_tokens=False)["input_ids"] for digit in "012345")
    return frozenset([ids[0] for ids in found.values()] + [ids[0] for ids in spaced if len(ids) == 1])
