"""Where a model is, as recipes and commands write it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


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
