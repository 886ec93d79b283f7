"""Perplexity of a model on short passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dapa_merge.evaluate.generate import BatchSize, chat_prompt, check_ids, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.evaluate.prompts import Question


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Question], *, batch_size: BatchSize
) -> float:
    """The exponential of the mean negative log-likelihood per counted token, over all passages together.

    A passage with a prompt is a chat: its answer is counted, given the prompt in the chat template. A passage without
    one is plain text: all its tokens but the first are counted. Passages are cut off at the model's context length.

    Returns:
        At least 1; infinity if the likelihood is not a finite number. NaN for no passages.
    """
    rows = [_row(tokenizer, passage, model.config) for passage in passages]
    rows = sorted((row for row in rows if len(row.ids) > row.num_context), key=lambda row: -len(row.ids))
    count = sum(len(row.ids) - row.num_context for row in rows)
    if not count:
        return math.nan
    check_ids(model, [row.ids for row in rows])
    losses = batch_size.map(lambda batch: _losses(model, tokenizer.pad_token_id, batch), rows)
    mean = sum(losses) / count
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else math.inf


class _Row(NamedTuple):
    """A passage as token ids, of which the first `num_context` are not counted."""

    ids: list[int]
    num_context: int


@torch.inference_mode()
def _losses(model: PreTrainedModel, padding: int, rows: Sequence[_Row]) -> list[float]:
    """The negative log-likelihood of each row's counted tokens, in nats."""
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.tensor([row.ids + [padding] * (longest - len(row.ids)) for row in rows])
    # Padded on the right and causal: what follows a row's last token cannot reach its likelihood.
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
    losses = []
    for row, row_logits in zip(rows, logits, strict=True):
        # Row by row, so that only one row's logits, [tokens, vocabulary], are ever held as float32.
        predictions = row_logits[row.num_context - 1 : len(row.ids) - 1].float()
        counted = torch.tensor(row.ids[row.num_context :], device=predictions.device)
        losses.append(float(torch.nn.functional.cross_entropy(predictions, counted, reduction="sum")))
    return losses


def _row(tokenizer: PreTrainedTokenizerBase, passage: Question, config: object) -> _Row:
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    if not passage.prompt:
        return _Row(list(tokenizer(passage.answer)["input_ids"])[:limit], 1)
    context = encode(tokenizer, chat_prompt(tokenizer, passage.prompt))
    answer = list(tokenizer(" " + passage.answer, add_special_tokens=False)["input_ids"])
    return _Row((context + answer)[:limit], len(context))
