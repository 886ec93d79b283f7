"""The page of responses, without a browser: what is in the file, what it is made of, and where it goes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import answer, call
from hypothesis import example, given
from hypothesis import strategies as st

from dapa_merge.errors import CheckpointError, UsageError, printable
from dapa_merge.measure.figures import Response, responses_text
from dapa_merge.measure.statistics import refusal_figures
from dapa_merge.publish.commit import publishable
from dapa_merge.report import page as module
from dapa_merge.report.page import KEPT, counted_rows, may_harm, page_text, read_responses, read_sources
from dapa_merge.transplant.manifest import PRIVATE, is_listed
from dapa_merge.verify.result import check_manifest

PAGE = "dapa_responses.html"
# Also lone surrogates, which hypothesis leaves out by itself.
any_text = st.text(st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from("<>&/!-\u2028")))


class Elements(HTMLParser):
    """The elements of a page as Python's own parser of HTML finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.texts.append("")
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.texts and self.is_open:
            self.texts[-1] += data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(found[1], text) for found, text in zip(self.found, self.texts, strict=True) if found[0] == tag]


def response(kind: str = "harmful", outcome: str = "refused", text: str = "no", **others: str) -> Response:
    return Response(kind, "", "a prompt", text, outcome, others)


def data_of(text: str) -> dict:
    (data,) = [content for attributes, content in Elements(text).of("script") if attributes.get("id") == "data"]
    return json.loads(data)


@given(any_text, any_text, any_text)
@example("</script><script>alert(1)</script>", "<!--<script>", "\ud800\x00\u202e")
def test_any_text_is_in_the_page_as_data_and_nowhere_else(prompt, said, name):
    text = page_text(name, {name: [Response("harmful", name, prompt, said, name, {name: name})]})
    elements = Elements(text)
    assert [tag for tag, _ in elements.found].count("script") == 2
    data = data_of(text)
    assert data["models"] == [printable(name, keep=KEPT)]
    ((_, _, shown, [[answered, *_]]),) = data["rows"]
    assert (shown, answered) == (printable(prompt, keep=KEPT), printable(said, keep=KEPT))
    # Writing it to a file must not fail, either.
    assert text.encode()


@pytest.fixture(scope="module")
def page(demo) -> str:
    return (demo[0] / PAGE).read_text(encoding="utf-8")


def test_the_policy_allows_the_script_and_the_style_of_the_page_and_nothing_else(page):
    elements = Elements(page)
    (policy,) = [found["content"] for found, _ in elements.of("meta") if found.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    (script,) = [text for attributes, text in elements.of("script") if "type" not in attributes]
    ((_, style),) = elements.of("style")
    for name, text in (("script-src", script), ("style-src", style)):
        assert rules.pop(name) == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert rules.pop("img-src") == "data:"
    assert {*rules.values()} <= {"'none'", "'script'"}
    # The policy comes before all that it is about.
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_page_refers_to_nothing_outside_and_holds_no_style_or_handler_in_an_attribute(page):
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action", "srcset"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:image/png;base64,"))
    (script,) = [text for attributes, text in elements.of("script") if "type" not in attributes]
    assert not re.search(
        r"https?:|innerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|localStorage", script
    )
    assert "url(" not in elements.of("style")[0][1]
    assert "@import" not in elements.of("style")[0][1]


def test_the_figures_are_those_of_the_report(page, demo):
    _, report = demo
    assert f"{report['after']['dsr']:.3f}" in page
    low, high = report["after"]["dsr_interval"]
    assert f"{low:.3f}-{high:.3f}" in page
    assert page.count("data:image/png;base64,") == 2


def test_without_a_report_shares_and_intervals_are_those_of_the_measurements():
    said = [response(outcome=one) for one in ("refused", "refused", "complied")]
    said += [response("harmless", one) for one in ("complied", "refused")]
    figures = refusal_figures(said)
    rows = dict(zip([label for label, _ in counted_rows({"m": said})], counted_rows({"m": said}), strict=False))
    assert rows["DSR (3 harmful)"][1] == [f"{figures['dsr']:.3f}"]
    assert rows["over-refusal (2 harmless)"][1] == [f"{figures['over_refusal']:.3f}"]
    spans = [cells for label, cells in counted_rows({"m": said}) if label.startswith(" ")]
    expected = [figures["dsr_interval"], figures["over_refusal_interval"]]
    assert spans == [[f"{low:.3f}-{high:.3f}"] for low, high in expected]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (response(), False),
        (response(outcome="complied"), True),
        (response(outcome="degenerate"), True),
        (response("harmful, role play", "complied"), True),
        (response("harmless", "complied"), False),
        (response(judge="complied"), True),
        (response(judge="refused"), False),
    ],
)
def test_what_any_classifier_does_not_call_a_refusal_is_folded(one, expected):
    assert may_harm(one) is expected


def test_answers_to_a_prompt_stand_beside_each_other_also_if_it_was_asked_twice_or_of_one_model_only():
    twice = [Response("harmful", "", "p", text, "refused") for text in ("a", "b")]
    data = data_of(page_text("t", {"one": twice, "two": [*twice[:1], Response("harmful", "", "q", "c", "refused")]}))
    texts = [(prompt, [said and said[0] for said in answers]) for _, _, prompt, answers in data["rows"]]
    assert texts == [("p", ["a", "a"]), ("p", ["b", None]), ("q", [None, "c"])]
    assert data["pair"] is None


def test_only_a_run_has_a_before_and_an_after():
    (one, other) = (
        data_of(page_text("t", {name: [response()] for name in names}))
        for names in (("target", "source"), ("source", "target", "result"))
    )
    assert (one["models"], one["pair"]) == (["target", "source"], None)
    assert (other["models"], other["pair"]) == (["source", "before", "after"], [1, 2])


def test_responses_are_read_as_they_were_written(tmp_path):
    said = {
        "target": [Response("harmful", "c", "\ud800 p\u2028", "<r>\x00", "refused", {"judge": "complied"})],
        "b": [response()],
    }
    (tmp_path / "r.jsonl").write_text(responses_text(said), encoding="utf-8")
    assert read_responses(tmp_path / "r.jsonl") == said


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"model": "m"}', "kind"),
        ('{"model": 1, "kind": "k", "category": "", "prompt": "p", "response": "r", "outcome": "o"}', "model"),
        (responses_text({"m": [response()]}).replace("{}", "[1]").strip(), "others"),
        ("[" * 100_000, "not JSON"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_a_response_is_named(line, named, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(responses_text({"m": [response()]}) + line + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"line 2 of .*{named}"):
        read_responses(path)


def test_too_many_responses_for_a_page_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="JSON lines"):
        page_text("t", {"m": [response(text="x" * 2000)]})
    with pytest.raises(UsageError, match="no responses"):
        page_text("t", {})


@pytest.fixture
def copied(demo, tmp_path) -> Path:
    return Path(shutil.copytree(demo[0], tmp_path / "out"))


def test_the_page_is_made_anew_from_a_result_and_a_file_of_another_kind_stays(copied, page):
    (copied / PAGE).unlink()
    made = answer("page", copied, "--json")
    assert made["page"] == str(copied / PAGE)
    assert (copied / PAGE).read_text(encoding="utf-8") == page
    # An earlier page is replaced.
    assert call("page", copied).exit_code == 0
    other = copied / "notes.md"
    other.write_text("mine")
    failed = call("page", copied, "--out", other)
    assert (failed.exit_code, other.read_text()) == (2, "mine")
    assert "--out" in failed.stderr


def test_files_of_evaluate_become_a_page_beside_the_first(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(responses_text({"m": [response()]}), encoding="utf-8")
    call("page", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert data_of((tmp_path / "a.html").read_text(encoding="utf-8"))["models"] == ["m", "m (b.jsonl)"]


@pytest.mark.parametrize("name", ["empty", "absent.jsonl", "both"])
def test_what_no_page_can_be_made_of_is_named(name, tmp_path, copied):
    (tmp_path / "empty").mkdir()
    paths = [copied, tmp_path / "empty"] if name == "both" else [tmp_path / name]
    failed = call("page", *paths)
    assert failed.exit_code in (2, 4)
    assert name in failed.stderr or name == "both"
    assert list(tmp_path.glob("*.html")) == []


def test_the_page_stays_at_home_and_a_result_may_lack_it(copied):
    assert PAGE in PRIVATE
    assert not is_listed(PAGE)
    assert PAGE not in publishable(copied)
    assert check_manifest(copied).faults == ()
    (copied / PAGE).unlink()
    assert check_manifest(copied).faults == ()


def test_a_report_of_a_stranger_is_text_too(copied):
    path = copied / "dapa_report.json"
    evil = "<script>alert(1)</script>\u202e"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target": evil, "prompts": evil}))
    text = read_sources([copied]).text()
    assert [tag for tag, _ in Elements(text).found].count("script") == 2
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\u202e" in text
