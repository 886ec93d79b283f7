"""Imports that come late: large libraries without the garbage collector, calls of packages, and tables of results.

Torch and transformers make a million objects. The collector looks at all of them again and again while they are made,
and whenever it runs later: a second of every start, and a tenth of the time of a small model.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any


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


def make_callable(package: str) -> None:
    """Let a package be called as the public function of its name, whichever of the two was imported first.

    Python puts a package into its parent when any module in it is imported: `dapa_merge.search` would be a function
    before and a package afterwards.
    """
    sys.modules[package].__class__ = _CallablePackage


class _CallablePackage(ModuleType):
    def _function(self) -> Any:
        return getattr(import_module("dapa_merge.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._function()(*arguments, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())


class Shown:
    """A result that a notebook shows as tables, with the rows that the command line prints."""

    def _repr_html_(self) -> str:
        # The tables are drawn by what stands above all results.
        return str(import_module("dapa_merge.notebook").html_of(self))
