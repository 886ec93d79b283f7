"""Reading safetensors headers and shard indices without torch, and believing nothing before it is checked.

Format: https://huggingface.co/docs/safetensors, section "Format": eight bytes little-endian header length, the JSON
header, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapa_merge.errors import CheckpointError

# Bits, because sub-byte types exist in the format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# The names that mergekit and torch use in recipes, for the types that a dense checkpoint is stored in.
FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
TORCH_NAMES = {dtype: name for name, dtype in FLOAT_NAMES.items()}
# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies on disk.

    Attributes:
        name: Its name in the checkpoint.
        file: The name of its file inside the checkpoint's folder.
        dtype: As safetensors spells it, e.g. `BF16`.
        shape: Its dimensions.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a model folder holds.

    Raises:
        CheckpointError: If there is none.
    """
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


def read_index(path: Path) -> dict[str, str]:
    """For each tensor, the name of the weight file that a shard index says it is in.

    Raises:
        CheckpointError: If it is no index, or names anything but safetensors files of its own folder.
    """
    owners = read_json(path).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(shard, str) for shard in owners.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for shard in set(owners.values()):
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}, which is no safetensors file inside its own folder")
    return owners
