"""What the stand-in for the Hub keeps: tokens, repositories with their commits and refs, and the files' bytes."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

LFS_PATTERNS = "*.bin *.gguf *.h5 *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.pt *.pth *.safetensors *.zip"
SPACE = "[[:space:]]"
TRACKED = " filter=lfs diff=lfs merge=lfs -text"
ATTRIBUTES = "".join(f"{pattern}{TRACKED}\n" for pattern in LFS_PATTERNS.split()).encode()


class RefusalError(Exception):
    """An answer that says no.

    Attributes:
        status: The HTTP status.
        code: X-Error-Code, by which the client knows which error to raise.
        fields: More fields of the body.
    """

    def __init__(self, status: int, message: str, code: str = "", **fields: object):
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


@dataclass(frozen=True)
class Access:
    """A token's owner, and what it allows.

    Attributes:
        is_writing: Whether the token may write at all.
        only: The one repository that a workflow's token may write to.
    """

    user: str
    is_writing: bool = True
    only: str | None = None


@dataclass(frozen=True)
class Entry:
    """A file in a commit.

    Attributes:
        oid: SHA-1 of the git blob; for LFS files, of the pointer.
        sha256: Of an LFS file's content; None for regular files.
    """

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


Tree = dict[str, Entry]


@dataclass(frozen=True)
class Commit:
    """A commit without its files."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str


@dataclass
class PullRequest:
    """A pull request.

    Attributes:
        status: `open` or `merged`.
        base: The commit that it started from.
        head: Its newest commit.
    """

    num: int
    title: str
    author: str
    base: str
    head: str
    status: str = "open"
    created_at: str = field(default_factory=lambda: now())


@dataclass
class Repository:
    """A model repository.

    Attributes:
        commits: From every commit's sha to its files.
        history: From every commit's sha to the rest of it.
        objects: From the SHA-256 of every LFS object that was uploaded or copied here to its size.
        moves: Every (ref, commit) that a reader could ever see, in order.
    """

    name: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def files(self, revision: str = "main") -> Tree:
        return self.commits[self.resolve(revision)]

    def seen(self, ref: str = "main") -> list[Tree]:
        """The trees that a ref ever pointed to, in order."""
        return [self.commits[sha] for moved, sha in self.moves if moved == ref]

    def pull_request(self, ref: str) -> PullRequest | None:
        number = ref.removeprefix("refs/pr/")
        return self.pull_requests.get(int(number)) if number.isdigit() and number != ref else None

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag, a pull request or an abbreviated sha."""
        if pull := self.pull_request(revision):
            return pull.head
        if found := self.branches.get(revision) or self.tags.get(revision):
            return found
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def move(self, ref: str, sha: str) -> None:
        """Let a branch or a pull request point to a commit."""
        if pull := self.pull_request(ref):
            pull.head = sha
        else:
            self.branches[ref] = sha
        self.moves.append((ref, sha))

    def add_commit(self, tree: Tree, parent: str | None, title: str, author: str, message: str = "") -> str:
        sha = hashlib.sha1(secrets.token_bytes(20)).hexdigest()
        self.history[sha] = Commit(sha, parent, title, message, author, now())
        self.commits[sha] = dict(tree)
        return sha


class Store:
    """Everything that the stand-in keeps.

    Attributes:
        folder: Where the bytes lie.
        names: The tokens of `alice` and `bob`, and `reader`: alice's, which cannot write.
        lock: Held while a repository changes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, Access] = {}
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        users = {"alice": Access("alice"), "bob": Access("bob"), "reader": Access("alice", is_writing=False)}
        self.names = {name: self.add_token(access) for name, access in users.items()}

    def add_token(self, access: Access, prefix: str = "hf_") -> str:
        token = prefix + secrets.token_hex(16)
        self.tokens[token] = access
        return token

    def sign(self, text: str) -> str:
        """A signature that makes an address work without a token."""
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()

    def create(self, name: str, private: bool) -> None:
        repository = self.repositories[name] = Repository(name, private)
        tree = {".gitattributes": self.add_blob(ATTRIBUTES)}
        repository.move("main", repository.add_commit(tree, None, "initial commit", repository.owner))

    def find(self, name: str, access: Access | None) -> Repository:
        """A repository that the asker may see."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not owns(repository, access)):
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def add_blob(self, content: bytes) -> Entry:
        """Keep a regular file."""
        entry = Entry(git_oid(content), len(content))
        self._keep(entry, content)
        return entry

    def add_object(self, repository: Repository, content: bytes, sha256: str, size: int) -> None:
        """Keep an LFS object, if its bytes are the promised ones."""
        if hashlib.sha256(content).hexdigest() != sha256 or len(content) != size:
            raise RefusalError(400, f"The bytes are not those of {sha256}")
        self._keep(lfs_entry(sha256, size), content)
        repository.objects[sha256] = size

    def read(self, entry: Entry) -> bytes:
        return self.path(entry).read_bytes()

    def path(self, entry: Entry) -> Path:
        return self.folder / entry.etag

    def _keep(self, entry: Entry, content: bytes) -> None:
        with self.lock:
            # Somebody may be reading it.
            if not self.path(entry).exists():
                self.path(entry).write_bytes(content)


def owns(repository: Repository, access: Access | None) -> bool:
    return access is not None and access.user == repository.owner and access.only in (None, repository.name)


def may_write(repository: Repository, access: Access) -> bool:
    return owns(repository, access) and access.is_writing


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def lfs_entry(sha256: str, size: int) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(git_oid(pointer.encode()), size, sha256)


def is_lfs(attributes: str) -> Callable[[str], bool]:
    """Whether a .gitattributes puts a path into LFS."""
    patterns = [line.split()[0].replace(SPACE, " ") for line in attributes.splitlines() if "filter=lfs" in line]

    def matches(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)

    return matches


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
