"""Errors for users, each class with an exit code on the command line; and untrusted text made harmless to show."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_MESSAGE_LENGTH = 2000


class DapaError(click.ClickException):
    """A fault that the user can fix: one sentence that says what was found, what was expected and what to do.

    Any click command line, mergekit's too, prints the sentence and exits with `exit_code`.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        # Quoted text may come from a malicious file that moves the cursor or fills the screen.
        if len(text) > MAX_MESSAGE_LENGTH:
            text = f"{text[: MAX_MESSAGE_LENGTH // 2]} ... {text[-MAX_MESSAGE_LENGTH // 2 :]}"
        return printable(text)

    def format_message(self) -> str:
        return str(self)

    def show(self, file: IO[Any] | None = None) -> None:
        with suppress(OSError):  # The exit code counts even if nobody reads the sentence.
            super().show(file)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with one sentence about the results kept so far."""


def printable(text: str, *, keep: str = "") -> str:
    """Escape the characters of a text that move a cursor, begin another line or turn its direction.

    Args:
        text: Text of any origin.
        keep: Characters that stay all the same, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


# What begins markup in a line of Markdown, also by the extensions of the Hub and of GitHub: code, emphasis, links,
# cells, formulas; emphasis by underscores, which is not within a word; blocks, at the start of the line.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^[#>]|^[+=-](?=[\s+=-])")
# What becomes a tag, a link, a mention, a list or another character, and is written as an entity.
_ENTITIES = re.compile(r"(?i)<|&(?=[#\w])|(?<=\w):(?=/)|(?<=\bmailto):|@(?=\w)|(?<=\bwww)\.|(?<=^\d)[.)](?=\s)")


def markdown(text: str) -> str:
    """Escape untrusted text for one line, or one cell, of Markdown, which then shows this text and nothing else."""
    shown = printable(text)
    marked = _ENTITIES.sub(lambda found: f"&#{ord(found.group())};", _MARKUP.sub(r"\\\g<0>", shown))
    if not shown.strip():
        return shown[:1]
    # Four spaces at the beginning of an item of a list would make it code.
    return f"&#32;{marked[1:]}" if shown.startswith(" " * 4) else marked


def markdown_code(text: str) -> str:
    """Untrusted text as a code span of Markdown, outside of tables."""
    shown = printable(text) or " "
    fence = code_fence(shown, least=1)
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def code_fence(text: str, least: int = 3) -> str:
    """Backticks that no run of backticks in a text can end."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def some_of(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def nearest_of(word: str, known: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """Suggest the nearest known word for an error; empty if none is near.

    Args:
        word: What was written; upper and lower case are alike.
        known: What might have been meant.
        shown: Writes one of `known` as it is to be typed.
    """
    by_key = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(word.casefold(), by_key, 1)
    return f" (did you mean {shown(by_key[near[0]])!r}?)" if near else ""


def one_line(error: BaseException) -> str:
    """Summarize another library's error: its class and the first line of its message, shortened."""
    first = next(iter(str(error).strip().splitlines()), "")
    if len(first) > 200:
        first = f"{first[:200].rpartition(' ')[0] or first[:200]} ..."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# What libraries say if the system gives them no memory, or no thread.
_NO_MEMORY = re.compile(
    r"(?i)can(?:'t|not) allocate|not enough memory|out of memory|unable to allocate|can't start new thread"
    r"|failed to map segment|could not create a primitive|mmap failed"
)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether this computer, not a device, had no memory left, by an error and its causes."""
    seen: set[int] = set()
    # An error that was raised again may be its own cause.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        # Errors of devices are told where the device is known, and our own sentences quote strangers' words.
        is_told = isinstance(error, DapaError) or type(error).__name__ == "OutOfMemoryError"
        if not is_told and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def fault_of(error: ValidationError) -> str:
    """The first key that does not fit, and why, in a few words."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key[:120]}: {first['msg'][:120]}" if key else first["msg"][:120]


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Return the reason why a user's text file could not be read."""
    return str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8"


class UsageError(DapaError):
    """The command line asks for something that cannot be done."""

    exit_code = 2


class RecipeError(DapaError):
    """The recipe is not valid."""

    exit_code = 2


class CannotRepair(DapaError):
    """The source does not make this target refuse enough, or breaks a limit of the recipe.

    Attributes:
        why: The reason in a few words and figures; the message by default.
        pick: The number of the point that is nearest to the limits, if there were points to pick from.
    """

    exit_code = 3

    def __init__(self, message: str, why: str | None = None, pick: int | None = None) -> None:
        super().__init__(message)
        self.why = printable(why or message)
        self.pick = pick


class CheckpointError(DapaError):
    """A model's files are damaged, unsafe or not supported."""

    exit_code = 4


class ValueDoesNotFit(CheckpointError):
    """A value of the source does not fit in the dtype of the target's tensor."""


class UnsupportedArchitecture(CheckpointError):
    """This version does not find the units of the architecture."""


class HubError(DapaError):
    """The Hugging Face Hub refused, or could not be reached."""

    exit_code = 5
