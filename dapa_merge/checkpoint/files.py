"""Opening a model without torch: a local folder or a snapshot from the Hub, and the bytes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.header import Tensor, read_header, read_index, read_json
from dapa_merge.errors import CheckpointError, HubError, one_line

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Chat templates beyond the first lie in a folder of this name.
TEMPLATES = "additional_chat_templates"
CHUNK_BYTES = 8 << 20
# What is fetched from the Hub: never pickles. Code is copied into a result, as a part of its target, but never run.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and found sound.

    Attributes:
        name: What the user called it: a path or a Hub id, with the revision if one was given.
        folder: Where its files are.
        config: `config.json`.
        tensors: Every tensor by name, in the order of the files.
        shards: The weight files, in order.
        commit: The commit on the Hub that the folder is a snapshot of; None for a local folder.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    shards: tuple[str, ...]
    commit: str | None = None

    def open(self, shard: str) -> BufferedReader:
        """Open one weight file, for reading only.

        Raises:
            CheckpointError: If it is gone or unreadable.
        """
        try:
            return (self.folder / shard).open("rb")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder / shard}: {error.strerror}") from error

    def ensure(self, shard: str, start: int, stop: int) -> None:
        """Make sure that these bytes of a weight file are here."""

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_parameters for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """Open a local model folder, or a snapshot of a Hub repository.

    Args:
        path: A folder, or a Hub id; a folder wins.
        revision: Branch, tag or commit on the Hub.

    Raises:
        CheckpointError: If the files are not a sound safetensors checkpoint.
        HubError: If it is no folder and the Hub does not give it.
    """
    name = f"{path}@{revision}" if revision else path
    folder, commit = Path(path), None
    if not os.path.isdir(path):
        folder = _snapshot(path, revision)
        commit = folder.name
    config = read_json(folder / "config.json")
    index = folder / INDEX_NAME
    if index.is_file() and (folder / SINGLE_NAME).is_file():
        raise CheckpointError(
            f"{name} has both {SINGLE_NAME} and {INDEX_NAME}, of which programs read one or the other; remove one"
        )
    if index.is_file():
        owners = read_index(index)
    elif (folder / SINGLE_NAME).is_file():
        owners = None
    else:
        raise CheckpointError(_no_weights(folder, name))
    shards = tuple(sorted(set(owners.values()))) if owners is not None else (SINGLE_NAME,)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in read_header(folder / shard):
            if tensor.name in tensors:
                # transformers loads the last of the two, others ask the index: it would not be one model.
                both = f"{tensors[tensor.name].file} and {shard}"
                raise CheckpointError(f"{name} holds {tensor.name} twice, in {both}; save it again")
            tensors[tensor.name] = tensor
    for tensor_name, shard in (owners or {}).items():
        if tensor_name not in tensors or tensors[tensor_name].file != shard:
            raise CheckpointError(f"{index} says that {shard} holds {tensor_name[:120]!r}, but it does not")
    return Checkpoint(name, folder, config, tensors, shards, commit)


def read_bytes(checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    """All bytes of one tensor."""
    return b"".join(iterate_bytes(checkpoint, tensor))


def iterate_bytes(checkpoint: Checkpoint, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of one tensor in pieces of at most 8 MiB.

    Raises:
        CheckpointError: If the file ends early, because it changed since its header was read.
    """
    with checkpoint.open(tensor.file) as file:
        file.seek(tensor.start)
        remaining = tensor.num_bytes
        while remaining:
            piece = file.read(min(CHUNK_BYTES, remaining))
            if not piece:
                raise CheckpointError(f"{checkpoint.folder / tensor.file} became shorter while it was read")
            remaining -= len(piece)
            yield piece


def _no_weights(folder: Path, name: str) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return f"{name} has pickled weights only, which can run code when loaded; save it again as safetensors"
    return f"{name} has neither {SINGLE_NAME} nor {INDEX_NAME}"


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_PATTERNS))
    except HFValidationError:
        raise CheckpointError(f"{repository!r} is neither a folder here nor the id of a Hub repository") from None
    except Exception as error:
        # Its HTTP library's faults are of no common class; whatever it was, the Hub did not give the model.
        raise HubError(f"{repository} is no folder here, and the Hub does not give it: {one_line(error)}") from error
