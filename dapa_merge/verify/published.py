"""Results on the Hub, read like those of this machine.

What nothing checks is not fetched: hidden files, the models' responses, and weights of other programs.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.hf_api import RepoFile

from dapa_merge.checkpoint.fetch import Snapshot
from dapa_merge.checkpoint.folder import cached_sha256, is_clutter
from dapa_merge.checkpoint.location import parse_location
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.hub_client import Absent, api, ask, check_id
from dapa_merge.plan.selection import BY_CACHE, BY_SHA256
from dapa_merge.transplant.manifest import PRIVATE, is_for_other_programs
from dapa_merge.verify.result import Check


def fetch_result(place: str, name: str | None = None) -> Snapshot:
    """Fetch a result from the Hub, or one file of it.

    Args:
        place: A Hub id, or id@revision.
        name: The file; None for all that `check_published` reads.

    Raises:
        UsageError: If `place` is not a Hub id.
        CheckpointError: If the result lacks that file.
        HubError: If it cannot be fetched, or arrives with other bytes than the Hub's.
    """
    try:
        location = parse_location(place)
    except ValueError:
        location = None
    if location is None or location.adapter is not None:
        raise UsageError(f"{place!r} is not a result: pass a folder, a Hub id or id@revision")
    repository = check_id(location.path)
    what = Absent(repository)
    commit = str(ask(what, lambda: api().model_info(repository, revision=location.revision)).sha)
    tree = ask(what, lambda: list(api().list_repo_tree(repository, recursive=True, revision=commit)))
    known = {item.path: item for item in tree if isinstance(item, RepoFile)}
    if name is not None and name not in known:
        raise CheckpointError(f"{place} has no {name}; name a result that dapa-merge published")
    names = [path for path in known if _is_checked(path)] if name is None else [name]
    patterns = [glob.escape(path) for path in names]
    folder = ask(what, lambda: snapshot_download(repository, revision=commit, allow_patterns=patterns))
    snapshot = Snapshot(repository, commit, Path(folder), frozenset(names), known)
    snapshot.check(names)
    return snapshot


def check_published(place: str, check: Callable[[Path], Check]) -> Check:
    """Check a result on the Hub, and say by what its bytes are the Hub's.

    Args:
        place: A Hub id, or id@revision.
        check: Checks the folder that it is given.

    Raises:
        DapaError: If the result cannot be fetched, or `check` raises it.
    """
    snapshot = fetch_result(place)
    large = [name for name in snapshot.files if snapshot.known[name].lfs is not None]
    by = BY_SHA256 if all(cached_sha256(snapshot.folder / name) for name in large) else BY_CACHE
    found = check(snapshot.folder)
    return replace(found, rests_on={"result": f"{place} at commit {snapshot.commit}, by {by}", **found.rests_on})


def _is_checked(path: str) -> bool:
    return not (is_clutter(path) or path in PRIVATE or is_for_other_programs(path))
