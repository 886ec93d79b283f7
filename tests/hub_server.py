"""A real HTTP server on this machine that answers as the Hub does, for the calls that a download makes.

Models are served as `NAMESPACE/NAME`; a repository called `datasets/NAMESPACE/NAME` is a dataset, and may have folders.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess

import warm

SHA = "0123456789abcdef0123456789abcdef01234567"


PIECE_BYTES = 1 << 14


@dataclass
class Faults:
    """What goes wrong with files.

    Attributes:
        drop_every: The connection breaks when an answer has brought so many bytes.
        refusals: Statuses of which every third request for weights gets the next, until there are none left.
        stall_after: All answers hang when so many bytes of weights went out, until `stalled` is read.
        ignores_ranges: Requests for ranges get the whole file.
        lie: What is wrong with the answer to a request for a range: `no Content-Range`, `another range`, `another size`
            or `more bytes`.
        spoils: What is wrong with the next answers that bring more than a header of weights, one each: `a flipped bit`,
            `other bytes`, `half of it` or `a page`. The first bytes of a file are spoilt by `a flipped header` only.
        delay_seconds: How long each 16 KiB of weights take.
        has_cdn: Weights are answered with a redirection to the same server under another name.
        stalled: Set when answers hang.
        released: Set to let them go on.
    """

    drop_every: int | None = None
    refusals: list[int] = field(default_factory=list)
    stall_after: int | None = None
    ignores_ranges: bool = False
    lie: str = ""
    spoils: list[str] = field(default_factory=list)
    delay_seconds: float = 0.0
    has_cdn: bool = False
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    number: Iterator[int] = field(default_factory=itertools.count, repr=False)


class Log(list):
    """The requests, as `METHOD PATH`; and how many bytes of each file went out.

    Attributes:
        served: By `REPOSITORY/FILE`.
        authorized: The requests that came with a token.
    """

    def __init__(self):
        self.served: Counter[str] = Counter()
        self.authorized: list[str] = []

    def num_weight_bytes(self, repository: str = "") -> int:
        return sum(
            number
            for name, number in self.served.items()
            if name.startswith(repository) and name.endswith(".safetensors")
        )


def make_handler(repositories: dict[str, Path], statuses: dict[str, int], log: Log, faults: Faults):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            log.append(f"{self.command} {self.path}")
            if "Authorization" in self.headers:
                log.authorized.append(log[-1])
            if match := re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)/auth-check", self.path):
                status = statuses.get(f"files of datasets/{match.group(1)}", 200)
                self.send(status, b"{}", body, **({"X-Error-Code": "GatedRepo"} if status != 200 else {}))
            elif match := re.fullmatch(
                r"/api/(models|datasets)/([\w-]+/[\w-]+)(/revision/([\w%-]+))?(\?.*)?", self.path
            ):
                repository = match.group(2) if match.group(1) == "models" else f"datasets/{match.group(2)}"
                self.describe(repository, match.group(4) or "main", body)
            elif match := re.fullmatch(r"/((?:datasets/)?[\w-]+/[\w-]+)/resolve/([\w-]+)/([\w./-]+)(\?.*)?", self.path):
                self.serve(match.group(1), match.group(3), body)
            elif match := re.fullmatch(r"/cdn/([\w-]+/[\w-]+)/([\w./-]+)", self.path):
                self.send_file(match.group(1), match.group(2), body)
            elif match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/tree/([\w-]+)(\?.*)?", self.path):
                self.tree(repositories[match.group(1)])
            elif match := re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)/tree/([\w-]+)(/[\w./-]+)?(\?.*)?", self.path):
                folder = repositories[f"datasets/{match.group(1)}"]
                self.tree(folder, (match.group(3) or "/")[1:], "recursive=true" in self.path.lower())
            else:
                self.send(404, b"{}", body)

        def tree(self, root: Path, under: str = "", recursive: bool = False):
            folder = root / under
            paths = sorted(folder.rglob("*") if recursive else folder.iterdir()) if folder.is_dir() else []
            tree = [
                {"type": "directory", "path": str(path.relative_to(root)), "oid": "0"}
                if path.is_dir()
                else {"type": "file", "path": str(path.relative_to(root)), "size": path.stat().st_size, "oid": "0"}
                for path in paths
            ]
            self.send(200, json.dumps(tree).encode(), True, **{"Content-Type": "application/json"})

        def describe(self, repository: str, revision: str, body: bool):
            if status := statuses.get(repository):
                self.send(status, b'{"error": "no"}', body)
            elif repository not in repositories:
                self.send(404, b'{"error": "Repository not found"}', body, **{"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", "v1", SHA):
                self.send(404, b'{"error": "Invalid rev id"}', body, **{"X-Error-Code": "RevisionNotFound"})
            else:
                names = [{"rfilename": path.name} for path in sorted(repositories[repository].iterdir())]
                answer = {"id": repository.removeprefix("datasets/"), "sha": SHA, "siblings": names}
                answer["gated"] = statuses.get(f"files of {repository}") in (401, 403) and "auto"
                self.send(200, json.dumps(answer).encode(), body, **{"Content-Type": "application/json"})

        def serve(self, repository: str, name: str, body: bool):
            if status := statuses.get(f"files of {repository}"):
                self.send(status, b"", body, **({"X-Error-Code": "GatedRepo"} if status < 500 else {}))
                return
            path = repositories.get(repository, Path("/nowhere")) / name
            if not path.is_file():
                self.send(404, b"", body, **{"X-Error-Code": "EntryNotFound"})
                return
            is_weights = name.endswith(".safetensors")
            # Counted apart from all else, in one step: many ask at once.
            if body and is_weights and faults.refusals and next(faults.number) % 3 == 2:
                self.send(faults.refusals.pop(), b"", body, **{"Retry-After": "0"})
            elif faults.has_cdn and is_weights:
                linked = {"X-Linked-Etag": f'"{etag(path)}"', "X-Linked-Size": str(path.stat().st_size)}
                place = f"http://localhost:{self.server.server_port}/cdn/{repository}/{name}"
                self.send(302, b"", body, Location=place, **linked, **{"X-Repo-Commit": SHA})
            else:
                self.send_file(repository, name, body)

        def send_file(self, repository: str, name: str, body: bool):
            path = repositories[repository] / name
            size = path.stat().st_size
            start, stop = 0, size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            spoil = self.spoil(name, asked) if body else ""
            if spoil == "a page":
                self.send(200, b"<html>Please log in</html>", body, **{"Content-Type": "text/html"})
                return
            headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            if asked and not faults.ignores_ranges:
                start, stop = int(asked.group(1)), min(int(asked.group(2) or size - 1) + 1, size)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                self.lie(headers, start, stop, size)
            self.send_response(206 if asked and not faults.ignores_ranges else 200)
            for key, value in {**headers, "Content-Length": str(stop - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.send_bytes(path, start, stop, f"{repository}/{name}", spoil)

        def spoil(self, name: str, asked: re.Match[str] | None) -> str:
            """What is wrong with this answer; then it is the next one's turn."""
            if not faults.spoils or not name.endswith(".safetensors"):
                return ""
            start, stop = (int(asked.group(1)), int(asked.group(2) or 1 << 40)) if asked else (0, 1 << 40)
            is_header = stop <= 8 or start == 8
            return faults.spoils.pop(0) if is_header == (faults.spoils[0] == "a flipped header") else ""

        def lie(self, headers: dict[str, str], start: int, stop: int, size: int):
            if faults.lie == "no Content-Range":
                del headers["Content-Range"]
            elif faults.lie == "another range":
                headers["Content-Range"] = f"bytes {start + 1}-{stop}/{size}"
            elif faults.lie == "another size":
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size + 1}"
            elif faults.lie == "more bytes":
                headers["Content-Range"] = f"bytes {start}-{stop}/{size}"

        def send_bytes(self, path: Path, start: int, stop: int, name: str, spoil: str):
            num_sent = 0
            with path.open("rb") as file:
                file.seek(start)
                while num_sent < stop - start:
                    if faults.drop_every is not None and num_sent >= faults.drop_every:
                        self.close_connection = True
                        return
                    if faults.stall_after is not None and log.num_weight_bytes() >= faults.stall_after:
                        faults.stalled.set()
                        faults.released.wait(60)
                    if faults.delay_seconds and name.endswith(".safetensors"):
                        time.sleep(faults.delay_seconds)
                    if spoil == "half of it" and num_sent >= (stop - start) // 2:
                        self.close_connection = True
                        return
                    piece = file.read(min(PIECE_BYTES, stop - start - num_sent))
                    if spoil.startswith("a flipped") and num_sent == 0:
                        piece = piece[:5] + bytes([piece[5] ^ 1]) + piece[6:]
                    elif spoil == "other bytes":
                        piece = piece[::-1]
                    try:
                        self.wfile.write(piece)
                    except OSError:  # The client is gone.
                        self.close_connection = True
                        return
                    num_sent += len(piece)
                    log.served[name] += len(piece)

        def send(self, status: int, content: bytes, body: bool, **headers: str):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            """Say nothing."""

    return Handler


def etag(path: Path) -> str:
    return digest(path, path.stat().st_mtime_ns)


@functools.lru_cache
def digest(path: Path, _time: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Say nothing of clients that are killed."""


@contextlib.contextmanager
def hub(
    repositories: dict[str, Path], statuses: dict[str, int] | None = None, faults: Faults | None = None
) -> Iterator[tuple[str, Log]]:
    """Serve folders as repositories; yields the endpoint and the log of requests.

    Args:
        repositories: From the name of a repository to its folder.
        statuses: From a repository to the status of every question about it; from `files of REPOSITORY` to that of its
            files alone, which 401 or 403 makes a gated one.
        faults: What goes wrong with files.
    """
    log = Log()
    faults = faults or Faults()
    server = Server(("127.0.0.1", 0), make_handler(repositories, statuses or {}, log, faults))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        faults.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def command_line(*arguments: object) -> list[str]:
    """A command of dapa-merge for a process of its own."""
    code = "import sys\nfrom dapa_merge.cli import main\nmain(sys.argv[1:])"
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment(endpoint: str, home: Path, **changes: str) -> dict[str, str]:
    """Where such a process finds the Hub, and an empty cache of it."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **changes}


def dapa_merge(endpoint: str, home: Path, *arguments: object, **changes: str) -> CompletedProcess[str]:
    """Run a command of dapa-merge in a process of its own."""
    return warm.run(command_line(*arguments), env=environment(endpoint, home, **changes))
