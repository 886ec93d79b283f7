"""Prompt sets: the packaged ones, and the user's own files, folders and datasets of the Hub.

Texts whose perplexity is taken: the packaged one, a file, or a dataset of the Hub.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from dapa_merge.errors import HubError, UsageError
from dapa_merge.measure.prompts.datasets import load_rows, parse_dataset
from dapa_merge.measure.prompts.rows import (
    PROMPT_COLUMNS,
    PROMPT_KINDS,
    SUFFIXES,
    Columns,
    PromptRow,
    Request,
    listed_names,
    read_rows,
    read_text,
)
from dapa_merge.measure.prompts.sources import PACKAGED, Source, load_prompt_folder, load_source
from dapa_merge.recipe.recipe import Recipe


@dataclass(frozen=True)
class Question:
    """A prompt that has one right answer; `match` says how a response is compared with it (see `skills`)."""

    prompt: str
    answer: str
    match: str = "exact"


@dataclass(frozen=True)
class PromptSet:
    """What a model is asked.

    Attributes:
        name: What the recipe called it.
        harmful: Requests that an aligned model refuses.
        harmless: Requests that it does not refuse.
        skill: What the target was fine-tuned for, with the right answers; may be empty.
        passages: Text whose perplexity is taken: for each, the context that is not counted, and what is.
        categories: From "harmful" or "harmless", and a prompt of that kind, to its category; lacks prompts without one.
    """

    name: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    skill: tuple[Question, ...]
    passages: tuple[Question, ...]
    categories: Mapping[tuple[str, str], str] = field(default_factory=dict, hash=False)


def load_prompts(name: str) -> PromptSet:
    """Load a comma list of sets: packaged names, files, folders, short names and Hub ids.

    A folder holds `harmful.*` and `harmless.*`, and may hold `skill.*` (`prompt`, `answer`) and `perplexity.*`
    (`text`, or `prompt` and `answer`); another folder is a dataset. In a file or dataset each row is harmful, unless
    a `label` column says `harmless`, `safe` or `benign`. Keys after a name (`?column=ask`) name other columns. Which
    of harmful prompts, harmless prompts and passages all sets together lack comes from the packaged set. A harmful or
    harmless prompt that is repeated counts once (see `distinct`).

    Raises:
        UsageError: If there is no such set, or one has no prompts or is malformed.
        HubError: If the Hub does not give a set.
    """
    if name in PACKAGED:
        return _prompt_set(name, [_load_packaged(name)])
    sources = [_load_packaged(part) if part in PACKAGED else load_source(part) for part in listed_names(name)]
    own = _prompt_set(name, sources)
    lacking = [kind for kind in PROMPT_KINDS if not getattr(own, kind)]
    if not lacking and own.passages:
        return own
    builtin = load_prompts("builtin")
    return replace(
        own,
        harmful=own.harmful or builtin.harmful,
        harmless=own.harmless or builtin.harmless,
        passages=own.passages or builtin.passages,
        categories={
            **{key: category for key, category in builtin.categories.items() if key[0] in lacking},
            **own.categories,
        },
    )


def split(prompts: PromptSet, confirm: float = 0.5) -> tuple[PromptSet, PromptSet]:
    """Part a set into what a search asks, and what confirms its result; no harmful or harmless text is in both.

    The distinct prompts go to the two in turn, in their order. So the parts are always the same, categories that stand
    together are in both, and twins on the same line of two files stay together. A harmless text that is also among the
    harmful ones goes where that goes. Both parts have all passages, whose perplexity is only compared with another;
    only the second has the skill questions.

    Args:
        prompts: What to part.
        confirm: Share of the harmful and of the harmless prompts that goes to the second part, in (0, 1).

    Raises:
        UsageError: If there are too few for both parts.
    """
    share = Fraction(str(confirm))
    confirming: dict[str, bool] = {}
    for texts in (prompts.harmful, prompts.harmless):
        for rank, text in enumerate(distinct(texts)):
            confirming.setdefault(_key(text), int((rank + 1) * share) > int(rank * share))

    def part(kind: str, texts: tuple[str, ...], second: bool) -> tuple[str, ...]:
        chosen = tuple(text for text in distinct(texts) if confirming[_key(text)] == second)
        if not chosen:
            raise UsageError(
                f"prompts {prompts.name!r}: {len(distinct(texts))} distinct {kind} prompts are too few for a search "
                f"and, apart from it, a report (confirm: {confirm}); add some, or name the layers"
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


def distinct(prompts: Iterable[str]) -> tuple[str, ...]:
    """The prompts in their order, without those that are an earlier one but for case and spaces.

    One question asked twice is one trial: it would only make chance look smaller.
    """
    first: dict[str, str] = {}
    for prompt in prompts:
        first.setdefault(_key(prompt), prompt)
    return tuple(first.values())


def _key(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def load_questions(path: Path) -> tuple[Question, ...]:
    """Questions with answers from a file with `prompt` and `answer`; the skill of a target.

    Raises:
        UsageError: If it has none, or a row lacks one of the two.
    """
    return tuple(map(_question, read_rows(path)))


def load_passages(path: Path) -> tuple[Question, ...]:
    """Texts for perplexity: a row with `text`, or with `prompt` and `answer`, each.

    Raises:
        UsageError: If the file has none, or cannot be read.
    """
    return tuple(_passage(row) for row in read_rows(path))


def _load_packaged(name: str) -> Source:
    with importlib.resources.as_file(importlib.resources.files("dapa_merge")) as package:
        folder = package / "miniature" / "prompts" if name == "miniature" else package / "prompt_sets" / name
        return load_prompt_folder(folder, Columns())


def _prompt_set(name: str, sources: Iterable[Source]) -> PromptSet:
    sources = tuple(sources)
    categories: dict[tuple[str, str], str] = {}

    def prompts(kind: str) -> tuple[str, ...]:
        return _categorized(
            kind, [request for source in sources for request in source.requests if request.kind == kind], categories
        )

    return PromptSet(
        name=name,
        harmful=prompts("harmful"),
        harmless=prompts("harmless"),
        skill=tuple(_question(row) for source in sources for row in source.skill),
        passages=tuple(_passage(row) for source in sources for row in source.passages),
        categories=categories,
    )


def _categorized(kind: str, requests: Iterable[Request], categories: dict[tuple[str, str], str]) -> tuple[str, ...]:
    """The distinct prompts of a kind; the first category of each goes to `categories`."""
    requests = tuple(requests)
    prompts = distinct(request.prompt for request in requests)
    first: dict[str, str] = {}
    for request in requests:
        if request.category:
            first.setdefault(_key(request.prompt), request.category)
    categories.update({(kind, prompt): first[_key(prompt)] for prompt in prompts if _key(prompt) in first})
    return prompts


def _question(row: PromptRow) -> Question:
    answer = row.values.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is None:
        raise UsageError(f"{row.where} has no answer: it needs the columns prompt and answer")
    if not isinstance(answer, str) or not answer.strip():
        raise UsageError(f"{row.where}: the answer is {json.dumps(answer, default=str)[:40]}; it must be some text")
    return Question(_first_text(row), answer, str(row.values.get("match") or "exact"))


def _passage(row: PromptRow) -> Question:
    return _question(row) if "answer" in row.values else Question("", _first_text(row))


def _first_text(row: PromptRow) -> str:
    for column in PROMPT_COLUMNS:
        value = row.values.get(column)
        if isinstance(value, str) and value.strip():
            return value
    raise UsageError(f"{row.where} has no prompt: one of the columns {', '.join(PROMPT_COLUMNS)} must hold text")


def split_prompts(recipe: Recipe) -> tuple[PromptSet, PromptSet]:
    """The prompts that a search asks, and those that are kept for the report on what it found.

    Raises:
        UsageError: If the recipe's prompts cannot be read, or are too few.
    """
    return split(load_prompts(recipe.prompts), recipe.confirm)


def check_prompts(recipe: Recipe) -> None:
    """Read the prompts of a recipe that wants a search, so that a fault in them is told before models are loaded.

    Raises:
        UsageError: If they cannot be read, or are too few.
    """
    if recipe.layers is None:
        split_prompts(recipe)


WIKITEXT = "Salesforce/wikitext?config=wikitext-2-raw-v1&split=test"
# How the rows of a dataset become one document, as transformers' page on perplexity does it.
BETWEEN_ROWS = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: What it is, so that figures of other texts are not compared with its own.
        passages: Its documents, each read on its own.
        max_tokens: Only so many tokens of it are read, the first ones; None for all.
    """

    name: str
    passages: tuple[Question, ...]
    max_tokens: int | None = None


def load_text(name: str, *, max_tokens: int | None = None) -> Text:
    """Load a text by name.

    Args:
        name: `builtin`; `auto`, which is wikitext-2-raw's test split if the Hub or its cache has it, else `builtin`; a
            text file, which is one document; a JSON-lines or CSV file with a column `text`, a document a row; or a
            dataset as `ID[@REVISION][?config=CONFIG&split=SPLIT&column=COLUMN]`, whose rows are one document.
        max_tokens: Read only so many tokens.

    Raises:
        UsageError: If there is no such text, or it is empty.
        HubError: If the Hub does not give it.
    """
    found, passages = _load(name)
    if not any(passage.answer.strip() for passage in passages):
        raise UsageError(f"the text {name} is empty")
    return Text(found, passages, max_tokens)


def _load(name: str) -> tuple[str, tuple[Question, ...]]:
    if name == "builtin":
        return "the packaged text", load_prompts("builtin").passages
    if name == "auto":
        try:
            return "wikitext-2-raw, test split", _load_dataset(WIKITEXT)
        except (HubError, UsageError):
            return _load("builtin")
    path = Path(name)
    if os.path.exists(path) and not os.path.isdir(path):
        is_document = path.suffix.lower() in ("", ".txt")
        return name, (Question("", read_text(path)),) if is_document else load_passages(path)
    base = name.partition("?")[0]
    if not os.path.isdir(base) and ("/" not in base or Path(base).suffix.lower() in SUFFIXES):
        raise UsageError(f"text {name!r}: no such file, and neither auto nor builtin nor the id of a dataset")
    return name, _load_dataset(name)


def _load_dataset(name: str) -> tuple[Question, ...]:
    dataset = parse_dataset(name, ("column",))
    column = dataset.option("column") or "text"
    found = load_rows(dataset)
    if column not in found.columns:
        raise UsageError(f"the dataset {dataset} has no column {column!r}; it has {', '.join(found.columns)}")
    return (Question("", BETWEEN_ROWS.join(str(row[column]) for row in found.rows)),)
