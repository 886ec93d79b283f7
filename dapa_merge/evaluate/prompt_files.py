"""Rows of a local file: CSV, TSV, JSON lines, a JSON array, Parquet, or text with a prompt a line.

The suffix says which, in any case of letters; a file without a suffix is text.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dapa_merge.errors import UsageError, one_line, why_unreadable

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


class Row(NamedTuple):
    """A row, and how an error says which one it is."""

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> Sequence[Row]:
    """The rows of a file by its suffix; a line of text, or a string of an array, is a row with a prompt.

    Raises:
        UsageError: If it cannot be read, is of no known suffix, is malformed, or has no rows.
    """
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES) and os.path.isfile(path):
        raise UsageError(
            f"{path} has the suffix {path.suffix}, which says nothing of what is in it; known are {', '.join(SUFFIXES)}"
        )
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
            rows = [Row(f"{path}, line {number}", {"prompt": line.strip()}) for number, line in _filled_lines(text)]
    if not rows:
        raise UsageError(f"{path} is empty")
    return rows


def read_text(path: Path) -> str:
    """All of a text file; never of a pipe or device, which may give nothing, no end, or nothing a second time.

    Raises:
        UsageError: If it cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is a pipe or a device; write what it gives into a file, and name that")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {why_unreadable(error)}") from error


def _csv(path: Path, text: str, delimiter: str) -> list[Row]:
    # Strict: else a quotation mark that is never closed would swallow the rest of the file without a word.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [Row(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        why = "its quotation mark is never closed" if "end of data" in str(error) else error
        raise UsageError(f"{path}, line {reader.line_num + 1} is no {path.suffix[1:].upper()}: {why}") from error


def _filled_lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines, which also splits at characters that may stand inside a JSON text.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_row(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    row = _json(where, line)
    if not isinstance(row, dict):
        raise UsageError(f"{where} is no JSON object")
    return Row(where, row)


def _json_array(path: Path, text: str) -> list[Row]:
    rows = []
    for number, row in enumerate(_json(str(path), text), 1):
        if not isinstance(row, dict | str):
            raise UsageError(f"{path}, row {number} is neither a JSON object nor a string")
        rows.append(Row(f"{path}, row {number}", {"prompt": row} if isinstance(row, str) else row))
    return rows


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON: {one_line(error)}") from error


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
