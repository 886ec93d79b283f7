"""Progress as people see it: one bar for a whole job, and lines where nobody sees a bar."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from dapa_merge import progress
from dapa_merge.progress import advance, begin, collected, end, expect, job, pace, remain, task


@pytest.fixture
def console(monkeypatch):
    """Puts a console in the place of stderr; a terminal or not."""

    def show(*, terminal: bool, **environment: str) -> io.StringIO:
        seen = io.StringIO()
        made = Console(file=seen, force_terminal=terminal, width=100, _environ={"TERM": "xterm", **environment})
        monkeypatch.setattr(progress, "_consoles", [made])
        return seen

    return show


def test_the_time_left_of_a_job_is_of_all_its_parts_at_their_pace():
    with job({"prompts": 2.0, "steps": 5.0}):
        expect("search", prompts=10, steps=4)
        expect("report", prompts=30)
        (work,) = progress._jobs
        assert work.seconds_left() == 2.0 * 40 + 5.0 * 4
        begin("search")
        remain(steps=1)
        assert work.seconds_left() == 2.0 * 40 + 5.0
        end()
        assert work.seconds_left() == 2.0 * 30
        begin("report")
        with task("measuring", 30, "prompts"):
            progress._tasks[0].start -= 10
            advance(10, "prompts")
            # Ten took ten seconds; what was thought before counts for twenty more.
            assert work.seconds_left() == pytest.approx(20 * (20 + 10) / (10 + 10), rel=0.05)
    assert progress._jobs == progress._tasks == []


def test_a_pace_that_is_not_known_is_not_guessed():
    with job():
        expect("search", prompts=10)
        begin("search")
        assert progress._jobs[0].seconds_left() is None
        with task("asking", 10, "prompts"):
            advance(5, "prompts")
        assert progress._jobs[0].seconds_left() is not None


def test_the_time_left_goes_down_while_many_answers_are_under_way_and_none_is_done():
    with job({"prompts": 2.0}):
        expect("search", prompts=100)
        (work,) = progress._jobs
        begin("search")
        with task("measuring", 60, "prompts"):
            start, left = progress._tasks[0].start, []
            for spent in (0, 30, 60, 90, 115):
                progress._tasks[0].start = start - spent
                left.append(work.seconds_left())
            # The first of them is late, since the others are nearly done, too.
            advance(1, "prompts")
            left.append(work.seconds_left())
            assert left == pytest.approx([200, 170, 140, 110, 104, 103.6], abs=1)
            # Twice as long as thought: the pace is half, also of what follows.
            progress._tasks[0].start = start - 240
            pace_now = (240 + 20) / (60 + 10)
            assert work.seconds_left() == pytest.approx((40 + 0.2 * 59) * pace_now, rel=0.01)
    assert progress._jobs == []


def test_a_pace_that_was_timed_replaces_what_was_thought_before():
    with job({"prompts": 2.0}):
        expect("search", prompts=10, runs=4)
        pace(prompts=3.0, runs=0.5)
        assert progress._jobs[0].seconds_left() == 3.0 * 10 + 0.5 * 4
    pace(prompts=3.0)


def test_a_terminal_shows_one_bar_with_what_is_done_now_and_the_time_left(console):
    seen = console(terminal=True)
    with job({"prompts": 60.0}):
        expect("search", prompts=10)
        begin("search")
        remain("test 4 of about 11", prompts=10)
        with task("testing gate of layers 3-5", 4, "prompts"):
            advance(2, "prompts")
            time.sleep(0.15)
    text = seen.getvalue()
    assert "test 4 of about 11: testing gate of layers 3-5" in text
    assert "about " in text
    assert " left" in text


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}], ids=["no terminal", "a dumb terminal"])
def test_without_a_bar_a_line_says_every_half_minute_how_far_it_is(environment, console, monkeypatch):
    console(terminal=bool(environment), **environment)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with collected() as lines, job({"prompts": 3.0}):
        expect("search", prompts=100)
        begin("search")
        remain("test 2 of about 9", prompts=100)
        with task("testing gate of layer 3", 100, "prompts"):
            for _ in range(12):
                now[0] += 10
                advance(5, "prompts")
    assert len(lines) == 4
    assert lines[0] == "test 2 of about 9: testing gate of layer 3: 15 of 100 prompts, about 3 min left in all"
    assert lines[-1].startswith("test 2 of about 9: testing gate of layer 3: 60 of 100 prompts")


def test_a_work_that_is_not_part_of_a_job_has_its_own_line(console, monkeypatch):
    console(terminal=False)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with collected() as lines, task("verifying", 8_000_000_000, "bytes"):
        now[0] += 31
        advance(2_000_000_000, "bytes")
    assert lines == ["verifying: 2.00 of 8.00 GB, about 93 s left"]


def test_a_long_step_that_does_not_advance_breaks_its_silence(monkeypatch, capsys):
    monkeypatch.setattr(progress, "TOLD_EVERY_SECONDS", 0.3)
    monkeypatch.setattr(progress, "LOOKED_AT_EVERY_SECONDS", 0.01)
    with progress.shown():
        progress.LOG.info("loading the target, x")
        # Nothing is at work: who waits for words of the user need not say so.
        time.sleep(0.5)
        with job({"prompts": 2.0}):
            expect("report", prompts=10)
            begin("report")
            time.sleep(0.8)
            with task("asking", 10, "prompts"):
                time.sleep(0.5)
        with task("verifying", 10, "bytes"):
            time.sleep(0.5)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "loading the target, x"
    at_work, asking, verifying = (
        [line for line in others if line.startswith(start)] for start in ("at work", "asking", "verifying")
    )
    assert at_work
    assert all(re.fullmatch(r"at work for \d s on what follows this: loading the target, x", one) for one in at_work)
    assert asking[0] == "asking: 0 of 10 prompts, about 20 s left in all"
    assert {*verifying} == {"verifying: 0.00 of 0.00 GB"}
    assert len(others) == len(at_work) + len(asking) + len(verifying)


def test_a_library_call_says_nothing(monkeypatch):
    monkeypatch.setattr(progress, "_consoles", [])
    monkeypatch.setattr(progress, "TOLD_EVERY_SECONDS", 0.0)
    with collected() as lines, task("verifying", 10, "bytes"):
        advance(5, "bytes")
    assert lines == []
