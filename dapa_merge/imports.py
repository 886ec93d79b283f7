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
    """What is imported inside the `with` block lives as long as the process, and is never looked at for garbage.

    Nothing is changed if torch is imported already: then objects of whoever imported it would be kept, too.
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
