"""Takes away on Linux what Windows does not have, so that tests which need it show: `pytest -p without_posix`.

It is not Windows: paths, messages of the system and the ends of lines stay those of Linux.
"""

from __future__ import annotations

import builtins
import errno
import os
import pathlib
import signal
import subprocess
from typing import Any

# On Linux they take what POSIX has when they are imported.
import peft  # noqa: F401
import platformdirs  # noqa: F401
import ray  # noqa: F401

MODULES = ("fcntl", "resource", "pwd", "grp")
# Not `getuid` and its like, which libraries on Linux ask for.
OF_OS = ("fork", "mkfifo", "openpty")
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGCONT", "SIGHUP", "SIGXFSZ")


def take_away() -> None:
    """Modules only for the tests: libraries need them, and the package asks for the system."""
    imported, kill = builtins.__import__, signal.SIGKILL

    def without(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        asking = str((globals or {}).get("__file__", ""))
        if name in MODULES and f"{os.sep}tests{os.sep}" in asking:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, globals, *rest, **named)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    builtins.__import__ = without
    subprocess.Popen.kill = lambda self: self.send_signal(kill)
    for name in OF_OS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        delattr(signal, name)
    os.symlink = refuse
    pathlib.Path.symlink_to = refuse


take_away()
