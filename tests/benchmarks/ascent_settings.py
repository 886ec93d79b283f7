"""Other settings for the ascents of runs, which have none to be set."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from dapa_merge.search import choose, identity
from dapa_merge.search import search as searching
from dapa_merge.search.slopes import Settings


@contextmanager
def with_settings(more_rounds: int = choose.MORE_ROUNDS, **values: Any) -> Iterator[None]:
    """Inside a `with` block, directions are chosen with these settings; journals are of them.

    Args:
        more_rounds: Rounds that may follow those of the settings.
        values: Of `search.slopes.Settings`; with `max_rank` alone, there are never more.
    """
    if "max_rank" in values:
        values = {"more_rank": values["max_rank"], **values}
    chosen = functools.partial(Settings, **values)
    with (
        patch.object(identity, "Settings", chosen),
        patch.object(searching, "Settings", chosen),
        patch.object(choose, "MORE_ROUNDS", more_rounds),
    ):
        yield
