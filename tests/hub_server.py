"""A real HTTP server on this machine that answers as the Hub does, for the calls that a download makes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


def make_handler(repositories: dict[str, Path], statuses: dict[str, int], log: list[str]):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            log.append(f"{self.command} {self.path}")
            if match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(/revision/([\w%-]+))?(\?.*)?", self.path):
                self.describe(match.group(1), match.group(3) or "main", body)
            elif match := re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([\w-]+)/([\w.-]+)(\?.*)?", self.path):
                self.serve(match.group(1), match.group(3), body)
            elif match := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/tree/([\w-]+)(\?.*)?", self.path):
                files = sorted(repositories[match.group(1)].iterdir())
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
                self.send(200, json.dumps(tree).encode(), body, **{"Content-Type": "application/json"})
            else:
                self.send(404, b"{}", body)

        def describe(self, repository: str, revision: str, body: bool):
            if status := statuses.get(repository):
                self.send(status, b'{"error": "no"}', body)
            elif repository not in repositories:
                self.send(404, b'{"error": "Repository not found"}', body, **{"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", "v1", SHA):
                self.send(404, b'{"error": "Invalid rev id"}', body, **{"X-Error-Code": "RevisionNotFound"})
            else:
                names = [{"rfilename": path.name} for path in sorted(repositories[repository].iterdir())]
                answer = {"id": repository, "modelId": repository, "sha": SHA, "siblings": names}
                self.send(200, json.dumps(answer).encode(), body, **{"Content-Type": "application/json"})

        def serve(self, repository: str, name: str, body: bool):
            path = repositories.get(repository, Path("/nowhere")) / name
            if not path.is_file():
                self.send(404, b"", body, **{"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.send(200, content, body, ETag=f'"{etag}"', **{"X-Repo-Commit": SHA})

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


@contextlib.contextmanager
def hub(repositories: dict[str, Path], statuses: dict[str, int] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as model repositories; yields the endpoint and the log of requests."""
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(repositories, statuses or {}, log))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
