"""How a stand-in for the Hub makes repositories and refs, and says what is in them."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import parse_qs

from hub_card import metadata
from hub_exchange import REPOSITORY, Answer, Exchange, Route
from hub_store import Entry, RefusalError, Repository, Tree

ID = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?", re.ASCII)


def asked_name(exchange: Exchange, asked: dict) -> str:
    kind = asked.get("type") or "model"
    name = f"{asked.get('organization') or exchange.login().user}/{asked.get('name')}"
    return name if kind == "model" else f"{kind}s/{name}"


def create(exchange: Exchange) -> Answer:
    access, asked = exchange.login(), exchange.json()
    name = asked_name(exchange, asked)
    namespace, own = name.split("/")[-2:]
    url = f"{exchange.hub.endpoint}/{name}"
    if access.only:
        raise RefusalError(401, "This token may not create repositories")
    if namespace != access.user or not access.is_writing:
        raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if not ID.fullmatch(own) or own.endswith(".git"):
        raise RefusalError(400, f"Not a name for a repository: {own}")
    with exchange.store.lock:
        if name in exchange.store.repositories:
            kind = asked.get("type") or "model"
            raise RefusalError(409, f"You already created this {kind} repo", url=url, name=name, id=name)
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        exchange.store.create(name, access, is_private)
    return Answer({"url": url, "name": name, "id": name})


def delete(exchange: Exchange) -> Answer:
    name = asked_name(exchange, exchange.json())
    repository = exchange.store.find(name, exchange.access)
    if not exchange.store.may_write(repository, exchange.access) or exchange.access.only:
        raise RefusalError(403, "You may not delete this repository")
    del exchange.store.repositories[name]
    return Answer({})


def change_settings(exchange: Exchange) -> Answer:
    repository, asked = exchange.writable(), exchange.json()
    repository.gated = asked.get("gated", repository.gated)
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    return Answer({"private": repository.private, "gated": repository.gated})


def describe(exchange: Exchange) -> Answer:
    repository = exchange.repository()
    sha = repository.resolve(exchange.parts[2] if len(exchange.parts) > 2 else "main")
    tree = repository.commits[sha]
    has_blobs = is_true(exchange.query.get("blobs"))
    siblings = [
        {"rfilename": path, **(described_blob(entry) if has_blobs else {})} for path, entry in sorted(tree.items())
    ]
    card = metadata(exchange.store.read(tree["README.md"]).decode(errors="replace")) if "README.md" in tree else {}
    tags = [*card["tags"]] if isinstance(card.get("tags"), list) else []
    name = repository.name.removeprefix("datasets/").removeprefix("spaces/")
    answer = {
        "_id": hashlib.sha1(repository.name.encode()).hexdigest()[:24],
        "id": name,
        "modelId": name,
        "author": repository.owner,
        "sha": sha,
        "lastModified": repository.history[sha].date,
        "createdAt": repository.created_at,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "siblings": siblings,
        "cardData": card or None,
        "usedStorage": sum(repository.objects.values()),
    }
    return Answer(answer)


def described_blob(entry: Entry) -> dict:
    described = {"blobId": entry.oid, "size": entry.size}
    if entry.sha256:
        described["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
    return described


def pointer_size(entry: Entry) -> int:
    return 122 + len(str(entry.size))


def check_access(exchange: Exchange) -> Answer:
    if len(exchange.parts) > 2 and exchange.parts[2]:
        exchange.writable()
    exchange.store.find_readable(exchange.name, exchange.access)
    return Answer({})


def list_refs(exchange: Exchange) -> Answer:
    repository = exchange.repository()
    refs = {
        "branches": named(repository.branches, "refs/heads/"),
        "converts": [],
        "tags": named(repository.tags, "refs/tags/"),
    }
    if exchange.query.get("include_prs"):
        pulls = {str(number): one.head for number, one in repository.pull_requests.items()}
        refs["pullRequests"] = named(pulls, "refs/pr/")
    return Answer(refs)


def named(refs: dict[str, str], prefix: str) -> list[dict]:
    return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]


def create_branch(exchange: Exchange) -> Answer:
    repository, name = exchange.writable(), exchange.parts[2]
    start = exchange.json().get("startingPoint", "main")
    with exchange.store.lock:
        if name in repository.branches:
            raise RefusalError(409, f"Reference already exists: refs/heads/{name}")
        repository.move(name, repository.resolve(start))
    return Answer({}, 201)


def delete_branch(exchange: Exchange) -> Answer:
    repository, name = exchange.writable(), exchange.parts[2]
    if name == "main":
        raise RefusalError(403, "Cannot delete branch main")
    if repository.branches.pop(name, None) is None:
        raise RefusalError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer({})


def create_tag(exchange: Exchange) -> Answer:
    repository, asked = exchange.writable(), exchange.json()
    with exchange.store.lock:
        if asked["tag"] in repository.tags:
            raise RefusalError(409, f"Tag already exists: refs/tags/{asked['tag']}")
        repository.tags[asked["tag"]] = repository.resolve(exchange.parts[2])
    return Answer({}, 201)


def delete_tag(exchange: Exchange) -> Answer:
    repository, name = exchange.writable(), exchange.parts[2]
    if repository.tags.pop(name, None) is None:
        raise RefusalError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer({})


def list_commits(exchange: Exchange) -> Answer:
    repository = exchange.repository()
    found = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": ""}],
            "date": commit.date,
        }
        for commit in repository.ancestry(repository.resolve(exchange.parts[2]))
    ]
    return exchange.page(found, min(exchange.hub.page_size, 50))


def list_tree(exchange: Exchange) -> Answer:
    repository = exchange.repository()
    sha, under = repository.resolve(exchange.parts[2]), exchange.parts[3].strip("/")
    tree = repository.commits[sha]
    prefix = f"{under}/" if under else ""
    inside = {path: entry for path, entry in tree.items() if path.startswith(prefix)}
    if under and not inside:
        raise RefusalError(404, f"{under} does not exist on {exchange.parts[2]}", "EntryNotFound")
    folders = {path[: match.start()] for path in inside for match in re.finditer("/", path)} - {under}
    paths = [path for path in {*inside, *folders} if path.startswith(prefix)]
    if not is_true(exchange.query.get("recursive")):
        paths = [path for path in paths if "/" not in path[len(prefix) :]]
    is_expanded = is_true(exchange.query.get("expand"))
    size = min(exchange.hub.page_size, 50) if is_expanded else exchange.hub.page_size
    return exchange.page([described(exchange, repository, sha, path, is_expanded) for path in sorted(paths)], size)


def list_paths(exchange: Exchange) -> Answer:
    repository, body = exchange.repository(), exchange.body().decode()
    if exchange.headers.get("Content-Type", "").startswith("application/json"):
        asked = json.loads(body)
        paths, is_expanded = asked.get("paths", []), is_true(asked.get("expand"))
    else:
        form = parse_qs(body)
        paths, is_expanded = form.get("paths", []), is_true(form.get("expand", [""])[0])
    sha = repository.resolve(exchange.parts[2])
    tree = repository.commits[sha]
    there = [path for path in paths if path in tree or any(name.startswith(f"{path}/") for name in tree)]
    return Answer([described(exchange, repository, sha, path, is_expanded) for path in there])


def described(exchange: Exchange, repository: Repository, sha: str, path: str, is_expanded: bool) -> dict:
    tree = repository.commits[sha]
    entry = tree.get(path)
    if entry is None:
        found = {"type": "directory", "oid": folder_oid(tree, path), "size": 0, "path": path}
    else:
        found = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
        if entry.sha256:
            found["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
            if not exchange.hub.no_xet_hashes:
                found["xetHash"] = entry.xet_hash
    if is_expanded:
        commits = repository.ancestry(sha)
        last = next(
            commit
            for commit in commits
            if commit.parent is None
            or folder_oid(repository.commits[commit.parent], path) != folder_oid(repository.commits[commit.sha], path)
        )
        found["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        if entry:
            found["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return found


def folder_oid(tree: Tree, path: str) -> str:
    """What names the state of a file or of a folder."""
    inside = sorted((name, entry.oid) for name, entry in tree.items() if f"{name}/".startswith(f"{path}/"))
    return hashlib.sha1(repr(inside).encode()).hexdigest()


def is_true(value: object) -> bool:
    return str(value).lower() in ("true", "1")


ROUTES: list[Route] = [
    ("POST", "/api/repos/create", create),
    ("DELETE", "/api/repos/delete", delete),
    ("PUT", f"{REPOSITORY}/settings", change_settings),
    ("GET", REPOSITORY, describe),
    ("GET", f"{REPOSITORY}/revision/([^/]+)", describe),
    ("GET", f"{REPOSITORY}/auth-check(/write)?", check_access),
    ("GET", f"{REPOSITORY}/refs", list_refs),
    ("POST", f"{REPOSITORY}/branch/([^/]+)", create_branch),
    ("DELETE", f"{REPOSITORY}/branch/([^/]+)", delete_branch),
    ("POST", f"{REPOSITORY}/tag/([^/]+)", create_tag),
    ("DELETE", f"{REPOSITORY}/tag/([^/]+)", delete_tag),
    ("GET", f"{REPOSITORY}/commits/([^/]+)", list_commits),
    ("GET", f"{REPOSITORY}/tree/([^/]+)(/.*)?", list_tree),
    ("POST", f"{REPOSITORY}/paths-info/([^/]+)", list_paths),
]
