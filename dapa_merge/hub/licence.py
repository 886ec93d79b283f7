"""The licence that a model inherits from those that it was made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapa_merge.errors import UsageError

# The Hub's word for whatever is not in its list; then a name says which it is.
OTHER = "other"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
NAME = re.compile(r"[\w][\w .,:;+&/()'-]{0,120}")
LINK = re.compile(r"https?://[^\s()<>\"'\[\]]{1,500}")


@dataclass(frozen=True)
class Licence:
    """A licence as the metadata of a model card has it.

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
        """What two licences have in common if they are one."""
        if self.key.lower() != OTHER:
            return self.key.lower(), None
        return OTHER, self.name.lower() if self.name else self.link

    def to_metadata(self) -> dict[str, str]:
        """Keys and values of a card's metadata."""
        found = {"license": self.key, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def licence_in(metadata: Mapping[str, Any], place: str) -> Licence | None:
    """The licence that a card's metadata states; None if it states none.

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
    return Licence(
        key,
        name if isinstance(name, str) and NAME.fullmatch(name) else None,
        link if isinstance(link, str) and LINK.fullmatch(link) else None,
    )


def given_licence(key: str | None, name: str | None, link: str | None) -> Licence | None:
    """The licence that the command line states.

    Raises:
        UsageError: If that cannot stand in a card.
    """
    if key is None:
        if name or link:
            raise UsageError("--license-name and --license-link belong to --license; name the licence with that")
        return None
    for option, value, pattern in (("", key, KEY), ("-name", name, NAME), ("-link", link, LINK)):
        if value is not None and not pattern.fullmatch(value):
            raise UsageError(f"--license{option} is {value[:80]!r}, which cannot stand in a card")
    if key == OTHER and not name:
        raise UsageError("--license other says nothing without --license-name; give its name, and --license-link")
    return Licence(key, name, link)


def inherited(parents: Sequence[tuple[str, Licence | None]]) -> Licence | None:
    """The one licence of all parents; None if one of them states none.

    Args:
        parents: Name and licence of each.

    Raises:
        UsageError: If two are under different licences, or theirs has no name that the Hub would take.
    """
    stated = [(name, licence) for name, licence in parents if licence is not None]
    for name, licence in stated[1:]:
        first, its = stated[0]
        if licence.identity != its.identity:
            raise UsageError(
                f"{first} is under {its} and {name} under {licence}; say under which licence the result may be "
                f"published with --license (and --license-name, --license-link)"
            )
    if len(stated) < len(parents):
        return None
    name, licence = stated[0]
    if licence.key.lower() == OTHER and not licence.name:
        raise UsageError(f"the card of {name} calls its licence `other` without a name; give one with --license-name")
    return licence
