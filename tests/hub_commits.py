"""How a stand-in for the Hub takes commits, whole or not at all."""

from __future__ import annotations

import base64
import fnmatch
import json

from hub_card import check_card
from hub_discussions import event, open_discussion
from hub_exchange import REPOSITORY, Answer, Exchange, Route
from hub_git import SPACE, TRACKED, is_lfs
from hub_store import RefusalError, Repository, Store, Tree, lfs_entry

LARGEST_REGULAR = 10 << 20
NO_RIGHT = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"


def preupload(exchange: Exchange) -> Answer:
    """Say of each file how it is to be uploaded, and what is in its place."""
    repository = exchange.repository()
    if not exchange.query.get("create_pr"):
        check_right(exchange, repository, exchange.parts[2])
    elif not exchange.login().is_writing:
        raise RefusalError(403, NO_RIGHT)
    asked, tree = exchange.json(), repository.files(exchange.parts[2])
    in_lfs = is_lfs(read_text(exchange.store, tree, ".gitattributes").encode())
    ignored = asked.get("gitIgnore", read_text(exchange.store, tree, ".gitignore")).split("\n")
    files = []
    for file in asked["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        is_large = in_lfs(path) or file["size"] > LARGEST_REGULAR or is_binary(sample)
        files.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_large else "regular",
                "shouldIgnore": is_ignored(path, ignored),
                "oid": tree[path].etag if path in tree else None,
            }
        )
    return Answer({"files": files})


def read_text(store: Store, tree: Tree, path: str) -> str:
    return store.read(tree[path]).decode() if path in tree else ""


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are no text, which may break off within a character."""
    try:
        return "\0" in sample.decode()
    except UnicodeDecodeError as error:
        return error.start < len(sample) - 3


def is_ignored(path: str, patterns: list[str]) -> bool:
    names = path.split("/")
    return any(
        fnmatch.fnmatchcase(name, pattern.strip().strip("/"))
        for pattern in patterns
        if pattern.strip() and not pattern.startswith(("#", "!"))
        for name in (path, *names)
    )


def check_right(exchange: Exchange, repository: Repository, ref: str) -> None:
    """Let only those commit who may: to a pull request, also its author."""
    access = exchange.login()
    pull = repository.pull_requests.get(int(ref[8:])) if ref.startswith("refs/pr/") and ref[8:].isdigit() else None
    if not exchange.store.may_write(repository, access) and not (
        pull and access.is_writing and not access.only and pull.author == access.user
    ):
        raise RefusalError(403, NO_RIGHT)


def commit(exchange: Exchange) -> Answer:
    repository, ref = exchange.repository(), exchange.parts[2].removeprefix("refs/heads/")
    creates_pull_request = bool(exchange.query.get("create_pr"))
    if not creates_pull_request:
        check_right(exchange, repository, ref)
    elif not exchange.login().is_writing:
        raise RefusalError(403, NO_RIGHT)
    lines = [json.loads(line) for line in exchange.body().splitlines() if line.strip()]
    if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
        raise RefusalError(400, "A commit begins with a header that has a summary")
    header = lines[0]["value"]
    with exchange.store.lock:
        head = repository.resolve(ref)
        if ref not in repository.branches and not ref.startswith("refs/pr/"):
            raise RefusalError(400, f"Not a branch: {ref}")
        parent = header.get("parentCommit")
        if creates_pull_request:
            head = repository.resolve(parent) if parent else head
        elif parent and not head.startswith(parent):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        tree = edit(exchange, repository, lines[1:], repository.commits[head])
        author = exchange.access.label
        sha = repository.add_commit(tree, head, header["summary"], author, header.get("description", ""))
        answer = {"success": True, "commitOid": sha, "hookOutput": ""}
        answer["commitUrl"] = f"{exchange.hub.endpoint}/{repository.name}/commit/{sha}"
        if creates_pull_request:
            pull = open_discussion(repository, header["summary"], exchange.access, is_pull_request=True)
            pull.target, pull.base, ref = ref, head, f"refs/pr/{pull.num}"
            answer["pullRequestUrl"] = f"{exchange.hub.endpoint}/{repository.name}/discussions/{pull.num}"
        if ref.startswith("refs/pr/"):
            data = {"subject": header["summary"], "oid": sha}
            repository.discussions[int(ref[8:])].events.append(event("commit", exchange.access, data))
        repository.move(ref, sha)
    return Answer(answer)


def edit(exchange: Exchange, repository: Repository, lines: list[dict], tree: Tree) -> Tree:
    """The files after a commit's operations."""
    edited, added = dict(tree), []
    for line in lines:
        key, value = line["key"], line["value"]
        path = value["path"].strip("/")
        if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise RefusalError(400, f"Not a path: {path}")
        if key == "file":
            edited[path] = add_regular(exchange.store, path, value)
        elif key == "lfsFile":
            edited[path] = add_lfs(exchange, repository, value)
            added.append(path)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in edited if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))]
            if not gone:
                raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del edited[name]
        else:
            raise RefusalError(400, f"Not an operation: {key}")
    return track(exchange, edited, added)


def add_regular(store: Store, path: str, value: dict):
    content = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
    if len(content) > LARGEST_REGULAR:
        raise RefusalError(400, f"Files larger than 10 MiB have to be in LFS: {path}")
    if path == "README.md" and (errors := check_card(content.decode(errors="replace"))[0]):
        raise RefusalError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    return store.add_blob(content)


def add_lfs(exchange: Exchange, repository: Repository, value: dict):
    """The entry of an LFS file, whose object has to be in this repository already."""
    if exchange.hub.xet_folder is not None and "size" in value:
        repository.objects.setdefault(value["oid"], value["size"])
    size = repository.objects.get(value["oid"])
    if size is None:
        message = "An LFS pointer pointed to a file that does not exist. Offending file: - "
        raise RefusalError(exchange.hub.missing_object_status, message + value["path"])
    if value.get("size", size) != size:
        raise RefusalError(400, f"{value['path']} is not of {value['size']} bytes")
    return lfs_entry(value["oid"], size)


def track(exchange: Exchange, tree: Tree, added: list[str]) -> Tree:
    """Name those LFS files in .gitattributes that it does not cover yet."""
    text = read_text(exchange.store, tree, ".gitattributes")
    in_lfs = is_lfs(text.encode())
    lines = [path.replace(" ", SPACE) + TRACKED + "\n" for path in added if not in_lfs(path)]
    if lines and exchange.hub.tracks_lfs:
        start = text if not text or text.endswith("\n") else text + "\n"
        tree[".gitattributes"] = exchange.store.add_blob((start + "".join(lines)).encode())
    return tree


ROUTES: list[Route] = [
    ("POST", f"{REPOSITORY}/preupload/([^/]+)", preupload),
    ("POST", f"{REPOSITORY}/commit/([^/]+)", commit),
]
