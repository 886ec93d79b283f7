"""Reading a model's files without torch: safetensors headers, the shard index, `config.json`, Hub snapshots.

Format: https://huggingface.co/docs/safetensors, section "Format": eight bytes little-endian header length, the JSON
header, then the tensors' bytes without holes. Everything is checked before it is believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from dapa_merge.errors import CheckpointError, HubError, one_line

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Bits, because sub-byte types exist in the format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# The names that mergekit and torch use in recipes, for the types that a dense checkpoint is stored in.
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
TORCH_NAMES = {dtype: name for name, dtype in FLOAT_NAMES.items()}
# Chat templates beyond the first lie in a folder of this name.
TEMPLATES = "additional_chat_templates"
# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 8 << 20
# What is fetched from the Hub: never pickles. Code is copied into a result, as a part of its target, but never run.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


@dataclass(frozen=True)
class Tensor:
    """Where one tensor, or a block of its rows, lies on disk.

    Attributes:
        name: Its name in the checkpoint.
        file: The name of its file inside the checkpoint's folder.
        dtype: As safetensors spells it, e.g. `BF16`.
        shape: Its dimensions.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
        first_row: Where a block of rows begins in the tensor of that name.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    first_row: int = 0

    @property
    def num_rows(self) -> int:
        """Size of the first dimension."""
        return self.shape[0] if self.shape else 1

    def narrow(self, first: int, stop: int) -> Tensor:
        """Its rows from `first` to before `stop`; they lie together, since safetensors are row-major.

        Raises:
            CheckpointError: If it has no such rows.
        """
        if not 0 <= first < stop <= self.num_rows:
            raise CheckpointError(f"{self.name} has {self.num_rows} rows, so that there are no rows {first} to {stop}")
        num_row_bytes = self.num_bytes // self.num_rows
        return replace(
            self,
            shape=(stop - first, *self.shape[1:]),
            start=self.start + first * num_row_bytes,
            stop=self.start + stop * num_row_bytes,
            first_row=self.first_row + first,
        )

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


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
    config = _read_json(folder / "config.json")
    index = folder / INDEX_NAME
    if index.is_file() and (folder / SINGLE_NAME).is_file():
        raise CheckpointError(
            f"{name} has both {SINGLE_NAME} and {INDEX_NAME}, of which programs read one or the other; remove one"
        )
    if index.is_file():
        owners = _read_index(index)
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


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, by position.

    Raises:
        CheckpointError: If the file is missing, truncated, or its header does not describe its bytes exactly.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            num_header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or num_header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is no safetensors file or is truncated ({size} bytes)")
            raw = file.read(num_header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(raw)
        tensors = [
            _tensor(path, name, entry, 8 + num_header_bytes) for name, entry in header.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header ({str(error)[:120]})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    position = 8 + num_header_bytes
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(
                f"{path} has a damaged safetensors header: {tensor.name[:120]!r} is not where it must be"
            )
        position = tensor.stop
    if position != size:
        what = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(f"{path} is {what}: the header describes {position} bytes, the file has {size}")
    return tensors


def _tensor(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> Tensor:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or offsets that are no counts")
    if entry["dtype"] not in DTYPE_BITS:
        raise ValueError(f"{name} has unknown dtype {entry['dtype']!r}")
    if math.prod(shape) * DTYPE_BITS[entry["dtype"]] != 8 * (end - begin):
        raise ValueError(f"{name} has {end - begin} bytes, which do not fit {entry['dtype']} {list(shape)}")
    return Tensor(name, path.name, entry["dtype"], shape, data_start + begin, data_start + end)


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no model folder: it has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {str(error)[:120]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _read_index(path: Path) -> dict[str, str]:
    owners = _read_json(path).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(shard, str) for shard in owners.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for shard in set(owners.values()):
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}, which is no safetensors file inside its own folder")
    return owners


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
