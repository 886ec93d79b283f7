"""Likelihood of given tokens (teacher-forced, differentiable), and the perplexity of texts of any length."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dapa_merge.errors import UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import batch_invariant
from dapa_merge.measure.generate import check_ids, encode, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.measure.prompts.sets import Question


WINDOW = 2048
STRIDE = 512
# Maximum tokens in all windows of a batch; a fixed batch size is meant for short prompts.
MAX_BATCH_TOKENS = 16_384


class Reading(NamedTuple):
    """The perplexity of passages, and whether only their leading tokens were read."""

    perplexity: float
    is_cut: bool


def read_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Question],
    *,
    batch_size: BatchSize,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Reading:
    """Return the exponential of the mean negative log-likelihood per counted token, over all passages together.

    A passage without a prompt is plain text, read in windows: each token but the first is counted exactly once, given
    all tokens before it in its window, at least one. This is the strided computation that transformers documents for
    models of fixed length, with the mean over tokens, not over windows. A passage with a prompt is a chat: its answer
    is counted, given the prompt in the chat template, and cut off at the window.

    Args:
        model: Any causal language model.
        tokenizer: The model's.
        passages: Texts, or prompts with answers.
        batch_size: Maximum number of windows at once.
        window: Tokens that the model sees at once, at least 2; None for its context length, at most 2048.
        stride: Step of the window, less than it; None for 512, or half of a smaller window.
        max_tokens: Number of leading tokens to read; None for all.

    Returns:
        The perplexity is at least 1; infinity if the likelihood is not a finite number. NaN if nothing can be counted.

    Raises:
        UsageError: If window and stride do not fit the model or each other.
    """
    window, stride = _window(model, window, stride)
    rows, is_cut = _first(_rows(tokenizer, passages, window, stride), max_tokens)
    # Rows of a batch should have similar lengths and similar shares of counted tokens.
    rows.sort(key=lambda row: (-len(row.ids), row.num_context))
    count = sum(len(row.ids) - row.num_context for row in rows)
    if not count:
        return Reading(math.nan, is_cut)
    check_ids(model, [row.ids for row in rows])
    fitting = BatchSize(max(1, min(batch_size.limit, MAX_BATCH_TOKENS // len(rows[0].ids))))
    with batch_invariant(model):
        mean = math.fsum(fitting.map(lambda batch: _losses(model, tokenizer.pad_token_id, batch), rows)) / count
    return Reading(math.exp(mean) if math.isfinite(mean) and mean < 700 else math.inf, is_cut)


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[ScoredText]:
    """Yield the windows of a document, each counting the tokens that no earlier one counted."""
    counted = 1
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        if stop > counted:
            yield ScoredText(list(ids[start:stop]), counted - start)
        counted = max(counted, stop)
        if stop == len(ids):
            return


def _window(model: PreTrainedModel, window: int | None, stride: int | None) -> tuple[int, int]:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 20
    size = min(context, WINDOW) if window is None else window
    if not 2 <= size <= context:
        raise UsageError(f"the window is {size} tokens; it must be from 2 to the model's context of {context}")
    step = min(STRIDE, max(size // 2, 1)) if stride is None else stride
    if not 1 <= step < size:
        raise UsageError(f"the stride is {step} tokens; it must be from 1 to {size - 1}, less than the window")
    return size, step


def _rows(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[Question], window: int, stride: int
) -> Iterator[ScoredText]:
    for passage in passages:
        if passage.prompt:
            context = prompt_ids(tokenizer, passage.prompt)
            answer = encode(tokenizer, " " + passage.answer)
            row = ScoredText((context + answer)[:window], len(context))
            if len(row.ids) > row.num_context:
                yield row
        else:
            yield from windows(encode(tokenizer, passage.answer, add_special_tokens=True), window, stride)


def _first(rows: Iterable[ScoredText], max_tokens: int | None) -> tuple[list[ScoredText], bool]:
    """Return rows with at most `max_tokens` counted tokens, the last one truncated, and whether any were left."""
    found: list[ScoredText] = []
    left = math.inf if max_tokens is None else max_tokens
    for row in rows:
        counted = len(row.ids) - row.num_context
        if left < counted:
            if left:
                found.append(ScoredText(row.ids[: row.num_context + int(left)], row.num_context))
            return found, True
        found.append(row)
        left -= counted
    return found, False


@torch.inference_mode()
def _losses(model: PreTrainedModel, padding: int, rows: Sequence[ScoredText]) -> list[float]:
    return list(map(float, losses(model, padding, rows)))


class ScoredText(NamedTuple):
    """A text as token ids, of which the first `num_context`, at least one, are given and the others are counted."""

    ids: list[int]
    num_context: int


def losses(model: PreTrainedModel, padding: int, rows: Sequence[ScoredText]) -> torch.Tensor:
    """Compute the negative log-likelihood of each row's counted tokens, in nats; `padding` is any token id.

    Returns:
        `[rows]`, float32, on the model's device; with a graph if gradients are enabled.
    """
    return losses_of(rows, counted_logits(model, padding, rows))


def losses_of(rows: Sequence[ScoredText], found: Sequence[torch.Tensor]) -> torch.Tensor:
    """The losses of rows by their `counted_logits`; as `losses`."""
    terms = []
    for row, logits in zip(rows, found, strict=True):
        # Row by row: without a graph, only one row's logits, [tokens, vocabulary], are in float32 at a time.
        counted = torch.tensor(row.ids[row.num_context :], device=logits.device)
        terms.append(torch.nn.functional.cross_entropy(logits.float(), counted, reduction="sum"))
    return torch.stack(terms)


def counted_logits(model: PreTrainedModel, padding: int, rows: Sequence[ScoredText]) -> list[torch.Tensor]:
    """Compute the logits that predict each row's counted tokens; `padding` is any token id.

    Returns:
        `[counted tokens, vocabulary]` for each row, in the model's dtype; with a graph if gradients are enabled.
    """
    # The last token of a row is only predicted.
    given = [row.ids[:-1] for row in rows]
    longest = max(map(len, given))
    # Padding on the right cannot affect the likelihoods of a causal model.
    input_ids = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in given], device=model.device)
    mask = None
    if any(len(ids) < longest for ids in given):
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in given], device=model.device)
    first = min(row.num_context for row in rows) - 1
    logits = _logits_from(model, input_ids, mask, first)
    return [
        row_logits[row.num_context - 1 - first : len(row.ids) - 1 - first]
        for row, row_logits in zip(rows, logits, strict=True)
    ]


def _logits_from(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None, first: int
) -> torch.Tensor:
    """Compute only the logits `[rows, positions from first on, vocabulary]`; all would take most of the memory."""
    inputs = {"input_ids": input_ids, "attention_mask": mask, **without_cache(model)}
    kept = only_logits(model, torch.arange(first, input_ids.shape[1], device=input_ids.device))
    with batch_invariant(model):
        logits = model(**inputs, **kept).logits
    return torch.as_tensor(logits if kept else logits[:, first:])


def without_cache(model: PreTrainedModel) -> dict[str, Any]:
    """The argument with which a model keeps no keys and values; empty if it does not know it.

    They are not needed, and those of many rows would take most of the memory.
    """
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def only_logits(model: PreTrainedModel, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument with which a model computes the logits of some positions only; empty if it does not know it.

    Almost every model knows it; others may silently ignore it. Positions, not their number: for a slice, torch on a CPU
    would copy the output layer's weight for every row.
    """
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions} if known else {}
