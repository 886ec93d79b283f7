"""What a stand-in for the Hub keeps: users and tokens, repositories, their commits, refs and objects."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from hub_git import ATTRIBUTES, git_oid, pointer


class RefusalError(Exception):
    """An answer that says no.

    Attributes:
        status: The HTTP status.
        code: X-Error-Code, by which the client knows which error to raise.
        fields: What else stands in the body.
    """

    def __init__(self, status: int, message: str, code: str = "", **fields: object):
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class Access:
    """Who asks, and what the token allows.

    Attributes:
        user: The user's name, or the owner's for a token that a workflow got.
        is_writing: Whether the token may write at all.
        only: The one repository that it may write to, if it is a workflow's.
    """

    user: str
    is_writing: bool = True
    only: str | None = None

    @property
    def label(self) -> str:
        """The author of what is done with the token."""
        return "[OIDC]" if self.only else self.user


@dataclass(frozen=True)
class Entry:
    """A file in a commit.

    Attributes:
        oid: The git blob's SHA-1; for LFS files, that of the pointer.
        sha256: Of an LFS file's content; None for regular files.
    """

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def xet_hash(self) -> str | None:
        return hashlib.sha256(f"xet {self.sha256}".encode()).hexdigest() if self.sha256 else None


Tree = dict[str, Entry]


@dataclass(frozen=True)
class Commit:
    """What is known of a commit besides its files."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str


@dataclass
class Discussion:
    """A discussion or a pull request.

    Attributes:
        status: `open`, `closed`, `merged` or `draft`.
        head: The newest commit of a pull request.
        base: The commit that it started from.
    """

    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str = "open"
    target: str = "main"
    head: str | None = None
    base: str | None = None
    merge_commit: str | None = None
    created_at: str = field(default_factory=lambda: now())
    events: list[dict] = field(default_factory=list)


@dataclass
class Repository:
    """A repository.

    Attributes:
        branches: From names to commits.
        commits: From every commit's sha to its files.
        history: From every commit's sha to the rest of it.
        objects: From the SHA-256 of every LFS object that was uploaded or copied here to its size.
        moves: Every (ref, commit) that a reader could ever see, in order.
        gated: False, `auto` or `manual`.
        granted: Who may read a gated repository's files, besides its owner.
    """

    name: str
    owner: str
    private: bool = False
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    discussions: dict[int, Discussion] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)
    granted: set[str] = field(default_factory=set)
    created_at: str = field(default_factory=lambda: now())

    @property
    def pull_requests(self) -> dict[int, Discussion]:
        return {number: one for number, one in self.discussions.items() if one.is_pull_request}

    def files(self, revision: str = "main") -> Tree:
        return self.commits[self.resolve(revision)]

    def seen(self, ref: str = "main") -> list[Tree]:
        """The trees that a ref ever pointed to, in order."""
        return [self.commits[sha] for moved, sha in self.moves if moved == ref]

    def resolve(self, revision: str) -> str:
        """The commit that a revision stands for."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if revision.startswith("refs/pr/"):
            one = self.pull_requests.get(int(revision[8:]) if revision[8:].isdigit() else 0)
            if one and one.head:
                return one.head
        elif name in self.branches:
            return self.branches[name]
        elif name in self.tags:
            return self.tags[name]
        else:
            found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def move(self, ref: str, sha: str) -> None:
        """Let a branch or a pull request's ref point to a commit."""
        if ref.startswith("refs/pr/"):
            self.discussions[int(ref[8:])].head = sha
        else:
            self.branches[ref] = sha
        self.moves.append((ref, sha))

    def add_commit(self, tree: Tree, parent: str | None, title: str, author: str, message: str = "") -> str:
        text = f"{self.name} {parent} {title} {len(self.commits)} {sorted(tree.items())} {secrets.token_hex(8)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.history[sha] = Commit(sha, parent, title, message, author, now())
        self.commits[sha] = dict(tree)
        return sha

    def ancestry(self, sha: str | None) -> list[Commit]:
        """A commit and those before it, the newest first."""
        found = []
        while sha:
            found.append(self.history[sha])
            sha = found[-1].parent
        return found


class Store:
    """Everything that the stand-in keeps.

    Attributes:
        folder: Where the bytes lie.
        repositories: By name; those of datasets are called `datasets/NAMESPACE/NAME`.
        tokens: From a token to what it allows.
        lock: Held by whatever changes a repository.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        for name in ("blobs", "objects", "incoming"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, Access] = {}
        self.names: dict[str, str] = {}
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        for name, user, is_writing in (("alice", "alice", True), ("bob", "bob", True), ("reader", "alice", False)):
            self.add_token(name, Access(user, is_writing))

    def add_token(self, name: str, access: Access, prefix: str = "hf_") -> str:
        token = prefix + secrets.token_urlsafe(24).replace("-", "a").replace("_", "b")
        self.names[name] = token
        self.tokens[token] = access
        return token

    def sign(self, text: str) -> str:
        """What makes an address work without a token."""
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()

    def create(self, name: str, access: Access, private: bool = False) -> Repository:
        repository = Repository(name, name.split("/")[-2], private)
        first = repository.add_commit(
            {".gitattributes": self.add_blob(ATTRIBUTES)}, None, "initial commit", access.user
        )
        repository.move("main", first)
        self.repositories[name] = repository
        return repository

    def find(self, name: str, access: Access | None) -> Repository:
        """A repository that the asker may know of."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not self.owns(repository, access)):
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def find_readable(self, name: str, access: Access | None) -> Repository:
        """A repository whose files the asker may read."""
        repository = self.find(name, access)
        granted = self.owns(repository, access) or (access and access.user in repository.granted)
        if repository.gated and not granted:
            message = f"Access to model {name} is restricted and you are not in the authorized list."
            raise RefusalError(403 if access else 401, message, "GatedRepo")
        return repository

    def owns(self, repository: Repository, access: Access | None) -> bool:
        return bool(access) and access.user == repository.owner and access.only in (None, repository.name)

    def may_write(self, repository: Repository, access: Access | None) -> bool:
        return self.owns(repository, access) and access.is_writing

    def add_blob(self, content: bytes) -> Entry:
        """Keep a regular file."""
        oid = git_oid(content)
        path = self.folder / "blobs" / oid
        if not path.exists():
            path.write_bytes(content)
        return Entry(oid, len(content))

    def path(self, entry: Entry) -> Path:
        return self.folder / ("objects" if entry.sha256 else "blobs") / entry.etag

    def read(self, entry: Entry) -> bytes:
        return self.path(entry).read_bytes()

    def add_object(self, repository: Repository, incoming: Path, sha256: str, size: int) -> None:
        """Keep an LFS object that arrived whole.

        Raises:
            RefusalError: The bytes are not those that were promised.
        """
        if digest(incoming) != sha256 or incoming.stat().st_size != size:
            incoming.unlink()
            raise RefusalError(400, f"The bytes are not those of {sha256}")
        with self.lock:
            incoming.replace(self.folder / "objects" / sha256)
            repository.objects[sha256] = size


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def lfs_entry(sha256: str, size: int) -> Entry:
    return Entry(git_oid(pointer(sha256, size)), size, sha256)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
