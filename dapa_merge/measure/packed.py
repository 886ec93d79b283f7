"""Several texts in one sequence, so that what they begin with is computed once and nothing is padding.

Each token attends to the shared beginning and to its own text, and has the position that it has there. Prompts in a
chat template have a system message in common, and texts end at different places: of a padded batch, that is nearly half
of the tokens. Layers that carry states on from token to token cannot be told so, which is why `reader` tries it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from dapa_merge.measure.determinism import batch_invariant
from dapa_merge.measure.perplexity import ScoredText, counted_logits, only_logits, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# As `counted_logits`.
Read = Callable[["PreTrainedModel", int, Sequence[ScoredText]], list[torch.Tensor]]
# Every token of a sequence is compared with every other. With more tokens than that, or where hardly any are saved,
# padding is cheaper.
MAX_TOKENS = 2048
MAX_SHARE = 0.75
# Of the spread of a token's logits. Rounding to 16 bits moves those of small models by a tenth of it.
TOLERANCE = 0.3


def reader(model: PreTrainedModel, padding: int, rows: Sequence[ScoredText]) -> Read:
    """`packed_logits` if a model computes from packed texts what it computes from padded ones, else `counted_logits`.

    Args:
        model: Any causal language model.
        padding: Any token id.
        rows: Texts to try it with; two different ones are enough.
    """
    if not rows or not {"position_ids", "logits_to_keep"} <= {*inspect.signature(model.forward).parameters}:
        return counted_logits
    shared = _num_shared(rows)
    # Where a text begins, it would notice the one before most.
    tried = [ScoredText(row.ids, min(shared + 1, len(row.ids))) for row in rows]
    with torch.no_grad():
        expected = counted_logits(model, padding, tried)
        try:
            found = _packed(model, tried, shared)
        except (ValueError, RuntimeError, TypeError, AttributeError):
            # A model that takes no such mask.
            return counted_logits
    return packed_logits if all(map(_is_alike, found, expected)) else counted_logits


def packed_logits(model: PreTrainedModel, padding: int, rows: Sequence[ScoredText]) -> list[torch.Tensor]:
    """Compute what `counted_logits` computes, but for rounding, from texts that are packed where that pays.

    Returns:
        `[counted tokens, vocabulary]` for each row, in the model's dtype; with a graph if gradients are enabled.
    """
    shared, longest = _num_shared(rows), max(len(row.ids) for row in rows)
    num_packed = shared + sum(len(row.ids) - 1 - shared for row in rows)
    if num_packed > min(MAX_TOKENS, MAX_SHARE * len(rows) * (longest - 1)):
        return counted_logits(model, padding, rows)
    return _packed(model, rows, shared)


def _packed(model: PreTrainedModel, rows: Sequence[ScoredText], shared: int) -> list[torch.Tensor]:
    ids, positions, owners = rows[0].ids[:shared], [*range(shared)], [-1] * shared
    wanted: list[int] = []
    for number, row in enumerate(rows):
        # The last token of a row is only predicted.
        own = row.ids[shared:-1]
        wanted += range(len(ids) + row.num_context - 1 - shared, len(ids) + len(own))
        positions += range(shared, shared + len(own))
        owners += [number] * len(own)
        ids += own
    owner = torch.tensor(owners, device=model.device)
    sees = ((owner == owner[:, None]) | (owner < 0)).tril()
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~sees, torch.finfo(model.dtype).min)
    with batch_invariant(model):
        logits = model(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions], device=model.device),
            **without_cache(model),
            **only_logits(model, torch.tensor(wanted, dtype=torch.long, device=model.device)),
        ).logits
    return list(torch.split(logits[0], [len(row.ids) - row.num_context for row in rows]))


def _num_shared(rows: Sequence[ScoredText]) -> int:
    """The number of tokens that all texts begin with, before the one that predicts a counted one."""
    most = min(row.num_context for row in rows) - 1
    first, last = min(row.ids[:most] for row in rows), max(row.ids[:most] for row in rows)
    return next((place for place in range(most) if first[place] != last[place]), most)


def _is_alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the logits of every token, `[tokens, vocabulary]`, are equal but for rounding."""
    spread = (expected - expected.mean(-1, keepdim=True)).float().norm(dim=-1)
    return bool(((found - expected).float().norm(dim=-1) <= TOLERANCE * spread).all())
