"""Rows of local files, prompts from rows of any source, and names of sets as a recipe lists them.

The suffix tells whether a file is CSV, TSV, JSON lines, a JSON array, Parquet or text with one prompt per line (also
without a suffix). A recipe lists `NAME[?KEY=VALUE&KEY=VALUE], ...`, where NAME is a path or a Hub id; an existing path
may contain commas and question marks.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from dapa_merge.errors import UsageError, one_line, why_unreadable

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


class PromptRow(NamedTuple):
    """A row, and its place for error messages."""

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> Sequence[PromptRow]:
    """Read a file by its suffix; a line of text, or a string in an array, is a row with a `prompt`.

    Raises:
        UsageError: If it cannot be read, has an unknown suffix, is malformed, or has no rows.
    """
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES) and os.path.isfile(path):
        raise UsageError(f"{path} has the unknown suffix {path.suffix}; known are {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        rows = _parquet(path)
    else:
        text = read_text(path)
        if suffix in (".csv", ".tsv"):
            rows = _csv(path, text, "," if suffix == ".csv" else "\t")
        elif suffix == ".json" and text.lstrip().startswith("["):
            rows = _json_array(path, text)
        elif suffix in (".jsonl", ".json"):
            rows = [_json_row(path, number, line) for number, line in _filled_lines(text)]
        else:
            rows = [
                PromptRow(f"{path}, line {number}", {"prompt": line.strip()}) for number, line in _filled_lines(text)
            ]
    if not rows:
        raise UsageError(f"{path} is empty")
    return rows


def read_text(path: Path) -> str:
    """Read a text file, never a pipe or device, which may be endless or empty the second time.

    Raises:
        UsageError: If it cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is a pipe or a device; write its content to a file, and name the file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {why_unreadable(error)}") from error


def _csv(path: Path, text: str, delimiter: str) -> list[PromptRow]:
    # Strict: otherwise an unclosed quotation mark would silently swallow the rest of the file.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [PromptRow(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        why = "a quotation mark is never closed" if "end of data" in str(error) else error
        raise UsageError(f"{path}, line {reader.line_num + 1} is not valid {path.suffix[1:].upper()}: {why}") from error


def _filled_lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines, which also splits at characters that JSON strings may contain.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_row(path: Path, number: int, line: str) -> PromptRow:
    where = f"{path}, line {number}"
    row = _json(where, line)
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a JSON object")
    return PromptRow(where, row)


def _json_array(path: Path, text: str) -> list[PromptRow]:
    rows = []
    for number, row in enumerate(_json(str(path), text), 1):
        if not isinstance(row, dict | str):
            raise UsageError(f"{path}, row {number} is neither a JSON object nor a string")
        rows.append(PromptRow(f"{path}, row {number}", {"prompt": row} if isinstance(row, str) else row))
    return rows


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON: {one_line(error)}") from error


def _parquet(path: Path) -> list[PromptRow]:
    # Imported here: it takes half a second, and few sets are Parquet files.
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    return [PromptRow(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


# Names of the prompt column in public sets (`goal` in AdvBench), by preference; not case-sensitive.
PROMPT_COLUMNS = ("prompt", "goal", "question", "instruction", "behavior", "request", "text")
# Names of the category column, by preference.
CATEGORY_COLUMNS = ("category", "semantic_category", "semanticcategory", "functionalcategory", "subject", "type")
HARMFUL_LABELS = ("harmful", "unsafe", "toxic")
HARMLESS_LABELS = ("harmless", "safe", "benign")
PROMPT_KINDS = ("harmful", "harmless")


@dataclass(frozen=True)
class Columns:
    """The columns of a set, as a recipe names them; None means the known names.

    Attributes:
        column: The prompt's column.
        label: The label's column.
        category: The category's column.
        kind: "harmful" or "harmless" for all rows, regardless of their labels.
    """

    column: str | None = None
    label: str | None = None
    category: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt, its kind ("harmful" or "harmless"), and its category if it has one."""

    prompt: str
    kind: str
    category: str | None


def read_requests(rows: Sequence[PromptRow], source: str, columns: Columns) -> tuple[Request, ...]:
    """Read the prompts of one source, in order; a row without a label is harmful.

    In a set without labels, types that begin with `contrast` mark the harmful rows, as in XSTest's unsafe half.

    Raises:
        UsageError: If a named column is missing, or a row has no prompt or an unknown label.
    """
    if columns.kind not in (None, *PROMPT_KINDS):
        raise UsageError(f"{source}: kind is {columns.kind!r}; it is harmful or harmless")
    found = {name: None for row in rows for name in row.values if isinstance(name, str)}
    for column in (columns.column, columns.label, columns.category):
        if column is not None and column not in found:
            raise UsageError(
                f"{source} has no column {column!r}{nearest_of(column, found)}; its columns are {', '.join(found)}"
            )
    by_case = {name.casefold(): name for name in reversed(found)}
    label = columns.label or by_case.get("label")
    prompts = [columns.column] if columns.column else [by_case[name] for name in PROMPT_COLUMNS if name in by_case]
    categories = (
        [columns.category] if columns.category else [by_case[name] for name in CATEGORY_COLUMNS if name in by_case]
    )
    contrasts = by_case.get("type") if label is None and any(map(_is_contrast, rows)) else None

    def kind(row: PromptRow) -> str:
        if columns.kind:
            return columns.kind
        if contrasts:
            return "harmful" if _is_contrast(row) else "harmless"
        return _kind(row, label, columns.label is not None) if label else "harmful"

    return tuple(Request(_prompt(row, prompts, found), kind(row), _text(row.values, categories)) for row in rows)


def _kind(row: PromptRow, label: str, named: bool) -> str:
    value = row.values.get(label, "" if named else "harmful")
    if value is None or not str(value).strip():
        raise UsageError(f"{row.where} has no label")
    word = str(value).strip().lower()
    if word in HARMFUL_LABELS:
        return "harmful"
    if word in HARMLESS_LABELS:
        return "harmless"
    allowed = ", ".join(HARMFUL_LABELS + HARMLESS_LABELS)
    raise UsageError(
        f"{row.where}: {label} is {word!r}; allowed are {allowed} "
        "(another column: ?label=NAME; one kind for all: ?kind=harmful)"
    )


def _is_contrast(row: PromptRow) -> bool:
    return any(
        isinstance(name, str) and name.casefold() == "type" and str(value).startswith("contrast")
        for name, value in row.values.items()
    )


def _prompt(row: PromptRow, names: Sequence[str], found: Mapping[str, Any]) -> str:
    prompt = _text(row.values, names, strip=False)
    if prompt is None:
        wanted = f"the column {names[0]}" if len(names) == 1 else f"one of the columns {', '.join(PROMPT_COLUMNS)}"
        raise UsageError(
            f"{row.where} has no prompt: {wanted} must hold text; the columns are {', '.join(found)} "
            "(another one: ?column=NAME)"
        )
    return prompt


def _text(row: Mapping[str, Any], names: Sequence[str], strip: bool = True) -> str | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip() if strip else value
    return None


def listed_names(name: str) -> tuple[str, ...]:
    """Split a comma list; an existing path with commas stays one name, the longest one first.

    Raises:
        UsageError: If a part is empty.
    """
    pieces = name.split(",")
    parts: list[str] = []
    while pieces:
        for size in range(len(pieces), 0, -1):
            part = ",".join(pieces[:size]).strip()
            base = base_and_query(part)[0]
            # A comma after the question mark splits the list; keys write it as %2C.
            if size == 1 or (os.path.exists(base) and base.count(",") == size - 1):
                break
        if not part:
            raise UsageError(f"{name!r} has an empty entry: write one name, or several separated by single commas")
        parts.append(part)
        del pieces[:size]
    return tuple(parts)


def base_and_query(name: str) -> tuple[str, str]:
    """Split a name at the question mark before its keys: after an existing path, or else at the first one."""
    marks = [index for index, character in enumerate(name) if character == "?"]
    if os.path.exists(name) or not marks:
        return name, ""
    mark = next((index for index in marks if os.path.exists(name[:index])), marks[0])
    return name[:mark], name[mark + 1 :]


def parse_query(name: str, query: str, keys: Sequence[str]) -> dict[str, str]:
    """Parse a name's keys; characters that would split the name are written as `%2C` and the like.

    Raises:
        UsageError: If a key is unknown, repeated or without a value.
    """
    values: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        key, _, value = pair.partition("=")
        if key not in keys:
            nearest = nearest_of(key, keys)
            raise UsageError(f"{name!r}: unknown key {key!r}{nearest}; the keys here are {', '.join(keys)}")
        if not value or key in values:
            raise UsageError(f"{name!r}: the key {key} needs one value, as in ?{key}=VALUE")
        values[key] = unquote(value)
    return values


def nearest_of(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word for an error; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
