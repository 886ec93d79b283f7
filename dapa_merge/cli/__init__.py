"""The command line: parse, call, print.

A command's module is imported only when the command runs, so `--help` loads none of them, and they may import torch at
the top. Errors become one sentence and an exit code.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from dapa_merge import __version__
from dapa_merge.errors import CheckpointError, DapaError, Stopped, lacks_memory, one_line
from dapa_merge.progress import shown

INTERRUPTED = 130
# The module of each command, and its line in the help.
COMMANDS = {
    "card": ("dapa_merge.cli.publish", "Write or renew the model card of OUT."),
    "compare": ("dapa_merge.cli.study", "Compare DAPA with other methods on the targets of RECIPE..."),
    "demo": ("dapa_merge.cli.run", "Repair the packaged miniature models."),
    "evaluate": ("dapa_merge.cli.run", "Measure the safety and skill of any model."),
    "gate": ("dapa_merge.cli.publish", "Fail unless the figures of a result are good enough."),
    "outdated": ("dapa_merge.cli.publish", "Ask whether a model of RECIPE moved."),
    "patch": ("dapa_merge.cli.check", "Pass a repair on as a small file, apply it, take it back."),
    "plan": ("dapa_merge.cli.run", "Show what RECIPE would transplant, without loading a model."),
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
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own method would load every command.
        limit = formatter.width - 6 - max(map(len, COMMANDS))
        rows = [
            (name, click.Command(name, help=COMMANDS[name][1]).get_short_help_str(limit)) for name in sorted(COMMANDS)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        try:
            # click prints the help here, before any command.
            return super().make_context(*arguments, **settings)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click handles it.
                raise
            _fail_at(error)

    def invoke(self, context: click.Context) -> Any:
        try:
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
            _fail(f"stopped{kept}", INTERRUPTED)
        except OSError as error:
            if context.params.get("debug"):
                raise
            _fail_without_memory(error) if lacks_memory(error) else _fail_at(error)
        except Exception as error:
            if context.params.get("debug") or not lacks_memory(error):
                raise
            _fail_without_memory(error)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Exit codes: 0 done, 1 another fault, 2 usage or bad recipe, 3 the source
cannot repair this target, 4 bad checkpoint or result, 5 the Hub said no, 6 a
gate failed, 10 outdated, 130 stopped by Ctrl-C, 143 by SIGTERM (compare).""",
)
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.version_option(__version__, prog_name="dapa-merge")
@click.pass_context
def main(context: click.Context, debug: bool, quiet: bool) -> None:
    """Give a fine-tuned model its safety back.

    Copies MLP gate projections from an aligned model (the source) into an unaligned one of the same family (the
    target), after a search for the few layers that are needed (DAPA, arXiv 2406.01514), or moves the target along
    directions of their difference.
    """
    context.with_resource(shown(quiet))
    if quiet or not sys.stderr.isatty():
        _disable_client_bars()
    for stream in (sys.stdout, sys.stderr):
        # A path may have characters that the terminal's encoding lacks.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _disable_client_bars() -> None:
    """Disable huggingface_hub's progress bars, which fill a log, unless its variable asks for them."""
    if os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1") != "0" and "huggingface_hub" in sys.modules:
        # It read the variable when it was imported.
        sys.modules["huggingface_hub"].utils.disable_progress_bars()


def _fail_at(error: OSError) -> NoReturn:
    _fail(f"{error.filename or 'the output stream'}: {error.strerror or error}", 1)


def _fail_without_memory(error: BaseException) -> NoReturn:
    # Libraries fail at exit, too, where nobody can do anything about it.
    sys.unraisablehook = lambda _: None
    _fail(f"this computer has no memory left, or `ulimit` allows no more ({one_line(error)})", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)
