"""Rows of local files, and names of sets as a recipe lists them.

The suffix tells whether a file is CSV, TSV, JSON lines, a JSON document, Parquet or text with one prompt per line (also
without a suffix). A recipe lists `NAME[?KEY=VALUE&KEY=VALUE], ...`, where NAME is a path or a Hub id; an existing path
may contain commas and question marks. Whatever could be read in two ways is an error that says how to choose.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from dapa_merge.errors import UsageError, nearest_of, one_line, why_unreadable
from dapa_merge.files import refuse_special

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
# WildGuardMix, a large public set, has 120 MB.
MAX_FILE_BYTES = 512 << 20
# What a Parquet file may hold in memory, and about what a row takes beside its values.
MAX_UNPACKED_BYTES, ROW_BYTES = 4 * MAX_FILE_BYTES, 400
# No text has these: C0 but for tab and line ends, DEL, C1 but for NEL, and halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class PromptRow(NamedTuple):
    """A row, and its place for error messages."""

    where: str
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value of a column, whose name may differ in case and blanks; None if absent."""
        if key in self.values:
            return self.values[key]
        return next((value for name, value in self.values.items() if name and column_key(name) == key), None)


def column_key(name: str) -> str:
    """A column's name in lower case, with its words joined by underscores: `is_harmful` for ` isHarmful`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    return "_".join(re.findall(r"[^\W_]+", words)).casefold()


def refuse_controls(text: str, where: str, what: str = "prompt") -> str:
    """Return a text, or raise `UsageError` if it has a character that no text has, but that moves a cursor."""
    if found := _CONTROLS.search(text):
        raise UsageError(f"{where}: the {what} has the control character U+{ord(found[0]):04X}; remove it")
    return text


def read_rows(path: Path) -> Sequence[PromptRow]:
    """Read a file by its suffix; a line of text, or a string in an array, is a row with a `prompt`.

    Raises:
        UsageError: If it cannot be read, has an unknown suffix, is malformed, or has no rows.
    """
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES) and os.path.isfile(path):
        raise UsageError(f"{path} has the unknown suffix {path.suffix}; known are {', '.join(SUFFIXES)}")
    real = Path(os.path.realpath(path))
    # A stranger's folder may link to a private file; files of the Hub's cache are links to blobs.
    if suffix and real.suffix.lower() != suffix and real.parent.name != "blobs":
        raise UsageError(f"{path} is a link to {real}; put a copy of that file in its place")
    if suffix == ".parquet":
        rows = _parquet(path)
    else:
        text = read_text(path)
        if suffix in (".csv", ".tsv"):
            rows = _csv(path, text, ",;\t|" if suffix == ".csv" else "\t")
        elif suffix == ".json":
            rows = _json_document(path, text)
        elif suffix == ".jsonl":
            rows = _json_lines(path, text)
        else:
            rows = _lines(path, text)
    if not rows:
        raise UsageError(f"{path} is empty")
    return rows


def read_text(path: Path) -> str:
    """Read a text file, never a pipe or device, which may be endless or empty the second time.

    Raises:
        UsageError: If it cannot be read.
    """
    refuse_special(path, MAX_FILE_BYTES)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {why_unreadable(error)}") from error


def _csv(path: Path, text: str, delimiters: str) -> list[PromptRow]:
    first = text.partition("\n")[0]
    headers = {one: [column_key(name) for name in first.split(one)] for one in delimiters}
    # Spreadsheets of some languages separate by semicolons.
    delimiter = next((one for one in delimiters if {*headers[one]} & {*PROMPT_COLUMNS}), delimiters[0])
    # Strict: otherwise an unclosed quotation mark would silently swallow the rest of the file.
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"
    )
    try:
        names = [name.strip("\ufeff \t\xa0") for name in reader.fieldnames or ()]
        if repeated := next((name for name in names if name and names.count(name) > 1), None):
            raise UsageError(f"{path} has two columns {repeated!r}; rename or remove one")
        reader.fieldnames = names
        rows = []
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            # Otherwise, the rest of an unquoted text with a comma would be left out.
            if any(cell.strip() for cell in row.pop(None, ())):
                raise UsageError(
                    f"{where} has more fields than the header's {len(names)}; put texts with {delimiter!r} in quotes"
                )
            rows.append(PromptRow(where, row))
        return rows
    except csv.Error as error:
        why = "a quotation mark is never closed" if "end of data" in str(error) else error
        raise UsageError(f"{path}, line {reader.line_num + 1} is not valid {path.suffix[1:].upper()}: {why}") from error


def _lines(path: Path, text: str) -> list[PromptRow]:
    lines = _filled_lines(text)
    if lines:
        first = lines[0][1].strip()
        cells = {column_key(cell) for cell in re.split("[,;\t]", first)}
        is_table = column_key(first) in PROMPT_COLUMNS or (len(cells) > 1 and cells <= {*PROMPT_COLUMNS, *_OTHERS})
        if is_table or re.match(r"""\{\s*"|\[\s*[{"]""", first):
            kind = ".csv" if is_table else ".jsonl or .json"
            raise UsageError(f"{path} is not one prompt per line: it begins with {first[:40]!r}; name it {kind}")
    return [PromptRow(f"{path}, line {number}", {"prompt": line.strip()}) for number, line in lines]


def _filled_lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines, which also splits at characters that JSON strings may contain.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_lines(path: Path, text: str) -> list[PromptRow]:
    return [_json_row(path, number, line) for number, line in _filled_lines(text)]


def _json_row(path: Path, number: int, line: str) -> PromptRow:
    where = f"{path}, line {number}"
    row = _json(where, line)
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a JSON object")
    return PromptRow(where, row)


def _json_document(path: Path, text: str) -> list[PromptRow]:
    """Read an array of rows, an object with one such array, a single row, or JSON lines."""
    lines = _filled_lines(text)
    if len(lines) > 1 and all(line.strip().startswith("{") and line.strip().endswith("}") for _, line in lines):
        return _json_lines(path, text)
    document, place = _json(str(path), text) if lines else [], f"{path}, "
    if isinstance(document, dict) and not {column_key(key) for key in document} & {*PROMPT_COLUMNS}:
        arrays = [key for key, value in document.items() if isinstance(value, list)]
        if len(arrays) != 1:
            raise UsageError(
                f"{path} is an object with the keys {', '.join(document)[:80]}; write an array of rows, or a row a line"
            )
        document, place = document[arrays[0]], f"{path}, {arrays[0]}, "
    rows = []
    for number, row in enumerate(document if isinstance(document, list) else [document], 1):
        if not isinstance(row, dict | str):
            raise UsageError(f"{place}row {number} is neither a JSON object nor a string")
        rows.append(PromptRow(f"{place}row {number}", {"prompt": row} if isinstance(row, str) else row))
    return rows


def _json(where: str, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is repeated")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON: {one_line(error)}") from error


def _parquet(path: Path) -> list[PromptRow]:
    # Imported here: it takes half a second, and few sets are Parquet files.
    import pyarrow.parquet

    refuse_special(path, MAX_FILE_BYTES)
    rows: list[dict[str, Any]] = []
    left = MAX_UNPACKED_BYTES
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"{path} has two columns {repeated!r}; rename or remove one")
        # Few rows at once: a file of some KB may hold a long text a million times.
        for batch in file.iter_batches(batch_size=256):
            left -= batch.nbytes + batch.num_rows * ROW_BYTES
            if left < 0:
                raise UsageError(f"{path} unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB; name a smaller file")
            rows += batch.to_pylist()
    # Times without a date, unknown time zones and bytes that are not text raise Python's own errors.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    return [PromptRow(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


# Names of the prompt column in public sets (`goal` in AdvBench, `turns` in SORRY-Bench), by preference.
PROMPT_COLUMNS = (
    "prompt", "goal", "question", "instruction", "behavior", "request", "user_input", "user_prompt",
    "forbidden_prompt", "prompt_text", "query", "text", "turns", "messages", "conversation", "conversations",
)  # fmt: skip
# Names of the category column, by preference.
CATEGORY_COLUMNS = (
    "category", "semantic_category", "functional_category", "subcategory", "subject", "type", "hazard", "risk_area",
    "harm_area",
)  # fmt: skip
_OTHERS = (*CATEGORY_COLUMNS, "id", "label", "labels", "target", "answer", "response", "source")


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
