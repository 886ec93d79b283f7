"""What a recipe cannot say of evaluators, because other machines have others. It imports none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dapa_merge.errors import UsageError


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
