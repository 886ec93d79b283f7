"""The declared table of methods, and those who read it."""

from __future__ import annotations

from pathlib import Path

from conftest import call

from dapa_merge.compare.methods import METHODS, NEEDS, declared

PAGE = Path(__file__).parents[2] / "docs" / "compare.md"


def test_the_page_of_the_documentation_has_the_declared_table():
    assert "\n".join(declared(METHODS)) in PAGE.read_text(encoding="utf-8")


def test_the_help_names_every_method_and_what_it_applies():
    text = " ".join(call("compare", "--help").output.split())
    for key, method in METHODS.items():
        assert f"{key} {method.what}" in text


def test_every_need_is_one_that_is_declared():
    assert {need for method in METHODS.values() for need in method.needs} <= NEEDS.keys()
