"""Whose the rows in the folder of a comparison are, and what they are called for as long as the folder is there.

A row's own folder holds a small file that says where its recipe is, so that the recipe finds its row again, whichever
others it is given with.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from dapa_merge.errors import DapaError, UsageError
from dapa_merge.files import begins_journal, held, make_folder, replace_file

ROWS_NAME, OWNER_NAME = "rows", "recipe.json"
# Begins as the files do that are not complete yet.
OURS = ".dapa-merge-"
LOCK_NAME = f"{OURS}lock"
MAX_LETTERS, MAX_BYTES = 80, 160
# What Windows has in no file name, and what would break a table in Markdown.
UNSAFE = frozenset('\\/<>:"|?*')


class Owner(NamedTuple):
    """Where the recipe of a row is.

    Attributes:
        path: Without links and dots.
        seen_from_folder: The way there from the comparison's folder, which stays if both are moved together.
    """

    path: str
    seen_from_folder: str


def refuse_repeated(paths: Sequence[Path]) -> None:
    """Raise `UsageError` if a recipe is given twice."""
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("a recipe is given twice; name each once")


def is_comparison(out: Path) -> bool:
    """Whether a folder is that of a comparison, by what is in its rows."""
    rows = out / ROWS_NAME
    try:
        if any(_is_row(row) for row in rows.iterdir()):
            return True
        # A kill in the first moment leaves nothing but this.
        return os.listdir(out) == [ROWS_NAME] and all(
            path.is_dir() or path.name.startswith(OURS) for path in rows.rglob("*")
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def existing_rows(out: Path) -> set[str]:
    """The names of the rows in a comparison's folder."""
    return {row.name for row in (out / ROWS_NAME).iterdir() if _is_row(row)}


def row_names(paths: Sequence[Path], out: Path) -> dict[str, Path]:
    """A name for each recipe, in their order: that of its row or, if there is none, a new one, which is written down.

    Args:
        paths: The recipes, each once.
        out: The comparison's folder, with its folder of rows.

    Raises:
        UsageError: If the folder cannot be written.
    """
    rows = out / ROWS_NAME
    with locked(out):
        owners = {row.name: owner for row in rows.iterdir() if (owner := _read_owner(row)) is not None}
        found: dict[Path, str] = {}
        wanted = {path: _owner(path, out) for path in paths}
        for kind in range(len(Owner._fields)):
            for path in paths:
                free = owners.keys() - found.values()
                same = sorted(name for name in free if owners[name][kind] == wanted[path][kind])
                if path not in found and same:
                    found[path] = same[0]
        found |= new_names([path for path in paths if path not in found], paths, owners)
        for path, name in found.items():
            if owners.get(name) != wanted[path]:
                _write_owner(rows / name, wanted[path])
    return {found[path]: path for path in paths}


def new_names(new: Sequence[Path], given: Sequence[Path], taken: Iterable[str]) -> dict[Path, str]:
    """A name for each recipe that has none: its file's or, where several are called so, with its folder before it.

    Each is a file name on its own, and none is another's, also where file systems take capitals for small letters.

    Args:
        new: The recipes that have no name.
        given: All recipes of the comparison.
        taken: The names that are others'.
    """
    used = set(map(_folded, taken))
    stems = Counter(_folded(_safe(path.stem)) for path in given)
    names: dict[Path, str] = {}
    for path in new:
        short = _safe(path.stem)
        long = _safe(f"{Path(os.path.abspath(path)).parent.name}-{path.stem}")
        wanted = [short] if stems[_folded(short)] == 1 else []
        numbered = (f"{long}-{number}" for number in count(2))
        names[path] = next(name for name in chain(wanted, [long], numbered) if _folded(name) not in used)
        used.add(_folded(names[path]))
    return names


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A `with` block in which no other process names rows, or writes tables, in the same folder.

    Raises:
        UsageError: If the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(out / ROWS_NAME / LOCK_NAME))
        except OSError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror}; name another folder") from error
        yield


def _folded(name: str) -> str:
    """What names have in common that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _safe(text: str) -> str:
    """A text as a file name: no longer than every disk takes, in one line, and not hidden."""
    shown = "".join(one if one.isprintable() and one not in UNSAFE else "-" for one in text)
    return shown[:MAX_LETTERS].encode()[:MAX_BYTES].decode(errors="ignore").strip(" .-") or "recipe"


def _is_row(row: Path) -> bool:
    return row.is_dir() and (_read_owner(row) is not None or any(map(begins_journal, row.glob("*.jsonl"))))


def _owner(path: Path, out: Path) -> Owner:
    real = os.path.realpath(path)
    try:
        return Owner(real, os.path.relpath(real, os.path.realpath(out)))
    except ValueError:
        # Windows: there is no way from one disk to another.
        return Owner(real, real)


def _read_owner(row: Path) -> Owner | None:
    try:
        content = json.loads((row / OWNER_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    values = [content.get(key) for key in Owner._fields] if isinstance(content, Mapping) else []
    return Owner(*map(str, values)) if values and all(isinstance(value, str) for value in values) else None


def _write_owner(row: Path, owner: Owner) -> None:
    make_folder(row)
    try:
        replace_file(row / OWNER_NAME, json.dumps(owner._asdict()).encode() + b"\n")
    except DapaError as error:
        raise UsageError(str(error)) from error
