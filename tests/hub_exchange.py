"""A request to a stand-in for the Hub, the answer to it, and the hub as those who answer see it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from hub_faults import Faults
from hub_store import Access, RefusalError, Repository, Store


@dataclass
class Request:
    """A line of the log: `num_bytes` are those of the body that arrived, `status` is 0 until there is an answer."""

    method: str
    path: str
    num_bytes: int = 0
    user: str = ""
    status: int = 0


@dataclass
class Hub:
    """A running stand-in.

    Attributes:
        endpoint: Its address.
        requests: The log.
        faults: What is to go wrong.
        trusted: The repositories whose owner trusts the workflow that gets id tokens here.
        id_tokens: From the id tokens that were minted to their audience.
        multipart_over: LFS files larger than this are uploaded in parts of so many bytes.
        has_cdn: LFS files are answered with a redirection to the same server under another name.
        xet_folder: Where the client's Xet keeps what it uploads, instead of a server of Xet's: then LFS files are
            uploaded by Xet alone, whose word is taken for them, and cannot be fetched from here.
        no_xet_hashes: Files have no `xetHash`.
        no_duplication: The endpoint that copies LFS objects between repositories is not there.
        refused_duplicates: File names or SHA-256s that it refuses, one by one.
        missing_object_status: The answer to a commit of an LFS file whose object is not there.
        tracks_lfs: A commit adds LFS files that no pattern covers to .gitattributes, as on the Hub.
        page_size: How many entries a page of a listing has.
    """

    endpoint: str
    store: Store
    faults: Faults = field(default_factory=Faults)
    requests: list[Request] = field(default_factory=list)
    namespace: str = "alice"
    trusted: set[str] = field(default_factory=set)
    id_tokens: dict[str, str] = field(default_factory=dict)
    multipart_over: int = 1 << 30
    has_cdn: bool = False
    xet_folder: Path | None = None
    no_xet_hashes: bool = False
    no_duplication: bool = False
    refused_duplicates: set[str] = field(default_factory=set)
    missing_object_status: int = 404
    tracks_lfs: bool = True
    page_size: int = 1000

    def token(self, name: str) -> str:
        """The token of `alice`, of `bob`, or alice's read-only one, `reader`."""
        return self.store.names[name]

    def workflow_environment(self, resource: str) -> dict[str, str]:
        """What a workflow on GitHub that publishes to a repository finds in its environment."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.endpoint}/github/id-token",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.store.sign("workflow"),
            "HF_OIDC_RESOURCE": resource,
        }


@dataclass
class Answer:
    """What goes back: `content`, as JSON unless it is bytes, or a part of a file."""

    content: object = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    start: int = 0
    stop: int = 0


class CutError(Exception):
    """The connection is to break."""


@dataclass
class Exchange:
    """A request under way, as those who answer it see it.

    Attributes:
        path: The path and query, as sent.
        query: The first value of each parameter.
        pieces: The body.
        parts: What the route's pattern found, unquoted.
    """

    hub: Hub
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    access: Access | None
    pieces: Iterator[bytes]
    parts: tuple[str, ...] = ()

    @property
    def store(self) -> Store:
        return self.hub.store

    @property
    def name(self) -> str:
        """The repository's, for routes that begin with its kind and its id."""
        kind, name = self.parts[:2]
        return name if kind == "models" else f"{kind}/{name}"

    def repository(self) -> Repository:
        return self.store.find(self.name, self.access)

    def writable(self) -> Repository:
        """The repository, if the asker may change it."""
        repository = self.repository()
        self.login()
        if not self.store.may_write(repository, self.access):
            raise RefusalError(403, "You have read access but not the required permissions for this operation")
        return repository

    def login(self) -> Access:
        if self.access is None:
            raise RefusalError(401, "Invalid username or password.")
        return self.access

    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> dict:
        try:
            return json.loads(self.body() or b"{}")
        except ValueError:
            raise RefusalError(400, "The body is not JSON") from None

    def receive(self) -> Path:
        """Write the body into a file of its own."""
        descriptor, name = tempfile.mkstemp(dir=self.store.folder / "incoming")
        with os.fdopen(descriptor, "wb") as file:
            try:
                file.writelines(self.pieces)
            except BaseException:
                os.unlink(name)
                raise
        return Path(name)

    def page(self, entries: list, size: int) -> Answer:
        """A page of a listing, with a link to the next."""
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + size < len(entries):
            query = urlencode({**self.query, "cursor": start + size})
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{query}>; rel="next"'
        return Answer(entries[start : start + size], headers=headers)


Route = tuple[str, str, Callable[[Exchange], Answer]]
REPOSITORY = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
