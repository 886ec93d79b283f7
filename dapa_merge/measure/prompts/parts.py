"""A recipe's prompts in parts: for the choice that some edits make, for the search, and for the report.

No text is in two parts, so that no figure of a report rests on a prompt that anything was chosen by. Keep prompts are
parted likewise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from dapa_merge.checkpoint.units import AUTO
from dapa_merge.errors import RecipeError, UsageError
from dapa_merge.measure.confined import template_fault
from dapa_merge.measure.figures import HELD_OUT, SEARCH_PROMPTS
from dapa_merge.measure.prompts.conversation import first_turn
from dapa_merge.measure.prompts.labels import Columns, read_requests
from dapa_merge.measure.prompts.rows import SUFFIXES, base_and_query, listed_names, parse_query, read_rows
from dapa_merge.measure.prompts.sets import (
    FILE_KEYS,
    PACKAGED,
    PromptSet,
    Question,
    asked_after,
    distinct,
    key_of,
    load_packaged,
    load_prompts,
    load_questions,
    load_source,
    question_of,
    tell_prompts,
)
from dapa_merge.plan.edit import may_choose
from dapa_merge.progress import LOG
from dapa_merge.recipe.attacks import parse_attacks
from dapa_merge.recipe.parameters import TASK_PREFIX
from dapa_merge.recipe.recipe import Recipe

# The value of `keep` that stands for questions of the skills.
SKILLS = "skills"


@dataclass(frozen=True)
class Parts:
    """A recipe's prompts in parts; no text is in two of them, unless the recipe names its layers.

    Attributes:
        search: What candidates are tested with.
        report: What the report measures with.
        choice: What an edit that chooses (`Edit.chooses`) makes its choice by; None for other edits.
    """

    search: PromptSet
    report: PromptSet
    choice: PromptSet | None = None


def split_prompts(recipe: Recipe, *, is_rung: bool = False) -> Parts:
    """Load a recipe's prompts, in parts for the choice (of an edit that chooses), the search and the report.

    Args:
        recipe: Names the prompts and the edit.
        is_rung: Whether `edit: auto` tries it. Then all edits have the same report; one that does not choose searches
            with the prompts of the choice too.

    Harmful and harmless prompts are parted by `split`; half of the search's part goes to the choice. The keep prompts
    go to the parts in turn, twice as many to the choice; those that are skill questions go to the report every second
    time, and of the others three of four to the choice. A keep prompt that is harmless too follows it; one that is
    harmful too is left out. Without keep prompts, the harmless ones of each part serve.

    Raises:
        UsageError: If there are too few prompts for all parts, or the recipe's `min_skill` has no questions.
    """
    check_files(recipe)
    prompts = load_prompts(recipe.prompts)
    refuse_turns(recipe, prompts)
    search, report = split(prompts, recipe.confirm)
    chooses = may_choose(recipe.edit)
    if chooses or is_rung:
        choice, search = split(search, what="a choice, a search and a separate report")
        parts = _with_keep(recipe, {"choice": choice, "search": search, "report": report}, prompts)
        if not chooses:
            parts = _without_choice(parts)
    else:
        parts = _with_keep(recipe, {"search": search, "report": report}, prompts)
    if recipe.min_skill is not None and not parts.search.keep_answers:
        raise UsageError(
            f"{recipe.where('parameters.min_skill')} needs questions with known answers; write `keep: skills`, or "
            f"`keep` with a file that has a column answer"
        )
    asked = partial(asked_after, system=recipe.system, chat_template=recipe.chat_template)
    return Parts(asked(parts.search), asked(parts.report), parts.choice and asked(parts.choice))


def all_prompts(recipe: Recipe, *, is_rung: bool = False, tells: bool = True) -> Parts:
    """Load a recipe's prompts for its figures: in parts, or whole twice if nothing is searched or chosen.

    Args:
        recipe: Names the prompts, the edit and the layers.
        is_rung: As for `split_prompts`.
        tells: Whether to log how many there are, if they are whole (`check_prompts` does it for parts).

    Raises:
        UsageError: As `split_prompts` does.
    """
    if recipe.layers is None or may_choose(recipe.edit):
        return split_prompts(recipe, is_rung=is_rung)
    check_files(recipe)
    prompts = load_prompts(recipe.prompts)
    if tells:
        tell_prompts(prompts)
    kept = _keeping(prompts, load_keep(recipe, prompts), frozenset())
    whole = asked_after(kept, recipe.system, recipe.chat_template)
    return Parts(whole, whole)


def refuse_turns(recipe: Recipe, prompts: PromptSet) -> None:
    """Refuse conversations with messages that wait for a model's own answer, where models are compared with each other.

    Raises:
        RecipeError: If there is one.
    """
    asked = (*prompts.harmful, *prompts.harmless)
    if found := next((one for one in asked if first_turn(one) is not None), None):
        raise RecipeError(
            f"{recipe.where('parameters.prompts')}: a search, `compare` and `trace` put the same words to all models, "
            f"but {found[:60]!r} leaves answers to them; add the assistant's messages, or measure with `evaluate` or a "
            f"recipe that names its layers"
        )


def check_prompts(recipe: Recipe) -> None:
    """Read the prompts of a recipe with a search, to find their faults before models are loaded; log their numbers."""
    chooses = may_choose(recipe.edit)
    if recipe.layers is None or chooses:
        parts = split_prompts(recipe)
        tell_prompts(parts.report)
        _tell_parts(recipe, parts)
        if recipe.keep is None and (chooses or recipe.max_divergence is not None):
            LOG.warning(
                "`keep` names no prompts that the fine-tune is for, so the harmless prompts serve instead: its skill "
                "may be lost unnoticed"
            )


def _tell_parts(recipe: Recipe, parts: Parts) -> None:
    """Log which prompts are for what, by the names that all further messages use."""

    def numbers(part: PromptSet) -> str:
        keep = f" and {len(part.keep)} keep" if recipe.keep is not None else ""
        return f"{len(part.harmful)} harmful, {len(part.harmless)} harmless{keep}"

    told = f"{HELD_OUT}, for the report alone: {numbers(parts.report)}; {SEARCH_PROMPTS}: {numbers(parts.search)}"
    if parts.choice is not None:
        too = " (of edits that choose nothing, search prompts too)" if recipe.edit == AUTO else ""
        told += f"; choice prompts: {numbers(parts.choice)}{too}"
    LOG.info(told)


def check_files(recipe: Recipe) -> None:
    """Refuse a chat template that does not compile, and files that a recipe may not name: those without a known suffix.

    What a file of prompts holds is written to the journal and the responses, and a recipe may come from a stranger: the
    file may be a private key.

    Raises:
        RecipeError: If the recipe names such a file.
    """
    if (template := recipe.template()) and (fault := template_fault(template)):
        where = recipe.where("parameters.chat_template")
        raise RecipeError(f"{where}: {recipe.template_file} {fault}")
    for key in ("prompts", "keep", "text", "skills", "attacks"):
        names = getattr(recipe, key) or ""
        if key == "text" or names in ("", *PACKAGED):
            listed: Sequence[str] = (names,)
        else:
            # The word for an attack never means a file, even where one has that name.
            listed = parse_attacks(names)[1] if key == "attacks" else listed_names(names)
        for name in listed:
            base = base_and_query(name)[0]
            if os.path.isfile(base) and Path(base).suffix.lower() not in SUFFIXES:
                raise RecipeError(
                    f"{recipe.where(f'parameters.{key}')} names {base}; a recipe may only name files that end in "
                    f"{', '.join(SUFFIXES)}"
                )


def load_keep(recipe: Recipe, prompts: PromptSet) -> tuple[Question, ...] | None:
    """Load a recipe's distinct keep prompts as questions; None if `keep` is not set.

    Answers are read only if the recipe sets `min_skill`; others are empty. A prompt that the set `prompts` has as a
    harmful one is left out: it should be refused, not kept.

    Raises:
        UsageError: If they do not exist or are malformed.
        HubError: If they cannot be fetched.
    """
    if recipe.keep is None:
        return None
    harmful = set(map(key_of, prompts.harmful))
    found = (
        _skill_questions(recipe, prompts)
        if recipe.keep == SKILLS
        else _keep_of(recipe.keep, reads_answers=recipe.min_skill is not None)
    )
    first: dict[str, Question] = {}
    found = tuple(found)
    if waits := next((one.prompt for one in found if first_turn(one.prompt) is not None), None):
        raise RecipeError(
            f"{recipe.where('parameters.keep')}: the target answers keep prompts once, but {waits[:60]!r} leaves it "
            f"several answers; add the assistant's messages"
        )
    for question in found:
        if key_of(question.prompt) not in harmful:
            first.setdefault(key_of(question.prompt), question)
    return tuple(
        question if recipe.min_skill is not None else Question(question.prompt, "") for question in first.values()
    )


def _skill_questions(recipe: Recipe, prompts: PromptSet) -> tuple[Question, ...]:
    files = [
        Path(name)
        for name in (listed_names(recipe.skills) if recipe.skills else ())
        # A task's filter, after a comma, is not a file either.
        if not name.startswith(TASK_PREFIX) and (os.path.isfile(name) or Path(name).suffix.lower() in SUFFIXES)
    ]
    questions = prompts.skill + tuple(question for file in files for question in load_questions(file))
    if not questions:
        raise UsageError(
            f"{recipe.where('parameters.keep')} is skills, but neither the prompts {recipe.prompts!r} nor `skills` "
            f"have questions"
        )
    return questions


def _keep_of(names: str, *, reads_answers: bool) -> tuple[Question, ...]:
    return tuple(
        question
        for name in ((names,) if names in PACKAGED else listed_names(names))
        for question in _keep_of_source(name, reads_answers)
    )


def _keep_of_source(name: str, reads_answers: bool) -> Iterator[Question]:
    base, query = base_and_query(name)
    if os.path.isfile(base):
        columns = Columns(**parse_query(name, query, FILE_KEYS), kind="harmless")
        rows = read_rows(Path(base))
        for row, request in zip(rows, read_requests(rows, base, columns).requests, strict=True):
            has_answer = reads_answers and row.get("answer") not in (None, "")
            yield question_of(row, request.prompt) if has_answer else Question(request.prompt, "")
        return
    source = load_packaged(name) if name in PACKAGED else load_source(name)
    if source.skill:
        yield from map(question_of, source.skill)
        return
    # Of a set of harmful and harmless prompts, the harmless ones.
    harmless = [request for request in source.requests if request.kind == "harmless"]
    for request in harmless or source.requests:
        yield Question(request.prompt, "")


def _with_keep(recipe: Recipe, parts: Mapping[str, PromptSet], prompts: PromptSet) -> Parts:
    """Add the keep prompts to the parts."""
    questions = load_keep(recipe, prompts)
    if questions is None:
        return Parts(**{name: _keeping(part, None, frozenset()) for name, part in parts.items()})
    owners = {key_of(prompt): name for name, part in parts.items() for prompt in part.harmless}
    # A report tests the skill questions that are left to it, so they are as many as all others.
    others = [name for name in parts if name != "report"]
    # Most go to the choice, if any: what it does not see it cannot keep.
    more = ["choice"] if "choice" in parts else []
    turns = (
        [*parts, *more] if recipe.keep != SKILLS else [turn for it in (*others, *more * 2) for turn in (it, "report")]
    )
    given: dict[str, list[Question]] = {name: [] for name in parts}
    rank = 0
    for question in questions:
        owner = owners.get(key_of(question.prompt))
        if owner is None:
            owner = turns[rank % len(turns)]
            rank += 1
        given[owner].append(question)
    if not all(given.values()):
        *most, last = given
        raise UsageError(
            f"{recipe.where('parameters.keep')}: {len(questions)} distinct prompts are too few, because "
            f"{', '.join(most)} and {last} need one each; add some"
        )
    spent = frozenset(key_of(one.prompt) for name in others for one in given[name])
    return Parts(**{name: _keeping(part, given[name], spent) for name, part in parts.items()})


def _without_choice(parts: Parts) -> Parts:
    """Add the prompts of the choice to those of the search."""
    choice, search = parts.choice, parts.search
    assert choice is not None
    kinds = ("harmful", "harmless", "keep", "keep_answers")
    return Parts(
        replace(search, **{kind: getattr(choice, kind) + getattr(search, kind) for kind in kinds}), parts.report
    )


def _keeping(part: PromptSet, questions: Sequence[Question] | None, spent: frozenset[str]) -> PromptSet:
    """A part with its keep prompts, or with its harmless prompts in their place; it does not test what is spent."""
    if questions is None:
        return replace(part, keep=tuple(one for one in part.harmless if first_turn(one) is None))
    return replace(
        part,
        keep=tuple(question.prompt for question in questions),
        keep_answers=tuple(question for question in questions if question.answer),
        spent=spent,
        skill=tuple(question for question in part.skill if key_of(question.prompt) not in spent),
    )


def split(
    prompts: PromptSet, confirm: float = 0.5, what: str = "a search and a separate report"
) -> tuple[PromptSet, PromptSet]:
    """Split a set into one for a search and one to confirm its result; no harmful or harmless text is in both.

    The distinct prompts go to the two parts alternately, in order: the split is always the same, both parts get prompts
    of every contiguous category, and twins on the same line of two files stay together. A text that is both harmful and
    harmless goes to one part. Both parts have all passages, because their perplexities are only compared; only the
    second has the skill questions. `confirm`, in (0, 1), is its share of the harmful and of the harmless prompts;
    `what` names the two parts in the error.

    Raises:
        UsageError: If there are too few for both parts.
    """
    share = Fraction(str(confirm))
    confirming: dict[str, bool] = {}
    for texts in (prompts.harmful, prompts.harmless):
        for rank, text in enumerate(distinct(texts)):
            confirming.setdefault(key_of(text), int((rank + 1) * share) > int(rank * share))

    def part(kind: str, texts: tuple[str, ...], second: bool) -> tuple[str, ...]:
        chosen = tuple(text for text in distinct(texts) if confirming[key_of(text)] == second)
        if not chosen:
            raise UsageError(
                f"prompts {prompts.name!r}: {len(distinct(texts))} distinct {kind} prompts are too few for {what} "
                f"(confirm: {confirm}); add some, or name the layers"
            )
        return chosen

    search, report = (
        replace(
            prompts,
            harmful=part("harmful", prompts.harmful, second),
            harmless=part("harmless", prompts.harmless, second),
            skill=prompts.skill if second else (),
        )
        for second in (False, True)
    )
    return search, report
