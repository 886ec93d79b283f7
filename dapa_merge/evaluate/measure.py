"""The figures of one model: DSR and its complements, over-refusal, perplexity, skill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dapa_merge.evaluate.chance import interval
from dapa_merge.evaluate.generate import BatchSize, generate
from dapa_merge.evaluate.perplexity import perplexity
from dapa_merge.evaluate.refusal import Outcome, classify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.evaluate.prompts import PromptSet


@dataclass(frozen=True)
class Figures:
    """What was measured of a model; rates are in [0, 1].

    Attributes:
        num_harmful: Harmful prompts asked.
        dsr: Share of them that was refused (defense success rate).
        dsr_interval: Where it lies with 95 % confidence, for more prompts like these.
        complied: Share that was answered.
        degenerate: Share whose response was empty, a loop or noise; never counted as a defense.
        num_harmless: Harmless prompts asked.
        over_refusal: Share of them that was refused.
        over_refusal_interval: Where it lies with 95 % confidence.
        perplexity: On the set's passages.
        skill: Share of skill questions answered exactly right; None if the set has none.
        num_skill: Skill questions asked.
    """

    num_harmful: int
    dsr: float
    dsr_interval: tuple[float, float]
    complied: float
    degenerate: float
    num_harmless: int
    over_refusal: float
    over_refusal_interval: tuple[float, float]
    perplexity: float
    skill: float | None
    num_skill: int


@dataclass(frozen=True)
class Response:
    """What a model said to a prompt of a kind (`harmful` or `harmless`), and what that was taken for."""

    kind: str
    prompt: str
    response: str
    outcome: str


@dataclass(frozen=True)
class Meter:
    """Measures models, always with the same prompts and settings.

    Attributes:
        prompts: What is asked.
        max_new_tokens: Where responses are cut off.
        batch_size: How many prompts at once.
        progress: Called with numbers of prompts as they are answered.
    """

    prompts: PromptSet
    max_new_tokens: int
    batch_size: BatchSize
    progress: Callable[[int], None] = lambda _: None

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measurement:
        """A measurement of the model as it is now; nothing is asked before a figure is."""
        return Measurement(self, model, tokenizer)


class Measurement:
    """Figures of a model, each measured when it is first read; valid while the model stays as it is."""

    def __init__(self, meter: Meter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._meter = meter
        self._model = model
        self._tokenizer = tokenizer

    def _ask(self, prompts: tuple[str, ...]) -> list[str]:
        meter = self._meter
        return generate(
            self._model,
            self._tokenizer,
            prompts,
            max_new_tokens=meter.max_new_tokens,
            batch_size=meter.batch_size,
            progress=meter.progress,
        )

    @cached_property
    def _harmful(self) -> list[Response]:
        return self.judge("harmful", self._meter.prompts.harmful)

    @cached_property
    def _harmless(self) -> list[Response]:
        return self.judge("harmless", self._meter.prompts.harmless)

    def judge(self, kind: str, prompts: tuple[str, ...]) -> list[Response]:
        """Ask some prompts of a kind, and judge the responses; asked again, the model is asked again."""
        return [
            Response(kind, prompt, response, classify(response).value)
            for prompt, response in zip(prompts, self._ask(prompts), strict=True)
        ]

    def responses(self) -> list[Response]:
        """Every harmful and harmless prompt with its response and the verdict, for people to check."""
        return self._harmful + self._harmless

    @property
    def dsr(self) -> float:
        """Share of harmful prompts refused."""
        return _share(self._harmful, Outcome.REFUSED)

    @property
    def over_refusal(self) -> float:
        """Share of harmless prompts refused."""
        return _share(self._harmless, Outcome.REFUSED)

    @cached_property
    def perplexity(self) -> float:
        """Perplexity on the set's passages."""
        return perplexity(self._model, self._tokenizer, self._meter.prompts.passages, batch_size=self._meter.batch_size)

    @cached_property
    def skill(self) -> float | None:
        """Share of skill questions whose response is the right answer, but for case and surrounding space."""
        questions = self._meter.prompts.skill
        if not questions:
            return None
        responses = self._ask(tuple(question.prompt for question in questions))
        right = [
            " ".join(response.lower().split()) == " ".join(question.answer.lower().split())
            for response, question in zip(responses, questions, strict=True)
        ]
        return sum(right) / len(right)

    def figures(self) -> Figures:
        """All figures; what was not measured yet is measured now."""
        prompts = self._meter.prompts
        return Figures(
            num_harmful=len(prompts.harmful),
            dsr=self.dsr,
            dsr_interval=interval(_count(self._harmful, Outcome.REFUSED), len(prompts.harmful)),
            complied=_share(self._harmful, Outcome.COMPLIED),
            degenerate=_share(self._harmful, Outcome.DEGENERATE),
            num_harmless=len(prompts.harmless),
            over_refusal=self.over_refusal,
            over_refusal_interval=interval(_count(self._harmless, Outcome.REFUSED), len(prompts.harmless)),
            perplexity=self.perplexity,
            skill=self.skill,
            num_skill=len(prompts.skill),
        )


def _share(responses: Sequence[Response], outcome: Outcome) -> float:
    return _count(responses, outcome) / len(responses)


def _count(responses: Sequence[Response], outcome: Outcome) -> int:
    return sum(response.outcome == outcome.value for response in responses)
