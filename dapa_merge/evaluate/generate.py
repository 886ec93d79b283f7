"""Batched greedy generation: prompts in, responses out, in the order of the prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)


def prepare_for_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `model.generate` deterministic and the same for every member of a family.

    A checkpoint's `generation_config.json` may ask for sampling, a repetition penalty or suppressed tokens, which
    transformers applies behind explicit arguments; only its end and padding tokens are kept.
    """
    stored = model.generation_config
    end = stored.eos_token_id if stored is not None and stored.eos_token_id is not None else tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "left"
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as one user turn of the model's own chat template, ready to be answered; bare if it has none."""
    if not tokenizer.chat_template:
        return prompt
    message = {"role": "user", "content": prompt}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text made by `chat_prompt`; a template brings its own special tokens."""
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Answer every prompt greedily.

    Prompts are batched by length, padded on the left. A batch that does not fit in memory is halved.

    Args:
        model: Prepared by `prepare_for_greedy`.
        tokenizer: Its tokenizer.
        prompts: User requests, without template.
        max_new_tokens: Responses are cut off here.
        batch_size: The largest number of prompts at once.
        progress: Called with numbers of prompts as they are answered.

    Returns:
        One response per prompt, special tokens removed.
    """
    ids = [encode(tokenizer, chat_prompt(tokenizer, prompt)) for prompt in prompts]
    # Longest first: if a batch is too large for the memory, the first one is.
    order = sorted(range(len(prompts)), key=lambda index: -len(ids[index]))
    responses = [""] * len(prompts)
    position = 0
    while position < len(order):
        batch = order[position : position + batch_size]
        try:
            answers = _answer(model, tokenizer, [ids[index] for index in batch], max_new_tokens)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = max(1, len(batch) // 2)
            torch.cuda.empty_cache()
            LOG.warning("a batch of %d prompts does not fit in memory; trying %d", len(batch), batch_size)
            continue
        for index, answer in zip(batch, answers, strict=True):
            responses[index] = answer
        position += len(batch)
        progress(len(batch))
    return responses


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    batch = tokenizer.pad({"input_ids": list(ids)}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens
    )
    answers = output[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(answers, skip_special_tokens=True))
