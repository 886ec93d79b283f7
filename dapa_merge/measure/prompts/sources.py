"""Where prompts come from: a local file or folder, or a dataset of the Hub, by its id or a short name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from dapa_merge.errors import UsageError
from dapa_merge.measure.prompts.datasets import HUB_ID, DatasetName, known_commit, load_rows, parse_dataset, split_names
from dapa_merge.measure.prompts.rows import (
    HARMFUL_LABELS,
    HARMLESS_LABELS,
    SUFFIXES,
    Columns,
    PromptRow,
    Request,
    base_and_query,
    listed_names,
    nearest_of,
    parse_query,
    read_requests,
    read_rows,
)

PACKAGED = ("builtin", "miniature")
FILE_KEYS = ("column", "label", "category", "kind")
FOLDER_KEYS = ("column", "category")
HUB_KEYS = (*FILE_KEYS, "harmless")
# No split is named where there is only one. XSTest is its author's own copy, which is not gated.
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


@dataclass(frozen=True)
class Source:
    """What one source brings.

    Attributes:
        requests: Its prompts, with kind and category.
        skill: Rows of questions with answers.
        passages: Rows of text whose perplexity is taken.
    """

    requests: tuple[Request, ...]
    skill: tuple[PromptRow, ...] = ()
    passages: tuple[PromptRow, ...] = ()


def load_source(name: str) -> Source:
    """Load what one part of a recipe's `prompts` names; a path wins over a short name, and that over a Hub id.

    Raises:
        UsageError: If there is no such source, or it cannot be read.
        HubError: If the Hub does not give it.
    """
    base, query = base_and_query(name)
    if os.path.isdir(base):
        return _load_folder(name, Path(base), query)
    if os.path.exists(base):
        columns = Columns(**parse_query(name, query, FILE_KEYS))
        return Source(read_requests(read_rows(Path(base)), base, columns))
    names = _full_names(name)
    return Source(tuple(request for full in names for request in _load_dataset(parse_dataset(full, HUB_KEYS))))


def load_prompt_folder(folder: Path, columns: Columns) -> Source:
    """Load a folder of `harmful.*`, `harmless.*`, `skill.*` and `perplexity.*`, each of which may be missing."""
    files = _prompt_files(folder)
    rows = {kind: tuple(read_rows(path)) for kind, path in files.items()}
    requests = (
        request
        for kind in ("harmful", "harmless")
        if kind in rows
        for request in read_requests(rows[kind], str(files[kind]), replace(columns, kind=kind))
    )
    return Source(tuple(requests), rows.get("skill", ()), rows.get("perplexity", ()))


def pinned_prompts(name: str) -> str:
    """The same prompts for another time and place: absolute paths, and the commits that this process read."""
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
        return load_prompt_folder(folder, Columns(**parse_query(name, query, FOLDER_KEYS)))
    dataset = parse_dataset(name, HUB_KEYS)
    try:
        return Source(_load_dataset(dataset))
    except UsageError as error:
        hint = "" if any(folder.iterdir()) and not files else "; a folder of prompts has harmful.jsonl, .csv or .txt"
        raise UsageError(f"{error}{hint}") from error


def _full_names(part: str) -> tuple[str, ...]:
    """The full names of a short one, with its keys over theirs; another Hub name is its own.

    Raises:
        UsageError: If it is neither.
    """
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
        nearest = nearest_of(base, (*PACKAGED, *SHORT_NAMES))
        raise UsageError(
            f"prompts {base!r}: no such file or folder, and no packaged set ({', '.join(PACKAGED)}), "
            f"short name ({', '.join(SHORT_NAMES)}) or Hub id (someone/name){nearest}"
        )
    return (part,)


def _load_dataset(dataset: DatasetName) -> tuple[Request, ...]:
    columns = Columns(**{key: dataset.option(key) for key in FILE_KEYS})
    return tuple(
        request
        for split, kind in _splits(dataset)
        for request in _load_split(replace(dataset, split=split), replace(columns, kind=kind))
    )


def _splits(dataset: DatasetName) -> list[tuple[str | None, str | None]]:
    """Which splits are read, and the kind of all rows of each; None leaves it to their labels."""
    kind, harmless = dataset.option("kind"), dataset.option("harmless")
    if kind and harmless:
        raise UsageError(f"the dataset {dataset}: kind says it of all its prompts, so leave out harmless={harmless}")
    if harmless:
        return [*([(dataset.split, _kind_of(dataset.split))] if dataset.split else []), (harmless, "harmless")]
    if dataset.split or kind:
        return [(dataset.split, kind or _kind_of(dataset.split or ""))]
    told = [(split, _kind_of(split)) for split in split_names(dataset) if _kind_of(split)]
    return list(told) or [(None, None)]


def _kind_of(split: str) -> str | None:
    """The kind that a split's name tells."""
    name = split.partition("[")[0].casefold()
    return "harmful" if name in HARMFUL_LABELS else "harmless" if name in HARMLESS_LABELS else None


def _load_split(dataset: DatasetName, columns: Columns) -> tuple[Request, ...]:
    found = load_rows(dataset)
    source = f"the dataset {dataset}, split {found.split}"
    if not found.rows:
        raise UsageError(f"{source} is empty")
    rows = [PromptRow(f"{source}, row {number}", row) for number, row in enumerate(found.rows, 1)]
    return read_requests(rows, source, columns)
