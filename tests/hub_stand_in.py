"""A stand-in for the Hugging Face Hub that speaks its HTTP protocol to an unmodified client, and fails when told to.

`python tests/hub_stand_in.py FOLDER` serves until Ctrl-C. FOLDER keeps the files' bytes; the rest lives in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl, unquote

import hub_accounts
import hub_commits
import hub_discussions
import hub_objects
import hub_repositories
from hub_exchange import Answer, CutError, Exchange, Hub, Request
from hub_faults import Fault, refusal_headers
from hub_store import Access, RefusalError, Store

PIECE_BYTES = 1 << 16
MODULES = (hub_accounts, hub_repositories, hub_commits, hub_objects, hub_discussions)
ROUTES = [(method, re.compile(path), act) for module in MODULES for method, path, act in module.ROUTES]


class Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is the class's, of which `serve` makes one each."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def answer(self):
        record = Request(self.command, self.path)
        self.hub.requests.append(record)
        fault = self.hub.faults.take(self.command, self.path)
        pieces = self.pieces(record, fault)
        try:
            if fault.call is not None:
                try:
                    fault.call()
                finally:
                    fault.is_calling = False
            answer = self.act(record, fault, pieces)
            for _ in pieces:
                """What nobody read has to go before the next request can be."""
            if fault.lose_answer:
                raise CutError
            record.status = answer.status
            self.send(answer, fault)
        except (CutError, ConnectionError):
            self.cut()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def act(self, record: Request, fault: Fault, pieces: Iterator[bytes]) -> Answer:
        """Do what is asked, or refuse."""
        try:
            access = self.authenticate(record)
            if fault.status is not None:
                return Answer({"error": fault.message}, fault.status, refusal_headers(fault))
            if fault.cut_request_after is not None:
                for _ in pieces:
                    """Nothing is done with what arrives."""
                raise CutError
            path, _, query = self.path.partition("?")
            first_values = dict(reversed(parse_qsl(query)))
            act, parts = find_route(self.command, path)
            return act(Exchange(self.hub, self.path, first_values, self.headers, access, pieces, parts))
        except RefusalError as refusal:
            message = str(refusal).encode("ascii", "replace").decode().replace("\n", " ")
            headers = {"X-Error-Message": message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            return Answer({"error": str(refusal), **refusal.fields}, refusal.status, headers)

    def authenticate(self, record: Request) -> Access | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self.path.startswith("/github/"):
            return None
        access = self.hub.store.tokens.get(token.strip())
        if access is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        record.user = access.user
        return access

    def pieces(self, record: Request, fault: Fault) -> Iterator[bytes]:
        """The body, counted; it may break off."""
        limit = fault.cut_request_after
        for piece in self.raw_pieces():
            time.sleep(fault.delay_seconds)
            record.num_bytes += len(piece)
            if limit is not None and record.num_bytes >= limit:
                record.num_bytes = limit
                raise CutError
            yield piece

    def raw_pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield read_exactly(self.rfile, length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = read_exactly(self.rfile, min(left, PIECE_BYTES))
            left -= len(piece)
            yield piece

    def send(self, answer: Answer, fault: Fault):
        content, kind = answer.content, "application/octet-stream"
        if not isinstance(content, bytes):
            content, kind = json.dumps(content, default=str).encode(), "application/json"
        length = answer.stop - answer.start if answer.path else len(content)
        self.send_response(answer.status)
        for key, value in {"Content-Type": kind, "Content-Length": str(length), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = length if fault.cut_answer_after is None else min(fault.cut_answer_after, length)
        with open(answer.path, "rb") if answer.path else contextlib.nullcontext() as file:
            if file:
                file.seek(answer.start)
            for start in range(0, left, PIECE_BYTES):
                time.sleep(fault.delay_seconds)
                size = min(PIECE_BYTES, left - start)
                self.wfile.write(file.read(size) if file else content[start : start + size])
        if fault.cut_answer_after is not None:
            self.wfile.flush()
            raise CutError

    def cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        """Say nothing."""


def read_exactly(file: BinaryIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) < length:
        raise CutError
    return content


def find_route(method: str, path: str) -> tuple[Callable[[Exchange], Answer], tuple[str, ...]]:
    """Who answers, and what the path says."""
    for known, pattern, act in ROUTES:
        if (match := pattern.fullmatch(path)) and ("GET" if method == "HEAD" else method) == known:
            return act, tuple(unquote(part or "") for part in match.groups())
    raise RefusalError(404, f"The stand-in does not know {method} {path}")


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
        """Say nothing of clients that are gone; what else went wrong would be an error here."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve a Hub of its own, whose bytes lie in a folder."""
    handler = type("HubHandler", (Handler,), {})
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


@dataclass
class OtherHub:
    """Another server that speaks for the Hub, which cannot be told to fail."""

    endpoint: str
    namespace: str
    secret: str
    faults: None = None

    def token(self, name: str) -> str:
        assert name == "alice", f"The other Hub has one user: not {name}"
        return self.secret


@contextlib.contextmanager
def some_hub(folder: Path) -> Iterator[Hub | OtherHub]:
    """The server that DAPA_HUB_ENDPOINT names, with DAPA_HUB_TOKEN and DAPA_HUB_NAMESPACE, else the stand-in."""
    if endpoint := os.environ.get("DAPA_HUB_ENDPOINT"):
        yield OtherHub(endpoint.rstrip("/"), os.environ["DAPA_HUB_NAMESPACE"], os.environ["DAPA_HUB_TOKEN"])
    else:
        with serve(folder) as hub:
            yield hub


def main(arguments: list[str]) -> None:
    # Shells let what they start in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with serve(Path(arguments[0])) as hub:
        tokens = "".join(f"\n{name} {token}" for name, token in hub.store.names.items())
        print(f"{hub.endpoint}{tokens}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
