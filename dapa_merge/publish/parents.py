"""Parents of a result, with the license, the languages and the task that their own cards state."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from dapa_merge.checkpoint.folder import cached_sha256, read_regular
from dapa_merge.checkpoint.location import Location
from dapa_merge.hub_client import api, ask, hub_errors, is_id
from dapa_merge.publish.options import License, license_in
from dapa_merge.recipe.parse import read_yaml
from dapa_merge.transplant.manifest import CARD_NAME

# Base of the links in a card.
PAGES = "https://huggingface.co"
MAX_CARD_BYTES = 8 << 20
# The figures of hundreds of benchmarks take half of it.
MAX_HEAD_BYTES = 1 << 20
# As the Hub and its client find the head of a card: also after empty lines, and where nothing follows it.
_HEAD_BEGINS = re.compile(r"\s*---\n")
_CACHED = re.compile(r"/models--(?P<id>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})$", re.ASCII)
_HEAD_ENDS = re.compile(r"\n---[ \t]*(\n|\Z)")


@dataclass(frozen=True)
class Parent:
    """A model or adapter that a result was made of, with the facts of its card.

    Attributes:
        role: `target`, `source`, or the adapter of one of them.
        name: Its name in a card: the Hub id, or the folder's name without its path.
        repository: Its id on the Hub; None for a folder outside of huggingface_hub's cache.
        task: The Hub's `pipeline_tag`, as `text-generation`.
        made_of: The base models that its card names.
    """

    role: str
    name: str
    repository: str | None
    commit: str | None
    license: License | None
    languages: tuple[str, ...]
    task: str | None
    made_of: tuple[str, ...] = ()

    @property
    def public_name(self) -> str | None:
        """The Hub id with the commit; None for a folder."""
        if self.repository is None:
            return None
        return f"{self.repository}@{self.commit}" if self.commit else self.repository


def describe_parent(role: str, location: Location) -> Parent:
    """Describe the parent at a location.

    Raises:
        HubError: If the Hub does not answer.
    """
    if os.path.isdir(location.path):
        folder = Path(location.path)
        metadata, address = metadata_of(_read(folder / CARD_NAME)), ""
        name, repository, commit = folder.resolve().name, None, None
        if (cached := cached_place(folder)) is not None:
            repository, commit = cached
            name, address = repository, f"{PAGES}/{repository}/blob/main"
    elif not is_id(location.path):
        # A folder that no longer exists.
        name, repository, commit, metadata, address = Path(location.path).name, None, None, {}, ""
    else:
        name = repository = location.path
        commit, text = _fetched(location)
        metadata = metadata_of(text)
        address = f"{PAGES}/{repository}/blob/main"
    task = metadata.get("pipeline_tag")
    task = task if isinstance(task, str) and re.fullmatch(r"[a-z0-9-]{3,40}", task) else None
    languages, made_of = (_texts(metadata.get(key)) for key in ("language", "base_model"))
    return Parent(role, name, repository, commit, license_in(metadata, address), languages, task, made_of)


def cached_place(folder: Path) -> tuple[str, str] | None:
    """The Hub id and the commit of a folder in huggingface_hub's cache; None for any other folder."""
    place = _CACHED.search(folder.resolve().as_posix())
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    # Without links, which not every system has, whatever is there may have been written over.
    if place is None or not weights or not all(map(cached_sha256, weights)):
        return None
    return place["id"].replace("--", "/", 1), place["commit"]


def metadata_of(card: str) -> dict[str, Any]:
    """The YAML at the head of a model card; empty if absent, not a mapping, or wrong in any way."""
    head, _ = split_card(card)
    try:
        found = read_yaml(head) if head and len(head) <= MAX_HEAD_BYTES else None
    except ValueError:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {}


def split_card(card: str) -> tuple[str, str]:
    """Split a model card into the YAML at its head and the text after it."""
    text = card.replace("\r\n", "\n").removeprefix("\ufeff")
    begin = _HEAD_BEGINS.match(text)
    end = _HEAD_ENDS.search(text, begin.end()) if begin else None
    return (text[begin.end() : end.start()], text[end.end() :]) if begin and end else ("", text)


def _read(path: Path) -> str:
    try:
        return read_regular(path, MAX_CARD_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _fetched(location: Location) -> tuple[str, str]:
    """The commit of a model on the Hub, and its current card, because licenses are sometimes corrected later."""
    info = ask(f"ask the Hub about {location}", lambda: api().model_info(location.path, revision=location.revision))

    def card() -> str:
        try:
            return str(huggingface_hub.hf_hub_download(location.path, CARD_NAME))
        except hub_errors().LocalEntryNotFoundError:
            raise
        except hub_errors().EntryNotFoundError:
            return ""

    path = ask(f"get the card of {location.path}", card)
    return str(info.sha), _read(Path(path)) if path else ""


def _texts(value: object) -> tuple[str, ...]:
    given: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, list) else ()
    return tuple(one for one in given if isinstance(one, str))
