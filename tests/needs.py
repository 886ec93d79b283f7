"""What tests need of the system that not every system has; a test that needs it is skipped where it is missing.

What a test needs is read from its code: the names that it, its fixtures and the helpers of the tests that it calls use.
So a new test need not be marked. `-p without_posix` shows on Linux what is skipped elsewhere.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Need:
    """Something of a system.

    Attributes:
        names: Attributes in code, texts in it, or folders that a text in it begins with: a test with one needs this.
        is_there: Asks this system.
        reason: Why a test is skipped.
    """

    names: tuple[str, ...]
    is_there: Callable[[], bool]
    reason: str


def has_links() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.symlink("nowhere", os.path.join(folder, "link"))
        except (OSError, NotImplementedError):
            return False
    return True


NEEDS = (
    Need(("symlink_to", "symlink"), has_links, "needs symbolic links, which Windows gives to administrators only"),
    Need(("mkfifo",), lambda: hasattr(os, "mkfifo"), "needs named pipes of POSIX"),
    Need(
        ("SIGKILL", "SIGSTOP", "SIGXFSZ", "SIGHUP"), lambda: hasattr(signal, "SIGKILL"), "needs signals of POSIX"
    ),
    Need(("fork",), lambda: hasattr(os, "fork"), "needs processes that fork"),
    Need(("fcntl.flock", "fcntl.ioctl"), lambda: has_module("fcntl"), "needs fcntl, which Windows does not have"),
    Need(("setrlimit", "RLIMIT_AS"), lambda: has_module("resource"), "needs limits of processes (module resource)"),
    Need(("geteuid", "getuid", "setuid", "chmod"), lambda: hasattr(os, "fork"), "needs users and rights of POSIX"),
    Need(("openpty", "ttyname"), lambda: hasattr(os, "openpty"), "needs a terminal of POSIX"),
    Need(("UnixStreamServer", "AF_UNIX"), lambda: hasattr(os, "fork"), "needs sockets of Unix"),
    Need(("bash", "bash -e {0}", "#!/usr/bin/env bash"), lambda: os.name != "nt", "needs bash and programs of scripts"),
    Need(("/proc/", "/dev/"), lambda: os.path.exists("/dev/full"), "needs /proc and the devices of Linux"),
)  # fmt: skip


def has_module(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def missing_here() -> list[Need]:
    """What this system does not have; none on Linux."""
    return [need for need in NEEDS if not need.is_there()]


def reasons(item: Any, missing: list[Need]) -> Iterator[str]:
    """Why a test cannot run here, if it cannot."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(one.func for several in definitions for one in several), *of_parameters(item)]
    used = set().union(*map(names_in, functions))
    for need in missing:
        folders = tuple(name for name in need.names if name.endswith("/"))
        if used.intersection(need.names) or any(text.startswith(folders) for text in used):
            yield need.reason


def of_parameters(item: Any) -> Iterator[Any]:
    """What the parameters of this one test are, or stand for in a table of its module."""
    tables = [
        value
        for name, value in item.function.__globals__.items()
        if isinstance(value, dict) and name in item.function.__code__.co_names
    ]
    for parameter in getattr(getattr(item, "callspec", None), "params", {}).values():
        named = [table[parameter] for table in tables if isinstance(parameter, str) and parameter in table]
        for value in (parameter, *named):
            yield from value if isinstance(value, (tuple, list)) else [value]


def names_in(function: Callable[..., Any]) -> set[str]:
    """The names and the texts in the code of a function, and of the helpers of the tests that it uses."""
    found: set[str] = set()
    waiting: list[Any] = [function]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        one = getattr(one, "__wrapped__", one)
        one = getattr(one, "__func__", one)
        if isinstance(one, type):
            waiting += [value for value in vars(one).values() if isinstance(value, types.FunctionType)]
            continue
        if not isinstance(one, types.FunctionType) or id(one) in seen or not is_ours(one.__code__.co_filename):
            continue
        seen.add(id(one))
        used = set(names_in_code(one.__code__))
        found |= used
        for name in used & one.__globals__.keys():
            value = one.__globals__[name]
            modules = isinstance(value, types.ModuleType) and is_ours(getattr(value, "__file__", None) or "")
            waiting += [getattr(value, inner, None) for inner in used] if modules else [value]
            if isinstance(value, str):
                found.add(value)
    return found


def names_in_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from names_in_code(constant)


def is_ours(file: str) -> bool:
    return str(TESTS) in file and not file.startswith(sys.prefix)
