"""Values out of JSON or YAML that anybody may have written, taken only for what they have to be."""

from __future__ import annotations

import re

_SHA256 = re.compile(r"[0-9a-f]{64}")


def text_of(value: object) -> str:
    """A value that has to be a text, from a file that anybody may have written.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    return value


def sha256_of(value: object) -> str:
    """A value that has to be a SHA-256 in small hexadecimal digits.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r:.80} is no SHA-256")
    return value
