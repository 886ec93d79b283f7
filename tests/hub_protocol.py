"""HTTP as the stand-in for the Hub speaks it: requests, answers, and faults by rules that a test makes.

Leaves out chunked requests and multipart uploads, which the client does not use here.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from hub_store import Access, RefusalError, Repository, Store, may_write

PIECE_BYTES = 1 << 16


@dataclass
class Fault:
    """A rule: what happens to requests of a kind.

    Attributes:
        method: A regular expression for all of the method.
        path: A regular expression for some of the path and query, as sent.
        times: To how many more requests it happens; None for all.
        skip: How many requests pass before it begins.
        status: The status of the answer, in place of the proper one.
        headers: More headers of that answer.
        message: The text of that answer.
        cut_request_after: The connection breaks when so many bytes of the body were read, or all: nothing is done.
        lose_answer: All is done, and the connection breaks without an answer.
        delay_seconds: For every begun 64 KiB of the body and of the answer.
        call: Called before anything else, without arguments. Its own requests are not subject to this rule.
        hits: To how many requests it happened.
    """

    method: str = ".*"
    path: str = ""
    times: int | None = None
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "told to fail"
    cut_request_after: int | None = None
    lose_answer: bool = False
    delay_seconds: float = 0.0
    call: Callable[[], object] | None = None
    hits: int = 0
    is_calling: bool = False

    def matches(self, method: str, path: str) -> bool:
        return not self.is_calling and bool(re.fullmatch(self.method, method) and re.search(self.path, path))


class Faults:
    """The rules; the first that matches a request holds for it."""

    def __init__(self):
        self._rules: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, **rule: object) -> Fault:
        """Add a rule; the arguments are those of `Fault`."""
        self._rules.append(Fault(**rule))
        return self._rules[-1]

    def clear(self) -> None:
        self._rules.clear()

    def take(self, method: str, path: str) -> Fault:
        """The rule that holds for a request, counted down."""
        with self._lock:
            for fault in self._rules:
                if fault.times == 0 or not fault.matches(method, path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times = fault.times and fault.times - 1
                fault.hits += 1
                fault.is_calling = fault.call is not None
                return fault
        return Fault()


@dataclass(frozen=True)
class Request:
    """A line of the log."""

    method: str
    path: str


@dataclass
class Hub:
    """A running stand-in.

    Attributes:
        requests: The log.
        trusted: The repositories whose owner trusts the workflow that gets id tokens here.
        id_tokens: The id tokens that were minted for this hub.
        xet_folder: Where the client's Xet keeps what it uploads, instead of a server of Xet's: then LFS files are
            uploaded by Xet alone, whose word is taken for them, and cannot be fetched from here.
        no_xet_hashes: Files have no `xetHash`.
        no_duplication: The endpoint that copies LFS objects between repositories is not there.
        refused_duplicates: File names that it refuses, one by one.
    """

    endpoint: str
    store: Store
    faults: Faults = field(default_factory=Faults)
    requests: list[Request] = field(default_factory=list)
    namespace: str = "alice"
    trusted: set[str] = field(default_factory=set)
    id_tokens: set[str] = field(default_factory=set)
    xet_folder: Path | None = None
    no_xet_hashes: bool = False
    no_duplication: bool = False
    refused_duplicates: set[str] = field(default_factory=set)

    def token(self, name: str) -> str:
        """The token of `alice` or `bob`, or `reader`: alice's, which cannot write."""
        return self.store.names[name]


@dataclass
class Answer:
    """The answer: bytes, or what is sent as JSON."""

    content: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class CutError(Exception):
    """The connection is to break."""


@dataclass
class Exchange:
    """A request under way.

    Attributes:
        path: Without the query.
        query: The first value of each parameter.
        parts: What the route's pattern found, unquoted.
    """

    hub: Hub
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    access: Access | None
    body: bytes
    parts: tuple[str, ...]

    @property
    def store(self) -> Store:
        return self.hub.store

    def login(self) -> Access:
        if self.access is None:
            raise RefusalError(401, "Invalid username or password.")
        return self.access

    def repository(self) -> Repository:
        """The repository that the first part of the path names."""
        return self.store.find(self.parts[0], self.access)

    def writable(self) -> Repository:
        """The same, if the asker may change it."""
        repository = self.repository()
        if not may_write(repository, self.login()):
            raise RefusalError(403, "You have read access but not the required permissions for this operation")
        return repository

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


Act = Callable[[Exchange], Answer]
Route = tuple[str, str, Act]


class Handler(BaseHTTPRequestHandler):
    """One connection; `hub` and `routes` are the class's, of which `serve` makes one each."""

    hub: Hub
    routes: list[Route]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def answer(self):
        self.hub.requests.append(Request(self.command, self.path))
        fault = self.hub.faults.take(self.command, self.path)
        try:
            if fault.call is not None:
                try:
                    fault.call()
                finally:
                    fault.is_calling = False
            # All of it is read, whatever the answer: the next request comes after it.
            answer = self.act(fault, self.body(fault))
            if fault.lose_answer:
                raise CutError
            self.send(answer, fault)
        except (CutError, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def body(self, fault: Fault) -> bytes:
        assert "Transfer-Encoding" not in self.headers
        length, limit = int(self.headers.get("Content-Length", 0)), fault.cut_request_after
        content = b"".join(self.pieces(length if limit is None else min(length, limit), fault))
        if limit is not None:
            raise CutError
        return content

    def pieces(self, length: int, fault: Fault) -> Iterator[bytes]:
        for start in range(0, length, PIECE_BYTES):
            time.sleep(fault.delay_seconds)
            piece = self.rfile.read(min(PIECE_BYTES, length - start))
            if not piece:
                raise CutError
            yield piece

    def act(self, fault: Fault, body: bytes) -> Answer:
        """Do what is asked, or refuse."""
        try:
            access = self.authenticate()
            if fault.status is not None:
                limit = {"RateLimit": '"api";r=0;t=0'} if fault.status == 429 else {}
                return Answer({"error": fault.message}, fault.status, {**limit, **fault.headers})
            path, _, query = self.path.partition("?")
            act, parts = self.find_route(path)
            return act(Exchange(self.hub, path, dict(reversed(parse_qsl(query))), self.headers, access, body, parts))
        except RefusalError as refusal:
            message = str(refusal).encode("ascii", "replace").decode().replace("\n", " ")
            headers = {"X-Error-Message": message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            return Answer({"error": str(refusal), **refusal.fields}, refusal.status, headers)

    def authenticate(self) -> Access | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self.path.startswith("/github/"):
            return None
        if token not in self.hub.store.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.store.tokens[token]

    def find_route(self, path: str) -> tuple[Act, tuple[str, ...]]:
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, act in self.routes:
            if known == method and (match := re.fullmatch(pattern, path)):
                return act, tuple(unquote(part or "") for part in match.groups())
        raise RefusalError(404, f"The stand-in does not know {method} {path}")

    def send(self, answer: Answer, fault: Fault):
        content, kind = answer.content, "application/octet-stream"
        if not isinstance(content, bytes):
            content, kind = json.dumps(content, default=str).encode(), "application/json"
        self.send_response(answer.status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        for start in range(0, len(content) if self.command != "HEAD" else 0, PIECE_BYTES):
            time.sleep(fault.delay_seconds)
            self.wfile.write(content[start : start + PIECE_BYTES])

    def log_message(self, *_):
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A server that closes the connections that its clients keep."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self):
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Say nothing of clients that are gone; anything else that went wrong is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve_routes(folder: Path, routes: list[Route]) -> Iterator[Hub]:
    """Serve a hub of its own, whose bytes lie in a folder."""
    handler = type("HubHandler", (Handler,), {"routes": routes})
    server = Server(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", Store(folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
