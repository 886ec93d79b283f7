"""Measuring one model: its responses and what they are taken for, its perplexity, its skills, its score.

What a recipe's models are measured with: in its search, and for its report. This loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dapa_merge.errors import UsageError
from dapa_merge.measure.callback import Candidate
from dapa_merge.measure.decode import BatchSize, Drafts
from dapa_merge.measure.evaluators import Scorer, find_evaluator, find_second_opinion
from dapa_merge.measure.figures import Figures, Response, SkillFigure
from dapa_merge.measure.generate import generate
from dapa_merge.measure.marker import RULES, Marker
from dapa_merge.measure.perplexity import Reading, read
from dapa_merge.measure.prompts.sets import PromptSet, Text, load_prompts, load_text
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.skills import Skill, load_skills, skill_figure
from dapa_merge.measure.statistics import count, refusal_figures
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.checkpoint.units import Unit


# What gives a live model a figure for a skill: the model, its tokenizer, and how many questions at once.
SkillTest = Callable[[Any, Any, BatchSize], SkillFigure]


@dataclass(frozen=True)
class Meter:
    """Measures models, always with the same prompts and settings.

    Attributes:
        prompts: What is asked.
        max_new_tokens: Where responses are cut off.
        batch_size: How many prompts at once.
        markers: Who marks the responses; the first one's outcomes are the figures.
        stops_early: Whether a response ends where the first marker's outcome is settled.
        drafts: What such models said before; None to have every token said in a run of its own.
        must_repeat: Whether figures are to depend on nothing that was asked before, at whatever cost of time.
        scorer: What scores a model as a whole beside that.
        text: What perplexity is taken of; None for the passages of the prompt set.
        skills: Further tests.
    """

    prompts: PromptSet
    max_new_tokens: int
    batch_size: BatchSize
    markers: tuple[Marker, ...] = (RULES,)
    stops_early: bool = False
    drafts: Drafts | None = None
    must_repeat: bool = False
    scorer: Scorer | None = None
    text: Text | None = None
    skills: tuple[Skill, ...] = ()

    @property
    def identity(self) -> str:
        """Everything of the evaluator that decides a verdict."""
        return (self.scorer or self.markers[0]).identity

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, selection: Sequence[Unit] = ()
    ) -> Measurement:
        """A measurement of the model as it is now; nothing is asked before a figure is."""
        return Measurement(self, Candidate(model, tokenizer, tuple(selection)))


class Measurement:
    """Figures of a model, each measured when it is first read; valid while the model stays as it is."""

    def __init__(self, meter: Meter, candidate: Candidate) -> None:
        self._meter = meter
        self._candidate = candidate

    def _ask(self, prompts: Sequence[str], *, whole: bool) -> list[str]:
        meter = self._meter
        return generate(
            self._candidate.model,
            self._candidate.tokenizer,
            prompts,
            max_new_tokens=meter.max_new_tokens,
            batch_size=meter.batch_size,
            settle=meter.markers[0].settle if meter.stops_early and not whole else None,
            drafts=meter.drafts,
            must_repeat=meter.must_repeat,
        )

    @cached_property
    def _harmful(self) -> list[Response]:
        return self.judge("harmful", self._meter.prompts.harmful)

    @cached_property
    def _harmless(self) -> list[Response]:
        return self.judge("harmless", self._meter.prompts.harmless)

    def judge(self, kind: str, prompts: Sequence[str]) -> list[Response]:
        """Ask some prompts of a kind, and mark the responses; asked again, the model is asked again."""
        responses = self._ask(prompts, whole=False)
        first, *others = [
            (marker.name, [outcome.value for outcome in marker.mark(prompts, responses)])
            for marker in self._meter.markers
        ]
        categories = self._meter.prompts.categories
        return [
            Response(
                kind,
                categories.get((kind, prompt), ""),
                prompt,
                responses[index],
                first[1][index],
                {name: outcomes[index] for name, outcomes in others},
            )
            for index, prompt in enumerate(prompts)
        ]

    def responses(self) -> list[Response]:
        """Every harmful and harmless prompt with its response and the verdict, for people to check."""
        return self._harmful + self._harmless

    @property
    def dsr(self) -> float:
        """Share of harmful prompts refused."""
        return count(self._harmful, Outcome.REFUSED) / len(self._harmful)

    @property
    def over_refusal(self) -> float:
        """Share of harmless prompts refused."""
        return count(self._harmless, Outcome.REFUSED) / len(self._harmless)

    @cached_property
    def score(self) -> float | None:
        """What the scorer gives the model; None if there is none."""
        scorer = self._meter.scorer
        return None if scorer is None else scorer.score(self._candidate, self._meter.batch_size.limit)

    @property
    def perplexity(self) -> float:
        """Perplexity of the text, or of the set's passages."""
        return self._reading.perplexity

    @cached_property
    def _reading(self) -> Reading:
        text = self._meter.text
        passages = self._meter.prompts.passages if text is None else text.passages
        found = read(
            self._candidate.model,
            self._candidate.tokenizer,
            passages,
            batch_size=self._meter.batch_size,
            **({} if text is None else {"max_tokens": text.max_tokens}),
        )
        if passages and math.isnan(found.perplexity):
            raise UsageError(
                f"the text for the perplexity ({self._text}) is too short: of the model's tokens in each passage the "
                "first is given, and none is left to count"
            )
        return found

    @property
    def _text(self) -> str:
        text = self._meter.text
        return "the prompt set's own passages" if text is None else text.name

    @cached_property
    def skills(self) -> tuple[SkillFigure, ...]:
        """Every skill that the meter tests."""
        candidate = self._candidate
        return tuple(
            skill_figure(
                skill,
                lambda prompts: self._ask(prompts, whole=True),
                lambda harness: harness.score(
                    candidate.model, candidate.tokenizer, batch_size=self._meter.batch_size.limit
                ),
            )
            for skill in self._meter.skills
        )

    def figures(self) -> Figures:
        """All figures; what was not measured yet is measured now."""
        text = self._meter.text
        # First, because it is soon told whether the text will do.
        is_cut = self._reading.is_cut
        return Figures(
            **refusal_figures(self.responses()),
            score=self.score,
            perplexity=self.perplexity,
            text=f"{self._text}, the first {text.max_tokens:,} tokens of it" if text and is_cut else self._text,
            skills=self.skills,
        )


# Tokens of a text whose perplexity a report gives; more say little more, and take long without an accelerator.
MAX_TEXT_TOKENS = 20_000


def search_meter(recipe: Recipe, prompts: PromptSet, options: Options) -> Meter:
    """What tests the candidates of a search: only what its requirement is about, each response only as far as needed.

    Raises:
        UsageError: If the recipe's evaluator is not there.
    """
    evaluator = find_evaluator(recipe.evaluator, options, searching=True)
    scorer = evaluator if isinstance(evaluator, Scorer) else None
    marker = evaluator if isinstance(evaluator, Marker) else RULES
    return Meter(
        prompts,
        recipe.max_new_tokens or marker.max_new_tokens,
        BatchSize(recipe.batch_size),
        markers=(marker,),
        stops_early=True,
        drafts=Drafts(),
        scorer=scorer,
    )


def report_meter(recipe: Recipe, prompts: PromptSet, options: Options) -> Meter:
    """What measures a recipe's target, result and source for the report: every response whole, and by every marker.

    No figure depends on what was measured before it.

    Raises:
        UsageError: If the recipe's evaluator, judge, text or skills are not there.
    """
    return make_meter(
        prompts,
        options,
        evaluator=recipe.evaluator,
        max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.batch_size,
        text=recipe.text,
        skills=recipe.skills,
    )


def make_meter(
    prompts: PromptSet,
    options: Options,
    *,
    evaluator: str = RULES.name,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    text: str | None = None,
    skills: str | None = None,
) -> Meter:
    """What measures a model in full; the arguments are as in a recipe.

    Raises:
        UsageError: If the evaluator, the judge, the text or the skills are not there.
    """
    found = find_evaluator(evaluator, options)
    asked_for = [found] if isinstance(found, Marker) else []
    markers = {marker.name: marker for marker in (RULES, *asked_for)}
    if "judge" not in markers and (judge := find_second_opinion(options)) is not None:
        markers[judge.name] = judge
    return Meter(
        prompts,
        max_new_tokens or max(marker.max_new_tokens for marker in markers.values()),
        BatchSize(batch_size),
        markers=tuple(markers.values()),
        drafts=Drafts(),
        must_repeat=True,
        scorer=found if isinstance(found, Scorer) else None,
        text=_text(prompts, text),
        skills=skills_of(prompts, skills),
    )


def _text(prompts: PromptSet, name: str | None) -> Text | None:
    if name is None and prompts.passages != load_prompts("builtin").passages:
        # Texts that came with the prompts say more of their models than any other.
        return None
    return load_text(name or "auto", max_tokens=MAX_TEXT_TOKENS)


def skills_of(prompts: PromptSet, names: str | None) -> tuple[Skill, ...]:
    """What a target is tested for beside safety: the prompts' own skill, and those that a recipe names.

    Raises:
        UsageError: If one is not there.
    """
    own = (Skill("skill", prompts.skill),) if prompts.skill else ()
    return own + (load_skills(names, [skill.name for skill in own]) if names else ())
