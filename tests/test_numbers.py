"""Every figure in the documents was measured: it is among the recorded results, or made from recorded rows."""

from __future__ import annotations

import re
from pathlib import Path

import cost
import pytest
import real_table
import recorded_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS.md"
PAGES = sorted(["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What is no figure: names in code, links, numbers of papers and of versions.
NOT_PROSE = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|Python [\d. to,]+|et al\.,? \d{4}")
# Numbers that somebody chose, by page: limits, defaults, sizes, status codes, years.
CHOSEN = {
    "README.md": {"1.092"},
    "docs/compare.md": {"0.0002", "1985", "4.1"},
    "docs/directions.md": {"4096"},
    "docs/measuring.md": {"408", "409", "429"},
    "docs/published-pairs.md": {"10,000", "4,096", "1,000,000"},
    "docs/recipes.md": {"2021", "2002"},
    "docs/running.md": {"143"},
    "docs/search.md": {"2021", "2002"},
    "docs/trace.md": {"2022", "3,000", "1,700", "38,000"},
}


def numbers(text: str) -> set[str]:
    """The numbers of a text, but those of up to two digits: too many things are counted."""
    found = (number.rstrip(",") for number in NUMBER.findall(text))
    return {number for number in found if "." in number or len(number.replace(",", "")) > 2}


def prose(page: str) -> str:
    """What a page says, and what it shows as printed."""
    shown = FENCED.sub(lambda fence: fence[2] if fence[1] == "text" else " ", page)
    # A span has two figures.
    return NOT_PROSE.sub(" ", shown).replace("-", " ")


def test_a_number_is_found_as_it_is_written():
    text = "DSR 0.984 (0.917-0.997), 1,234 of 2.5 GB; `0.5` and v1.2.3, 7 days, Meng et al., 2022"
    assert numbers(prose(text)) == {"0.984", "0.917", "0.997", "1,234", "2.5"}
    assert numbers(prose("```text\n0.25\n```\nand 0.75\n```yaml\n0.125\n```\n")) == {"0.25", "0.75"}


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_of_a_page_is_among_the_recorded_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = "".join(table for _, table in recorded_tables.TABLE.findall(text))
    recorded = numbers((RESULTS.read_text(encoding="utf-8") + tables).replace("-", " "))
    said = numbers(prose(text))
    assert said - recorded - CHOSEN.get(page, set()) == set()


@pytest.mark.parametrize("page", recorded_tables.PAGES, ids=lambda page: page.name)
def test_a_table_of_recorded_rows_is_what_the_rows_say(page):
    text = page.read_text(encoding="utf-8")
    assert recorded_tables.written(text) == text


@pytest.mark.parametrize("path", sorted(recorded_tables.RECORDED.glob("*.json*")), ids=lambda path: path.name)
def test_no_path_of_a_machine_is_recorded(path):
    assert re.findall(r"(?<![\w.])/\w+/", path.read_text(encoding="utf-8")) == []


def test_a_recorded_reason_names_models_by_their_folders():
    arm = {"key": "dapa", "cost": None, "figures": None, "why_not": "the source /home/ab/models/it cannot, and/or /x/y"}
    assert real_table.recorded("pair", arm)["why_not"] == "the source it cannot, and/or y"


def test_every_recorded_table_stands_in_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in recorded_tables.PAGES)
    assert [name for name in recorded_tables.TABLES if f"<!-- recorded: {name} -->" not in pages] == []


def test_what_a_repair_costs_is_recorded_as_the_script_writes_it():
    assert cost.written(cost.read(cost.RECORDED)) == cost.RECORDED.read_text(encoding="utf-8")


def test_a_changed_figure_of_a_table_is_put_right():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert recorded_tables.written(page.replace("18 of 18 (0.82-1.00)", "17 of 18 (0.74-0.99)")) == page
