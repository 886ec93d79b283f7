"""Perplexity of a model on short passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dapa_merge.evaluate.generate import chat_prompt, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.evaluate.prompts import Question


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Question], *, batch_size: int
) -> float:
    """Exp of the mean negative log-likelihood per counted token, over all passages together.

    A passage with a prompt is a chat: its answer is counted, given the prompt in the chat template. A passage without
    one is plain text: all its tokens but the first are counted. Passages are cut off at the model's context length.

    Returns:
        At least 1; infinity if the likelihood is not a finite number. NaN for no passages.
    """
    rows = [_row(tokenizer, passage, model.config) for passage in passages]
    rows.sort(key=lambda row: -len(row[0]))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        longest = len(batch[0][0])
        input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        labels = torch.full((len(batch), longest), -100)
        for index, (ids, num_context) in enumerate(batch):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, num_context : len(ids)] = torch.tensor(ids[num_context:])
        # Padded on the right and causal: what follows a row's last token cannot reach its likelihood.
        mask = (torch.arange(longest)[None] < torch.tensor([len(ids) for ids, _ in batch])[:, None]).long()
        device = model.device
        logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(device), reduction="sum"
        )
        total += float(losses)
        count += int((labels[:, 1:] != -100).sum())
    if not count:
        return math.nan
    mean = total / count
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else math.inf


def _row(tokenizer: PreTrainedTokenizerBase, passage: Question, config: object) -> tuple[list[int], int]:
    """Token ids of a passage, and how many of the first are context only."""
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    if not passage.prompt:
        return list(tokenizer(passage.answer)["input_ids"])[:limit], 1
    context = encode(tokenizer, chat_prompt(tokenizer, passage.prompt))
    answer = list(tokenizer(" " + passage.answer, add_special_tokens=False)["input_ids"])
    return (context + answer)[:limit], len(context)
