"""Which endpoint judges, and whether its address and key can be meant. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from dapa_merge.errors import UsageError

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"


@dataclass(frozen=True)
class JudgeOptions:
    """Which endpoint judges, and how hard it is asked.

    Attributes:
        model: The judge's name at the endpoint.
        url: The endpoint, with its path (mostly `/v1`); by default OPENAI_BASE_URL, else the client's own.
        concurrency: Requests under way at once.
        max_requests: How many may be sent in all, retries too; None for no limit.
        timeout_seconds: How long one request may take, the first ones at most half a minute.
        max_attempts: How often a request is sent until it is answered.

    Raises:
        UsageError: If a value cannot be meant.
    """

    model: str
    url: str | None = None
    concurrency: int = 8
    max_requests: int | None = None
    timeout_seconds: float = 60
    max_attempts: int = 5

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UsageError("the judge has no model name; name the model as its endpoint knows it")
        if self.url is not None:
            check_url(self.url, "the judge's url")
        for name in ("concurrency", "max_requests", "timeout_seconds", "max_attempts"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"the judge's {name} is {value}; expected a number above 0")


def check_url(url: str, name: str) -> None:
    """Raise `UsageError`, in which `name` says where the address stands, unless it is one."""
    try:
        parts = urlsplit(url)
        # A port above 65535 is only noticed where it is read.
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or any(character.isspace() or not character.isprintable() for character in url):
        raise UsageError(
            f"{name} is no valid address (scheme, host or port is wrong, or it has a space); expected something like http://localhost:8000/v1"
        )


def key_for(url: str | None) -> str:
    """The key in the environment.

    Raises:
        UsageError: If it cannot be sent, or there is none and no address either.
    """
    key = os.environ.get(KEY, "").strip()
    if not key and url is None and BASE_URL not in os.environ:
        raise UsageError(f"the judge has no key and no address: set {KEY}, or name its url")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{KEY} holds a character that no key has, and cannot be sent; set it anew")
    # Servers on one's own machine ask for none, but the client does.
    return key or "none"


def host_of(url: str | None) -> str:
    """Host and port of an address, without user and password."""
    try:
        return urlsplit(url or "").netloc.rpartition("@")[2]
    except ValueError:
        return ""
