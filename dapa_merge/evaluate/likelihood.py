"""How likely a model finds given tokens, teacher-forced; differentiable."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Row(NamedTuple):
    """A text as token ids, of which the first `num_context`, at least one, are given and the others are counted."""

    ids: list[int]
    num_context: int


def losses(model: PreTrainedModel, padding: int, rows: Sequence[Row]) -> torch.Tensor:
    """The negative log-likelihood of each row's counted tokens, in nats.

    Args:
        model: Any causal language model.
        padding: Any token id that the model has.
        rows: What is asked, in one batch.

    Returns:
        `[rows]`, float32, on the model's device; with a graph, where gradients are enabled.
    """
    # The last token of a row is only predicted.
    given = [row.ids[:-1] for row in rows]
    longest = max(map(len, given))
    # Padded on the right and causal: what follows a row's last token cannot reach its likelihood.
    input_ids = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in given], device=model.device)
    mask = None
    if any(len(ids) < longest for ids in given):
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in given], device=model.device)
    first = min(row.num_context for row in rows) - 1
    logits = _logits_from(model, input_ids, mask, first)
    terms = []
    for row, row_logits in zip(rows, logits, strict=True):
        # Row by row, so that without a graph only one row's logits, [tokens, vocabulary], are ever held as float32.
        predictions = row_logits[row.num_context - 1 - first : len(row.ids) - 1 - first].float()
        counted = torch.tensor(row.ids[row.num_context :], device=predictions.device)
        terms.append(torch.nn.functional.cross_entropy(predictions, counted, reduction="sum"))
    return torch.stack(terms)


def _logits_from(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None, first: int
) -> torch.Tensor:
    """Logits `[rows, positions from first on, vocabulary]`; the others, most of the memory, are not computed."""
    known = inspect.signature(model.forward).parameters
    # Keys and values are of no use afterwards, and of many rows they are most of the memory.
    inputs = {"input_ids": input_ids, "attention_mask": mask} | ({"use_cache": False} if "use_cache" in known else {})
    if "logits_to_keep" not in known:
        # Almost all of transformers knows the argument; what does not may ignore it without a word.
        return torch.as_tensor(model(**inputs).logits[:, first:])
    # Positions rather than their number: of a slice, torch's CPU would copy the output layer's weight for every row.
    kept = torch.arange(first, input_ids.shape[1], device=input_ids.device)
    return torch.as_tensor(model(**inputs, logits_to_keep=kept).logits)
