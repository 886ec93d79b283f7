"""Faults become one sentence and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import click

from dapa_merge.errors import DapaError

INTERRUPTED = 130


class Group(click.Group):
    """Turns faults into one sentence and an exit code; `--debug` shows where they came from."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        try:
            # Here click prints the help, before there is a command.
            return super().make_context(*arguments, **settings)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's own matter.
                raise
            _fail_at(error)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except DapaError as error:
            if context.params.get("debug"):
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            # What was found or made so far, from whoever was stopped.
            best, kept = getattr(stop, "best", None), getattr(stop, "kept", None)
            found = f"; {kept}" if kept else ""
            if best:
                from dapa_merge.report import spans

                found = f"; the best selection so far: {spans(best.units)}"
            _fail(f"stopped{found}", INTERRUPTED)
        except OSError as error:
            if context.params.get("debug"):
                raise
            _fail_at(error)


def _fail_at(error: OSError) -> NoReturn:
    _fail(f"{error.filename or 'the output stream'}: {error.strerror or error}", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)
