"""How git and git-lfs name and mark files."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable

LFS_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx
*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
*.wasm *.xz *.zip *.zst *tfevents*
"""
SPACE = "[[:space:]]"
TRACKED = " filter=lfs diff=lfs merge=lfs -text"
ATTRIBUTES = "".join(f"{pattern}{TRACKED}\n" for pattern in LFS_PATTERNS.split()).encode()


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def is_lfs(attributes: bytes) -> Callable[[str], bool]:
    """Whether a .gitattributes puts a path into LFS."""
    patterns = [
        line.split()[0].replace(SPACE, " ") for line in attributes.decode().splitlines() if "filter=lfs" in line
    ]

    def matches(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)

    return matches
