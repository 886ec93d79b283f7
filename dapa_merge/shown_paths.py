"""Names of files and folders of this machine, as they may be shown to others: without the way to them."""

from __future__ import annotations

import os
from pathlib import Path

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
