"""The option `--tiny`, which every script has: sizes at which its figures mean nothing, to see that it runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **tiny: object) -> argparse.Namespace:
    """Parse the command line; with `--tiny`, the defaults are those given here."""
    parser.add_argument("--tiny", action="store_true", help="so small that the figures mean nothing: does it run?")
    if parser.parse_known_args(argv)[0].tiny:
        parser.set_defaults(**tiny)
    return parser.parse_args(argv)


def few_prompts(folder: Path, number: int = 2) -> Path:
    """A folder with the first prompts, passages and questions of the miniature."""
    # atheris guides fuzz.py where the rest of the project is not installed.
    from dapa_merge import miniature

    few = folder / "few"
    few.mkdir()
    for path in (miniature.path("target").parent / "prompts").glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (few / path.name).write_text("".join(lines[:number]), encoding="utf-8")
    return few
