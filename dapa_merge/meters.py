"""What a recipe's models are measured with: in its search, and for its report. This loads torch."""

from __future__ import annotations

from dapa_merge.evaluate.drafts import Drafts
from dapa_merge.evaluate.evaluators import Scorer, find_evaluator, find_second_opinion
from dapa_merge.evaluate.generate import BatchSize
from dapa_merge.evaluate.marker import RULES, Marker
from dapa_merge.evaluate.measure import Meter
from dapa_merge.evaluate.options import EvaluatorOptions
from dapa_merge.evaluate.prompts import PromptSet, load_prompts
from dapa_merge.evaluate.skills import Skill, load_skills
from dapa_merge.evaluate.texts import Text, load_text
from dapa_merge.recipe import Recipe

# Tokens of a text whose perplexity a report gives; more say little more, and take long without an accelerator.
MAX_TEXT_TOKENS = 20_000


def search_meter(recipe: Recipe, prompts: PromptSet, options: EvaluatorOptions) -> Meter:
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


def report_meter(recipe: Recipe, prompts: PromptSet, options: EvaluatorOptions) -> Meter:
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
    options: EvaluatorOptions,
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
