"""What models of one search said before: guesses at the next tokens, which a model then checks many at a time.

A guess is never believed: `decode` keeps a drafted token only where the model itself would have said it (speculative
decoding, Leviathan et al. 2023, with earlier responses in place of a small model). Standard library only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

# Responses kept for each prompt: candidates of a search often say what some earlier one said.
MAX_RESPONSES = 16
# How many tokens say where one is in a response: fewer guess more often, more guess better.
CONTEXT = 3
# A token is not guessed if it, and all that were guessed before it, would be right less often than this.
MIN_CHANCE = 0.6
_START = -1


class Drafts:
    """A memory of responses, as token ids with their end token, of models with the same tokenizer.

    It may be shared by any number of models and prompts. What it holds changes how soon responses come and, where two
    tokens nearly tie in a model that is not `steady`, what they are.
    """

    def __init__(self) -> None:
        self._responses: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._following: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def remember(self, prompt: Sequence[int], response: Sequence[int]) -> None:
        """Keep a response, the most recent first; one that was known already only moves to the front."""
        known = self._responses.setdefault(tuple(prompt), [])
        tokens = tuple(response)
        if tokens in known:
            known.remove(tokens)
        else:
            padded = (_START,) * CONTEXT + tokens
            for position, token in enumerate(tokens):
                self._following[padded[position : position + CONTEXT]][token] += 1
        known.insert(0, tokens)
        del known[MAX_RESPONSES:]

    def propose(self, prompt: Sequence[int], response: Sequence[int], max_guess: int) -> list[int]:
        """A guess at how a response to a prompt goes on.

        The rest of an earlier response to the prompt that began alike; where there is none, the tokens that mostly
        followed the last few in any response.

        Args:
            prompt: Token ids.
            response: What was said so far; may be empty.
            max_guess: How long a guess may be that no earlier response to the same prompt supports.

        Returns:
            Any number of token ids.
        """
        said = tuple(response)
        for draft in self._responses.get(tuple(prompt), ()):
            if len(draft) > len(said) and draft[: len(said)] == said:
                return list(draft[len(said) :])
        return self._continue(((_START,) * CONTEXT + said)[-CONTEXT:], max_guess)

    def _continue(self, context: tuple[int, ...], max_guess: int) -> list[int]:
        guess: list[int] = []
        chance = 1.0
        while len(guess) < max_guess and context in self._following:
            counts = self._following[context]
            token, count = counts.most_common(1)[0]
            # What was seen once may well have been chance.
            chance *= count / (counts.total() + 1)
            if chance < MIN_CHANCE:
                break
            guess.append(token)
            context = (*context[1:], token)
        return guess
