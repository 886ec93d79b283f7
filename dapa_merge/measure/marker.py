"""Who says of each response whether it is a refusal: the rules, the paper's strings, or a judge.

What a recipe cannot say of evaluators, because other machines have others. It imports none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapa_merge.errors import UsageError
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


@dataclass(frozen=True)
class EvaluatorOptions:
    """What a recipe cannot say of evaluators, because it is only data, and other machines have others.

    Attributes:
        evaluator_file: A Python file that registers evaluators.
        judge_model: The model of the judge; None for no judge.
        judge_url: Where its OpenAI-compatible endpoint is; None for the client's own.
        judge_requests: How many requests may be made in all; None for any number.
    """

    evaluator_file: Path | None = None
    judge_model: str | None = None
    judge_url: str | None = None
    judge_requests: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> EvaluatorOptions:
        """What `DAPA_EVALUATOR_FILE`, `DAPA_JUDGE_MODEL`, `DAPA_JUDGE_URL` and `DAPA_JUDGE_REQUESTS` say.

        Raises:
            UsageError: If the last one is no number.
        """
        file = environment.get("DAPA_EVALUATOR_FILE")
        return cls(
            evaluator_file=Path(file) if file else None,
            judge_model=environment.get("DAPA_JUDGE_MODEL") or None,
            judge_url=environment.get("DAPA_JUDGE_URL") or None,
            judge_requests=parse_requests(environment.get("DAPA_JUDGE_REQUESTS"), "DAPA_JUDGE_REQUESTS"),
        )


def parse_requests(text: str | None, name: str) -> int | None:
    """A number of requests, as the option or variable of that name gives it; None if it gives none.

    Raises:
        UsageError: If it is no whole number of at least 1.
    """
    if not text:
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"{name} is {text!r}; write a whole number of at least 1")
    return int(text)
