"""Imports of large libraries, without the garbage collector: torch and transformers make a million objects.

The collector looks at all of them again and again while they are made, and whenever it runs later: a second of every
start, and a tenth of the time of a small model.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """Import modules inside the `with` block for good: the garbage collector ignores their objects from then on.

    It also ignores whatever else exists at that time. So nothing is changed if torch is imported already: then a user's
    own objects may be there, too.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
