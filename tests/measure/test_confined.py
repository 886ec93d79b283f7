"""The process for strangers' templates and patterns: the same answers as in this one, and an end to everything."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dapa_merge import miniature
from dapa_merge.errors import UsageError
from dapa_merge.measure import confined
from dapa_merge.measure.confined import Unfinished, is_found, render
from dapa_merge.measure.prompts.sets import Question
from dapa_merge.measure.skills import is_right

ASKED = [{"role": "user", "content": "How?"}]


@pytest.fixture
def short(monkeypatch):
    """A second for each piece of work."""
    monkeypatch.setattr(confined, "SECONDS", 1)


@given(st.text(min_size=1))
def test_a_template_reads_as_transformers_renders_it(prompt):
    tokenizer = AutoTokenizer.from_pretrained(miniature.path("target"))
    messages = [{"role": "user", "content": prompt}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer.get_chat_template(), messages, tokenizer.special_tokens_map) == expected


@given(st.sampled_from(["a+b", "^.?$", r"\{b}", "(?i)A", r"\w\s", "x{e}", "[^a]"]), st.text("aAbex{} \n\ud800"))
def test_a_pattern_is_found_where_re_finds_it(pattern, text):
    assert is_found(pattern, text) == (re.search(pattern, text) is not None)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        # Within one C function.
        "{% set ns = namespace(x=[0], y=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    ],
)
def test_a_template_without_end_is_ended_and_the_next_is_rendered(template, short):
    with pytest.raises(Unfinished, match="does not end within 1 seconds"):
        render(template, ASKED, {})
    assert render("{{ messages[0].content }}", ASKED, {}) == "How?"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux limits the memory of a process")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'A' * 3000000000 }}",
        "{{ 'A' | center(3000000000) }}",
        "{{ ([1] * 3000000000) | length }}",
        "{% set ns = namespace(x='A' * 1000000) %}{% for i in range(20) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_wants_all_memory_gets_none(template):
    with pytest.raises(Unfinished, match="1 GiB of memory"):
        render(template, ASKED, {})


def test_a_rendered_text_may_have_a_million_characters_and_a_few_times_the_prompts():
    long = [{"role": "user", "content": "x" * 1_000_000}]
    assert len(render("{{ messages[0].content * 2 }}", long, {})) == 2_000_000
    with pytest.raises(Unfinished, match="2,000,000 characters"):
        render("{{ 'x' * 2000000 }}", ASKED, {})


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('only users') }}", "TemplateError: only users"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ [].pop() }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ '%d' % 'a' }}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.__class__ }}{{ ''.__class__.mro() }}", "SecurityError"),
    ],
)
def test_whatever_a_template_raises_is_told(template, fault):
    with pytest.raises(Unfinished, match=re.escape(fault)):
        render(template, ASKED, {})


def test_a_pattern_that_looks_for_ever_is_named(short):
    question = Question("Is it?", r"^(.|.)*\x00$", "regex")
    with pytest.raises(UsageError, match=re.escape(r"'^(.|.)*\\x00$'")):
        is_right("a" * 60, question)


def test_a_process_that_was_killed_is_started_again():
    assert is_found("a", "a")
    process = confined._STARTED[os.getpid()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(Unfinished):
        is_found("a", "a")
    assert is_found("a", "a")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="only where a timer sends signals")
def test_a_question_that_ctrl_c_ends_leaves_no_answer_to_the_next():
    assert is_found("a", "a")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            is_found(r"^(.|.)*\x00$", "a" * 60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_found("b", "a")


def test_threads_get_their_own_answers():
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = render("{{ messages[0].content }}", [{"role": "user", "content": str(number)}], {})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(16)}


def test_it_ends_with_its_parent():
    confined.start("a template")
    process = confined._STARTED[os.getpid()]
    assert is_found("a", "a")
    confined._stop()
    assert process.returncode is not None


def test_the_template_of_the_packaged_models_is_rendered_here_and_others_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr(confined, "_ask", lambda *arguments: asked.append(arguments) or "answer")
    messages = [{"role": "user", "content": "How?"}]
    for name in ("target", "source", "shadow-target", "shadow-source"):
        ours = (miniature.path(name) / "chat_template.jinja").read_text(encoding="utf-8")
        assert "How?" in render(ours, messages, {"eos_token": "<|end|>"})
    assert asked == []
    assert render(ours + "!", messages, {}) == "answer"
    assert len(asked) == 1
