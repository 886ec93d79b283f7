"""`chat` as a user has it: by lines of a pipe, and in a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from click.testing import CliRunner, Result
from conftest import call
from measure.test_thoughts import chain_model

from dapa_merge import miniature
from dapa_merge.cli import main
from dapa_merge.measure.prompts.sets import load_prompts

HARMFUL = load_prompts("miniature").harmful[0]
TARGET = miniature.path("target")
# A shell that runs tests in the background has them ignore Ctrl-C.
MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from dapa_merge.cli import main; main(sys.argv[1:])"
)


def talk(lines: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["chat", *map(str, arguments)], input=lines)


def test_each_line_of_a_pipe_is_a_message_and_stdout_holds_the_answers(demo):
    out, _ = demo
    result = talk(f"{HARMFUL}\n\n/reset\n{HARMFUL}\n", out, "--before")
    assert result.exit_code == 0, result.output
    before, after, *again = result.stdout.splitlines()
    assert before.startswith("before: Sure")
    assert after.startswith("after: I'm sorry")
    assert again == [before, after]
    assert "begun anew" in result.stderr


@pytest.mark.parametrize("few", [("--quantize", "4bit"), ("--quantize", "8bit"), ("--dtype", "float32")])
def test_target_and_result_speak_in_another_arithmetic_in_the_memory_of_one_model(demo, few, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("dapa_merge.measure.chat.free_on", lambda _: 1)
    out, _ = demo
    result = talk(f"{HARMFUL}\n", out, "--before", *few, "--device", "cpu")
    assert result.exit_code == 0, result.output
    before, after = result.stdout.splitlines()
    assert before.startswith("before: Sure")
    assert after.startswith("after: I'm sorry")
    assert "both loaded" not in result.stderr


def test_messages_and_answers_as_json(demo):
    out, _ = demo
    result = talk(f"{HARMFUL}\n/retry\n", out, "--before", "--json", "--single")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["message"] for row in rows] == [HARMFUL] * 2
    assert [*rows[0]["answers"]] == ["before", "after"]
    assert rows[0] == rows[1]
    (row,) = (json.loads(line) for line in talk(HARMFUL, out, "--json").stdout.splitlines())
    assert row["answers"] == {"model": rows[0]["answers"]["after"]}


def test_each_message_begins_anew_if_that_is_asked_for():
    first, second = talk(f"{HARMFUL}\n{HARMFUL}\n", TARGET, "--single").stdout.splitlines()
    assert first == second
    assert talk(f"{HARMFUL}\n{HARMFUL}\n", TARGET).stdout.splitlines() != [first, second]


@pytest.mark.parametrize(
    ("lines", "arguments", "named"),
    [
        ("/nonsense\n", (), "/nonsense"),
        ("/retry\n", (), "no message"),
        ("house " * 200, (), "ends at"),
        ("a\n", ("--before",), "--target"),
        ("a\n", ("--target", "a@b@c"), "--target is 'a@b@c'"),
        ("a\n", ("--device", "nonsense"), "nonsense"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_an_exit_code(lines, arguments, named):
    result = talk(lines, TARGET, *arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""


def test_a_system_message_needs_a_template_that_takes_one(tmp_path):
    chain_model(tmp_path / "model", "so it is")
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"
    )
    assert talk("a\n", tmp_path / "model", "--system", "Be brief.").exit_code == 2
    assert "takes no system message" in talk("/system Be brief.\n", tmp_path / "model").stderr
    path.write_text("{% for one in messages %}{{ one.role }} {{ one.content }} {% endfor %}")
    assert talk("/system Be brief.\na\n", tmp_path / "model").exit_code == 0


def test_a_message_may_begin_with_a_slash(tmp_path):
    chain_model(tmp_path / "model", "so it is")
    rows = talk("/etc/passwd is what\n//reset\n", tmp_path / "model", "--json").stdout.splitlines()
    assert [json.loads(row)["message"] for row in rows] == ["/etc/passwd is what", "/reset"]


def test_an_answer_moves_no_cursor(tmp_path):
    chain_model(tmp_path / "model", "evil \x1b[2J\x1b]0;owned\x07 \u202egnp \x9b31m end", opening="open")
    result = talk("a\n", tmp_path / "model")
    assert result.stdout.strip() == r"evil \x1b[2J\x1b]0;owned\x07 \u202egnp \x9b31m end"


@contextlib.contextmanager
def terminal(*arguments: object, **environment: str) -> Iterator[Terminal]:
    """A conversation in a terminal of its own."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    code = f"import fcntl, os; os.setsid(); fcntl.ioctl(0, {termios.TIOCSCTTY}, 0); {MAIN}"
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\x78\x00\x00\x00\x00\x00")
    process = warm.Process(
        [sys.executable, "-c", code, "chat", *arguments],
        env={**os.environ, "TERM": "xterm-256color", **environment},
        terminal=os.ttyname(theirs),
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)


class Terminal:
    def __init__(self, descriptor: int, process: warm.Process) -> None:
        self._descriptor = descriptor
        self._process = process
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> str:
        """What came until this text, which is taken off what was seen."""
        end = time.monotonic() + 120
        while text not in self.seen:
            ready, _, _ = select.select([self._descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._descriptor, 1 << 16).decode()
            except OSError:
                # Linux says so when the other side has closed.
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def exit_code(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self._descriptor, 1 << 16):
                pass
        return self._process.wait(60)


needs_terminal = pytest.mark.skipif(os.name == "nt", reason="needs a terminal of Unix")


@needs_terminal
def test_in_a_terminal_ctrl_c_stops_an_answer_or_a_line_and_ctrl_d_ends(tmp_path):
    chain_model(tmp_path / "model", "on and off again we go round for ever", opening="open")
    make_endless(tmp_path / "model")
    with terminal(tmp_path / "model", "--max-new-tokens", "100000") as shown:
        shown.wait_for("you: ")
        shown.type("How?\n")
        shown.wait_for("for ever")
        shown.type("\x03")
        shown.wait_for("(stopped)")
        shown.wait_for("you: ")
        # The process that renders templates has not been stopped, and what was said is in the conversation.
        shown.type("And why?\n")
        shown.wait_for("for ever")
        shown.type("\x03")
        shown.wait_for("(stopped)")
        shown.wait_for("you: ")
        shown.type("half a line")
        # Python's line editor may miss Ctrl-C, until the next key, while it reads characters.
        shown.wait_for("half a line")
        time.sleep(0.5)
        shown.type("\x03")
        shown.wait_for("Ctrl-D or /exit ends.")
        shown.wait_for("you: ")
        shown.type("/nonsense\n")
        shown.wait_for("Error: /nonsense")
        shown.wait_for("you: ")
        shown.type("\x04")
        assert shown.exit_code() == 0


def make_endless(folder: Path) -> None:
    """Let the last word of a chain lead to the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    last = max(number for number in range(64) if model.lm_head.weight[1, number] > 0)
    model.lm_head.weight.data[1, last] = 0
    model.lm_head.weight.data[3, last] = 1
    model.save_pretrained(folder)


@needs_terminal
@pytest.mark.parametrize(("variable", "is_styled"), [({}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False)])
def test_a_thought_is_dimmed_where_the_terminal_can(tmp_path, variable, is_styled):
    chain_model(tmp_path / "model", "first we think </think> It is so . Done")
    with terminal(tmp_path / "model", **variable) as shown:
        shown.wait_for("you: ")
        shown.type("How?\n")
        told = shown.wait_for("Done")
        shown.wait_for("you: ")
        shown.type("/exit\n")
        assert shown.exit_code() == 0
    assert bool(re.search(r"\x1b\[2;[;\d]*m", told)) is is_styled
    assert is_styled or not re.search(r"\x1b\[[;\d]*m", told)
    assert "</think>" in told


def test_ctrl_c_ends_a_conversation_by_a_pipe(tmp_path):
    chain_model(tmp_path / "model", "on and off again we go round for ever", opening="open")
    make_endless(tmp_path / "model")
    command = [sys.executable, "-c", MAIN, "chat", str(tmp_path / "model"), "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"How?\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Stopped by Ctrl-C" in told


def test_the_help_says_what_out_may_be():
    assert "Hub id" in call("chat", "--help").stdout
