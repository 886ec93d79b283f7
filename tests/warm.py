"""Processes of their own that need not load torch and its like, which takes each longer than all that it does.

A server loads them once, and forks for each process; where a system cannot fork, each loads them itself. What tests are
about is loaded by each process itself: this package, mergekit, and whatever reads the environment when it is loaded.
Anything else is as with `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp", "scipy.stats", "pandas", "PIL.Image", "jinja2", "yaml", "rich.progress", "click",
    "filelock", "httpx2", "tokenizers", "regex", "psutil", "safetensors.torch", "networkx", "tabulate",
)  # fmt: skip
# They read the variables of the Hub's client, but for those that this package and lm-eval set in the process of a test.
MODULES_OF_THE_HUB = (
    *MODULES, "huggingface_hub.hf_api", "transformers.models.llama.modeling_llama", "transformers.generation.utils",
    "peft",
)  # fmt: skip
SET_BY_TESTS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_XET_HIGH_PERFORMANCE")

# Of the servers: as it was before any test changed it.
ENVIRONMENT = dict(os.environ)
# As they are before a test stands in for them.
POPEN = subprocess.Popen
CAN_FORK = hasattr(os, "fork")
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Process:
    """Python running a text, with arguments; its output is in files."""

    def __init__(
        self,
        command: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        terminal: str | None = None,
    ) -> None:
        """Start it.

        Args:
            command: `[sys.executable, "-c", CODE, ...]`.
            env: As of `subprocess`.
            cwd: As of `subprocess`.
            terminal: The path of a terminal where it reads and writes instead.
        """
        python, option, code, *arguments = map(str, command)
        assert (python, option) == (sys.executable, "-c")
        env = dict(os.environ if env is None else env)
        self.returncode: int | None = None
        self._alone: subprocess.Popen[bytes] | None = None
        if not CAN_FORK:
            self._start_alone(command, env, cwd)
            return
        self._server = _server(MODULES_OF_THE_HUB if _of_the_hub(env) == _of_the_hub(ENVIRONMENT) else MODULES)
        self._files = [terminal or self._server.new_file() for _ in range(2)]
        request = [code, arguments, cwd or os.getcwd(), env, [terminal or os.devnull, *self._files]]
        self.pid = self._server.ask("start", request)

    def _start_alone(self, command: Sequence[object], env: Mapping[str, str], cwd: str | None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="dapa-merge-alone-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self._files = [str(folder / name) for name in ("stdout", "stderr")]
        with open(self._files[0], "wb") as output, open(self._files[1], "wb") as errors:
            self._alone = POPEN(
                [*map(str, command)], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
            )
        self.pid = self._alone.pid

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._alone.poll() if self._alone else self._server.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(KILL)
                raise TimeoutError(f"not done after {timeout} seconds: {self.stderr}")
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended; until `poll` was asked, its number is nobody else's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return Path(self._files[0]).read_text()

    @property
    def stderr(self) -> str:
        return Path(self._files[1]).read_text()


def run(command: Sequence[object], *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured, as text."""
    process = Process(command, env=env)
    process.wait()
    return subprocess.CompletedProcess(command, process.returncode, process.stdout, process.stderr)


# The executable of `program`: starts at once, because it imports little.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    with connection.makefile("rw") as file:
        print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]), file=file, flush=True)
        code, output, errors = json.loads(file.readline())
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(code if code >= 0 else 128 - code)
"""


@contextlib.contextmanager
def program(path: Path, code: str) -> Iterator[None]:
    """Make an executable, for shells, that runs a text of Python with its arguments."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            arguments, folder, env = json.loads(self.rfile.readline())
            process = Process([sys.executable, "-c", code, *arguments], env=env, cwd=folder)
            answer = [process.wait(), process.stdout, process.stderr]
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    # The address of such a socket may have only a hundred characters.
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        with socketserver.UnixStreamServer(address, Handler) as server:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            path.write_text(CLIENT.format(python=sys.executable, address=address))
            path.chmod(0o755)
            try:
                yield
            finally:
                server.shutdown()


class _Popen(Process):
    def __init__(self, command: Sequence[object], *, env: Mapping[str, str] | None = None, **_: object) -> None:
        super().__init__(command, env=env)

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a process", timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        self.wait()
        return self.stdout, self.stderr


def stand_in_for_subprocess(monkeypatch: Any) -> None:
    """Let `subprocess` start Python with a text as here: for programs that are run in the process of a test."""
    popen, run_of_subprocess = subprocess.Popen, subprocess.run

    def is_ours(command: object) -> bool:
        return isinstance(command, list | tuple) and tuple(command[:2]) == (sys.executable, "-c")

    def run_whole(command: Any, *arguments: Any, check: bool = False, **options: Any) -> Any:
        if not is_ours(command):
            return run_of_subprocess(command, *arguments, check=check, **options)
        done = run(command, env=options.get("env"))
        assert not check or done.returncode == 0, done.stderr
        return done

    def start(command: Any, *arguments: Any, **options: Any) -> Any:
        # A process that is talked to is not one of those.
        is_alone = is_ours(command) and "stdin" not in options
        return (_Popen if is_alone else popen)(command, *arguments, **options)

    monkeypatch.setattr(subprocess, "run", run_whole)
    monkeypatch.setattr(subprocess, "Popen", start)


class _Server:
    def __init__(self, modules: Sequence[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dapa-merge-warm-"))
        command = [sys.executable, __file__, self._folder, *modules]
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._numbers = itertools.count()
        atexit.register(self.close)

    def new_file(self) -> str:
        return str(self._folder / str(next(self._numbers)))

    def ask(self, *request: object) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        with self._process:
            pass


def _of_the_hub(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("HF_") and name not in SET_BY_TESTS}


@functools.cache
def _server(modules: Sequence[str]) -> _Server:
    return _Server(modules)


def _serve(folder_of_files: str) -> str:
    """Answer requests until there are no more; return only in a new process, with its code."""
    for line in sys.stdin:
        what, request = json.loads(line)
        if what == "poll":
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            code, arguments, folder, env, paths = request
            # Here, so that they are open when the answer comes.
            files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY) for path in paths]
            if not (answer := os.fork()):
                _become(arguments, folder, env, files)
                return code
            for file in files:
                os.close(file)
        print(json.dumps(answer), flush=True)
    # However the process that started this one ended.
    shutil.rmtree(folder_of_files, ignore_errors=True)
    os._exit(0)


def _become(arguments: list[str], folder: str, env: dict[str, str], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    sys.path[0] = ""


def _run(code: str) -> NoReturn:
    """Run a program to its end; without taking the modules apart, which takes longer than many a program."""
    status: object = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
    except Exception:
        status = 1
        sys.excepthook(*sys.exc_info())
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    _, folder_of_files, *modules = sys.argv
    for name in modules:
        with contextlib.suppress(ImportError):
            import_module(name)
    # What is there already is left in memory that all share.
    gc.collect()
    gc.freeze()
    _run(_serve(folder_of_files))
