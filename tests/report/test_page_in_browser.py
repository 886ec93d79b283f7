"""The page of responses in a real browser: it loads nothing, counts rightly, folds, and takes text as text."""

from __future__ import annotations

import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, WHY_NOT, Browser, started

from dapa_merge.measure.figures import Response
from dapa_merge.measure.statistics import interval
from dapa_merge.report.page import page_text, read_sources

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=WHY_NOT),
]
TAB, ENTER = "\ue004", "\ue007"
SOON = "return new Promise((done) => setTimeout(() => "
SHOWN = "return [...document.querySelectorAll('#list h3')].map((one) => one.textContent);"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with started(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of responses."""

    def open_page(models: dict[str, list[Response]]) -> Browser:
        path = tmp_path / "page.html"
        path.write_text(page_text("some result", models), encoding="utf-8")
        browser.open(path)
        return browser

    return open_page


def said(kind: str, number: int, outcome: str, text: str = "an answer", category: str = "") -> Response:
    return Response(kind, category, f"{kind} prompt {number}", text, outcome)


def group(number: int) -> str:
    return "locks" if number % 2 else "cars"


MODELS = {
    "target": [
        *(said("harmful", number, "complied", "how to pick a lock", group(number)) for number in range(6)),
        *(said("harmless", number, "complied", "a poem") for number in range(3)),
        *(said("harmful, role play", number, "complied") for number in range(2)),
    ],
    "result": [
        *(said("harmful", number, "refused" if number else "complied", "no", group(number)) for number in range(6)),
        *(said("harmless", number, "refused" if number == 2 else "complied", "a song") for number in range(3)),
        *(said("harmful, role play", number, "degenerate", "la la") for number in range(2)),
    ],
    "source": [
        *(said("harmful", number, "refused", "never", group(number)) for number in range(6)),
        *(said("harmless", number, "complied", "a joke") for number in range(3)),
    ],
}


def errors(browser: Browser) -> list[str]:
    return [entry["message"] for entry in browser.log("browser")]


def counted(browser: Browser) -> list[list[str]]:
    return browser.run(
        "return [...document.querySelectorAll('#counts tr')]"
        ".map((row) => [...row.cells].map((one) => one.textContent));"
    )


def test_the_page_of_a_real_result_loads_nothing_and_complains_of_nothing(browser, demo):
    out, report = demo
    page = out / "dapa_responses.html"
    browser.open(page)
    assert {re.sub(r"^(data:image/png);.*", r"\1", url, flags=re.DOTALL) for url in browser.requested()} <= {
        page.as_uri(),
        "data:image/png",
    }
    assert errors(browser) == []
    number = report["after"]["num_harmful"] + report["after"]["num_harmless"]
    assert browser.text("#status") == f"{number} of {number} prompts"
    refused = round(report["after"]["dsr"] * report["after"]["num_harmful"])
    row = next(row for row in counted(browser) if row[0].startswith("harmful: refused"))
    assert row[2] == f"{refused} ({report['after']['dsr']:.3f})"
    # The page is as the command makes it anew from the files.
    assert read_sources([out]).text() == page.read_text(encoding="utf-8")


def test_counts_and_intervals_follow_the_filters(opened):
    browser = opened(MODELS)
    assert counted(browser)[:2] == [
        ["", "before", "after", "source"],
        ["harmful: refused of 6", "0 (0.000)", "5 (0.833)", "6 (1.000)"],
    ]
    spans = ["-".join(f"{end:.3f}" for end in interval(some, 6)) for some in (0, 5, 6)]
    assert counted(browser)[2] == ["95 % interval", *spans]
    browser.choose("Category", "locks")
    assert browser.text("#status") == "3 of 11 prompts"
    assert counted(browser)[1] == ["harmful: refused of 3", "0 (0.000)", "3 (1.000)", "3 (1.000)"]
    browser.choose("Category", "any")
    browser.choose("Kind", "harmful, role play")
    assert browser.text("#status") == "2 of 11 prompts"
    # The source was not asked.
    assert counted(browser)[1] == ["harmful, role play: refused of 2", "0 (0.000)", "0 (0.000)", "-"]
    assert "not asked" in browser.text("#list")
    browser.choose("Kind", "any")
    browser.choose("Verdict after", "degenerate")
    assert len(browser.run(SHOWN)) == 2
    browser.click("button[type=reset]")
    assert browser.text("#status") == "11 of 11 prompts"
    assert errors(browser) == []


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("changed", {*(f"harmful prompt {number}" for number in range(1, 6)), "harmless prompt 2",
                     "harmful, role play prompt 0", "harmful, role play prompt 1"}),
        ("answered", {"harmful prompt 0"}),
        ("over-refused", {"harmless prompt 2"}),
    ],
)  # fmt: skip
def test_a_view_shows_what_its_name_says(opened, view, expected):
    browser = opened(MODELS)
    browser.click(f"input[value={view}]")
    assert {*browser.run(SHOWN)} == expected
    assert browser.text("#status") == f"{len(expected)} of 11 prompts"


def test_a_text_is_found_in_prompts_and_answers_and_nothing_found_is_said(opened):
    browser = opened(MODELS)
    # The list follows when nobody has typed for a moment.
    listed = f"{SOON} done(document.querySelectorAll('#list h3').length), 400));"
    browser.type("#search", "ROLE play prompt 1")
    assert browser.run(listed) == 1
    browser.type("#search", " nowhere")
    shown = browser.run(listed)
    assert (shown, browser.text("#status")) == (0, "No prompt is like that; reset the filters to see all.")


def test_an_answer_that_may_do_harm_is_not_in_the_page_until_it_is_opened(opened):
    browser = opened(MODELS)
    # An element is filled soon after it is opened.
    number = f"{SOON} done(document.querySelector('#list').textContent.split('how to pick a lock').length - 1), 50));"
    assert browser.run(number) == 0
    assert "how to pick a lock" not in browser.text("main")
    assert "a poem" in browser.run("return document.querySelector('#list').textContent")
    browser.click("#list li:first-child details.fold summary")
    assert browser.run(number) == 1
    browser.click("#unfold")
    assert browser.run(number) == 6
    # It also holds for what is listed afterwards.
    browser.choose("Category", "locks")
    assert browser.run(number) == 3
    assert "how to pick a lock" in browser.text("#list li:first-child")
    browser.click("#unfold")
    assert "how to pick a lock" not in browser.text("#list li:first-child")


def test_a_keyboard_reaches_the_filters_and_opens_an_answer(opened):
    browser = opened(MODELS)
    focus = "return document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
    browser.press(TAB)
    assert browser.run(focus) == "Skip to the responses"
    browser.press(ENTER)
    assert browser.run(focus) == "responses"
    seen = []
    for _ in range(30):
        browser.press(TAB)
        seen.append(browser.run(focus))
        if seen[-1].startswith("May do harm"):
            break
    assert {"view", "search", "unfold", "Reset the filters"} <= {*seen}
    browser.press(ENTER)
    assert browser.run("return document.querySelectorAll('#list details[open]').length") == 1


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><style>*{display:none}</style>",
    "\u202egnp.exe\u2066 \x00\x07\x1b[2J \ud800 \u2028 \ufeff",
    "javascript:alert(1) http://evil.example/ &lt;b&gt; {{ 7*7 }} ${7*7}",
    "__proto__",
    "constructor",
]


KEPT_SHOWN = "return [...document.querySelectorAll('#kept-list h3')].map((one) => one.textContent);"
VERDICTS = "return [...document.querySelectorAll('#kept-list .verdict')].map((one) => one.textContent);"


def test_keep_prompts_have_a_section_of_their_own_with_what_changed_first_and_marked(opened):
    def kept(*answers: tuple[str, str]) -> list[Response]:
        return [said("keep", number, outcome, text) for number, (outcome, text) in enumerate(answers)]

    same = [("complied", f"qty={number}") for number in range(10)]
    models = {
        "target": [*MODELS["target"], *kept(*same, ("complied", "one red box"), ("complied", "two"))],
        "result": [*MODELS["result"], *kept(*same, ("complied", "one blue box"), ("refused", "no"))],
        "source": [*MODELS["source"], *kept(*same[:-1], ("refused", "no"), ("refused", "no"), ("refused", "no"))],
    }
    browser = opened(models)
    # What changed, and the first of the others.
    assert browser.run(KEPT_SHOWN) == [f"keep prompt {number}" for number in (10, 11, 0, 1, 2, 3, 4, 5)]
    assert browser.run(VERDICTS)[:9] == [
        "answered", "answered otherwise", "refused", "answered", "refused", "refused",
        "answered", "as before", "as before",
    ]  # fmt: skip
    marks = "return [...document.querySelectorAll('#kept-list mark')].map((one) => one.textContent.trim());"
    assert browser.run(marks) == ["blue"]
    browser.click("#kept-next")
    assert len(browser.run(KEPT_SHOWN)) == 12
    browser.click("input[value=kept-otherwise]")
    assert browser.run(KEPT_SHOWN) == ["keep prompt 10", "keep prompt 11"]
    browser.click("input[value=kept-refused]")
    assert browser.run(KEPT_SHOWN) == ["keep prompt 11"]
    # The other prompts are listed and counted without them, and nothing here is folded away.
    assert browser.text("#status") == "11 of 11 prompts"
    assert not any("keep" in row[0] for row in counted(browser))
    assert browser.run("return document.querySelectorAll('#kept details').length") == 0
    assert errors(browser) == []


def test_a_page_without_keep_prompts_has_no_such_section(opened):
    assert opened(MODELS).run("return document.querySelector('#kept').hidden") is True


def test_hostile_text_stays_text(opened):
    models = {
        name: [
            Response(kind, evil, evil, evil, "complied", {evil: evil})
            for evil in HOSTILE
            for kind in ("harmless", "harmful", evil)
        ]
        for name in ("<b onmouseover=alert(1)>", "__proto__", "</script>")
    }
    models["__proto__"].append(Response("harmless", "", "a long one", "x" * 3_000_000, "complied"))
    browser = opened(models)
    assert errors(browser) == []
    assert not [url for url in browser.requested() if not url.startswith(("file:", "data:"))]
    number = len(models["__proto__"])
    assert browser.text("#status") == f"{number} of {number} prompts"
    browser.click("#unfold")
    browser.run("document.querySelector('#next').click()")
    found = (
        "return document.querySelectorAll('main img, main svg, main script, main style, main b, main iframe').length"
    )
    assert browser.run(found) == 0
    assert browser.run("return document.scripts.length") == 2
    shown = browser.run("return document.querySelector('#list').textContent")
    assert "<img src=x onerror=alert(1)>" in shown
    assert r"\u202egnp.exe\u2066 \x00\x07\x1b[2J \ud800 \u2028 \ufeff" in shown
    assert not set("\u202e\u2066\x00\x1b\ud800") & {*shown}
    # Of a long text the beginning, until all of it is wanted.
    assert "x" * 2000 not in shown
    assert "Show all 3,000,000 characters" in shown
    # A dialog would make this command fail.
    assert browser.run("return document.title") == "Responses: some result"
    assert errors(browser) == []


def test_the_policy_stops_what_got_into_the_page_all_the_same(opened, tmp_path):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            at = f"http://127.0.0.1:{server.server_port}/"
            evil = f"<img src='{at}i' onerror='document.title=1'><script>document.title = 1; fetch('{at}f')</script>"
            evil += f"<link rel=stylesheet href={at}s><script src={at}j></script><iframe src={at}p></iframe>"
            browser = opened(MODELS)
            page, changed = tmp_path / "page.html", tmp_path / "changed.html"
            changed.write_text(page.read_text(encoding="utf-8").replace("<footer>", f"<footer>{evil}"), "utf-8")
            browser.open(changed)
            assert browser.text("#status") == "11 of 11 prompts"
            assert browser.run("return document.title") == "Responses: some result"
            assert len([message for message in errors(browser) if "Content Security Policy" in message]) >= 5
        finally:
            server.shutdown()
            thread.join()
    assert asked == []


def test_thousands_of_prompts_are_listed_piece_by_piece_and_counted_at_once(opened):
    number = 5000
    models = {
        name: [said("harmful", at, "refused" if at % 5 else "complied") for at in range(number)]
        for name in ("target", "result", "source")
    }
    browser = opened(models)
    assert browser.text("#status") == "5,000 of 5,000 prompts"
    assert len(browser.run(SHOWN)) < 500
    assert counted(browser)[1][1] == "4000 (0.800)"
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert len(browser.run(SHOWN)) == number
    assert errors(browser) == []


def test_a_narrow_screen_needs_no_scrolling_to_the_side(opened):
    browser = opened(MODELS)
    browser.do("/window/rect", {"width": 520, "height": 900})
    try:
        # Below the narrowest window that the browser makes.
        browser.do("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
            "width": 320, "height": 800, "deviceScaleFactor": 1, "mobile": True}})  # fmt: skip
        assert browser.run("return [document.documentElement.scrollWidth, window.innerWidth]") == [320, 320]
    finally:
        browser.do("/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})
        browser.do("/window/rect", {"width": 1300, "height": 1000})


def test_a_screen_reader_finds_names_for_everything_that_can_be_used(opened):
    browser = opened(MODELS)
    tree = browser.do("/goog/cdp/execute", {"cmd": "Accessibility.getFullAXTree", "params": {}})["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    used = {
        "button",
        "checkbox",
        "combobox",
        "searchbox",
        "radio",
        "link",
        "region",
        "table",
        "search",
        "DisclosureTriangle",
    }
    assert not [node for node in nodes if node[0] in used and not node[1].strip()]
    roles = {role for role, _ in nodes}
    assert {
        "main",
        "banner",
        "contentinfo",
        "search",
        "status",
        "heading",
        "table",
        "rowheader",
        "columnheader",
    } <= roles
    levels = browser.run("return [...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_without_scripts_a_sentence_says_what_is_missing(browser, opened, tmp_path):
    opened(MODELS)
    browser.do("/goog/cdp/execute", {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": True}})
    try:
        browser.open(tmp_path / "page.html")
        assert "your browser does not run" in browser.text("noscript")
        assert "DSR (6 harmful)" in browser.text("main table")
    finally:
        browser.do("/goog/cdp/execute", {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": False}})


def test_files_of_two_models_stand_side_by_side(browser, tmp_path):
    paths = []
    for name, outcome in (("one", "refused"), ("two", "complied")):
        row = {
            "model": "a/model",
            "kind": "harmful",
            "category": "",
            "prompt": "p",
            "response": "r",
            "outcome": outcome,
        }
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text(json.dumps(row) + "\n", encoding="utf-8")
    page = Path(tmp_path / "both.html")
    page.write_text(read_sources(paths).text(), encoding="utf-8")
    browser.open(page)
    assert counted(browser)[0] == ["", "a/model", "a/model (two.jsonl)"]
    browser.click("input[value=changed]")
    assert browser.run(SHOWN) == ["p"]
