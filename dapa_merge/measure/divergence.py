"""How far a model moves from the target: the KL divergence in nats per token, on the target's own answers.

The answers are greedy and read teacher-forced, so that one forward pass compares the two models' next-token
distributions at every token of them. Unlike perplexity on a text, divergence sees every change of what the target would
say, and it needs no right answers.

The target's distributions come from the states that enter its output layer, thousands of times smaller than logits; no
edit changes that layer. Where the model alters logits afterwards (soft-capping, scaling), logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import batch_invariant
from dapa_merge.measure.generate import generate_ids, prompt_ids
from dapa_merge.measure.packed import Read
from dapa_merge.measure.perplexity import ScoredText, counted_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Tokens of an answer that are compared: enough to see whether it goes another way.
MAX_NEW_TOKENS = 32
# Maximum tokens of a batch: each may have logits over the whole vocabulary.
MAX_BATCH_TOKENS = 2048


class ReferenceRow(NamedTuple):
    """A prompt with the target's own answer, and what determines the target's distribution at each of its tokens.

    Attributes:
        text: The prompt in the chat template is given, the answer is counted, including its end token if it has one.
        known: In the target's dtype, on the CPU: the states that enter the output layer, `[counted tokens, hidden]`, or
            logits, `[counted tokens, vocabulary]`.
        is_logits: Which of the two.
    """

    text: ScoredText
    known: torch.Tensor
    is_logits: bool

    @property
    def num_counted(self) -> int:
        """Number of tokens in the answer."""
        return len(self.text.ids) - self.text.num_context


@dataclass(frozen=True)
class Reference:
    """The target's own answers to prompts, and its distributions there.

    Attributes:
        rows: The longest first, so that a batch that does not fit in memory is the first one.
        padding: A token id to pad batches with.
    """

    rows: tuple[ReferenceRow, ...]
    padding: int

    @property
    def num_counted(self) -> int:
        """Number of tokens that are compared."""
        return sum(row.num_counted for row in self.rows)


def make_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: BatchSize,
    max_new_tokens: int = MAX_NEW_TOKENS,
    keeps_logits: bool = False,
    answers: Sequence[list[int]] | None = None,
) -> Reference:
    """Let the target answer prompts, and note its distributions at every token of the answers.

    Args:
        model: The target itself, with nothing transplanted, prepared by `prepare_for_greedy`.
        tokenizer: The target's.
        prompts: User requests, without template.
        batch_size: Maximum number of prompts at once.
        max_new_tokens: Number of leading tokens of an answer to compare.
        keeps_logits: Whether models with another output layer than the target's will be compared too, such as the
            source. Takes the memory of one number for each token of the answers and each entry of the vocabulary.
        answers: The tokens of its answers, as `generate_ids` gives them, if they are known.

    Raises:
        UsageError: If a prompt is empty, or too long for the model.
    """
    # Not speculative: earlier answers must not decide a near-tie between two tokens.
    if answers is None:
        answers = generate_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    contexts = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    texts = [ScoredText(context + answer, len(context)) for context, answer in zip(contexts, answers, strict=True)]
    texts.sort(key=lambda text: -len(text.ids))
    padding = tokenizer.pad_token_id
    # Not in inference mode, whose tensors cannot take part in a graph.
    with torch.no_grad(), batch_invariant(model):
        holds_states = bool(texts) and not keeps_logits and _determine_logits(model, padding, texts[:1])
        read = _states if holds_states else counted_logits
        known = list(
            _fitting(batch_size, texts).map(
                lambda batch: [kept.to("cpu", copy=True) for kept in read(model, padding, batch)], texts
            )
        )
    return Reference(
        tuple(ReferenceRow(text, kept, not holds_states) for text, kept in zip(texts, known, strict=True)), padding
    )


def divergence(model: PreTrainedModel, reference: Reference, batch_size: BatchSize) -> float:
    """Return the mean KL(target || model) over all counted tokens, in nats.

    Args:
        model: The target with a selection transplanted or, if the reference keeps logits, any model of its family.
        reference: The target's.
        batch_size: Maximum number of answers at once.

    Returns:
        At least 0; infinity if it is not a finite number. NaN if nothing can be compared, because there are no answers,
        or the model lacks embeddings for their tokens.
    """
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if not reference.rows or max(max(row.text.ids) for row in reference.rows) >= num_embeddings:
        return math.nan
    with torch.inference_mode(), batch_invariant(model):
        found = _fitting(batch_size, [row.text for row in reference.rows]).map(
            lambda batch: divergences(model, reference.padding, batch).tolist(), reference.rows
        )
        total = math.fsum(found)
    # Rounding may make the divergence of equal distributions slightly negative.
    return max(0.0, total / reference.num_counted) if math.isfinite(total) else math.inf


def divergences(
    model: PreTrainedModel,
    padding: int,
    rows: Sequence[ReferenceRow],
    temperature: float = 1.0,
    read: Read = counted_logits,
) -> torch.Tensor:
    """Compute the KL(target || model) of each row, summed over its counted tokens, in nats.

    Exact over the vocabulary, in float32 (float64 for a model in it) from logits in the model's dtype. If the two
    vocabularies differ in size, both distributions are restricted to their common entries. The
    logits of both are divided by the temperature. `read` computes the model's.

    Returns:
        `[rows]`, on the model's device; with a graph if gradients are enabled.
    """
    own = read(model, padding, [row.text for row in rows])
    terms = []
    for expected, logits in zip(_target_logits(model, rows), own, strict=True):
        # Row by row, because logits in float32 are large.
        size = min(expected.shape[-1], logits.shape[-1])
        terms.append(
            torch.nn.functional.kl_div(
                _log_probabilities(logits[:, :size] / temperature),
                _log_probabilities(expected[:, :size] / temperature),
                reduction="sum",
                log_target=True,
            )
        )
    return torch.stack(terms)


def _fitting(batch_size: BatchSize, texts: Sequence[ScoredText]) -> BatchSize:
    """A batch size of its own for texts, the longest of which is the first."""
    longest = len(texts[0].ids) if texts else 1
    return BatchSize(max(1, min(batch_size.limit, MAX_BATCH_TOKENS // longest)))


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _target_logits(model: PreTrainedModel, rows: Sequence[ReferenceRow]) -> list[torch.Tensor]:
    """The target's logits, `[counted tokens, vocabulary]` for each row."""
    known = [row.known.to(model.device) for row in rows]
    if rows[0].is_logits:
        return known
    # In one call, because it may upcast the layer's whole weight.
    with batch_invariant(model):
        logits = model.get_output_embeddings()(torch.cat(known)).to(model.device)
    return list(torch.split(logits, [row.num_counted for row in rows]))


def _determine_logits(model: PreTrainedModel, padding: int, texts: Sequence[ScoredText]) -> bool:
    """Whether logits are exactly what the output layer makes of the states that enter it, with no change afterwards."""
    with _entering(model) as seen:
        logits = counted_logits(model, padding, texts)
    if len(seen) != 1 or seen[0].dim() != logits[0].dim() + 1:
        return False
    # Of the same shape, so that the same kernel rounds the same way.
    recomputed = _counted_states(model.get_output_embeddings()(seen[0]).to(model.device), texts)
    return all(torch.equal(one, own) for one, own in zip(recomputed, logits, strict=True))


def _states(model: PreTrainedModel, padding: int, texts: Sequence[ScoredText]) -> list[torch.Tensor]:
    """The states that enter the output layer, `[counted tokens, hidden]` for each text."""
    with _entering(model) as seen:
        counted_logits(model, padding, texts)
    return _counted_states(seen[0], texts)


def _counted_states(states: torch.Tensor, texts: Sequence[ScoredText]) -> list[torch.Tensor]:
    """The states that predict each text's counted tokens; `states` may lack the first positions of all texts."""
    # The last token of a text is not an input.
    first = max(len(text.ids) for text in texts) - 1 - states.shape[1]
    return [
        row[text.num_context - 1 - first : len(text.ids) - 1 - first] for text, row in zip(texts, states, strict=True)
    ]


@contextmanager
def _entering(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect what enters the output layer inside a `with` block; nothing if the model does not call it."""
    seen: list[torch.Tensor] = []
    layer = model.get_output_embeddings()
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
