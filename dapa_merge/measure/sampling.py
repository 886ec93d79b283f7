"""Sampling with a seed: each token of a response depends on the seed, the prompt and its place, on nothing else.

So a response does not depend on other prompts, on batches or on speculative decoding, up to rounding of the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import LogitsProcessor

from dapa_merge.recipe.asking import Sampling

if TYPE_CHECKING:
    import torch


def draws(seed: int, prompt: Sequence[int], start: int, number: int) -> list[float]:
    """Uniform numbers in [0, 1) for tokens of the response to a prompt, from the token `start` on."""
    key = hashlib.blake2b(repr((seed, *prompt)).encode(), digest_size=16).digest()
    digests = (
        hashlib.blake2b(place.to_bytes(8, "big"), key=key, digest_size=6).digest()
        for place in range(start, start + number)
    )
    return [int.from_bytes(digest, "big") / (1 << 48) for digest in digests]


def choose(sampling: Sampling, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Choose tokens by the inverse of their cumulative distribution, the likeliest first.

    Args:
        sampling: Temperature and top-p.
        logits: Of any shape, the last dimension over the vocabulary.
        drawn: Uniform numbers in [0, 1), shaped like the logits without that dimension.

    Returns:
        Token ids, shaped like the numbers.
    """
    chances, ids = (logits.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    # The likeliest tokens until they hold `top_p`; the first always stays.
    kept = chances * (chances.cumsum(-1) - chances < sampling.top_p)
    total = kept.cumsum(-1)
    # In float32 a number just below 1 may round to 1.
    reached = (drawn.to(total) * total[..., -1]).minimum(total[..., -1] * (1 - 1e-6))
    index = (total <= reached[..., None]).sum(-1, keepdim=True)
    return ids.gather(-1, index).squeeze(-1)


class Sampled(LogitsProcessor):  # type: ignore[misc]
    """Lets a model's own greedy `generate` choose the tokens that a `Sampling` draws."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], start: int) -> None:
        """Take the rows' prompts, and the number of tokens of a row before its response, padding included."""
        self._sampling = sampling
        self._prompts = prompts
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self._start
        drawn = scores.new_tensor([draws(self._sampling.seed, prompt, place, 1)[0] for prompt in self._prompts])
        chosen = choose(self._sampling, scores, drawn)
        return scores.new_full(scores.shape, float("-inf")).scatter(-1, chosen[:, None], 0.0)
