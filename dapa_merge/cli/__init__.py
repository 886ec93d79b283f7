"""The command line: parse, call, print.

A command's module is imported only when the command runs, so `--help` loads none of them, and they may import torch at
the top. Errors become one sentence and an exit code.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from dapa_merge import __version__
from dapa_merge.errors import CheckpointError, DapaError, Stopped, lacks_memory, one_line, printable
from dapa_merge.imports import lasting
from dapa_merge.progress import shown

INTERRUPTED = 130
# The variable by which a shell asks for completions.
COMPLETING = "_DAPA_MERGE_COMPLETE"
DEBUG_HELP = "Show a traceback when something fails."
QUIET_HELP = "No progress on stderr."
# The module of each command, and its line in the help.
COMMANDS = {
    "card": ("dapa_merge.cli.publish", "Write or renew the model card of OUT."),
    "chat": ("dapa_merge.cli.look", "Talk to a result, also side by side with its target."),
    "completion": ("dapa_merge.cli.completion", "Print what makes SHELL complete commands, options and paths."),
    "compare": ("dapa_merge.cli.study", "Compare DAPA with other methods on the targets of RECIPE..."),
    "demo": ("dapa_merge.cli.run", "Repair the packaged miniature models."),
    "evaluate": ("dapa_merge.cli.run", "Measure the safety and skill of any models."),
    "gate": ("dapa_merge.cli.publish", "Fail unless the figures of a result are good enough."),
    "inspect": ("dapa_merge.cli.study", "Tell what was done to TARGET, and what to try."),
    "outdated": ("dapa_merge.cli.publish", "Ask whether a model of RECIPE moved."),
    "page": ("dapa_merge.cli.look", "Write the responses of OUT as a page to read in a browser."),
    "patch": ("dapa_merge.cli.check", "Pass a repair on as a small file, apply it, take it back."),
    "plan": ("dapa_merge.cli.run", "Show what RECIPE would change and what that takes, without loading a model."),
    "push": ("dapa_merge.cli.publish", "Publish OUT in the Hub's repository REPO."),
    "repair": ("dapa_merge.cli.run", "Repair TARGET with SOURCE, without a recipe."),
    "run": ("dapa_merge.cli.run", "Repair a model from a recipe."),
    "search": ("dapa_merge.cli.run", "Find the few layers that are needed."),
    "trace": ("dapa_merge.cli.study", "Show where the alignment of RECIPE's models lives."),
    "verify": ("dapa_merge.cli.check", "Check a result against its target and source."),
}


class Group(click.Group):
    """Loads commands on demand; turns errors into one sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if COMPLETING in os.environ:
            outlined: click.Command = import_module("dapa_merge.cli.completion").outlined(cmd_name)
            return outlined
        with lasting():
            command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        _take_global_options(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's own method would load every command that begins so.
        names = [
            CompletionItem(name, help=COMMANDS[name][1]) for name in sorted(COMMANDS) if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own method would load every command.
        limit = formatter.width - 6 - max(map(len, COMMANDS))
        rows = [
            (name, click.Command(name, help=COMMANDS[name][1]).get_short_help_str(limit)) for name in sorted(COMMANDS)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(self, *arguments: Any, **settings: Any) -> Any:
        with _streams():
            return super().main(*arguments, **settings)

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        try:
            # click prints the help here, before any command.
            return super().make_context(*arguments, **settings)
        except OSError as error:
            _fail_at(error)

    def invoke(self, context: click.Context) -> Any:
        terminated: list[int] = []
        try:
            with _terminable(terminated):
                return super().invoke(context)
        except DapaError as error:
            # click prints the sentence and takes over the exit code.
            if context.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, CheckpointError) and lacks_memory(error):
                _fail_without_memory(error)
            raise
        except KeyboardInterrupt as stop:
            kept = f"; {stop}" if isinstance(stop, Stopped) else ""
            by = signal.Signals(terminated[0]).name if terminated else "Ctrl-C"
            _end(f"Stopped by {by}{kept}", 128 + terminated[0] if terminated else INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            # Also panics of libraries in Rust, which are not an `Exception`.
            if context.params.get("debug"):
                if isinstance(error, OSError):
                    raise
                traceback.print_exc()
            if lacks_memory(error):
                _fail_without_memory(error)
            if isinstance(error, OSError):
                _fail_at(error)
            _fail(f"this should not happen: {one_line(error)}; report it, with what --debug shows", 1)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Exit codes: 0 done, 1 another fault, 2 usage or bad recipe, 3 the source
cannot repair this target, 4 bad checkpoint or result, 5 the Hub said no, 6 a
gate failed, 10 outdated, 130 stopped by Ctrl-C, 143 by SIGTERM.""",
)
@click.option("--debug", is_flag=True, help=DEBUG_HELP)
@click.option("--quiet", is_flag=True, help=QUIET_HELP)
@click.version_option(__version__, prog_name="dapa-merge")
@click.pass_context
def main(context: click.Context, debug: bool, quiet: bool) -> None:
    """Give a fine-tuned model its safety back.

    Copies MLP gate projections from an aligned model (the source) into an unaligned one of the same family (the
    target), after a search for the few layers that are needed (DAPA, arXiv 2406.01514), or moves the target along
    directions of their difference.

    Try it with `dapa-merge demo`; repair your own model with `dapa-merge repair TARGET SOURCE OUT`.
    """
    # Closed early if --quiet comes behind the command.
    context.obj = context.with_resource(ExitStack())
    context.obj.enter_context(shown(quiet))
    if quiet or not sys.stderr.isatty():
        _disable_client_bars()


def _take_global_options(command: click.Command) -> None:
    """Let a command, and all within it, take the options that stand before a command, too."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _take_global_options(inner)
    elif not any(parameter.name == "quiet" for parameter in command.params):
        settings: dict[str, Any] = {"is_flag": True, "expose_value": False, "is_eager": True, "callback": _set_global}
        command.params += [
            click.Option(["--debug"], help=DEBUG_HELP, **settings),
            click.Option(["--quiet"], help=QUIET_HELP, **settings),
        ]


def _set_global(context: click.Context, option: click.Parameter, value: bool) -> None:
    main_context = context.find_root()
    if not value or option.name is None or main_context.obj is None:
        return
    main_context.params[option.name] = True
    if option.name == "quiet":
        main_context.obj.close()
        _disable_client_bars()


@contextmanager
def _terminable(terminated: list[int]) -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, which says what is kept; its number is then in the list."""

    def terminate(number: int, _: object) -> None:
        terminated.append(number)
        # Whatever handles Ctrl-C handles this.
        raise KeyboardInterrupt

    # Only the main thread may set it; whoever has a handler of their own keeps it.
    is_ours = threading.current_thread() is threading.main_thread()
    is_ours = is_ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _streams() -> Iterator[None]:
    """Make stdout and stderr such that nobody who closes them can stop the work."""
    for descriptor in range(3):
        # Else the next file that is opened would be in its place, and be written into.
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for stream in before:
        # A path may have characters that the terminal's encoding lacks.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (
        _Patient(stream or open(os.devnull, "w", encoding="utf-8"), is_answer)  # noqa: SIM115
        for stream, is_answer in zip(before, (True, False), strict=True)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Patient:
    """An output stream that goes quiet when its reader leaves.

    Other faults, such as those of a full disk, are raised on stdout only: without its answer, a command has failed.
    """

    def __init__(self, stream: Any, is_answer: bool) -> None:
        self._stream = stream
        self._is_answer = is_answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._quiet():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._quiet():
            self._stream.flush()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_answer and error.errno != errno.EPIPE:
                raise
            with suppress(OSError, ValueError):
                # What is in the buffer is flushed once more at the end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _disable_client_bars() -> None:
    """Disable huggingface_hub's progress bars, which fill a log, unless its variable asks for them."""
    if os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1") == "0":
        return
    # The variable is read when these modules are imported, which may have happened.
    if (utils := sys.modules.get("huggingface_hub.utils")) is not None:
        utils.disable_progress_bars()
    elif (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        constants.HF_HUB_DISABLE_PROGRESS_BARS = True  # type: ignore[attr-defined]


def _fail_at(error: OSError) -> NoReturn:
    # A limit on the size of files does not hold for a stream.
    unnamed = "a file" if error.errno == errno.EFBIG else "the output stream"
    _fail(f"{error.filename or unnamed}: {error.strerror or error}", 1)


def _fail_without_memory(error: BaseException) -> NoReturn:
    # Libraries fail at exit, too, where nobody can do anything about it.
    sys.unraisablehook = lambda _: None
    _fail(f"this computer has no memory left, or `ulimit` allows no more ({one_line(error)})", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    _end(f"Error: {message}", exit_code)


def _end(message: str, exit_code: int) -> NoReturn:
    click.echo(printable(message), err=True)
    sys.exit(exit_code)
