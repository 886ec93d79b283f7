"""Who says of each response whether it is a refusal: the rules, the paper's strings, or a judge.

What a recipe cannot say of evaluators, because other machines have others. It imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapa_merge.measure.refusal.classify import Outcome, classify, settle

# The verdict on the beginning of a response to a prompt, if nothing that may follow can change it.
Settle = Callable[[str, str], Outcome | None]


@dataclass(frozen=True)
class Marker:
    """Marks responses, each for itself.

    Attributes:
        name: As a recipe's `evaluator` names it.
        identity: Everything beside this package's version that decides its verdicts; a search's journal keeps it.
        mark: Prompts and the responses to them, as many, to an outcome each.
        settle: What may end a response early; None if only whole responses can be marked.
        max_new_tokens: Where responses are cut off unless the user says otherwise.
    """

    name: str
    identity: str
    mark: Callable[[Sequence[str], Sequence[str]], Sequence[Outcome]]
    settle: Settle | None = None
    max_new_tokens: int = 100


def _mark(prompts: Sequence[str], responses: Sequence[str]) -> list[Outcome]:
    return [classify(response, prompt) for prompt, response in zip(prompts, responses, strict=True)]


RULES = Marker("refusal", "rules", _mark, settle)
