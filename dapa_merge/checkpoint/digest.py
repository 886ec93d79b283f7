"""What a checkpoint is, in one short text: its commit on the Hub, or a digest of the bytes that matter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dapa_merge.checkpoint.files import TEMPLATES, Checkpoint, iterate_bytes
from dapa_merge.checkpoint.header import Tensor

DIGEST_THREADS = 4
# The small files that decide what a model is asked and when it stops: everything but weights, cards and images.
SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
MAX_SMALL_BYTES = 1 << 28
# Among them what describes a training, a publication or the weights, which count for themselves.
OTHER_FILES = (
    ".index.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
    "dapa_report.json", "dapa.json", "LICENSE.txt", "USE_POLICY.txt",
)  # fmt: skip


def tensors_digest(
    checkpoint: Checkpoint, names: Iterable[str] | None = None, progress: Callable[[int], None] = lambda _: None
) -> str:
    """The commit of a Hub snapshot; for a local folder the SHA-256 over the named tensors (default: all).

    Names, dtypes, shapes and bytes count; the order in the files and the division into shards do not.

    Args:
        checkpoint: The model.
        names: Which tensors decide.
        progress: Called with numbers of bytes as they are read.
    """
    if checkpoint.commit is not None:
        return f"commit {checkpoint.commit}"
    chosen = sorted(checkpoint.tensors if names is None else set(names))

    def digest(tensor: Tensor) -> bytes:
        state = hashlib.sha256(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        for piece in iterate_bytes(checkpoint, tensor):
            state.update(piece)
            progress(len(piece))
        return state.digest()

    # Reading and hashing both let other threads run.
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = list(pool.map(digest, [checkpoint.tensors[name] for name in chosen]))
    return "sha256 " + hashlib.sha256(b"".join(digests)).hexdigest()


def settings_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 over a model's config, tokenizer, chat templates and generation settings."""
    state = hashlib.sha256()
    for name, path in settings_files(checkpoint).items():
        content = path.read_bytes()
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    return "sha256 " + state.hexdigest()


def settings_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Where a model's config, tokenizer, chat templates and generation settings are, by name within its folder."""
    folder = checkpoint.folder
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*.jinja")])
        if is_settings(path.name) and path.is_file() and path.stat().st_size <= MAX_SMALL_BYTES
    }


def is_settings(name: str) -> bool:
    """Whether a file of this name is a model's config, tokenizer, chat template or generation settings."""
    return name.endswith(SMALL_FILES) and not name.endswith(OTHER_FILES)
