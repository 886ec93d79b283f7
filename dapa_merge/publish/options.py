"""A user's options for publishing: the destination, the license and the card. Nothing here asks the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapa_merge.checkpoint.location import Location
from dapa_merge.errors import UsageError, nearest_of

# The Hub's key for a license outside of its list, which then needs a name.
OTHER = "other"
# The identifiers that the Hub accepts (huggingface.co/docs/hub/repositories-licenses, August 2026), but for `unknown`.
_IDENTIFIERS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma other
"""
LICENSES = frozenset(_IDENTIFIERS.split())
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,80}")
NAME = re.compile(r"[\w][\w .,:;+&/()'-]{0,120}")
LINK = re.compile(r"https?://[\w.~:/?#@!$&*+,;=%-]{1,500}", re.ASCII)


@dataclass(frozen=True)
class Destination:
    """Where to publish, and how.

    Attributes:
        private: Create the repository as private; refuse one that exists and is public.
        branch: None for the default branch.
        create_pr: Open a pull request rather than commit.
        replaces: Whether another model may be replaced.
        message: The commit message; None for a generated one.
    """

    repository: str
    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    tag: str | None = None
    replaces: bool = False
    message: str | None = None


@dataclass(frozen=True)
class CardOptions:
    """A user's options for a card; None keeps the earlier value or, without one, what the files say.

    Attributes:
        title: The model's id on the Hub.
        target: Where the target is published, if the recipe names a folder.
        source: Where the source is published, if the recipe names a folder.
    """

    title: str | None = None
    license: License | None = None
    target: Location | None = None
    source: Location | None = None

    def to_said(self) -> dict[str, str]:
        """The options as plain text, to be kept in the card."""
        license = self.license.to_metadata() if self.license else {}
        said = {"title": self.title, **license, "target": self.target, "source": self.source}
        return {name: str(value) for name, value in said.items() if value}


@dataclass(frozen=True)
class License:
    """A license as the metadata of a model card states it.

    Attributes:
        key: The Hub's identifier, as `apache-2.0`.
        name: Its name, where the identifier is `other`.
        link: The address of its text.
    """

    key: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.key})" if self.name else self.key

    @property
    def identity(self) -> tuple[str, str | None]:
        """A key that is equal for two mentions of the same license."""
        if self.key.lower() != OTHER:
            return self.key.lower(), None
        return OTHER, self.name.lower() if self.name else self.link

    def to_metadata(self) -> dict[str, str]:
        """Keys and values of a card's metadata."""
        found = {"license": self.key, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def license_in(metadata: Mapping[str, Any], address: str) -> License | None:
    """The license that a card's metadata states; None if it states none.

    Args:
        metadata: The metadata of the card.
        address: The URL of the model's files, for relative links; empty for a folder.
    """
    key = metadata.get("license")
    key = key[0] if isinstance(key, list) and len(key) == 1 else key
    if not isinstance(key, str) or not KEY.fullmatch(key) or key == "unknown":
        return None
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if isinstance(link, str) and "://" not in link:
        link = f"{address}/{link.removeprefix('./')}" if address else None
    # Untrusted text that goes into our own card.
    return License(
        key,
        name if isinstance(name, str) and NAME.fullmatch(name) else None,
        link if isinstance(link, str) and LINK.fullmatch(link) else None,
    )


def given_license(key: str | None, name: str | None, link: str | None) -> License | None:
    """The license that the command line states.

    Raises:
        UsageError: If it is not valid in a card.
    """
    if key is None:
        if name or link:
            raise UsageError("--license-name and --license-link need --license; name the license with it")
        return None
    for option, value, pattern in (("", key, KEY), ("-name", name, NAME), ("-link", link, LINK)):
        if value is not None and not pattern.fullmatch(value):
            raise UsageError(f"--license{option} is {value[:80]!r}, which is not valid in a card")
    if key not in LICENSES:
        raise UsageError(
            f"--license is {key!r}, which the Hub does not know{nearest_of(key, LICENSES)}; write one of its "
            f"identifiers, such as apache-2.0, mit, llama3.1 or gemma, or other with --license-name and --license-link"
        )
    if key == OTHER and not name:
        raise UsageError("--license other needs --license-name; give its name, and --license-link")
    return License(key, name, link)


def unknown_licenses(parents: Sequence[tuple[str, License | None]]) -> Iterator[str]:
    """Yields a warning for each parent whose card states a license that the Hub does not know.

    Args:
        parents: Name and license of each.
    """
    for name, license in parents:
        if license is not None and license.key not in LICENSES:
            near = nearest_of(license.key, LICENSES)
            yield (
                f"the card of {name} states the licence {license.key!r}, which the Hub does not know{near}; name the "
                f"result's own with --license, because the Hub refuses a card with that one"
            )


def inherited(parents: Sequence[tuple[str, License | None]]) -> License | None:
    """The one license of all parents; None if one of them states none.

    Args:
        parents: Name and license of each.

    Raises:
        UsageError: If two licenses differ, or the common one is `other` without a name.
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
