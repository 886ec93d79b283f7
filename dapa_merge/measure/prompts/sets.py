"""Prompt sets and texts: packaged, from files and folders, and from datasets of the Hub by id or short name."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dapa_merge.errors import HubError, UsageError, printable
from dapa_merge.files import nearest_here
from dapa_merge.measure.prompts.conversation import with_system
from dapa_merge.measure.prompts.datasets import HUB_ID, DatasetName, known_commit, load_rows, parse_dataset, split_names
from dapa_merge.measure.prompts.labels import PROMPT_KINDS, Columns, Request, Requests, kind_of_name, read_requests
from dapa_merge.measure.prompts.rows import (
    PROMPT_COLUMNS,
    SUFFIXES,
    PromptRow,
    base_and_query,
    listed_names,
    parse_query,
    read_rows,
    read_text,
    refuse_controls,
)
from dapa_merge.progress import LOG
from dapa_merge.recipe.asking import NO_TEMPLATE
from dapa_merge.recipe.attacks import ALLOWED, REQUEST, Attack, parse_attacks

PACKAGED = ("builtin", "borderline", "miniature")
FILE_KEYS = ("column", "label", "category", "kind", "harmful_if")
FOLDER_KEYS = ("column", "category")
HUB_KEYS = (*FILE_KEYS, "harmless")
# A dataset with only one split does not need its name. XSTest is the author's own copy, which is not gated.
SHORT_NAMES = {
    "advbench": ("walledai/AdvBench",),
    "jailbreakbench": ("JailbreakBench/JBB-Behaviors?config=behaviors&split=harmful&harmless=benign",),
    "xstest": ("Paul/XSTest",),
    "harmbench": ("walledai/HarmBench?config=standard",),
    "or-bench": (
        "bench-llm/or-bench?config=or-bench-hard-1k&kind=harmless",
        "bench-llm/or-bench?config=or-bench-toxic&kind=harmful",
    ),
    "or-bench-80k": ("bench-llm/or-bench?config=or-bench-80k&kind=harmless",),
    "or-bench-hard": ("bench-llm/or-bench?config=or-bench-hard-1k&kind=harmless",),
    "or-bench-toxic": ("bench-llm/or-bench?config=or-bench-toxic&kind=harmful",),
}
WIKITEXT = "Salesforce/wikitext?config=wikitext-2-raw-v1&split=test"
# Joins a dataset's rows into one document, as transformers' page on perplexity does.
BETWEEN_ROWS = "\n\n"
# Maximum keep prompts that models are compared on; a mean over their tokens hardly changes with more.
MAX_KEEP = 64


@dataclass(frozen=True)
class Question:
    """A prompt with one right answer; `match` names the comparison of a response with it (see `skills.MATCHES`)."""

    prompt: str
    answer: str
    match: str = "exact"


@dataclass(frozen=True)
class PromptSet:
    """All prompts, questions and texts that a model is measured with.

    Attributes:
        name: The name in the recipe.
        harmful: Requests that an aligned model refuses.
        harmless: Requests that it does not refuse.
        skill: Questions about what the target was fine-tuned for; may be empty.
        passages: Texts for perplexity; a prompt is only context, an answer is counted.
        categories: Categories by kind ("harmful" or "harmless") and prompt; a prompt may be absent.
        keep: Prompts of the kind that the fine-tune is for.
        keep_answers: Those of them whose right answers are known, as questions.
        read: What was read from where, before repeats were dropped.
        spent: Keep prompts that a choice or a search uses, as `key_of` makes them; a report's skills leave them out.
        system: The system message before every prompt, also before questions when they are asked; empty for none.
        is_formatted: Whether tasks of lm-evaluation-harness are asked in the chat template too, as all prompts are:
            where the user gives a system message or another template.
    """

    name: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    skill: tuple[Question, ...]
    passages: tuple[Question, ...]
    categories: Mapping[tuple[str, str], str] = field(default_factory=dict, hash=False)
    keep: tuple[str, ...] = ()
    keep_answers: tuple[Question, ...] = ()
    spent: frozenset[str] = frozenset()
    system: str = ""
    is_formatted: bool = False
    read: tuple[Requests, ...] = field(default=(), compare=False, repr=False)

    @property
    def measured_keep(self) -> tuple[str, ...]:
        """The keep prompts that models are compared on: at most `MAX_KEEP`, spread evenly over all."""
        return self.keep[:: math.ceil(len(self.keep) / MAX_KEEP) or 1]


def load_prompts(name: str) -> PromptSet:
    """Load a comma list of sets: packaged names, files, folders, short names and Hub ids.

    A folder holds `harmful.*` and `harmless.*`, and may hold `skill.*` (`prompt`, `answer`) and `perplexity.*`
    (`text`, or `prompt` and `answer`); any other folder is a dataset. In a file or dataset a column of labels tells
    harmful and harmless rows apart (see `read_requests`); without one, all are harmful. Keys after a name
    (`?column=ask`) name other columns. If all sets together lack harmful prompts, harmless prompts or passages, those
    of the packaged set are used. Repeated prompts of a kind are dropped (see `distinct`).

    Raises:
        UsageError: If a set does not exist, is empty or is malformed.
        HubError: If a set cannot be fetched.
    """
    own = load_own(name)
    lacking = [kind for kind in PROMPT_KINDS if not getattr(own, kind)]
    if not lacking and own.passages:
        return own
    builtin = load_prompts("builtin")
    filled = (replace(one, requests=tuple(r for r in one.requests if r.kind in lacking)) for one in builtin.read)
    return replace(
        own,
        read=own.read + tuple(one for one in filled if one.requests),
        harmful=own.harmful or builtin.harmful,
        harmless=own.harmless or builtin.harmless,
        passages=own.passages or builtin.passages,
        categories={
            **{key: category for key, category in builtin.categories.items() if key[0] in lacking},
            **own.categories,
        },
    )


def load_own(name: str) -> PromptSet:
    """Load a comma list of sets as `load_prompts` does, but leave what they lack empty."""
    return _prompt_set(
        name, [load_packaged(one) if one in PACKAGED else load_source(one) for one in listed_names(name)]
    )


def asked_after(prompts: PromptSet, system: str | None, chat_template: str | None = None) -> PromptSet:
    """The same prompts after a system message, for those without one of their own; questions are left as they are.

    Args:
        prompts: Any.
        system: The message; None for none.
        chat_template: That of a recipe or `Asking`, to note whether the user chose one.
    """
    if chat_template not in (None, NO_TEMPLATE):
        prompts = replace(prompts, is_formatted=True)
    if not system:
        return prompts

    def after(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(with_system(text, system) for text in texts)

    return replace(
        prompts,
        harmful=after(prompts.harmful),
        harmless=after(prompts.harmless),
        keep=after(prompts.keep),
        categories={(kind, with_system(text, system)): value for (kind, text), value in prompts.categories.items()},
        system=system,
        is_formatted=True,
    )


def load_attacks(names: str) -> tuple[Attack, ...]:
    """The attacks of a comma list of kinds and files.

    A row of a file is an attack: its `template` (or the line of a text file) has `{request}` or `[INSERT PROMPT HERE]`
    in the place of the request, `system` is a system message, `opening` the beginning of the answer, `name` its name in
    reports; each may be absent.

    Raises:
        UsageError: If a kind is unknown, or a file cannot be read or has a row that changes nothing.
    """
    try:
        known, files = parse_attacks(names)
    except ValueError:
        raise UsageError(f"attacks is {names!r}; {ALLOWED}") from None
    own = [
        _attack(row, f"{Path(name).name} {number}")
        for name in files
        for number, row in enumerate(read_rows(Path(name)), 1)
    ]
    taken = Counter(attack.name for attack in (*known, *own))
    if repeated := next((name for name, number in taken.items() if number > 1), None):
        raise UsageError(f"attacks: two attacks have the name {repeated!r}; give each a `name` of its own")
    return (*known, *own)


def _attack(row: PromptRow, name: str) -> Attack:
    texts = {key: row.get(key) or "" for key in ("template", "system", "opening", "name")}
    texts["template"] = texts["template"] or row.get("prompt") or ""
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UsageError(f"{row.where}: the {key} is {json.dumps(text, default=str)[:40]}; it must be text")
        refuse_controls(text, row.where, key)
    template = texts["template"].replace("[INSERT PROMPT HERE]", REQUEST) or REQUEST
    if REQUEST not in template:
        raise UsageError(f"{row.where}: the template has no place for the request; write {REQUEST} there")
    if template == REQUEST and not texts["system"] and not texts["opening"]:
        raise UsageError(f"{row.where}: the attack changes nothing; give it a template, a system message or an opening")
    return Attack(texts["name"].strip() or name, "file", texts["system"], template, texts["opening"])


def distinct(prompts: Iterable[str]) -> tuple[str, ...]:
    """Drop prompts that repeat an earlier one up to case and spaces.

    A repeated prompt is not an independent trial; counting it would understate chance.
    """
    first: dict[str, str] = {}
    for prompt in prompts:
        first.setdefault(key_of(prompt), prompt)
    return tuple(first.values())


def key_of(prompt: str) -> str:
    """The text that repeats of a prompt have in common: without case and spaces."""
    return " ".join(prompt.casefold().split())


def load_questions(path: Path) -> tuple[Question, ...]:
    """Load questions from a file with `prompt` and `answer`; raises `UsageError` if a row lacks one of them."""
    return tuple(map(question_of, read_rows(path)))


def load_passages(path: Path) -> tuple[Question, ...]:
    """Load texts for perplexity from a file with `text`, or `prompt` and `answer`; raises `UsageError` as needed."""
    return tuple(_passage(row) for row in read_rows(path))


def load_packaged(name: str) -> Source:
    """Load one of `PACKAGED`."""
    with importlib.resources.as_file(importlib.resources.files("dapa_merge")) as package:
        folder = package / "miniature" / "prompts" if name == "miniature" else package / "prompt_sets" / name
        return load_prompt_folder(folder, Columns(), f"the packaged set {name}")


def _prompt_set(name: str, sources: Iterable[Source]) -> PromptSet:
    sources = tuple(sources)
    categories: dict[tuple[str, str], str] = {}

    def prompts(kind: str) -> tuple[str, ...]:
        return _categorized(
            kind, [request for source in sources for request in source.requests if request.kind == kind], categories
        )

    harmful, harmless = prompts("harmful"), prompts("harmless")
    return PromptSet(
        name=name,
        harmful=harmful,
        harmless=harmless,
        skill=tuple(question_of(row) for source in sources for row in source.skill),
        passages=tuple(_passage(row) for source in sources for row in source.passages),
        categories=categories,
        read=tuple(part for source in sources for part in source.read),
    )


def tell_prompts(prompts: PromptSet) -> None:
    """Log how many prompts of each kind were read from where, and warn of those that are of both kinds."""
    for part in prompts.read:
        LOG.info("%s", printable(str(part)))
    harmful = {key_of(prompt) for prompt in prompts.harmful}
    if both := [prompt for prompt in prompts.harmless if key_of(prompt) in harmful]:
        LOG.warning(
            "%s", printable(f"{len(both)} prompts are both harmful and harmless in {prompts.name}, such as {both[0]!r}")
        )


def read_json(prompts: PromptSet) -> list[dict[str, Any]]:
    """Sources and their numbers of prompts, as plain data."""
    return [
        {
            "source": one.source,
            "by": one.how,
            "left_out": one.left_out,
            **{kind: one.count(kind) for kind in PROMPT_KINDS},
        }
        for one in prompts.read
    ]


def _categorized(kind: str, requests: Iterable[Request], categories: dict[tuple[str, str], str]) -> tuple[str, ...]:
    """Return the distinct prompts of a kind; the first category of each is added to `categories`."""
    requests = tuple(requests)
    prompts = distinct(request.prompt for request in requests)
    first: dict[str, str] = {}
    for request in requests:
        if request.category:
            first.setdefault(key_of(request.prompt), request.category)
    categories.update({(kind, prompt): first[key_of(prompt)] for prompt in prompts if key_of(prompt) in first})
    return prompts


def question_of(row: PromptRow, prompt: str | None = None) -> Question:
    """Read a question from a row; `prompt` replaces the row's own. Raises `UsageError` if a column is missing."""
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is None:
        raise UsageError(f"{row.where} has no answer: it needs the columns prompt and answer")
    if not isinstance(answer, str) or not answer.strip():
        raise UsageError(f"{row.where}: the answer is {json.dumps(answer, default=str)[:40]}; it must be text")
    refuse_controls(answer, row.where, "answer")
    return Question(_first_text(row) if prompt is None else prompt, answer, str(row.get("match") or "exact"))


def _passage(row: PromptRow) -> Question:
    return question_of(row) if row.get("answer") is not None else Question("", _first_text(row))


def _first_text(row: PromptRow) -> str:
    for column in PROMPT_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return refuse_controls(value, row.where)
    raise UsageError(f"{row.where} has no prompt: one of the columns {', '.join(PROMPT_COLUMNS)} must hold text")


@dataclass(frozen=True)
class Text:
    """A text for perplexity.

    Attributes:
        name: Identifies its figures.
        passages: Documents, read separately.
        max_tokens: Number of leading tokens to read; None for all.
    """

    name: str
    passages: tuple[Question, ...]
    max_tokens: int | None = None


def load_text(name: str, *, max_tokens: int | None = None) -> Text:
    """Load a text by name.

    Args:
        name: `builtin`; `auto`, which is wikitext-2-raw's test split if the Hub or its cache has it, else `builtin`; a
            text file, which is one document; a JSON-lines or CSV file with a column `text`, one document per row; or a
            dataset as `ID[@REVISION][?config=CONFIG&split=SPLIT&column=COLUMN]`, whose rows are one document.
        max_tokens: Number of leading tokens to read; None for all.

    Raises:
        UsageError: If the text does not exist or is empty.
        HubError: If it cannot be fetched.
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
            return "wikitext-2-raw, test split", _load_text_of(WIKITEXT)
        except (HubError, UsageError):
            return _load("builtin")
    path = Path(name)
    if os.path.exists(path) and not os.path.isdir(path):
        is_document = path.suffix.lower() in ("", ".txt")
        return name, (Question("", read_text(path)),) if is_document else load_passages(path)
    base = name.partition("?")[0]
    if not os.path.isdir(base) and ("/" not in base or Path(base).suffix.lower() in SUFFIXES):
        raise UsageError(
            f"text {name!r}: no such file{nearest_here(base)}, and neither auto nor builtin nor the id of a dataset"
        )
    return name, _load_text_of(name)


def _load_text_of(name: str) -> tuple[Question, ...]:
    dataset = parse_dataset(name, ("column",))
    column = dataset.option("column") or "text"
    found = load_rows(dataset)
    if column not in found.columns:
        raise UsageError(f"the dataset {dataset} has no column {column!r}; it has {', '.join(found.columns)}")
    return (Question("", BETWEEN_ROWS.join(str(row[column]) for row in found.rows)),)


@dataclass(frozen=True)
class Source:
    """Content of one source.

    Attributes:
        read: Prompts with kind and category, by file or split.
        skill: Rows of questions with answers.
        passages: Rows of text for perplexity.
    """

    read: tuple[Requests, ...]
    skill: tuple[PromptRow, ...] = ()
    passages: tuple[PromptRow, ...] = ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """The prompts of all its parts."""
        return tuple(request for part in self.read for request in part.requests)


def load_source(name: str) -> Source:
    """Load one entry of a recipe's `prompts`: a path, or else a short name, or else a Hub id.

    Raises:
        UsageError: If the source does not exist or cannot be read.
        HubError: If it cannot be fetched.
    """
    base, query = base_and_query(name)
    if os.path.isdir(base):
        return _load_folder(name, Path(base), query)
    if os.path.exists(base):
        columns = Columns(**parse_query(name, query, FILE_KEYS))
        return Source((read_requests(read_rows(Path(base)), base, columns),))
    names = _full_names(name)
    return Source(tuple(part for full in names for part in _load_dataset(parse_dataset(full, HUB_KEYS))))


def load_prompt_folder(folder: Path, columns: Columns, name: str) -> Source:
    """Load a folder of `harmful.*`, `harmless.*`, `skill.*` and `perplexity.*`, all optional, called `name`."""
    files = _prompt_files(folder)
    rows = {kind: tuple(read_rows(path)) for kind, path in files.items()}
    requests = (
        request
        for kind in PROMPT_KINDS
        if kind in rows
        for request in read_requests(rows[kind], str(files[kind]), replace(columns, kind=kind)).requests
    )
    return Source(
        (Requests(name, tuple(requests), "by the names of its files"),),
        rows.get("skill", ()),
        rows.get("perplexity", ()),
    )


def pinned_prompts(name: str) -> str:
    """Return a reproducible name of the same prompts: absolute paths, and the commits that were read."""
    return ", ".join(_pinned_part(part) for part in ([name] if name in PACKAGED else listed_names(name)))


def _pinned_part(part: str) -> str:
    base, query = base_and_query(part)
    if part in PACKAGED:
        return part
    if os.path.exists(base):
        return os.path.abspath(base) + (f"?{query}" if query else "")
    pins = []
    for full in _full_names(part):
        dataset = parse_dataset(full, HUB_KEYS)
        commit = known_commit(dataset)
        if commit is None:
            return part
        query = base_and_query(full)[1]
        pins.append(f"{dataset.id}@{commit}" + (f"?{query}" if query else ""))
    return ", ".join(pins)


def _prompt_files(folder: Path) -> dict[str, Path]:
    try:
        paths = sorted(folder.iterdir(), reverse=True)
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error.strerror}") from error
    return {
        path.stem: path
        for path in paths
        if path.suffix.lower() in SUFFIXES and path.stem in ("harmful", "harmless", "skill", "perplexity")
    }


def _load_folder(name: str, folder: Path, query: str) -> Source:
    files = _prompt_files(folder)
    if "harmful" in files or "harmless" in files:
        return load_prompt_folder(folder, Columns(**parse_query(name, query, FOLDER_KEYS)), str(folder))
    dataset = parse_dataset(name, HUB_KEYS)
    try:
        return Source(_load_dataset(dataset))
    except UsageError as error:
        hint = "" if any(folder.iterdir()) and not files else "; a folder of prompts has harmful.jsonl, .csv or .txt"
        raise UsageError(f"{error}{hint}") from error


def _full_names(part: str) -> tuple[str, ...]:
    """Expand a short name, overridden by the given keys; other Hub names stay. Raises `UsageError` for the rest."""
    base, query = base_and_query(part)
    short, _, revision = base.partition("@")
    if short in SHORT_NAMES:
        own = parse_query(part, query, ("config", "split", *HUB_KEYS))
        names = []
        for full in SHORT_NAMES[short]:
            identity, _, defaults = full.partition("?")
            values = {**parse_query(full, defaults, ("config", "split", *HUB_KEYS)), **own}
            keys = "&".join(f"{key}={quote(value, safe='+[]:% ')}" for key, value in values.items())
            names.append(identity + (f"@{revision}" if revision else "") + (f"?{keys}" if keys else ""))
        return tuple(names)
    if not HUB_ID.fullmatch(base) or base.startswith(".") or Path(base).suffix.lower() in SUFFIXES:
        nearest = nearest_here(base, (*PACKAGED, *SHORT_NAMES))
        raise UsageError(
            f"prompts {base!r}: no such file or folder{nearest}, and no packaged set ({', '.join(PACKAGED)}), "
            f"short name ({', '.join(SHORT_NAMES)}) or Hub id (someone/name)"
        )
    return (part,)


def _load_dataset(dataset: DatasetName) -> tuple[Requests, ...]:
    columns = Columns(**{key: dataset.option(key) for key in FILE_KEYS})
    return tuple(
        _load_split(replace(dataset, split=split), replace(columns, kind=kind)) for split, kind in _splits(dataset)
    )


def _splits(dataset: DatasetName) -> list[tuple[str | None, str | None]]:
    """List the splits to read, each with the kind of all its rows, or None to use their labels."""
    kind, harmless = dataset.option("kind"), dataset.option("harmless")
    if kind and harmless:
        raise UsageError(f"the dataset {dataset}: kind applies to all its prompts; leave out harmless={harmless}")
    if harmless:
        return [*([(dataset.split, kind_of_name(dataset.split))] if dataset.split else []), (harmless, "harmless")]
    of_config = kind_of_name(dataset.config or "")
    if dataset.split or kind or of_config:
        return [(dataset.split, kind or kind_of_name(dataset.split or "") or of_config)]
    named = [(split, kind_of_name(split)) for split in split_names(dataset) if kind_of_name(split)]
    return list(named) or [(None, None)]


def _load_split(dataset: DatasetName, columns: Columns) -> Requests:
    found = load_rows(dataset)
    source = f"the dataset {dataset}, split {found.split}"
    if not found.rows:
        raise UsageError(f"{source} is empty")
    rows = [PromptRow(f"{source}, row {number}", row) for number, row in enumerate(found.rows, 1)]
    return read_requests(rows, source, columns)
