"""One hostile text in every place that a stranger fills: nothing that is shown or written does what it wants."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from compare.test_tables import REPAIRED, points, row
from conftest import call
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dapa_merge.compare.page import arms_csv, latex, page
from dapa_merge.errors import DapaError, markdown, markdown_code, printable
from dapa_merge.measure.figures import Response, responses_text
from dapa_merge.progress import LOG, Terminal, shown
from dapa_merge.publish.parents import split_card
from dapa_merge.report.drawing import STYLE
from dapa_merge.trace.store import page as trace_page

EVIL = (
    "\x1b[2J\x1b]0;x\x07\x9b31m\u202egnp.exe\u2066\r\n# Verified\n---\n```\n<script>alert(1)</script><img src=x> "
    "![i](http://evil.example/i.png) [l](javascript:1) | a | `b` **c** [red]d[/red] [link=http://evil.example]e "
    "&lt;f&gt; $x$ @someone www.evil.example"
)
# As commonmark.org has it, with the extensions of the Hub and of GitHub that markdown-it-py has.
READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
some_text = st.text(st.sampled_from("ab1 .:/&;#*_`[]()!<>|\\~$@-+=\n\té\u202e\x1b"), max_size=30)


def is_harmless(text: str) -> bool:
    """Whether a terminal shows only what is there: lines of characters, none of which is a command."""
    return not [
        one for one in text if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


def links_and_tags(text: str) -> list[str]:
    """What a reader of Markdown would follow, load or run."""
    tokens = list(READER.parse(text))
    tokens += [child for token in tokens for child in token.children or ()]
    found = [
        str(token.attrGet("href") or token.attrGet("src")) for token in tokens if token.type in ("link_open", "image")
    ]
    return found + [token.content for token in tokens if token.type in ("html_inline", "html_block")]


@given(some_text)
@example("     a")
@example("   ")
def test_markdown_shows_the_text_itself_and_nothing_else(text):
    (opened, inline, closed) = READER.parse(f"x {markdown(text)}")
    assert (opened.type, closed.type) == ("paragraph_open", "paragraph_close")
    assert {child.type for child in inline.children} == {"text"}
    assert "".join(child.content for child in inline.children) == f"x {printable(text)}".rstrip()
    (item,) = [token for token in READER.parse(f"- {markdown(text)} x") if token.type == "inline"]
    assert {child.type for child in item.children} <= {"text"}
    cells = [
        token for token in READER.parse(f"| a | b |\n|---|---|\n| {markdown(text)} | c |") if token.type == "td_open"
    ]
    assert len(cells) == 2


@given(some_text)
def test_a_code_span_shows_the_text_itself(text):
    (_, inline, _) = READER.parse(f"x {markdown_code(text)} y")
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    assert inline.children[1].content.strip() == printable(text).strip()


@pytest.fixture
def evil(demo, tmp_path) -> Path:
    """A result whose report, recipe, responses and folder say so in every place where a stranger's text may be."""
    out = shutil.copytree(demo[0], tmp_path / "evil | <script>`")
    report = json.loads((out / "dapa_report.json").read_text())
    report |= {"target": EVIL, "source": EVIL, "prompts": EVIL, "keep": EVIL, "evaluator": EVIL, "version": EVIL}
    report["searched"]["measure"] = EVIL
    for name in ("before", "after", "source_alone"):
        figures = report[name]
        figures["text"] = EVIL
        figures["categories"] = [{"kind": "harmful", "category": EVIL, "num_prompts": 3, "num_refused": 1}]
        figures["skills"] = [{**figures["skills"][0], "name": EVIL}]
    (out / "dapa_report.json").write_text(json.dumps(report))
    recipe = yaml.safe_load((out / "mergekit_config.yml").read_text())
    recipe["parameters"]["prompts"] = EVIL
    (out / "mergekit_config.yml").write_text(yaml.safe_dump(recipe))
    return out


def test_a_card_holds_no_markup_of_a_strangers(evil):
    ran = call("card", evil)
    assert ran.exit_code == 0, ran.output
    text = (evil / "README.md").read_text()
    assert is_harmless(text)
    assert is_harmless(ran.output)
    # In code it is text.
    html = READER.render(split_card(text)[1])
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "evil.example" not in " ".join(links_and_tags(split_card(text)[1]))
    titles = re.findall("^#+ (.*)$", split_card(text)[1], re.MULTILINE)
    assert "Verified" not in titles
    # The recipe is one block, whatever its values hold.
    (fenced,) = [token for token in READER.parse(split_card(text)[1]) if token.info == "yaml"]
    assert yaml.safe_load(fenced.content)["parameters"]["prompts"].endswith("www.evil.example")


def test_a_table_and_a_ci_jobs_summary_hold_no_markup_of_a_strangers(evil, tmp_path):
    ran = call("gate", evil, "--min-dsr", 0.5, "--min-skill", f"{EVIL}=0.1", "--summary", tmp_path / "summary.md")
    assert ran.exit_code == 0, ran.output
    assert is_harmless(ran.output)
    text = (tmp_path / "summary.md").read_text()
    assert is_harmless(text)
    assert links_and_tags(text) == []
    assert len(text.splitlines()) == len(["title", "", "head", "line", "DSR", "skill", ""])


def test_the_pages_of_a_comparison_hold_no_markup_of_a_strangers():
    found = replace(row(EVIL, *REPAIRED.arms, curve=points()), target=EVIL, source=EVIL, prompts=EVIL, evaluator=EVIL)
    found = replace(found, architecture=EVIL, no_curve=EVIL)
    text = page([found], {EVIL: EVIL}, set())
    for written in (text, latex([found]), arms_csv([found])):
        assert is_harmless(written)
    assert links_and_tags(text) == []
    assert "<script" not in READER.render(text)


def test_the_page_of_a_trace_holds_no_markup_of_a_strangers():
    def cells(value: float) -> dict:
        return {"mean": value, "low": value, "high": value}

    agreed = {"jaccard": 1.0, "jaccard_by_chance": 1.0, "spearman": 1.0, "low": 1.0, "high": 1.0, "number": 1}
    group = {"group": EVIL, "num_units": 1, "inserted": 0.5, "random_inserted": [], "full": 1.0, "reverted": 0.5}
    summary = {
        "target": EVIL, "source": EVIL, "prompts": EVIL, "version": EVIL, "findings": [EVIL], "arithmetic": EVIL,
        "groups": {"measure": EVIL, "groups": [{**group, "random_reverted": []}]},
        "units": [{"unit": EVIL, "attribution": 1.0, "influence_on_refusing": cells(1.0),
                   "influence_on_hidden_state": cells(1.0), "selected": True}],
        "trace": {"kinds": {}, "roles": [], "num_prompts": 1, "settings": {"a": EVIL, "b": [EVIL]}},
        "stages": {"done": [], "follow": ["traces"]},
        "directions": {"agreement": {key: {EVIL: agreed} for key in ("put_back", "share_of_difference")}},
        "overlap": {"with_selection": {}, "rank_correlations": [{"of": [EVIL, EVIL], "spearman": 1.0}]},
        "passes": {"trace_runs_per_prompt": 1.0, "trace_passes_per_prompt": 1.0, "trace_seconds_per_prompt": 1.0,
                   "influence": 1.0},
    }  # fmt: skip
    text = trace_page(summary, ())
    assert is_harmless(text)
    assert "<script" not in text
    assert "<img" not in text


def test_a_terminal_gets_no_command_in_steps_tables_and_errors(capsys):
    with shown():
        LOG.info("%s", EVIL)
    Terminal().print(EVIL, soft_wrap=True)
    DapaError(EVIL).show()
    out, err = capsys.readouterr()
    assert is_harmless(out.replace("\n", ""))
    assert is_harmless(err)
    # Each step and each error is one line; what looks like rich's markup stays text.
    assert err.count("\n") == 2
    assert "[red]d[/red] [link=http://evil.example]e" in out


def test_responses_are_kept_as_they_are_but_move_no_cursor():
    said = Response("harmful", "é", "p", f"{EVIL}\ud800é", "refused")
    text = responses_text({"target": [said]})
    assert is_harmless(text)
    assert json.loads(text)["response"] == said.response
    assert "é" in text.encode().decode()


def test_no_name_in_a_picture_is_a_formula():
    assert STYLE["text.parse_math"] is False
