"""How a stand-in for the Hub takes LFS objects, and serves files."""

from __future__ import annotations

import hashlib
import re
import time
from urllib.parse import urlencode

from hub_exchange import REPOSITORY, Answer, Exchange, Route
from hub_store import Entry, RefusalError, Repository

ANY = r"((?:(?:datasets|spaces)/)?[^/]+/[^/]+)"
OID = re.compile("[0-9a-f]{64}")


def batch(exchange: Exchange) -> Answer:
    """Say where each object is to be put, if it is not there yet."""
    asked = exchange.json()
    repository = exchange.store.find(exchange.parts[0], exchange.access)
    access = exchange.login()
    # Who opens a pull request uploads first, and has no right to any branch.
    is_allowed = access.is_writing and not access.only if "ref" not in asked else False
    if (
        not is_allowed
        and not exchange.store.may_write(repository, access)
        and not is_own_pull(repository, asked, access)
    ):
        raise RefusalError(403, "You have read access but not the required permissions for this operation")
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise RefusalError(400, "Only uploads, by SHA-256")
    objects = [place(exchange, repository, one, asked.get("transfers", ["basic"])) for one in asked["objects"]]
    return Answer({"transfer": "basic", "objects": objects})


def is_own_pull(repository: Repository, asked: dict, access) -> bool:
    number = asked.get("ref", {}).get("name", "").removeprefix("refs/pr/")
    pull = repository.pull_requests.get(int(number)) if number.isdigit() else None
    return bool(pull) and access.is_writing and pull.author == access.user


def place(exchange: Exchange, repository: Repository, one: dict, transfers: list[str]) -> dict:
    oid, size = one["oid"], one["size"]
    if not OID.fullmatch(oid) or not size:
        return {"oid": oid, "size": size, "error": {"code": 422, "message": "Not an object"}}
    if oid in repository.objects:
        return {"oid": oid, "size": size}
    endpoint, part_size = exchange.hub.endpoint, exchange.hub.multipart_over

    def signed(path: str) -> str:
        query = {"repository": repository.name, "size": size}
        return f"{endpoint}{path}?{urlencode({**query, 'signature': sign(exchange, path, query)})}"

    upload: dict = {"href": signed(f"/lfs/objects/{oid}")}
    if size > part_size and "multipart" in transfers:
        numbers = range(1, -(-size // part_size) + 1)
        parts = {str(number): signed(f"/lfs/parts/{oid}/{number}") for number in numbers}
        upload = {"href": signed(f"/lfs/complete/{oid}"), "header": {"chunk_size": str(part_size), **parts}}
    verify = {"href": f"{endpoint}/{repository.name}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def sign(exchange: Exchange, path: str, query: dict) -> str:
    return exchange.store.sign(f"{path} {query['repository']} {query['size']}")


def promised(exchange: Exchange) -> tuple[Repository, str, int]:
    """The repository, SHA-256 and size that a signed address is for."""
    if exchange.query.get("signature") != sign(exchange, exchange.path.partition("?")[0], exchange.query):
        raise RefusalError(403, "The signature does not match")
    return exchange.store.repositories[exchange.query["repository"]], exchange.parts[0], int(exchange.query["size"])


def put_object(exchange: Exchange) -> Answer:
    repository, oid, size = promised(exchange)
    exchange.store.add_object(repository, exchange.receive(), oid, size)
    return Answer(b"", headers={"ETag": f'"{oid[:32]}"'})


def put_part(exchange: Exchange) -> Answer:
    repository, oid, _ = promised(exchange)
    incoming = exchange.receive()
    etag = hashlib.md5(incoming.read_bytes()).hexdigest()
    incoming.replace(part_path(exchange, repository, oid, int(exchange.parts[1])))
    return Answer(b"", headers={"ETag": f'"{etag}"'})


def part_path(exchange: Exchange, repository: Repository, oid: str, number: int):
    upload = hashlib.sha1(f"{repository.name} {oid}".encode()).hexdigest()
    return exchange.store.folder / "incoming" / f"{upload}.{number}"


def complete(exchange: Exchange) -> Answer:
    """Join the parts of an object."""
    repository, oid, size = promised(exchange)
    asked = exchange.json()
    if oid in repository.objects:
        return Answer({})
    paths = [part_path(exchange, repository, oid, part["partNumber"]) for part in asked["parts"]]
    contents = [path.read_bytes() if path.exists() else b"" for path in paths]
    for part, content in zip(asked["parts"], contents, strict=True):
        if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
            raise RefusalError(400, f"Part {part['partNumber']} is not the one that arrived")
    with exchange.store.lock:
        whole = exchange.store.folder / "incoming" / f"{oid}.whole"
        whole.write_bytes(b"".join(contents))
        exchange.store.add_object(repository, whole, oid, size)
    return Answer({})


def verify(exchange: Exchange) -> Answer:
    asked = exchange.json()
    repository = exchange.store.find(exchange.parts[0], exchange.access)
    exchange.login()
    if repository.objects.get(asked.get("oid")) != asked.get("size"):
        raise RefusalError(404, "The object is not there")
    return Answer({})


def duplicate(exchange: Exchange) -> Answer:
    """Let the objects of a repository count as in another one's store too."""
    if exchange.hub.no_duplication:
        raise RefusalError(404, "Not found")
    source = exchange.store.find_readable(exchange.name, exchange.access)
    exchange.login()
    asked = exchange.json()
    kind, name = asked["target"]["type"], asked["target"]["name"]
    target = exchange.store.find(name if kind == "model" else f"{kind}s/{name}", exchange.access)
    if not exchange.store.may_write(target, exchange.access):
        raise RefusalError(403, "You have read access but not the required permissions for this operation")
    failed = []
    with exchange.store.lock:
        for file in asked["files"]:
            oid = file["sha256"]
            is_refused = {oid, file.get("filename")} & exchange.hub.refused_duplicates
            if is_refused or oid not in source.objects or file.get("xetHash") != Entry("", 0, oid).xet_hash:
                failed.append({"sha256": oid, "error": "File could not be duplicated"})
            else:
                target.objects[oid] = source.objects[oid]
    total = len(asked["files"])
    said = {"success": not failed, "processed": total, "succeeded": total - len(failed), "failed": failed}
    return Answer(said)


def resolve(exchange: Exchange) -> Answer:
    name, revision, path = exchange.parts
    repository = exchange.store.find_readable(name, exchange.access)
    sha = repository.resolve(revision)
    entry = repository.commits[sha].get(path)
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if entry is None:
        refusal = RefusalError(404, "Entry not found", "EntryNotFound")
        refusal.headers = headers
        raise refusal
    headers["ETag"] = f'"{entry.etag}"'
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
        if exchange.hub.has_cdn:
            address = f"/cdn/{entry.sha256}"
            other_name = exchange.hub.endpoint.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{other_name}{address}?signature={exchange.store.sign(address)}"
            return Answer(b"", 302, headers)
    return part_of(exchange, entry, headers)


def serve_object(exchange: Exchange) -> Answer:
    """An LFS object at the address that a redirection named."""
    path, _, _ = exchange.path.partition("?")
    if exchange.query.get("signature") != exchange.store.sign(path):
        raise RefusalError(403, "The signature does not match")
    entry = Entry("", (exchange.store.folder / "objects" / exchange.parts[0]).stat().st_size, exchange.parts[0])
    return part_of(exchange, entry, {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"})


def part_of(exchange: Exchange, entry: Entry, headers: dict[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    start, stop, status, size = 0, entry.size, 200, entry.size
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", exchange.headers.get("Range", ""))
    if asked and any(asked.groups()):
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return Answer({"error": "Range not satisfiable"}, 416, {**headers, "Content-Range": f"bytes */{size}"})
        status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
    return Answer(None, status, headers, exchange.store.path(entry), start, stop)


def xet_token(exchange: Exchange) -> Answer:
    """Where Xet uploads to, and what with."""
    repository = exchange.store.find(exchange.name, exchange.access)
    if exchange.hub.xet_folder is None or not exchange.store.may_write(repository, exchange.login()):
        raise RefusalError(403, "No Xet here")
    address = f"local://{exchange.hub.xet_folder}"
    return Answer({"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": address})


ROUTES: list[Route] = [
    ("GET", f"{REPOSITORY}/xet-write-token/([^/]+)", xet_token),
    ("POST", rf"/{ANY}\.git/info/lfs/objects/batch", batch),
    ("POST", rf"/{ANY}\.git/info/lfs/objects/verify", verify),
    ("PUT", "/lfs/objects/([0-9a-f]{64})", put_object),
    ("PUT", r"/lfs/parts/([0-9a-f]{64})/(\d+)", put_part),
    ("POST", "/lfs/complete/([0-9a-f]{64})", complete),
    ("POST", f"{REPOSITORY}/lfs-files/duplicate", duplicate),
    ("GET", f"/{ANY}/resolve/([^/]+)/(.+)", resolve),
    ("GET", "/cdn/([0-9a-f]{64})", serve_object),
]
