"""Runs a stranger's chat templates and patterns in another process, with limits on time, memory and size.

Neither can be interrupted from within: jinja2's sandbox bounds `range`, but not nested loops or `'A' * 3000000000`, and
`re` may look for a match for ever. The process ends itself after `SECONDS`, in the middle of a C function too. It lives
as long as this one, because it takes half a second to start. Windows and macOS have no limit on memory.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dapa_merge.errors import DapaError, one_line

# Published templates take milliseconds.
SECONDS = 10
# It takes less than one; without enough memory, some libraries wait for ever.
SECONDS_TO_START = 60
MAX_BYTES = 1 << 30
# Published templates hold less than 50,000 characters, and give back a prompt once or twice.
MAX_CHARACTERS = 1_000_000
MAX_COPIES = 16


class Unfinished(DapaError):
    """The work broke a limit or failed; the message says so in a few words that follow a colon."""


def start(template: object) -> None:
    """Start the process, so that it is ready when this template is to be rendered."""
    if isinstance(template, str) and not _is_ours(template):
        with _LOCK:
            _running()


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Render a chat template as transformers does, for an answer of the model.

    Raises:
        Unfinished: If the template fails, or breaks a limit.
    """
    most = MAX_CHARACTERS + MAX_COPIES * sum(len(str(message)) for message in messages)
    if _is_ours(template):
        return _render(template, messages, variables, most)
    return str(_ask("render", template, messages, variables, most))


@functools.lru_cache(maxsize=16)
def template_fault(template: str) -> str | None:
    """The fault in the syntax of a chat template, as the rest of a sentence; None if there is none."""
    try:
        found = None if _is_ours(template) else _ask("compile", template)
    except Unfinished as error:
        found = str(error)
    return None if found is None else f"is not a Jinja template: {found}; correct it"


def is_found(pattern: str, text: str) -> bool:
    """Whether `re` finds a pattern in a text.

    Raises:
        Unfinished: If that takes too long.
    """
    return bool(_ask("is_found", pattern, text))


def _is_ours(template: str) -> bool:
    """Whether a template is that of the packaged models, which needs no limits."""
    return template.strip() == _our_template()


@functools.cache
def _our_template() -> str:
    path = files("dapa_merge.miniature").joinpath("target").joinpath("chat_template.jinja")
    return path.read_text(encoding="utf-8").strip()


def _ask(work: str, *arguments: Any) -> Any:
    with _LOCK:
        process = _running()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps([work, SECONDS, *arguments], default=str).encode() + b"\n")
                process.stdin.flush()
            was_ready = process.stdout.readline()
            line = process.stdout.readline()
        finally:
            # Interrupted, its answer would be taken for that to the next question.
            if not line:
                _stop()
    if not was_ready:
        raise DapaError(f"{sys.executable} does not start for chat templates; there may not be enough memory")
    if not line:
        raise Unfinished(f"it does not end within {SECONDS} seconds and {MAX_BYTES >> 30} GiB of memory")
    answer = json.loads(line)
    if "fault" in answer:
        raise Unfinished(answer["fault"])
    return answer["value"]


_LOCK = threading.Lock()
# The process, and the one that started it: a fork must not share its pipes.
_STARTED: dict[int, subprocess.Popen[bytes]] = {}
# A terminal sends Ctrl-C to this process too, which may only stop an answer of the other one; that ends this one.
_PROGRAM = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    f"from {__name__} import serve; serve()"
)


def _running() -> subprocess.Popen[bytes]:
    process = _STARTED.get(os.getpid())
    if process is None:
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)]
        process = _STARTED[os.getpid()] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    return process


@atexit.register
def _stop() -> None:
    process = _STARTED.pop(os.getpid(), None)
    if process is None:
        return
    process.kill()
    # Leaving closes its pipes and waits for it.
    with contextlib.suppress(OSError), process:
        pass


def serve() -> None:
    """Read requests as lines of JSON, and write an answer to each; the main function of the process.

    An empty line says that it is ready for the next request.
    """
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:
        # Nothing that a library prints may be taken for an answer.
        os.dup2(nowhere.fileno(), 1)
        faulthandler.dump_traceback_later(SECONDS_TO_START, exit=True, file=nowhere)
        _renderer()
        _limit_memory()
        faulthandler.cancel_dump_traceback_later()
        while True:
            answers.write(b"\n")
            answers.flush()
            if not (line := sys.stdin.buffer.readline()):
                return
            work, seconds, *arguments = json.loads(line)
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            answers.write(json.dumps(_answer(work, *arguments)).encode() + b"\n")
            faulthandler.cancel_dump_traceback_later()


def _answer(work: str, *arguments: Any) -> Mapping[str, Any]:
    try:
        return {"value": _WORK[work](*arguments)}
    except MemoryError:
        return {"fault": f"it takes more than {MAX_BYTES >> 30} GiB of memory"}
    except DapaError as error:
        return {"fault": str(error)}
    except Exception as error:
        # Templates may raise anything.
        return {"fault": one_line(error)}


def _render(template: str, messages: Any, variables: Mapping[str, Any], most: int) -> str:
    rendered = _renderer()(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **variables
    )  # fmt: skip
    # With the places of the answers, which are not asked for.
    text = str(rendered[0][0] if isinstance(rendered, tuple) else rendered[0])
    if len(text) > most:
        raise Unfinished(f"it makes {len(text):,} characters of a short prompt")
    return text


@functools.cache
def _renderer() -> Callable[..., Any]:
    # Only here, because this process has transformers already, with torch.
    library = importlib.import_module("transformers.utils.chat_template_utils")
    return library.render_jinja_template  # type: ignore[no-any-return]


def _is_found(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def _compile(template: str) -> str | None:
    syntax: Any = importlib.import_module("jinja2").TemplateSyntaxError
    try:
        _renderer()(conversations=[[{"role": "user", "content": ""}]], chat_template=template)
    except syntax as error:
        return f"line {error.lineno}: {error.message}"
    except Exception:
        # It compiles; what it makes of an empty prompt does not matter.
        return None
    return None


_WORK: Mapping[str, Callable[..., Any]] = {"render": _render, "compile": _compile, "is_found": _is_found}


def _limit_memory() -> None:
    try:
        resource: Any = importlib.import_module("resource")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # On top of what its libraries hold, in address space.
    most = pages * resource.getpagesize() + MAX_BYTES
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *known]), hard))
