"""How a stand-in for the Hub keeps discussions, and merges pull requests."""

from __future__ import annotations

import secrets

from hub_exchange import REPOSITORY, Answer, Exchange, Route
from hub_store import Access, Discussion, RefusalError, Repository, Tree, now


def event(kind: str, access: Access, data: dict) -> dict:
    author = {"name": access.label}
    return {"id": secrets.token_hex(12), "type": kind, "createdAt": now(), "author": author, "data": data}


def comment_event(access: Access, text: str) -> dict:
    latest = {"raw": text, "html": text, "updatedAt": now(), "author": {"name": access.label}}
    return event("comment", access, {"edited": False, "hidden": False, "latest": latest, "history": [latest]})


def open_discussion(repository: Repository, title: str, access: Access, is_pull_request: bool) -> Discussion:
    number = max(repository.discussions, default=0) + 1
    repository.discussions[number] = Discussion(number, title, access.label, is_pull_request)
    return repository.discussions[number]


def create(exchange: Exchange) -> Answer:
    repository, access, asked = exchange.repository(), exchange.login(), exchange.json()
    if not access.is_writing:
        raise RefusalError(403, "This token may not write")
    if len(asked.get("title", "")) < 3:
        raise RefusalError(400, "A title has at least three characters")
    with exchange.store.lock:
        one = open_discussion(repository, asked["title"], access, bool(asked.get("pullRequest")))
        one.events.append(comment_event(access, asked.get("description", "")))
        if one.is_pull_request:
            one.status, one.base = "draft", repository.branches["main"]
            repository.move(f"refs/pr/{one.num}", one.base)
    url = f"{exchange.hub.endpoint}/{repository.name}/discussions/{one.num}"
    return Answer({"num": one.num, "url": url, "pullRequest": one.is_pull_request})


def describe(repository: Repository, one: Discussion) -> dict:
    kind = repository.name.split("/")[0].removesuffix("s") if repository.name.count("/") == 2 else "model"
    return {
        "num": one.num,
        "title": one.title,
        "status": one.status,
        "author": {"name": one.author},
        "createdAt": one.created_at,
        "isPullRequest": one.is_pull_request,
        "repo": {"name": "/".join(repository.name.split("/")[-2:]), "type": kind},
        "numComments": sum(happened["type"] == "comment" for happened in one.events),
    }


def list_discussions(exchange: Exchange) -> Answer:
    repository, query = exchange.repository(), exchange.query
    kinds = {"discussion": (False,), "pull_request": (True,)}.get(query.get("type", "all"), (False, True))
    open_ones, closed_ones = ("open", "draft"), ("closed", "merged")
    statuses = {"open": open_ones, "closed": closed_ones}.get(query.get("status", "all"), open_ones + closed_ones)
    found = [
        one
        for _, one in sorted(repository.discussions.items(), reverse=True)
        if one.is_pull_request in kinds and one.status in statuses and query.get("author", one.author) == one.author
    ]
    size = min(exchange.hub.page_size, 50)
    start = int(query.get("p", 0)) * size
    page = [describe(repository, one) for one in found[start : start + size]]
    return Answer({"discussions": page, "count": len(found), "start": start})


def find(exchange: Exchange) -> tuple[Repository, Discussion]:
    repository = exchange.repository()
    one = repository.discussions.get(int(exchange.parts[2]))
    if one is None:
        raise RefusalError(404, "Discussion not found")
    return repository, one


def describe_whole(exchange: Exchange) -> Answer:
    repository, one = find(exchange)
    found = {**describe(repository, one), "events": one.events}
    if one.is_pull_request:
        changes = {"base": f"refs/heads/{one.target}"}
        if one.merge_commit:
            changes["mergeCommitId"] = one.merge_commit
        base, head = repository.commits[one.base], repository.commits[one.head]
        paths = sorted(path for path in {*base, *head} if base.get(path) != head.get(path))
        found |= {"changes": changes, "filesWithConflicts": conflicts(repository, one)}
        found["diff"] = "".join(f"diff --git a/{path} b/{path}\n" for path in paths)
    return Answer(found)


def conflicts(repository: Repository, one: Discussion) -> list[str]:
    """The files that were changed both in a pull request and in its target since."""
    if one.status == "merged":
        return []
    base, head, target = (repository.commits[sha] for sha in (one.base, one.head, repository.branches[one.target]))
    return sorted(
        path
        for path in {*base, *head}
        if head.get(path) != base.get(path) and target.get(path) not in (base.get(path), head.get(path))
    )


def comment(exchange: Exchange) -> Answer:
    _, one = find(exchange)
    one.events.append(comment_event(exchange.login(), exchange.json()["comment"]))
    return Answer({"newMessage": one.events[-1]})


def change_status(exchange: Exchange) -> Answer:
    (repository, one), access, asked = find(exchange), exchange.login(), exchange.json()
    if not exchange.store.may_write(repository, access) and one.author != access.user:
        raise RefusalError(403, "Only the author or those who may write can do this")
    if one.status == "merged" or asked.get("status") not in ("open", "closed"):
        raise RefusalError(400, f"Cannot be {asked.get('status')}: it is {one.status}")
    if asked.get("comment"):
        one.events.append(comment_event(access, asked["comment"]))
    one.status = asked["status"]
    one.events.append(event("status-change", access, {"status": one.status}))
    return Answer({"newStatus": one.events[-1]})


def merge(exchange: Exchange) -> Answer:
    repository, asked = exchange.writable(), exchange.json()
    _, one = find(exchange)
    with exchange.store.lock:
        if not one.is_pull_request or one.status != "open":
            raise RefusalError(400, f"Only an open pull request can be merged: it is {one.status}")
        if conflicts(repository, one):
            raise RefusalError(409, f"These files are in conflict: {conflicts(repository, one)}")
        base, head = repository.commits[one.base], repository.commits[one.head]
        parent = repository.branches[one.target]
        tree = merged(base, head, repository.commits[parent])
        one.merge_commit = repository.add_commit(tree, parent, f"{one.title} (#{one.num})", exchange.access.label)
        one.status = "merged"
        if asked and asked.get("comment"):
            one.events.append(comment_event(exchange.access, asked["comment"]))
        one.events.append(event("status-change", exchange.access, {"status": "merged"}))
        repository.move(one.target, one.merge_commit)
    return Answer({})


def merged(base: Tree, head: Tree, target: Tree) -> Tree:
    """The target's files with what changed between the other two."""
    tree = {path: entry for path, entry in target.items() if path not in base or path in head}
    return tree | {path: entry for path, entry in head.items() if base.get(path) != entry}


ROUTES: list[Route] = [
    ("GET", f"{REPOSITORY}/discussions", list_discussions),
    ("POST", f"{REPOSITORY}/discussions", create),
    ("GET", rf"{REPOSITORY}/discussions/(\d+)", describe_whole),
    ("POST", rf"{REPOSITORY}/discussions/(\d+)/comment", comment),
    ("POST", rf"{REPOSITORY}/discussions/(\d+)/status", change_status),
    ("POST", rf"{REPOSITORY}/discussions/(\d+)/merge", merge),
]
