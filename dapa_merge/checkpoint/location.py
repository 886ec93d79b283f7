"""Model locations as recipes and commands write them, and names without this machine's paths, for publication."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Location:
    """A model: a folder or a Hub id, with an optional revision and an optional LoRA adapter to merge into it."""

    path: str
    revision: str | None = None
    adapter: Location | None = None

    def __str__(self) -> str:
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{text}+{self.adapter}" if self.adapter else text


def parse_location(value: str) -> Location:
    """Read `path`, `id` or `id@revision`, and two of them as `model+lora`; a folder is a path whatever its name.

    Raises:
        ValueError: If a model has more than one `@`, there is more than one `+`, or either has an empty side.
    """
    if os.path.isdir(value):
        return Location(value)
    model, plus, adapter = value.partition("+")
    if plus:
        parsed = replace(parse_location(model), adapter=parse_location(adapter))
        if parsed.adapter is not None and parsed.adapter.adapter is not None:
            raise ValueError(value)
        return parsed
    path, at, revision = value.partition("@")
    if not path or "@" in revision or bool(at) != bool(revision):
        raise ValueError(value)
    return Location(path, revision or None)


_PUBLISHED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@.+)?")


def is_published(place: str) -> bool:
    """Whether a text has the form of a Hub id, also with a revision, and is neither a path here nor a JSON file's."""
    return bool(_PUBLISHED.fullmatch(place)) and not place.endswith(".json") and not os.path.exists(place)


SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


def without_paths(names: str) -> str:
    """Shorten paths to their last part in comma-separated names of models, prompts, texts or skills."""
    return ",".join(map(_without_path, names.split(",")))


def is_path(name: str) -> bool:
    """Whether a name is a path, on this machine or another, rather than a known name."""
    base = name.strip().partition("?")[0]
    return (
        os.path.exists(base)
        or base.startswith(("/", "./", "../", "~"))
        or "\\" in base
        or ("/" in base and base.endswith(SUFFIXES))
    )


def _without_path(name: str) -> str:
    base, mark, query = name.strip().partition("?")
    return f"{Path(base.replace(chr(92), '/')).name if is_path(base) else base}{mark}{query}"
