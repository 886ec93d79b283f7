"""A prompt that is traced, as one model reads it: its tokens, which of them are the subject, and the two responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dapa_merge.errors import UsageError
from dapa_merge.evaluate.generate import check_ids, context_length
from dapa_merge.trace.contrast import NUM_TOKENS, Contrast, sides_of
from dapa_merge.trace.subject import find_subject, given_subject, subject_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.evaluate.likelihood import Row


@dataclass(frozen=True)
class Case:
    """A prompt that is traced, as one model reads it.

    Attributes:
        contrast: The prompt, and the two responses.
        refusing: The prompt's tokens and those of the refusal, of which the last are counted.
        complying: The same of the answer; of one length.
        subject: The first of the subject's tokens, and the one after the last.
        tokens: What the given tokens read: the prompt with its template, and what both responses begin with.
    """

    contrast: Contrast
    refusing: Row
    complying: Row
    subject: tuple[int, int]
    tokens: tuple[str, ...]

    @property
    def num_context(self) -> int:
        """How many tokens are given, and can be restored."""
        return self.refusing.num_context


def read_case(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrast,
    subjects: Sequence[str] = (),
    num_tokens: int = NUM_TOKENS,
) -> Case:
    """A contrast as a model reads it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        contrast: The prompt, and the two responses.
        subjects: The first of these that the prompt contains is its subject; if there are none, it is found.
        num_tokens: Of each response, how many tokens are counted, at most.

    Raises:
        UsageError: If the subject is not in the prompt, the prompt is too long, or the responses do not differ.
        CheckpointError: If the tokenizer is another model's.
    """
    prompt = contrast.prompt
    span = given_subject(prompt, subjects) if subjects else find_subject(prompt)
    sides = sides_of(tokenizer, contrast, num_tokens)
    if not sides:
        raise UsageError(
            f"the two responses to the prompt {prompt[:80]!r} cannot be told apart: they are the same, or one is how "
            f"the other begins"
        )
    refusing, complying = (side.row for side in sides)
    check_ids(model, (refusing.ids, complying.ids))
    limit = context_length(model)
    if len(refusing.ids) > limit:
        raise UsageError(
            f"the prompt {prompt[:80]!r} has {len(refusing.ids)} tokens with the beginning of its answer, but the "
            f"model's context ends at {limit}; shorten it or leave it out"
        )
    context = refusing.ids[: refusing.num_context]
    tokens = tuple(tokenizer.decode([token], skip_special_tokens=False) for token in context)
    return Case(contrast, refusing, complying, subject_tokens(tokenizer, prompt, span), tokens)


def embedding_deviation(model: PreTrainedModel, cases: Sequence[Case]) -> float:
    """The standard deviation of the embeddings of the cases' subjects, over all tokens and features."""
    ids = [token for case in cases for token in case.refusing.ids[slice(*case.subject)]]
    with torch.inference_mode():
        return float(model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float().std())
