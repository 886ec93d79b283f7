"""The commands for looking at a result, and for talking to it: `page` and `chat`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from dapa_merge.cli.options import (
    FilePath,
    allow_pickle_option,
    fitting_options,
    json_option,
    print_answer,
    takes_options,
)
from dapa_merge.errors import DapaError, UsageError, printable
from dapa_merge.files import refuse_special, replace_file
from dapa_merge.imports import lasting
from dapa_merge.progress import Terminal
from dapa_merge.recipe.asking import Sampling
from dapa_merge.recipe.options import Options
from dapa_merge.report.page import BEGINS, read_sources
from dapa_merge.verify.result import location_option

if TYPE_CHECKING:
    from dapa_merge.measure.chat import Manner, Speaker


@click.command()
@click.argument("paths", metavar="OUT | FILE...", nargs=-1, required=True, type=FilePath())
@click.option(
    "--out",
    type=FilePath(),
    help="Write the page here.  [default: dapa_responses.html in OUT, or beside the first FILE with the suffix .html]",
)
@json_option
def page(paths: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write the responses of OUT as a page to read in a browser.

    OUT is a folder that `run`, `repair` or `demo` wrote; each FILE is one that `evaluate --responses` wrote, and their
    models stand side by side. The page is one file that loads nothing; answers that may do harm are folded away. An
    earlier page is replaced.
    """
    source = read_sources(paths)
    path = out or source.out
    refuse_special(path)
    if path.exists():
        _check_own(path)
    replace_file(path, source.text().encode())
    numbers = {name: len(said) for name, said in source.models.items()}
    told = ", ".join(f"{number} of {name}" for name, number in numbers.items())
    print_answer({"page": str(path), "responses": numbers}, [f"wrote {path}: responses, {told}"], as_json)


def _check_own(path: Path) -> None:
    """Refuse to replace what is not a page of responses."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(BEGINS)) == BEGINS.encode():
                return
    raise UsageError(f"{path} exists and is not a page of responses; name another file with --out")


HELP = """\
/reset        begin anew
/system TEXT  give the model a system message, or none, and begin anew
/retry        ask the last message again, with the next seed
/help         this help
/exit         end, as Ctrl-D does
Ctrl-C stops an answer. A message may begin with // for one slash."""
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)")


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--before", is_flag=True, help="Put each message to the target too, from which OUT was made.")
@click.option(
    "--target",
    metavar="MODEL",
    help="Where the target is; implies --before.  [default: as OUT/mergekit_config.yml says]",
)
@click.option("--system", metavar="TEXT", default="", help="A system message, if the model's chat template takes one.")
@click.option("--single", is_flag=True, help="Begin anew with each message, as measurements do with each prompt.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Sample at this temperature; 0 takes the likeliest token, as all measurements do.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling; each message takes the next."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Where answers are cut off."
)
@fitting_options
@allow_pickle_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each message on stdout.")
@takes_options
def chat(
    out: str,
    before: bool,
    target: str | None,
    system: str,
    single: bool,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    options: Options,
    as_json: bool,
) -> None:
    """Talk to a result, also side by side with its target.

    OUT is the folder of a result or of any model, or a Hub id, or id@revision. Answers come as they are made; /help
    lists what can be typed beside messages. If stdin is not a terminal, each line of it is a message.
    """
    if temperature:
        # Refused now, not at the first message.
        Sampling(temperature, seed=seed)
    with lasting():
        from dapa_merge.measure.chat import Manner, speakers

    with speakers(
        location_option(out, "OUT"),
        options.where,
        with_target=before or target is not None,
        target=location_option(target, "--target"),
        allow_pickle=options.allow_pickle,
    ) as loaded:
        for speaker in loaded:
            if system and not speaker.has_system_role:
                raise UsageError(
                    f"the chat template of {speaker.tokenizer.name_or_path} takes no system message; leave out --system"
                )
        Talk(loaded, system, Manner(max_new_tokens, temperature, seed), is_single=single, as_json=as_json).run()


class Talk:
    """A conversation in a terminal, or by lines of a pipe."""

    def __init__(
        self, speakers: Sequence[Speaker], system: str, manner: Manner, *, is_single: bool, as_json: bool
    ) -> None:
        self._speakers = speakers
        self._system = system
        self._manner = manner
        self._is_single = is_single
        self._as_json = as_json
        self._console = Terminal()
        # rich drops the colours only.
        self._has_styles = not os.environ.get("NO_COLOR")
        self._is_typed = sys.stdin is not None and sys.stdin.isatty()
        self._last: str | None = None

    def run(self) -> None:
        """Answer each line until the last."""
        if self._is_typed:
            self._note("/help lists what can be typed beside messages; Ctrl-D ends.")
        for line in self._lines():
            text = line.strip()
            command = _COMMAND.match(text)
            if command is not None and command[0] == "/exit":
                return
            try:
                if command is not None:
                    self._obey(command[0], text[command.end() :].strip())
                elif text:
                    self._ask(text.removeprefix("/") if text.startswith("//") else text)
            except DapaError as error:
                if not self._is_typed:
                    raise
                self._note(f"Error: {error}")

    def _lines(self) -> Iterator[str]:
        if sys.stdin is None:
            return
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if not self._is_typed:
            yield from sys.stdin
            return
        with suppress(ImportError):
            # Where there is one, `input` edits lines and knows earlier ones.
            import_module("readline")
        while True:
            try:
                # Lone surrogates, which a terminal gives for bytes that are not text, have no tokens.
                yield self._typed_line().encode("utf-8", "replace").decode()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo()
                self._note("Ctrl-D or /exit ends.")

    def _typed_line(self) -> str:
        if sys.stdout.isatty() and not self._as_json:
            return input("you: ")
        click.echo("you: ", err=True, nl=False)
        return input()

    def _obey(self, command: str, text: str) -> None:
        if command == "/reset":
            self._begin_anew(self._system)
        elif command == "/system":
            if text and not all(speaker.has_system_role for speaker in self._speakers):
                raise UsageError("the chat template takes no system message; nothing has changed")
            self._begin_anew(text)
        elif command == "/retry":
            if self._last is None:
                raise UsageError("there is no message to ask again; write one")
            for speaker in self._speakers:
                speaker.forget_last()
            self._ask(self._last)
        elif command == "/help":
            for line in HELP.splitlines():
                self._note(line)
        else:
            raise UsageError(f"{command} is not a command; /help lists them, and // begins a message with a slash")

    def _begin_anew(self, system: str) -> None:
        self._system, self._last = system, None
        for speaker in self._speakers:
            speaker.turns.clear()
        self._note(f"begun anew, {'with' if system else 'without'} a system message")

    def _ask(self, message: str) -> None:
        answers: dict[str, str] = {}
        self._last = None
        try:
            self._put(message, answers)
        except DapaError:
            # Conversations that differ in more than the answers compare nothing.
            for speaker in self._speakers:
                speaker.forget_last()
            raise
        self._last = message
        self._manner = replace(self._manner, seed=self._manner.seed + 1)
        if self._as_json:
            click.echo(json.dumps({"message": message, "answers": answers}))

    def _put(self, message: str, answers: dict[str, str]) -> None:
        for speaker in self._speakers:
            if self._is_single:
                speaker.turns.clear()
            if len(self._speakers) > 1 and not self._as_json:
                self._show(f"{speaker.name}: ", "bold")
            try:
                answers[speaker.name] = speaker.ask(message, self._system, self._manner, self._tell)
            except KeyboardInterrupt:
                if not self._is_typed:
                    raise
                self._show(" (stopped)", "dim")
            self._show("\n")

    def _tell(self, piece: str, is_thought: bool) -> None:
        self._show(piece, "dim italic" if is_thought else "")

    def _show(self, text: str, style: str = "") -> None:
        if not self._as_json:
            # Before rich, which drops some of them.
            shown = printable(text.expandtabs(4), keep="\n")
            self._console.print(Text(shown, style if self._has_styles else ""), end="", soft_wrap=True)
            sys.stdout.flush()

    def _note(self, line: str) -> None:
        """Tell about the talk itself: on stderr, so that stdout holds answers alone."""
        click.echo(printable(line), err=True)
