"""Where a model is, as recipes and commands write it, and as others may see it: without paths of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Location:
    """A model: a folder, or a Hub id, with an optional revision, and with a LoRA adapter that is merged into it."""

    path: str
    revision: str | None = None
    adapter: Location | None = None

    def __str__(self) -> str:
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{text}+{self.adapter}" if self.adapter else text


def parse_location(value: str) -> Location:
    """Read `path`, `id` or `id@revision`, and two of them as `model+lora`; a folder is a path whatever its name.

    Raises:
        ValueError: If there is more than one `@` in a path, or more than one `+`, or nothing beside it.
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


SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


def without_paths(names: str) -> str:
    """Names of models, prompts, texts or skills, with commas; of files and folders of this machine the last part."""
    return ",".join(map(_without_path, names.split(",")))


def is_path(name: str) -> bool:
    """Whether a name is one of a file or a folder, here or on another machine, rather than of something known."""
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
