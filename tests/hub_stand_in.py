"""A stand-in for the Hugging Face Hub that speaks its HTTP protocol to an unmodified client, and fails when told to.

It knows models, commits, branches, tags, pull requests, LFS objects, Xet's local store, and the tokens of workflows, as
far as the tests use them; whatever else it is asked is answered with 404.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from hub_card import check_card, metadata
from hub_protocol import Answer, Exchange, Hub, Route, serve_routes
from hub_store import (
    SPACE,
    TRACKED,
    Access,
    Entry,
    PullRequest,
    RefusalError,
    Repository,
    Store,
    Tree,
    is_lfs,
    lfs_entry,
    may_write,
)

LARGEST_REGULAR = 10 << 20
NO_RIGHT = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
REPOSITORY = r"/api/models/([^/]+/[^/]+)"
ROUTES: list[Route] = []


def route(method: str, path: str):
    """The decorated function answers requests whose path the pattern matches whole."""

    def add(act):
        ROUTES.append((method, path, act))
        return act

    return add


# Accounts.


@route("GET", "/api/whoami-v2")
def whoami(exchange: Exchange) -> Answer:
    access = exchange.login()
    role = "write" if access.is_writing else "read"
    token = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
    return Answer({"type": "user", "id": access.user, "name": access.user, "orgs": [], "auth": token})


@route("POST", "/api/validate-yaml")
def validate_yaml(exchange: Exchange) -> Answer:
    errors = check_card(exchange.json()["content"])
    return Answer({"errors": [{"message": one} for one in errors], "warnings": []}, 400 if errors else 200)


@route("GET", "/github/id-token")
def mint_id_token(exchange: Exchange) -> Answer:
    """GitHub's part: the token of a workflow that may ask for it."""
    if exchange.headers.get("Authorization") != f"Bearer {exchange.store.sign('workflow')}":
        raise RefusalError(401, "Not a workflow")
    token = f"eyJ.{secrets.token_hex(16)}.{secrets.token_hex(8)}"
    if exchange.query.get("audience") == exchange.hub.endpoint:
        exchange.hub.id_tokens.add(token)
    return Answer({"count": len(token), "value": token})


@route("POST", "/oauth/token")
def exchange_token(exchange: Exchange) -> Answer:
    """Give a token that may write to one repository for an id token."""
    is_json = exchange.headers.get("Content-Type", "").startswith("application/json")
    asked = exchange.json() if is_json else {key: value[0] for key, value in parse_qs(exchange.body.decode()).items()}
    resource = asked.get("resource")
    known = asked.get("grant_type") == EXCHANGE and asked.get("subject_token") in exchange.hub.id_tokens
    if not known or resource not in exchange.hub.trusted:
        return Answer({"error": "invalid_grant", "error_description": "No trusted publisher matches"}, 400)
    token = exchange.store.add_token(Access(resource.split("/")[0], only=resource), "hf_jwt_")
    kind = "urn:ietf:params:oauth:token-type:access_token"
    return Answer({"access_token": token, "token_type": "bearer", "expires_in": 3600, "issued_token_type": kind})


# Repositories and refs.


def asked_name(exchange: Exchange) -> str:
    asked = exchange.json()
    return f"{asked.get('organization') or exchange.login().user}/{asked['name']}"


@route("POST", "/api/repos/create")
def create(exchange: Exchange) -> Answer:
    access, asked, name = exchange.login(), exchange.json(), asked_name(exchange)
    url = f"{exchange.hub.endpoint}/{name}"
    if access.only or not access.is_writing or name.split("/")[0] != access.user:
        raise RefusalError(403, f"You don't have the rights to create {name}")
    with exchange.store.lock:
        if name in exchange.store.repositories:
            raise RefusalError(409, "You already created this model repo", url=url, name=name, id=name)
        exchange.store.create(name, bool(asked.get("private")) or asked.get("visibility") == "private")
    return Answer({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete(exchange: Exchange) -> Answer:
    repository = exchange.store.find(asked_name(exchange), exchange.access)
    if not may_write(repository, exchange.login()):
        raise RefusalError(403, "You may not delete this repository")
    del exchange.store.repositories[repository.name]
    return Answer({})


@route("GET", rf"{REPOSITORY}(?:/revision/([^/]+))?")
def describe(exchange: Exchange) -> Answer:
    repository = exchange.repository()
    sha = repository.resolve(exchange.parts[1] or "main")
    tree = repository.commits[sha]
    card = metadata(exchange.store.read(tree["README.md"]).decode()) if "README.md" in tree else {}
    siblings = [{"rfilename": path, "blobId": entry.oid, "size": entry.size} for path, entry in sorted(tree.items())]
    found = {"id": repository.name, "sha": sha, "private": repository.private, "gated": False, "siblings": siblings}
    return Answer({**found, "author": repository.owner, "tags": card.get("tags", []), "cardData": card or None})


@route("GET", rf"{REPOSITORY}/auth-check(/write)?")
def check_access(exchange: Exchange) -> Answer:
    exchange.writable() if exchange.parts[1] else exchange.repository()
    return Answer({})


@route("GET", f"{REPOSITORY}/refs")
def list_refs(exchange: Exchange) -> Answer:
    repository = exchange.repository()

    def named(refs: dict[str, str], prefix: str) -> list[dict]:
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

    branches, tags = named(repository.branches, "refs/heads/"), named(repository.tags, "refs/tags/")
    return Answer({"branches": branches, "converts": [], "tags": tags})


@route("POST", f"{REPOSITORY}/branch/([^/]+)")
def create_branch(exchange: Exchange) -> Answer:
    repository, name = exchange.writable(), exchange.parts[1]
    with exchange.store.lock:
        if name in repository.branches:
            raise RefusalError(409, f"Reference already exists: refs/heads/{name}")
        repository.move(name, repository.resolve(exchange.json().get("startingPoint", "main")))
    return Answer({}, 201)


@route("POST", f"{REPOSITORY}/tag/([^/]+)")
def create_tag(exchange: Exchange) -> Answer:
    repository, name = exchange.writable(), exchange.json()["tag"]
    with exchange.store.lock:
        if name in repository.tags:
            raise RefusalError(409, f"Tag already exists: refs/tags/{name}")
        repository.tags[name] = repository.resolve(exchange.parts[1])
    return Answer({}, 201)


@route("GET", f"{REPOSITORY}/commits/([^/]+)")
def list_commits(exchange: Exchange) -> Answer:
    repository, found = exchange.repository(), []
    sha = repository.resolve(exchange.parts[1])
    while sha:
        commit = repository.history[sha]
        one = {"id": sha, "title": commit.title, "message": commit.message, "date": commit.date}
        found.append({**one, "authors": [{"user": commit.author}]})
        sha = commit.parent
    return Answer(found)


# Files.


@route("GET", f"{REPOSITORY}/tree/([^/]+)(/.*)?")
def list_tree(exchange: Exchange) -> Answer:
    tree, under = exchange.repository().files(exchange.parts[1]), exchange.parts[2].strip("/")
    prefix = f"{under}/" if under else ""
    inside = {path for path in tree if path.startswith(prefix)}
    inside |= {path[: match.start()] for path in inside for match in re.finditer("/", path)} - {under}
    if exchange.query.get("recursive", "").lower() not in ("true", "1"):
        inside = {path for path in inside if "/" not in path[len(prefix) :]}
    return Answer([described(exchange.hub, path, tree.get(path)) for path in sorted(inside)])


@route("POST", f"{REPOSITORY}/paths-info/([^/]+)")
def list_paths(exchange: Exchange) -> Answer:
    tree = exchange.repository().files(exchange.parts[1])
    paths = parse_qs(exchange.body.decode()).get("paths", [])
    return Answer([described(exchange.hub, path, tree[path]) for path in paths if path in tree])


def described(hub: Hub, path: str, entry: Entry | None) -> dict:
    if entry is None:
        return {"type": "directory", "oid": "0", "size": 0, "path": path}
    found = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        found["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 122 + len(str(entry.size))}
        if not hub.no_xet_hashes:
            found["xetHash"] = xet_hash(entry.sha256)
    return found


def xet_hash(sha256: str) -> str:
    return hashlib.sha256(f"xet {sha256}".encode()).hexdigest()


@route("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
def resolve(exchange: Exchange) -> Answer:
    """A file, or the range of it that was asked for."""
    repository = exchange.repository()
    sha = repository.resolve(exchange.parts[1])
    entry = repository.commits[sha].get(exchange.parts[2])
    if entry is None:
        return Answer({"error": "Entry not found"}, 404, {"X-Repo-Commit": sha, "X-Error-Code": "EntryNotFound"})
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{entry.etag}"'}
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    content = exchange.store.read(entry)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", exchange.headers.get("Range", ""))
    if not asked:
        return Answer(content, 200, headers)
    start, stop = int(asked[1]), min(int(asked[2] or entry.size) + 1, entry.size)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    return Answer(content[start:stop], 206, headers)


# Commits.


@route("POST", f"{REPOSITORY}/preupload/([^/]+)")
def preupload(exchange: Exchange) -> Answer:
    """Say of each file how it is to be uploaded, and what is in its place."""
    repository, ref = exchange.repository(), exchange.parts[1]
    check_right(exchange, repository)
    asked, tree = exchange.json(), repository.files(ref)
    in_lfs = is_lfs(read_text(exchange.store, tree, ".gitattributes"))
    ignored = asked.get("gitIgnore", read_text(exchange.store, tree, ".gitignore")).split("\n")
    files = []
    for file in asked["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        is_large = in_lfs(path) or file["size"] > LARGEST_REGULAR or is_binary(sample)
        answer = {"path": path, "uploadMode": "lfs" if is_large else "regular"}
        answer["shouldIgnore"] = any(fnmatch.fnmatchcase(path, pattern.strip()) for pattern in ignored)
        files.append({**answer, "oid": tree[path].etag if path in tree else None})
    return Answer({"files": files})


def read_text(store: Store, tree: Tree, path: str) -> str:
    return store.read(tree[path]).decode() if path in tree else ""


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file, which may break off within a character, are not text."""
    try:
        return "\0" in sample.decode()
    except UnicodeDecodeError as error:
        return error.start < len(sample) - 3


def check_right(exchange: Exchange, repository: Repository) -> None:
    """Whoever may write at all may open a pull request."""
    access = exchange.login()
    if not (access.is_writing if exchange.query.get("create_pr") else may_write(repository, access)):
        raise RefusalError(403, NO_RIGHT)


@route("POST", f"{REPOSITORY}/commit/([^/]+)")
def commit(exchange: Exchange) -> Answer:
    """Commit a list of operations, whole or not at all."""
    repository, ref, opens_pull_request = exchange.repository(), exchange.parts[1], exchange.query.get("create_pr")
    check_right(exchange, repository)
    first, *lines = [json.loads(line) for line in exchange.body.splitlines()]
    header = first["value"]
    with exchange.store.lock:
        head, parent = repository.resolve(ref), header.get("parentCommit")
        if opens_pull_request:
            head = repository.resolve(parent) if parent else head
        elif parent and head != parent:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        tree = edit(exchange, repository, lines, repository.commits[head])
        author = "[OIDC]" if exchange.access.only else exchange.access.user
        sha = repository.add_commit(tree, head, header["summary"], author, header.get("description", ""))
        url = f"{exchange.hub.endpoint}/{repository.name}"
        answer = {"success": True, "commitOid": sha, "hookOutput": "", "commitUrl": f"{url}/commit/{sha}"}
        if opens_pull_request:
            pull = PullRequest(len(repository.pull_requests) + 1, header["summary"], author, head, sha)
            repository.pull_requests[pull.num], ref = pull, f"refs/pr/{pull.num}"
            answer["pullRequestUrl"] = f"{url}/discussions/{pull.num}"
        repository.move(ref, sha)
    return Answer(answer)


def edit(exchange: Exchange, repository: Repository, lines: list[dict], tree: Tree) -> Tree:
    """The files after a commit's operations; LFS files that no pattern covers are added to .gitattributes."""
    edited, untracked = dict(tree), []
    attributes = read_text(exchange.store, tree, ".gitattributes")
    for line in lines:
        value, path = line["value"], line["value"]["path"]
        if line["key"] == "file":
            edited[path] = add_regular(exchange.store, path, base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            edited[path] = add_lfs(exchange, repository, value)
            untracked += [] if is_lfs(attributes)(path) else [path]
        elif line["key"] == "deletedFile":
            del edited[path]
        else:
            raise RefusalError(400, f"Not an operation: {line['key']}")
    if untracked:
        attributes += "".join(path.replace(" ", SPACE) + TRACKED + "\n" for path in untracked)
        edited[".gitattributes"] = exchange.store.add_blob(attributes.encode())
    return edited


def add_regular(store: Store, path: str, content: bytes) -> Entry:
    if path == "README.md" and (errors := check_card(content.decode())):
        raise RefusalError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    return store.add_blob(content)


def add_lfs(exchange: Exchange, repository: Repository, value: dict) -> Entry:
    """The entry of an LFS file, whose object has to be in this repository already."""
    if exchange.hub.xet_folder is not None:
        repository.objects.setdefault(value["oid"], value["size"])
    if value["oid"] not in repository.objects:
        raise RefusalError(
            404, f"An LFS pointer pointed to a file that does not exist. Offending file: {value['path']}"
        )
    return lfs_entry(value["oid"], repository.objects[value["oid"]])


# LFS objects.


@route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
def batch(exchange: Exchange) -> Answer:
    """Say where each object is to be put, if it is not there yet."""
    # To open a pull request takes no right to any branch.
    if not exchange.login().is_writing:
        raise RefusalError(403, "You have read access but not the required permissions for this operation")
    repository, asked = exchange.repository(), exchange.json()
    return Answer({"transfer": "basic", "objects": [place(exchange, repository, one) for one in asked["objects"]]})


def place(exchange: Exchange, repository: Repository, one: dict) -> dict:
    oid, size = one["oid"], one["size"]
    if oid in repository.objects:
        return {"oid": oid, "size": size}
    path, query = f"/lfs/objects/{oid}", {"repository": repository.name, "size": size}
    signature = exchange.store.sign(f"{path} {repository.name} {size}")
    href = f"{exchange.hub.endpoint}{path}?{urlencode({**query, 'signature': signature})}"
    verify = f"{exchange.hub.endpoint}/{repository.name}.git/info/lfs/objects/verify"
    return {"oid": oid, "size": size, "actions": {"upload": {"href": href}, "verify": {"href": verify}}}


@route("PUT", "/lfs/objects/([0-9a-f]{64})")
def put_object(exchange: Exchange) -> Answer:
    oid, name, size = exchange.parts[0], exchange.query["repository"], exchange.query["size"]
    if exchange.query.get("signature") != exchange.store.sign(f"{exchange.path} {name} {size}"):
        raise RefusalError(403, "The signature does not match")
    exchange.store.add_object(exchange.store.repositories[name], exchange.body, oid, int(size))
    return Answer(b"")


@route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify")
def verify(exchange: Exchange) -> Answer:
    asked = exchange.json()
    if exchange.repository().objects.get(asked["oid"]) != asked["size"]:
        raise RefusalError(404, "The object is not there")
    return Answer({})


@route("POST", f"{REPOSITORY}/lfs-files/duplicate")
def duplicate(exchange: Exchange) -> Answer:
    """Let the objects of a repository count as in another one's store too."""
    if exchange.hub.no_duplication:
        raise RefusalError(404, "Not found")
    source, asked, failed = exchange.repository(), exchange.json(), []
    target = exchange.store.find(asked["target"]["name"], exchange.access)
    if not may_write(target, exchange.login()):
        raise RefusalError(403, "You have read access but not the required permissions for this operation")
    for file in asked["files"]:
        oid = file["sha256"]
        is_refused = file.get("filename") in exchange.hub.refused_duplicates
        if is_refused or oid not in source.objects or file["xetHash"] != xet_hash(oid):
            failed.append({"sha256": oid, "error": "File could not be duplicated"})
        else:
            target.objects[oid] = source.objects[oid]
    total = len(asked["files"])
    found = {"success": not failed, "processed": total, "succeeded": total - len(failed), "failed": failed}
    return Answer(found)


@route("GET", f"{REPOSITORY}/xet-write-token/([^/]+)")
def xet_token(exchange: Exchange) -> Answer:
    exchange.writable()
    address = f"local://{exchange.hub.xet_folder}"
    return Answer({"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": address})


# Pull requests.


@route("GET", f"{REPOSITORY}/discussions")
def list_discussions(exchange: Exchange) -> Answer:
    repository, query = exchange.repository(), exchange.query
    statuses = {"open": ("open",), "closed": ("merged",)}.get(query.get("status", ""), ("open", "merged"))
    found = [
        {
            "num": pull.num,
            "title": pull.title,
            "status": pull.status,
            "author": {"name": pull.author},
            "createdAt": pull.created_at,
            "isPullRequest": True,
            "repo": {"name": repository.name, "type": "model"},
        }
        for pull in reversed(repository.pull_requests.values())
        if query.get("type") != "discussion" and pull.status in statuses
        if query.get("author", pull.author) == pull.author
    ]
    return Answer({"discussions": found, "count": len(found), "start": 0})


@route("POST", rf"{REPOSITORY}/discussions/(\d+)/merge")
def merge(exchange: Exchange) -> Answer:
    repository = exchange.writable()
    with exchange.store.lock:
        pull = repository.pull_requests[int(exchange.parts[1])]
        base, head, parent = (repository.commits[pull.base], repository.commits[pull.head], repository.branches["main"])
        tree = {path: entry for path, entry in repository.commits[parent].items() if path not in base or path in head}
        tree |= {path: entry for path, entry in head.items() if base.get(path) != entry}
        pull.status = "merged"
        repository.move(
            "main", repository.add_commit(tree, parent, f"{pull.title} (#{pull.num})", exchange.access.user)
        )
    return Answer({})


serve = functools.partial(serve_routes, routes=ROUTES)


@dataclass
class OtherHub:
    """Another server that speaks for the Hub, which cannot be told to fail."""

    endpoint: str
    namespace: str
    secret: str

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
