"""Texts whose perplexity is taken: the packaged one, a file, or a dataset of the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dapa_merge.errors import HubError, UsageError
from dapa_merge.evaluate.datasets_hub import load_rows, parse_dataset
from dapa_merge.evaluate.prompt_files import SUFFIXES, read_text
from dapa_merge.evaluate.prompts import Question, load_passages, load_prompts

WIKITEXT = "Salesforce/wikitext?config=wikitext-2-raw-v1&split=test"
# How the rows of a dataset become one document, as transformers' page on perplexity does it.
BETWEEN_ROWS = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: What it is, so that figures of other texts are not compared with its own.
        passages: Its documents, each read on its own.
        max_tokens: Only so many tokens of it are read, the first ones; None for all.
    """

    name: str
    passages: tuple[Question, ...]
    max_tokens: int | None = None


def load_text(name: str, *, max_tokens: int | None = None) -> Text:
    """Load a text by name.

    Args:
        name: `builtin`; `auto`, which is wikitext-2-raw's test split if the Hub or its cache has it, else `builtin`; a
            text file, which is one document; a JSON-lines or CSV file with a column `text`, a document a row; or a
            dataset as `ID[@REVISION][?config=CONFIG&split=SPLIT&column=COLUMN]`, whose rows are one document.
        max_tokens: Read only so many tokens.

    Raises:
        UsageError: If there is no such text, or it is empty.
        HubError: If the Hub does not give it.
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
            return "wikitext-2-raw, test split", _load_dataset(WIKITEXT)
        except (HubError, UsageError):
            return _load("builtin")
    path = Path(name)
    if os.path.exists(path) and not os.path.isdir(path):
        is_document = path.suffix.lower() in ("", ".txt")
        return name, (Question("", read_text(path)),) if is_document else load_passages(path)
    base = name.partition("?")[0]
    if not os.path.isdir(base) and ("/" not in base or Path(base).suffix.lower() in SUFFIXES):
        raise UsageError(f"text {name!r}: no such file, and neither auto nor builtin nor the id of a dataset")
    return name, _load_dataset(name)


def _load_dataset(name: str) -> tuple[Question, ...]:
    dataset = parse_dataset(name, ("column",))
    column = dataset.option("column") or "text"
    found = load_rows(dataset)
    if column not in found.columns:
        raise UsageError(f"the dataset {dataset} has no column {column!r}; it has {', '.join(found.columns)}")
    return (Question("", BETWEEN_ROWS.join(str(row[column]) for row in found.rows)),)
