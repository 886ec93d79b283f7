"""What a model's own card says of it: the license, the languages and the task that a result inherits.

The license that a model inherits from those that it was made of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dapa_merge.checkpoint.folder import read_regular
from dapa_merge.checkpoint.location import Location
from dapa_merge.errors import UsageError
from dapa_merge.hub_client import api, ask, is_id
from dapa_merge.transplant.manifest import CARD_NAME

# Where the links of a card lead.
PAGES = "https://huggingface.co"
MAX_CARD_BYTES = 8 << 20


@dataclass(frozen=True)
class Parent:
    """A model, or an adapter, that a result was made of.

    Attributes:
        role: `target`, `source`, or the adapter of one of them.
        name: What to call it in a card: the Hub id, or the folder's own name, without the path to it.
        repository: Its id on the Hub; None if it is a folder here.
        commit: Its commit on the Hub, if that is known.
        license: What its card states.
        languages: What its card states.
        task: What its card states, as `text-generation`.
    """

    role: str
    name: str
    repository: str | None
    commit: str | None
    license: License | None
    languages: tuple[str, ...]
    task: str | None

    @property
    def place(self) -> str | None:
        """Where anybody finds it; None for a folder."""
        if self.repository is None:
            return None
        return f"{self.repository}@{self.commit}" if self.commit else self.repository


def describe_parent(role: str, location: Location) -> Parent:
    """A parent from its location, whose revision is the commit if it is on the Hub.

    Raises:
        HubError: If the Hub cannot be asked.
    """
    if os.path.isdir(location.path):
        folder = Path(location.path)
        metadata, place = metadata_of(_read(folder / CARD_NAME)), ""
        name, repository, commit = folder.resolve().name, None, None
    elif not is_id(location.path):
        # A folder that is gone.
        name, repository, commit, metadata, place = Path(location.path).name, None, None, {}, ""
    else:
        name = repository = location.path
        commit, text = _fetched(location)
        metadata = metadata_of(text)
        place = f"{PAGES}/{repository}/blob/main"
    task = metadata.get("pipeline_tag")
    task = task if isinstance(task, str) and re.fullmatch(r"[a-z0-9-]{3,40}", task) else None
    return Parent(
        role,
        name,
        repository,
        commit,
        license_in(metadata, place),
        _languages(metadata.get("language")),
        task,
    )


def metadata_of(card: str) -> dict[str, Any]:
    """The YAML at the head of a model card; empty if there is none, or none that is a mapping."""
    head, _ = split_card(card)
    try:
        found = yaml.safe_load(head) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def split_card(card: str) -> tuple[str, str]:
    """The YAML at the head of a model card, and what follows it."""
    text = card.replace("\r\n", "\n").removeprefix("\ufeff")
    if not text.startswith("---\n"):
        return "", text
    head, end, body = text[4:].partition("\n---\n")
    return (head, body) if end else ("", text)


def _read(path: Path) -> str:
    try:
        return read_regular(path, MAX_CARD_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _fetched(location: Location) -> tuple[str, str]:
    """The commit of a model on the Hub, and its card as it is now: a license is corrected afterwards at times."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    info = ask(f"ask the Hub about {location}", lambda: api().model_info(location.path, revision=location.revision))

    def card() -> str:
        try:
            return str(hf_hub_download(location.path, CARD_NAME))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return ""

    path = ask(f"get the card of {location.path}", card)
    return str(info.sha), _read(Path(path)) if path else ""


def _languages(value: object) -> tuple[str, ...]:
    given: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, list) else ()
    return tuple(one for one in given if isinstance(one, str))


# The Hub's word for whatever is not in its list; then a name says which it is.
OTHER = "other"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
NAME = re.compile(r"[\w][\w .,:;+&/()'-]{0,120}")
LINK = re.compile(r"https?://[^\s()<>\"'\[\]]{1,500}")


@dataclass(frozen=True)
class License:
    """A license as the metadata of a model card has it.

    Attributes:
        key: The Hub's identifier, as `apache-2.0`.
        name: What it is called, where the identifier is `other`.
        link: Where its text is.
    """

    key: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.key})" if self.name else self.key

    @property
    def identity(self) -> tuple[str, str | None]:
        """What two licenses have in common if they are one."""
        if self.key.lower() != OTHER:
            return self.key.lower(), None
        return OTHER, self.name.lower() if self.name else self.link

    def to_metadata(self) -> dict[str, str]:
        """Keys and values of a card's metadata."""
        found = {"license": self.key, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def license_in(metadata: Mapping[str, Any], place: str) -> License | None:
    """The license that a card's metadata states; None if it states none.

    Args:
        metadata: Of the card.
        place: The address of the model's files, which a link to one of them is relative to; empty for a folder.
    """
    key = metadata.get("license")
    key = key[0] if isinstance(key, list) and len(key) == 1 else key
    if not isinstance(key, str) or not KEY.fullmatch(key) or key == "unknown":
        return None
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if isinstance(link, str) and "://" not in link:
        link = f"{place}/{link.removeprefix('./')}" if place else None
    # It is a stranger's word, which goes into a page of ours.
    return License(
        key,
        name if isinstance(name, str) and NAME.fullmatch(name) else None,
        link if isinstance(link, str) and LINK.fullmatch(link) else None,
    )


def given_license(key: str | None, name: str | None, link: str | None) -> License | None:
    """The license that the command line states.

    Raises:
        UsageError: If that cannot stand in a card.
    """
    if key is None:
        if name or link:
            raise UsageError("--license-name and --license-link belong to --license; name the license with that")
        return None
    for option, value, pattern in (("", key, KEY), ("-name", name, NAME), ("-link", link, LINK)):
        if value is not None and not pattern.fullmatch(value):
            raise UsageError(f"--license{option} is {value[:80]!r}, which cannot stand in a card")
    if key == OTHER and not name:
        raise UsageError("--license other says nothing without --license-name; give its name, and --license-link")
    return License(key, name, link)


def inherited(parents: Sequence[tuple[str, License | None]]) -> License | None:
    """The one license of all parents; None if one of them states none.

    Args:
        parents: Name and license of each.

    Raises:
        UsageError: If two are under different licenses, or theirs has no name that the Hub would take.
    """
    stated = [(name, license) for name, license in parents if license is not None]
    for name, license in stated[1:]:
        first, its = stated[0]
        if license.identity != its.identity:
            raise UsageError(
                f"{first} is under {its} and {name} under {license}; say under which license the result may be "
                f"published with --license (and --license-name, --license-link)"
            )
    if len(stated) < len(parents):
        return None
    name, license = stated[0]
    if license.key.lower() == OTHER and not license.name:
        raise UsageError(f"the card of {name} calls its license `other` without a name; give one with --license-name")
    return license
